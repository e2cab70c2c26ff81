#pragma once

// A row of passes on tiles: each multiplies two tiles of rows by some units of a panel. Results are stored while the next
// pass begins, and visited (scaled, added to others) while it goes on: the tiles are never waited for.
// Included by one translation unit; everything is internal to it.
#include "kernels/tiles.h"

namespace numagraft::NUMAGRAFT_ISA {
namespace {

constexpr int kLongChunksFrom = 3;  // blocks
// Units of a chunk that several passes go over. Where many blocks do, their inputs leave L1 to the weights, and a longer chunk has fewer
// sums to store and to load; but the more of memory's time is waited for at its start, the fewer blocks go over it.
std::int64_t longest_chunk(const GemmArgs& a) { return a.block_count >= kLongChunksFrom ? 2 * kChunkUnits : kChunkUnits; }

// A Visit has `rows`, to be visited (0: none), and `static void visit(const Visit&, int first, int last)`.
// `rows_per_step`: visited after each step.
template <Multiply how, class Visit, int rows_per_step = 4>
class Passes {
 public:
  // `next(Operands&)` says what is multiplied, until it returns false; there is at least one. The results are added to what
  // lies at `resumed` (null: to nothing), and go to `to`, where they are visited. `to` and what a visit reads must stay
  // untouched until the pass after the next one begins, or until finish().
  template <class Next>
  NUMAGRAFT_INLINE void run(Passes& p, Next next, const void* resumed, void* to, const Visit& visit, Ahead& ahead) {
    Operands operands;
    next(operands);
    bool here = false;  // what is resumed is in the tiles
    if (resumed != nullptr && p.to_ == resumed) {
      here = p.visit_.rows == 0;
      if (!here) finish(p);
    }
    if (here) {
      step<how, true>(operands, ahead);
    } else {
      first_step<how>(operands, p.to_, static_cast<const std::byte*>(resumed), ahead);
    }
    int visited = 0;
    while (next(operands)) {
      step<how, true>(operands, ahead);
      if (visited < p.visit_.rows) {
        const int end = visited + rows_per_step < p.visit_.rows ? visited + rows_per_step : p.visit_.rows;
        Visit::visit(p.visit_, visited, end);
        visited = end;
      }
    }
    if (visited < p.visit_.rows) Visit::visit(p.visit_, visited, p.visit_.rows);
    p.to_ = static_cast<std::byte*>(to);
    p.visit_ = visit;
  }
  // Stores and visits the last results. Before the tiles are used otherwise, and at the end.
  NUMAGRAFT_INLINE void finish(Passes& p) {
    if (p.to_ == nullptr) return;
    store_results<true>(p.to_);
    if (p.visit_.rows > 0) Visit::visit(p.visit_, 0, p.visit_.rows);
    p.to_ = nullptr;
    p.visit_ = Visit{};
  }

 private:
  std::byte* to_ = nullptr;  // of the results in the tiles; null: there are none
  Visit visit_{};            // of these
};

}  // namespace
}  // namespace numagraft::NUMAGRAFT_ISA

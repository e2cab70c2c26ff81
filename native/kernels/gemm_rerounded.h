#pragma once

// int4 and mxfp4 on tiles: a chunk is expanded to int8 in L1.
// Included by one translation unit; everything is internal to it.
#include "kernels/ahead.h"
#include "kernels/expand_nibbles.h"
#include "kernels/high_halves.h"
#include "kernels/passes.h"
#include "kernels/tiles.h"

namespace numagraft::NUMAGRAFT_ISA {
namespace {

// Scales a chunk's sums, and adds them to those of the chunks before it.
struct ReroundedVisit {
  int rows = 0;
  const RowBlock* block = nullptr;
  float* c = nullptr;
  const std::int32_t* low = nullptr;
  const std::int32_t* high = nullptr;  // null: none
  const float* side = nullptr;         // scales of the columns
  bool first_chunk = false;
  bool last_chunk = false;

  static void visit(const ReroundedVisit& v, int first, int last) {
    v.high != nullptr ? add<true>(v, first, last) : add<false>(v, first, last);
  }
  template <bool halves>
  NUMAGRAFT_INLINE void add(const ReroundedVisit& v, int first, int last) {
    const F scales[2] = {load<F>(v.side), load<F>(v.side + kLanes)};
    for (int row = first; row < last; ++row) {
      for (int t = 0; t < 2; ++t) {
        const int at = row * kPanelColumns + t * kLanes;
        I sum = load<I>(v.low + at);
        if constexpr (halves) sum += load<I>(v.high + at) << 7;
        F total = to_float(sum) * scales[t];
        if (!v.first_chunk) total += load<F>(v.c + at);
        store(v.c + at, v.last_chunk ? total * splat(v.block->scale[row]) : total);
      }
    }
  }
};

// A panel of no more units is one chunk, even for few blocks.
constexpr std::int64_t kShortPanel = 12;

template <WeightKind kind, bool symmetric>
void gemm_rerounded(const GemmArgs& a) {
  using Expanded = Expansion<kind, symmetric>;
  alignas(64) std::byte expanded[Expanded::kSlots * 2 * kTileBytes];
  alignas(64) std::int32_t low[kBlockRows * kPanelColumns];
  alignas(64) std::int32_t high[kBlockRows * kPanelColumns];
  const Layout& layout = *a.layout;
  const bool alone = a.block_count == 1;
  const bool one_tile = alone && a.blocks[0].stride_rows <= 16;
  const std::int64_t units = a.last_unit - a.first_unit;
  const std::int64_t most = units <= kShortPanel ? units : longest_chunk(a);
  prefetch_first_scales(a);
  Expanded expansion(a, one_tile ? 0 : most, alone, expanded);
  Passes<Multiply::by_signed, ReroundedVisit> passes;
  std::int64_t before = 0;  // units of the chunks before this one
  for (std::int64_t panel = 0; panel < a.panels; ++panel) {
    for (std::int64_t first = a.first_unit, last; first < a.last_unit; before += last - first, first = last) {
      // Of a span, nearly equal; all of it where tiles go over it once.
      last = span_end(a, first);
      const std::int64_t chunks = (last - first + most - 1) / most;
      const bool once = one_tile || (alone && count_flagged(a.blocks[0], first, last) == 0);
      if (!once) last = first + (last - first + chunks - 1) / chunks;
      // Where later passes need this chunk, the next one's units have no place yet.
      const std::int64_t limit = once ? expansion.count() : before + last - first;
      const auto weights = [&](std::int64_t unit) { return Expanded::tiles(expansion, before + unit - first, limit); };
      const std::byte* w = a.panel + panel * layout.panel_bytes + first * layout.unit_bytes;
      const float* side = span_side(a, panel, first);
      prefetch_scales(side + panel_side_floats(layout));
      const std::int64_t steps = count_steps(a, first, last);
      // A chunk that one block reads is asked for by its expansion, the chunk behind a larger one between its products.
      Ahead ahead(w, alone ? 0 : (last - first) * layout.unit_bytes, chunk_behind(a, first, last), 0, steps, alone);
      float* c = a.c + panel * a.c_panel_stride;
      for (int b = 0; b < a.block_count; ++b, c += kBlockRows * kPanelColumns) {
        const RowBlock& block = a.blocks[b];
        ReroundedVisit visit{block.rows, &block, c, low, high, side, first == 0, last == layout.units};
        if (block.stride_rows <= 16) {
          decltype(passes)::finish(passes);
          if (!multiply_one_tile<Multiply::by_signed>(block, {first, last}, weights, ahead, nullptr, low, high)) visit.high = nullptr;
          ReroundedVisit::visit(visit, 0, block.rows);
          continue;
        }
        if (count_flagged(block, first, last) > 0) {
          decltype(passes)::run(passes, units_of(block, {first, last}, true, weights), nullptr, high, {}, ahead);
        } else {
          visit.high = nullptr;
        }
        decltype(passes)::run(passes, units_of(block, {first, last}, false, weights), nullptr, low, visit, ahead);
      }
    }
  }
  decltype(passes)::finish(passes);
}

}  // namespace
}  // namespace numagraft::NUMAGRAFT_ISA

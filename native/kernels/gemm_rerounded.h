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
  const float* side = nullptr;         // scales of the chunk's columns
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

template <WeightKind kind, bool symmetric>
void gemm_rerounded(const GemmArgs& a) {
  alignas(64) std::byte expanded[kChunkInputs * kPanelColumns];
  alignas(64) std::int32_t low[kBlockRows * kPanelColumns];
  alignas(64) std::int32_t high[kBlockRows * kPanelColumns];
  const Layout& layout = *a.layout;
  prefetch_first_scales(a);
  Passes<Multiply::by_signed, ReroundedVisit> passes;
  for (std::int64_t panel = 0; panel < a.panels; ++panel) {
    for (std::int64_t first = a.first_unit, last; first < a.last_unit; first = last) {
      last = chunk_end(layout, first);
      const std::byte* w = a.panel + panel * layout.panel_bytes + first * layout.unit_bytes;
      const float* side = panel_side(a, panel) + chunk_of(layout, first) * kPanelColumns;
      prefetch_scales(side + panel_side_floats(layout));
      const std::int64_t steps = count_steps(a, first, last);
      const bool once = steps == last - first;
      Expansion<kind, symmetric> expansion(layout, w, last - first, side, once, expanded);
      const auto weights = [&](std::int64_t unit) { return Expansion<kind, symmetric>::tiles(expansion, unit - first); };
      // A chunk that one block reads is asked for by its expansion, the chunk behind a larger one between its products.
      Ahead ahead(w, once ? 0 : (last - first) * layout.unit_bytes, chunk_behind(a, first, last), 0, steps, once);
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

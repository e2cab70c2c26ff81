#pragma once

// The loop that the multiply kernels share: which rows meet which weights, and in what order. Included by one translation
// unit of each ISA that needs it; everything is internal to it.
#include "kernels/kernel_table.h"
#include "kernels/registers.h"

namespace numagraft {
namespace {

constexpr int kFewStrips = 4;

// What sums of mxfp4 are multiplied by at the end, beside the row's scale: their weights are e2m1 times two.
template <WeightKind kind>
constexpr float kNibbleScale = kind == WeightKind::mxfp4 ? 0.5f : 1.0f;

// Lines of the next chunk that memory is asked for while this one is multiplied, as evenly as visits come.
struct Feed {
  const std::byte* next;
  std::int64_t lines;
  std::int64_t visits;
  std::int64_t due = 0;
  NG_INLINE_MEMBER void ask() {
    for (due += lines; due >= visits; due -= visits, next += 64) _mm_prefetch(reinterpret_cast<const char*>(next), _MM_HINT_T1);
  }
};

// Rows [first_row, first_row + rows) of a block over units [first_unit, last_unit) of a panel.
struct Strip {
  const RowBlock* block;
  int first_row;
  std::int64_t first_unit;
  std::int64_t last_unit;
  bool fresh;  // first strip over these weights: they come from memory
  bool alone;  // no other strip meets them
  Feed* feed;  // where lines are read in order, of all strips of a chunk; null: the first asks
};

// Two panels that one row reads side by side.
struct TwoPanels {
  std::int64_t panel[2];
  std::int64_t operator[](int i) const { return panel[i]; }
  std::int64_t apart(const GemmArgs& a) const { return (panel[1] - panel[0]) * a.layout->panel_bytes; }
};

// Those flags of a unit that say that one of so many rows from `first_row` on has a high half.
NG_INLINE std::uint8_t tiles_of_rows(int first_row, int rows) {
  return static_cast<std::uint8_t>((first_row < 16 ? 1 : 0) | (first_row + rows > 16 ? 2 : 0));
}
NG_INLINE std::uint8_t strip_flags(const Strip& strip, int rows) { return tiles_of_rows(strip.first_row, rows); }

// A block's strips, and of `left` rows in so many strips those of the next: nearly equal heights.
NG_INLINE int strips_of(int rows, int most_rows) { return (rows + most_rows - 1) / most_rows; }
NG_INLINE int next_strip(int left, int strips) { return (left + strips - 1) / strips; }

NG_INLINE std::int64_t count_strips(const GemmArgs& a, int most_rows) {
  std::int64_t strips = 0;
  for (int b = 0; b < a.block_count; ++b) strips += strips_of(a.blocks[b].rows, most_rows);
  return strips;
}

// Calls body(block, first row, rows, c) for every strip; `c`: of the first row of all.
template <class Body>
NG_INLINE void for_strips(const GemmArgs& a, int most_rows, float* c, Body body) {
  for (int b = 0; b < a.block_count; ++b) {
    const RowBlock& block = a.blocks[b];
    const int count = strips_of(block.rows, most_rows);
    for (int i = 0, row = 0, rows; i < count; ++i, row += rows, c += rows * kPanelColumns) {
      rows = next_strip(block.rows - row, count - i);
      body(block, row, rows, c);
    }
  }
}

// Passes over a chunk of all strips of so many rows, each of which takes `passes_of` its height.
template <class PassesOf>
NG_INLINE std::int64_t count_passes(int rows, int most_rows, PassesOf passes_of) {
  std::int64_t passes = 0;
  for (int strips = strips_of(rows, most_rows), height; strips > 0; --strips, rows -= height) {
    height = next_strip(rows, strips);
    passes += passes_of(height);
  }
  return passes;
}

template <class Kernel, int rows>
NG_INLINE void run_strip(Kernel& kernel, int count, const GemmArgs& a, std::int64_t panel, const Strip& strip, float* c) {
  if constexpr (rows > 1) {
    if (count < rows) return run_strip<Kernel, rows - 1>(kernel, count, a, panel, strip, c);
  }
  kernel.template run<rows>(a, panel, strip, c);
}

// Strips of nearly equal heights, all of them over one chunk of a panel before the next: the chunk stays in L1. While few
// strips go over a chunk memory is what they wait for, and it must not fall idle behind the first: small chunks.
//
// A kernel has most_rows (of a strip), chunk_units (of many strips), few_strip_units, single_strip_units (0: all of them),
// run<rows>(args, panel, strip, c), and finish(args, panel, c) for what is left to do to a panel's sums. It may have
// run_two_panels(args, panels, first unit, last unit), for one row, and in_order_units instead of the last two where memory wants lines in order, and
// add_lists(args, panel, c), of high halves that are listed. With visits(rows), how often a block of so many rows goes over a line of a unit's tiles, its strips are then given a feed.
template <class Kernel>
void gemm_strips(const GemmArgs& a) {
  Kernel kernel;
  std::int64_t done = 0;
  if constexpr (requires { kernel.run_two_panels(a, TwoPanels{}, done, done); }) {
    if (a.in_order && a.block_count == 1 && a.blocks[0].rows == 1) {
      const std::int64_t chunk = Kernel::single_strip_units > 0 ? Kernel::single_strip_units : a.last_unit - a.first_unit;
      // One half of the panels beside the other: both streams go on from panel to panel.
      const std::int64_t half = a.panels / 2;
      for (std::int64_t panel = 0; panel < half; ++panel) {
        const TwoPanels two = TwoPanels{{panel, panel + half}};
        for (std::int64_t first = a.first_unit; first < a.last_unit; first += chunk) {
          kernel.run_two_panels(a, two, first, first + chunk < a.last_unit ? first + chunk : a.last_unit);
        }
        if (a.last_unit < a.layout->units) continue;
        for (std::int64_t of : two.panel) kernel.finish(a, of, a.c + of * a.c_panel_stride);
      }
      done = 2 * half;
    }
  }
  const std::int64_t all_strips = count_strips(a, Kernel::most_rows);
  std::int64_t chunk = all_strips == 1 ? Kernel::single_strip_units : all_strips <= kFewStrips ? Kernel::few_strip_units : Kernel::chunk_units;
  if constexpr (requires { Kernel::in_order_units; }) {
    if (a.in_order && all_strips <= kFewStrips) chunk = Kernel::in_order_units;
  }
  if (chunk == 0) chunk = a.last_unit - a.first_unit;
  for (std::int64_t panel = done; panel < a.panels; ++panel) {
    float* const panel_c = a.c + panel * a.c_panel_stride;
    for (std::int64_t first = a.first_unit; first < a.last_unit; first += chunk) {
      const std::int64_t last = first + chunk < a.last_unit ? first + chunk : a.last_unit;
      Feed feed{a.panel + panel * a.layout->panel_bytes + last * a.layout->unit_bytes, (last - first) * a.layout->unit_bytes / 64, 0};
      if constexpr (requires { Kernel::visits(0); }) {
        for (int b = 0; b < a.block_count; ++b) feed.visits += (last - first) * Kernel::visits(a.blocks[b].rows);
      }
      Feed* const asked = a.in_order && feed.visits > 0 ? &feed : nullptr;
      for_strips(a, Kernel::most_rows, panel_c, [&](const RowBlock& block, int row, int rows, float* c) {
        const bool fresh = &block == a.blocks && row == 0;
        run_strip<Kernel, Kernel::most_rows>(kernel, rows, a, panel, Strip{&block, row, first, last, fresh, all_strips == 1, asked}, c);
      });
    }
    if constexpr (requires { kernel.add_lists(a, panel, panel_c); }) kernel.add_lists(a, panel, panel_c);
    if (a.last_unit == a.layout->units) kernel.finish(a, panel, panel_c);
  }
}

// int8: the integer sums of a panel as floats, without what the weights' offset adds to them.
NG_INLINE void finish_int8(const GemmArgs& a, std::int64_t panel, float* c) {
  const float* side = panel_side(a, panel);
  for (int b = 0; b < a.block_count; ++b) {
    const RowBlock& block = a.blocks[b];
    for (int row = 0; row < block.rows; ++row, c += kPanelColumns) {
      const V offset = repeat32(static_cast<int>(static_cast<unsigned>(block.sum[row]) * kInt8Offset));
      const VF scale = repeat(block.scale[row]);
#pragma GCC unroll 4
      for (int v = 0; v < 2 * kParts; ++v) {
        float* to = c + v * kInt32s;
        const V sum = sub32(load_bytes(reinterpret_cast<const std::byte*>(to)), offset);
        store_floats(to, mul(to_floats(sum), mul(load_floats(side + v * kInt32s), scale)));
      }
    }
  }
}

// int4 and mxfp4: the sums of a strip, once they are whole.
template <WeightKind kind, int rows>
NG_INLINE void finish_nibbles(const RowBlock& block, int first_row, float* c) {
#pragma GCC unroll 12
  for (int r = 0; r < rows; ++r) {
    const VF scale = repeat(block.scale[first_row + r] * kNibbleScale<kind>);
    for (int v = 0; v < 2 * kParts; ++v) {
      float* const to = c + r * kPanelColumns + v * kInt32s;
      store_floats(to, mul(load_floats(to), scale));
    }
  }
}

}  // namespace
}  // namespace numagraft

#pragma once

// int4 and mxfp4 without VNNI, one strip of rows. Internal to the unit that includes it.
#include "kernels/listed_nibbles.h"
#include "kernels/nibble_lines.h"
#include "kernels/nibble_row.h"

namespace numagraft {
namespace {

// `count` vectors of a unit's columns, which begin at the tile `w`, over one group of 32 inputs: 32-bit sums.
template <WeightKind kind, int group, int rows, int count>
NG_INLINE void nibble_group(const std::byte* w, const std::byte* const (&x)[rows], const Asks& asks, V (&sum)[rows][count]) {
  constexpr int run = kind == WeightKind::mxfp4 ? 4 : 8;  // 8 x 2 x 24 x 127 would overflow
  V narrow[rows][count];
  nibble_lines<kind, group, 0, run, false>(w, kNibbleTile, x, asks, narrow);
#pragma GCC unroll 12
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < count; ++v) sum[r][v] = madd(narrow[r][v], ones16());
  }
  if constexpr (run < 8) {
    nibble_lines<kind, group, run, 8, false>(w, kNibbleTile, x, asks, narrow);
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < count; ++v) sum[r][v] = add32(sum[r][v], madd(narrow[r][v], ones16()));
    }
  }
}

// More rows: what a group adds goes to c at once, high and low halves after each other.
template <WeightKind kind, bool symmetric, int group, int rows, int count, bool high>
NG_INLINE void add_nibble_group(const Layout& layout, const std::byte* w, int first, const std::byte* x, const float* group_sum, const Asks& asks,
                                float* c) {
  constexpr float offset = kind == WeightKind::mxfp4 ? kMxfp4Offset : 8.0f;
  const std::byte* inputs[rows];
#pragma GCC unroll 12
  for (int r = 0; r < rows; ++r) inputs[r] = x + r * kUnitInputs;
  V sum[rows][count];
  nibble_group<kind, group, rows, count>(w + first / kParts * kNibbleTile, inputs, asks, sum);
#pragma GCC unroll 4
  for (int v = 0; v < count; ++v) {
    VF scale, minimum;
    nibble_scales<kind, symmetric>(layout, w + layout.data_bytes, first + v, group, scale, minimum);
    if constexpr (high) scale = mul(scale, repeat(128.0f));
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) {
      float* to = c + r * kPanelColumns + (first + v) * kInt32s;
      VF value = to_floats(sum[r][v]);
      VF total = load_floats(to);
      if constexpr (!high) {
        const VF of_inputs = repeat(group_sum[r * 2 + group]);
        if constexpr (symmetric) value = fma(of_inputs, repeat(-offset), value);
        if constexpr (!symmetric) total = fma(minimum, of_inputs, total);
      }
      store_floats(to, fma(scale, value, total));
    }
  }
}

// Three rows of mxfp4 side by side have more sums, tables and offsets than there are registers.
template <WeightKind kind>
constexpr int nibbles_side_by_side(int rows) {
  return kind == WeightKind::mxfp4 && kParts == 2 && rows == 3 ? kVectors / 2 : side_by_side(rows);
}

template <WeightKind kind, bool symmetric, int rows>
void nibble_rows(const GemmArgs& a, std::int64_t panel, const Strip& strip, float* c) {
  constexpr int count = nibbles_side_by_side<kind>(rows);
  const Layout& layout = *a.layout;
  const RowBlock& block = *strip.block;
  const std::uint8_t mask = strip_flags(strip, rows);
  const Asks asks{strip.fresh ? kPrefetchAhead : 0, strip.feed};
  const Asks none{};
  if (strip.first_unit == 0) {
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) {
      for (int v = 0; v < kVectors; ++v) store_floats(c + r * kPanelColumns + v * kInt32s, zero_float());
    }
  }
  for (std::int64_t unit = strip.first_unit; unit < strip.last_unit; ++unit) {
    const std::byte* w = a.panel + panel * layout.panel_bytes + unit * layout.unit_bytes;
    const std::int64_t at = unit * block.stride_rows + strip.first_row;
    const std::byte* low = block.low + at * kUnitInputs;
    const std::byte* high = block.high + at * kUnitInputs;
    const float* group_sum = block.group_sum + at * 2;
    if (strip.fresh && strip.feed == nullptr) {
      for (std::int64_t line = layout.data_bytes; line < layout.unit_bytes; line += 64) prefetch_line(w + line);
    }
    for (int first = 0; first < kVectors; first += count) {
      add_nibble_group<kind, symmetric, 0, rows, count, false>(layout, w, first, low, group_sum, asks, c);
      add_nibble_group<kind, symmetric, 1, rows, count, false>(layout, w, first, low, group_sum, count == kVectors || strip.feed != nullptr ? asks : none, c);
      if (block.flags[unit] & mask) {
        add_nibble_group<kind, symmetric, 0, rows, count, true>(layout, w, first, high, nullptr, none, c);
        add_nibble_group<kind, symmetric, 1, rows, count, true>(layout, w, first, high, nullptr, none, c);
      }
    }
  }
  if (strip.last_unit == layout.units) finish_nibbles<kind, rows>(block, strip.first_row, c);
}

template <WeightKind kind, bool symmetric>
struct Nibbles {
  static constexpr int most_rows = kMostRows;
  static constexpr std::int64_t chunk_units = 4;  // sums go to c for every group: what matters is that L1 holds the inputs
  static constexpr std::int64_t few_strip_units = 4;
  static constexpr std::int64_t single_strip_units = kind == WeightKind::mxfp4 ? kWrappingUnits : 0;
  static constexpr std::int64_t in_order_units = 4;
  // Lines that strips of so many rows go over, of one unit.
  static std::int64_t visits(int rows) {
    return 16 * count_passes(rows, most_rows, [](int of_strip) { return of_strip == 1 ? 0 : kVectors / nibbles_side_by_side<kind>(of_strip); });
  }
  WrappingSums wrapping;
  template <int rows>
  void run(const GemmArgs& a, std::int64_t panel, const Strip& strip, float* c) {
    if constexpr (rows == 1) {
      nibble_row<kind, symmetric>(a, panel, strip, wrapping, c);
    } else {
      nibble_rows<kind, symmetric, rows>(a, panel, strip, c);
    }
  }
  void run_two_panels(const GemmArgs& a, TwoPanels panels, std::int64_t first, std::int64_t last) {
    nibble_two_panels<kind, symmetric>(a, panels, first, last, wrapping);
  }
  void add_lists(const GemmArgs& a, std::int64_t panel, float* c) { add_listed<kind>(a, panel, c); }
  void finish(const GemmArgs&, std::int64_t, float*) {}
};

}  // namespace
}  // namespace numagraft

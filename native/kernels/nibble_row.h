#pragma once

// int4 and mxfp4 without VNNI, one row. Internal to the unit that includes it.
#include "kernels/nibble_lines.h"

namespace numagraft {
namespace {

// mxfp4 with one row: sums of 8 lines may wrap, as without the 12 of each weight they lie within 8 x 2 x 12 x 127 = 24384. So they
// begin at -12 times the inputs that a 16-bit sum meets: of every four, the first two and the last two.
constexpr std::int64_t kWrappingUnits = 512;
struct WrappingSums {
  const std::byte* low = nullptr;  // of the first unit: whose sums these are
  std::int64_t units = 0;
  std::int32_t begin[kWrappingUnits][2][2];  // [unit][low, high half][group]

  NG_INLINE std::int32_t of_group(const std::byte* inputs) {
    const __m256i twelve = _mm256_maddubs_epi16(_mm256_set1_epi8(kMxfp4Offset), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(inputs)));
    __m128i sum = _mm_add_epi16(_mm256_castsi256_si128(twelve), _mm256_extracti128_si256(twelve, 1));
    sum = _mm_add_epi16(sum, _mm_unpackhi_epi64(sum, sum));
    sum = _mm_add_epi16(sum, _mm_shuffle_epi32(sum, 1));
    return _mm_cvtsi128_si32(_mm_sub_epi16(_mm_setzero_si128(), sum));
  }
  void prepare(const RowBlock& block, int row, std::int64_t first_unit, std::int64_t last_unit, std::uint8_t mask) {
    const std::int64_t first = (first_unit * block.stride_rows + row) * kUnitInputs;
    if (block.low + first == low && last_unit - first_unit == units) return;  // the panel before met the same inputs
    low = block.low + first;
    units = last_unit - first_unit;
    for (std::int64_t unit = 0; unit < units; ++unit) {
      const std::int64_t at = first + unit * block.stride_rows * kUnitInputs;
      for (int group = 0; group < 2; ++group) {
        begin[unit][0][group] = of_group(block.low + at + group * 32);
        if (block.flags[first_unit + unit] & mask) begin[unit][1][group] = of_group(block.high + at + group * 32);
      }
    }
  }
};

// Where one row's sums over a group come from: a tile of nibbles and another `apart` from it, the scales of the first, those of
// the second `scales_apart` from it, and the vectors of a panel's columns at which their tiles begin.
struct TwoTiles {
  const std::byte* lines;
  std::int64_t apart;
  const std::byte* scales;
  std::int64_t scales_apart;
  int first_vector;
  int second_vector;
};

// One row: its sums stay in registers, and high and low halves meet the weights in one pass. `begin`: of WrappingSums.
template <WeightKind kind, bool symmetric, int group>
NG_INLINE void add_row_group(const Layout& layout, const RowBlock& block, int row, std::int64_t unit, bool with_high, const TwoTiles& w,
                             const Asks& asks, const std::int32_t (*begin)[2], VF (&total)[kVectors]) {
  constexpr bool wraps = kind == WeightKind::mxfp4;
  const std::int64_t at = unit * block.stride_rows + row;
  V sum[kVectors];
  if (with_high) {
    V narrow[2][kVectors];
    if constexpr (wraps) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        narrow[0][v] = repeat32(begin[0][group]);
        narrow[1][v] = repeat32(begin[1][group]);
      }
    }
    nibble_lines<kind, group, 0, 8, wraps, 2, kVectors>(w.lines, w.apart, {block.low + at * kUnitInputs, block.high + at * kUnitInputs}, asks, narrow);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[v] = add32(madd(narrow[0][v], ones16()), madd(narrow[1][v], repeat16(128)));
  } else {
    V narrow[1][kVectors];
    if constexpr (wraps) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) narrow[0][v] = repeat32(begin[0][group]);
    }
    nibble_lines<kind, group, 0, 8, wraps, 1, kVectors>(w.lines, w.apart, {block.low + at * kUnitInputs}, asks, narrow);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[v] = madd(narrow[0][v], ones16());
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    VF scale, minimum;
    const int vector = (v < kParts ? w.first_vector : w.second_vector) + v % kParts;
    nibble_scales<kind, symmetric>(layout, w.scales + v / kParts * w.scales_apart, vector, group, scale, minimum);
    VF value = to_floats(sum[v]);
    if constexpr (!wraps) {
      const VF inputs = repeat(block.group_sum[at * 2 + group]);
      if constexpr (symmetric) value = fma(inputs, repeat(-8.0f), value);
      if constexpr (!symmetric) total[v] = fma(minimum, inputs, total[v]);
    }
    total[v] = fma(scale, value, total[v]);
  }
}

template <WeightKind kind, bool symmetric>
void nibble_row(const GemmArgs& a, std::int64_t panel, const Strip& strip, [[maybe_unused]] WrappingSums& wrapping, float* c) {
  const Layout& layout = *a.layout;
  const RowBlock& block = *strip.block;
  const Asks asks{strip.fresh ? kPrefetchAhead : 0};
  const std::uint8_t mask = strip_flags(strip, 1);
  if constexpr (kind == WeightKind::mxfp4) wrapping.prepare(block, strip.first_row, strip.first_unit, strip.last_unit, mask);
  VF total[kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) total[v] = strip.first_unit == 0 ? zero_float() : load_floats(c + v * kInt32s);
  for (std::int64_t unit = strip.first_unit; unit < strip.last_unit; ++unit) {
    const std::byte* w = a.panel + panel * layout.panel_bytes + unit * layout.unit_bytes;
    const bool with_high = block.flags[unit] & mask;
    const std::int64_t half = (layout.data_bytes + layout.unit_bytes) / 2;
    const std::int32_t (*begin)[2] = nullptr;
    if constexpr (kind == WeightKind::mxfp4) begin = wrapping.begin[unit - strip.first_unit];
    const TwoTiles tiles{w, kNibbleTile, w + layout.data_bytes, 0, 0, kParts};
    if (strip.fresh) {
      for (std::int64_t line = layout.data_bytes; line < half; line += 64) prefetch_line(w + line);
    }
    add_row_group<kind, symmetric, 0>(layout, block, strip.first_row, unit, with_high, tiles, asks, begin, total);
    if (strip.fresh) {
      for (std::int64_t line = half; line < layout.unit_bytes; line += 64) prefetch_line(w + line);
    }
    add_row_group<kind, symmetric, 1>(layout, block, strip.first_row, unit, with_high, tiles, asks, begin, total);
  }
  const VF scale = repeat(strip.last_unit == layout.units ? block.scale[strip.first_row] * kNibbleScale<kind> : 1.0f);
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) store_floats(c + v * kInt32s, mul(total[v], scale));
}

// The same for two panels in turn: their tiles side by side, tile after tile.
template <WeightKind kind, bool symmetric>
void nibble_two_panels(const GemmArgs& a, TwoPanels panels, std::int64_t first_unit, std::int64_t last_unit, [[maybe_unused]] WrappingSums& wrapping) {
  const Layout& layout = *a.layout;
  const RowBlock& block = a.blocks[0];
  if constexpr (kind == WeightKind::mxfp4) wrapping.prepare(block, 0, first_unit, last_unit, 1);
  float* const c[2] = {a.c + panels[0] * a.c_panel_stride, a.c + panels[1] * a.c_panel_stride};
  const std::int64_t apart = panels.apart(a);
  VF total[2][kVectors];  // [tile], of the first panel and the second
  for (int tile = 0; tile < 2; ++tile) {
    for (int v = 0; v < kVectors; ++v) {
      const float* from = c[v / kParts] + (tile * kParts + v % kParts) * kInt32s;
      total[tile][v] = first_unit == 0 ? zero_float() : load_floats(from);
    }
  }
  for (std::int64_t unit = first_unit; unit < last_unit; ++unit) {
    const std::byte* w = a.panel + panels[0] * layout.panel_bytes + unit * layout.unit_bytes;
    const bool with_high = block.flags[unit] & 1;
    const std::int32_t (*begin)[2] = nullptr;
    if constexpr (kind == WeightKind::mxfp4) begin = wrapping.begin[unit - first_unit];
    for (int tile = 0; tile < 2; ++tile) {
      const TwoTiles tiles{w + tile * kNibbleTile, apart, w + layout.data_bytes, apart, tile * kParts, tile * kParts};
      add_row_group<kind, symmetric, 0>(layout, block, 0, unit, with_high, tiles, Asks{kPrefetchAheadInOrder}, begin, total[tile]);
      add_row_group<kind, symmetric, 1>(layout, block, 0, unit, with_high, tiles, Asks{kPrefetchAheadInOrder}, begin, total[tile]);
    }
    for (std::int64_t line = layout.data_bytes; line < layout.unit_bytes; line += 64) {
      prefetch_line(w + line, kPrefetchAheadInOrder);
      prefetch_line(w + apart + line, kPrefetchAheadInOrder);
    }
  }
  const VF scale = repeat(last_unit == layout.units ? block.scale[0] * kNibbleScale<kind> : 1.0f);
  for (int tile = 0; tile < 2; ++tile) {
    for (int v = 0; v < kVectors; ++v) store_floats(c[v / kParts] + (tile * kParts + v % kParts) * kInt32s, mul(total[tile][v], scale));
  }
}

}  // namespace
}  // namespace numagraft

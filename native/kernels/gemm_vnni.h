#pragma once

// int8, int4 and mxfp4 weights with AVX-512 VNNI. The weights are the unsigned operand: int8 is stored with an offset of
// 128, nibbles are unsigned by nature, and what the offset adds is offset times the sum of the row's integers.
// Included by one translation unit of each ISA that needs it; everything is internal to it.
#include "kernels/kernel_table.h"
#include "kernels/listed_int8.h"
#include "kernels/listed_nibbles.h"
#include "kernels/registers.h"
#include "kernels/row_strips.h"

namespace numagraft {
namespace {

constexpr int kInt8Rows = 12;
constexpr int kInt8HighRows = 6;  // up to here high and low halves meet the weights in one pass
constexpr int kNibbleRows = 4;

NG_INLINE __m512i four_inputs(const std::byte* x) {
  int word;
  __builtin_memcpy(&word, x, 4);
  return _mm512_set1_epi32(word);
}

// Both tiles of a unit, line by line: two streams of 1 KB at a time are what memory answers fastest.
template <int rows, bool with_high, bool fresh>
NG_INLINE void int8_lines(const std::byte* w, const std::byte* low, const std::byte* high, __m512i (&sum)[rows][2],
                          __m512i (&high_sum)[rows][2]) {
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    if (fresh) {
      prefetch_line(w + i * 64);
      prefetch_line(w + 1024 + i * 64);
    }
    const __m512i w0 = _mm512_loadu_si512(w + i * 64);
    const __m512i w1 = _mm512_loadu_si512(w + 1024 + i * 64);
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) {
      const __m512i v = four_inputs(low + r * kUnitInputs + i * 4);
      sum[r][0] = _mm512_dpbusd_epi32(sum[r][0], w0, v);
      sum[r][1] = _mm512_dpbusd_epi32(sum[r][1], w1, v);
      if constexpr (with_high) {
        const __m512i h = four_inputs(high + r * kUnitInputs + i * 4);
        high_sum[r][0] = _mm512_dpbusd_epi32(high_sum[r][0], w0, h);
        high_sum[r][1] = _mm512_dpbusd_epi32(high_sum[r][1], w1, h);
      }
    }
  }
}

template <int rows, bool with_high>
NG_INLINE void int8_unit(const std::byte* w, const std::byte* low, const std::byte* high, bool fresh, __m512i (&sum)[rows][2],
                         __m512i (&high_sum)[rows][2]) {
  if (fresh) {
    int8_lines<rows, with_high, true>(w, low, high, sum, high_sum);
  } else {
    int8_lines<rows, with_high, false>(w, low, high, sum, high_sum);
  }
}

// Adds to the integer sums of a panel in c; finish_int8 makes floats of them. Every loop over the sums is unrolled: one that
// is not keeps them in memory.
template <int rows>
void int8_rows(const GemmArgs& a, std::int64_t panel, const Strip& strip, float* c) {
  const Layout& layout = *a.layout;
  const RowBlock& block = *strip.block;
  const std::byte* w = a.panel + panel * layout.panel_bytes;
  const std::int64_t step = std::int64_t{block.stride_rows} * kUnitInputs;
  const std::byte* low = block.low + strip.first_row * kUnitInputs;
  const std::byte* high = block.high + strip.first_row * kUnitInputs;
  const std::uint8_t mask = strip_flags(strip, rows);
  if (strip.fresh) prefetch_scales(panel_side(a, panel));
  __m512i sum[rows][2];
#pragma GCC unroll 12
  for (int r = 0; r < rows; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_si512();
  if constexpr (rows <= kInt8HighRows) {
    __m512i high_sum[rows][2];
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) high_sum[r][0] = high_sum[r][1] = _mm512_setzero_si512();
    for (std::int64_t unit = strip.first_unit; unit < strip.last_unit; ++unit) {
      if (block.flags[unit] & mask) {
        int8_unit<rows, true>(w + unit * layout.unit_bytes, low + unit * step, high + unit * step, strip.fresh, sum, high_sum);
      } else {
        int8_unit<rows, false>(w + unit * layout.unit_bytes, low + unit * step, nullptr, strip.fresh, sum, high_sum);
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) {
      for (int t = 0; t < 2; ++t) sum[r][t] = _mm512_add_epi32(sum[r][t], _mm512_slli_epi32(high_sum[r][t], 7));
    }
  } else {
    for (std::int64_t unit = strip.first_unit; unit < strip.last_unit; ++unit) {
      if (!(block.flags[unit] & mask)) continue;
      int8_unit<rows, false>(w + unit * layout.unit_bytes, high + unit * step, nullptr, strip.fresh, sum, sum);
    }
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) {
      for (int t = 0; t < 2; ++t) sum[r][t] = _mm512_slli_epi32(sum[r][t], 7);
    }
    for (std::int64_t unit = strip.first_unit; unit < strip.last_unit; ++unit) {
      const bool fresh = strip.fresh && !(block.flags[unit] & mask);
      int8_unit<rows, false>(w + unit * layout.unit_bytes, low + unit * step, nullptr, fresh, sum, sum);
    }
  }
  const bool first = strip.first_unit == 0;
#pragma GCC unroll 12
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
    for (int t = 0; t < 2; ++t) {
      float* to = c + r * kPanelColumns + t * kTileColumns;
      _mm512_storeu_si512(to, first ? sum[r][t] : _mm512_add_epi32(sum[r][t], _mm512_loadu_si512(to)));
    }
  }
}

// Both tiles of a unit: sums[operand][tile][group of 32 inputs], of several rows or of one row's low and high halves. The
// lines of scales are asked for between the weights': memory wants requests spread.
template <WeightKind kind, int operands>
NG_INLINE void nibble_unit(const std::byte* w, const std::byte* const (&x)[operands], __m512i lookup, bool fresh, const std::byte* scales,
                           std::int64_t scale_bytes, __m512i (&sum)[operands][2][2]) {
  const __m512i mask = _mm512_set1_epi8(15);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    if (fresh && i % 2 == 0 && i * 32 < scale_bytes) prefetch_line(scales + i * 32);
    __m512i values[2][2];
    for (int t = 0; t < 2; ++t) {
      const std::byte* line = w + t * 512 + i * 64;
      // int4's tiles side by side, mxfp4's lines in order: with units of 17 lines the two streams of the other way are slower.
      if (fresh) prefetch_line(kind == WeightKind::mxfp4 ? w + (2 * i + t) * 64 : line);
      const __m512i pair = _mm512_loadu_si512(line);
      values[t][0] = _mm512_and_si512(pair, mask);
      values[t][1] = _mm512_and_si512(_mm512_srli_epi16(pair, 4), mask);
      if constexpr (kind == WeightKind::mxfp4) {
        for (int g = 0; g < 2; ++g) values[t][g] = _mm512_shuffle_epi8(lookup, values[t][g]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < operands; ++r) {
      for (int g = 0; g < 2; ++g) {
        const __m512i v = four_inputs(x[r] + g * 32 + i * 4);
        for (int t = 0; t < 2; ++t) sum[r][t][g] = _mm512_dpbusd_epi32(sum[r][t][g], values[t][g], v);
      }
    }
  }
}

template <WeightKind kind, bool symmetric, int rows>
void nibble_rows(const GemmArgs& a, std::int64_t panel, const Strip& strip, float* c) {
  constexpr float offset = kind == WeightKind::mxfp4 ? kMxfp4Offset : 8.0f;
  const Layout& layout = *a.layout;
  const RowBlock& block = *strip.block;
  const std::byte* weights = a.panel + panel * layout.panel_bytes;
  const std::uint8_t mask = strip_flags(strip, rows);
  // e2m1 times two plus 12, by code
  const __m512i lookup = _mm512_broadcast_i32x4(_mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
  const int second_group = layout.unit_groups == 2 ? kPanelColumns : 0;
  __m512 total[rows][2];
  for (int r = 0; r < rows; ++r) {
    for (int t = 0; t < 2; ++t) {
      total[r][t] = strip.first_unit == 0 ? _mm512_setzero_ps() : _mm512_loadu_ps(c + r * kPanelColumns + t * kTileColumns);
    }
  }
  for (std::int64_t unit = strip.first_unit; unit < strip.last_unit; ++unit) {
    const std::byte* w = weights + unit * layout.unit_bytes;
    const std::int64_t at = unit * block.stride_rows + strip.first_row;
    const float* group_sum = block.group_sum + at * 2;
    const std::byte* scales = w + layout.data_bytes;
    const std::int64_t scale_bytes = layout.unit_bytes - layout.data_bytes;
    const std::byte* low[rows];
    const std::byte* high[rows];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      low[r] = block.low + (at + r) * kUnitInputs;
      high[r] = block.high + (at + r) * kUnitInputs;
    }
    __m512i sum[rows][2][2];
    for (int r = 0; r < rows; ++r) {
      for (int t = 0; t < 2; ++t) sum[r][t][0] = sum[r][t][1] = _mm512_setzero_si512();
    }
    if (!(block.flags[unit] & mask)) {
      nibble_unit<kind, rows>(w, low, lookup, strip.fresh, scales, scale_bytes, sum);
    } else if constexpr (rows == 1) {
      // One pass for both halves: a second one would leave memory idle.
      __m512i both[2][2][2] = {};
      nibble_unit<kind, 2>(w, {low[0], high[0]}, lookup, strip.fresh, scales, scale_bytes, both);
      for (int t = 0; t < 2; ++t) {
        for (int g = 0; g < 2; ++g) sum[0][t][g] = _mm512_add_epi32(both[0][t][g], _mm512_slli_epi32(both[1][t][g], 7));
      }
    } else {
      nibble_unit<kind, rows>(w, high, lookup, strip.fresh, scales, scale_bytes, sum);
      for (int r = 0; r < rows; ++r) {
        for (int t = 0; t < 2; ++t) {
          for (int g = 0; g < 2; ++g) sum[r][t][g] = _mm512_slli_epi32(sum[r][t][g], 7);
        }
      }
      nibble_unit<kind, rows>(w, low, lookup, false, scales, 0, sum);
    }
#pragma GCC unroll 2
    for (int t = 0; t < 2; ++t) {
#pragma GCC unroll 2
      for (int g = 0; g < 2; ++g) {
        const int column = g * second_group + t * kTileColumns;
        __m512 scale;
        __m512 minimum;
        if constexpr (kind == WeightKind::mxfp4) {
          scale = power_of_two(scales + column);
        } else {
          const auto* halves = reinterpret_cast<const std::uint16_t*>(scales);
          scale = widen_bf16(halves + column);
          if constexpr (!symmetric) minimum = widen_bf16(halves + layout.unit_groups * kPanelColumns + column);
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
          const __m512 inputs = _mm512_set1_ps(group_sum[r * 2 + g]);
          __m512 value = _mm512_cvtepi32_ps(sum[r][t][g]);
          if constexpr (symmetric) value = _mm512_fnmadd_ps(inputs, _mm512_set1_ps(offset), value);
          total[r][t] = _mm512_fmadd_ps(scale, value, total[r][t]);
          if constexpr (!symmetric) total[r][t] = _mm512_fmadd_ps(minimum, inputs, total[r][t]);
        }
      }
    }
  }
  const bool last = strip.last_unit == layout.units;
  for (int r = 0; r < rows; ++r) {
    for (int t = 0; t < 2; ++t) {
      if (last) total[r][t] = _mm512_mul_ps(total[r][t], _mm512_set1_ps(block.scale[strip.first_row + r] * kNibbleScale<kind>));
      _mm512_storeu_ps(c + r * kPanelColumns + t * kTileColumns, total[r][t]);
    }
  }
}

// `lists`: high halves may come as lists.
template <bool lists>
struct Int8 {
  static constexpr int most_rows = kInt8Rows;
  static constexpr std::int64_t chunk_units = kChunkUnits;
  static constexpr std::int64_t few_strip_units = 2;
  static constexpr std::int64_t single_strip_units = 0;
  template <int rows>
  void run(const GemmArgs& a, std::int64_t panel, const Strip& strip, float* c) {
    int8_rows<rows>(a, panel, strip, c);
  }
  void add_lists(const GemmArgs& a, std::int64_t panel, float* c)
    requires lists
  {
    add_listed_int8(a, panel, c);
  }
  void finish(const GemmArgs& a, std::int64_t panel, float* c) { finish_int8(a, panel, c); }
};

template <WeightKind kind, bool symmetric, bool lists>
struct Nibbles {
  static constexpr int most_rows = kNibbleRows;
  static constexpr std::int64_t chunk_units = kChunkUnits;
  static constexpr std::int64_t few_strip_units = 4;  // their inner loop waits less for memory
  static constexpr std::int64_t single_strip_units = 0;
  template <int rows>
  void run(const GemmArgs& a, std::int64_t panel, const Strip& strip, float* c) {
    nibble_rows<kind, symmetric, rows>(a, panel, strip, c);
  }
  void add_lists(const GemmArgs& a, std::int64_t panel, float* c)
    requires lists
  {
    add_listed<kind>(a, panel, c);
  }
  void finish(const GemmArgs&, std::int64_t, float*) {}
};

template <bool lists>
void gemm_vnni(const GemmArgs& a) {
  switch (a.layout->kind) {
    case WeightKind::int8:
      return gemm_strips<Int8<lists>>(a);
    case WeightKind::mxfp4:
      return gemm_strips<Nibbles<WeightKind::mxfp4, true, lists>>(a);
    default:
      return a.layout->symmetric ? gemm_strips<Nibbles<WeightKind::int4, true, lists>>(a)
                                 : gemm_strips<Nibbles<WeightKind::int4, false, lists>>(a);
  }
}

}  // namespace
}  // namespace numagraft

#pragma once

// int8, int4 and mxfp4 weights with AVX-512 VNNI. The weights are the unsigned operand: int8 is stored with an offset of
// 128, nibbles are unsigned by nature, and what the offset adds is offset times the sum of the row's integers.
// Included by one translation unit of each ISA that needs it; everything is internal to it.
#include <immintrin.h>

#include "kernels/kernel_table.h"

namespace numagraft {
namespace {

constexpr std::int64_t kVnniPrefetchAhead = 3072;  // measured: 2 to 3 KiB 33 GB/s, 4 KiB 30, 8 KiB 28
constexpr int kInt8Rows = 12;
constexpr int kNibbleRows = 6;
constexpr std::int64_t kChunkUnits = kChunkInputs / kUnitInputs;

static inline __attribute__((always_inline)) __m512i four_inputs(const std::byte* x) {
  int word;
  __builtin_memcpy(&word, x, 4);
  return _mm512_set1_epi32(word);
}

struct Strip {
  const RowBlock* block;
  int first_row;
  std::int64_t first_unit;
  std::int64_t last_unit;
  bool fresh;  // first strip over these weights: they come from memory
};

static inline std::uint8_t strip_flags(const Strip& strip, int rows) {
  std::uint8_t tiles = 0;
  if (strip.first_row < 16) tiles |= 1;
  if (strip.first_row + rows > 16) tiles |= 2;
  return tiles;
}

template <int rows>
static inline __attribute__((always_inline)) void int8_unit(const std::byte* w, const std::byte* x, bool fresh,
                                                            __m512i (&sum)[rows][2]) {
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    if (fresh) {
      _mm_prefetch(reinterpret_cast<const char*>(w + i * 128 + kVnniPrefetchAhead), _MM_HINT_T1);
      _mm_prefetch(reinterpret_cast<const char*>(w + i * 128 + 64 + kVnniPrefetchAhead), _MM_HINT_T1);
    }
    const __m512i w0 = _mm512_loadu_si512(w + i * 64);
    const __m512i w1 = _mm512_loadu_si512(w + 1024 + i * 64);
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) {
      const __m512i v = four_inputs(x + r * kUnitInputs + i * 4);
      sum[r][0] = _mm512_dpbusd_epi32(sum[r][0], w0, v);
      sum[r][1] = _mm512_dpbusd_epi32(sum[r][1], w1, v);
    }
  }
}

template <int rows>
void int8_rows(const GemmArgs& a, std::int64_t panel, const Strip& strip, float* c) {
  const Layout& layout = *a.layout;
  const RowBlock& block = *strip.block;
  const std::byte* w = a.panel + panel * layout.panel_bytes;
  const std::int64_t step = std::int64_t{block.stride_rows} * kUnitInputs;
  const std::byte* low = block.low + strip.first_row * kUnitInputs;
  const std::byte* high = block.high + strip.first_row * kUnitInputs;
  const std::uint8_t mask = strip_flags(strip, rows);
  __m512i sum[rows][2];
  for (int r = 0; r < rows; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_si512();
  bool any = false;
  for (std::int64_t unit = strip.first_unit; unit < strip.last_unit; ++unit) {
    if (block.flags[unit] & mask) {
      any = true;
      int8_unit<rows>(w + unit * layout.unit_bytes, high + unit * step, false, sum);
    }
  }
  if (any) {
    for (int r = 0; r < rows; ++r) {
      for (int t = 0; t < 2; ++t) sum[r][t] = _mm512_slli_epi32(sum[r][t], 7);
    }
  }
  for (std::int64_t unit = strip.first_unit; unit < strip.last_unit; ++unit) {
    int8_unit<rows>(w + unit * layout.unit_bytes, low + unit * step, strip.fresh, sum);
  }
  const bool last = strip.last_unit == layout.units;
  for (int r = 0; r < rows; ++r) {
    for (int t = 0; t < 2; ++t) {
      float* to = c + r * kPanelColumns + t * kTileColumns;
      __m512i total = sum[r][t];
      if (strip.first_unit > 0) total = _mm512_add_epi32(total, _mm512_loadu_si512(to));
      if (last) {
        const int offset = static_cast<int>(static_cast<unsigned>(block.sum[strip.first_row + r]) * kInt8Offset);
        total = _mm512_sub_epi32(total, _mm512_set1_epi32(offset));
        const __m512 scale = _mm512_mul_ps(_mm512_loadu_ps(a.side + panel * kPanelColumns + t * kTileColumns),
                                           _mm512_set1_ps(block.scale[strip.first_row + r]));
        _mm512_storeu_ps(to, _mm512_mul_ps(_mm512_cvtepi32_ps(total), scale));
      } else {
        _mm512_storeu_si512(to, total);
      }
    }
  }
}

static inline __attribute__((always_inline)) __m512 widen_bf16(const std::uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
}

// One 16-column tile of a unit: sums[row][group of 32 inputs].
template <WeightKind kind, int rows>
static inline __attribute__((always_inline)) void nibble_tile(const std::byte* w, const std::byte* x, __m512i lookup,
                                                              bool fresh, __m512i (&sum)[rows][2]) {
  const __m512i mask = _mm512_set1_epi8(15);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    if (fresh) _mm_prefetch(reinterpret_cast<const char*>(w + i * 64 + kVnniPrefetchAhead), _MM_HINT_T1);
    const __m512i pair = _mm512_loadu_si512(w + i * 64);
    __m512i w0 = _mm512_and_si512(pair, mask);
    __m512i w1 = _mm512_and_si512(_mm512_srli_epi16(pair, 4), mask);
    if constexpr (kind == WeightKind::mxfp4) {
      w0 = _mm512_shuffle_epi8(lookup, w0);
      w1 = _mm512_shuffle_epi8(lookup, w1);
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) {
      sum[r][0] = _mm512_dpbusd_epi32(sum[r][0], w0, four_inputs(x + r * kUnitInputs + i * 4));
      sum[r][1] = _mm512_dpbusd_epi32(sum[r][1], w1, four_inputs(x + r * kUnitInputs + 32 + i * 4));
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
  __m512 total[rows][2];
  for (int r = 0; r < rows; ++r) {
    for (int t = 0; t < 2; ++t) {
      total[r][t] = strip.first_unit == 0 ? _mm512_setzero_ps() : _mm512_loadu_ps(c + r * kPanelColumns + t * kTileColumns);
    }
  }
  for (std::int64_t unit = strip.first_unit; unit < strip.last_unit; ++unit) {
    const std::byte* w = weights + unit * layout.unit_bytes;
    const std::int64_t at = unit * block.stride_rows + strip.first_row;
    const std::byte* low = block.low + at * kUnitInputs;
    const std::byte* high = block.high + at * kUnitInputs;
    const float* group_sum = block.group_sum + at * 2;
    const std::byte* scales = w + layout.data_bytes;
    const bool flagged = block.flags[unit] & mask;
    if (strip.fresh) {
      for (std::int64_t line = layout.data_bytes; line < layout.unit_bytes; line += 64) {
        _mm_prefetch(reinterpret_cast<const char*>(w + line + kVnniPrefetchAhead), _MM_HINT_T1);
      }
    }
#pragma GCC unroll 2
    for (int t = 0; t < 2; ++t) {
      __m512i sum[rows][2];
      for (int r = 0; r < rows; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_si512();
      if (flagged) {
        nibble_tile<kind, rows>(w + t * 512, high, lookup, false, sum);
        for (int r = 0; r < rows; ++r) {
          for (int g = 0; g < 2; ++g) sum[r][g] = _mm512_slli_epi32(sum[r][g], 7);
        }
      }
      nibble_tile<kind, rows>(w + t * 512, low, lookup, strip.fresh, sum);
#pragma GCC unroll 2
      for (int g = 0; g < 2; ++g) {
        const int row_of_scales = layout.unit_groups == 2 ? g : 0;
        const int column = row_of_scales * kPanelColumns + t * kTileColumns;
        __m512 scale;
        __m512 minimum;
        if constexpr (kind == WeightKind::mxfp4) {
          const __m128i exponents = _mm_loadu_si128(reinterpret_cast<const __m128i*>(scales + column));
          scale = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu8_epi32(exponents), 23)), _mm512_set1_ps(0.5f));
        } else {
          const auto* halves = reinterpret_cast<const std::uint16_t*>(scales);
          scale = widen_bf16(halves + column);
          if constexpr (!symmetric) minimum = widen_bf16(halves + layout.unit_groups * kPanelColumns + column);
        }
#pragma GCC unroll 6
        for (int r = 0; r < rows; ++r) {
          const __m512 inputs = _mm512_set1_ps(group_sum[r * 2 + g]);
          __m512 value = _mm512_cvtepi32_ps(sum[r][g]);
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
      if (last) total[r][t] = _mm512_mul_ps(total[r][t], _mm512_set1_ps(block.scale[strip.first_row + r]));
      _mm512_storeu_ps(c + r * kPanelColumns + t * kTileColumns, total[r][t]);
    }
  }
}

struct Int8 {
  static constexpr int most_rows = kInt8Rows;
  template <int rows>
  static void run(const GemmArgs& a, std::int64_t panel, const Strip& strip, float* c) {
    int8_rows<rows>(a, panel, strip, c);
  }
};

template <WeightKind kind, bool symmetric>
struct Nibbles {
  static constexpr int most_rows = kNibbleRows;
  template <int rows>
  static void run(const GemmArgs& a, std::int64_t panel, const Strip& strip, float* c) {
    nibble_rows<kind, symmetric, rows>(a, panel, strip, c);
  }
};

template <class Kernel, int rows>
static inline __attribute__((always_inline)) void run_strip(int count, const GemmArgs& a, std::int64_t panel,
                                                            const Strip& strip, float* c) {
  if constexpr (rows > 1) {
    if (count < rows) return run_strip<Kernel, rows - 1>(count, a, panel, strip, c);
  }
  Kernel::template run<rows>(a, panel, strip, c);
}

// Strips of nearly equal heights, all of them over one chunk of a panel before the next: the chunk stays in L1.
template <class Kernel>
void gemm_strips(const GemmArgs& a) {
  for (std::int64_t panel = 0; panel < a.panels; ++panel) {
    for (std::int64_t first = a.first_unit; first < a.last_unit; first += kChunkUnits) {
      const std::int64_t last = first + kChunkUnits < a.last_unit ? first + kChunkUnits : a.last_unit;
      float* c = a.c + panel * a.c_panel_stride;
      for (int b = 0; b < a.block_count; ++b) {
        const RowBlock& block = a.blocks[b];
        const int strips = (block.rows + Kernel::most_rows - 1) / Kernel::most_rows;
        int row = 0;
        for (int i = 0; i < strips; ++i) {
          const int count = (block.rows - row + strips - i - 1) / (strips - i);
          run_strip<Kernel, Kernel::most_rows>(count, a, panel, Strip{&block, row, first, last, b == 0 && i == 0},
                                               c + row * kPanelColumns);
          row += count;
        }
        c += block.rows * kPanelColumns;
      }
    }
  }
}

void gemm_vnni(const GemmArgs& a) {
  switch (a.layout->kind) {
    case WeightKind::int8:
      return gemm_strips<Int8>(a);
    case WeightKind::mxfp4:
      return gemm_strips<Nibbles<WeightKind::mxfp4, true>>(a);
    default:
      return a.layout->symmetric ? gemm_strips<Nibbles<WeightKind::int4, true>>(a)
                                 : gemm_strips<Nibbles<WeightKind::int4, false>>(a);
  }
}

}  // namespace
}  // namespace numagraft

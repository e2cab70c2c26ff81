#pragma once

// bf16 and fp8 weights times one row of inputs, with AVX-512 BF16 and FP16. Included by one translation unit of each
// ISA that needs it; everything is internal to it.
#include "kernels/kernel_table.h"
#include "kernels/registers.h"

namespace numagraft {
namespace {

// A dot product waits some 20 cycles for the one before, and one starts every two: hence eight sums and more.
NG_INLINE __m512bh input_pairs(const std::byte* p) {
  std::int32_t pair;
  __builtin_memcpy(&pair, p, 4);
  return (__m512bh)_mm512_set1_epi32(pair);
}

// e4m3 is exact in fp16, and so are sums of a few products nearly: 32 of them are added up in fp16, which multiplies twice
// as many weights per instruction as fp32, and costs 4e-4 of the result.
void fp8_row(const GemmArgs& a, std::int64_t panel, const RowBlock& block, float* c) {
  constexpr std::int64_t together = kFp8Block / kUnitInputs;
  const Layout& layout = *a.layout;
  const std::byte* weights = a.panel + panel * layout.panel_bytes;
  const E4m3AsF16 convert;
  // a register of weights holds the same input of two pairs, 16 columns each
  const __m512i even_inputs = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(2), 1);
  const __m512i odd_inputs = _mm512_inserti64x4(_mm512_set1_epi16(1), _mm256_set1_epi16(3), 1);
  for (std::int64_t begin = a.first_unit; begin < a.last_unit;) {
    const std::int64_t boundary = (begin / together + 1) * together;
    const std::int64_t end = boundary < a.last_unit ? boundary : a.last_unit;
    __m512 total[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (std::int64_t unit = begin; unit < end; ++unit) {
      const std::byte* w = weights + unit * layout.unit_bytes;
      const std::byte* x = block.high + unit * block.stride_rows * kUnitInputs * 2;
      __m512h sum[2][2];
      for (int t = 0; t < 2; ++t) sum[t][0] = sum[t][1] = _mm512_setzero_ph();
      for (int half = 0; half < 2; ++half) {
#pragma GCC unroll 2
        for (int line = 0; line < 8; ++line) {
          std::int64_t four;
          __builtin_memcpy(&four, x + half * 64 + line * 8, 8);
          const __m512i inputs = _mm512_set1_epi64(four);
          const auto even = (__m512h)_mm512_permutexvar_epi16(even_inputs, inputs);
          const auto odd = (__m512h)_mm512_permutexvar_epi16(odd_inputs, inputs);
#pragma GCC unroll 2
          for (int t = 0; t < 2; ++t) {
            const std::byte* from = w + half * 1024 + t * 512 + line * 64;
            prefetch_line(from);
            const __m512i bytes = _mm512_loadu_si512(from);
            sum[t][0] = _mm512_fmadd_ph((__m512h)E4m3AsF16::even(convert, bytes), even, sum[t][0]);
            sum[t][1] = _mm512_fmadd_ph((__m512h)E4m3AsF16::odd(convert, bytes), odd, sum[t][1]);
          }
        }
      }
      for (int t = 0; t < 2; ++t) {
        const auto both = (__m512i)_mm512_add_ph(sum[t][0], sum[t][1]);
        const __m512 first = _mm512_cvtph_ps(_mm512_castsi512_si256(both));
        const __m512 second = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(both, 1));
        total[t] = _mm512_add_ps(total[t], _mm512_add_ps(first, second));
      }
    }
    const float* scales = panel_side(a, panel) + begin * kUnitInputs / kFp8Block * kPanelColumns;
    prefetch_scales(scales + panel_side_floats(layout));
    for (int t = 0; t < 2; ++t) {
      float* to = c + t * kTileColumns;
      const __m512 scale = _mm512_mul_ps(_mm512_loadu_ps(scales + t * kTileColumns), _mm512_set1_ps(kE4m3F16Scale * block.scale[0]));
      const __m512 value = _mm512_mul_ps(total[t], scale);
      _mm512_storeu_ps(to, begin == 0 ? value : _mm512_add_ps(value, _mm512_loadu_ps(to)));
    }
    begin = end;
  }
}

void bf16_row(const GemmArgs& a, std::int64_t panel, const RowBlock& block, float* c) {
  const Layout& layout = *a.layout;
  __m512 sum[4][2];  // pair, tile
  for (int t = 0; t < 2; ++t) {
    for (auto& of_pair : sum) of_pair[t] = _mm512_setzero_ps();
    if (a.first_unit > 0) sum[0][t] = _mm512_loadu_ps(c + t * kTileColumns);
  }
  for (std::int64_t unit = a.first_unit; unit < a.last_unit; ++unit) {
    const std::byte* w = a.panel + panel * layout.panel_bytes + unit * layout.unit_bytes;
    const std::byte* x = block.low + unit * block.stride_rows * kUnitInputs * 2;
    for (int half = 0; half < 2; ++half) {
#pragma GCC unroll 16
      for (int pair = 0; pair < 16; ++pair) {
        const __m512bh inputs = input_pairs(x + half * 64 + pair * 4);
        for (int t = 0; t < 2; ++t) {
          const std::byte* from = w + half * 2048 + t * 1024 + pair * 64;
          prefetch_line(from);
          sum[pair % 4][t] = _mm512_dpbf16_ps(sum[pair % 4][t], (__m512bh)_mm512_loadu_si512(from), inputs);
        }
      }
    }
  }
  for (int t = 0; t < 2; ++t) {
    const __m512 total = _mm512_add_ps(_mm512_add_ps(sum[0][t], sum[1][t]), _mm512_add_ps(sum[2][t], sum[3][t]));
    _mm512_storeu_ps(c + t * kTileColumns, total);
  }
}

void gemm_single_rows(const GemmArgs& a) {
  if (a.layout->kind == WeightKind::fp8) prefetch_first_scales(a);
  for (std::int64_t panel = 0; panel < a.panels; ++panel) {
    float* c = a.c + panel * a.c_panel_stride;
    for (int b = 0; b < a.block_count; ++b, c += kPanelColumns) {
      a.layout->kind == WeightKind::fp8 ? fp8_row(a, panel, a.blocks[b], c) : bf16_row(a, panel, a.blocks[b], c);
    }
  }
}

}  // namespace
}  // namespace numagraft

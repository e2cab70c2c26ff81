#pragma once

// bf16 and fp8 weights times fp32 or bf16 inputs, widened to fp32 in registers: on these CPUs a shift and an fma beat the
// bf16 dot product. Included by one translation unit of each ISA that needs it; everything is internal to it.
#include "kernels/kernel_table.h"
#include "kernels/simd.h"

namespace numagraft {
namespace {

#if defined(__AVX512F__)
constexpr int kFloatRows = 6;
#else
constexpr int kFloatRows = 3;
#endif
constexpr std::int64_t kPrefetchAhead = 4096;

NUMAGRAFT_INLINE void prefetch(const std::byte* p) { __builtin_prefetch(p + kPrefetchAhead, 0, 2); }

template <bool bf16_inputs>
NUMAGRAFT_INLINE void input_pair(const std::byte* p, F& even, F& odd) {
  if constexpr (bf16_inputs) {
    std::uint32_t pair;
    __builtin_memcpy(&pair, p, 4);
    const U both = U{} + pair;
    even = (F)(both << 16);
    odd = (F)(both & 0xFFFF0000u);
  } else {
    float x[2];
    __builtin_memcpy(x, p, 8);
    even = splat(x[0]);
    odd = splat(x[1]);
  }
}

template <WeightKind kind>
NUMAGRAFT_INLINE void weight_pair(const std::byte* p, F& even, F& odd) {
  if constexpr (kind == WeightKind::bf16) {
    const U pair = load<U>(p);
    even = (F)(pair << 16);
    odd = (F)(pair & 0xFFFF0000u);
  } else {  // e4m3 as the top bits of an fp32 whose exponent is 120 too small, subnormals included
    const U pair = __builtin_convertvector(load<U16>(p), U);
    even = (F)(((pair & 0x7F) << 20) | ((pair & 0x80) << 24)) * splat(0x1p120f);
    odd = (F)(((pair & 0x7F00) << 12) | ((pair & 0x8000) << 16)) * splat(0x1p120f);
  }
}

template <WeightKind kind, bool bf16_inputs, int rows>
void float_rows(const GemmArgs& a, std::int64_t panel, const RowBlock& block, int first_row, std::int64_t first_unit,
                std::int64_t last_unit, float* c) {
  constexpr int input_bytes = bf16_inputs ? 2 : 4;
  constexpr int pair_bytes = kind == WeightKind::bf16 ? 64 : 32;  // 16 columns x 2 inputs
  const Layout& layout = *a.layout;
  F total[rows][2];
  for (int r = 0; r < rows; ++r) {
    for (int t = 0; t < 2; ++t) total[r][t] = first_unit == 0 ? F{} : load<F>(c + r * kPanelColumns + t * kLanes);
  }
  for (std::int64_t unit = first_unit; unit < last_unit; ++unit) {
    const std::byte* w = a.panel + panel * layout.panel_bytes + unit * layout.unit_bytes;
    const std::byte* x = block.low + (unit * block.stride_rows + first_row) * kUnitInputs * input_bytes;
    F part[rows][2];
    if constexpr (kind == WeightKind::fp8) {
      for (int r = 0; r < rows; ++r) part[r][0] = part[r][1] = F{};
    }
    for (int half = 0; half < 2; ++half) {
      for (int pair = 0; pair < 16; ++pair) {
        F even[2];
        F odd[2];
        for (int t = 0; t < 2; ++t) {
          const std::byte* at = w + (half * 32 + t * 16 + pair) * pair_bytes;
          if (first_row == 0 && (pair_bytes == 64 || pair % 2 == 0)) prefetch(at);
          weight_pair<kind>(at, even[t], odd[t]);
        }
        for (int r = 0; r < rows; ++r) {
          F x_even;
          F x_odd;
          input_pair<bf16_inputs>(x + (r * kUnitInputs + half * 32 + pair * 2) * input_bytes, x_even, x_odd);
          for (int t = 0; t < 2; ++t) {
            F& sum = kind == WeightKind::fp8 ? part[r][t] : total[r][t];
            sum += x_even * even[t];
            sum += x_odd * odd[t];
          }
        }
      }
    }
    if constexpr (kind == WeightKind::fp8) {
      const float* scales = a.side + panel * kPanelColumns + unit * kUnitInputs / kFp8Block * a.side_stride;
      for (int t = 0; t < 2; ++t) {
        const F scale = load<F>(scales + t * kLanes);
        for (int r = 0; r < rows; ++r) total[r][t] += part[r][t] * scale;
      }
    }
  }
  const bool last = last_unit == layout.units;
  for (int r = 0; r < rows; ++r) {
    for (int t = 0; t < 2; ++t) {
      store(c + r * kPanelColumns + t * kLanes, last ? total[r][t] * splat(block.scale[first_row + r]) : total[r][t]);
    }
  }
}

template <WeightKind kind, bool bf16_inputs, int rows>
NUMAGRAFT_INLINE void float_rows_up_to(int count, const GemmArgs& a, std::int64_t panel, const RowBlock& block,
                                       int first_row, std::int64_t first_unit, std::int64_t last_unit, float* c) {
  if constexpr (rows > 1) {
    if (count < rows) {
      return float_rows_up_to<kind, bf16_inputs, rows - 1>(count, a, panel, block, first_row, first_unit, last_unit, c);
    }
  }
  float_rows<kind, bf16_inputs, rows>(a, panel, block, first_row, first_unit, last_unit, c);
}

template <WeightKind kind, bool bf16_inputs>
void gemm_float(const GemmArgs& a) {
  const std::int64_t chunk = kChunkInputs / kUnitInputs / 2;
  for (std::int64_t panel = 0; panel < a.panels; ++panel) {
    for (std::int64_t first = a.first_unit; first < a.last_unit; first += chunk) {
      const std::int64_t last = first + chunk < a.last_unit ? first + chunk : a.last_unit;
      float* c = a.c + panel * a.c_panel_stride;
      for (int b = 0; b < a.block_count; ++b) {
        const RowBlock& block = a.blocks[b];
        const int strips = (block.rows + kFloatRows - 1) / kFloatRows;
        int row = 0;
        for (int strip = 0; strip < strips; ++strip) {  // of nearly equal heights
          const int count = (block.rows - row + strips - strip - 1) / (strips - strip);
          float_rows_up_to<kind, bf16_inputs, kFloatRows>(count, a, panel, block, row, first, last, c + row * kPanelColumns);
          row += count;
        }
        c += block.rows * kPanelColumns;
      }
    }
  }
}

}  // namespace
}  // namespace numagraft

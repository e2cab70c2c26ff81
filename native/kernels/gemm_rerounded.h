#pragma once

// int4 and mxfp4 on tiles: a chunk is re-rounded to int8 in L1, one scale per column and chunk.
// Included by one translation unit; everything is internal to it.
#include "kernels/ahead.h"
#include "kernels/gemm_vnni.h"
#include "kernels/high_halves.h"
#include "kernels/tiles.h"

namespace numagraft::NUMAGRAFT_ISA {
namespace {

// 256 / scale of 16 columns of a chunk, 0 for a column of zeros.
NUMAGRAFT_INLINE __m512 inverse_scales(const float* side) {
  const __m512 scale = _mm512_loadu_ps(side);
  return _mm512_maskz_div_ps(_mm512_cmp_ps_mask(scale, _mm512_setzero_ps(), _CMP_NEQ_OQ), _mm512_set1_ps(256.0f), scale);
}

template <WeightKind kind, bool symmetric>
NUMAGRAFT_INLINE void expand_unit(const Layout& layout, const std::byte* unit, const __m512 (&inverses)[2], std::byte* to) {
  const std::byte* scales = unit + layout.data_bytes;
  const __m512i mask = _mm512_set1_epi16(15);
  // bytes 1, 3, 5, ... of two registers in turn: of every 16-bit product its upper byte, even inputs before odd ones
  alignas(64) static const std::uint8_t kUpperBytes[64] = {
      1,  65, 3,  67, 5,  69, 7,  71, 9,  73, 11, 75, 13, 77,  15, 79,  17, 81,  19, 83,  21, 85,  23, 87,  25, 89,  27, 91,  29, 93,  31, 95,
      33, 97, 35, 99, 37, 101, 39, 103, 41, 105, 43, 107, 45, 109, 47, 111, 49, 113, 51, 115, 53, 117, 55, 119, 57, 121, 59, 123, 61, 125, 63, 127};
  const __m512i upper_bytes = _mm512_load_si512(kUpperBytes);
  const __m512i lookup = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12));
  for (int t = 0; t < 2; ++t) {
    const __m512 inverse = inverses[t];
    __m512i factor[2];
    __m512i offset[2];
    for (int g = 0; g < 2; ++g) {
      const int column = (layout.unit_groups == 2 ? g : 0) * kPanelColumns + t * kTileColumns;
      __m512 scale;
      __m512 minimum = _mm512_setzero_ps();
      if constexpr (kind == WeightKind::mxfp4) {
        const __m128i exponents = _mm_loadu_si128(reinterpret_cast<const __m128i*>(scales + column));
        scale = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu8_epi32(exponents), 23)), _mm512_set1_ps(0.5f));
      } else {
        const auto* halves = reinterpret_cast<const std::uint16_t*>(scales);
        scale = widen_bf16(halves + column);
        minimum = symmetric ? _mm512_mul_ps(scale, _mm512_set1_ps(-8.0f))
                            : widen_bf16(halves + layout.unit_groups * kPanelColumns + column);
      }
      // 8.8 fixed point, in both 16-bit halves of a column's lane; adding 128 rounds
      const __m512i s = _mm512_and_si512(_mm512_cvtps_epi32(_mm512_mul_ps(scale, inverse)), _mm512_set1_epi32(0xFFFF));
      const __m512i m = _mm512_and_si512(
          _mm512_add_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(minimum, inverse)), _mm512_set1_epi32(128)), _mm512_set1_epi32(0xFFFF));
      factor[g] = _mm512_or_si512(s, _mm512_slli_epi32(s, 16));
      offset[g] = _mm512_or_si512(m, _mm512_slli_epi32(m, 16));
    }
#pragma GCC unroll 8
    for (int row = 0; row < 8; ++row) {
      const __m512i v = _mm512_loadu_si512(unit + t * 512 + row * 64);
      __m512i even[2];
      __m512i odd[2];
      if constexpr (kind == WeightKind::mxfp4) {
        const __m512i bytes = _mm512_set1_epi8(15);
        const __m512i codes[2] = {_mm512_and_si512(v, bytes), _mm512_and_si512(_mm512_srli_epi16(v, 4), bytes)};
        for (int g = 0; g < 2; ++g) {
          const __m512i values = _mm512_shuffle_epi8(lookup, codes[g]);
          even[g] = _mm512_srai_epi16(_mm512_slli_epi16(values, 8), 8);
          odd[g] = _mm512_srai_epi16(values, 8);
        }
      } else {
        even[0] = _mm512_and_si512(v, mask);
        even[1] = _mm512_and_si512(_mm512_srli_epi16(v, 4), mask);
        odd[0] = _mm512_and_si512(_mm512_srli_epi16(v, 8), mask);
        odd[1] = _mm512_srli_epi16(v, 12);
      }
      for (int g = 0; g < 2; ++g) {
        const __m512i e = _mm512_add_epi16(_mm512_mullo_epi16(even[g], factor[g]), offset[g]);
        const __m512i o = _mm512_add_epi16(_mm512_mullo_epi16(odd[g], factor[g]), offset[g]);
        _mm512_store_si512(to + t * 1024 + g * 512 + row * 64, _mm512_permutex2var_epi8(e, upper_bytes, o));
      }
    }
  }
}

// The first block expands a chunk, some units before its tiles need them.
template <WeightKind kind, bool symmetric>
struct Expansion {
  static constexpr std::int64_t early = 4;
  const Layout& layout;
  const std::byte* from;
  std::int64_t units;
  __m512 inverses[2];
  std::byte* to;
  std::int64_t done = 0;

  Expansion(const Layout& l, const std::byte* weights, std::int64_t count, const float* side, std::byte* expanded)
      : layout(l), from(weights), units(count), inverses{inverse_scales(side), inverse_scales(side + kTileColumns)}, to(expanded) {}
  static inline __attribute__((always_inline)) void reach(Expansion& e, std::int64_t unit) {
    const std::int64_t end = unit + early < e.units ? unit + early : e.units;
    for (; e.done < end; ++e.done) {
      expand_unit<kind, symmetric>(e.layout, e.from + e.done * e.layout.unit_bytes, e.inverses, e.to + e.done * 2048);
    }
  }
};

template <WeightKind kind, bool symmetric, bool two>
void rerounded_block(const RowBlock& block, std::int64_t first, std::int64_t last, Expansion<kind, symmetric>& expansion,
                     const float* side, Ahead& ahead, float* c) {
  const auto weights = [&](std::int64_t unit) {
    Expansion<kind, symmetric>::reach(expansion, unit - first + 1);
    return static_cast<const std::byte*>(expansion.to + (unit - first) * 2048);
  };
  alignas(64) std::int32_t low[kBlockRows * kPanelColumns];
  alignas(64) std::int32_t high[kBlockRows * kPanelColumns];
  const bool halves = multiply_halves<Multiply::by_signed, two>(block, first, last, weights, ahead, nullptr, low, high);
  const F scales[2] = {load<F>(side), load<F>(side + kLanes)};
  for (int row = 0; row < block.rows; ++row) {
    const F by = splat(block.scale[row]);
    for (int t = 0; t < 2; ++t) {
      float* to = c + row * kPanelColumns + t * kLanes;
      I total = load<I>(low + row * kPanelColumns + t * kLanes);
      if (halves) total += load<I>(high + row * kPanelColumns + t * kLanes) << 7;
      const F value = to_float(total) * (scales[t] * by);
      store(to, first > 0 ? load<F>(to) + value : value);
    }
  }
}

template <WeightKind kind, bool symmetric>
void gemm_rerounded(const GemmArgs& a) {
  alignas(64) std::byte expanded[kChunkInputs * kPanelColumns];
  const Layout& layout = *a.layout;
  prefetch_first_scales(a);
  for (std::int64_t panel = 0; panel < a.panels; ++panel) {
    for (std::int64_t first = a.first_unit; first < a.last_unit; first += kChunkUnits) {
      const std::int64_t last = first + kChunkUnits < a.last_unit ? first + kChunkUnits : a.last_unit;
      const std::byte* w = a.panel + panel * layout.panel_bytes + first * layout.unit_bytes;
      const float* side = panel_side(a, panel) + first / kChunkUnits * kPanelColumns;
      prefetch_scales(side + panel_side_floats(layout));
      Expansion<kind, symmetric> expansion(layout, w, last - first, side, expanded);
      const std::int64_t steps = count_steps(a, first, last);
      Ahead ahead(w, (last - first) * layout.unit_bytes, kChunkUnits * layout.unit_bytes,
                  kNear + expansion.early * layout.unit_bytes, steps, steps == last - first);
      float* c = a.c + panel * a.c_panel_stride;
      for (int b = 0; b < a.block_count; ++b, c += kBlockRows * kPanelColumns) {
        if (a.blocks[b].stride_rows > 16) {
          rerounded_block<kind, symmetric, true>(a.blocks[b], first, last, expansion, side, ahead, c);
        } else {
          rerounded_block<kind, symmetric, false>(a.blocks[b], first, last, expansion, side, ahead, c);
        }
      }
    }
  }
}

}  // namespace
}  // namespace numagraft::NUMAGRAFT_ISA

#pragma once

// bf16 and fp8 as fp32 (widened.h). Internal to the unit that includes it.
#include "kernels/gemm_float.h"
#include "kernels/widened.h"

namespace numagraft {
namespace {

struct WidenedBf16 : NothingLeft {
  using Steps = FloatSteps;
  NG_INLINE_MEMBER void begin(const GemmArgs&, std::int64_t) {}
  NG_INLINE_MEMBER void widen(const Layout&, const std::byte* from, std::int64_t, std::int64_t place, std::byte* to) {
    const V high_half = repeat32(static_cast<int>(0xFFFF0000u));
#pragma GCC unroll 1
    for (int n = 0; n < kVectors; ++n) {
      std::byte* const at = widened_vector<Steps>(to, n, place);
#pragma GCC unroll 1
      for (int half = 0; half < 2; ++half) {
        const std::byte* const lines = from + (half * 2 + n / kParts) * kBf16HalfTile + n % kParts * kVectorBytes;
#pragma GCC unroll 16
        for (int pair = 0; pair < 16; ++pair) {
          const V both = load_bytes(lines + pair * 64);
          store_step(at, half * 32 + pair * 2, left16(both));
          store_step(at, half * 32 + pair * 2 + 1, bit_and(both, high_half));
        }
      }
    }
  }
};

struct WidenedFp8 : NothingLeft {
  using Steps = FloatSteps;
  const float* side = nullptr;  // of the panel: weights are scaled, not their sums
  alignas(64) std::uint16_t halves[kHalfUnit];

  NG_INLINE_MEMBER void begin(const GemmArgs& a, std::int64_t panel) { side = panel_side(a, panel); }
  void widen(const Layout&, const std::byte* from, std::int64_t unit, std::int64_t place, std::byte* to) {
    const float* scales = side + unit * kUnitInputs / kFp8Block * kPanelColumns;
    prefetch_scales(scales + kPanelColumns);
    for (int half = 0; half < 2; ++half) {
      expand_half_unit(from + half * 1024, kFp8HalfTile, halves);
#pragma GCC unroll 1
      for (int n = 0; n < kVectors; ++n) {
        std::byte* const at = widened_vector<Steps>(to, n, place);
        const VF scale = mul(load_floats(scales + n * kInt32s), repeat(kE4m3F16Scale));
#pragma GCC unroll 8
        for (int i = 0; i < 32; ++i) {
          const VF w = load_f16(halves + n / kParts * (kHalfUnit / 2) + i * kTileColumns + n % kParts * kInt32s);
          store_step(at, half * 32 + (i & ~3) + input_at(i & 3), as_integers(mul(w, scale)));
        }
      }
    }
  }
};

}  // namespace
}  // namespace numagraft

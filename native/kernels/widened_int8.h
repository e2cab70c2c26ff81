#pragma once

// int8 as 16-bit integers (widened.h). Internal to the unit that includes it.
#include "kernels/widened.h"

namespace numagraft {
namespace {

// Bytes as they are, w + 128; integer sums go on from chunk to chunk, and finish_int8 makes floats of them.
struct WidenedInt8 {
  using Steps = IntegerSteps;
  NG_INLINE_MEMBER void begin(const GemmArgs& a, std::int64_t panel) { prefetch_scales(panel_side(a, panel)); }
  NG_INLINE_MEMBER void finish(const GemmArgs& a, std::int64_t panel, float* c) { finish_int8(a, panel, c); }
  NG_INLINE_MEMBER void widen(const Layout&, const std::byte* from, std::int64_t, std::int64_t place, std::byte* to) {
    const V even = repeat16(0xFF);
#pragma GCC unroll 1
    for (int n = 0; n < kVectors; ++n) {
      std::byte* const at = widened_vector<Steps>(to, n, place);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        const V bytes = load_bytes(from + n / kParts * 1024 + i * 64 + n % kParts * kVectorBytes);
        store_step(at, 2 * i, bit_and(bytes, even));
        store_step(at, 2 * i + 1, right8(bytes));
      }
    }
  }
};

}  // namespace
}  // namespace numagraft

#pragma once

// int8, int4 and mxfp4 as 16-bit integers (widened.h). Internal to the unit that includes it.
#include "kernels/widened.h"

namespace numagraft {
namespace {

// Bytes as they are, w + 128; integer sums go on from chunk to chunk, and finish_int8 makes floats of them.
struct WidenedInt8 {
  using Steps = IntegerSteps;
  static constexpr bool scaled = false;
  NG_INLINE_MEMBER void begin(const GemmArgs& a, std::int64_t panel, std::int64_t) { prefetch_scales(panel_side(a, panel)); }
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

// Nibbles times their groups' scales, plus the minima: integers up to 4 * 127 = 508 in steps of a quarter of the side table's scale, so
// that a chunk's sums need one scale per column, and that once. Rounding takes 0.2 % of Gaussian weights. With inputs up to 16319, the most
// that rows hold, the sums of a chunk stay below 2^31.
constexpr int kWidenedBits = 6;  // 256ths of that scale to quarters
static_assert(kStepsUnits<IntegerSteps> * kUnitInputs * 16319 * 508 < 2147483648);

template <WeightKind kind, bool symmetric>
struct WidenedNibbles : NothingLeft {
  using Steps = IntegerSteps;
  static constexpr bool scaled = true;
  alignas(64) float inverse[kPanelColumns];  // 256 / the columns' scales in the span; 0 for a column of zeros
  alignas(64) float scale[kPanelColumns];    // of the integers

  void begin(const GemmArgs& a, std::int64_t panel, std::int64_t unit) {
    const float* side = panel_side(a, panel) + span_of(*a.layout, unit) * kPanelColumns;
    prefetch_scales(side + kPanelColumns);
    for (int column = 0; column < kPanelColumns; ++column) {
      const float of_column = __builtin_fabsf(side[column]);
      inverse[column] = of_column > 0 ? 256.0f / of_column : 0.0f;
      scale[column] = of_column * (1.0f / (1 << (8 - kWidenedBits)));
    }
  }

  // q s + m in 256ths, modulo 2^16: the result fits, whatever its parts.
  void widen(const Layout& layout, const std::byte* from, std::int64_t, std::int64_t place, std::byte* to) {
    constexpr float offset = kind == WeightKind::mxfp4 ? kMxfp4Offset : 8.0f;
    const V rounding = repeat16(1 << (kWidenedBits - 1));
    const V table = mxfp4_table();
    const V nibble = repeat16(15);
    const V nibbles = ones8(15);
    const V byte = repeat16(255);
#pragma GCC unroll 1
    for (int n = 0; n < kVectors; ++n) {
      V s[2];
      V m[2];
#pragma GCC unroll 2
      for (int group = 0; group < 2; ++group) {
        VF of_group, minimum;
        nibble_scales<kind, symmetric>(layout, from + layout.data_bytes, n, group, of_group, minimum);
        const VF to_256ths = load_floats(inverse + n * kInt32s);
        of_group = mul(of_group, mul(to_256ths, repeat(kNibbleScale<kind>)));
        minimum = symmetric ? mul(of_group, repeat(-offset)) : mul(minimum, to_256ths);
        s[group] = both_halves(round_to_ints(of_group));
        m[group] = add16(both_halves(round_to_ints(minimum)), rounding);
      }
      std::byte* const at = widened_vector<Steps>(to, n, place);
      const auto store = [&](int step, V q, int group) { store_step(at, step, signed_right<kWidenedBits>(add16(mul16(q, s[group]), m[group]))); };
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        const V v = load_bytes(from + n / kParts * kNibbleTile + i * 64 + n % kParts * kVectorBytes);
        if constexpr (kind == WeightKind::mxfp4) {
          const V low = look_up(table, bit_and(v, nibbles));
          const V high = look_up(table, bit_and(right4(v), nibbles));
          store(2 * i, bit_and(low, byte), 0);
          store(2 * i + 1, right8(low), 0);
          store(16 + 2 * i, bit_and(high, byte), 1);
          store(16 + 2 * i + 1, right8(high), 1);
        } else {
          store(2 * i, bit_and(v, nibble), 0);
          store(2 * i + 1, bit_and(right8(v), nibble), 0);
          store(16 + 2 * i, bit_and(right4(v), nibble), 1);
          store(16 + 2 * i + 1, right12(v), 1);
        }
      }
    }
  }
};

}  // namespace
}  // namespace numagraft

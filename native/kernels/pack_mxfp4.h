#pragma once

// mxfp4: w = value(code) * 2^(e - 127), codes sign | 0, .5, 1, 1.5, 2, 3, 4, 6.
// Included by pack.cpp; everything is internal to it.
#include "kernels/pack_nibbles.h"

namespace numagraft::NUMAGRAFT_ISA {
namespace {

// Nearest code (ties to the even one) of x, which is in units of the scale.
NUMAGRAFT_INLINE I mxfp4_code(F x) {
  const F m = magnitude(x);
  I code = {};
  code -= (m > splat(0.25f));
  code -= (m >= splat(0.75f));
  code -= (m > splat(1.25f));
  code -= (m >= splat(1.75f));
  code -= (m > splat(2.5f));
  code -= (m >= splat(3.5f));
  code -= (m > splat(5.0f));
  return code | (((I)x >> 28) & 8);
}

NUMAGRAFT_INLINE I mxfp4_exponent(const float* staged, int slice, int inputs) {
  F largest = {};
  for (int k = 0; k < inputs; ++k) largest = maximum(magnitude(at(staged, k, slice)), largest);
  // The exponent of the OCP specification (largest power of two in the group over that of 6), or one more where the
  // values it clips cost more than the coarser step.
  const I base = clamp(((I)largest >> 23) - 2, 1, 253);
  F error[2] = {};
  for (int candidate = 0; candidate < 2; ++candidate) {
    const F scale = power_of_two(base + candidate);
    const F inverse = splat(1.0f) / scale;
    for (int k = 0; k < inputs; ++k) {
      const F w = at(staged, k, slice);
      const F d = w - e2m1_value(mxfp4_code(w * inverse)) * scale;
      error[candidate] += d * d;
    }
  }
  return base - (error[1] < error[0]);
}

// `coded`: staged holds codes, and the source the exponents.
template <bool coded>
void pack_mxfp4(const PackArgs& a, const float* staged) {
  const Layout& layout = *a.layout;
  F largest[kSlices] = {};
  F power = {};
  for (std::int64_t unit = 0; unit < layout.units; ++unit) {
    std::byte* data = a.panel + unit * layout.unit_bytes;
    auto* exponents = reinterpret_cast<std::uint8_t*>(data + layout.data_bytes);
    const float* inputs = staged + unit * kUnitInputs * kPanelColumns;
    for (int slice = 0; slice < kSlices; ++slice) {
      I nibbles[kUnitInputs];
      for (int group = 0; group < 2; ++group) {
        const std::int64_t first = unit * kUnitInputs + group * 32;
        I exponent = {};
        if constexpr (coded) {
          const std::int64_t column = a.first_input + first;
          if (column < a.source->columns) exponent = mxfp4_exponents(a, a.first_row + slice * kLanes, column);
        } else {
          exponent = mxfp4_exponent(inputs + group * 32 * kPanelColumns, slice, 32);
        }
        store(exponents + group * kPanelColumns + slice * kLanes, __builtin_convertvector(exponent, U8));
        const F scale = power_of_two(exponent);
        const F inverse = splat(1.0f) / scale;
        for (int k = group * 32; k < group * 32 + 32; ++k) {
          nibbles[k] = coded ? (I)at(inputs, k, slice) : mxfp4_code(at(inputs, k, slice) * inverse);
          const F value = e2m1_value(nibbles[k]) * scale;
          largest[slice] = maximum(magnitude(value), largest[slice]);
          power += value * value;
        }
      }
      store_nibbles(a, unit, slice, nibbles);
      // The int8 scale that tiles re-round a span to; negative, as its weights are no multiples of it.
      if (unit + 1 == span_end(layout, unit)) {
        store(a.side + span_of(layout, unit) * a.side_stride + slice * kLanes, largest[slice] * splat(-1.0f / 127.0f));
        largest[slice] = F{};
      }
    }
  }
  if (a.power != nullptr) *a.power += sum_lanes(power);
}

}  // namespace
}  // namespace numagraft::NUMAGRAFT_ISA

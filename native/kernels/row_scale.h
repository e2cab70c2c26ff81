#pragma once

// The scale of an input row's integers, by how its values are spread. Included by one translation unit of each ISA; everything is
// internal to it.
#include "kernels/kernel_table.h"
#include "kernels/simd.h"

namespace numagraft::NUMAGRAFT_ISA {
namespace {

// |q| <= 128 * 127 + 63 so that both halves fit int8.
constexpr float kWideLimit = 16319.0f;
// The sum over a row of |q| times the largest weight (255 with its offset) must fit in int32.
constexpr float kSumLimit = 2147483648.0f / 256.0f;
// Whole integers cost what halves of them would: more bits are free.
constexpr float kWideError = 0.001f;
// A row whose mean magnitude says at least this share of its root mean square, as that of a normal distribution does, has no
// channels that stand out (300 normal values scatter by 1.5 %).
constexpr float kNormal = 0.97f;

struct Spread {
  std::uint32_t largest_bits;  // of |x|; NaN and infinity order above every finite value
  float square_sum;
  float absolute_sum;
};

struct Running {
  I largest = {};
  F squares = {};
  F absolutes = {};
};
NUMAGRAFT_INLINE void take_in(Running& r, F x) {
  const I bits = (I)x & 0x7FFFFFFF;
  r.largest = bits > r.largest ? bits : r.largest;
  r.squares += x * x;
  r.absolutes += (F)bits;
}

Spread measure(const PrepareArgs& a) {
  Running even;
  Running odd;  // two chains of additions hide each other's latency
  std::int64_t i = 0;
  for (; i + 2 * kLanes <= a.k; i += 2 * kLanes) {
    take_in(even, load_as_float(a.x, a.dtype, i));
    take_in(odd, load_as_float(a.x, a.dtype, i + kLanes));
  }
  for (; i + kLanes <= a.k; i += kLanes) take_in(even, load_as_float(a.x, a.dtype, i));
  const I largest = even.largest > odd.largest ? even.largest : odd.largest;
  Spread spread{0, sum_lanes(even.squares + odd.squares), sum_lanes(even.absolutes + odd.absolutes)};
  for (int lane = 0; lane < kLanes; ++lane) {
    if (static_cast<std::uint32_t>(largest[lane]) > spread.largest_bits) spread.largest_bits = largest[lane];
  }
  for (; i < a.k; ++i) {
    const float x = scalar_as_float(a.x, a.dtype, i);
    std::uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    bits &= 0x7FFFFFFF;
    if (bits > spread.largest_bits) spread.largest_bits = bits;
    spread.square_sum += x * x;
    spread.absolute_sum += x < 0 ? -x : x;
  }
  return spread;
}

// Scale of the row; 0 for a row of zeros.
float choose_scale(const PrepareArgs& a, const Spread& spread) {
  float largest;
  __builtin_memcpy(&largest, &spread.largest_bits, 4);
  if (spread.largest_bits >= 0x7F800000) return __builtin_nanf("");
  if (largest < 1e-34f) return 0.0f;  // its integers would need a reciprocal beyond fp32
  const float one_half = largest / 127.0f;
  // Of normally distributed inputs the mean magnitude gives the same figure as the root mean square. Where a few channels are
  // far larger it is smaller, and rightly: weights for such channels tend to be small, the others make the output.
  const float count = static_cast<float>(a.k);
  const float rms = __builtin_sqrtf(spread.square_sum / count);
  const float typical = 1.2533141f * spread.absolute_sum / count;
  // rounding to a grid of step s leaves an error of s / sqrt(12) in the mean square
  const bool normal = typical >= kNormal * rms;
  float allowed = normal && a.normal_error > a.target_error ? a.normal_error : a.target_error;
  if (a.form == RowForm::wide && allowed > kWideError) allowed = kWideError;
  const float wanted = allowed * 3.4641016f * (typical < rms ? typical : rms);
  float scale = one_half;
  if (wanted < one_half) {
    scale = wanted;
    if (scale < largest / kWideLimit) scale = largest / kWideLimit;
    const float bound = spread.absolute_sum / kSumLimit;
    if (scale < bound) scale = bound;
    if (scale > one_half) scale = one_half;
  }
  return scale;
}

}  // namespace
}  // namespace numagraft::NUMAGRAFT_ISA

// Input rows on their way in: quantised to integers with one scale per row, or converted. Compiled once per ISA.
#include "kernels/kernel_table.h"
#include "kernels/simd.h"

namespace numagraft::NUMAGRAFT_ISA {
namespace {

// |q| <= 128 * 127 + 63 so that both halves fit int8.
constexpr float kWideLimit = 16319.0f;
// The sum over a row of |q| times the largest weight (255 with its offset) must fit in int32.
constexpr float kSumLimit = 2147483648.0f / 256.0f;

struct Spread {
  std::uint32_t largest_bits;  // of |x|; NaN and infinity order above every finite value
  float square_sum;
  float absolute_sum;
};

Spread measure(const PrepareArgs& a) {
  I largest = {};
  F squares = {};
  F absolutes = {};
  std::int64_t i = 0;
  for (; i + kLanes <= a.k; i += kLanes) {
    const F x = load_as_float(a.x, a.dtype, i);
    const I bits = (I)x & 0x7FFFFFFF;
    const I above = bits > largest;
    largest = (above & bits) | (~above & largest);
    squares += x * x;
    absolutes += (F)bits;
  }
  Spread spread{0, sum_lanes(squares), sum_lanes(absolutes)};
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
  const float wanted = a.target_error * 3.4641016f * (typical < rms ? typical : rms);
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

NUMAGRAFT_INLINE void load_unit(const PrepareArgs& a, std::int64_t first, F (&x)[4]) {
  if (first + kUnitInputs <= a.k) {
    for (int v = 0; v < 4; ++v) x[v] = load_as_float(a.x, a.dtype, first + v * kLanes);
    return;
  }
  alignas(64) float padded[kUnitInputs] = {};
  for (std::int64_t i = first; i < a.k; ++i) padded[i - first] = scalar_as_float(a.x, a.dtype, i);
  for (int v = 0; v < 4; ++v) x[v] = load<F>(padded + v * kLanes);
}

template <RowForm form>
NUMAGRAFT_INLINE void quantise(const PrepareArgs& a) {
  const Spread spread = measure(a);
  const float scale = choose_scale(a, spread);
  *a.scale = scale;
  const F inverse = splat(scale > 0 ? 1.0f / scale : 0.0f);
  const bool finite = scale == scale;
  float largest;
  __builtin_memcpy(&largest, &spread.largest_bits, 4);
  const bool one_half = largest <= scale * 127.49f;  // else some integers are beyond int8
  I total = {};
  for (std::int64_t unit = 0; unit < a.units; ++unit) {
    F x[4];
    I q[4];
    load_unit(a, unit * kUnitInputs, x);
    for (int v = 0; v < 4; ++v) q[v] = finite ? round_to_int(x[v] * inverse) : I{};
    const I first = q[0] + q[1];
    const I second = q[2] + q[3];
    total += first + second;
    if (a.group_sum != nullptr) {
      float* group_sum = a.group_sum + unit * a.group_stride;
      group_sum[0] = static_cast<float>(sum_lanes(first));
      group_sum[1] = static_cast<float>(sum_lanes(second));
    }
    if constexpr (form == RowForm::wide) {
      auto* low = reinterpret_cast<std::int16_t*>(a.low) + unit * a.unit_stride;
      for (int v = 0; v < 4; ++v) {
        const I16 narrow = __builtin_convertvector(q[v], I16);
        store(low + v * kLanes, __builtin_shufflevector(narrow, narrow, 0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15));
      }
    } else {
      auto* low = reinterpret_cast<std::int8_t*>(a.low) + unit * a.unit_stride;
      auto* high = reinterpret_cast<std::int8_t*>(a.high) + unit * a.unit_stride;
      if (!one_half) {
        I any = {};
        I upper[4];
        for (int v = 0; v < 4; ++v) {
          const I wide = (q[v] > 127) | (q[v] < -127);
          upper[v] = ((q[v] + 64) >> 7) & wide;
          any |= upper[v];
          q[v] -= upper[v] << 7;
        }
        // Rows of one block may be prepared by several threads. Where this row needs no high half another may.
        for (int v = 0; v < 4; ++v) store(high + v * kLanes, __builtin_convertvector(upper[v], I8));
        if (any_lane(any) && !(__atomic_load_n(a.flags + unit, __ATOMIC_RELAXED) & a.flag_bit)) {
          __atomic_fetch_or(a.flags + unit, a.flag_bit, __ATOMIC_RELAXED);
        }
      } else {
        for (int v = 0; v < 4; ++v) store(high + v * kLanes, I8{});
      }
      for (int v = 0; v < 4; ++v) store(low + v * kLanes, __builtin_convertvector(q[v], I8));
    }
  }
  *a.sum = sum_lanes(total);
}

template <RowForm form>
NUMAGRAFT_INLINE void convert(const PrepareArgs& a) {
  *a.scale = 1.0f;
  *a.sum = 0;
  for (std::int64_t unit = 0; unit < a.units; ++unit) {
    F x[4];
    load_unit(a, unit * kUnitInputs, x);
    for (int v = 0; v < 4; ++v) {
      if constexpr (form == RowForm::f32) {
        store(reinterpret_cast<float*>(a.low) + unit * a.unit_stride + v * kLanes, x[v]);
      } else {
        store(reinterpret_cast<std::uint16_t*>(a.low) + unit * a.unit_stride + v * kLanes, to_bf16(x[v]));
      }
    }
  }
}

#if defined(__AVX512FP16__)
typedef _Float16 F16 __attribute__((vector_size(32)));

// fp16 sums of 32 products with weights up to 1.75 stay finite where no input exceeds 1024.
void convert_twice(const PrepareArgs& a) {
  convert<RowForm::bf16>(a);
  const Spread spread = measure(a);
  float largest;
  __builtin_memcpy(&largest, &spread.largest_bits, 4);
  // a power of two, so that bf16 inputs stay what they are; of rows that are nearly zero, as large as one can be
  const std::uint32_t exponent = spread.largest_bits >> 23;
  const std::uint32_t inverse_bits = exponent < 10 ? 254u << 23 : exponent > 244 ? 1u << 23 : (254u + 9u - exponent) << 23;
  float inverse;
  __builtin_memcpy(&inverse, &inverse_bits, 4);
  *a.scale = spread.largest_bits >= 0x7F800000 ? __builtin_nanf("") : 1.0f / inverse;
  for (std::int64_t unit = 0; unit < a.units; ++unit) {
    F x[4];
    load_unit(a, unit * kUnitInputs, x);
    for (int v = 0; v < 4; ++v) {
      store(reinterpret_cast<std::uint16_t*>(a.high) + unit * a.unit_stride + v * kLanes, __builtin_convertvector(x[v] * splat(inverse), F16));
    }
  }
}
#endif

}  // namespace

void prepare(const PrepareArgs& a) {
  switch (a.form) {
    case RowForm::wide:
      return quantise<RowForm::wide>(a);
    case RowForm::halves:
      return quantise<RowForm::halves>(a);
    case RowForm::f32:
      return convert<RowForm::f32>(a);
    case RowForm::bf16:
      return convert<RowForm::bf16>(a);
    case RowForm::bf16_f16:
#if defined(__AVX512FP16__)
      return convert_twice(a);
#else
      __builtin_unreachable();  // no row of the table without these instructions asks for it
#endif
  }
}

}  // namespace numagraft::NUMAGRAFT_ISA

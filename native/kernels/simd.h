#pragma once

#include <cstdint>

#include "kernels/format.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

// Vectors for the code that is one source on every ISA (rows, epilogues, packing), as long as a register: gcc takes longer
// ones apart into single lanes. Everything has internal linkage: an ISA object must not export an inline function, or the
// linker might keep its copy for everyone.
#pragma GCC diagnostic ignored "-Wpsabi"
#pragma GCC diagnostic ignored "-Wunused-function"

#define NUMAGRAFT_INLINE static inline __attribute__((always_inline))

namespace numagraft {
namespace {

#if defined(__AVX512F__)
inline constexpr int kLanes = 16;
#else
inline constexpr int kLanes = 8;
#endif
typedef float F __attribute__((vector_size(kLanes * 4)));
typedef std::int32_t I __attribute__((vector_size(kLanes * 4)));
typedef std::uint32_t U __attribute__((vector_size(kLanes * 4)));
typedef std::uint16_t U16 __attribute__((vector_size(kLanes * 2)));
typedef std::int16_t I16 __attribute__((vector_size(kLanes * 2)));
typedef std::int8_t I8 __attribute__((vector_size(kLanes)));
typedef std::uint8_t U8 __attribute__((vector_size(kLanes)));

template <class V>
NUMAGRAFT_INLINE V load(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class V>
NUMAGRAFT_INLINE void store(void* p, V v) {
  __builtin_memcpy(p, &v, sizeof v);
}
NUMAGRAFT_INLINE F splat(float x) { return x - F{}; }
NUMAGRAFT_INLINE F select(I mask, F a, F b) { return (F)((mask & (I)a) | (~mask & (I)b)); }
// Comparisons with NaN are false: the second operand of minimum and maximum passes through where it is NaN.
#if defined(__AVX512F__)
NUMAGRAFT_INLINE F minimum(F limit, F x) { return (F)_mm512_min_ps((__m512)limit, (__m512)x); }
NUMAGRAFT_INLINE F maximum(F limit, F x) { return (F)_mm512_max_ps((__m512)limit, (__m512)x); }
#elif defined(__AVX2__)
NUMAGRAFT_INLINE F minimum(F limit, F x) { return (F)_mm256_min_ps((__m256)limit, (__m256)x); }
NUMAGRAFT_INLINE F maximum(F limit, F x) { return (F)_mm256_max_ps((__m256)limit, (__m256)x); }
#else
NUMAGRAFT_INLINE F minimum(F limit, F x) { return select(x > limit, limit, x); }
NUMAGRAFT_INLINE F maximum(F limit, F x) { return select(x < limit, limit, x); }
#endif
NUMAGRAFT_INLINE F to_float(I v) { return __builtin_convertvector(v, F); }

// Nearest integer, ties to even, exact for |x| < 2^22.
#if defined(__AVX512F__)
NUMAGRAFT_INLINE I round_to_int(F x) { return (I)_mm512_cvtps_epi32((__m512)x); }
#elif defined(__AVX2__)
NUMAGRAFT_INLINE I round_to_int(F x) { return (I)_mm256_cvtps_epi32((__m256)x); }
#else
NUMAGRAFT_INLINE I round_to_int(F x) { return (I)(x + splat(12582912.0f)) - 0x4B400000; }
#endif

NUMAGRAFT_INLINE F from_bf16(U16 v) { return (F)(__builtin_convertvector(v, U) << 16); }
NUMAGRAFT_INLINE U16 to_bf16(F x) {
  const U bits = (U)x;
  const U rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  const U quiet = (bits >> 16) | 0x40;  // rounding a NaN could carry into an infinity
  const U nan = (U)((I)(bits & 0x7FFFFFFF) > 0x7F800000);
  return __builtin_convertvector((nan & quiet) | (~nan & rounded), U16);
}
NUMAGRAFT_INLINE F from_f16(U16 v) {
  const U bits = __builtin_convertvector(v, U);
  const U sign = (bits & 0x8000) << 16;
  // The exponent is rebased by a multiplication, which also normalises subnormals.
  const U magnitude = (U)((F)((bits & 0x7FFF) << 13) * splat(0x1p112f));
  const U special = (U)((I)(bits & 0x7C00) == 0x7C00);
  return (F)(sign | (special & (magnitude | 0x7F800000)) | (~special & magnitude));
}
NUMAGRAFT_INLINE std::uint16_t to_f16(float x) {
  std::uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  const std::uint16_t sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000);
  bits &= 0x7FFFFFFF;
  if (bits > 0x7F800000) return static_cast<std::uint16_t>(sign | 0x7E00);
  if (bits >= 0x477FF000) return static_cast<std::uint16_t>(sign | 0x7C00);  // rounds to 65536 or beyond
  if (bits < 0x38800000) {  // below 2^-14: adding 0.5 leaves the subnormal's mantissa, rounded, in the low bits
    float magnitude;
    __builtin_memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    __builtin_memcpy(&bits, &magnitude, 4);
    return static_cast<std::uint16_t>(sign | (bits - 0x3F000000));
  }
  bits += 0xFFF + ((bits >> 13) & 1);
  return static_cast<std::uint16_t>(sign | ((bits - 0x38000000) >> 13));
}

NUMAGRAFT_INLINE F load_as_float(const void* data, DType dtype, std::int64_t index) {
  if (dtype == DType::f32) return load<F>(static_cast<const float*>(data) + index);
  const U16 half = load<U16>(static_cast<const std::uint16_t*>(data) + index);
  return dtype == DType::bf16 ? from_bf16(half) : from_f16(half);
}
NUMAGRAFT_INLINE float scalar_as_float(const void* data, DType dtype, std::int64_t index) {
  if (dtype == DType::f32) return static_cast<const float*>(data)[index];
  const std::uint16_t half = static_cast<const std::uint16_t*>(data)[index];
  const U16 v = U16{} + half;
  return dtype == DType::bf16 ? from_bf16(v)[0] : from_f16(v)[0];
}
NUMAGRAFT_INLINE void store_from_float(void* data, DType dtype, std::int64_t index, F v) {
  if (dtype == DType::f32) {
    store(static_cast<float*>(data) + index, v);
  } else if (dtype == DType::bf16) {
    store(static_cast<std::uint16_t*>(data) + index, to_bf16(v));
  } else {
    for (int i = 0; i < kLanes; ++i) static_cast<std::uint16_t*>(data)[index + i] = to_f16(v[i]);
  }
}

NUMAGRAFT_INLINE float sum_lanes(F v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
#endif
}
NUMAGRAFT_INLINE std::int32_t sum_lanes(I v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_epi32((__m512i)v);
#else
  std::int32_t total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
#endif
}
// Whether any bit of any lane is set.
NUMAGRAFT_INLINE bool any_lane(I v) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)v, (__m512i)v) != 0;
#else
  typedef std::uint64_t U64 __attribute__((vector_size(kLanes * 4)));
  const U64 words = (U64)v;
  return (words[0] | words[1] | words[2] | words[3]) != 0;
#endif
}

// e^x to 2 ulp, clamped so that it neither overflows nor vanishes; NaN passes through.
NUMAGRAFT_INLINE F exponential(F x) {
  x = minimum(splat(88.3762626f), maximum(splat(-87.3365479f), x));
  const I n = round_to_int(x * splat(1.44269504f));
  const F nf = to_float(n);
  F r = x - nf * splat(0.693359375f);
  r = r - nf * splat(-2.12194440e-4f);
  F p = splat(1.9875691500e-4f);
  p = p * r + splat(1.3981999507e-3f);
  p = p * r + splat(8.3334519073e-3f);
  p = p * r + splat(4.1665795894e-2f);
  p = p * r + splat(1.6666665459e-1f);
  p = p * r + splat(5.0000001201e-1f);
  p = p * r * r + r + splat(1.0f);
  return p * (F)((n + 127) << 23);
}
// Infinities are their limits 0 and 1; NaN passes through.
NUMAGRAFT_INLINE F sigmoid(F x) {
#if defined(__AVX512DQ__)
  // 1 / (1 + 2^t). The fraction of t by a polynomial to 2.6e-6 (fitted to the least relative error), the reciprocal to 14 bits:
  // what follows rounds to bf16.
  const __m512 t = (__m512)(x * splat(-1.44269504f));
  const F r = (F)_mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  F p = splat(1.35341391e-2f);
  p = p * r + splat(5.20115159e-2f);
  p = p * r + splat(2.41442724e-1f);
  p = p * r + splat(6.93003840e-1f);
  p = p * r + splat(1.00000259f);
  return (F)_mm512_rcp14_ps(_mm512_add_ps(_mm512_scalef_ps((__m512)p, t), _mm512_set1_ps(1.0f)));
#else
  return splat(1.0f) / (splat(1.0f) + exponential(-x));
#endif
}

}  // namespace
}  // namespace numagraft

#pragma once

// The AVX-512 and VNNI instructions that native/kernels uses, each as two of AVX2's or a loop over its lanes, so that those kernels
// compute here what they compute on a CPU that has them. Slow. For -DNUMAGRAFT_EMULATE=ON (native/kernels/CMakeLists.txt): it lies before
// the compiler's header of that name, which it includes. What they do: Intel's intrinsics guide.
#include_next <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace emulated {

#define EMULATED static inline __attribute__((always_inline))

template <class T>
struct Lanes {
  T of[64 / sizeof(T)];
};
template <class T, class V>
EMULATED Lanes<T> lanes(V v) {
  Lanes<T> l;
  std::memcpy(&l, &v, 64);
  return l;
}
template <class V, class T>
EMULATED V whole(const Lanes<T>& l) {
  V v;
  std::memcpy(&v, &l, 64);
  return v;
}
EMULATED __m512i join(__m256i first, __m256i second) { return whole<__m512i>(Lanes<__m256i>{{first, second}}); }
EMULATED __m512 join(__m256 first, __m256 second) { return whole<__m512>(Lanes<__m256>{{first, second}}); }
EMULATED __m256i half(__m512i v, int which) { return lanes<__m256i>(v).of[which]; }
EMULATED __m256 half(__m512 v, int which) { return lanes<__m256>(v).of[which]; }
EMULATED void check_aligned(const void* p) {
  if (reinterpret_cast<std::uintptr_t>(p) % 64 != 0) __builtin_trap();  // as the instruction does
}

// Lane by lane of both halves
#define EMULATED_TWO(type, name, of_avx2) \
  EMULATED type name(type a, type b) { return join(of_avx2(half(a, 0), half(b, 0)), of_avx2(half(a, 1), half(b, 1))); }
#define EMULATED_THREE(type, name, of_avx2) \
  EMULATED type name(type a, type b, type c) { return join(of_avx2(half(a, 0), half(b, 0), half(c, 0)), of_avx2(half(a, 1), half(b, 1), half(c, 1))); }
#define EMULATED_SHIFT(name, of_avx2, count) \
  EMULATED __m512i name(__m512i a, count n) { return join(of_avx2(half(a, 0), n), of_avx2(half(a, 1), n)); }
#define EMULATED_REPEAT(type, name, of_avx2, value) \
  EMULATED type name(value x) { return join(of_avx2(x), of_avx2(x)); }
EMULATED_TWO(__m512i, add_epi32, _mm256_add_epi32)
EMULATED_TWO(__m512i, sub_epi32, _mm256_sub_epi32)
EMULATED_TWO(__m512i, add_epi16, _mm256_add_epi16)
EMULATED_TWO(__m512i, sub_epi16, _mm256_sub_epi16)
EMULATED_TWO(__m512i, madd_epi16, _mm256_madd_epi16)
EMULATED_TWO(__m512i, maddubs_epi16, _mm256_maddubs_epi16)
EMULATED_TWO(__m512i, shuffle_epi8, _mm256_shuffle_epi8)
EMULATED_TWO(__m512i, mullo_epi16, _mm256_mullo_epi16)
EMULATED_TWO(__m512i, max_epi16, _mm256_max_epi16)
EMULATED_TWO(__m512i, min_epi16, _mm256_min_epi16)
EMULATED_TWO(__m512i, mulhrs_epi16, _mm256_mulhrs_epi16)
EMULATED_TWO(__m512i, packs_epi16, _mm256_packs_epi16)
EMULATED_TWO(__m512i, packs_epi32, _mm256_packs_epi32)
EMULATED_TWO(__m512i, unpacklo_epi32, _mm256_unpacklo_epi32)
EMULATED_TWO(__m512i, unpackhi_epi32, _mm256_unpackhi_epi32)
EMULATED_TWO(__m512i, and_si512, _mm256_and_si256)
EMULATED_TWO(__m512i, or_si512, _mm256_or_si256)
EMULATED_TWO(__m512, add_ps, _mm256_add_ps)
EMULATED_TWO(__m512, mul_ps, _mm256_mul_ps)
EMULATED_TWO(__m512, max_ps, _mm256_max_ps)
EMULATED_TWO(__m512, min_ps, _mm256_min_ps)
EMULATED_THREE(__m512, fmadd_ps, _mm256_fmadd_ps)
EMULATED_THREE(__m512, fnmadd_ps, _mm256_fnmadd_ps)
EMULATED_SHIFT(srli_epi16, _mm256_srli_epi16, int)
EMULATED_SHIFT(srai_epi16, _mm256_srai_epi16, int)
EMULATED_SHIFT(slli_epi16, _mm256_slli_epi16, int)
EMULATED_SHIFT(slli_epi32, _mm256_slli_epi32, int)
EMULATED_SHIFT(srl_epi16, _mm256_srl_epi16, __m128i)
EMULATED_REPEAT(__m512i, set1_epi8, _mm256_set1_epi8, char)
EMULATED_REPEAT(__m512i, set1_epi16, _mm256_set1_epi16, short)
EMULATED_REPEAT(__m512i, set1_epi32, _mm256_set1_epi32, int)
EMULATED_REPEAT(__m512i, set1_epi64, _mm256_set1_epi64x, long long)
EMULATED_REPEAT(__m512i, broadcast_i32x4, _mm256_broadcastsi128_si256, __m128i)
EMULATED_REPEAT(__m512, set1_ps, _mm256_set1_ps, float)

EMULATED __m512i setzero_si512() { return set1_epi32(0); }
EMULATED __m512 setzero_ps() { return set1_ps(0); }
EMULATED __m512i loadu_si512(const void* p) { return whole<__m512i>(lanes<char>(*static_cast<const Lanes<char>*>(p))); }
EMULATED __m512 loadu_ps(const void* p) { return whole<__m512>(lanes<char>(*static_cast<const Lanes<char>*>(p))); }
EMULATED void storeu_si512(void* p, __m512i v) { std::memcpy(p, &v, 64); }
EMULATED void storeu_ps(void* p, __m512 v) { std::memcpy(p, &v, 64); }
EMULATED void store_si512(void* p, __m512i v) {
  check_aligned(p);
  std::memcpy(p, &v, 64);
}
EMULATED void stream_si512(void* p, __m512i v) { store_si512(p, v); }

// Other types, and halves
EMULATED __m512 castsi512_ps(__m512i v) { return (__m512)v; }
EMULATED __m512i castps_si512(__m512 v) { return (__m512i)v; }
EMULATED __m256i castsi512_si256(__m512i v) { return half(v, 0); }
EMULATED __m512i castsi256_si512(__m256i v) { return join(v, _mm256_setzero_si256()); }
EMULATED __m256i extracti64x4_epi64(__m512i v, int which) { return half(v, which); }
EMULATED __m512i inserti64x4(__m512i v, __m256i part, int which) { return which == 0 ? join(part, half(v, 1)) : join(half(v, 0), part); }
EMULATED __m512 cvtepi32_ps(__m512i v) { return join(_mm256_cvtepi32_ps(half(v, 0)), _mm256_cvtepi32_ps(half(v, 1))); }
EMULATED __m512i cvtps_epi32(__m512 v) { return join(_mm256_cvtps_epi32(half(v, 0)), _mm256_cvtps_epi32(half(v, 1))); }
EMULATED __m512 cvtph_ps(__m256i v) { return join(_mm256_cvtph_ps(_mm256_castsi256_si128(v)), _mm256_cvtph_ps(_mm256_extracti128_si256(v, 1))); }
EMULATED __m512i cvtepu16_epi32(__m256i v) {
  return join(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(v)), _mm256_cvtepu16_epi32(_mm256_extracti128_si256(v, 1)));
}
EMULATED __m512i cvtepu8_epi32(__m128i v) { return join(_mm256_cvtepu8_epi32(v), _mm256_cvtepu8_epi32(_mm_unpackhi_epi64(v, v))); }

// Lanes by their numbers, and masks
EMULATED __m512i setr_epi32(int a, int b, int c, int d, int e, int f, int g, int h, int i, int j, int k, int l, int m, int n, int o, int p) {
  return whole<__m512i>(Lanes<int>{{a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p}});
}
EMULATED __m512i permutex2var_epi32(__m512i a, __m512i at, __m512i b) {
  const auto first = lanes<std::uint32_t>(a), second = lanes<std::uint32_t>(b);
  auto to = lanes<std::uint32_t>(at);
  for (std::uint32_t& lane : to.of) lane = (lane & 16 ? second : first).of[lane & 15];
  return whole<__m512i>(to);
}
EMULATED __m512i permutexvar_epi32(__m512i at, __m512i a) { return permutex2var_epi32(a, at, a); }
EMULATED __mmask32 cmpgt_epu16_mask(__m512i a, __m512i b) {
  __mmask32 mask = 0;
  for (int i = 0; i < 32; ++i) mask |= static_cast<__mmask32>(lanes<std::uint16_t>(a).of[i] > lanes<std::uint16_t>(b).of[i]) << i;
  return mask;
}
EMULATED __mmask16 test_epi32_mask(__m512i a, __m512i b) {
  unsigned mask = 0;
  for (int i = 0; i < 16; ++i) mask |= static_cast<unsigned>((lanes<int>(a).of[i] & lanes<int>(b).of[i]) != 0) << i;
  return static_cast<__mmask16>(mask);
}
EMULATED __m512i maskz_srai_epi16(__mmask32 mask, __m512i a, int n) {
  auto to = lanes<std::int16_t>(a);
  for (int i = 0; i < 32; ++i) to.of[i] = static_cast<std::int16_t>(mask >> i & 1 ? to.of[i] >> n : 0);
  return whole<__m512i>(to);
}
EMULATED __m512i maskz_compress_epi32(__mmask16 mask, __m512i a) {
  const auto from = lanes<int>(a);
  Lanes<int> to{};
  for (int i = 0, count = 0; i < 16; ++i) {
    if (mask >> i & 1) to.of[count++] = from.of[i];
  }
  return whole<__m512i>(to);
}

// Arithmetic without a counterpart
EMULATED int reduce_add_epi32(__m512i a) {
  std::uint32_t sum = 0;
  for (std::uint32_t lane : lanes<std::uint32_t>(a).of) sum += lane;
  return static_cast<int>(sum);
}
EMULATED float reduce_add_ps(__m512 a) {
  float sum = 0;
  for (float lane : lanes<float>(a).of) sum += lane;
  return sum;
}
EMULATED __m512 rcp14_ps(__m512 a) {
  auto to = lanes<float>(a);
  for (float& lane : to.of) lane = 1.0f / lane;
  return whole<__m512>(to);
}
EMULATED __m512 reduce_ps(__m512 a, int) {  // to whole numbers, rounding down
  auto to = lanes<float>(a);
  for (float& lane : to.of) lane = std::isinf(lane) ? 0.0f : lane - std::floor(lane);
  return whole<__m512>(to);
}
EMULATED __m512 scalef_ps(__m512 a, __m512 b) {
  auto to = lanes<float>(a);
  const auto exponents = lanes<float>(b);
  for (int i = 0; i < 16; ++i) {
    const float exponent = exponents.of[i];
    to.of[i] = std::isnan(exponent) ? exponent : std::ldexp(to.of[i], static_cast<int>(std::floor(std::fmin(std::fmax(exponent, -400.0f), 400.0f))));
  }
  return whole<__m512>(to);
}
// Not inlined: the compiler would take minutes and gigabytes for a kernel's thousands.
static __attribute__((noinline)) __m512i dpbusd_epi32(__m512i sum, __m512i a, __m512i b) {
  const __m512i even = madd_epi16(and_si512(a, set1_epi16(255)), srai_epi16(slli_epi16(b, 8), 8));
  const __m512i odd = madd_epi16(srli_epi16(a, 8), srai_epi16(b, 8));
  return add_epi32(sum, add_epi32(even, odd));
}

#undef EMULATED
#undef EMULATED_TWO
#undef EMULATED_THREE
#undef EMULATED_SHIFT
#undef EMULATED_REPEAT

}  // namespace emulated

#define _mm512_add_epi32 emulated::add_epi32
#define _mm512_sub_epi32 emulated::sub_epi32
#define _mm512_add_epi16 emulated::add_epi16
#define _mm512_sub_epi16 emulated::sub_epi16
#define _mm512_madd_epi16 emulated::madd_epi16
#define _mm512_maddubs_epi16 emulated::maddubs_epi16
#define _mm512_shuffle_epi8 emulated::shuffle_epi8
#define _mm512_mullo_epi16 emulated::mullo_epi16
#define _mm512_max_epi16 emulated::max_epi16
#define _mm512_min_epi16 emulated::min_epi16
#define _mm512_mulhrs_epi16 emulated::mulhrs_epi16
#define _mm512_packs_epi16 emulated::packs_epi16
#define _mm512_packs_epi32 emulated::packs_epi32
#define _mm512_unpacklo_epi32 emulated::unpacklo_epi32
#define _mm512_unpackhi_epi32 emulated::unpackhi_epi32
#define _mm512_and_si512 emulated::and_si512
#define _mm512_or_si512 emulated::or_si512
#define _mm512_add_ps emulated::add_ps
#define _mm512_mul_ps emulated::mul_ps
#define _mm512_max_ps emulated::max_ps
#define _mm512_min_ps emulated::min_ps
#define _mm512_fmadd_ps emulated::fmadd_ps
#define _mm512_fnmadd_ps emulated::fnmadd_ps
#define _mm512_srli_epi16 emulated::srli_epi16
#define _mm512_srai_epi16 emulated::srai_epi16
#define _mm512_slli_epi16 emulated::slli_epi16
#define _mm512_slli_epi32 emulated::slli_epi32
#define _mm512_srl_epi16 emulated::srl_epi16
#define _mm512_set1_epi8 emulated::set1_epi8
#define _mm512_set1_epi16 emulated::set1_epi16
#define _mm512_set1_epi32 emulated::set1_epi32
#define _mm512_set1_epi64 emulated::set1_epi64
#define _mm512_broadcast_i32x4 emulated::broadcast_i32x4
#define _mm512_set1_ps emulated::set1_ps
#define _mm512_setzero_si512 emulated::setzero_si512
#define _mm512_setzero_ps emulated::setzero_ps
#define _mm512_loadu_si512 emulated::loadu_si512
#define _mm512_loadu_ps emulated::loadu_ps
#define _mm512_storeu_si512 emulated::storeu_si512
#define _mm512_storeu_ps emulated::storeu_ps
#define _mm512_store_si512 emulated::store_si512
#define _mm512_stream_si512 emulated::stream_si512
#define _mm512_castsi512_ps emulated::castsi512_ps
#define _mm512_castps_si512 emulated::castps_si512
#define _mm512_castsi512_si256 emulated::castsi512_si256
#define _mm512_castsi256_si512 emulated::castsi256_si512
#define _mm512_extracti64x4_epi64 emulated::extracti64x4_epi64
#define _mm512_inserti64x4 emulated::inserti64x4
#define _mm512_cvtepi32_ps emulated::cvtepi32_ps
#define _mm512_cvtps_epi32 emulated::cvtps_epi32
#define _mm512_cvtph_ps emulated::cvtph_ps
#define _mm512_cvtepu16_epi32 emulated::cvtepu16_epi32
#define _mm512_cvtepu8_epi32 emulated::cvtepu8_epi32
#define _mm512_setr_epi32 emulated::setr_epi32
#define _mm512_permutex2var_epi32 emulated::permutex2var_epi32
#define _mm512_permutexvar_epi32 emulated::permutexvar_epi32
#define _mm512_cmpgt_epu16_mask emulated::cmpgt_epu16_mask
#define _mm512_test_epi32_mask emulated::test_epi32_mask
#define _mm512_maskz_srai_epi16 emulated::maskz_srai_epi16
#define _mm512_maskz_compress_epi32 emulated::maskz_compress_epi32
#define _mm512_reduce_add_epi32 emulated::reduce_add_epi32
#define _mm512_reduce_add_ps emulated::reduce_add_ps
#define _mm512_rcp14_ps emulated::rcp14_ps
#define _mm512_reduce_ps emulated::reduce_ps
#define _mm512_scalef_ps emulated::scalef_ps
#define _mm512_dpbusd_epi32 emulated::dpbusd_epi32

// What the kernels ask for
#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512DQ__ 1

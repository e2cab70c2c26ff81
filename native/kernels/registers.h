#pragma once

// The widest vector register of the ISA a file is compiled for (AVX2 or AVX-512), by the few operations that the multiply
// kernels need. Everything has internal linkage (see simd.h, whose 16 lanes the compiler would split into too many parts).
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "kernels/kernel_table.h"

#define NG_INLINE static inline __attribute__((always_inline, unused))
#define NG_INLINE_MEMBER inline __attribute__((always_inline))

namespace numagraft {
namespace {

// Lines are asked for this many bytes before they are read; docs/kernels.md ("Distance") says what others give. Whole pages ahead
// are the worst. Where lines are read in order the CPU asks for most of them itself: docs/kernels-zen.md.
constexpr std::int64_t kPrefetchAhead = 6656;
constexpr std::int64_t kPrefetchAheadInOrder = 1024;
NG_INLINE void prefetch_line(const std::byte* p, std::int64_t ahead = kPrefetchAhead) {
  _mm_prefetch(reinterpret_cast<const char*>(p + ahead), _MM_HINT_T1);
}
// Which two lines to ask for at each step over two streams: one of each. The tiles of a unit are read in turn, panels in order.
struct Requests {
  std::int64_t apart;
  std::int64_t ahead;
  NG_INLINE_MEMBER static Requests of_tiles(std::int64_t tile_bytes) { return {tile_bytes, kPrefetchAhead}; }
  NG_INLINE_MEMBER static Requests of_panels(std::int64_t apart) { return {apart, kPrefetchAheadInOrder}; }
  NG_INLINE_MEMBER void ask(const std::byte* lines, int i) const {
    prefetch_line(lines + i * 64, ahead);
    prefetch_line(lines + i * 64 + apart, ahead);
  }
};
// The scales of 32 columns in one row of the side table.
NG_INLINE void prefetch_scales(const float* side) {
  _mm_prefetch(reinterpret_cast<const char*>(side), _MM_HINT_T0);
  _mm_prefetch(reinterpret_cast<const char*>(side + kTileColumns), _MM_HINT_T0);
}
// Those of the first panel; kernels then ask for the next panel's while they multiply one.
NG_INLINE void prefetch_first_scales(const GemmArgs& a) {
  for (std::int64_t row = 0; row < a.layout->scale_rows; ++row) prefetch_scales(a.side + row * kPanelColumns);
}

#if defined(__AVX512BW__)
typedef __m512i V;
typedef __m512 VF;
constexpr int kInt32s = 16;
NG_INLINE V zero() { return _mm512_setzero_si512(); }
NG_INLINE VF zero_float() { return _mm512_setzero_ps(); }
NG_INLINE V load_bytes(const std::byte* p) { return _mm512_loadu_si512(p); }
NG_INLINE void store_bytes(void* p, V v) { _mm512_store_si512(p, v); }
NG_INLINE V repeat16(short x) { return _mm512_set1_epi16(x); }
NG_INLINE V repeat32(int x) { return _mm512_set1_epi32(x); }
NG_INLINE V repeat64(long long x) { return _mm512_set1_epi64(x); }
NG_INLINE V add32(V a, V b) { return _mm512_add_epi32(a, b); }
NG_INLINE V sub32(V a, V b) { return _mm512_sub_epi32(a, b); }
NG_INLINE V add16(V a, V b) { return _mm512_add_epi16(a, b); }
NG_INLINE V madd(V a, V b) { return _mm512_madd_epi16(a, b); }
NG_INLINE V maddubs(V u, V s) { return _mm512_maddubs_epi16(u, s); }
NG_INLINE V bit_and(V a, V b) { return _mm512_and_si512(a, b); }
NG_INLINE V right4(V a) { return _mm512_srli_epi16(a, 4); }
NG_INLINE V right_by(V a, int bits) { return _mm512_srl_epi16(a, _mm_cvtsi32_si128(bits)); }
NG_INLINE V right8(V a) { return _mm512_srli_epi16(a, 8); }
template <int bits>
NG_INLINE V signed_right(V a) { return _mm512_srai_epi16(a, bits); }
NG_INLINE V round_to_ints(VF a) { return _mm512_cvtps_epi32(a); }
NG_INLINE V left16(V a) { return _mm512_slli_epi32(a, 16); }
NG_INLINE V look_up(V table, V index) { return _mm512_shuffle_epi8(table, index); }
NG_INLINE V repeat128(__m128i x) { return _mm512_broadcast_i32x4(x); }
NG_INLINE V ones16() { return _mm512_set1_epi16(1); }
NG_INLINE V ones8(char x) { return _mm512_set1_epi8(x); }
NG_INLINE VF as_floats(V a) { return _mm512_castsi512_ps(a); }
NG_INLINE V as_integers(VF a) { return _mm512_castps_si512(a); }
NG_INLINE VF to_floats(V a) { return _mm512_cvtepi32_ps(a); }
NG_INLINE VF repeat(float x) { return _mm512_set1_ps(x); }
NG_INLINE VF add(VF a, VF b) { return _mm512_add_ps(a, b); }
NG_INLINE VF mul(VF a, VF b) { return _mm512_mul_ps(a, b); }
NG_INLINE VF fma(VF a, VF b, VF c) { return _mm512_fmadd_ps(a, b, c); }
NG_INLINE VF maximum_of(VF a, VF b) { return _mm512_max_ps(a, b); }
NG_INLINE VF load_floats(const float* p) { return _mm512_loadu_ps(p); }
NG_INLINE void store_floats(float* p, VF v) { _mm512_storeu_ps(p, v); }
NG_INLINE VF load_f16(const std::uint16_t* p) { return _mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(p))); }
NG_INLINE VF widen_bf16(const std::uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
}
NG_INLINE VF power_of_two(const std::byte* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 23));
}
#else
typedef __m256i V;
typedef __m256 VF;
constexpr int kInt32s = 8;
NG_INLINE V zero() { return _mm256_setzero_si256(); }
NG_INLINE VF zero_float() { return _mm256_setzero_ps(); }
NG_INLINE V load_bytes(const std::byte* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
NG_INLINE void store_bytes(void* p, V v) { _mm256_store_si256(static_cast<__m256i*>(p), v); }
NG_INLINE V repeat16(short x) { return _mm256_set1_epi16(x); }
NG_INLINE V repeat32(int x) { return _mm256_set1_epi32(x); }
NG_INLINE V repeat64(long long x) { return _mm256_set1_epi64x(x); }
NG_INLINE V add32(V a, V b) { return _mm256_add_epi32(a, b); }
NG_INLINE V sub32(V a, V b) { return _mm256_sub_epi32(a, b); }
NG_INLINE V add16(V a, V b) { return _mm256_add_epi16(a, b); }
NG_INLINE V madd(V a, V b) { return _mm256_madd_epi16(a, b); }
NG_INLINE V maddubs(V u, V s) { return _mm256_maddubs_epi16(u, s); }
NG_INLINE V bit_and(V a, V b) { return _mm256_and_si256(a, b); }
NG_INLINE V right4(V a) { return _mm256_srli_epi16(a, 4); }
NG_INLINE V right_by(V a, int bits) { return _mm256_srl_epi16(a, _mm_cvtsi32_si128(bits)); }
NG_INLINE V right8(V a) { return _mm256_srli_epi16(a, 8); }
template <int bits>
NG_INLINE V signed_right(V a) { return _mm256_srai_epi16(a, bits); }
NG_INLINE V round_to_ints(VF a) { return _mm256_cvtps_epi32(a); }
NG_INLINE V left16(V a) { return _mm256_slli_epi32(a, 16); }
NG_INLINE V look_up(V table, V index) { return _mm256_shuffle_epi8(table, index); }
NG_INLINE V repeat128(__m128i x) { return _mm256_broadcastsi128_si256(x); }
NG_INLINE V ones16() { return _mm256_set1_epi16(1); }
NG_INLINE V ones8(char x) { return _mm256_set1_epi8(x); }
NG_INLINE VF as_floats(V a) { return _mm256_castsi256_ps(a); }
NG_INLINE V as_integers(VF a) { return _mm256_castps_si256(a); }
NG_INLINE VF to_floats(V a) { return _mm256_cvtepi32_ps(a); }
NG_INLINE VF repeat(float x) { return _mm256_set1_ps(x); }
NG_INLINE VF add(VF a, VF b) { return _mm256_add_ps(a, b); }
NG_INLINE VF mul(VF a, VF b) { return _mm256_mul_ps(a, b); }
NG_INLINE VF fma(VF a, VF b, VF c) { return _mm256_fmadd_ps(a, b, c); }
NG_INLINE VF maximum_of(VF a, VF b) { return _mm256_max_ps(a, b); }
NG_INLINE VF load_floats(const float* p) { return _mm256_loadu_ps(p); }
NG_INLINE void store_floats(float* p, VF v) { _mm256_storeu_ps(p, v); }
NG_INLINE VF load_f16(const std::uint16_t* p) { return _mm256_cvtph_ps(_mm_load_si128(reinterpret_cast<const __m128i*>(p))); }
NG_INLINE VF widen_bf16(const std::uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
}
NG_INLINE VF power_of_two(const std::byte* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))), 23));
}
#endif

// A sum is computed where it is written. Otherwise gcc adds products up with each other first, or late, and keeps many of them
// at a time: more than there are registers, so that sums go to memory and back.
NG_INLINE void settle(V& sum) {
#if defined(NUMAGRAFT_EMULATED)
  asm volatile("" : "+m"(sum));
#elif defined(__AVX512BW__)
  asm volatile("" : "+v"(sum));
#else
  asm volatile("" : "+x"(sum));
#endif
}

// Adds what four input bytes (one float), repeated, make of two vectors of weights to two sums. With AVX2 in assembly: twelve sums, two
// vectors, the inputs and a product are all registers there are. Left to itself gcc keeps some sums in memory, and each then waits
// for its last store.
#if defined(__AVX512BW__)
NG_INLINE void add_madd(const std::byte* inputs, V w0, V w1, V& sum0, V& sum1) {
  int x;
  __builtin_memcpy(&x, inputs, 4);
  sum0 = add32(sum0, madd(w0, repeat32(x)));
  settle(sum0);
  sum1 = add32(sum1, madd(w1, repeat32(x)));
  settle(sum1);
}
NG_INLINE void add_maddubs(const std::byte* inputs, V w0, V w1, V& sum0, V& sum1) {
  int x;
  __builtin_memcpy(&x, inputs, 4);
  sum0 = add16(sum0, maddubs(w0, repeat32(x)));
  settle(sum0);
  sum1 = add16(sum1, maddubs(w1, repeat32(x)));
  settle(sum1);
}
NG_INLINE void first_maddubs(const std::byte* inputs, V w0, V w1, V& sum0, V& sum1) {
  int x;
  __builtin_memcpy(&x, inputs, 4);
  sum0 = maddubs(w0, repeat32(x));
  sum1 = maddubs(w1, repeat32(x));
}
NG_INLINE void add_fma(const float* input, VF w0, VF w1, VF& sum0, VF& sum1) {
  sum0 = fma(repeat(*input), w0, sum0);
  sum1 = fma(repeat(*input), w1, sum1);
}
#else
NG_INLINE void add_madd(const std::byte* inputs, V w0, V w1, V& sum0, V& sum1) {
  V x, product;
  asm("vpbroadcastd %4, %2\n\tvpmaddwd %2, %5, %3\n\tvpmaddwd %2, %6, %2\n\tvpaddd %3, %0, %0\n\tvpaddd %2, %1, %1"
      : "+x"(sum0), "+x"(sum1), "=&x"(x), "=&x"(product)
      : "m"(*reinterpret_cast<const int*>(inputs)), "x"(w0), "x"(w1));
}
NG_INLINE void add_maddubs(const std::byte* inputs, V w0, V w1, V& sum0, V& sum1) {
  V x, product;
  asm("vpbroadcastd %4, %2\n\tvpmaddubsw %2, %5, %3\n\tvpmaddubsw %2, %6, %2\n\tvpaddw %3, %0, %0\n\tvpaddw %2, %1, %1"
      : "+x"(sum0), "+x"(sum1), "=&x"(x), "=&x"(product)
      : "m"(*reinterpret_cast<const int*>(inputs)), "x"(w0), "x"(w1));
}
NG_INLINE void first_maddubs(const std::byte* inputs, V w0, V w1, V& sum0, V& sum1) {
  asm("vpbroadcastd %2, %1\n\tvpmaddubsw %1, %3, %0\n\tvpmaddubsw %1, %4, %1"
      : "=&x"(sum0), "=&x"(sum1)
      : "m"(*reinterpret_cast<const int*>(inputs)), "x"(w0), "x"(w1));
}
NG_INLINE void add_fma(const float* input, VF w0, VF w1, VF& sum0, VF& sum1) {
  VF x;
  asm("vbroadcastss %3, %2\n\tvfmadd231ps %2, %4, %0\n\tvfmadd231ps %2, %5, %1"
      : "+x"(sum0), "+x"(sum1), "=&x"(x)
      : "m"(*input), "x"(w0), "x"(w1));
}
#endif

constexpr int kVectorBytes = kInt32s * 4;
constexpr int kParts = kTileColumns / kInt32s;  // vectors of results per 16-column tile

// e4m3 as fp16, 2^-8 times its value: the sign and, one bit further right, exponent and mantissa; subnormals included,
// whose products in fp32 would cost a microcode assist each. A register holds pairs of inputs, the first in the low byte.
struct E4m3AsF16 {
  V low_bytes;
  V mask;
  E4m3AsF16()
      : low_bytes(repeat128(_mm_setr_epi8(-1, 0, -1, 2, -1, 4, -1, 6, -1, 8, -1, 10, -1, 12, -1, 14))),
        mask(repeat16(static_cast<short>(0xBF80))) {}
  NG_INLINE V even(const E4m3AsF16& e, V pairs) { return bit_and(signed_right<1>(look_up(pairs, e.low_bytes)), e.mask); }
  NG_INLINE V odd(const E4m3AsF16& e, V pairs) { return bit_and(signed_right<1>(pairs), e.mask); }
};
constexpr float kE4m3F16Scale = 256.0f;

}  // namespace
}  // namespace numagraft

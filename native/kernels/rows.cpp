// Input rows on their way in: quantised to integers with one scale per row, or converted. Compiled once per ISA.
#include "kernels/kernel_table.h"
#include "kernels/row_scale.h"
#include "kernels/simd.h"

namespace numagraft::NUMAGRAFT_ISA {
namespace {

constexpr int kUnitVectors = kUnitInputs / kLanes;

NUMAGRAFT_INLINE void load_unit(const PrepareArgs& a, std::int64_t first, F (&x)[kUnitVectors]) {
  if (first + kUnitInputs <= a.k) {
    for (int v = 0; v < kUnitVectors; ++v) x[v] = load_as_float(a.x, a.dtype, first + v * kLanes);
    return;
  }
  alignas(64) float padded[kUnitInputs] = {};
  for (std::int64_t i = first; i < a.k; ++i) padded[i - first] = scalar_as_float(a.x, a.dtype, i);
  for (int v = 0; v < kUnitVectors; ++v) x[v] = load<F>(padded + v * kLanes);
}

NUMAGRAFT_INLINE void set_flag(const PrepareArgs& a, std::int64_t unit) {
  // Rows of one block may be prepared by several threads.
  if (!(__atomic_load_n(a.flags + unit, __ATOMIC_RELAXED) & a.flag_bit)) __atomic_fetch_or(a.flags + unit, a.flag_bit, __ATOMIC_RELAXED);
}

// The following row comes from memory while this one is worked on: a unit's worth of requests at a time, as a burst would
// hold all fill buffers.
NUMAGRAFT_INLINE void ask_for_next(const PrepareArgs& a, std::int64_t unit) {
  if (a.next == nullptr) return;
  const std::int64_t lines = a.dtype == DType::f32 ? 4 : 2;
  const auto* at = static_cast<const char*>(a.next) + unit * lines * 64;
  for (std::int64_t line = 0; line < lines; ++line) __builtin_prefetch(at + line * 64);
}

// Adds a unit's groups of four that have a high half to the row's list, which `listed` are in; returns how many.
NUMAGRAFT_INLINE int list_high(const RowLists& lists, std::int64_t unit, const I (&upper)[kUnitVectors], std::int64_t listed) {
  std::uint32_t high[kUnitInputs / 4];
  for (int v = 0; v < kUnitVectors; ++v) store(reinterpret_cast<std::byte*>(high) + v * kLanes, __builtin_convertvector(upper[v], I8));
  ListedFour* to = lists.fours + listed;
  for (std::uint32_t four = 0; four < kUnitInputs / 4; ++four) {
    *to = {static_cast<std::uint32_t>(unit * kInt8UnitBytes) + four * 64, high[four]};  // overwritten by what follows, or never read
    to += high[four] != 0;
  }
  return static_cast<int>(to - lists.fours - listed);
}

#if defined(__AVX512BW__)
// The integers of a unit in 16 bits: four vectors packed to two, each 128 bits four of one and four of the next.
NUMAGRAFT_INLINE void unit_integers(const PrepareArgs& a, std::int64_t unit, F inverse, __m512i (&q)[2]) {
  F x[kUnitVectors];
  load_unit(a, unit * kUnitInputs, x);
  for (int v = 0; v < 2; ++v) {
    q[v] = _mm512_packs_epi32((__m512i)round_to_int(x[2 * v] * inverse), (__m512i)round_to_int(x[2 * v + 1] * inverse));
  }
}
// Two such vectors as bytes, in the inputs' order.
NUMAGRAFT_INLINE __m512i unit_bytes(__m512i first, __m512i second) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_permutexvar_epi32(order, _mm512_packs_epi16(first, second));
}
// The sums of two vectors' lanes, as floats side by side.
NUMAGRAFT_INLINE void store_two_sums(float* to, __m512i first, __m512i second) {
  const __m512i pairs = _mm512_add_epi32(_mm512_unpacklo_epi32(first, second), _mm512_unpackhi_epi32(first, second));
  const __m256i four = _mm256_add_epi32(_mm512_castsi512_si256(pairs), _mm512_extracti64x4_epi64(pairs, 1));
  const __m128i two = _mm_add_epi32(_mm256_castsi256_si128(four), _mm256_extracti128_si256(four, 1));
  _mm_storel_pi(reinterpret_cast<__m64*>(to), _mm_cvtepi32_ps(_mm_add_epi32(two, _mm_unpackhi_epi64(two, two))));
}

// Units whose lines are asked for before they are written: in a block they lie 2 KiB apart, and no hardware foresees them.
constexpr std::int64_t kUnitsAhead = 8;

// Adds a unit's groups of four that have a high half to the row's list, which `listed` are in; returns how many.
NUMAGRAFT_INLINE int list_unit(const RowLists& lists, std::int64_t unit, __m512i high, std::int64_t listed) {
  const __mmask16 mask = _mm512_test_epi32_mask(high, high);
  const __m512i places = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i at = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(unit * kInt8UnitBytes)), _mm512_slli_epi32(places, 6));
  const __m512i found = _mm512_maskz_compress_epi32(mask, high);
  const __m512i found_at = _mm512_maskz_compress_epi32(mask, at);
  // Whole vectors: what is behind the list is overwritten by what follows, or never read.
  const __m512i pairs = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  _mm512_storeu_si512(lists.fours + listed, _mm512_permutex2var_epi32(found_at, pairs, found));
  _mm512_storeu_si512(lists.fours + listed + 8, _mm512_permutex2var_epi32(found_at, _mm512_add_epi32(pairs, _mm512_set1_epi32(8)), found));
  return __builtin_popcount(mask);
}

NUMAGRAFT_INLINE void store_line(std::byte* to, __m512i line, bool streamed) {
  streamed ? _mm512_stream_si512(reinterpret_cast<__m512i*>(to), line) : _mm512_storeu_si512(to, line);
}

// What the loop of `quantise` does for halves, 64 integers at a time. Returns the row's sum.
template <bool one_half, bool sums, bool lists>
NUMAGRAFT_INLINE std::int32_t quantise_units(const PrepareArgs& a, F inverse) {
  std::int64_t listed = 0;
  const bool streamed = a.streamed;
  const bool stores_high = !lists && (!one_half || a.has_high == nullptr);
  const __m512i ones = _mm512_set1_epi16(1);
  __m512i total = _mm512_setzero_si512();
  for (std::int64_t unit = 0; unit < a.units; ++unit) {
    if (!streamed) __builtin_prefetch(a.low + (unit + kUnitsAhead) * a.unit_stride, 1);
    ask_for_next(a, unit);
    if (stores_high && !streamed) __builtin_prefetch(a.high + (unit + kUnitsAhead) * a.unit_stride, 1);
    __m512i q[2];
    unit_integers(a, unit, inverse, q);
    const __m512i first = _mm512_madd_epi16(q[0], ones);
    const __m512i second = _mm512_madd_epi16(q[1], ones);
    total = _mm512_add_epi32(total, _mm512_add_epi32(first, second));
    if constexpr (sums) store_two_sums(a.group_sum + unit * a.group_stride, first, second);
    __m512i upper[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    if constexpr (!one_half) {
      __mmask32 wide[2];
      for (int v = 0; v < 2; ++v) {
        wide[v] = _mm512_cmpgt_epu16_mask(_mm512_add_epi16(q[v], _mm512_set1_epi16(127)), _mm512_set1_epi16(254));
        upper[v] = _mm512_maskz_srai_epi16(wide[v], _mm512_add_epi16(q[v], _mm512_set1_epi16(64)), 7);
        q[v] = _mm512_sub_epi16(q[v], _mm512_slli_epi16(upper[v], 7));
      }
      if (!lists && (wide[0] | wide[1]) != 0) set_flag(a, unit);
    }
    const __m512i high = one_half ? upper[0] : unit_bytes(upper[0], upper[1]);
    if constexpr (lists) {
      a.lists.begin[unit * a.lists.rows] = static_cast<std::uint16_t>(listed);
      if constexpr (!one_half) listed += list_unit(a.lists, unit, high, listed);
    } else if (stores_high) {
      store_line(a.high + unit * a.unit_stride, high, streamed);
    }
    store_line(a.low + unit * a.unit_stride, unit_bytes(q[0], q[1]), streamed);
  }
  if constexpr (lists) a.lists.begin[a.units * a.lists.rows] = static_cast<std::uint16_t>(listed);
  if (streamed) _mm_sfence();  // such stores would not be ordered before the barrier's
  return _mm512_reduce_add_epi32(total);
}

// A row of NaN: integers of 0.
NUMAGRAFT_INLINE void clear_units(const PrepareArgs& a) {
  for (std::int64_t unit = 0; a.lists.fours != nullptr && unit <= a.units; ++unit) a.lists.begin[unit * a.lists.rows] = 0;
  for (std::int64_t unit = 0; unit < a.units; ++unit) {
    if (a.lists.fours == nullptr) _mm512_storeu_si512(a.high + unit * a.unit_stride, _mm512_setzero_si512());
    _mm512_storeu_si512(a.low + unit * a.unit_stride, _mm512_setzero_si512());
    if (a.group_sum != nullptr) a.group_sum[unit * a.group_stride] = a.group_sum[unit * a.group_stride + 1] = 0.0f;
  }
}
#endif

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
  if (a.has_high != nullptr) *a.has_high = !one_half;  // NaN: it has
#if defined(__AVX512BW__)
  if constexpr (form == RowForm::halves) {
    if (!finite) {
      *a.sum = 0;
      return clear_units(a);
    }
    if (a.lists.fours != nullptr && a.group_sum != nullptr) {
      *a.sum = one_half ? quantise_units<true, true, true>(a, inverse) : quantise_units<false, true, true>(a, inverse);
    } else if (a.lists.fours != nullptr) {
      *a.sum = one_half ? quantise_units<true, false, true>(a, inverse) : quantise_units<false, false, true>(a, inverse);
    } else if (a.group_sum != nullptr) {
      *a.sum = one_half ? quantise_units<true, true, false>(a, inverse) : quantise_units<false, true, false>(a, inverse);
    } else {
      *a.sum = one_half ? quantise_units<true, false, false>(a, inverse) : quantise_units<false, false, false>(a, inverse);
    }
    return;
  }
#endif
  const bool lists = form == RowForm::halves && a.lists.fours != nullptr;
  std::int64_t listed = 0;
  I total = {};
  for (std::int64_t unit = 0; unit < a.units; ++unit) {
    ask_for_next(a, unit);
    if (lists) a.lists.begin[unit * a.lists.rows] = static_cast<std::uint16_t>(listed);
    F x[kUnitVectors];
    I q[kUnitVectors];
    load_unit(a, unit * kUnitInputs, x);
    for (int v = 0; v < kUnitVectors; ++v) q[v] = finite ? round_to_int(x[v] * inverse) : I{};
    I first = q[0];
    I second = q[kUnitVectors / 2];
    for (int v = 1; v < kUnitVectors / 2; ++v) {
      first += q[v];
      second += q[kUnitVectors / 2 + v];
    }
    total += first + second;
    if (a.group_sum != nullptr) {
      float* group_sum = a.group_sum + unit * a.group_stride;
      group_sum[0] = static_cast<float>(sum_lanes(first));
      group_sum[1] = static_cast<float>(sum_lanes(second));
    }
    if constexpr (form == RowForm::wide) {
      auto* low = reinterpret_cast<std::int16_t*>(a.low) + unit * a.unit_stride;
      for (int v = 0; v < kUnitVectors; ++v) {
        const I16 narrow = __builtin_convertvector(q[v], I16);
#if defined(__AVX512F__)
        store(low + v * kLanes, __builtin_shufflevector(narrow, narrow, 0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15));
#else
        store(low + v * kLanes, __builtin_shufflevector(narrow, narrow, 0, 2, 1, 3, 4, 6, 5, 7));
#endif
      }
    } else {
      auto* low = reinterpret_cast<std::int8_t*>(a.low) + unit * a.unit_stride;
      auto* high = reinterpret_cast<std::int8_t*>(a.high) + unit * a.unit_stride;
      if (!one_half) {
        I any = {};
        I upper[kUnitVectors];
        for (int v = 0; v < kUnitVectors; ++v) {
          const I wide = (q[v] > 127) | (q[v] < -127);
          upper[v] = ((q[v] + 64) >> 7) & wide;
          any |= upper[v];
          q[v] -= upper[v] << 7;
        }
        if (lists) {
          if (any_lane(any)) listed += list_high(a.lists, unit, upper, listed);
        } else {
          // Where this row needs no high half another may.
          for (int v = 0; v < kUnitVectors; ++v) store(high + v * kLanes, __builtin_convertvector(upper[v], I8));
          if (any_lane(any)) set_flag(a, unit);
        }
      } else if (a.has_high == nullptr && !lists) {
        for (int v = 0; v < kUnitVectors; ++v) store(high + v * kLanes, I8{});
      }
      for (int v = 0; v < kUnitVectors; ++v) store(low + v * kLanes, __builtin_convertvector(q[v], I8));
    }
  }
  if (lists) a.lists.begin[a.units * a.lists.rows] = static_cast<std::uint16_t>(listed);
  *a.sum = sum_lanes(total);
}

template <RowForm form>
NUMAGRAFT_INLINE void convert(const PrepareArgs& a) {
  *a.scale = 1.0f;
  *a.sum = 0;
  for (std::int64_t unit = 0; unit < a.units; ++unit) {
    ask_for_next(a, unit);
    if (form == RowForm::bf16 && a.dtype == DType::bf16 && (unit + 1) * kUnitInputs <= a.k) {
      __builtin_memcpy(a.low + unit * a.unit_stride * 2, static_cast<const std::uint16_t*>(a.x) + unit * kUnitInputs, 2 * kUnitInputs);
      continue;
    }
    F x[kUnitVectors];
    load_unit(a, unit * kUnitInputs, x);
    for (int v = 0; v < kUnitVectors; ++v) {
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
    F x[kUnitVectors];
    load_unit(a, unit * kUnitInputs, x);
    for (int v = 0; v < kUnitVectors; ++v) {
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

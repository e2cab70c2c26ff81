#pragma once

// A panel's 32 output channels gathered from the source as fp32: staged[k][32]. A vector lane is a channel all the way.
// Included by pack.cpp; everything is internal to it.
#include "kernels/kernel_table.h"
#include "kernels/simd.h"

namespace numagraft::NUMAGRAFT_ISA {
namespace {

constexpr int kSlices = kPanelColumns / kLanes;  // of a panel's columns, a vector each
// Where a slice begins in a unit whose column tiles take `tile_bytes`, with `column_bytes` per column in each of their lines.
NUMAGRAFT_INLINE std::int64_t slice_offset(int slice, int tile_bytes, int column_bytes) {
  const int column = slice * kLanes;
  return column / kTileColumns * tile_bytes + column % kTileColumns * column_bytes;
}

constexpr int kLineSlices = kTileColumns / kLanes;  // slices whose columns share the lines of a tile
// A whole line of a panel, past the caches: it is read when the model runs, and not before. The other cores see it after a fence.
NUMAGRAFT_INLINE void store_line(void* line, const I (&slices)[kLineSlices]) {
#if defined(__AVX512F__)
  _mm512_stream_si512(static_cast<__m512i*>(line), (__m512i)slices[0]);
#elif defined(__AVX2__)
  for (int i = 0; i < kLineSlices; ++i) _mm256_stream_si256(static_cast<__m256i*>(line) + i, (__m256i)slices[i]);
#else
  __builtin_memcpy(line, slices, sizeof slices);
#endif
}

template <int step>
NUMAGRAFT_INLINE void exchange(F& a, F& b) {
  constexpr auto first = [](int lane) { return (lane & step) ? lane - step + kLanes : lane; };
  constexpr auto second = [](int lane) { return (lane & step) ? lane + kLanes : lane + step; };
#if defined(__AVX512F__)
  const F low = __builtin_shufflevector(a, b, first(0), first(1), first(2), first(3), first(4), first(5), first(6),
                                        first(7), first(8), first(9), first(10), first(11), first(12), first(13),
                                        first(14), first(15));
  const F high = __builtin_shufflevector(a, b, second(0), second(1), second(2), second(3), second(4), second(5),
                                         second(6), second(7), second(8), second(9), second(10), second(11), second(12),
                                         second(13), second(14), second(15));
#else
  const F low = __builtin_shufflevector(a, b, first(0), first(1), first(2), first(3), first(4), first(5), first(6), first(7));
  const F high = __builtin_shufflevector(a, b, second(0), second(1), second(2), second(3), second(4), second(5), second(6), second(7));
#endif
  a = low;
  b = high;
}

template <int step>
NUMAGRAFT_INLINE void transpose(F (&v)[kLanes]) {
  for (int i = 0; i < kLanes; ++i) {
    if (!(i & step)) exchange<step>(v[i], v[i + step]);
  }
  if constexpr (step > 1) transpose<step / 2>(v);
}

// e4m3: sign, 4 bits of exponent (bias 7), 3 of mantissa; no infinities, 0x7F is NaN.
NUMAGRAFT_INLINE F e4m3_value(I code) {
  const I magnitude = code & 0x7F;
  const F normal = (F)((magnitude << 20) + (120 << 23));
  const F value = select(magnitude < 8, to_float(magnitude) * splat(0x1p-9f), normal);
  return (F)((I)select(magnitude == 0x7F, splat(__builtin_nanf("")), value) | ((code & 0x80) << 24));
}
// e2m1: 0, .5, 1, 1.5, 2, 3, 4, 6 and a sign.
NUMAGRAFT_INLINE F e2m1_value(I code) {
  const I magnitude = code & 7;
  const F normal = (F)((magnitude << 22) + (126 << 23));
  return (F)((I)select(magnitude < 2, to_float(magnitude) * splat(0.5f), normal) | ((code & 8) << 28));
}

// A vector of neighbouring elements of a row. `coded`: codes as they are, in lanes of integers; else values, which lack their scales.
template <DType dtype, bool coded>
NUMAGRAFT_INLINE F load_elements(const void* data, std::int64_t index) {
  if constexpr (dtype == DType::e4m3) {
    const I codes = __builtin_convertvector(load<U8>(static_cast<const std::uint8_t*>(data) + index), I);
    return coded ? (F)codes : e4m3_value(codes);
  } else if constexpr (dtype == DType::e2m1) {
    typedef std::uint8_t Pairs __attribute__((vector_size(kLanes / 2)));
    const Pairs pairs = load<Pairs>(static_cast<const std::uint8_t*>(data) + index / 2);
    const Pairs low = pairs & 15;
    const Pairs high = pairs >> 4;
#if defined(__AVX512F__)
    const I codes = __builtin_convertvector(__builtin_shufflevector(low, high, 0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15), I);
#else
    const I codes = __builtin_convertvector(__builtin_shufflevector(low, high, 0, 4, 1, 5, 2, 6, 3, 7), I);
#endif
    return coded ? (F)codes : e2m1_value(codes);
  } else {
    return load_as_float(data, dtype, index);
  }
}
template <DType dtype, bool coded>
NUMAGRAFT_INLINE float load_one(const void* data, std::int64_t index) {
  if constexpr (dtype == DType::e4m3 || dtype == DType::e2m1) {
    const std::uint8_t byte = static_cast<const std::uint8_t*>(data)[dtype == DType::e4m3 ? index : index / 2];
    const I code = I{} + (dtype == DType::e4m3 ? byte : index % 2 ? byte >> 4 : byte & 15);
    return (coded ? (F)code : dtype == DType::e4m3 ? e4m3_value(code) : e2m1_value(code))[0];
  } else {
    return scalar_as_float(data, dtype, index);
  }
}

NUMAGRAFT_INLINE F power_of_two(I exponent_code) { return (F)(exponent_code << 23); }
NUMAGRAFT_INLINE bool present_row(const PackArgs& a, std::int64_t row) { return row >= a.row_begin && row < a.row_end; }

// Scales of neighbouring rows of a quantised source at one of its columns; rows that are not packed have 0.
NUMAGRAFT_INLINE F fp8_scales(const PackArgs& a, std::int64_t first_row, std::int64_t column) {
  F scales = {};
  for (int lane = 0; lane < kLanes; ++lane) {
    const std::int64_t row = first_row + lane;
    if (present_row(a, row)) scales[lane] = static_cast<const float*>(a.source->scales)[row / kFp8Block * a.source->scale_stride + column / kFp8Block];
  }
  return scales;
}
NUMAGRAFT_INLINE I mxfp4_exponents(const PackArgs& a, std::int64_t first_row, std::int64_t column) {
  I exponents = {};
  for (int lane = 0; lane < kLanes; ++lane) {
    const std::int64_t row = first_row + lane;
    if (present_row(a, row)) exponents[lane] = static_cast<const std::uint8_t*>(a.source->scales)[row * a.source->scale_stride + column / 32];
  }
  return exponents;
}
template <DType dtype>
NUMAGRAFT_INLINE F source_scales(const PackArgs& a, std::int64_t first_row, std::int64_t column) {
  return dtype == DType::e4m3 ? fp8_scales(a, first_row, column) : power_of_two(mxfp4_exponents(a, first_row, column));
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// Eight inputs of eight rows of bf16, as fp32 by inputs: shuffled while they are half as wide.
NUMAGRAFT_INLINE void load_transposed(const std::uint16_t* data, const std::int64_t (&offsets)[kLanes], std::int64_t k, F (&v)[kLanes]) {
  const auto rows = [&](int row) {
    const auto* upper = reinterpret_cast<const __m128i*>(data + offsets[row + 4] + k);
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(data + offsets[row] + k))), _mm_loadu_si128(upper), 1);
  };
  const __m256i r0 = rows(0), r1 = rows(1), r2 = rows(2), r3 = rows(3);
  const __m256i low01 = _mm256_unpacklo_epi16(r0, r1), high01 = _mm256_unpackhi_epi16(r0, r1);
  const __m256i low23 = _mm256_unpacklo_epi16(r2, r3), high23 = _mm256_unpackhi_epi16(r2, r3);
  const __m256i inputs[] = {_mm256_unpacklo_epi32(low01, low23), _mm256_unpackhi_epi32(low01, low23), _mm256_unpacklo_epi32(high01, high23),
                            _mm256_unpackhi_epi32(high01, high23)};
  for (int i = 0; i < 4; ++i) {
    v[2 * i] = (F)_mm256_unpacklo_epi16(__m256i{}, inputs[i]);
    v[2 * i + 1] = (F)_mm256_unpackhi_epi16(__m256i{}, inputs[i]);
  }
}
#endif

template <DType dtype, bool coded>
void gather_by_rows(const PackArgs& a, std::int64_t inputs, float* staged) {
  const MatrixView& source = *a.source;
  constexpr bool scaled = (dtype == DType::e4m3 || dtype == DType::e2m1) && !coded;
  for (int slice = 0; slice < kSlices; ++slice) {
    std::int64_t offsets[kLanes];
    bool present[kLanes];
    bool whole = true;
    for (int lane = 0; lane < kLanes; ++lane) {
      const std::int64_t row = a.first_row + slice * kLanes + lane;
      present[lane] = present_row(a, row);
      offsets[lane] = present[lane] ? row * source.row_stride + a.first_input : 0;
      whole = whole && present[lane];
    }
    F scales = {};
    std::int64_t k = 0;
#if defined(__AVX2__) && !defined(__AVX512F__)
    for (; dtype == DType::bf16 && whole && k + kLanes <= inputs; k += kLanes) {
      F v[kLanes];
      load_transposed(static_cast<const std::uint16_t*>(source.data), offsets, k, v);
      for (int i = 0; i < kLanes; ++i) store(staged + (k + i) * kPanelColumns + slice * kLanes, v[i]);
    }
#endif
    for (; k + kLanes <= inputs; k += kLanes) {
      F v[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) {
        v[lane] = present[lane] ? load_elements<dtype, coded>(source.data, offsets[lane] + k) : F{};
      }
      transpose<kLanes / 2>(v);
      if constexpr (scaled) {
        if (k % 32 == 0) scales = source_scales<dtype>(a, a.first_row + slice * kLanes, a.first_input + k);
        for (int i = 0; i < kLanes; ++i) v[i] *= scales;
      }
      for (int i = 0; i < kLanes; ++i) store(staged + (k + i) * kPanelColumns + slice * kLanes, v[i]);
    }
    for (; k < inputs; ++k) {
      F v = {};
      for (int lane = 0; lane < kLanes; ++lane) {
        if (present[lane]) v[lane] = load_one<dtype, coded>(source.data, offsets[lane] + k);
      }
      if constexpr (scaled) v *= source_scales<dtype>(a, a.first_row + slice * kLanes, a.first_input + k);
      store(staged + k * kPanelColumns + slice * kLanes, v);
    }
  }
}

template <DType dtype>
void gather_strided(const PackArgs& a, std::int64_t inputs, float* staged) {
  const MatrixView& source = *a.source;
  const bool whole = a.first_row >= a.row_begin && a.first_row + kPanelColumns <= a.row_end && source.row_stride == 1;
  for (std::int64_t k = 0; k < inputs; ++k) {
    const std::int64_t column = (a.first_input + k) * source.column_stride;
    float* to = staged + k * kPanelColumns;
    if (whole) {
      for (int slice = 0; slice < kSlices; ++slice) {
        store(to + slice * kLanes, load_as_float(source.data, dtype, column + a.first_row + slice * kLanes));
      }
      continue;
    }
    for (int c = 0; c < kPanelColumns; ++c) {
      const std::int64_t row = a.first_row + c;
      const bool present = row >= a.row_begin && row < a.row_end;
      to[c] = present ? scalar_as_float(source.data, dtype, row * source.row_stride + column) : 0.0f;
    }
  }
}

template <DType dtype, bool coded>
void gather(const PackArgs& a, float* staged) {
  std::int64_t inputs = a.source->columns - a.first_input;
  if (inputs > a.layout->k) inputs = a.layout->k;
  if (inputs < 0) inputs = 0;
  if constexpr (dtype == DType::e4m3 || dtype == DType::e2m1) {
    gather_by_rows<dtype, coded>(a, inputs, staged);
  } else if (a.source->column_stride == 1) {
    gather_by_rows<dtype, false>(a, inputs, staged);
  } else {
    gather_strided<dtype>(a, inputs, staged);
  }
  for (std::int64_t i = inputs * kPanelColumns; i < a.layout->units * kUnitInputs * kPanelColumns; i += kLanes) {
    store(staged + i, F{});
  }
}

void gather_any(const PackArgs& a, float* staged) {
  switch (a.source->dtype) {
    case DType::f32:
      return gather<DType::f32, false>(a, staged);
    case DType::bf16:
      return gather<DType::bf16, false>(a, staged);
    case DType::f16:
      return gather<DType::f16, false>(a, staged);
    case DType::e4m3:
      return gather<DType::e4m3, false>(a, staged);
    case DType::e2m1:
      return gather<DType::e2m1, false>(a, staged);
  }
}

NUMAGRAFT_INLINE F magnitude(F x) { return (F)((I)x & 0x7FFFFFFF); }
NUMAGRAFT_INLINE F at(const float* staged, std::int64_t k, int slice) {
  return load<F>(staged + k * kPanelColumns + slice * kLanes);
}
// As from_bf16(to_bf16(x)), without making the lanes narrow and wide again.
NUMAGRAFT_INLINE F rounded_to_bf16(F x) {
  const U bits = (U)x;
  const U rounded = bits + 0x7FFF + ((bits >> 16) & 1);
  const U nan = (U)((I)(bits & 0x7FFFFFFF) > 0x7F800000);
  return (F)(((nan & (bits | 0x400000)) | (~nan & rounded)) & 0xFFFF0000);
}
NUMAGRAFT_INLINE F finite_rounded_to_bf16(F x) { return (F)(((U)x + 0x7FFF + (((U)x >> 16) & 1)) & 0xFFFF0000); }
NUMAGRAFT_INLINE I clamp(I q, std::int32_t low, std::int32_t high) {
  const I below = q < low;
  q = (below & low) | (~below & q);
  const I above = q > high;
  return (above & high) | (~above & q);
}
NUMAGRAFT_INLINE F reciprocal_or_zero(F s) { return select(s != F{}, splat(1.0f) / s, F{}); }

}  // namespace
}  // namespace numagraft::NUMAGRAFT_ISA

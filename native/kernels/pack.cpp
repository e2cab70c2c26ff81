// Packs one panel: gathers 32 output channels as fp32, inputs by columns, so that a vector lane is a channel all the way;
// chooses scales; writes units. Compiled once per ISA.
#include "kernels/pack_fp8.h"
#include "kernels/pack_gather.h"
#include "kernels/pack_int4.h"
#include "kernels/pack_mxfp4.h"

namespace numagraft::NUMAGRAFT_ISA {
namespace {

constexpr std::int64_t kStagedUnits = 8;  // 64 KiB as fp32: a panel of many inputs would not stay in L2

// Calls body(first unit, units) with so many staged.
template <class Body>
void each_staged(const PackArgs& a, float* staged, const Body& body) {
  for (std::int64_t first = 0; first < a.layout->units; first += kStagedUnits) {
    const std::int64_t left = a.layout->units - first;
    Layout layout = *a.layout;
    layout.units = left < kStagedUnits ? left : kStagedUnits;
    layout.k = left <= kStagedUnits ? a.layout->k - first * kUnitInputs : layout.units * kUnitInputs;
    PackArgs part = a;
    part.layout = &layout;
    part.first_input += first * kUnitInputs;
    gather_any(part, staged);
    body(first, layout.units);
  }
}

// ---- bf16

void pack_bf16(const PackArgs& a, const float* staged, std::int64_t first_unit, std::int64_t units) {
  for (std::int64_t k = 0; k < units * kUnitInputs; k += kUnitInputs / 2) {
    for (int first = 0; first < kSlices; first += kLineSlices) {
      std::byte* to = a.panel + (first_unit * kUnitInputs + k) * kPanelColumns * 2 + slice_offset(first, 1024, 4);
      for (int row = 0; row < 16; ++row, to += 64) {
        I line[kLineSlices];
        for (int i = 0; i < kLineSlices; ++i) {
          const U even = __builtin_convertvector(to_bf16(at(staged, k + 2 * row, first + i)), U);
          const U odd = __builtin_convertvector(to_bf16(at(staged, k + 2 * row + 1, first + i)), U);
          line[i] = (I)(even | (odd << 16));
        }
        store_line(to, line);
      }
    }
  }
}

// ---- int8

// Largest magnitude of each column over all inputs of the source, also those of other shards: every placement then has
// the same scales.
void widen_range(const PackArgs& a, float* staged, F (&largest)[kSlices]) {
  each_staged(a, staged, [&](std::int64_t, std::int64_t units) {
    for (std::int64_t k = 0; k < units * kUnitInputs; ++k) {
      for (int slice = 0; slice < kSlices; ++slice) largest[slice] = maximum(magnitude(at(staged, k, slice)), largest[slice]);
    }
  });
}

// The same of whole rows that lie together.
template <DType dtype>
void range_of_rows(const PackArgs& a, F (&largest)[kSlices]) {
  const MatrixView& source = *a.source;
  for (int column = 0; column < kPanelColumns; ++column) {
    const std::int64_t row = a.first_row + column;
    if (!present_row(a, row)) continue;
    const std::int64_t offset = row * source.row_stride;
    F range[4] = {};
    std::int64_t k = 0;
    for (; k + 4 * kLanes <= source.columns; k += 4 * kLanes) {
      for (int i = 0; i < 4; ++i) range[i] = maximum(magnitude(load_as_float(source.data, dtype, offset + k + i * kLanes)), range[i]);
    }
    for (; k < source.columns; ++k) range[0] = maximum(magnitude(splat(scalar_as_float(source.data, dtype, offset + k))), range[0]);
    for (int i = 1; i < 4; ++i) range[0] = maximum(range[i], range[0]);
    float most = 0;
    for (int lane = 0; lane < kLanes; ++lane) most = range[0][lane] > most ? range[0][lane] : most;
    largest[column / kLanes][column % kLanes] = most;
  }
}

void find_range(const PackArgs& a, float* staged, F (&largest)[kSlices]) {
  if (a.source->column_stride == 1 && a.source->dtype == DType::bf16) return range_of_rows<DType::bf16>(a, largest);
  if (a.source->column_stride == 1 && a.source->dtype == DType::f32) return range_of_rows<DType::f32>(a, largest);
  if (a.source->column_stride == 1 && a.source->dtype == DType::f16) return range_of_rows<DType::f16>(a, largest);
  PackArgs every = a;
  for (every.first_input = 0; every.first_input < a.source->columns; every.first_input += a.layout->k) widen_range(every, staged, largest);
}

void pack_int8(const PackArgs& a, const float* staged, std::int64_t first_unit, std::int64_t units, const F (&range)[kSlices]) {
  for (int first = 0; first < kSlices; first += kLineSlices) {
    F inverse[kLineSlices];
    for (int i = 0; i < kLineSlices; ++i) {
      const F scale = range[first + i] * splat(1.0f / 127.0f);
      inverse[i] = reciprocal_or_zero(scale);
      store(a.side + (first + i) * kLanes, scale);
    }
    for (std::int64_t unit = 0; unit < units; ++unit) {
      std::byte* to = a.panel + (first_unit + unit) * a.layout->unit_bytes + slice_offset(first, 1024, 4);
      for (int row = 0; row < 16; ++row, to += 64) {
        I line[kLineSlices] = {};
        for (int i = 0; i < kLineSlices; ++i) {
          for (int four = 0; four < 4; ++four) {
            const F w = at(staged, unit * kUnitInputs + row * 4 + four, first + i);
            line[i] |= (clamp(round_to_int(w * inverse[i]), -127, 127) + kInt8Offset) << (8 * four);
          }
        }
        store_line(to, line);
      }
    }
  }
}

void pack_by_kind(const PackArgs& a) {
  auto* staged = reinterpret_cast<float*>(a.staged);
  if (a.layout->kind == WeightKind::fp8 && a.source->dtype == DType::e4m3) {
    gather<DType::e4m3, true>(a, staged);
    return pack_fp8_coded(a, staged);
  }
  if (a.layout->kind == WeightKind::mxfp4 && a.source->dtype == DType::e2m1) {
    gather<DType::e2m1, true>(a, staged);
    return pack_mxfp4<true>(a, staged);
  }
  F range[kSlices] = {};
  switch (a.layout->kind) {
    case WeightKind::bf16:
      return each_staged(a, staged, [&](std::int64_t first, std::int64_t units) { pack_bf16(a, staged, first, units); });
    case WeightKind::int8: {
      find_range(a, staged, range);
      return each_staged(a, staged, [&](std::int64_t first, std::int64_t units) { pack_int8(a, staged, first, units, range); });
    }
    case WeightKind::int4:
      gather_spans(a, staged);
      return a.layout->symmetric ? pack_int4<true>(a, staged) : pack_int4<false>(a, staged);
    case WeightKind::fp8:
      gather_any(a, staged);
      return pack_fp8(a, staged);
    case WeightKind::mxfp4:
      gather_any(a, staged);
      return pack_mxfp4<false>(a, staged);
  }
}

}  // namespace

void pack(const PackArgs& a) {
  pack_by_kind(a);
#if defined(__AVX2__)
  _mm_sfence();  // what went past the caches
#endif
}

}  // namespace numagraft::NUMAGRAFT_ISA

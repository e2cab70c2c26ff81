// Packs one panel: gathers 32 output channels as fp32, inputs by columns, so that a vector lane is a channel all the way;
// chooses scales; writes units. Compiled once per ISA.
#include "kernels/pack_fp8.h"
#include "kernels/pack_gather.h"
#include "kernels/pack_int4.h"
#include "kernels/pack_mxfp4.h"

namespace numagraft::NUMAGRAFT_ISA {
namespace {

// ---- bf16

void pack_bf16(const PackArgs& a, const float* staged) {
  for (std::int64_t k = 0; k < a.layout->units * kUnitInputs; k += kUnitInputs / 2) {
    for (int slice = 0; slice < kSlices; ++slice) {
      std::byte* to = a.panel + k * kPanelColumns * 2 + slice_offset(slice, 1024, 4);
      for (int row = 0; row < 16; ++row, to += 64) {
        const U even = __builtin_convertvector(to_bf16(at(staged, k + 2 * row, slice)), U);
        const U odd = __builtin_convertvector(to_bf16(at(staged, k + 2 * row + 1, slice)), U);
        store(to, even | (odd << 16));
      }
    }
  }
}

// ---- int8

// Largest magnitude of each column over all inputs of the source, also those of other shards: every placement then has
// the same scales.
void widen_range(const Layout& layout, const float* staged, F (&largest)[kSlices]) {
  for (std::int64_t k = 0; k < layout.k; ++k) {
    for (int slice = 0; slice < kSlices; ++slice) largest[slice] = maximum(magnitude(at(staged, k, slice)), largest[slice]);
  }
}

void pack_int8(const PackArgs& a, const float* staged, const F (&range)[kSlices]) {
  for (int slice = 0; slice < kSlices; ++slice) {
    const F largest = range[slice];
    const F scale = largest * splat(1.0f / 127.0f);
    const F inverse = reciprocal_or_zero(scale);
    store(a.side + slice * kLanes, scale);
    for (std::int64_t unit = 0; unit < a.layout->units; ++unit) {
      std::byte* to = a.panel + unit * a.layout->unit_bytes + slice_offset(slice, 1024, 4);
      for (int row = 0; row < 16; ++row, to += 64) {
        I bytes = {};
        for (int i = 0; i < 4; ++i) {
          const F w = at(staged, unit * kUnitInputs + row * 4 + i, slice);
          bytes |= (clamp(round_to_int(w * inverse), -127, 127) + kInt8Offset) << (8 * i);
        }
        store(to, bytes);
      }
    }
  }
}

}  // namespace

void pack(const PackArgs& a) {
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
  if (a.layout->kind == WeightKind::int8) {
    PackArgs other = a;
    for (other.first_input = 0; other.first_input < a.source->columns; other.first_input += a.layout->k) {
      if (other.first_input == a.first_input && a.layout->k >= a.source->columns) break;  // there is no other shard
      gather_any(other, staged);
      widen_range(*a.layout, staged, range);
    }
  }
  a.layout->kind == WeightKind::int4 ? gather_spans(a, staged) : gather_any(a, staged);
  switch (a.layout->kind) {
    case WeightKind::bf16:
      return pack_bf16(a, staged);
    case WeightKind::int8:
      widen_range(*a.layout, staged, range);
      return pack_int8(a, staged, range);
    case WeightKind::int4:
      return a.layout->symmetric ? pack_int4<true>(a, staged) : pack_int4<false>(a, staged);
    case WeightKind::fp8:
      return pack_fp8(a, staged);
    case WeightKind::mxfp4:
      return pack_mxfp4<false>(a, staged);
  }
}

}  // namespace numagraft::NUMAGRAFT_ISA

#pragma once

// fp8 (e4m3): one scale per 128 inputs and, packed from floats, per panel.
// Included by pack.cpp; everything is internal to it.
#include "kernels/pack_gather.h"

namespace numagraft::NUMAGRAFT_ISA {
namespace {

NUMAGRAFT_INLINE U fp8_code(F x) {
  const U bits = (U)magnitude(minimum(maximum(x, splat(-448.0f)), splat(448.0f)));
  const U normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3);
  const U subnormal = (U)round_to_int((F)bits * splat(512.0f));
  const U small = (U)((F)bits < splat(0x1p-6f));
  return ((small & subnormal) | (~small & normal)) | (((U)x >> 24) & 0x80);
}

void store_fp8(std::byte* to, U even, U odd) { store(to, __builtin_convertvector(even | (odd << 8), U16)); }

// Codes and scales of the source, in the order of the layout.
void pack_fp8_coded(const PackArgs& a, const float* staged) {
  const Layout& layout = *a.layout;
  for (std::int64_t block = 0; block < layout.scale_rows; ++block) {
    const std::int64_t column = a.first_input + block * kFp8Block;
    for (int slice = 0; slice < kSlices; ++slice) {
      const F scales = column < a.source->columns ? fp8_scales(a, a.first_row + slice * kLanes, column) : F{};
      store(a.side + block * a.side_stride + slice * kLanes, scales);
    }
  }
  for (std::int64_t k = 0; k < layout.units * kUnitInputs; k += 32) {
    for (int slice = 0; slice < kSlices; ++slice) {
      std::byte* to = a.panel + (k / 32) * 1024 + slice_offset(slice, 512, 2);
      for (int row = 0; row < 16; ++row, to += 32) store_fp8(to, (U)at(staged, k + 2 * row, slice), (U)at(staged, k + 2 * row + 1, slice));
    }
  }
}

void pack_fp8(const PackArgs& a, const float* staged) {
  const Layout& layout = *a.layout;
  for (std::int64_t block = 0; block < layout.scale_rows; ++block) {
    const std::int64_t first = block * kFp8Block;
    const std::int64_t last = first + kFp8Block < layout.units * kUnitInputs ? first + kFp8Block : layout.units * kUnitInputs;
    F lanes = {};
    for (std::int64_t k = first; k < last; ++k) {
      for (int slice = 0; slice < kSlices; ++slice) lanes = maximum(magnitude(at(staged, k, slice)), lanes);
    }
    float largest = 0;
    for (int lane = 0; lane < kLanes; ++lane) largest = lanes[lane] > largest ? lanes[lane] : largest;
    const F scale = splat(largest / 448.0f);
    const F inverse = reciprocal_or_zero(scale);
    for (int slice = 0; slice < kSlices; ++slice) store(a.side + block * a.side_stride + slice * kLanes, scale);
    for (std::int64_t k = first; k < last; k += 32) {
      for (int slice = 0; slice < kSlices; ++slice) {
        std::byte* to = a.panel + (k / 32) * 1024 + slice_offset(slice, 512, 2);
        for (int row = 0; row < 16; ++row, to += 32) {
          store_fp8(to, fp8_code(at(staged, k + 2 * row, slice) * inverse), fp8_code(at(staged, k + 2 * row + 1, slice) * inverse));
        }
      }
    }
  }
}

}  // namespace
}  // namespace numagraft::NUMAGRAFT_ISA

#pragma once

// How four-bit weights are written, whatever their values mean.
// Included by pack.cpp; everything is internal to it.
#include "kernels/pack_gather.h"

namespace numagraft::NUMAGRAFT_ISA {
namespace {

// A unit's codes in a slice of columns, the second 32 inputs above the first.
NUMAGRAFT_INLINE void store_nibbles(const PackArgs& a, std::int64_t unit, int slice, const I (&nibbles)[kUnitInputs]) {
  std::byte* to = a.panel + unit * a.layout->unit_bytes + slice_offset(slice, 512, 4);
  for (int row = 0; row < 8; ++row, to += 64) {
    I bytes = {};
    for (int i = 0; i < 4; ++i) bytes |= (nibbles[row * 4 + i] | (nibbles[32 + row * 4 + i] << 4)) << (8 * i);
    store(to, bytes);
  }
}

}  // namespace
}  // namespace numagraft::NUMAGRAFT_ISA

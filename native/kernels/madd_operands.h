#pragma once

// What the kernels without VNNI share: how many vectors they hold, and what nibbles mean. Internal to the unit that includes it.
#include "kernels/kernel_table.h"
#include "kernels/registers.h"

namespace numagraft {
namespace {

constexpr int kVectors = 2 * kParts;               // of results per row and panel
constexpr int kSums = kParts == 1 ? 20 : 12;       // vectors of sums for which there are registers, beside operands
constexpr int kMostRows = kParts == 1 ? 10 : 6;
// Vectors of a panel that `rows` rows take side by side. All of them, which memory likes, while registers suffice.
constexpr int side_by_side(int rows) { return rows * kVectors <= kSums ? kVectors : kVectors / 2; }

constexpr std::int64_t kNibbleTile = 512;  // bytes

// e2m1 times two plus 12, by code
NG_INLINE V mxfp4_table() { return repeat128(_mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0)); }

// Scale and minimum of one vector of columns and one group.
template <WeightKind kind, bool symmetric>
NG_INLINE void nibble_scales(const Layout& layout, const std::byte* scales, int vector, int group, VF& scale, VF& minimum) {
  const int index = (layout.unit_groups == 2 ? group : 0) * kPanelColumns + vector * kInt32s;
  if constexpr (kind == WeightKind::mxfp4) {
    scale = power_of_two(scales + index);
  } else {
    const auto* halves = reinterpret_cast<const std::uint16_t*>(scales);
    scale = widen_bf16(halves + index);
    if constexpr (!symmetric) minimum = widen_bf16(halves + layout.unit_groups * kPanelColumns + index);
  }
}

}  // namespace
}  // namespace numagraft

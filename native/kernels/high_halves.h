#pragma once

// Inputs of 15 bits on tiles: which units have a high half, and how its products join those of the low one.
// Included by one translation unit; everything is internal to it.
#include "kernels/kernel_table.h"
#include "kernels/tiles.h"

namespace numagraft::NUMAGRAFT_ISA {
namespace {

NUMAGRAFT_INLINE bool flagged(const RowBlock& block, std::int64_t unit) {
  return block.flags[unit] & (block.stride_rows > 16 ? 3 : 1);
}
std::int64_t count_flagged(const RowBlock& block, std::int64_t first, std::int64_t last) {
  std::int64_t count = 0;
  for (std::int64_t unit = first; unit < last; ++unit) count += flagged(block, unit);
  return count;
}
std::int64_t count_steps(const GemmArgs& a, std::int64_t first, std::int64_t last) {
  std::int64_t steps = (last - first) * a.block_count;
  for (int b = 0; b < a.block_count; ++b) steps += count_flagged(a.blocks[b], first, last);
  return steps;
}

// Leaves 128 times the results, and what `c` holds where it is resumed, in the tiles.
template <bool two>
void raise_results(const void* resumed) {
  constexpr int lines = (two ? 32 : 16) * kPanelColumns / kLanes;
  alignas(64) std::int32_t sums[kBlockRows * kPanelColumns];
  store_results<two>(sums);
  for (int line = 0; line < lines; ++line) {
    I total = load<I>(sums + line * kLanes) << 7;
    if (resumed != nullptr) total += load<I>(static_cast<const std::int32_t*>(resumed) + line * kLanes);
    store(sums + line * kLanes, total);
  }
  load_results<two>(sums);
}

}  // namespace
}  // namespace numagraft::NUMAGRAFT_ISA

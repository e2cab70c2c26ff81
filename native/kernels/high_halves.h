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
// Blocks of one row tile multiply both halves by a weight tile while it is in its register.
std::int64_t count_steps(const GemmArgs& a, std::int64_t first, std::int64_t last) {
  std::int64_t steps = (last - first) * a.block_count;
  for (int b = 0; b < a.block_count; ++b) {
    if (a.blocks[b].stride_rows > 16) steps += count_flagged(a.blocks[b], first, last);
  }
  return steps;
}

struct Units {
  std::int64_t first;
  std::int64_t last;
};

// What a pass multiplies: the inputs of a block's units [first, last), of flagged ones alone if `high`.
// `weights(unit)` is where a unit's two tiles lie.
template <class Weights>
NUMAGRAFT_INLINE auto units_of(const RowBlock& block, Units units, bool high, Weights weights) {
  return [&block, unit = units.first, last = units.last, high, weights](Operands& o) mutable {
    if (high) {
      while (unit < last && !flagged(block, unit)) ++unit;
    }
    if (unit >= last) return false;
    o = {(high ? block.high : block.low) + unit * block.stride_rows * kUnitInputs, kTileBytes, kUnitInputs, weights(unit)};
    ++unit;
    return true;
  };
}

// The products of one tile of rows with units of a panel: those of the low halves, added to what is `resumed` (null: nothing),
// in `low`; those of the high ones, to be added 128 times, in `high`. Returns whether there are any of these. Sums of halves
// meet where results are visited anyway: meeting in tile registers would drain them.
template <Multiply how, class Weights>
NUMAGRAFT_INLINE bool multiply_one_tile(const RowBlock& block, Units units, Weights weights, Ahead& ahead, const void* resumed, void* low,
                                        std::int32_t* high) {
  clear_results<true>();
  if (resumed != nullptr) load_results(resumed);
  bool any = false;
  for (std::int64_t unit = units.first; unit < units.last; ++unit) {
    const std::int64_t at = unit * 16 * kUnitInputs;
    const Operands operands{block.low + at, block.high - block.low, kUnitInputs, weights(unit)};
    if (flagged(block, unit)) {
      any = true;
      step<how, true>(operands, ahead);
    } else {
      step<how, false>(operands, ahead);
    }
  }
  store_results<false>(low);
  if (any) store_second_results(high);
  return any;
}

}  // namespace
}  // namespace numagraft::NUMAGRAFT_ISA

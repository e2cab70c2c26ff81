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

// The products of a block with units [first, last) of a panel: those of the low halves, added to what is `resumed` (null:
// nothing), in `low`; those of the high ones, to be added 128 times, in `high`. Returns whether there are any of these.
// Blocks of two row tiles may take the high halves of other units, `high_units`, than the low ones.
// `weights(unit)` is where a unit's two tiles lie. Sums of halves meet where results are visited anyway: meeting in tile
// registers would drain them.
template <Multiply how, bool two, class Weights>
NUMAGRAFT_INLINE bool multiply_halves(const RowBlock& block, std::int64_t first, std::int64_t last, Units high_units, Weights weights,
                                      Ahead& ahead, const void* resumed, void* low, std::int32_t* high) {
  const std::int64_t step_bytes = std::int64_t{block.stride_rows} * kUnitInputs;
  const bool any = count_flagged(block, high_units.first, high_units.last) > 0;
  if constexpr (two) {
    if (any) {
      clear_results<true>();
      for (std::int64_t unit = high_units.first; unit < high_units.last; ++unit) {
        if (!flagged(block, unit)) continue;
        const std::byte* inputs = block.high + unit * step_bytes;
        step<how, true>(inputs, inputs + kTileBytes, kUnitInputs, weights(unit), ahead);
      }
      store_results<true>(high);
    }
    resumed != nullptr ? load_results<true>(resumed) : clear_results<true>();
    for (std::int64_t unit = first; unit < last; ++unit) {
      const std::byte* inputs = block.low + unit * step_bytes;
      step<how, true>(inputs, inputs + kTileBytes, kUnitInputs, weights(unit), ahead);
    }
    store_results<true>(low);
  } else {
    clear_results<true>();
    if (resumed != nullptr) load_results<false>(resumed);
    for (std::int64_t unit = first; unit < last; ++unit) {
      const std::int64_t at = unit * step_bytes;
      if (flagged(block, unit)) {
        step<how, true>(block.low + at, block.high + at, kUnitInputs, weights(unit), ahead);
      } else {
        step<how, false>(block.low + at, nullptr, kUnitInputs, weights(unit), ahead);
      }
    }
    store_results<false>(low);
    if (any) store_second_results(high);
  }
  return any;
}

}  // namespace
}  // namespace numagraft::NUMAGRAFT_ISA

#pragma once

// High halves of int4's and mxfp4's inputs that come as lists, without VNNI: few groups of four inputs are beyond int8, so each meets
// its weights by itself, after the low halves. Internal to the unit that includes it.
#include "kernels/kernel_table.h"
#include "kernels/madd_operands.h"
#include "kernels/row_strips.h"

namespace numagraft {
namespace {

// What the listed high halves of a block's rows add to a panel's sums, for the units of a call.
template <WeightKind kind>
NG_INLINE void add_listed_of(const GemmArgs& a, std::int64_t panel, const RowBlock& block, float* c) {
  const Layout& layout = *a.layout;
  const RowLists& lists = block.lists;
  const std::byte* const weights = a.panel + panel * layout.panel_bytes;
  for (int row = 0; row < block.rows; ++row, c += kPanelColumns) {
    const ListedFour* four = lists.fours + row * lists.stride + lists.begin[a.first_unit * lists.rows + row];
    const ListedFour* const end = lists.fours + row * lists.stride + lists.begin[a.last_unit * lists.rows + row];
    if (four == end) continue;
    VF total[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) total[v] = zero_float();
    for (; four < end; ++four) {
      const std::byte* const unit = weights + four->at / kInt8UnitBytes * layout.unit_bytes;
      const auto line = static_cast<int>(four->at % kInt8UnitBytes / 64);  // of an int8 tile: two of nibbles
      const int group = line / 8;
      const V inputs = repeat32(static_cast<int>(four->high));
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        V values = bit_and(right_by(load_bytes(unit + v / kParts * kNibbleTile + line % 8 * 64 + v % kParts * kVectorBytes), group * 4), ones8(15));
        if constexpr (kind == WeightKind::mxfp4) values = look_up(mxfp4_table(), values);
        VF scale, minimum;
        nibble_scales<kind, true>(layout, unit + layout.data_bytes, v, group, scale, minimum);
        total[v] = fma(to_floats(madd(maddubs(values, inputs), ones16())), scale, total[v]);
      }
    }
    const VF scale = repeat(128.0f * (a.last_unit == layout.units ? block.scale[row] * kNibbleScale<kind> : 1.0f));
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store_floats(c + v * kInt32s, fma(total[v], scale, load_floats(c + v * kInt32s)));
  }
}

template <WeightKind kind>
NG_INLINE void add_listed(const GemmArgs& a, std::int64_t panel, float* c) {
  for (int b = 0; b < a.block_count; ++b) {
    if (a.blocks[b].lists.fours != nullptr) add_listed_of<kind>(a, panel, a.blocks[b], c);
    c += a.blocks[b].rows * kPanelColumns;
  }
}

}  // namespace
}  // namespace numagraft

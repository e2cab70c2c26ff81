#pragma once

// High halves of int8's inputs that come as lists, with VNNI: few groups of four inputs are beyond int8, so each meets its weights by
// itself. Internal to the unit that includes it.
#include "kernels/kernel_table.h"
#include "kernels/registers.h"
#include "kernels/row_strips.h"

namespace numagraft {
namespace {

constexpr int kListsAhead = 4;  // rows

// A row's list from a unit on: two lines at most of it are read as a rule, which nothing else has brought to L1.
NG_INLINE void prefetch_list(const RowLists& lists, int row, std::int64_t unit) {
  const auto* first = reinterpret_cast<const char*>(lists.fours + row * lists.stride + lists.begin[unit * lists.rows + row]);
  _mm_prefetch(first, _MM_HINT_T0);
  _mm_prefetch(first + 64, _MM_HINT_T0);
}

// What a row's high halves in units [first, last) of an int8 panel sum up to, without their factor of 128.
NG_INLINE void listed_sums(const RowBlock& block, int row, std::int64_t first, std::int64_t last, const std::byte* panel, __m512i (&sum)[2]) {
  const RowLists& lists = block.lists;
  const std::uint16_t* begin = lists.begin + row;
  const ListedFour* four = lists.fours + row * lists.stride + begin[first * lists.rows];
  const ListedFour* const end = lists.fours + row * lists.stride + begin[last * lists.rows];
  if (row + kListsAhead < block.rows) prefetch_list(lists, row + kListsAhead, first);
  sum[0] = sum[1] = _mm512_setzero_si512();
#pragma GCC unroll 2
  for (; four < end; ++four) {
    const std::byte* weights = panel + four->at;
    const __m512i high = _mm512_set1_epi32(static_cast<int>(four->high));
    sum[0] = _mm512_dpbusd_epi32(sum[0], _mm512_loadu_si512(weights), high);
    sum[1] = _mm512_dpbusd_epi32(sum[1], _mm512_loadu_si512(weights + 1024), high);
  }
}

// Adds them to the integer sums of a panel in c, for the units of a call.
NG_INLINE void add_listed_int8(const GemmArgs& a, std::int64_t panel, float* c) {
  const std::byte* const weights = a.panel + panel * a.layout->panel_bytes;
  for (int b = 0; b < a.block_count; ++b) {
    const RowBlock& block = a.blocks[b];
    for (int row = 0; block.lists.fours != nullptr && row < block.rows; ++row) {
      __m512i sum[2];
      listed_sums(block, row, a.first_unit, a.last_unit, weights, sum);
#pragma GCC unroll 2
      for (int t = 0; t < 2; ++t) {
        float* const to = c + row * kPanelColumns + t * kTileColumns;
        _mm512_storeu_si512(to, _mm512_add_epi32(_mm512_loadu_si512(to), _mm512_slli_epi32(sum[t], 7)));
      }
    }
    c += block.rows * kPanelColumns;
  }
}

}  // namespace
}  // namespace numagraft

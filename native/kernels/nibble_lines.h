#pragma once

// Lines of nibbles times int8 inputs, without VNNI, as they come from memory: sums of 16 bits over a group of 32 inputs, which cannot
// overflow: 8 x 2 x 15 x 127 = 30480 (mxfp4: see WrappingSums). Internal to the unit that includes it.
#include "kernels/kernel_table.h"
#include "kernels/madd_operands.h"
#include "kernels/row_strips.h"

namespace numagraft {
namespace {

NG_INLINE V repeat_four(const std::byte* inputs) {
  int four;
  __builtin_memcpy(&four, inputs, 4);
  return repeat32(four);
}

// What memory is asked for at a line: the one so many bytes ahead (0: nothing), or what a feed says.
struct Asks {
  std::int64_t ahead = 0;
  Feed* feed = nullptr;
  NG_INLINE_MEMBER void ask(const std::byte* line) const {
    if (feed != nullptr) feed->ask();
    if (feed == nullptr && ahead > 0) prefetch_line(line, ahead);
  }
};

// Adds lines [begin, end) of a group of 32 inputs up in 16 bits, of the tile at `w` and, where `count` says so, of the one
// `apart` from it; `onto`: to what is in `narrow` already; `asks`: for what comes later.
template <WeightKind kind, int group, int begin, int end, bool onto, int rows, int count>
NG_INLINE void nibble_lines(const std::byte* w, std::int64_t apart, const std::byte* const (&x)[rows], const Asks& asks, V (&narrow)[rows][count]) {
  const V mask = ones8(15);
  const V table = mxfp4_table();
  // The second group loads again what the first has loaded: gcc would keep all of it on the stack.
  if constexpr (kind == WeightKind::mxfp4 && group == 1) asm volatile("" : "+r"(w));
  // In a loop: unrolled, this many rows are more code than the CPU keeps decoded, and sums go to memory and back.
  if constexpr (kParts == 2 && kind == WeightKind::int4 && rows >= 4) {
    static_assert(!onto);
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < count; ++v) narrow[r][v] = zero();
    }
#pragma GCC unroll 1
    for (int i = begin; i < end; ++i) {
      V values[count];
#pragma GCC unroll 2
      for (int v = 0; v < count; ++v) {
        const std::byte* from = w + i * 64 + v * kVectorBytes;
        if (v == 0) asks.ask(from);
        const V pair = load_bytes(from);
        values[v] = bit_and(group == 0 ? pair : right4(pair), mask);
      }
#pragma GCC unroll 6
      for (int r = 0; r < rows; ++r) add_maddubs(x[r] + group * 32 + i * 4, values[0], values[1], narrow[r][0], narrow[r][1]);
    }
    return;
  }
#pragma GCC unroll 8
  for (int i = begin; i < end; ++i) {
    V inputs[rows];
    V values[count];
    // One row: inputs stay in registers while there are sums of two halves.
    constexpr bool columns_first = kind == WeightKind::mxfp4 && rows < count;
    if constexpr (columns_first) {
#pragma GCC unroll 2
      for (int r = 0; r < rows; ++r) inputs[r] = repeat_four(x[r] + group * 32 + i * 4);
    }
#pragma GCC unroll 4
    for (int v = 0; v < count; ++v) {
      const std::byte* from = w + v / kParts * apart + i * 64 + v % kParts * kVectorBytes;
      // Memory wants requests spread: where two tiles are read side by side, one tile's with either group.
      if (v % kParts == 0 && (count < kVectors || v / kParts == group)) asks.ask(from);
      const V pair = load_bytes(from);
      values[v] = bit_and(group == 0 ? pair : right4(pair), mask);
      if constexpr (kind == WeightKind::mxfp4) values[v] = look_up(table, values[v]);
      if constexpr (columns_first) {
#pragma GCC unroll 2
        for (int r = 0; r < rows; ++r) {
          const V product = maddubs(values[v], inputs[r]);
          narrow[r][v] = i == begin && !onto ? product : add16(narrow[r][v], product);
          settle(narrow[r][v]);
        }
      }
    }
    if constexpr (!columns_first) {
#pragma GCC unroll 12
      for (int r = 0; r < rows; ++r) {
        const V input = repeat_four(x[r] + group * 32 + i * 4);
#pragma GCC unroll 4
        for (int v = 0; v < count; ++v) {
          const V product = maddubs(values[v], input);
          narrow[r][v] = i == begin && !onto ? product : add16(narrow[r][v], product);
          settle(narrow[r][v]);
        }
      }
    }
  }
}

}  // namespace
}  // namespace numagraft

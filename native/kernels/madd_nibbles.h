#pragma once

// int4 and mxfp4 without VNNI, few rows: nibbles times int8 halves are summed in 16 bits over a group, which cannot overflow:
// 8 x 2 x 15 x 127 = 30480 (mxfp4: see WrappingSums). Internal to the unit that includes it.
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

// `count` vectors of a unit's columns, which begin at the tile `w`, over one group of 32 inputs: 32-bit sums.
template <WeightKind kind, int group, int rows, int count>
NG_INLINE void nibble_group(const std::byte* w, const std::byte* const (&x)[rows], const Asks& asks, V (&sum)[rows][count]) {
  constexpr int run = kind == WeightKind::mxfp4 ? 4 : 8;  // 8 x 2 x 24 x 127 would overflow
  V narrow[rows][count];
  nibble_lines<kind, group, 0, run, false>(w, kNibbleTile, x, asks, narrow);
#pragma GCC unroll 12
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < count; ++v) sum[r][v] = madd(narrow[r][v], ones16());
  }
  if constexpr (run < 8) {
    nibble_lines<kind, group, run, 8, false>(w, kNibbleTile, x, asks, narrow);
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < count; ++v) sum[r][v] = add32(sum[r][v], madd(narrow[r][v], ones16()));
    }
  }
}

// mxfp4 with one row: sums of 8 lines may wrap, as without the 12 of each weight they lie within 8 x 2 x 12 x 127 = 24384. So they
// begin at -12 times the inputs that a 16-bit sum meets: of every four, the first two and the last two.
constexpr std::int64_t kWrappingUnits = 512;
struct WrappingSums {
  const std::byte* low = nullptr;  // of the first unit: whose sums these are
  std::int64_t units = 0;
  std::int32_t begin[kWrappingUnits][2][2];  // [unit][low, high half][group]

  NG_INLINE std::int32_t of_group(const std::byte* inputs) {
    const __m256i twelve = _mm256_maddubs_epi16(_mm256_set1_epi8(kMxfp4Offset), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(inputs)));
    __m128i sum = _mm_add_epi16(_mm256_castsi256_si128(twelve), _mm256_extracti128_si256(twelve, 1));
    sum = _mm_add_epi16(sum, _mm_unpackhi_epi64(sum, sum));
    sum = _mm_add_epi16(sum, _mm_shuffle_epi32(sum, 1));
    return _mm_cvtsi128_si32(_mm_sub_epi16(_mm_setzero_si128(), sum));
  }
  void prepare(const RowBlock& block, int row, std::int64_t first_unit, std::int64_t last_unit, std::uint8_t mask) {
    const std::int64_t first = (first_unit * block.stride_rows + row) * kUnitInputs;
    if (block.low + first == low && last_unit - first_unit == units) return;  // the panel before met the same inputs
    low = block.low + first;
    units = last_unit - first_unit;
    for (std::int64_t unit = 0; unit < units; ++unit) {
      const std::int64_t at = first + unit * block.stride_rows * kUnitInputs;
      for (int group = 0; group < 2; ++group) {
        begin[unit][0][group] = of_group(block.low + at + group * 32);
        if (block.flags[first_unit + unit] & mask) begin[unit][1][group] = of_group(block.high + at + group * 32);
      }
    }
  }
};

// Where one row's sums over a group come from: a tile of nibbles and another `apart` from it, the scales of the first, those of
// the second `scales_apart` from it, and the vectors of a panel's columns at which their tiles begin.
struct TwoTiles {
  const std::byte* lines;
  std::int64_t apart;
  const std::byte* scales;
  std::int64_t scales_apart;
  int first_vector;
  int second_vector;
};

// One row: its sums stay in registers, and high and low halves meet the weights in one pass. `begin`: of WrappingSums.
template <WeightKind kind, bool symmetric, int group>
NG_INLINE void add_row_group(const Layout& layout, const RowBlock& block, int row, std::int64_t unit, bool with_high, const TwoTiles& w,
                             const Asks& asks, const std::int32_t (*begin)[2], VF (&total)[kVectors]) {
  constexpr bool wraps = kind == WeightKind::mxfp4;
  const std::int64_t at = unit * block.stride_rows + row;
  V sum[kVectors];
  if (with_high) {
    V narrow[2][kVectors];
    if constexpr (wraps) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        narrow[0][v] = repeat32(begin[0][group]);
        narrow[1][v] = repeat32(begin[1][group]);
      }
    }
    nibble_lines<kind, group, 0, 8, wraps, 2, kVectors>(w.lines, w.apart, {block.low + at * kUnitInputs, block.high + at * kUnitInputs}, asks, narrow);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[v] = add32(madd(narrow[0][v], ones16()), madd(narrow[1][v], repeat16(128)));
  } else {
    V narrow[1][kVectors];
    if constexpr (wraps) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) narrow[0][v] = repeat32(begin[0][group]);
    }
    nibble_lines<kind, group, 0, 8, wraps, 1, kVectors>(w.lines, w.apart, {block.low + at * kUnitInputs}, asks, narrow);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[v] = madd(narrow[0][v], ones16());
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    VF scale, minimum;
    const int vector = (v < kParts ? w.first_vector : w.second_vector) + v % kParts;
    nibble_scales<kind, symmetric>(layout, w.scales + v / kParts * w.scales_apart, vector, group, scale, minimum);
    VF value = to_floats(sum[v]);
    if constexpr (!wraps) {
      const VF inputs = repeat(block.group_sum[at * 2 + group]);
      if constexpr (symmetric) value = fma(inputs, repeat(-8.0f), value);
      if constexpr (!symmetric) total[v] = fma(minimum, inputs, total[v]);
    }
    total[v] = fma(scale, value, total[v]);
  }
}

template <WeightKind kind, bool symmetric>
void nibble_row(const GemmArgs& a, std::int64_t panel, const Strip& strip, [[maybe_unused]] WrappingSums& wrapping, float* c) {
  const Layout& layout = *a.layout;
  const RowBlock& block = *strip.block;
  const Asks asks{strip.fresh ? kPrefetchAhead : 0};
  const std::uint8_t mask = strip_flags(strip, 1);
  if constexpr (kind == WeightKind::mxfp4) wrapping.prepare(block, strip.first_row, strip.first_unit, strip.last_unit, mask);
  VF total[kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) total[v] = strip.first_unit == 0 ? zero_float() : load_floats(c + v * kInt32s);
  for (std::int64_t unit = strip.first_unit; unit < strip.last_unit; ++unit) {
    const std::byte* w = a.panel + panel * layout.panel_bytes + unit * layout.unit_bytes;
    const bool with_high = block.flags[unit] & mask;
    const std::int64_t half = (layout.data_bytes + layout.unit_bytes) / 2;
    const std::int32_t (*begin)[2] = nullptr;
    if constexpr (kind == WeightKind::mxfp4) begin = wrapping.begin[unit - strip.first_unit];
    const TwoTiles tiles{w, kNibbleTile, w + layout.data_bytes, 0, 0, kParts};
    if (strip.fresh) {
      for (std::int64_t line = layout.data_bytes; line < half; line += 64) prefetch_line(w + line);
    }
    add_row_group<kind, symmetric, 0>(layout, block, strip.first_row, unit, with_high, tiles, asks, begin, total);
    if (strip.fresh) {
      for (std::int64_t line = half; line < layout.unit_bytes; line += 64) prefetch_line(w + line);
    }
    add_row_group<kind, symmetric, 1>(layout, block, strip.first_row, unit, with_high, tiles, asks, begin, total);
  }
  const VF scale = repeat(strip.last_unit == layout.units ? block.scale[strip.first_row] * kNibbleScale<kind> : 1.0f);
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) store_floats(c + v * kInt32s, mul(total[v], scale));
}

// The same for two panels in turn: their tiles side by side, tile after tile.
template <WeightKind kind, bool symmetric>
void nibble_two_panels(const GemmArgs& a, TwoPanels panels, std::int64_t first_unit, std::int64_t last_unit, [[maybe_unused]] WrappingSums& wrapping) {
  const Layout& layout = *a.layout;
  const RowBlock& block = a.blocks[0];
  if constexpr (kind == WeightKind::mxfp4) wrapping.prepare(block, 0, first_unit, last_unit, 1);
  float* const c[2] = {a.c + panels[0] * a.c_panel_stride, a.c + panels[1] * a.c_panel_stride};
  const std::int64_t apart = panels.apart(a);
  VF total[2][kVectors];  // [tile], of the first panel and the second
  for (int tile = 0; tile < 2; ++tile) {
    for (int v = 0; v < kVectors; ++v) {
      const float* from = c[v / kParts] + (tile * kParts + v % kParts) * kInt32s;
      total[tile][v] = first_unit == 0 ? zero_float() : load_floats(from);
    }
  }
  for (std::int64_t unit = first_unit; unit < last_unit; ++unit) {
    const std::byte* w = a.panel + panels[0] * layout.panel_bytes + unit * layout.unit_bytes;
    const bool with_high = block.flags[unit] & 1;
    const std::int32_t (*begin)[2] = nullptr;
    if constexpr (kind == WeightKind::mxfp4) begin = wrapping.begin[unit - first_unit];
    for (int tile = 0; tile < 2; ++tile) {
      const TwoTiles tiles{w + tile * kNibbleTile, apart, w + layout.data_bytes, apart, tile * kParts, tile * kParts};
      add_row_group<kind, symmetric, 0>(layout, block, 0, unit, with_high, tiles, Asks{kPrefetchAheadInOrder}, begin, total[tile]);
      add_row_group<kind, symmetric, 1>(layout, block, 0, unit, with_high, tiles, Asks{kPrefetchAheadInOrder}, begin, total[tile]);
    }
    for (std::int64_t line = layout.data_bytes; line < layout.unit_bytes; line += 64) {
      prefetch_line(w + line, kPrefetchAheadInOrder);
      prefetch_line(w + apart + line, kPrefetchAheadInOrder);
    }
  }
  const VF scale = repeat(last_unit == layout.units ? block.scale[0] * kNibbleScale<kind> : 1.0f);
  for (int tile = 0; tile < 2; ++tile) {
    for (int v = 0; v < kVectors; ++v) store_floats(c[v / kParts] + (tile * kParts + v % kParts) * kInt32s, mul(total[tile][v], scale));
  }
}

// More rows: what a group adds goes to c at once, high and low halves after each other.
template <WeightKind kind, bool symmetric, int group, int rows, int count, bool high>
NG_INLINE void add_nibble_group(const Layout& layout, const std::byte* w, int first, const std::byte* x, const float* group_sum, const Asks& asks,
                                float* c) {
  constexpr float offset = kind == WeightKind::mxfp4 ? kMxfp4Offset : 8.0f;
  const std::byte* inputs[rows];
#pragma GCC unroll 12
  for (int r = 0; r < rows; ++r) inputs[r] = x + r * kUnitInputs;
  V sum[rows][count];
  nibble_group<kind, group, rows, count>(w + first / kParts * kNibbleTile, inputs, asks, sum);
#pragma GCC unroll 4
  for (int v = 0; v < count; ++v) {
    VF scale, minimum;
    nibble_scales<kind, symmetric>(layout, w + layout.data_bytes, first + v, group, scale, minimum);
    if constexpr (high) scale = mul(scale, repeat(128.0f));
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) {
      float* to = c + r * kPanelColumns + (first + v) * kInt32s;
      VF value = to_floats(sum[r][v]);
      VF total = load_floats(to);
      if constexpr (!high) {
        const VF of_inputs = repeat(group_sum[r * 2 + group]);
        if constexpr (symmetric) value = fma(of_inputs, repeat(-offset), value);
        if constexpr (!symmetric) total = fma(minimum, of_inputs, total);
      }
      store_floats(to, fma(scale, value, total));
    }
  }
}

// Three rows of mxfp4 side by side have more sums, tables and offsets than there are registers.
template <WeightKind kind>
constexpr int nibbles_side_by_side(int rows) {
  return kind == WeightKind::mxfp4 && kParts == 2 && rows == 3 ? kVectors / 2 : side_by_side(rows);
}

template <WeightKind kind, bool symmetric, int rows>
void nibble_rows(const GemmArgs& a, std::int64_t panel, const Strip& strip, float* c) {
  constexpr int count = nibbles_side_by_side<kind>(rows);
  const Layout& layout = *a.layout;
  const RowBlock& block = *strip.block;
  const std::uint8_t mask = strip_flags(strip, rows);
  const Asks asks{strip.fresh ? kPrefetchAhead : 0, strip.feed};
  const Asks none{};
  if (strip.first_unit == 0) {
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) {
      for (int v = 0; v < kVectors; ++v) store_floats(c + r * kPanelColumns + v * kInt32s, zero_float());
    }
  }
  for (std::int64_t unit = strip.first_unit; unit < strip.last_unit; ++unit) {
    const std::byte* w = a.panel + panel * layout.panel_bytes + unit * layout.unit_bytes;
    const std::int64_t at = unit * block.stride_rows + strip.first_row;
    const std::byte* low = block.low + at * kUnitInputs;
    const std::byte* high = block.high + at * kUnitInputs;
    const float* group_sum = block.group_sum + at * 2;
    if (strip.fresh && strip.feed == nullptr) {
      for (std::int64_t line = layout.data_bytes; line < layout.unit_bytes; line += 64) prefetch_line(w + line);
    }
    for (int first = 0; first < kVectors; first += count) {
      add_nibble_group<kind, symmetric, 0, rows, count, false>(layout, w, first, low, group_sum, asks, c);
      add_nibble_group<kind, symmetric, 1, rows, count, false>(layout, w, first, low, group_sum, count == kVectors || strip.feed != nullptr ? asks : none, c);
      if (block.flags[unit] & mask) {
        add_nibble_group<kind, symmetric, 0, rows, count, true>(layout, w, first, high, nullptr, none, c);
        add_nibble_group<kind, symmetric, 1, rows, count, true>(layout, w, first, high, nullptr, none, c);
      }
    }
  }
  if (strip.last_unit < layout.units) return;
#pragma GCC unroll 12
  for (int r = 0; r < rows; ++r) {
    const VF scale = repeat(block.scale[strip.first_row + r] * kNibbleScale<kind>);
    for (int v = 0; v < kVectors; ++v) {
      float* to = c + r * kPanelColumns + v * kInt32s;
      store_floats(to, mul(load_floats(to), scale));
    }
  }
}

template <WeightKind kind, bool symmetric>
struct Nibbles {
  static constexpr int most_rows = kMostRows;
  static constexpr std::int64_t chunk_units = 4;  // sums go to c for every group: what matters is that L1 holds the inputs
  static constexpr std::int64_t few_strip_units = 4;
  static constexpr std::int64_t single_strip_units = kind == WeightKind::mxfp4 ? kWrappingUnits : 0;
  static constexpr std::int64_t in_order_units = 4;
  // Lines that strips of so many rows go over, of one unit.
  static std::int64_t visits(int rows) {
    return 16 * count_passes(rows, most_rows, [](int of_strip) { return of_strip == 1 ? 0 : kVectors / nibbles_side_by_side<kind>(of_strip); });
  }
  WrappingSums wrapping;
  template <int rows>
  void run(const GemmArgs& a, std::int64_t panel, const Strip& strip, float* c) {
    if constexpr (rows == 1) {
      nibble_row<kind, symmetric>(a, panel, strip, wrapping, c);
    } else {
      nibble_rows<kind, symmetric, rows>(a, panel, strip, c);
    }
  }
  void run_two_panels(const GemmArgs& a, TwoPanels panels, std::int64_t first, std::int64_t last) {
    nibble_two_panels<kind, symmetric>(a, panels, first, last, wrapping);
  }
  void finish(const GemmArgs&, std::int64_t, float*) {}
};

}  // namespace
}  // namespace numagraft

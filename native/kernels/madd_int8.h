#pragma once

// int8 without VNNI: weights meet the inputs' whole 16-bit integers. Internal to the unit that includes it.
#include "kernels/kernel_table.h"
#include "kernels/madd_operands.h"
#include "kernels/row_strips.h"

namespace numagraft {
namespace {

// Bytes of a line are four inputs of a column; in 16 bits, the even two and the odd two: what a multiply-add adds up belongs
// to one column, and one operation widens.
template <int rows, int count>
NG_INLINE void int8_unit(const std::byte* w, int first, const std::byte* x, bool fresh, Feed* feed, V (&sum)[rows][count]) {
  const V even = repeat16(0xFF);
  const Requests requests = Requests::of_tiles(1024);
#pragma GCC unroll 2
  for (int i = 0; i < 16; ++i) {
    if (feed != nullptr) feed->ask();
    if (feed == nullptr && fresh && first == 0) requests.ask(w, i);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
#pragma GCC unroll 2
      for (int v = 0; v < count; v += 2) {
        const std::byte* line = w + i * 64;
        // Where sums take all registers the second half loads again what the first has loaded.
        if constexpr (kParts == 2 && rows * count == kSums) asm volatile("" : "+r"(line));
        V wide[2];
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
          const V bytes = load_bytes(line + (first + v + j) / kParts * 1024 + (first + v + j) % kParts * kVectorBytes);
          wide[j] = half == 0 ? bit_and(bytes, even) : right8(bytes);
        }
#pragma GCC unroll 12
        for (int r = 0; r < rows; ++r) add_madd(x + r * kUnitInputs * 2 + i * 8 + half * 4, wide[0], wide[1], sum[r][v], sum[r][v + 1]);
      }
    }
  }
}

// Adds to the integer sums of a panel in c; finish_int8 makes floats of them. Every loop over the sums is unrolled: one that
// is not keeps them in memory.
template <int rows>
void int8_rows(const GemmArgs& a, std::int64_t panel, const Strip& strip, float* c) {
  constexpr int count = side_by_side(rows);
  const Layout& layout = *a.layout;
  const RowBlock& block = *strip.block;
  const std::byte* weights = a.panel + panel * layout.panel_bytes;
  if (strip.fresh) prefetch_scales(panel_side(a, panel));
  for (int first = 0; first < kVectors; first += count) {
    V sum[rows][count];
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < count; ++v) {
        const auto* from = reinterpret_cast<const std::byte*>(c + r * kPanelColumns + (first + v) * kInt32s);
        sum[r][v] = strip.first_unit == 0 ? zero() : load_bytes(from);
      }
    }
    for (std::int64_t unit = strip.first_unit; unit < strip.last_unit; ++unit) {
      const std::byte* x = block.low + (unit * block.stride_rows + strip.first_row) * kUnitInputs * 2;
      int8_unit<rows, count>(weights + unit * layout.unit_bytes, first, x, strip.fresh, strip.feed, sum);
    }
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < count; ++v) store_floats(c + r * kPanelColumns + (first + v) * kInt32s, as_floats(sum[r][v]));
    }
  }
}

// One row, two panels in turn: their lines side by side, tile after tile.
void int8_two_panels(const GemmArgs& a, TwoPanels panels, std::int64_t first_unit, std::int64_t last_unit) {
  const Layout& layout = *a.layout;
  const RowBlock& block = a.blocks[0];
  const V even = repeat16(0xFF);
  const std::int64_t apart = panels.apart(a);
  const Requests requests = Requests::of_panels(apart);
  float* const c[2] = {a.c + panels[0] * a.c_panel_stride, a.c + panels[1] * a.c_panel_stride};
  V sum[2][kVectors];  // [panel]
#pragma GCC unroll 2
  for (int p = 0; p < 2; ++p) {
    prefetch_scales(panel_side(a, panels[p]));
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      sum[p][v] = first_unit == 0 ? zero() : load_bytes(reinterpret_cast<const std::byte*>(c[p] + v * kInt32s));
    }
  }
  for (std::int64_t unit = first_unit; unit < last_unit; ++unit) {
    const std::byte* w = a.panel + panels[0] * layout.panel_bytes + unit * layout.unit_bytes;
    const std::byte* x = block.low + unit * block.stride_rows * kUnitInputs * 2;
#pragma GCC unroll 2
    for (int tile = 0; tile < 2; ++tile) {
#pragma GCC unroll 2
      for (int i = 0; i < 16; ++i) {
        const std::byte* line = w + tile * 1024 + i * 64;
        requests.ask(w + tile * 1024, i);
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          int two;
          __builtin_memcpy(&two, x + i * 8 + half * 4, 4);
          const V inputs = repeat32(two);
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) {
            const V bytes = load_bytes(line + v / kParts * apart + v % kParts * kVectorBytes);
            V& to = sum[v / kParts][tile * kParts + v % kParts];
            to = add32(to, madd(half == 0 ? bit_and(bytes, even) : right8(bytes), inputs));
            settle(to);
          }
        }
      }
    }
  }
#pragma GCC unroll 2
  for (int p = 0; p < 2; ++p) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store_floats(c[p] + v * kInt32s, as_floats(sum[p][v]));
  }
}

struct Int8 {
  static constexpr int most_rows = kMostRows;
  static constexpr std::int64_t chunk_units = kChunkUnits;
  static constexpr std::int64_t few_strip_units = 4;
  static constexpr std::int64_t single_strip_units = 0;
  static constexpr std::int64_t in_order_units = 2;
  // Lines that strips of so many rows go over, of one unit.
  static std::int64_t visits(int rows) {
    return 16 * count_passes(rows, most_rows, [](int of_strip) { return kVectors / side_by_side(of_strip); });
  }
  template <int rows>
  void run(const GemmArgs& a, std::int64_t panel, const Strip& strip, float* c) {
    int8_rows<rows>(a, panel, strip, c);
  }
  void run_two_panels(const GemmArgs& a, TwoPanels panels, std::int64_t first, std::int64_t last) { int8_two_panels(a, panels, first, last); }
  void finish(const GemmArgs& a, std::int64_t panel, float* c) { finish_int8(a, panel, c); }
};

}  // namespace
}  // namespace numagraft

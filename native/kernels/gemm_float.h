#pragma once

// bf16 and fp8 weights times fp32 inputs, widened to fp32 in registers. Included by one translation unit of each ISA that
// needs it; everything is internal to it.
#include "kernels/kernel_table.h"
#include "kernels/registers.h"
#include "kernels/row_strips.h"

namespace numagraft {
namespace {

constexpr int kFloatVectors = 2 * kParts;  // of results per row and panel
constexpr int kFloatRows = 6;  // with AVX2 half of a panel's columns at a time from 4 on: as many sums as there are registers for
constexpr int columns_together(int rows) { return kParts == 1 || rows <= 3 ? kFloatVectors : kFloatVectors / 2; }
constexpr std::int64_t kFloatChunkUnits = kChunkInputs / kUnitInputs / 2;

// fp8 weights of a chunk as fp16: [unit][half][tile][32 inputs][16 columns]. With AVX-512 a register holds two pairs of
// inputs, so that every second and third input change places.
constexpr std::int64_t kHalfUnit = kUnitInputs / 2 * kPanelColumns;
constexpr int input_at(int place) { return kParts == 2 ? place : (place & ~3) | (place & 1) << 1 | (place & 2) >> 1; }
// Lines of half a tile and of another `apart` from it.
constexpr std::int64_t kFp8HalfTile = 512;
constexpr std::int64_t kBf16HalfTile = 1024;
NG_INLINE void expand_line(const E4m3AsF16& convert, const std::byte* bytes, std::int64_t apart, int line, std::uint16_t* to) {
#pragma GCC unroll 2
  for (int t = 0; t < 2; ++t) {
    const std::byte* from = bytes + t * apart + line * 64;
    prefetch_line(from);
#pragma GCC unroll 2
    for (int part = 0; part < kParts; ++part) {
      const V pairs = load_bytes(from + part * kVectorBytes);
      std::uint16_t* into = to + t * (kHalfUnit / 2) + line * 64 + part * kVectorBytes;
      store_bytes(into, E4m3AsF16::even(convert, pairs));
      store_bytes(into + kVectorBytes / 2, E4m3AsF16::odd(convert, pairs));
    }
  }
}
NG_INLINE void expand_half_unit(const std::byte* bytes, std::int64_t apart, std::uint16_t* to) {
  const E4m3AsF16 convert;
  for (int line = 0; line < 8; ++line) expand_line(convert, bytes, apart, line, to);
}

// Adds rows [0, rows) x 32 inputs. One row adds even and odd inputs up apart: one addition waits for the one before.
// `expanding`: meanwhile `next`, to where `to` points; the two want different ports, and stores time to arrive.
template <int rows, int count, int sums, bool expanding>
NG_INLINE void f16_half_unit(const std::uint16_t* w, int first, const float* x, [[maybe_unused]] const std::byte* next,
                             [[maybe_unused]] std::int64_t apart, [[maybe_unused]] std::uint16_t* to,
                             VF (&sum)[rows][count][sums]) {
  const E4m3AsF16 convert;
#pragma GCC unroll 1
  for (int four = 0; four < 8; ++four) {
    if constexpr (expanding) expand_line(convert, next, apart, four, to);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 2
      for (int v = 0; v < count; v += 2) {
        VF weights[2];
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
          const int vector = first + v + j;
          weights[j] = load_f16(w + vector / kParts * (kHalfUnit / 2) + (four * 4 + i) * kTileColumns + vector % kParts * kInt32s);
        }
#pragma GCC unroll 6
        for (int r = 0; r < rows; ++r) {
          add_fma(x + r * kUnitInputs + four * 4 + input_at(i), weights[0], weights[1], sum[r][v][i % sums], sum[r][v + 1][i % sums]);
        }
      }
    }
  }
}

// `first`: the first of `count` vectors of columns.
template <int rows, int count, int sums>
NG_INLINE void bf16_half_unit(const std::byte* w, std::int64_t apart, int first, const float* x, bool fresh, Feed* feed, const Requests& requests,
                              VF (&sum)[rows][count][sums]) {
  const V high_half = repeat32(static_cast<int>(0xFFFF0000u));
#pragma GCC unroll 2
  for (int pair = 0; pair < 16; ++pair) {
    if (feed != nullptr) feed->ask();
    if (feed == nullptr && fresh) requests.ask(w, pair);
#pragma GCC unroll 2
    for (int v = 0; v < count; v += 2) {
#pragma GCC unroll 2
      for (int odd = 0; odd < 2; ++odd) {
        VF weights[2];
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
          const int vector = first + v + j;
          const std::byte* from = w + vector / kParts * apart + pair * 64 + vector % kParts * kVectorBytes;
          weights[j] = as_floats(odd ? bit_and(load_bytes(from), high_half) : left16(load_bytes(from)));
        }
#pragma GCC unroll 6
        for (int r = 0; r < rows; ++r) {
          constexpr int last = sums - 1;
          add_fma(x + r * kUnitInputs + pair * 2 + odd, weights[0], weights[1], sum[r][v][odd ? last : 0], sum[r][v + 1][odd ? last : 0]);
        }
      }
    }
  }
}

// `expanded_units`: fp8 weights of the chunk, which the first strip leaves there for the others; a strip alone needs two halves of a unit.
// Not inlined: in one function with its siblings the registers of each are shared out worse (fp8: 2 to 10 %).
template <WeightKind kind, int rows>
__attribute__((noinline)) void float_rows(const GemmArgs& a, std::int64_t panel, const Strip& strip, [[maybe_unused]] std::uint16_t* expanded_units, float* c) {
  constexpr int sums = rows > 1 ? 1 : kParts == 1 ? 4 : 2;
  constexpr int count = columns_together(rows);
  // fp8 sums are scaled after every 128 inputs; weights that are read twice stay in L1
  constexpr std::int64_t together = kind == WeightKind::fp8 ? kFp8Block / kUnitInputs : count < kFloatVectors ? kFloatChunkUnits : kChunkUnits;
  const Layout& layout = *a.layout;
  const RowBlock& block = *strip.block;
  for (std::int64_t first = strip.first_unit; first < strip.last_unit;) {
    const std::int64_t boundary = (first / together + 1) * together;
    const std::int64_t last = boundary < strip.last_unit ? boundary : strip.last_unit;
    for (int begin = 0; begin < kFloatVectors; begin += count) {
      const bool fresh = strip.fresh && begin == 0;
      float* const columns = c + begin * kInt32s;
      VF sum[rows][count][sums];
      for (int r = 0; r < rows; ++r) {
        for (int v = 0; v < count; ++v) {
          for (int s = 0; s < sums; ++s) sum[r][v][s] = zero_float();
          if (kind == WeightKind::bf16 && first > 0) sum[r][v][0] = load_floats(columns + r * kPanelColumns + v * kInt32s);
        }
      }
      for (std::int64_t unit = first; unit < last; ++unit) {
        const auto* x = reinterpret_cast<const float*>(block.low) + (unit * block.stride_rows + strip.first_row) * kUnitInputs;
        const std::byte* w = a.panel + panel * layout.panel_bytes + unit * layout.unit_bytes;
        for (int half = 0; half < 2; ++half) {
          if constexpr (kind == WeightKind::bf16) {
            bf16_half_unit<rows, count, sums>(w + half * 2048, kBf16HalfTile, begin, x + half * 32, fresh, strip.feed, Requests::of_tiles(kBf16HalfTile), sum);
          } else {
            const std::byte* bytes = w + half * 1024;
            if (rows == 1 && strip.alone) {
              std::uint16_t* expanded = expanded_units + half * kHalfUnit;
              std::uint16_t* other = expanded_units + (1 - half) * kHalfUnit;
              if (unit == strip.first_unit && half == 0) expand_half_unit(bytes, kFp8HalfTile, expanded);
              if (unit + 1 < strip.last_unit || half == 0) {
                f16_half_unit<rows, count, sums, rows == 1>(expanded, begin, x + half * 32, bytes + 1024, kFp8HalfTile, other, sum);
              } else {
                f16_half_unit<rows, count, sums, false>(expanded, begin, x + half * 32, nullptr, 0, nullptr, sum);
              }
            } else {
              // Only what is read twice is kept.
              const bool at_once = strip.alone && count == kFloatVectors;
              const std::int64_t place = at_once ? 0 : (unit - (strip.alone ? first : strip.first_unit)) * 2 + half;
              std::uint16_t* expanded = expanded_units + place * kHalfUnit;
              if (fresh) expand_half_unit(bytes, kFp8HalfTile, expanded);
              f16_half_unit<rows, count, sums, false>(expanded, begin, x + half * 32, nullptr, 0, nullptr, sum);
            }
          }
        }
      }
      for (int v = 0; v < count; ++v) {
        VF scale = repeat(1.0f);
        if constexpr (kind == WeightKind::fp8) {
          const float* scales = panel_side(a, panel) + first * kUnitInputs / kFp8Block * kPanelColumns;
          if (v == 0 && fresh) prefetch_scales(scales + panel_side_floats(layout));
          scale = mul(load_floats(scales + (begin + v) * kInt32s), repeat(kE4m3F16Scale));
        }
        for (int r = 0; r < rows; ++r) {
          float* to = columns + r * kPanelColumns + v * kInt32s;
          VF total = sum[r][v][0];
          for (int s = 1; s < sums; ++s) total = add(total, sum[r][v][s]);
          if constexpr (kind == WeightKind::fp8) total = first == 0 ? mul(total, scale) : fma(total, scale, load_floats(to));
          if (last == layout.units) total = mul(total, repeat(block.scale[strip.first_row + r]));
          store_floats(to, total);
        }
      }
    }
    first = last;
  }
}

// One row, two panels in turn: their half tiles side by side, one after the other.
template <WeightKind kind>
__attribute__((noinline)) void float_two_panels(const GemmArgs& a, TwoPanels panels, std::int64_t first_unit, std::int64_t last_unit,
                                                 [[maybe_unused]] std::uint16_t* expanded_units) {
  constexpr int sums = kParts == 1 ? 4 : 2;
  constexpr std::int64_t together = kind == WeightKind::fp8 ? kFp8Block / kUnitInputs : kChunkInputs / kUnitInputs;
  constexpr std::int64_t half_tile = kind == WeightKind::fp8 ? kFp8HalfTile : kBf16HalfTile;
  const Layout& layout = *a.layout;
  const RowBlock& block = a.blocks[0];
  const std::int64_t apart = panels.apart(a);
  const std::byte* const weights = a.panel + panels[0] * layout.panel_bytes;
  const auto* const inputs = reinterpret_cast<const float*>(block.low);
  const auto c_of = [&](int tile, int v) { return a.c + panels[v / kParts] * a.c_panel_stride + (tile * kParts + v % kParts) * kInt32s; };
  if constexpr (kind == WeightKind::fp8) expand_half_unit(weights + first_unit * layout.unit_bytes, apart, expanded_units);
  for (std::int64_t first = first_unit; first < last_unit;) {
    const std::int64_t boundary = (first / together + 1) * together;
    const std::int64_t last = boundary < last_unit ? boundary : last_unit;
    VF sum[2][1][kFloatVectors][sums];  // [tile], of the first panel and the second
    for (int tile = 0; tile < 2; ++tile) {
      for (int v = 0; v < kFloatVectors; ++v) {
        for (int s = 0; s < sums; ++s) sum[tile][0][v][s] = zero_float();
      }
    }
    for (std::int64_t unit = first; unit < last; ++unit) {
      for (int half = 0; half < 2; ++half) {
        const float* x = inputs + unit * block.stride_rows * kUnitInputs + half * 32;
#pragma GCC unroll 2
        for (int tile = 0; tile < 2; ++tile) {
          const std::byte* w = weights + unit * layout.unit_bytes + (half * 2 + tile) * half_tile;
          if constexpr (kind == WeightKind::bf16) {
            bf16_half_unit<1, kFloatVectors, sums>(w, apart, 0, x, true, nullptr, Requests::of_panels(apart), sum[tile]);
          } else {
            std::uint16_t* expanded = expanded_units + tile * kHalfUnit;
            std::uint16_t* other = expanded_units + (1 - tile) * kHalfUnit;
            if (unit + 1 < last_unit || half == 0 || tile == 0) {
              f16_half_unit<1, kFloatVectors, sums, true>(expanded, 0, x, w + half_tile, apart, other, sum[tile]);
            } else {
              f16_half_unit<1, kFloatVectors, sums, false>(expanded, 0, x, nullptr, 0, nullptr, sum[tile]);
            }
          }
        }
      }
    }
    for (int tile = 0; tile < 2; ++tile) {
      for (int v = 0; v < kFloatVectors; ++v) {
        VF total = sum[tile][0][v][0];
        for (int s = 1; s < sums; ++s) total = add(total, sum[tile][0][v][s]);
        if constexpr (kind == WeightKind::fp8) {
          const float* scales = panel_side(a, panels[v / kParts]) + first * kUnitInputs / kFp8Block * kPanelColumns;
          if (tile == 0 && v % kParts == 0) prefetch_scales(scales + panel_side_floats(layout));
          total = mul(total, mul(load_floats(scales + (tile * kParts + v % kParts) * kInt32s), repeat(kE4m3F16Scale)));
        }
        if (first > 0) total = add(total, load_floats(c_of(tile, v)));
        if (last == layout.units) total = mul(total, repeat(block.scale[0]));
        store_floats(c_of(tile, v), total);
      }
    }
    first = last;
  }
}

template <WeightKind kind>
struct Floats {
  static constexpr int most_rows = kFloatRows;
  static constexpr std::int64_t chunk_units = kFloatChunkUnits;
  static constexpr std::int64_t few_strip_units = kFp8Block / kUnitInputs;
  static constexpr std::int64_t single_strip_units = 0;
  static constexpr std::int64_t in_order_units = 2;
  // Lines that strips of so many rows go over, of one unit; those of fp8 are asked for as they are expanded.
  static std::int64_t visits(int rows) {
    return kind == WeightKind::fp8 ? 0 : 32 * count_passes(rows, most_rows, [](int of_strip) { return kFloatVectors / columns_together(of_strip); });
  }
  alignas(64) std::uint16_t expanded[kind == WeightKind::fp8 ? 2 * kFloatChunkUnits * kHalfUnit : 1];
  template <int rows>
  void run(const GemmArgs& a, std::int64_t panel, const Strip& strip, float* c) {
    float_rows<kind, rows>(a, panel, strip, expanded, c);
  }
  void run_two_panels(const GemmArgs& a, TwoPanels panels, std::int64_t first, std::int64_t last) { float_two_panels<kind>(a, panels, first, last, expanded); }
  void finish(const GemmArgs&, std::int64_t, float*) {}
};

template <WeightKind kind>
void gemm_float(const GemmArgs& a) {
  if (kind == WeightKind::fp8) prefetch_first_scales(a);
  gemm_strips<Floats<kind>>(a);
}

}  // namespace
}  // namespace numagraft

#pragma once

// int4 and mxfp4 without VNNI, several strips of rows: a chunk's nibbles are unpacked to bytes once and lie in L1 while every strip
// multiplies them, and its groups' scales become integers, so that sums stay integers over the chunk. Sums of 16 bits over a run of
// lines, which cannot overflow, times their scale are added in 32 bits. Internal to the unit that includes it.
#include "kernels/kernel_table.h"
#include "kernels/listed_nibbles.h"
#include "kernels/madd_operands.h"
#include "kernels/row_strips.h"

namespace numagraft {
namespace {

constexpr int kUnpackedPairs = kVectors / 2;  // of vectors of a panel's columns
constexpr std::int64_t kUnpackedUnits = 8;    // of a chunk
constexpr std::int64_t kUnpackedGroups = 2 * kUnpackedUnits;
constexpr std::int64_t kUnpackedLine = 2 * kVectorBytes;    // four inputs of a pair's columns
constexpr std::int64_t kUnpackedGroup = 8 * kUnpackedLine;  // 32 inputs

// Lines whose products 16 bits hold: 8 x 2 x 15 x 127 = 30480, 4 x 2 x 24 x 127 = 24384.
template <WeightKind kind>
constexpr int kRunLines = kind == WeightKind::mxfp4 ? 4 : 8;
// A chunk's scales are integers below 2^(kScaleBits + 1), and its largest is half of that or more. Scales of 8 bits, as bf16 has, are
// exact down to an eighth of the largest, mxfp4's powers of two down to 2^-9 of it; others are rounded by up to 2^-11 of the largest.
template <WeightKind kind>
constexpr int kScaleBits = kind == WeightKind::mxfp4 ? 9 : 10;
static_assert(2LL * 30480 * kUnpackedGroups << (kScaleBits<WeightKind::int4> + 1) < 1LL << 31);
static_assert(2LL * 24384 * 2 * kUnpackedGroups << (kScaleBits<WeightKind::mxfp4> + 1) < 1LL << 31);
constexpr float kSmallestScale = 1e-30f;  // of a chunk of zeros: powers of two near it have a reciprocal

struct UnpackedChunk {
  alignas(64) std::byte weights[kUnpackedPairs * kUnpackedGroups * kUnpackedGroup];  // [pair][group][line][2 vectors]
  alignas(64) std::int32_t scales[kUnpackedGroups * kPanelColumns];                  // [group][column], in both halves of each
  alignas(64) float minima[kUnpackedGroups * kPanelColumns];
  alignas(64) float scale[kPanelColumns];  // of the integers
  std::int64_t first_unit;
  std::int64_t last_unit;
  bool last;  // of the panel

  // `from`: the chunk's first unit.
  template <WeightKind kind, bool symmetric>
  void unpack_scales(const Layout& layout, const std::byte* from) {
    constexpr float offset = kind == WeightKind::mxfp4 ? kMxfp4Offset : 8.0f;
    const V magnitude = repeat32(0x7FFFFFFF);
    const V twice = repeat128(_mm_setr_epi8(0, 1, 0, 1, 4, 5, 4, 5, 8, 9, 8, 9, 12, 13, 12, 13));
    const auto groups = static_cast<int>(2 * (last_unit - first_unit));
    for (int v = 0; v < kVectors; ++v) {
      VF of_group[kUnpackedGroups];
      VF minimum[kUnpackedGroups];
      VF largest = repeat(kSmallestScale);
#pragma GCC unroll 16
      for (int g = 0; g < kUnpackedGroups; ++g) {
        of_group[g] = minimum[g] = zero_float();
        if (g < groups) nibble_scales<kind, symmetric>(layout, from + g / 2 * layout.unit_bytes + layout.data_bytes, v, g % 2, of_group[g], minimum[g]);
        if constexpr (symmetric) minimum[g] = mul(of_group[g], repeat(-offset));
        largest = maximum_of(largest, as_floats(bit_and(as_integers(of_group[g]), magnitude)));
      }
      const V power = bit_and(as_integers(largest), repeat32(0x7F800000));  // the power of two below it
      const VF of_integers = as_floats(sub32(power, repeat32(kScaleBits<kind> << 23)));
      const VF inverse = as_floats(sub32(repeat32(static_cast<int>((254u + kScaleBits<kind>) << 23)), power));
      store_floats(scale + v * kInt32s, of_integers);
#pragma GCC unroll 16
      for (int g = 0; g < kUnpackedGroups; ++g) {
        const V rounded = round_to_ints(mul(of_group[g], inverse));
        store_bytes(scales + g * kPanelColumns + v * kInt32s, look_up(rounded, twice));
        // What rounding takes from a nibble of `offset` goes to the minimum: a zero of symmetric weights stays one.
        const VF lost = fma(to_floats(rounded), mul(of_integers, repeat(-1.0f)), of_group[g]);
        store_floats(minima + g * kPanelColumns + v * kInt32s, fma(lost, repeat(offset), minimum[g]));
      }
    }
  }

  template <WeightKind kind>
  void unpack_weights(const Layout& layout, const std::byte* from) {
    const V nibbles = ones8(15);
    const V table = mxfp4_table();
    for (std::int64_t unit = 0; unit < last_unit - first_unit; ++unit, from += layout.unit_bytes) {
      for (int v = 0; v < kVectors; ++v) {
        std::byte* const to = weights + (v / 2 * kUnpackedGroups + 2 * unit) * kUnpackedGroup + v % 2 * kVectorBytes;
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
          const V bytes = load_bytes(from + v / kParts * kNibbleTile + i * 64 + v % kParts * kVectorBytes);
          const V low = bit_and(bytes, nibbles);
          const V high = bit_and(right4(bytes), nibbles);
          store_bytes(to + i * kUnpackedLine, kind == WeightKind::mxfp4 ? look_up(table, low) : low);
          store_bytes(to + kUnpackedGroup + i * kUnpackedLine, kind == WeightKind::mxfp4 ? look_up(table, high) : high);
        }
      }
    }
  }
};

// Adds `rows` rows' products with a pair's columns over a group of 32 inputs to `sums`, [row][2 vectors].
template <WeightKind kind, int rows>
NG_INLINE void add_unpacked_group(const std::byte* w, const std::byte* x, const std::int32_t* scales, std::int32_t* sums) {
#pragma GCC unroll 2
  for (int run = 0; run < 8; run += kRunLines<kind>) {
    V narrow[rows][2];
#pragma GCC unroll 8
    for (int i = run; i < run + kRunLines<kind>; ++i) {
      const V first = load_bytes(w + i * kUnpackedLine);
      const V second = load_bytes(w + i * kUnpackedLine + kVectorBytes);
#pragma GCC unroll 12
      for (int r = 0; r < rows; ++r) {
        const std::byte* const four = x + r * kUnitInputs + i * 4;
        i == run ? first_maddubs(four, first, second, narrow[r][0], narrow[r][1]) : add_maddubs(four, first, second, narrow[r][0], narrow[r][1]);
      }
    }
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const V scale = load_bytes(reinterpret_cast<const std::byte*>(scales + v * kInt32s));
#pragma GCC unroll 12
      for (int r = 0; r < rows; ++r) {
        std::int32_t* const sum = sums + (r * 2 + v) * kInt32s;
        store_bytes(sum, add32(load_bytes(reinterpret_cast<const std::byte*>(sum)), madd(narrow[r][v], scale)));
      }
    }
  }
}

// A strip over a chunk, a pair of vectors: with the inputs' low halves all units, with the high ones those that have a flag of `mask`.
template <WeightKind kind, int rows, bool high>
NG_INLINE void unpacked_half(const UnpackedChunk& chunk, const RowBlock& block, int first_row, int pair, std::uint8_t mask, Feed& feed, float* c) {
  alignas(64) std::int32_t sums[rows * 2 * kInt32s];
#pragma GCC unroll 24
  for (int i = 0; i < rows * 2; ++i) store_bytes(sums + i * kInt32s, zero());
  const std::byte* w = chunk.weights + pair * kUnpackedGroups * kUnpackedGroup;
  const std::int32_t* scales = chunk.scales + pair * 2 * kInt32s;
  for (std::int64_t unit = chunk.first_unit; unit < chunk.last_unit; ++unit) {
    const std::byte* x = (high ? block.high : block.low) + (unit * block.stride_rows + first_row) * kUnitInputs;
#pragma GCC unroll 1
    for (int group = 0; group < 2; ++group, w += kUnpackedGroup, x += 32, scales += kPanelColumns) {
      if (high && !(block.flags[unit] & mask)) continue;
      if (!high) feed.ask();
      add_unpacked_group<kind, rows>(w, x, scales, sums);
    }
  }
  VF total[rows][2];
#pragma GCC unroll 12
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) total[r][v] = !high && chunk.first_unit == 0 ? zero_float() : load_floats(c + r * kPanelColumns + v * kInt32s);
  }
  if constexpr (!high) {
    const float* minima = chunk.minima + pair * 2 * kInt32s;
    for (std::int64_t unit = chunk.first_unit; unit < chunk.last_unit; ++unit) {
      const float* group_sum = block.group_sum + (unit * block.stride_rows + first_row) * 2;
#pragma GCC unroll 1
      for (int group = 0; group < 2; ++group, minima += kPanelColumns) {
        const VF first = load_floats(minima);
        const VF second = load_floats(minima + kInt32s);
#pragma GCC unroll 12
        for (int r = 0; r < rows; ++r) add_fma(group_sum + r * 2 + group, first, second, total[r][0], total[r][1]);
      }
    }
  }
#pragma GCC unroll 2
  for (int v = 0; v < 2; ++v) {
    VF scale = load_floats(chunk.scale + (pair * 2 + v) * kInt32s);
    if constexpr (high) scale = mul(scale, repeat(128.0f));
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) {
      const V sum = load_bytes(reinterpret_cast<const std::byte*>(sums + (r * 2 + v) * kInt32s));
      store_floats(c + r * kPanelColumns + v * kInt32s, fma(to_floats(sum), scale, total[r][v]));
    }
  }
}

// Not inlined: in one function with its siblings the registers of each are shared out worse.
template <WeightKind kind, int rows>
__attribute__((noinline)) void run_unpacked(int count, const UnpackedChunk& chunk, const RowBlock& block, int first_row, Feed& feed, float* c) {
  if constexpr (rows > 1) {
    if (count < rows) return run_unpacked<kind, rows - 1>(count, chunk, block, first_row, feed, c);
  }
  std::uint8_t mask = 0;
  for (std::int64_t unit = chunk.first_unit; unit < chunk.last_unit; ++unit) mask |= block.flags[unit];
  mask &= tiles_of_rows(first_row, rows);
#pragma GCC unroll 1
  for (int pair = 0; pair < kUnpackedPairs; ++pair) {
    unpacked_half<kind, rows, false>(chunk, block, first_row, pair, mask, feed, c + pair * 2 * kInt32s);
    if (mask) unpacked_half<kind, rows, true>(chunk, block, first_row, pair, mask, feed, c + pair * 2 * kInt32s);
  }
  if (chunk.last) finish_nibbles<kind, rows>(block, first_row, c);
}

template <WeightKind kind, bool symmetric>
void gemm_unpacked(const GemmArgs& a) {
  const Layout& layout = *a.layout;
  UnpackedChunk chunk;
  const std::int64_t strips = count_strips(a, kMostRows);
  for (std::int64_t panel = 0; panel < a.panels; ++panel) {
    const std::byte* const stream = a.panel + panel * layout.panel_bytes;
    float* const panel_c = a.c + panel * a.c_panel_stride;
    for (std::int64_t first = a.first_unit, last; first < a.last_unit; first = last) {
      last = first + kUnpackedUnits < a.last_unit ? first + kUnpackedUnits : a.last_unit;
      chunk.first_unit = first;
      chunk.last_unit = last;
      chunk.last = last == layout.units;
      chunk.unpack_scales<kind, symmetric>(layout, stream + first * layout.unit_bytes);
      chunk.unpack_weights<kind>(layout, stream + first * layout.unit_bytes);
      Feed feed{stream + last * layout.unit_bytes, (last - first) * layout.unit_bytes / 64, strips * kUnpackedPairs * 2 * (last - first)};
      for_strips(a, kMostRows, panel_c, [&](const RowBlock& block, int row, int rows, float* c) {
        run_unpacked<kind, kMostRows>(rows, chunk, block, row, feed, c);
      });
    }
    add_listed<kind>(a, panel, panel_c);
  }
}

}  // namespace
}  // namespace numagraft

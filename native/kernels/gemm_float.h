#pragma once

// bf16 and fp8 weights times fp32 inputs, widened to fp32 in registers. Included by one translation unit of each ISA that
// needs it; everything is internal to it.
#include "kernels/kernel_table.h"
#include "kernels/registers.h"
#include "kernels/row_strips.h"

namespace numagraft {
namespace {

constexpr int kFloatVectors = 2 * kParts;  // of results per row and panel
template <WeightKind kind>
constexpr int kFloatRows = kParts == 1 ? 6 : 3;  // as many as there are registers for
constexpr std::int64_t kFloatChunkUnits = kChunkInputs / kUnitInputs / 2;

// fp8 weights of a chunk as fp16: [unit][half][tile][32 inputs][16 columns]. With AVX-512 a register holds two pairs of
// inputs, so that every second and third input change places.
constexpr std::int64_t kHalfUnit = kUnitInputs / 2 * kPanelColumns;
constexpr int input_at(int place) { return kParts == 2 ? place : (place & ~3) | (place & 1) << 1 | (place & 2) >> 1; }
NG_INLINE void expand_line(const E4m3AsF16& convert, const std::byte* bytes, int line, std::uint16_t* to) {
#pragma GCC unroll 2
  for (int t = 0; t < 2; ++t) {
    const std::byte* from = bytes + t * 512 + line * 64;
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
NG_INLINE void expand_half_unit(const std::byte* bytes, std::uint16_t* to) {
  const E4m3AsF16 convert;
  for (int line = 0; line < 8; ++line) expand_line(convert, bytes, line, to);
}

// Adds rows [0, rows) x 32 inputs. One row adds even and odd inputs up apart: one addition waits for the one before.
// `expanding`: meanwhile `next`, to where `to` points; the two want different ports, and stores time to arrive.
template <int rows, int sums, bool expanding>
NG_INLINE void f16_half_unit(const std::uint16_t* w, const float* x, [[maybe_unused]] const std::byte* next, [[maybe_unused]] std::uint16_t* to,
                             VF (&sum)[rows][kFloatVectors][sums]) {
  const E4m3AsF16 convert;
#pragma GCC unroll 1
  for (int four = 0; four < 8; ++four) {
    if constexpr (expanding) expand_line(convert, next, four, to);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      VF weights[kFloatVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kFloatVectors; ++v) {
        weights[v] = load_f16(w + v / kParts * (kHalfUnit / 2) + (four * 4 + i) * kTileColumns + v % kParts * kInt32s);
      }
#pragma GCC unroll 6
      for (int r = 0; r < rows; ++r) {
        const VF input = repeat(x[r * kUnitInputs + four * 4 + input_at(i)]);
#pragma GCC unroll 4
        for (int v = 0; v < kFloatVectors; ++v) sum[r][v][i % sums] = fma(input, weights[v], sum[r][v][i % sums]);
      }
    }
  }
}

template <int rows, int sums>
NG_INLINE void bf16_half_unit(const std::byte* w, const float* x, bool fresh, VF (&sum)[rows][kFloatVectors][sums]) {
  const V high_half = repeat32(static_cast<int>(0xFFFF0000u));
#pragma GCC unroll 2
  for (int pair = 0; pair < 16; ++pair) {
#pragma GCC unroll 4
    for (int v = 0; v < kFloatVectors; ++v) {
      const std::byte* from = w + v / kParts * 1024 + pair * 64 + v % kParts * kVectorBytes;
      if (fresh && v % kParts == 0) prefetch_line(from);
      const V both = load_bytes(from);
      const VF even = as_floats(left16(both));
      const VF odd = as_floats(bit_and(both, high_half));
#pragma GCC unroll 6
      for (int r = 0; r < rows; ++r) {
        sum[r][v][0] = fma(repeat(x[r * kUnitInputs + pair * 2]), even, sum[r][v][0]);
        sum[r][v][sums - 1] = fma(repeat(x[r * kUnitInputs + pair * 2 + 1]), odd, sum[r][v][sums - 1]);
      }
    }
  }
}

// `expanded_units`: fp8 weights of the chunk, which the first strip leaves there for the others; a strip alone needs two halves of a unit.
// Not inlined: in one function with its siblings the registers of each are shared out worse (fp8: 2 to 10 %).
template <WeightKind kind, int rows>
__attribute__((noinline)) void float_rows(const GemmArgs& a, std::int64_t panel, const Strip& strip, [[maybe_unused]] std::uint16_t* expanded_units, float* c) {
  constexpr int sums = rows > 1 ? 1 : kParts == 1 ? 4 : 2;
  // fp8 sums are scaled after every 128 inputs
  constexpr std::int64_t together = kind == WeightKind::fp8 ? kFp8Block / kUnitInputs : kChunkInputs / kUnitInputs;
  const Layout& layout = *a.layout;
  const RowBlock& block = *strip.block;
  for (std::int64_t first = strip.first_unit; first < strip.last_unit;) {
    const std::int64_t boundary = (first / together + 1) * together;
    const std::int64_t last = boundary < strip.last_unit ? boundary : strip.last_unit;
    VF sum[rows][kFloatVectors][sums];
    for (int r = 0; r < rows; ++r) {
      for (int v = 0; v < kFloatVectors; ++v) {
        for (int s = 0; s < sums; ++s) sum[r][v][s] = zero_float();
        if (kind == WeightKind::bf16 && first > 0) sum[r][v][0] = load_floats(c + r * kPanelColumns + v * kInt32s);
      }
    }
    for (std::int64_t unit = first; unit < last; ++unit) {
      const auto* x = reinterpret_cast<const float*>(block.low) + (unit * block.stride_rows + strip.first_row) * kUnitInputs;
      const std::byte* w = a.panel + panel * layout.panel_bytes + unit * layout.unit_bytes;
      for (int half = 0; half < 2; ++half) {
        if constexpr (kind == WeightKind::bf16) {
          bf16_half_unit<rows, sums>(w + half * 2048, x + half * 32, strip.fresh, sum);
        } else {
          const std::byte* bytes = w + half * 1024;
          if (rows == 1 && strip.alone) {
            std::uint16_t* expanded = expanded_units + half * kHalfUnit;
            std::uint16_t* other = expanded_units + (1 - half) * kHalfUnit;
            if (unit == strip.first_unit && half == 0) expand_half_unit(bytes, expanded);
            if (unit + 1 < strip.last_unit || half == 0) {
              f16_half_unit<rows, sums, rows == 1>(expanded, x + half * 32, bytes + 1024, other, sum);
            } else {
              f16_half_unit<rows, sums, false>(expanded, x + half * 32, nullptr, nullptr, sum);
            }
          } else {
            const std::int64_t place = strip.alone ? 0 : (unit - strip.first_unit) * 2 + half;
            std::uint16_t* expanded = expanded_units + place * kHalfUnit;
            if (strip.fresh) expand_half_unit(bytes, expanded);
            f16_half_unit<rows, sums, false>(expanded, x + half * 32, nullptr, nullptr, sum);
          }
        }
      }
    }
    for (int v = 0; v < kFloatVectors; ++v) {
      VF scale = repeat(1.0f);
      if constexpr (kind == WeightKind::fp8) {
        const float* scales = panel_side(a, panel) + first * kUnitInputs / kFp8Block * kPanelColumns;
        if (v == 0 && strip.fresh) prefetch_scales(scales + panel_side_floats(layout));
        scale = mul(load_floats(scales + v * kInt32s), repeat(kE4m3F16Scale));
      }
      for (int r = 0; r < rows; ++r) {
        float* to = c + r * kPanelColumns + v * kInt32s;
        VF total = sum[r][v][0];
        for (int s = 1; s < sums; ++s) total = add(total, sum[r][v][s]);
        if constexpr (kind == WeightKind::fp8) total = first == 0 ? mul(total, scale) : fma(total, scale, load_floats(to));
        if (last == layout.units) total = mul(total, repeat(block.scale[strip.first_row + r]));
        store_floats(to, total);
      }
    }
    first = last;
  }
}

template <WeightKind kind>
struct Floats {
  static constexpr int most_rows = kFloatRows<kind>;
  static constexpr std::int64_t chunk_units = kFloatChunkUnits;
  static constexpr std::int64_t few_strip_units = kFp8Block / kUnitInputs;
  static constexpr std::int64_t single_strip_units = 0;
  alignas(64) std::uint16_t expanded[kind == WeightKind::fp8 ? 2 * kFloatChunkUnits * kHalfUnit : 1];
  template <int rows>
  void run(const GemmArgs& a, std::int64_t panel, const Strip& strip, float* c) {
    float_rows<kind, rows>(a, panel, strip, expanded, c);
  }
  void finish(const GemmArgs&, std::int64_t, float*) {}
};

template <WeightKind kind>
void gemm_float(const GemmArgs& a) {
  if (kind == WeightKind::fp8) prefetch_first_scales(a);
  gemm_strips<Floats<kind>>(a);
}

}  // namespace
}  // namespace numagraft

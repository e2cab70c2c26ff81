#pragma once

// Several strips of rows without VNNI or tiles: a chunk of weights is widened once, to what the multiplications take, and lies in
// L1 while every strip multiplies it. Strips then neither shift nor mask, and hold twelve sums in AVX2's registers without gcc keeping
// some in memory. Internal to the unit that includes it.
#include "kernels/kernel_table.h"
#include "kernels/madd_operands.h"
#include "kernels/registers.h"
#include "kernels/row_strips.h"

namespace numagraft {
namespace {

constexpr int kWidenedPairs = kVectors / 2;  // of vectors of a panel's columns; a chunk is [pair][unit][step][2 vectors]
constexpr std::int64_t kWidenedBytes = 16 << 10;

// How widened weights meet inputs: two 16-bit integers at a step, or one float.
struct IntegerSteps {
  using Sum = V;
  static constexpr int steps = kUnitInputs / 2;  // of a unit
  static constexpr std::int64_t input_bytes = 2;
  NG_INLINE Sum none() { return zero(); }
  NG_INLINE Sum resume(const float* c) { return load_bytes(reinterpret_cast<const std::byte*>(c)); }
  NG_INLINE void leave(float* c, Sum sum) { store_floats(c, as_floats(sum)); }
};
struct FloatSteps {
  using Sum = VF;
  static constexpr int steps = kUnitInputs;
  static constexpr std::int64_t input_bytes = 4;
  NG_INLINE Sum none() { return zero_float(); }
  NG_INLINE Sum resume(const float* c) { return load_floats(c); }
  NG_INLINE void leave(float* c, Sum sum) { store_floats(c, sum); }
};
template <class Steps>
constexpr std::int64_t kStepsUnitBytes = Steps::steps * 2 * kVectorBytes;                       // of one pair
template <class Steps>
constexpr std::int64_t kStepsUnits = kWidenedBytes / (kWidenedPairs * kStepsUnitBytes<Steps>);  // of a chunk: 4, of floats 2

// Where a vector of a unit's columns goes, step by step.
template <class Steps>
NG_INLINE std::byte* widened_vector(std::byte* to, int vector, std::int64_t unit) {
  return to + (vector / 2 * kStepsUnits<Steps> + unit) * kStepsUnitBytes<Steps> + vector % 2 * kVectorBytes;
}
NG_INLINE void store_step(std::byte* to, int step, V v) { store_bytes(to + step * 2 * kVectorBytes, v); }

// A chunk as strips of rows meet it.
struct WidenedChunk {
  const std::byte* weights;
  std::int64_t first_unit;
  std::int64_t last_unit;
};

template <class Steps, int rows>
NG_INLINE void widened_rows(const WidenedChunk& chunk, const RowBlock& block, int first_row, Feed& feed, float* c) {
  using Sum = typename Steps::Sum;
  constexpr std::int64_t row_bytes = kUnitInputs * Steps::input_bytes;
#pragma GCC unroll 1
  for (int pair = 0; pair < kWidenedPairs; ++pair) {
    float* const to = c + pair * 2 * kInt32s;
    Sum sum[rows][2];
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) sum[r][v] = chunk.first_unit == 0 ? Steps::none() : Steps::resume(to + r * kPanelColumns + v * kInt32s);
    }
    const std::byte* w = chunk.weights + pair * kStepsUnits<Steps> * kStepsUnitBytes<Steps>;
    const std::byte* x = block.low + (chunk.first_unit * block.stride_rows + first_row) * row_bytes;
    for (std::int64_t unit = chunk.first_unit; unit < chunk.last_unit; ++unit, x += block.stride_rows * row_bytes) {
      feed.ask();
      const std::byte* inputs = x;
#pragma GCC unroll 1
      for (int four = 0; four < Steps::steps / 4; ++four, w += 8 * kVectorBytes, inputs += 16) {
#pragma GCC unroll 4
        for (int step = 0; step < 4; ++step) {
          const V first = load_bytes(w + step * 2 * kVectorBytes);
          const V second = load_bytes(w + step * 2 * kVectorBytes + kVectorBytes);
#pragma GCC unroll 12
          for (int r = 0; r < rows; ++r) {
            const std::byte* const at = inputs + r * row_bytes + step * 4;
            if constexpr (Steps::input_bytes == 4) {
              add_fma(reinterpret_cast<const float*>(at), as_floats(first), as_floats(second), sum[r][0], sum[r][1]);
            } else {
              add_madd(at, first, second, sum[r][0], sum[r][1]);
            }
          }
        }
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) Steps::leave(to + r * kPanelColumns + v * kInt32s, sum[r][v]);
    }
  }
}

// Not inlined: in one function with its siblings the registers of each are shared out worse.
template <class Steps, int rows>
__attribute__((noinline)) void run_widened(int count, const WidenedChunk& chunk, const RowBlock& block, int first_row, Feed& feed, float* c) {
  if constexpr (rows > 1) {
    if (count < rows) return run_widened<Steps, rows - 1>(count, chunk, block, first_row, feed, c);
  }
  widened_rows<Steps, rows>(chunk, block, first_row, feed, c);
}

// What is left to do to a panel's sums.
struct NothingLeft {
  NG_INLINE_MEMBER void finish(const GemmArgs&, std::int64_t, float*) {}
};

// Weights have `Steps`; begin(args, panel); finish(args, panel, c), once its sums are whole; and
// widen(layout, unit's bytes, unit, its place in the chunk, to).
template <class Weights>
void gemm_widened(const GemmArgs& a) {
  using Steps = typename Weights::Steps;
  const Layout& layout = *a.layout;
  alignas(64) std::byte widened[kWidenedBytes];
  Weights weights;
  const std::int64_t strips = count_strips(a, kMostRows);
  for (std::int64_t panel = 0; panel < a.panels; ++panel) {
    const std::byte* const stream = a.panel + panel * layout.panel_bytes;
    float* const panel_c = a.c + panel * a.c_panel_stride;
    weights.begin(a, panel);
    for (std::int64_t first = a.first_unit, last; first < a.last_unit; first = last) {
      last = first + kStepsUnits<Steps> < a.last_unit ? first + kStepsUnits<Steps> : a.last_unit;
      for (std::int64_t unit = first; unit < last; ++unit) weights.widen(layout, stream + unit * layout.unit_bytes, unit, unit - first, widened);
      const WidenedChunk chunk{widened, first, last};
      Feed feed{stream + last * layout.unit_bytes, (last - first) * layout.unit_bytes / 64, strips * kWidenedPairs * (last - first)};
      for_strips(a, kMostRows, panel_c, [&](const RowBlock& block, int row, int rows, float* c) {
        run_widened<Steps, kMostRows>(rows, chunk, block, row, feed, c);
      });
    }
    if (a.last_unit == layout.units) weights.finish(a, panel, panel_c);
  }
}

}  // namespace
}  // namespace numagraft

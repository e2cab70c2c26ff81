#pragma once

#include <cstdint>

namespace numagraft {

enum class WeightKind : std::uint8_t { bf16, int8, int4, fp8, mxfp4 };
// In groups of inputs with scales of their own, which lie in the units.
static inline constexpr bool is_grouped(WeightKind kind) { return kind == WeightKind::int4 || kind == WeightKind::mxfp4; }
enum class Activations : std::uint8_t { automatic, int8, bf16 };
// Of inputs, outputs and unpacked weights; the last two only of weights that a checkpoint stores quantised.
enum class DType : std::uint8_t { f32, bf16, f16, e4m3, e2m1 };
static inline std::int64_t element_bits(DType dtype) {
  return dtype == DType::f32 ? 32 : dtype == DType::e4m3 ? 8 : dtype == DType::e2m1 ? 4 : 16;
}

// How weights are kept. int8: symmetric, one scale per output channel. int4: groups of `group` inputs, asymmetric (scale
// and minimum) unless `symmetric`. fp8: e4m3 with 128x128 block scales. mxfp4: e2m1 with an e8m0 scale per 32.
struct WeightFormat {
  WeightKind kind = WeightKind::int8;
  int group = 32;
  bool symmetric = false;
  Activations activations = Activations::automatic;
};

// A matrix somewhere in memory, not owned: element (r, c) at data + r * row_stride + c * column_stride, in elements. Quantised
// ones have contiguous rows and scales: e4m3 a float for each block of 128 x 128 (r / 128, c / 128), e2m1 (two to a byte, the
// first in the low nibble) an e8m0 exponent for each 32 inputs (r, c / 32).
struct MatrixView {
  const void* data = nullptr;
  DType dtype = DType::f32;
  std::int64_t rows = 0;
  std::int64_t columns = 0;
  std::int64_t row_stride = 0;
  std::int64_t column_stride = 1;
  const void* scales = nullptr;
  std::int64_t scale_stride = 0;  // scales from one row of them to the next
};

// gate_up: what the experts' inner activation does with gate g and up u.
//   silu, gelu, gelu_tanh, relu: act(g) * u.   clamped_swiglu (gpt-oss): g = min(g, limit), u = clamp(u, -limit, limit),
//   g * sigmoid(alpha * g) * (u + 1).
enum class GateKind : std::uint8_t { silu, gelu, gelu_tanh, relu, clamped_swiglu };
struct Gate {
  GateKind kind = GateKind::silu;
  float alpha = 1.702f;
  float limit = 7.0f;
};

}  // namespace numagraft

// What happens to a panel of results while it is in L1: bias, activation, conversion, sums. Compiled once per ISA.
#include "kernels/kernel_table.h"
#include "kernels/simd.h"

namespace numagraft::NUMAGRAFT_ISA {
namespace {

constexpr int kHalves = kPanelColumns / kLanes;

NUMAGRAFT_INLINE F bias_at(const float* bias, int half) { return bias ? load<F>(bias + half * kLanes) : F{}; }

// Abramowitz and Stegun 7.1.26, |error| <= 1.5e-7.
NUMAGRAFT_INLINE F error_function(F x) {
  const F magnitude = (F)((I)x & 0x7FFFFFFF);
  const F t = splat(1.0f) / (splat(1.0f) + splat(0.3275911f) * magnitude);
  F p = splat(1.061405429f);
  p = p * t + splat(-1.453152027f);
  p = p * t + splat(1.421413741f);
  p = p * t + splat(-0.284496736f);
  p = p * t + splat(0.254829592f);
  const F value = splat(1.0f) - p * t * exponential(-magnitude * magnitude);
  return (F)((I)value | ((I)x & static_cast<std::int32_t>(0x80000000)));
}

NUMAGRAFT_INLINE F activate(GateKind kind, F g) {
  switch (kind) {
    case GateKind::gelu:
      return splat(0.5f) * g * (splat(1.0f) + error_function(g * splat(0.70710678f)));
    case GateKind::gelu_tanh:  // 0.5 (1 + tanh z) = sigmoid(2 z)
      return g * sigmoid(splat(1.5957691216f) * (g + splat(0.044715f) * g * g * g));
    case GateKind::relu:
      return maximum(F{}, g);
    default:
      return g * sigmoid(g);
  }
}

#if defined(__AVX512F__)
// A row's 32 values in bf16: a whole cache line.
NUMAGRAFT_INLINE __m512i bf16_line(const F (&values)[kHalves]) {
  return _mm512_inserti64x4(_mm512_castsi256_si512((__m256i)to_bf16(values[0])), (__m256i)to_bf16(values[1]), 1);
}
NUMAGRAFT_INLINE __m512i inner_line(const F (&values)[kHalves]) {
#if defined(__AVX512BF16__)
  return (__m512i)_mm512_cvtne2ps_pbh((__m512)values[1], (__m512)values[0]);  // subnormals become zero, as in the multiplication that follows
#else
  return bf16_line(values);
#endif
}
#endif

template <bool streamed>
NUMAGRAFT_INLINE void store_inner(std::uint16_t* to, const F (&values)[kHalves]) {
#if defined(__AVX512F__)
  if constexpr (streamed) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), inner_line(values));
  } else {
    _mm512_storeu_si512(to, inner_line(values));
  }
#else
  for (int half = 0; half < kHalves; ++half) store(to + half * kLanes, to_bf16(values[half]));
#endif
}

// Row by row, so that a line of the inner rows, which lie apart, is written once.
template <GateKind kind, bool streamed>
NUMAGRAFT_INLINE void gate_rows(const GateArgs& a) {
  F gate_bias[kHalves];
  F up_bias[kHalves];
  for (int half = 0; half < kHalves; ++half) {
    gate_bias[half] = bias_at(a.gate_bias, half);
    up_bias[half] = bias_at(a.up_bias, half);
  }
  for (std::int64_t row = 0; row < a.rows; ++row) {
    F values[kHalves];
    for (int half = 0; half < kHalves; ++half) {
      F g = load<F>(a.gate + row * kPanelColumns + half * kLanes) + gate_bias[half];
      F u = load<F>(a.up + row * kPanelColumns + half * kLanes) + up_bias[half];
      if constexpr (kind == GateKind::clamped_swiglu) {
        const F limit = splat(a.kind.limit);
        g = minimum(limit, g);
        u = minimum(limit, maximum(-limit, u));
        values[half] = g * sigmoid(splat(a.kind.alpha) * g) * (u + splat(1.0f));
      } else {
        values[half] = activate(kind, g) * u;
      }
    }
    store_inner<streamed>(a.inner + row * a.row_stride, values);
  }
}

template <GateKind kind>
NUMAGRAFT_INLINE void gate_of(const GateArgs& a) {
#if defined(__AVX512F__)
  if (a.streamed) {
    gate_rows<kind, true>(a);
    _mm_sfence();  // such stores would not be ordered before the barrier's
    return;
  }
#endif
  gate_rows<kind, false>(a);
}

// Row by row: the lines of a row lie together.
template <DType dtype>
NUMAGRAFT_INLINE void store_panels(const StoreArgs& a) {
  constexpr std::int64_t bytes = dtype == DType::f32 ? 4 : 2;
  for (std::int64_t row = 0; row < a.rows; ++row) {
    std::byte* out = static_cast<std::byte*>(a.out) + row * a.row_stride * bytes;
    const float* c = a.c + row * kPanelColumns;
    const float* bias = a.bias;
    for (int columns = a.columns; columns > 0; columns -= kPanelColumns, c += a.c_panel_stride, out += kPanelColumns * bytes) {
      F values[kHalves];
      for (int half = 0; half < kHalves; ++half) values[half] = load<F>(c + half * kLanes) + bias_at(bias, half);
      if (bias != nullptr) bias += kPanelColumns;
#if defined(__AVX512F__)
      if constexpr (dtype == DType::bf16) {
        if (columns >= kPanelColumns) {
          _mm512_storeu_si512(out, bf16_line(values));
          continue;
        }
      }
#endif
      for (int half = 0; half < kHalves && half * kLanes < columns; ++half) {
        const int left = columns - half * kLanes;
        if (left >= kLanes) {
          store_from_float(out, dtype, half * kLanes, values[half]);
          continue;
        }
        alignas(64) std::byte last[64];
        store_from_float(last, dtype, 0, values[half]);
        __builtin_memcpy(out + half * kLanes * bytes, last, static_cast<std::size_t>(left * bytes));
      }
    }
  }
}

}  // namespace

void store_rows(const StoreArgs& a) {
  switch (a.dtype) {
    case DType::f32:
      return store_panels<DType::f32>(a);
    case DType::f16:
      return store_panels<DType::f16>(a);
    default:  // outputs have no other
      return store_panels<DType::bf16>(a);
  }
}

void gate(const GateArgs& a) {
  switch (a.kind.kind) {
    case GateKind::silu:
      return gate_of<GateKind::silu>(a);
    case GateKind::gelu:
      return gate_of<GateKind::gelu>(a);
    case GateKind::gelu_tanh:
      return gate_of<GateKind::gelu_tanh>(a);
    case GateKind::relu:
      return gate_of<GateKind::relu>(a);
    case GateKind::clamped_swiglu:
      return gate_of<GateKind::clamped_swiglu>(a);
  }
}

void accumulate(const AccumulateArgs& a) {
  for (std::int64_t row = 0; row < a.rows; ++row) {
    float* acc = a.acc + a.index[row] * a.acc_stride;
    const float* c = a.c + row * kPanelColumns;
    const F weight = splat(a.weight[row]);
    for (std::int64_t panel = 0; panel < a.panels; ++panel, c += a.c_panel_stride, acc += kPanelColumns) {
      const float* bias = a.bias ? a.bias + panel * kPanelColumns : nullptr;
      for (int half = 0; half < kHalves; ++half) {
        const F v = load<F>(c + half * kLanes) + bias_at(bias, half);
        store(acc + half * kLanes, load<F>(acc + half * kLanes) + weight * v);
      }
    }
  }
}

void reduce(const ReduceArgs& a) {
  std::int64_t i = 0;
  for (; i + kLanes <= a.columns; i += kLanes) {
    F total = load<F>(a.sources[0] + i);
    for (int s = 1; s < a.count; ++s) total += load<F>(a.sources[s] + i);
    store_from_float(a.out, a.dtype, i, total);
  }
  if (i < a.columns) {
    alignas(64) float padded[kLanes] = {};
    for (std::int64_t j = i; j < a.columns; ++j) {
      for (int s = 0; s < a.count; ++s) padded[j - i] += a.sources[s][j];
    }
    alignas(64) std::byte last[64];
    store_from_float(last, a.dtype, 0, load<F>(padded));
    const std::int64_t bytes = a.dtype == DType::f32 ? 4 : 2;
    __builtin_memcpy(static_cast<std::byte*>(a.out) + i * bytes, last, static_cast<std::size_t>((a.columns - i) * bytes));
  }
}

}  // namespace numagraft::NUMAGRAFT_ISA

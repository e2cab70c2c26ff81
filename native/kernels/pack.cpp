// Packs one panel: gathers 32 output channels as fp32, inputs by columns, so that a vector lane is a channel all the way;
// chooses scales; writes units. Compiled once per ISA.
#include "kernels/kernel_table.h"
#include "kernels/simd.h"

namespace numagraft::NUMAGRAFT_ISA {
namespace {

constexpr int kSlices = kPanelColumns / kLanes;  // of a panel's columns, a vector each
// Where a slice begins in a unit whose column tiles take `tile_bytes`, with `column_bytes` per column in each of their lines.
NUMAGRAFT_INLINE std::int64_t slice_offset(int slice, int tile_bytes, int column_bytes) {
  const int column = slice * kLanes;
  return column / kTileColumns * tile_bytes + column % kTileColumns * column_bytes;
}

// ---- gathering: staged[k][32]

template <int step>
NUMAGRAFT_INLINE void exchange(F& a, F& b) {
  constexpr auto first = [](int lane) { return (lane & step) ? lane - step + kLanes : lane; };
  constexpr auto second = [](int lane) { return (lane & step) ? lane + kLanes : lane + step; };
#if defined(__AVX512F__)
  const F low = __builtin_shufflevector(a, b, first(0), first(1), first(2), first(3), first(4), first(5), first(6),
                                        first(7), first(8), first(9), first(10), first(11), first(12), first(13),
                                        first(14), first(15));
  const F high = __builtin_shufflevector(a, b, second(0), second(1), second(2), second(3), second(4), second(5),
                                         second(6), second(7), second(8), second(9), second(10), second(11), second(12),
                                         second(13), second(14), second(15));
#else
  const F low = __builtin_shufflevector(a, b, first(0), first(1), first(2), first(3), first(4), first(5), first(6), first(7));
  const F high = __builtin_shufflevector(a, b, second(0), second(1), second(2), second(3), second(4), second(5), second(6), second(7));
#endif
  a = low;
  b = high;
}

template <int step>
NUMAGRAFT_INLINE void transpose(F (&v)[kLanes]) {
  for (int i = 0; i < kLanes; ++i) {
    if (!(i & step)) exchange<step>(v[i], v[i + step]);
  }
  if constexpr (step > 1) transpose<step / 2>(v);
}

// e4m3: sign, 4 bits of exponent (bias 7), 3 of mantissa; no infinities, 0x7F is NaN.
NUMAGRAFT_INLINE F e4m3_value(I code) {
  const I magnitude = code & 0x7F;
  const F normal = (F)((magnitude << 20) + (120 << 23));
  const F value = select(magnitude < 8, to_float(magnitude) * splat(0x1p-9f), normal);
  return (F)((I)select(magnitude == 0x7F, splat(__builtin_nanf("")), value) | ((code & 0x80) << 24));
}
// e2m1: 0, .5, 1, 1.5, 2, 3, 4, 6 and a sign.
NUMAGRAFT_INLINE F e2m1_value(I code) {
  const I magnitude = code & 7;
  const F normal = (F)((magnitude << 22) + (126 << 23));
  return (F)((I)select(magnitude < 2, to_float(magnitude) * splat(0.5f), normal) | ((code & 8) << 28));
}

// A vector of neighbouring elements of a row. `coded`: codes as they are, in lanes of integers; else values, which lack their scales.
template <DType dtype, bool coded>
NUMAGRAFT_INLINE F load_elements(const void* data, std::int64_t index) {
  if constexpr (dtype == DType::e4m3) {
    const I codes = __builtin_convertvector(load<U8>(static_cast<const std::uint8_t*>(data) + index), I);
    return coded ? (F)codes : e4m3_value(codes);
  } else if constexpr (dtype == DType::e2m1) {
    typedef std::uint8_t Pairs __attribute__((vector_size(kLanes / 2)));
    const Pairs pairs = load<Pairs>(static_cast<const std::uint8_t*>(data) + index / 2);
    const Pairs low = pairs & 15;
    const Pairs high = pairs >> 4;
#if defined(__AVX512F__)
    const I codes = __builtin_convertvector(__builtin_shufflevector(low, high, 0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15), I);
#else
    const I codes = __builtin_convertvector(__builtin_shufflevector(low, high, 0, 4, 1, 5, 2, 6, 3, 7), I);
#endif
    return coded ? (F)codes : e2m1_value(codes);
  } else {
    return load_as_float(data, dtype, index);
  }
}
template <DType dtype, bool coded>
NUMAGRAFT_INLINE float load_one(const void* data, std::int64_t index) {
  if constexpr (dtype == DType::e4m3 || dtype == DType::e2m1) {
    const std::uint8_t byte = static_cast<const std::uint8_t*>(data)[dtype == DType::e4m3 ? index : index / 2];
    const I code = I{} + (dtype == DType::e4m3 ? byte : index % 2 ? byte >> 4 : byte & 15);
    return (coded ? (F)code : dtype == DType::e4m3 ? e4m3_value(code) : e2m1_value(code))[0];
  } else {
    return scalar_as_float(data, dtype, index);
  }
}

NUMAGRAFT_INLINE F power_of_two(I exponent_code) { return (F)(exponent_code << 23); }
NUMAGRAFT_INLINE bool present_row(const PackArgs& a, std::int64_t row) { return row >= a.row_begin && row < a.row_end; }

// Scales of neighbouring rows of a quantised source at one of its columns; rows that are not packed have 0.
NUMAGRAFT_INLINE F fp8_scales(const PackArgs& a, std::int64_t first_row, std::int64_t column) {
  F scales = {};
  for (int lane = 0; lane < kLanes; ++lane) {
    const std::int64_t row = first_row + lane;
    if (present_row(a, row)) scales[lane] = static_cast<const float*>(a.source->scales)[row / kFp8Block * a.source->scale_stride + column / kFp8Block];
  }
  return scales;
}
NUMAGRAFT_INLINE I mxfp4_exponents(const PackArgs& a, std::int64_t first_row, std::int64_t column) {
  I exponents = {};
  for (int lane = 0; lane < kLanes; ++lane) {
    const std::int64_t row = first_row + lane;
    if (present_row(a, row)) exponents[lane] = static_cast<const std::uint8_t*>(a.source->scales)[row * a.source->scale_stride + column / 32];
  }
  return exponents;
}
template <DType dtype>
NUMAGRAFT_INLINE F source_scales(const PackArgs& a, std::int64_t first_row, std::int64_t column) {
  return dtype == DType::e4m3 ? fp8_scales(a, first_row, column) : power_of_two(mxfp4_exponents(a, first_row, column));
}

template <DType dtype, bool coded>
void gather_by_rows(const PackArgs& a, std::int64_t inputs, float* staged) {
  const MatrixView& source = *a.source;
  constexpr bool scaled = (dtype == DType::e4m3 || dtype == DType::e2m1) && !coded;
  for (int slice = 0; slice < kSlices; ++slice) {
    std::int64_t offsets[kLanes];
    bool present[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      const std::int64_t row = a.first_row + slice * kLanes + lane;
      present[lane] = present_row(a, row);
      offsets[lane] = present[lane] ? row * source.row_stride + a.first_input : 0;
    }
    F scales = {};
    std::int64_t k = 0;
    for (; k + kLanes <= inputs; k += kLanes) {
      F v[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) {
        v[lane] = present[lane] ? load_elements<dtype, coded>(source.data, offsets[lane] + k) : F{};
      }
      transpose<kLanes / 2>(v);
      if constexpr (scaled) {
        if (k % 32 == 0) scales = source_scales<dtype>(a, a.first_row + slice * kLanes, a.first_input + k);
        for (int i = 0; i < kLanes; ++i) v[i] *= scales;
      }
      for (int i = 0; i < kLanes; ++i) store(staged + (k + i) * kPanelColumns + slice * kLanes, v[i]);
    }
    for (; k < inputs; ++k) {
      F v = {};
      for (int lane = 0; lane < kLanes; ++lane) {
        if (present[lane]) v[lane] = load_one<dtype, coded>(source.data, offsets[lane] + k);
      }
      if constexpr (scaled) v *= source_scales<dtype>(a, a.first_row + slice * kLanes, a.first_input + k);
      store(staged + k * kPanelColumns + slice * kLanes, v);
    }
  }
}

template <DType dtype>
void gather_strided(const PackArgs& a, std::int64_t inputs, float* staged) {
  const MatrixView& source = *a.source;
  const bool whole = a.first_row >= a.row_begin && a.first_row + kPanelColumns <= a.row_end && source.row_stride == 1;
  for (std::int64_t k = 0; k < inputs; ++k) {
    const std::int64_t column = (a.first_input + k) * source.column_stride;
    float* to = staged + k * kPanelColumns;
    if (whole) {
      for (int slice = 0; slice < kSlices; ++slice) {
        store(to + slice * kLanes, load_as_float(source.data, dtype, column + a.first_row + slice * kLanes));
      }
      continue;
    }
    for (int c = 0; c < kPanelColumns; ++c) {
      const std::int64_t row = a.first_row + c;
      const bool present = row >= a.row_begin && row < a.row_end;
      to[c] = present ? scalar_as_float(source.data, dtype, row * source.row_stride + column) : 0.0f;
    }
  }
}

template <DType dtype, bool coded>
void gather(const PackArgs& a, float* staged) {
  std::int64_t inputs = a.source->columns - a.first_input;
  if (inputs > a.layout->k) inputs = a.layout->k;
  if (inputs < 0) inputs = 0;
  if constexpr (dtype == DType::e4m3 || dtype == DType::e2m1) {
    gather_by_rows<dtype, coded>(a, inputs, staged);
  } else if (a.source->column_stride == 1) {
    gather_by_rows<dtype, false>(a, inputs, staged);
  } else {
    gather_strided<dtype>(a, inputs, staged);
  }
  for (std::int64_t i = inputs * kPanelColumns; i < a.layout->units * kUnitInputs * kPanelColumns; i += kLanes) {
    store(staged + i, F{});
  }
}

NUMAGRAFT_INLINE F magnitude(F x) { return (F)((I)x & 0x7FFFFFFF); }
NUMAGRAFT_INLINE F at(const float* staged, std::int64_t k, int slice) {
  return load<F>(staged + k * kPanelColumns + slice * kLanes);
}
NUMAGRAFT_INLINE F rounded_to_bf16(F x) { return from_bf16(to_bf16(x)); }
NUMAGRAFT_INLINE I clamp(I q, std::int32_t low, std::int32_t high) {
  const I below = q < low;
  q = (below & low) | (~below & q);
  const I above = q > high;
  return (above & high) | (~above & q);
}
NUMAGRAFT_INLINE F reciprocal_or_zero(F s) { return select(s != F{}, splat(1.0f) / s, F{}); }

// ---- bf16

void pack_bf16(const PackArgs& a, const float* staged) {
  for (std::int64_t k = 0; k < a.layout->units * kUnitInputs; k += kUnitInputs / 2) {
    for (int slice = 0; slice < kSlices; ++slice) {
      std::byte* to = a.panel + k * kPanelColumns * 2 + slice_offset(slice, 1024, 4);
      for (int row = 0; row < 16; ++row, to += 64) {
        const U even = __builtin_convertvector(to_bf16(at(staged, k + 2 * row, slice)), U);
        const U odd = __builtin_convertvector(to_bf16(at(staged, k + 2 * row + 1, slice)), U);
        store(to, even | (odd << 16));
      }
    }
  }
}

// ---- int8

// Largest magnitude of each column over all inputs of the source, also those of other shards: every placement then has
// the same scales.
void widen_range(const Layout& layout, const float* staged, F (&largest)[kSlices]) {
  for (std::int64_t k = 0; k < layout.k; ++k) {
    for (int slice = 0; slice < kSlices; ++slice) largest[slice] = maximum(magnitude(at(staged, k, slice)), largest[slice]);
  }
}

void pack_int8(const PackArgs& a, const float* staged, const F (&range)[kSlices]) {
  for (int slice = 0; slice < kSlices; ++slice) {
    const F largest = range[slice];
    const F scale = largest * splat(1.0f / 127.0f);
    const F inverse = reciprocal_or_zero(scale);
    store(a.side + slice * kLanes, scale);
    for (std::int64_t unit = 0; unit < a.layout->units; ++unit) {
      std::byte* to = a.panel + unit * a.layout->unit_bytes + slice_offset(slice, 1024, 4);
      for (int row = 0; row < 16; ++row, to += 64) {
        I bytes = {};
        for (int i = 0; i < 4; ++i) {
          const F w = at(staged, unit * kUnitInputs + row * 4 + i, slice);
          bytes |= (clamp(round_to_int(w * inverse), -127, 127) + kInt8Offset) << (8 * i);
        }
        store(to, bytes);
      }
    }
  }
}

// ---- int4: w = scale * q + minimum, q in 0..15 (symmetric: minimum = -8 scale)

struct Grid {
  F scale;
  F minimum;
};

NUMAGRAFT_INLINE Grid choose(I mask, const Grid& a, const Grid& b) { return {select(mask, a.scale, b.scale), select(mask, a.minimum, b.minimum)}; }
template <bool symmetric>
NUMAGRAFT_INLINE Grid rounded(F scale, F minimum) {
  scale = rounded_to_bf16(scale);
  return {scale, symmetric ? splat(-8.0f) * scale : rounded_to_bf16(minimum)};
}

// The search for the grid with the least squared error over a group of weights of 16 channels.
template <bool symmetric>
struct Search {
  const float* staged;
  int slice;
  int inputs;
  F sum;      // of the weights
  F spread;   // asymmetric: their squared deviations from the mean; symmetric: their squares
  F error;    // of the best grid so far
  Grid grid;

  // Tries a grid, and the one that fits the integers it gives best (least squares). That one's error follows from sums over
  // the group, without another pass over it.
  inline __attribute__((always_inline)) void look_at(const Grid& tried) {
    const F inverse = reciprocal_or_zero(tried.scale);
    const F offset = -tried.minimum * inverse;
    F squares = {};
    F sq = {};
    F sqq = {};
    F swq = {};
    for (int k = 0; k < inputs; ++k) {
      const F w = at(staged, k, slice);
      F q = minimum(maximum(w * inverse + offset, F{}), splat(15.0f));
      q = (q + splat(8388608.0f)) - splat(8388608.0f);
      const F d = w - (tried.scale * q + tried.minimum);
      squares += d * d;
      sq += q;
      sqq += q * q;
      swq += w * q;
    }
    keep(squares, tried);

    const F n = splat(static_cast<float>(inputs));
    const F mean = sq / n;
    // around the mean (symmetric: around 8, where the weight is 0)
    const F qq = symmetric ? sqq - splat(16.0f) * sq + splat(64.0f) * n : sqq - mean * sq;
    const F wq = symmetric ? swq - splat(8.0f) * sum : swq - mean * sum;
    const I solvable = qq > splat(0.25f);
    const F scale = wq / select(solvable, qq, splat(1.0f));
    const F minimum = sum / n - scale * mean;
    const Grid fitted = rounded<symmetric>(scale, minimum);
    const F off_scale = fitted.scale - scale;
    const F off_middle = symmetric ? F{} : fitted.minimum + fitted.scale * mean - sum / n;
    F fitted_error = spread - scale * wq + off_scale * off_scale * qq + off_middle * off_middle * n;
    // The difference has lost digits; a grid that the weights lie on is found by its own error, which is exactly 0.
    fitted_error = maximum(fitted_error, spread * splat(1e-6f));
    keep(select(solvable, fitted_error, splat(__builtin_inff())), fitted);
  }

 private:
  inline __attribute__((always_inline)) void keep(F found, const Grid& tried) {
    const I better = found < error;
    error = select(better, found, error);
    grid = choose(better, tried, grid);
  }
};

// Grids that span less than the range often have the smaller squared error: a few spans are tried, the best refitted once
// more, and its neighbours a few per cent wider and narrower, each refitted.
template <bool symmetric>
Grid search(const float* staged, int slice, int inputs) {
  F low = symmetric ? F{} : at(staged, 0, slice);
  F high = low;
  F sum = {};
  F squares = {};
  for (int k = 0; k < inputs; ++k) {
    const F w = at(staged, k, slice);
    low = minimum(low, w);
    high = maximum(high, w);
    sum += w;
    squares += w * w;
  }
  const F n = splat(static_cast<float>(inputs));
  const F middle = (low + high) * splat(0.5f);
  const F spread = symmetric ? squares : maximum(squares - sum * sum / n, F{});
  Search<symmetric> best{staged, slice, inputs, sum, spread, splat(__builtin_inff()), {F{}, symmetric ? F{} : middle}};
  if constexpr (symmetric) {
    // The integers reach -8 but only +7: the side with the larger magnitude gets the -8, by the scale's sign, or the +7.
    const F extreme = select(-low > high, low, high);
    constexpr float reaches[] = {-8.4f, -7.6f, -6.8f, 7.5f, 6.7f};
    for (float reach : reaches) best.look_at(rounded<true>(extreme * splat(1.0f / reach), F{}));
    best.look_at(best.grid);
    constexpr float neighbours[] = {1.04f, 0.96f};
    for (float factor : neighbours) best.look_at(rounded<true>(best.grid.scale * splat(factor), F{}));
  } else {
    const auto around = [](F centre, F scale) { return rounded<false>(scale, centre - scale * splat(7.5f)); };
    constexpr float spans[] = {1.0f, 0.9f, 0.8f};
    for (float span : spans) best.look_at(around(middle, (high - low) * splat(span / 15.0f)));
    best.look_at(best.grid);
    constexpr float neighbours[] = {1.03f, 0.97f};
    for (float factor : neighbours) {
      best.look_at(around(best.grid.minimum + best.grid.scale * splat(7.5f), best.grid.scale * splat(factor)));
      best.look_at(best.grid);
    }
  }
  return best.grid;
}

void pack_int4(const PackArgs& a, const float* staged) {
  const Layout& layout = *a.layout;
  const bool symmetric = layout.symmetric;
  F largest[kSlices] = {};
  Grid grids[kSlices] = {};
  F power = {};
  for (std::int64_t unit = 0; unit < layout.units; ++unit) {
    std::byte* data = a.panel + unit * layout.unit_bytes;
    auto* scales = reinterpret_cast<std::uint16_t*>(data + layout.data_bytes);
    std::uint16_t* minima = scales + layout.unit_groups * kPanelColumns;
    const float* inputs = staged + unit * kUnitInputs * kPanelColumns;
    for (int slice = 0; slice < kSlices; ++slice) {
      I nibbles[kUnitInputs];
      for (int begin = 0; begin < kUnitInputs; begin += 32) {
        const std::int64_t first = unit * kUnitInputs + begin;
        if (first % layout.group == 0) {
          std::int64_t members = layout.k - first;  // padding must not pull the grid towards zero
          if (members > layout.group) members = layout.group;
          const float* group = staged + first * kPanelColumns;
          if (members <= 0) {
            grids[slice] = Grid{};
          } else {
            grids[slice] = symmetric ? search<true>(group, slice, static_cast<int>(members))
                                    : search<false>(group, slice, static_cast<int>(members));
          }
        }
        const Grid& grid = grids[slice];
        const int group_in_unit = layout.unit_groups == 2 ? begin / 32 : 0;
        store(scales + group_in_unit * kPanelColumns + slice * kLanes, to_bf16(grid.scale));
        if (!symmetric) store(minima + group_in_unit * kPanelColumns + slice * kLanes, to_bf16(grid.minimum));
        const F inverse = reciprocal_or_zero(grid.scale);
        const F offset = -grid.minimum * inverse;
        for (int k = begin; k < begin + 32; ++k) {
          const F w = at(inputs, k, slice);
          const I q = round_to_int(minimum(maximum(w * inverse + offset, F{}), splat(15.0f)));
          nibbles[k] = q;
          if (first + k - begin >= layout.k) continue;
          const F value = grid.scale * to_float(q) + grid.minimum;
          largest[slice] = maximum(magnitude(value), largest[slice]);
          power += value * value;
        }
      }
      std::byte* to = data + slice_offset(slice, 512, 4);
      for (int row = 0; row < 8; ++row, to += 64) {
        I bytes = {};
        for (int i = 0; i < 4; ++i) {
          bytes |= (nibbles[row * 4 + i] | (nibbles[32 + row * 4 + i] << 4)) << (8 * i);
        }
        store(to, bytes);
      }
      if ((unit + 1) * kUnitInputs % kChunkInputs == 0 || unit + 1 == layout.units) {
        const std::int64_t chunk = unit * kUnitInputs / kChunkInputs;
        store(a.side + chunk * a.side_stride + slice * kLanes, largest[slice] * splat(1.0f / 127.0f));
        largest[slice] = F{};
      }
    }
  }
  if (a.power != nullptr) *a.power += sum_lanes(power);
}

// ---- mxfp4: w = value(code) * 2^(e - 127), codes sign | 0, .5, 1, 1.5, 2, 3, 4, 6

// Nearest code (ties to the even one) of x, which is in units of the scale.
NUMAGRAFT_INLINE I mxfp4_code(F x) {
  const F m = magnitude(x);
  I code = {};
  code -= (m > splat(0.25f));
  code -= (m >= splat(0.75f));
  code -= (m > splat(1.25f));
  code -= (m >= splat(1.75f));
  code -= (m > splat(2.5f));
  code -= (m >= splat(3.5f));
  code -= (m > splat(5.0f));
  return code | (((I)x >> 28) & 8);
}

NUMAGRAFT_INLINE I mxfp4_exponent(const float* staged, int slice, int inputs) {
  F largest = {};
  for (int k = 0; k < inputs; ++k) largest = maximum(magnitude(at(staged, k, slice)), largest);
  // The exponent of the OCP specification (largest power of two in the group over that of 6), or one more where the
  // values it clips cost more than the coarser step.
  const I base = clamp(((I)largest >> 23) - 2, 1, 253);
  F error[2] = {};
  for (int candidate = 0; candidate < 2; ++candidate) {
    const F scale = power_of_two(base + candidate);
    const F inverse = splat(1.0f) / scale;
    for (int k = 0; k < inputs; ++k) {
      const F w = at(staged, k, slice);
      const F d = w - e2m1_value(mxfp4_code(w * inverse)) * scale;
      error[candidate] += d * d;
    }
  }
  return base - (error[1] < error[0]);
}

// `coded`: staged holds codes, and the source the exponents.
template <bool coded>
void pack_mxfp4(const PackArgs& a, const float* staged) {
  const Layout& layout = *a.layout;
  F largest[kSlices] = {};
  F power = {};
  for (std::int64_t unit = 0; unit < layout.units; ++unit) {
    std::byte* data = a.panel + unit * layout.unit_bytes;
    auto* exponents = reinterpret_cast<std::uint8_t*>(data + layout.data_bytes);
    const float* inputs = staged + unit * kUnitInputs * kPanelColumns;
    for (int slice = 0; slice < kSlices; ++slice) {
      I nibbles[kUnitInputs];
      for (int group = 0; group < 2; ++group) {
        const std::int64_t first = unit * kUnitInputs + group * 32;
        I exponent = {};
        if constexpr (coded) {
          const std::int64_t column = a.first_input + first;
          if (column < a.source->columns) exponent = mxfp4_exponents(a, a.first_row + slice * kLanes, column);
        } else {
          exponent = mxfp4_exponent(inputs + group * 32 * kPanelColumns, slice, 32);
        }
        store(exponents + group * kPanelColumns + slice * kLanes, __builtin_convertvector(exponent, U8));
        const F scale = power_of_two(exponent);
        const F inverse = splat(1.0f) / scale;
        for (int k = group * 32; k < group * 32 + 32; ++k) {
          nibbles[k] = coded ? (I)at(inputs, k, slice) : mxfp4_code(at(inputs, k, slice) * inverse);
          const F value = e2m1_value(nibbles[k]) * scale;
          largest[slice] = maximum(magnitude(value), largest[slice]);
          power += value * value;
        }
      }
      std::byte* to = data + slice_offset(slice, 512, 4);
      for (int row = 0; row < 8; ++row, to += 64) {
        I bytes = {};
        for (int i = 0; i < 4; ++i) bytes |= (nibbles[row * 4 + i] | (nibbles[32 + row * 4 + i] << 4)) << (8 * i);
        store(to, bytes);
      }
      if ((unit + 1) * kUnitInputs % kChunkInputs == 0 || unit + 1 == layout.units) {
        const std::int64_t chunk = unit * kUnitInputs / kChunkInputs;
        store(a.side + chunk * a.side_stride + slice * kLanes, largest[slice] * splat(1.0f / 127.0f));
        largest[slice] = F{};
      }
    }
  }
  if (a.power != nullptr) *a.power += sum_lanes(power);
}

// ---- fp8 (e4m3): one scale per 128 inputs and, packed from floats, per panel

NUMAGRAFT_INLINE U fp8_code(F x) {
  const U bits = (U)magnitude(minimum(maximum(x, splat(-448.0f)), splat(448.0f)));
  const U normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3);
  const U subnormal = (U)round_to_int((F)bits * splat(512.0f));
  const U small = (U)((F)bits < splat(0x1p-6f));
  return ((small & subnormal) | (~small & normal)) | (((U)x >> 24) & 0x80);
}

void store_fp8(std::byte* to, U even, U odd) { store(to, __builtin_convertvector(even | (odd << 8), U16)); }

// Codes and scales of the source, in the order of the layout.
void pack_fp8_coded(const PackArgs& a, const float* staged) {
  const Layout& layout = *a.layout;
  for (std::int64_t block = 0; block < layout.scale_rows; ++block) {
    const std::int64_t column = a.first_input + block * kFp8Block;
    for (int slice = 0; slice < kSlices; ++slice) {
      const F scales = column < a.source->columns ? fp8_scales(a, a.first_row + slice * kLanes, column) : F{};
      store(a.side + block * a.side_stride + slice * kLanes, scales);
    }
  }
  for (std::int64_t k = 0; k < layout.units * kUnitInputs; k += 32) {
    for (int slice = 0; slice < kSlices; ++slice) {
      std::byte* to = a.panel + (k / 32) * 1024 + slice_offset(slice, 512, 2);
      for (int row = 0; row < 16; ++row, to += 32) store_fp8(to, (U)at(staged, k + 2 * row, slice), (U)at(staged, k + 2 * row + 1, slice));
    }
  }
}

void pack_fp8(const PackArgs& a, const float* staged) {
  const Layout& layout = *a.layout;
  for (std::int64_t block = 0; block < layout.scale_rows; ++block) {
    const std::int64_t first = block * kFp8Block;
    const std::int64_t last = first + kFp8Block < layout.units * kUnitInputs ? first + kFp8Block : layout.units * kUnitInputs;
    F lanes = {};
    for (std::int64_t k = first; k < last; ++k) {
      for (int slice = 0; slice < kSlices; ++slice) lanes = maximum(magnitude(at(staged, k, slice)), lanes);
    }
    float largest = 0;
    for (int lane = 0; lane < kLanes; ++lane) largest = lanes[lane] > largest ? lanes[lane] : largest;
    const F scale = splat(largest / 448.0f);
    const F inverse = reciprocal_or_zero(scale);
    for (int slice = 0; slice < kSlices; ++slice) store(a.side + block * a.side_stride + slice * kLanes, scale);
    for (std::int64_t k = first; k < last; k += 32) {
      for (int slice = 0; slice < kSlices; ++slice) {
        std::byte* to = a.panel + (k / 32) * 1024 + slice_offset(slice, 512, 2);
        for (int row = 0; row < 16; ++row, to += 32) {
          store_fp8(to, fp8_code(at(staged, k + 2 * row, slice) * inverse), fp8_code(at(staged, k + 2 * row + 1, slice) * inverse));
        }
      }
    }
  }
}

}  // namespace

namespace {

void gather_any(const PackArgs& a, float* staged) {
  switch (a.source->dtype) {
    case DType::f32:
      return gather<DType::f32, false>(a, staged);
    case DType::bf16:
      return gather<DType::bf16, false>(a, staged);
    case DType::f16:
      return gather<DType::f16, false>(a, staged);
    case DType::e4m3:
      return gather<DType::e4m3, false>(a, staged);
    case DType::e2m1:
      return gather<DType::e2m1, false>(a, staged);
  }
}

}  // namespace

void pack(const PackArgs& a) {
  auto* staged = reinterpret_cast<float*>(a.staged);
  if (a.layout->kind == WeightKind::fp8 && a.source->dtype == DType::e4m3) {
    gather<DType::e4m3, true>(a, staged);
    return pack_fp8_coded(a, staged);
  }
  if (a.layout->kind == WeightKind::mxfp4 && a.source->dtype == DType::e2m1) {
    gather<DType::e2m1, true>(a, staged);
    return pack_mxfp4<true>(a, staged);
  }
  F range[kSlices] = {};
  if (a.layout->kind == WeightKind::int8) {
    PackArgs other = a;
    for (other.first_input = 0; other.first_input < a.source->columns; other.first_input += a.layout->k) {
      if (other.first_input == a.first_input && a.layout->k >= a.source->columns) break;  // there is no other shard
      gather_any(other, staged);
      widen_range(*a.layout, staged, range);
    }
  }
  gather_any(a, staged);
  switch (a.layout->kind) {
    case WeightKind::bf16:
      return pack_bf16(a, staged);
    case WeightKind::int8:
      widen_range(*a.layout, staged, range);
      return pack_int8(a, staged, range);
    case WeightKind::int4:
      return pack_int4(a, staged);
    case WeightKind::fp8:
      return pack_fp8(a, staged);
    case WeightKind::mxfp4:
      return pack_mxfp4<false>(a, staged);
  }
}

}  // namespace numagraft::NUMAGRAFT_ISA

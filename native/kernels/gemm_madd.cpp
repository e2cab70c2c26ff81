// AVX2 and AVX-512 without VNNI: 16-bit multiply-adds. int8 weights are widened and meet the inputs' whole 16-bit integers;
// nibbles times int8 halves are summed in 16 bits over a group, which cannot overflow: 8 x 2 x 15 x 127 = 30480.
#include "kernels/gemm_float.h"
#include "kernels/kernel_table.h"

namespace numagraft::NUMAGRAFT_ISA {
namespace {

#if defined(__AVX512BW__)
constexpr int kInt8Rows = 6;
constexpr int kNibbleRows = 8;
#else
constexpr int kInt8Rows = 3;
constexpr int kNibbleRows = 4;
#endif
constexpr std::int64_t kChunkUnits = kChunkInputs / kUnitInputs;
constexpr int kFewStrips = 4;

struct Strip {
  const RowBlock* block;
  int first_row;
  std::int64_t first_unit;
  std::int64_t last_unit;
  bool fresh;
};

// The sums of one row and tile: what belongs together added up, stored as integers or, at the panel's end, scaled.
template <int vectors>
NG_INLINE void finish_int8(const GemmArgs& a, std::int64_t panel, const Strip& strip, bool last, int r, int t, const V (&sum)[vectors],
                           float* c) {
  const RowBlock& block = *strip.block;
  float* to = c + r * kPanelColumns + t * kTileColumns;
  alignas(64) std::int32_t partial[2 * kTileColumns];
  std::int32_t total[kTileColumns];
  for (int v = 0; v < vectors; ++v) __builtin_memcpy(partial + v * kInt32s, &sum[v], kVectorBytes);
  if (strip.first_unit > 0) {
    __builtin_memcpy(total, to, sizeof total);
  } else {
    __builtin_memset(total, 0, sizeof total);
  }
  const std::int32_t offset =
      last ? static_cast<std::int32_t>(static_cast<std::uint32_t>(block.sum[strip.first_row + r]) * kInt8Offset) : 0;
  for (int column = 0; column < kTileColumns; ++column) {
    total[column] = static_cast<std::int32_t>(
        static_cast<std::uint32_t>(total[column]) + static_cast<std::uint32_t>(partial[2 * column]) +
        static_cast<std::uint32_t>(partial[2 * column + 1]) - static_cast<std::uint32_t>(offset));
  }
  if (!last) {
    __builtin_memcpy(to, total, sizeof total);
    return;
  }
  const float scale = block.scale[strip.first_row + r];
  const float* side = panel_side(a, panel) + t * kTileColumns;
  for (int column = 0; column < kTileColumns; ++column) {
    to[column] = static_cast<float>(total[column]) * (side[column] * scale);
  }
}

// Widened, 4 inputs of a column fill 64 bits, so a multiply-add leaves two partial sums per column: twice the vectors.
// Tiles are read side by side where there are registers for the sums of both: memory likes that.
template <int rows>
void int8_rows(const GemmArgs& a, std::int64_t panel, const Strip& strip, float* c) {
  constexpr int vectors = 2 * kParts;
  constexpr int tiles = rows * vectors <= (kParts == 1 ? 8 : 4) ? 2 : 1;
  const Layout& layout = *a.layout;
  const RowBlock& block = *strip.block;
  const std::byte* weights = a.panel + panel * layout.panel_bytes;
  const bool last = strip.last_unit == layout.units;
  if (strip.fresh) prefetch_scales(panel_side(a, panel));
  for (int first = 0; first < 2; first += tiles) {
    V sum[rows][tiles][vectors];
    for (int r = 0; r < rows; ++r) {
      for (int t = 0; t < tiles; ++t) {
        for (int v = 0; v < vectors; ++v) sum[r][t][v] = zero();
      }
    }
    for (std::int64_t unit = strip.first_unit; unit < strip.last_unit; ++unit) {
      const std::byte* w = weights + unit * layout.unit_bytes;
      const std::byte* x = block.low + (unit * block.stride_rows + strip.first_row) * kUnitInputs * 2;
#pragma GCC unroll 2
      for (int i = 0; i < 16; ++i) {
        if (strip.fresh && first == 0) {
          prefetch_line(w + i * 64);
          prefetch_line(w + 1024 + i * 64);
        }
        V inputs[rows];
        for (int r = 0; r < rows; ++r) {
          long long four;
          __builtin_memcpy(&four, x + (r * kUnitInputs + i * 4) * 2, 8);
          inputs[r] = repeat64(four);
        }
#pragma GCC unroll 2
        for (int t = 0; t < tiles; ++t) {
#pragma GCC unroll 4
          for (int v = 0; v < vectors; ++v) {
            const V wide = widen_bytes(w + (first + t) * 1024 + i * 64 + v * (kVectorBytes / 2));
            for (int r = 0; r < rows; ++r) sum[r][t][v] = add32(sum[r][t][v], madd(wide, inputs[r]));
          }
        }
      }
    }
    for (int r = 0; r < rows; ++r) {
      for (int t = 0; t < tiles; ++t) finish_int8<vectors>(a, panel, strip, last, r, first + t, sum[r][t], c);
    }
  }
}

// Vectors [first, first + count) of a unit's columns: sum[row][vector][group of 32 inputs].
template <WeightKind kind, int rows, int count>
NG_INLINE void nibble_parts(const std::byte* w, int first, const std::byte* x, V table, bool fresh, V (&sum)[rows][count][2]) {
  constexpr int run = kind == WeightKind::mxfp4 ? 4 : 8;  // 8 x 2 x 24 x 127 would overflow
  const V mask = ones8(15);
  for (int begin = 0; begin < 8; begin += run) {
    V narrow[rows][count][2];
    for (int r = 0; r < rows; ++r) {
      for (int p = 0; p < count; ++p) narrow[r][p][0] = narrow[r][p][1] = zero();
    }
#pragma GCC unroll 8
    for (int i = begin; i < begin + run; ++i) {
#pragma GCC unroll 4
      for (int p = 0; p < count; ++p) {
        const std::byte* from = w + (first + p) / kParts * 512 + i * 64 + (first + p) % kParts * kVectorBytes;
        if (fresh && (first + p) % kParts == 0) prefetch_line(from);
        const V pair = load_bytes(from);
        V w0 = bit_and(pair, mask);
        V w1 = bit_and(right4(pair), mask);
        if constexpr (kind == WeightKind::mxfp4) {
          w0 = look_up(table, w0);
          w1 = look_up(table, w1);
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
          int four[2];
          __builtin_memcpy(&four[0], x + r * kUnitInputs + i * 4, 4);
          __builtin_memcpy(&four[1], x + r * kUnitInputs + 32 + i * 4, 4);
          narrow[r][p][0] = add16(narrow[r][p][0], maddubs(w0, repeat32(four[0])));
          narrow[r][p][1] = add16(narrow[r][p][1], maddubs(w1, repeat32(four[1])));
        }
      }
    }
    for (int r = 0; r < rows; ++r) {
      for (int p = 0; p < count; ++p) {
        for (int g = 0; g < 2; ++g) sum[r][p][g] = add32(sum[r][p][g], madd(narrow[r][p][g], ones16()));
      }
    }
  }
}

template <WeightKind kind, bool symmetric, int rows>
void nibble_rows(const GemmArgs& a, std::int64_t panel, const Strip& strip, float* c) {
  constexpr float offset = kind == WeightKind::mxfp4 ? kMxfp4Offset : 8.0f;
  // A single row reads both tiles side by side: memory likes that. More rows lack the registers.
  constexpr int together = rows == 1 ? 2 * kParts : 1;
  const Layout& layout = *a.layout;
  const RowBlock& block = *strip.block;
  const std::byte* weights = a.panel + panel * layout.panel_bytes;
  const V table = repeat128(_mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
  std::uint8_t tiles = 0;
  if (strip.first_row < 16) tiles |= 1;
  if (strip.first_row + rows > 16) tiles |= 2;
  const bool last = strip.last_unit == layout.units;
  for (std::int64_t unit = strip.first_unit; unit < strip.last_unit; ++unit) {
    const std::byte* w = weights + unit * layout.unit_bytes;
    const std::int64_t at = unit * block.stride_rows + strip.first_row;
    const std::byte* low = block.low + at * kUnitInputs;
    const std::byte* high = block.high + at * kUnitInputs;
    const float* group_sum = block.group_sum + at * 2;
    const std::byte* scales = w + layout.data_bytes;
    const bool flagged = block.flags[unit] & tiles;
    if (strip.fresh) {
      for (std::int64_t line = layout.data_bytes; line < layout.unit_bytes; line += 64) prefetch_line(w + line);
    }
    for (int first = 0; first < 2 * kParts; first += together) {
      V sum[rows][together][2];
      for (int r = 0; r < rows; ++r) {
        for (int p = 0; p < together; ++p) sum[r][p][0] = sum[r][p][1] = zero();
      }
      if (flagged) {
        nibble_parts<kind, rows, together>(w, first, high, table, strip.fresh, sum);
        for (int r = 0; r < rows; ++r) {
          for (int p = 0; p < together; ++p) {
            for (int g = 0; g < 2; ++g) sum[r][p][g] = left7(sum[r][p][g]);
          }
        }
      }
      nibble_parts<kind, rows, together>(w, first, low, table, strip.fresh && !flagged, sum);
      for (int p = 0; p < together; ++p) {
        const int column = (first + p) * kInt32s;
        VF scale[2];
        VF minimum[2];
        for (int g = 0; g < 2; ++g) {
          const int index = (layout.unit_groups == 2 ? g : 0) * kPanelColumns + column;
          if constexpr (kind == WeightKind::mxfp4) {
            scale[g] = mul(power_of_two(scales + index), repeat(0.5f));
          } else {
            const auto* halves = reinterpret_cast<const std::uint16_t*>(scales);
            scale[g] = widen_bf16(halves + index);
            if constexpr (!symmetric) minimum[g] = widen_bf16(halves + layout.unit_groups * kPanelColumns + index);
          }
        }
        for (int r = 0; r < rows; ++r) {
          float* to = c + r * kPanelColumns + column;
          VF total = unit == 0 ? zero_float() : load_floats(to);
          for (int g = 0; g < 2; ++g) {
            const VF inputs = repeat(group_sum[r * 2 + g]);
            VF value = to_floats(sum[r][p][g]);
            if constexpr (symmetric) value = fma(inputs, repeat(-offset), value);
            total = fma(scale[g], value, total);
            if constexpr (!symmetric) total = fma(minimum[g], inputs, total);
          }
          if (last && unit + 1 == layout.units) total = mul(total, repeat(block.scale[strip.first_row + r]));
          store_floats(to, total);
        }
      }
    }
  }
}

struct Int8 {
  static constexpr int most_rows = kInt8Rows;
  static constexpr std::int64_t few_strip_units = kChunkUnits;  // finish_int8 takes long
  template <int rows>
  static void run(const GemmArgs& a, std::int64_t panel, const Strip& strip, float* c) {
    int8_rows<rows>(a, panel, strip, c);
  }
};

template <WeightKind kind, bool symmetric>
struct Nibbles {
  static constexpr int most_rows = kNibbleRows;
  static constexpr std::int64_t few_strip_units = 2;
  template <int rows>
  static void run(const GemmArgs& a, std::int64_t panel, const Strip& strip, float* c) {
    nibble_rows<kind, symmetric, rows>(a, panel, strip, c);
  }
};

template <class Kernel, int rows>
NG_INLINE void run_strip(int count, const GemmArgs& a, std::int64_t panel, const Strip& strip, float* c) {
  if constexpr (rows > 1) {
    if (count < rows) return run_strip<Kernel, rows - 1>(count, a, panel, strip, c);
  }
  Kernel::template run<rows>(a, panel, strip, c);
}

// Strips of nearly equal heights, all of them over one chunk of a panel before the next: the chunk stays in L1. While few
// strips go over a chunk memory is what they wait for, and it must not fall idle behind the first: small chunks.
template <class Kernel>
void gemm_strips(const GemmArgs& a) {
  int all_strips = 0;
  for (int b = 0; b < a.block_count; ++b) all_strips += (a.blocks[b].rows + Kernel::most_rows - 1) / Kernel::most_rows;
  const std::int64_t chunk = all_strips == 1 ? a.last_unit - a.first_unit : all_strips <= kFewStrips ? Kernel::few_strip_units : kChunkUnits;
  for (std::int64_t panel = 0; panel < a.panels; ++panel) {
    for (std::int64_t first = a.first_unit; first < a.last_unit; first += chunk) {
      const std::int64_t last = first + chunk < a.last_unit ? first + chunk : a.last_unit;
      float* c = a.c + panel * a.c_panel_stride;
      for (int b = 0; b < a.block_count; ++b) {
        const RowBlock& block = a.blocks[b];
        const int strips = (block.rows + Kernel::most_rows - 1) / Kernel::most_rows;
        int row = 0;
        for (int i = 0; i < strips; ++i) {
          const int count = (block.rows - row + strips - i - 1) / (strips - i);
          run_strip<Kernel, Kernel::most_rows>(count, a, panel, Strip{&block, row, first, last, b == 0 && i == 0},
                                               c + row * kPanelColumns);
          row += count;
        }
        c += block.rows * kPanelColumns;
      }
    }
  }
}

}  // namespace

void gemm(const GemmArgs& a) {
  switch (a.layout->kind) {
    case WeightKind::bf16:
      return gemm_float<WeightKind::bf16>(a);
    case WeightKind::fp8:
      return gemm_float<WeightKind::fp8>(a);
    case WeightKind::int8:
      return gemm_strips<Int8>(a);
    case WeightKind::mxfp4:
      return gemm_strips<Nibbles<WeightKind::mxfp4, true>>(a);
    case WeightKind::int4:
      return a.layout->symmetric ? gemm_strips<Nibbles<WeightKind::int4, true>>(a)
                                 : gemm_strips<Nibbles<WeightKind::int4, false>>(a);
  }
}

}  // namespace numagraft::NUMAGRAFT_ISA

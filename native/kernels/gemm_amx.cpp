// AMX tiles: 16 x 64 bytes times 64 bytes x 16. A panel is worked through in chunks whose weights stay in L1; int4, mxfp4
// and fp8 chunks are expanded there first. A single row is left to the vector kernels: it waits for memory anyway.
#include "kernels/gemm_single.h"
#include "kernels/gemm_vnni.h"
#include "kernels/kernel_table.h"
#include "kernels/simd.h"

namespace numagraft::NUMAGRAFT_ISA {
namespace {

// gcc 12 declares neither the memory these touch nor the whole of the configuration, and may drop or move stores: hence
// inline assembly with full operands (docs/kernels.md).
struct alignas(64) TileConfig {
  std::uint8_t palette;
  std::uint8_t start_row;
  std::uint8_t reserved[14];
  std::uint16_t row_bytes[16];
  std::uint8_t rows[16];
};

#define TILE_LOAD(tile, address, stride) \
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile ::"r"(address), "r"(static_cast<std::int64_t>(stride)) : "memory")
#define TILE_STORE(tile, address, stride) \
  __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(address), "r"(static_cast<std::int64_t>(stride)) : "memory")
#define TILE_ZERO(tile) __asm__ volatile("tilezero %%tmm" #tile ::)
#define TILE_MULTIPLY(instruction, to, inputs, weights) \
  __asm__ volatile(#instruction " %%tmm" #weights ", %%tmm" #inputs ", %%tmm" #to ::)

void configure_tiles() {
  TileConfig config{};
  config.palette = 1;
  for (int tile = 0; tile < 8; ++tile) {
    config.row_bytes[tile] = 64;
    config.rows[tile] = 16;
  }
  __asm__ volatile("ldtilecfg %0" ::"m"(config));
}

constexpr std::int64_t kRowBytes = kPanelColumns * 4;  // of c

// Tiles 0..3 hold the results of row tile / column tile 0/0, 0/1, 1/0, 1/1; 4 and 5 the inputs, 6 and 7 the weights.
template <bool two>
NUMAGRAFT_INLINE void clear_results() {
  TILE_ZERO(0);
  TILE_ZERO(1);
  if constexpr (two) {
    TILE_ZERO(2);
    TILE_ZERO(3);
  }
}
template <bool two>
NUMAGRAFT_INLINE void load_results(const void* c) {
  const auto* p = static_cast<const std::byte*>(c);
  TILE_LOAD(0, p, kRowBytes);
  TILE_LOAD(1, p + 64, kRowBytes);
  if constexpr (two) {
    TILE_LOAD(2, p + 16 * kRowBytes, kRowBytes);
    TILE_LOAD(3, p + 16 * kRowBytes + 64, kRowBytes);
  }
}
template <bool two>
NUMAGRAFT_INLINE void store_results(void* c) {
  auto* p = static_cast<std::byte*>(c);
  TILE_STORE(0, p, kRowBytes);
  TILE_STORE(1, p + 64, kRowBytes);
  if constexpr (two) {
    TILE_STORE(2, p + 16 * kRowBytes, kRowBytes);
    TILE_STORE(3, p + 16 * kRowBytes + 64, kRowBytes);
  }
}

enum class Multiply { by_unsigned, by_signed, bf16 };

template <Multiply how, bool two>
NUMAGRAFT_INLINE void step(const std::byte* inputs, std::int64_t input_stride, const std::byte* weights) {
  TILE_LOAD(6, weights, 64);
  TILE_LOAD(4, inputs, input_stride);
  TILE_LOAD(7, weights + 1024, 64);
  if constexpr (two) TILE_LOAD(5, inputs + 16 * input_stride, input_stride);
  if constexpr (how == Multiply::by_unsigned) {
    TILE_MULTIPLY(tdpbsud, 0, 4, 6);
    TILE_MULTIPLY(tdpbsud, 1, 4, 7);
    if constexpr (two) {
      TILE_MULTIPLY(tdpbsud, 2, 5, 6);
      TILE_MULTIPLY(tdpbsud, 3, 5, 7);
    }
  } else if constexpr (how == Multiply::by_signed) {
    TILE_MULTIPLY(tdpbssd, 0, 4, 6);
    TILE_MULTIPLY(tdpbssd, 1, 4, 7);
    if constexpr (two) {
      TILE_MULTIPLY(tdpbssd, 2, 5, 6);
      TILE_MULTIPLY(tdpbssd, 3, 5, 7);
    }
  } else {
    TILE_MULTIPLY(tdpbf16ps, 0, 4, 6);
    TILE_MULTIPLY(tdpbf16ps, 1, 4, 7);
    if constexpr (two) {
      TILE_MULTIPLY(tdpbf16ps, 2, 5, 6);
      TILE_MULTIPLY(tdpbf16ps, 3, 5, 7);
    }
  }
}

// Asks for what lies one chunk ahead in the stream, a share of it with every step over this chunk: with many rows per
// chunk memory would otherwise idle while the rows after the first are multiplied, and requests that come faster than
// memory answers are dropped.
struct Ahead {
  const std::byte* from;     // the byte one chunk after the unit that is multiplied first
  std::int64_t unit_bytes;
  std::int64_t first_line;   // this block's share of a unit's cache lines
  std::int64_t last_line;

  // A single block waits for memory all along, and memory answers best when it is asked shortly before.
  Ahead(const std::byte* weights, std::int64_t chunk_bytes, std::int64_t bytes, int block, int blocks)
      : from(weights + (blocks == 1 ? kPrefetchAhead : chunk_bytes)),
        unit_bytes(bytes),
        first_line(bytes / 64 * block / blocks),
        last_line(bytes / 64 * (block + 1) / blocks) {}
  NUMAGRAFT_INLINE void ask(const Ahead& a, std::int64_t unit) {
    const std::byte* p = a.from + unit * a.unit_bytes + a.first_line * 64;
    const std::byte* end = a.from + unit * a.unit_bytes + a.last_line * 64;
    for (; p + 256 <= end; p += 256) {
      _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1);
      _mm_prefetch(reinterpret_cast<const char*>(p + 64), _MM_HINT_T1);
      _mm_prefetch(reinterpret_cast<const char*>(p + 128), _MM_HINT_T1);
      _mm_prefetch(reinterpret_cast<const char*>(p + 192), _MM_HINT_T1);
    }
    for (; p < end; p += 64) _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1);
  }
};

template <bool two>
NUMAGRAFT_INLINE bool flagged(const RowBlock& block, std::int64_t unit) {
  return block.flags[unit] & (two ? 3 : 1);
}

// The high halves of a block times units [first, last), which are few; 2 KB units at `weights` + stride * unit. False, and
// nothing stored, where there are none.
template <Multiply how, bool two>
NUMAGRAFT_INLINE bool high_products(const RowBlock& block, const std::byte* weights, std::int64_t unit_bytes,
                                    std::int64_t first, std::int64_t last, std::int32_t* products) {
  const std::int64_t step_bytes = std::int64_t{block.stride_rows} * kUnitInputs;
  bool any = false;
  for (std::int64_t unit = first; unit < last; ++unit) {
    if (!flagged<two>(block, unit)) continue;
    if (!any) clear_results<two>();
    any = true;
    step<how, two>(block.high + unit * step_bytes, kUnitInputs, weights + (unit - first) * unit_bytes);
  }
  if (any) store_results<two>(products);
  return any;
}

template <bool two>
void int8_block(const GemmArgs& a, std::int64_t panel, int index, std::int64_t first, std::int64_t last, float* c) {
  const Layout& layout = *a.layout;
  const RowBlock& block = a.blocks[index];
  const std::int64_t step_bytes = std::int64_t{block.stride_rows} * kUnitInputs;
  const std::byte* weights = a.panel + panel * layout.panel_bytes;
  const std::byte* w = weights + first * layout.unit_bytes;
  const Ahead ahead(w, kChunkUnits * layout.unit_bytes, layout.unit_bytes, index, a.block_count);
  if (index == 0) prefetch_scales(panel_side(a, panel));
  const bool whole = block.rows == (two ? 32 : 16);  // otherwise c has no room for the padded rows
  const bool resumed = whole && first > 0;
  if (resumed) {
    load_results<two>(c);
  } else {
    clear_results<two>();
  }
  for (std::int64_t unit = 0; unit < last - first; ++unit) {
    Ahead::ask(ahead, unit);
    step<Multiply::by_unsigned, two>(block.low + (first + unit) * step_bytes, kUnitInputs, w + unit * 2048);
  }
  const bool end = last == layout.units;
  if (whole && last < a.last_unit) {
    store_results<two>(c);
    return;
  }
  alignas(64) std::int32_t sums[kBlockRows * kPanelColumns];
  alignas(64) std::int32_t high[kBlockRows * kPanelColumns];
  store_results<two>(sums);
  // Once per call, when the panel is in L2: high halves are few, and a chunk of its own for each would cost more.
  const bool any = last == a.last_unit && high_products<Multiply::by_unsigned, two>(block, weights + a.first_unit * layout.unit_bytes,
                                                                                     layout.unit_bytes, a.first_unit, last, high);
  const F side[2] = {load<F>(panel_side(a, panel)), load<F>(panel_side(a, panel) + kLanes)};
  for (int row = 0; row < block.rows; ++row) {
    const auto offset = static_cast<std::int32_t>(static_cast<std::uint32_t>(block.sum[row]) * kInt8Offset);
    const F scale = splat(block.scale[row]);
    for (int t = 0; t < 2; ++t) {
      float* to = c + row * kPanelColumns + t * kLanes;
      I total = load<I>(sums + row * kPanelColumns + t * kLanes);
      if (first > 0 && !resumed) total += load<I>(to);
      if (any) total += load<I>(high + row * kPanelColumns + t * kLanes) << 7;
      if (end) {
        store(to, to_float(total - offset) * (side[t] * scale));
      } else {
        store(to, total);
      }
    }
  }
}

// ---- int4 and mxfp4: a chunk re-rounded to int8, one scale per column and chunk

// 256 / scale of 16 columns of a chunk, 0 for a column of zeros.
NUMAGRAFT_INLINE __m512 inverse_scales(const float* side) {
  const __m512 scale = _mm512_loadu_ps(side);
  return _mm512_maskz_div_ps(_mm512_cmp_ps_mask(scale, _mm512_setzero_ps(), _CMP_NEQ_OQ), _mm512_set1_ps(256.0f), scale);
}

template <WeightKind kind, bool symmetric>
NUMAGRAFT_INLINE void expand_unit(const Layout& layout, const std::byte* unit, const __m512 (&inverses)[2], std::byte* to) {
  const std::byte* scales = unit + layout.data_bytes;
  const __m512i mask = _mm512_set1_epi16(15);
  // bytes 1, 3, 5, ... of two registers in turn: of every 16-bit product its upper byte, even inputs before odd ones
  alignas(64) static const std::uint8_t kUpperBytes[64] = {
      1,  65, 3,  67, 5,  69, 7,  71, 9,  73, 11, 75, 13, 77,  15, 79,  17, 81,  19, 83,  21, 85,  23, 87,  25, 89,  27, 91,  29, 93,  31, 95,
      33, 97, 35, 99, 37, 101, 39, 103, 41, 105, 43, 107, 45, 109, 47, 111, 49, 113, 51, 115, 53, 117, 55, 119, 57, 121, 59, 123, 61, 125, 63, 127};
  const __m512i upper_bytes = _mm512_load_si512(kUpperBytes);
  const __m512i lookup = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12));
  for (int t = 0; t < 2; ++t) {
    const __m512 inverse = inverses[t];
    __m512i factor[2];
    __m512i offset[2];
    for (int g = 0; g < 2; ++g) {
      const int column = (layout.unit_groups == 2 ? g : 0) * kPanelColumns + t * kTileColumns;
      __m512 scale;
      __m512 minimum = _mm512_setzero_ps();
      if constexpr (kind == WeightKind::mxfp4) {
        const __m128i exponents = _mm_loadu_si128(reinterpret_cast<const __m128i*>(scales + column));
        scale = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu8_epi32(exponents), 23)), _mm512_set1_ps(0.5f));
      } else {
        const auto* halves = reinterpret_cast<const std::uint16_t*>(scales);
        scale = widen_bf16(halves + column);
        minimum = symmetric ? _mm512_mul_ps(scale, _mm512_set1_ps(-8.0f))
                            : widen_bf16(halves + layout.unit_groups * kPanelColumns + column);
      }
      // 8.8 fixed point, in both 16-bit halves of a column's lane; adding 128 rounds
      const __m512i s = _mm512_and_si512(_mm512_cvtps_epi32(_mm512_mul_ps(scale, inverse)), _mm512_set1_epi32(0xFFFF));
      const __m512i m = _mm512_and_si512(
          _mm512_add_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(minimum, inverse)), _mm512_set1_epi32(128)), _mm512_set1_epi32(0xFFFF));
      factor[g] = _mm512_or_si512(s, _mm512_slli_epi32(s, 16));
      offset[g] = _mm512_or_si512(m, _mm512_slli_epi32(m, 16));
    }
#pragma GCC unroll 8
    for (int row = 0; row < 8; ++row) {
      const __m512i v = _mm512_loadu_si512(unit + t * 512 + row * 64);
      __m512i even[2];
      __m512i odd[2];
      if constexpr (kind == WeightKind::mxfp4) {
        const __m512i bytes = _mm512_set1_epi8(15);
        const __m512i codes[2] = {_mm512_and_si512(v, bytes), _mm512_and_si512(_mm512_srli_epi16(v, 4), bytes)};
        for (int g = 0; g < 2; ++g) {
          const __m512i values = _mm512_shuffle_epi8(lookup, codes[g]);
          even[g] = _mm512_srai_epi16(_mm512_slli_epi16(values, 8), 8);
          odd[g] = _mm512_srai_epi16(values, 8);
        }
      } else {
        even[0] = _mm512_and_si512(v, mask);
        even[1] = _mm512_and_si512(_mm512_srli_epi16(v, 4), mask);
        odd[0] = _mm512_and_si512(_mm512_srli_epi16(v, 8), mask);
        odd[1] = _mm512_srli_epi16(v, 12);
      }
      for (int g = 0; g < 2; ++g) {
        const __m512i e = _mm512_add_epi16(_mm512_mullo_epi16(even[g], factor[g]), offset[g]);
        const __m512i o = _mm512_add_epi16(_mm512_mullo_epi16(odd[g], factor[g]), offset[g]);
        _mm512_store_si512(to + t * 1024 + g * 512 + row * 64, _mm512_permutex2var_epi8(e, upper_bytes, o));
      }
    }
  }
}

template <WeightKind kind, bool symmetric, bool two>
void rerounded_block(const GemmArgs& a, std::int64_t panel, int index, std::int64_t first, std::int64_t last, std::byte* expanded,
                     float* c) {
  constexpr std::int64_t early = 4;  // units that are expanded before the tiles need them
  const Layout& layout = *a.layout;
  const RowBlock& block = a.blocks[index];
  const std::int64_t step_bytes = std::int64_t{block.stride_rows} * kUnitInputs;
  const std::byte* w = a.panel + panel * layout.panel_bytes + first * layout.unit_bytes;
  const float* side = panel_side(a, panel) + first / kChunkUnits * kPanelColumns;
  const Ahead ahead(w, kChunkUnits * layout.unit_bytes, layout.unit_bytes, index, a.block_count);
  const std::int64_t units = last - first;
  clear_results<two>();
  const __m512 inverses[2] = {inverse_scales(side), inverse_scales(side + kTileColumns)};
  if (index == 0) {
    prefetch_scales(side + panel_side_floats(layout));
    for (std::int64_t unit = 0; unit < early && unit < units; ++unit) {
      expand_unit<kind, symmetric>(layout, w + unit * layout.unit_bytes, inverses, expanded + unit * 2048);
    }
  }
  for (std::int64_t unit = 0; unit < units; ++unit) {
    if (index == 0 && unit + early < units) {
      expand_unit<kind, symmetric>(layout, w + (unit + early) * layout.unit_bytes, inverses, expanded + (unit + early) * 2048);
    }
    Ahead::ask(ahead, unit);
    step<Multiply::by_signed, two>(block.low + (first + unit) * step_bytes, kUnitInputs, expanded + unit * 2048);
  }
  alignas(64) std::int32_t sums[kBlockRows * kPanelColumns];
  alignas(64) std::int32_t high[kBlockRows * kPanelColumns];
  store_results<two>(sums);
  const bool any = high_products<Multiply::by_signed, two>(block, expanded, 2048, first, last, high);
  const F scales[2] = {load<F>(side), load<F>(side + kLanes)};
  for (int row = 0; row < block.rows; ++row) {
    const F by = splat(block.scale[row]);
    for (int t = 0; t < 2; ++t) {
      float* to = c + row * kPanelColumns + t * kLanes;
      I total = load<I>(sums + row * kPanelColumns + t * kLanes);
      if (any) total += load<I>(high + row * kPanelColumns + t * kLanes) << 7;
      const F value = to_float(total) * (scales[t] * by);
      store(to, first > 0 ? load<F>(to) + value : value);
    }
  }
}

template <WeightKind kind, bool symmetric>
void gemm_rerounded(const GemmArgs& a) {
  alignas(64) std::byte expanded[kChunkInputs * kPanelColumns];
  prefetch_first_scales(a);
  for (std::int64_t panel = 0; panel < a.panels; ++panel) {
    for (std::int64_t first = a.first_unit; first < a.last_unit; first += kChunkUnits) {
      const std::int64_t last = first + kChunkUnits < a.last_unit ? first + kChunkUnits : a.last_unit;
      float* c = a.c + panel * a.c_panel_stride;
      for (int b = 0; b < a.block_count; ++b) {
        if (a.blocks[b].stride_rows > 16) {
          rerounded_block<kind, symmetric, true>(a, panel, b, first, last, expanded, c);
        } else {
          rerounded_block<kind, symmetric, false>(a, panel, b, first, last, expanded, c);
        }
        c += a.blocks[b].rows * kPanelColumns;
      }
    }
  }
}

void gemm_int8(const GemmArgs& a) {
  for (std::int64_t panel = 0; panel < a.panels; ++panel) {
    for (std::int64_t first = a.first_unit; first < a.last_unit; first += kChunkUnits) {
      const std::int64_t last = first + kChunkUnits < a.last_unit ? first + kChunkUnits : a.last_unit;
      float* c = a.c + panel * a.c_panel_stride;
      for (int b = 0; b < a.block_count; ++b) {
        if (a.blocks[b].stride_rows > 16) {
          int8_block<true>(a, panel, b, first, last, c);
        } else {
          int8_block<false>(a, panel, b, first, last, c);
        }
        c += a.blocks[b].rows * kPanelColumns;
      }
    }
  }
}

// ---- bf16 and fp8

constexpr std::int64_t kFloatChunkUnits = kChunkUnits / 2;

template <bool two>
void bf16_block(const std::byte* weights, const Ahead& ahead, const RowBlock& block, std::int64_t first, std::int64_t last, float* c) {
  const std::int64_t step_bytes = std::int64_t{block.stride_rows} * kUnitInputs * 2;
  alignas(64) float sums[kBlockRows * kPanelColumns];
  const bool whole = block.rows == (two ? 32 : 16);  // otherwise c has no room for the padded rows
  float* results = whole ? c : sums;
  if (first == 0) {
    clear_results<two>();
  } else {
    if (!whole) __builtin_memcpy(sums, c, static_cast<std::size_t>(block.rows) * kRowBytes);
    load_results<two>(results);
  }
  for (std::int64_t unit = first; unit < last; ++unit) {
    const std::byte* w = weights + (unit - first) * 4096;
    const std::byte* x = block.low + unit * step_bytes;
    Ahead::ask(ahead, unit - first);
    step<Multiply::bf16, two>(x, kUnitInputs * 2, w);
    step<Multiply::bf16, two>(x + 64, kUnitInputs * 2, w + 2048);
  }
  store_results<two>(results);
  if (!whole) __builtin_memcpy(c, sums, static_cast<std::size_t>(block.rows) * kRowBytes);
}

// Scaled, so that a panel's sums need no visit every 128 inputs; rounded half away from zero.
void expand_fp8(const std::byte* unit, const float* side, std::byte* to) {
  const E4m3AsF16 convert;
  const __m512i half_step = _mm512_set1_epi32(0x8000);
  alignas(64) std::uint16_t halves[2][32];
  for (int half = 0; half < 2; ++half) {
    for (int t = 0; t < 2; ++t) {
      const __m512 scale = _mm512_mul_ps(_mm512_loadu_ps(side + t * kTileColumns), _mm512_set1_ps(kE4m3F16Scale));
      for (int line = 0; line < 8; ++line) {
        const __m512i bytes = _mm512_loadu_si512(unit + half * 1024 + t * 512 + line * 64);
        store_bytes(halves[0], E4m3AsF16::even(convert, bytes));
        store_bytes(halves[1], E4m3AsF16::odd(convert, bytes));
        __asm__("" : "+m"(halves));  // the conversion is to read memory: it then needs no shuffle
#pragma GCC unroll 2
        for (int pair = 0; pair < 2; ++pair) {
          const __m512i even = _mm512_castps_si512(_mm512_mul_ps(load_f16(halves[0] + pair * 16), scale));
          const __m512i odd = _mm512_castps_si512(_mm512_mul_ps(load_f16(halves[1] + pair * 16), scale));
          const __m512i low = _mm512_srli_epi32(_mm512_add_epi32(even, half_step), 16);
          const __m512i high = _mm512_add_epi32(odd, half_step);
          // the upper halves of `high`, the rest from `low`
          const __m512i both = _mm512_ternarylogic_epi32(_mm512_set1_epi32(static_cast<int>(0xFFFF0000u)), high, low, 0xCA);
          _mm512_store_si512(to + half * 2048 + t * 1024 + (line * 2 + pair) * 64, both);
        }
      }
    }
  }
}

void gemm_bf16(const GemmArgs& a) {
  const Layout& layout = *a.layout;
  const bool fp8 = layout.kind == WeightKind::fp8;
  if (fp8) prefetch_first_scales(a);
  alignas(64) std::byte expanded[kChunkInputs / 2 * kPanelColumns * 2];
  for (std::int64_t panel = 0; panel < a.panels; ++panel) {
    for (std::int64_t first = a.first_unit; first < a.last_unit; first += kFloatChunkUnits) {
      const std::int64_t last = first + kFloatChunkUnits < a.last_unit ? first + kFloatChunkUnits : a.last_unit;
      const std::byte* weights = a.panel + panel * layout.panel_bytes + first * layout.unit_bytes;
      if (fp8) {
        for (std::int64_t unit = first; unit < last; ++unit) {
          const std::byte* w = weights + (unit - first) * layout.unit_bytes;
          const float* scales = panel_side(a, panel) + unit * kUnitInputs / kFp8Block * kPanelColumns;
          prefetch_scales(scales + panel_side_floats(layout));
          expand_fp8(w, scales, expanded + (unit - first) * 4096);
        }
        weights = expanded;
      }
      float* c = a.c + panel * a.c_panel_stride;
      const std::byte* stream = a.panel + panel * layout.panel_bytes + first * layout.unit_bytes;
      for (int b = 0; b < a.block_count; ++b) {
        const RowBlock& block = a.blocks[b];
        const Ahead ahead(stream, kFloatChunkUnits * layout.unit_bytes, layout.unit_bytes, b, a.block_count);
        if (block.stride_rows > 16) {
          bf16_block<true>(weights, ahead, block, first, last, c);
        } else {
          bf16_block<false>(weights, ahead, block, first, last, c);
        }
        c += block.rows * kPanelColumns;
      }
    }
  }
}

}  // namespace

void gemm(const GemmArgs& a) {
  const WeightKind kind = a.layout->kind;
  if (a.blocks[0].stride_rows < 16) {  // a single row
    switch (kind) {
      case WeightKind::bf16:
      case WeightKind::fp8:
        return gemm_single_rows(a);
      default:
        return gemm_vnni(a);
    }
  }
  // Few rows: re-rounding a chunk takes longer than its products, and int8 vectors ask memory more evenly than tiles do.
  const int vectors_below = kind == WeightKind::int8 ? kInt8HighRows + 1 : kReroundRowsFrom;
  const bool integers = kind != WeightKind::bf16 && kind != WeightKind::fp8;
  if (integers && a.block_count == 1 && a.blocks[0].rows < vectors_below) return gemm_vnni(a);
  configure_tiles();
  switch (kind) {
    case WeightKind::int8:
      gemm_int8(a);
      break;
    case WeightKind::int4:
      a.layout->symmetric ? gemm_rerounded<WeightKind::int4, true>(a) : gemm_rerounded<WeightKind::int4, false>(a);
      break;
    case WeightKind::mxfp4:
      gemm_rerounded<WeightKind::mxfp4, true>(a);
      break;
    case WeightKind::bf16:
    case WeightKind::fp8:
      gemm_bf16(a);
      break;
  }
  __asm__ volatile("tilerelease" ::);
}

}  // namespace numagraft::NUMAGRAFT_ISA

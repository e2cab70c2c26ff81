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

constexpr std::int64_t kInt8ChunkUnits = 12;  // 24 KiB of weights stay in L1
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

// Asks memory for what the tiles need soon, a share with every step. A chunk that is read once, as fast as memory delivers:
// the lines a little ahead. A chunk that is read several times: the one behind it, from four places in turn. Each is a
// stream of its own to the hardware's prefetcher, which runs on where a single one would wait for the tiles (measured at
// 64 rows: 17 to 24 GB/s; docs/kernels.md).
class Ahead {
 public:
  Ahead(const std::byte* chunk, std::int64_t bytes, std::int64_t chunk_bytes, std::int64_t near, std::int64_t steps, bool once)
      : from_(chunk + (once ? near : chunk_bytes)),
        stream_(once ? 0 : bytes / kStreams & ~std::int64_t{63}),
        share_(((once ? bytes : stream_) / 64 << kShift) / steps) {}

  NUMAGRAFT_INLINE void ask(Ahead& a) {
    std::int64_t line = a.at_ >> kShift;
    a.at_ += a.share_;
    const std::int64_t end = a.at_ >> kShift;
    if (a.stream_ == 0) {
      for (; line < end; ++line) prefetch(a.from_ + line * 64);
      return;
    }
    for (; line < end; ++line) {
      for (int stream = 0; stream < kStreams; ++stream) prefetch(a.from_ + line * 64 + stream * a.stream_);
    }
  }

 private:
  static constexpr int kStreams = 4;
  static constexpr int kShift = 16;
  NUMAGRAFT_INLINE void prefetch(const std::byte* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1); }

  const std::byte* from_;
  std::int64_t stream_;  // bytes
  std::int64_t share_;   // lines of a stream per step, in fixed point
  std::int64_t at_ = (1 << kShift) - 1;
};
constexpr std::int64_t kNear = 2048;  // measured: 1 to 2.5 KiB alike, further is slower

NUMAGRAFT_INLINE bool flagged(const RowBlock& block, std::int64_t unit) {
  return block.flags[unit] & (block.stride_rows > 16 ? 3 : 1);
}
std::int64_t count_flagged(const RowBlock& block, std::int64_t first, std::int64_t last) {
  std::int64_t count = 0;
  for (std::int64_t unit = first; unit < last; ++unit) count += flagged(block, unit);
  return count;
}
std::int64_t count_steps(const GemmArgs& a, std::int64_t first, std::int64_t last) {
  std::int64_t steps = (last - first) * a.block_count;
  for (int b = 0; b < a.block_count; ++b) steps += count_flagged(a.blocks[b], first, last);
  return steps;
}

// Leaves 128 times the results, and what `c` holds where it is resumed, in the tiles.
template <bool two>
void raise_results(const void* resumed) {
  constexpr int lines = (two ? 32 : 16) * kPanelColumns / kLanes;
  alignas(64) std::int32_t sums[kBlockRows * kPanelColumns];
  store_results<two>(sums);
  for (int line = 0; line < lines; ++line) {
    I total = load<I>(sums + line * kLanes) << 7;
    if (resumed != nullptr) total += load<I>(static_cast<const std::int32_t*>(resumed) + line * kLanes);
    store(sums + line * kLanes, total);
  }
  load_results<two>(sums);
}

template <bool two>
void int8_block(const GemmArgs& a, std::int64_t panel, const RowBlock& block, std::int64_t first, std::int64_t last, Ahead& ahead,
                float* c) {
  const Layout& layout = *a.layout;
  const std::int64_t step_bytes = std::int64_t{block.stride_rows} * kUnitInputs;
  const std::byte* w = a.panel + panel * layout.panel_bytes;
  if (count_flagged(block, first, last) > 0) {
    clear_results<two>();
    for (std::int64_t unit = first; unit < last; ++unit) {
      if (!flagged(block, unit)) continue;
      Ahead::ask(ahead);
      step<Multiply::by_unsigned, two>(block.high + unit * step_bytes, kUnitInputs, w + unit * layout.unit_bytes);
    }
    raise_results<two>(first > 0 ? c : nullptr);
  } else if (first > 0) {
    load_results<two>(c);
  } else {
    clear_results<two>();
  }
  for (std::int64_t unit = first; unit < last; ++unit) {
    Ahead::ask(ahead);
    step<Multiply::by_unsigned, two>(block.low + unit * step_bytes, kUnitInputs, w + unit * layout.unit_bytes);
  }
  store_results<two>(c);
  if (last < layout.units) return;
  const F side[2] = {load<F>(panel_side(a, panel)), load<F>(panel_side(a, panel) + kLanes)};
  for (int row = 0; row < block.rows; ++row) {
    const auto offset = static_cast<std::int32_t>(static_cast<std::uint32_t>(block.sum[row]) * kInt8Offset);
    const F scale = splat(block.scale[row]);
    for (int t = 0; t < 2; ++t) {
      float* at = c + row * kPanelColumns + t * kLanes;
      store(at, to_float(load<I>(at) - offset) * (side[t] * scale));
    }
  }
}

// Calls body(panel, first, last, c) for every panel's chunks of up to `units`, nearly equal.
template <class Body>
NUMAGRAFT_INLINE void for_chunks(const GemmArgs& a, std::int64_t units, Body body) {
  const std::int64_t all = a.last_unit - a.first_unit;
  const std::int64_t chunks = (all + units - 1) / units;
  const std::int64_t each = (all + chunks - 1) / chunks;
  for (std::int64_t panel = 0; panel < a.panels; ++panel) {
    for (std::int64_t first = a.first_unit; first < a.last_unit; first += each) {
      body(panel, first, first + each < a.last_unit ? first + each : a.last_unit, a.c + panel * a.c_panel_stride);
    }
  }
}

void gemm_int8(const GemmArgs& a) {
  const Layout& layout = *a.layout;
  for_chunks(a, kInt8ChunkUnits, [&](std::int64_t panel, std::int64_t first, std::int64_t last, float* c) {
    const std::int64_t bytes = (last - first) * layout.unit_bytes;
    const std::int64_t steps = count_steps(a, first, last);
    if (first == a.first_unit) prefetch_scales(panel_side(a, panel));
    Ahead ahead(a.panel + panel * layout.panel_bytes + first * layout.unit_bytes, bytes, bytes, kNear, steps, steps == last - first);
    for (int b = 0; b < a.block_count; ++b, c += kBlockRows * kPanelColumns) {
      if (a.blocks[b].stride_rows > 16) {
        int8_block<true>(a, panel, a.blocks[b], first, last, ahead, c);
      } else {
        int8_block<false>(a, panel, a.blocks[b], first, last, ahead, c);
      }
    }
  });
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

// The first block expands a chunk, some units before its tiles need them.
template <WeightKind kind, bool symmetric>
struct Expansion {
  static constexpr std::int64_t early = 4;
  const Layout& layout;
  const std::byte* from;
  std::int64_t units;
  __m512 inverses[2];
  std::byte* to;
  std::int64_t done = 0;

  Expansion(const Layout& l, const std::byte* weights, std::int64_t count, const float* side, std::byte* expanded)
      : layout(l), from(weights), units(count), inverses{inverse_scales(side), inverse_scales(side + kTileColumns)}, to(expanded) {}
  static inline __attribute__((always_inline)) void reach(Expansion& e, std::int64_t unit) {
    const std::int64_t end = unit + early < e.units ? unit + early : e.units;
    for (; e.done < end; ++e.done) {
      expand_unit<kind, symmetric>(e.layout, e.from + e.done * e.layout.unit_bytes, e.inverses, e.to + e.done * 2048);
    }
  }
};

template <WeightKind kind, bool symmetric, bool two>
void rerounded_block(const RowBlock& block, std::int64_t first, std::int64_t last, Expansion<kind, symmetric>& expansion,
                     const float* side, Ahead& ahead, float* c) {
  const std::int64_t step_bytes = std::int64_t{block.stride_rows} * kUnitInputs;
  clear_results<two>();
  if (count_flagged(block, first, last) > 0) {
    for (std::int64_t unit = 0; unit < last - first; ++unit) {
      if (!flagged(block, first + unit)) continue;
      Expansion<kind, symmetric>::reach(expansion, unit + 1);
      Ahead::ask(ahead);
      step<Multiply::by_signed, two>(block.high + (first + unit) * step_bytes, kUnitInputs, expansion.to + unit * 2048);
    }
    raise_results<two>(nullptr);
  }
  for (std::int64_t unit = 0; unit < last - first; ++unit) {
    Expansion<kind, symmetric>::reach(expansion, unit + 1);
    Ahead::ask(ahead);
    step<Multiply::by_signed, two>(block.low + (first + unit) * step_bytes, kUnitInputs, expansion.to + unit * 2048);
  }
  alignas(64) std::int32_t sums[kBlockRows * kPanelColumns];
  store_results<two>(sums);
  const F scales[2] = {load<F>(side), load<F>(side + kLanes)};
  for (int row = 0; row < block.rows; ++row) {
    const F by = splat(block.scale[row]);
    for (int t = 0; t < 2; ++t) {
      float* to = c + row * kPanelColumns + t * kLanes;
      const F value = to_float(load<I>(sums + row * kPanelColumns + t * kLanes)) * (scales[t] * by);
      store(to, first > 0 ? load<F>(to) + value : value);
    }
  }
}

template <WeightKind kind, bool symmetric>
void gemm_rerounded(const GemmArgs& a) {
  alignas(64) std::byte expanded[kChunkInputs * kPanelColumns];
  const Layout& layout = *a.layout;
  prefetch_first_scales(a);
  for (std::int64_t panel = 0; panel < a.panels; ++panel) {
    for (std::int64_t first = a.first_unit; first < a.last_unit; first += kChunkUnits) {
      const std::int64_t last = first + kChunkUnits < a.last_unit ? first + kChunkUnits : a.last_unit;
      const std::byte* w = a.panel + panel * layout.panel_bytes + first * layout.unit_bytes;
      const float* side = panel_side(a, panel) + first / kChunkUnits * kPanelColumns;
      prefetch_scales(side + panel_side_floats(layout));
      Expansion<kind, symmetric> expansion(layout, w, last - first, side, expanded);
      const std::int64_t steps = count_steps(a, first, last);
      Ahead ahead(w, (last - first) * layout.unit_bytes, kChunkUnits * layout.unit_bytes,
                  kNear + expansion.early * layout.unit_bytes, steps, steps == last - first);
      float* c = a.c + panel * a.c_panel_stride;
      for (int b = 0; b < a.block_count; ++b, c += kBlockRows * kPanelColumns) {
        if (a.blocks[b].stride_rows > 16) {
          rerounded_block<kind, symmetric, true>(a.blocks[b], first, last, expansion, side, ahead, c);
        } else {
          rerounded_block<kind, symmetric, false>(a.blocks[b], first, last, expansion, side, ahead, c);
        }
      }
    }
  }
}

// ---- bf16 and fp8

constexpr std::int64_t kFloatChunkUnits = kChunkUnits / 2;

template <bool two>
void bf16_block(const std::byte* weights, const RowBlock& block, std::int64_t first, std::int64_t last, Ahead& ahead, float* c) {
  const std::int64_t step_bytes = std::int64_t{block.stride_rows} * kUnitInputs * 2;
  if (first == 0) {
    clear_results<two>();
  } else {
    load_results<two>(c);
  }
  for (std::int64_t unit = first; unit < last; ++unit) {
    for (int half = 0; half < 2; ++half) {
      Ahead::ask(ahead);
      step<Multiply::bf16, two>(block.low + unit * step_bytes + half * 64, kUnitInputs * 2, weights + (unit - first) * 4096 + half * 2048);
    }
  }
  store_results<two>(c);
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
  alignas(64) std::byte expanded[kChunkInputs / 2 * kPanelColumns * 2];
  if (layout.kind == WeightKind::fp8) prefetch_first_scales(a);
  for_chunks(a, kFloatChunkUnits, [&](std::int64_t panel, std::int64_t first, std::int64_t last, float* c) {
    const std::byte* stream = a.panel + panel * layout.panel_bytes + first * layout.unit_bytes;
    const std::byte* weights = stream;
    if (layout.kind == WeightKind::fp8) {
      for (std::int64_t unit = first; unit < last; ++unit) {
        const float* scales = panel_side(a, panel) + unit * kUnitInputs / kFp8Block * kPanelColumns;
        prefetch_scales(scales + panel_side_floats(layout));
        expand_fp8(stream + (unit - first) * layout.unit_bytes, scales, expanded + (unit - first) * 4096);
      }
      weights = expanded;
    }
    const std::int64_t bytes = (last - first) * layout.unit_bytes;
    Ahead ahead(stream, bytes, bytes, kNear, 2 * (last - first) * a.block_count, a.block_count == 1);
    for (int b = 0; b < a.block_count; ++b, c += kBlockRows * kPanelColumns) {
      if (a.blocks[b].stride_rows > 16) {
        bf16_block<true>(weights, a.blocks[b], first, last, ahead, c);
      } else {
        bf16_block<false>(weights, a.blocks[b], first, last, ahead, c);
      }
    }
  });
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

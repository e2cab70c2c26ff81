#pragma once

// AMX tile registers: their configuration, what each of the eight holds, and one step of a multiplication.
// Included by one translation unit; everything is internal to it.
#include "kernels/ahead.h"
#include "kernels/layout.h"
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
// The same for what L1 need not keep: inputs that stream past a chunk of weights do not push it out then.
#define TILE_LOAD_STREAMED(tile, address, stride) \
  __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm" #tile ::"r"(address), "r"(static_cast<std::int64_t>(stride)) : "memory")
#define TILE_STORE(tile, address, stride) \
  __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(address), "r"(static_cast<std::int64_t>(stride)) : "memory")
#define TILE_ZERO(tile) __asm__ volatile("tilezero %%tmm" #tile ::)
#define TILE_MULTIPLY(instruction, to, inputs, weights) \
  __asm__ volatile(#instruction " %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(to), "i"(inputs), "i"(weights))

void configure_tiles() {
  TileConfig config{};
  config.palette = 1;
  for (int tile = 0; tile < 8; ++tile) {
    config.row_bytes[tile] = 64;
    config.rows[tile] = 16;
  }
  __asm__ volatile("ldtilecfg %0" ::"m"(config));
}

constexpr std::int64_t kTileBytes = 16 * 64;
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
// The first row tile's.
NUMAGRAFT_INLINE void load_results(const void* c) {
  const auto* p = static_cast<const std::byte*>(c);
  TILE_LOAD(0, p, kRowBytes);
  TILE_LOAD(1, p + 64, kRowBytes);
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

// Those of tiles 2 and 3, where they are not the second row tile's, as if they were the first's.
NUMAGRAFT_INLINE void store_second_results(void* c) {
  auto* p = static_cast<std::byte*>(c);
  TILE_STORE(2, p, kRowBytes);
  TILE_STORE(3, p + 64, kRowBytes);
}

enum class Multiply { by_unsigned, by_signed, bf16 };

// Adds the products of a row tile and a column tile to their results.
template <Multiply how, int row, int column>
NUMAGRAFT_INLINE void multiply() {
  if constexpr (how == Multiply::by_unsigned) TILE_MULTIPLY(tdpbsud, 2 * row + column, 4 + row, 6 + column);
  if constexpr (how == Multiply::by_signed) TILE_MULTIPLY(tdpbssd, 2 * row + column, 4 + row, 6 + column);
  if constexpr (how == Multiply::bf16) TILE_MULTIPLY(tdpbf16ps, 2 * row + column, 4 + row, 6 + column);
}

// Two tiles of inputs (of 16 rows each) and two of weights.
struct Operands {
  const std::byte* inputs;
  std::int64_t second_inputs;  // bytes behind the first
  std::int64_t input_stride;
  const std::byte* weights;
};

// One unit's products of one or two input tiles (the second is not read where there is one). What memory is asked for is
// spread between them: in one burst the requests would hold all fill buffers, and the next tiles would wait behind them.
template <Multiply how, bool two>
NUMAGRAFT_INLINE void step(const Operands& o, Ahead& ahead) {
  TILE_LOAD(6, o.weights, 64);
  Ahead::ask_more(ahead);
  TILE_LOAD_STREAMED(4, o.inputs, o.input_stride);
  multiply<how, 0, 0>();
  Ahead::ask_more(ahead);
  TILE_LOAD(7, o.weights + kTileBytes, 64);
  multiply<how, 0, 1>();
  Ahead::ask_more(ahead);
  if constexpr (two) {
    TILE_LOAD_STREAMED(5, o.inputs + o.second_inputs, o.input_stride);
    multiply<how, 1, 0>();
  }
  Ahead::ask(ahead);
  if constexpr (two) multiply<how, 1, 1>();
}

// Changes a result tile between two passes: what it holds goes to `stored`, what is at `loaded` comes in its place (null: nothing, and zeros).
#define CHANGE_RESULT(tile, offset, stored, loaded)                                   \
  {                                                                                   \
    if (stored != nullptr) TILE_STORE(tile, stored + offset, kRowBytes);              \
    if (loaded != nullptr) {                                                          \
      TILE_LOAD(tile, loaded + offset, kRowBytes);                                    \
    } else {                                                                          \
      TILE_ZERO(tile);                                                                \
    }                                                                                 \
  }

// A pass's first step. The tiles still hold the results of the pass before it: a store waits for its tile's last product,
// so one is changed after the other, while others are multiplied.
template <Multiply how>
NUMAGRAFT_INLINE void first_step(const Operands& o, std::byte* stored, const std::byte* loaded, Ahead& ahead) {
  TILE_LOAD(6, o.weights, 64);
  TILE_LOAD_STREAMED(4, o.inputs, o.input_stride);
  CHANGE_RESULT(0, 0, stored, loaded)
  multiply<how, 0, 0>();
  Ahead::ask_more(ahead);
  TILE_LOAD(7, o.weights + kTileBytes, 64);
  CHANGE_RESULT(1, 64, stored, loaded)
  multiply<how, 0, 1>();
  Ahead::ask_more(ahead);
  TILE_LOAD_STREAMED(5, o.inputs + o.second_inputs, o.input_stride);
  CHANGE_RESULT(2, 16 * kRowBytes, stored, loaded)
  multiply<how, 1, 0>();
  Ahead::ask_more(ahead);
  CHANGE_RESULT(3, 16 * kRowBytes + 64, stored, loaded)
  multiply<how, 1, 1>();
  Ahead::ask(ahead);
}

}  // namespace
}  // namespace numagraft::NUMAGRAFT_ISA

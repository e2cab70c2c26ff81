// AMX tiles: 16 x 64 bytes times 64 bytes x 16. A panel is worked through in chunks whose weights stay in L1; int4, mxfp4
// and fp8 chunks are expanded there first. A single row is left to the vector kernels: it waits for memory anyway.
#include "kernels/ahead.h"
#include "kernels/gemm_rerounded.h"
#include "kernels/gemm_single.h"
#include "kernels/gemm_vnni.h"
#include "kernels/high_halves.h"
#include "kernels/kernel_table.h"
#include "kernels/passes.h"
#include "kernels/simd.h"
#include "kernels/tiles.h"

namespace numagraft::NUMAGRAFT_ISA {
namespace {

constexpr std::int64_t kFewHighUnits = 3;  // one in so many
constexpr int kListsAhead = 4;             // rows
constexpr int kInt8RowsPerStep = 2;        // of a visit: lists take as long as products, and share their time evenly

// The units whose high halves go with low ones [first, last) of the block. Where few have one, all of them go with the last,
// and find their weights in L2: joining sums once a panel costs less than once a chunk.
NUMAGRAFT_INLINE Units high_units_of(const RowBlock& block, std::int64_t units, std::int64_t first, std::int64_t last) {
  if (count_flagged(block, 0, units) * kFewHighUnits > units) return {first, last};
  return last < units ? Units{0, 0} : Units{0, units};
}

// Joins the sums of both halves; a panel's last chunk makes them results.
struct Int8Visit {
  int rows = 0;
  const RowBlock* block = nullptr;
  float* c = nullptr;
  const std::int32_t* high = nullptr;  // null: none
  const float* side = nullptr;         // scales of the panel's columns; null: more chunks follow
  const std::byte* listed = nullptr;   // the panel, where high halves are listed
  Units units{};                       // of the chunk

  static void visit(const Int8Visit& v, int first, int last) {
    if (v.side == nullptr) {
      for (int row = first; row < last; ++row) {
        I high[2];
        high_sums(v, row, high);
        auto* at = reinterpret_cast<std::int32_t*>(v.c) + row * kPanelColumns;
        for (int t = 0; t < 2; ++t) store(at + t * kLanes, load<I>(at + t * kLanes) + (high[t] << 7));
      }
      return;
    }
    const F side[2] = {load<F>(v.side), load<F>(v.side + kLanes)};
    for (int row = first; row < last; ++row) {
      const auto offset = static_cast<std::int32_t>(static_cast<std::uint32_t>(v.block->sum[row]) * kInt8Offset);
      const F scale = splat(v.block->scale[row]);
      I high[2];
      high_sums(v, row, high);
      for (int t = 0; t < 2; ++t) {
        float* at = v.c + row * kPanelColumns + t * kLanes;
        const I total = load<I>(at) - offset + (high[t] << 7);
        store(at, to_float(total) * (side[t] * scale));
      }
    }
  }

  // The chunk's part of a row's list: two lines at most of it are read as a rule, which nothing else has brought to L1.
  NUMAGRAFT_INLINE void prefetch_list(const Int8Visit& v, int row) {
    const RowLists& lists = v.block->lists;
    const auto* first = reinterpret_cast<const char*>(lists.fours + row * lists.stride + lists.begin[v.units.first * lists.rows + row]);
    _mm_prefetch(first, _MM_HINT_T0);
    _mm_prefetch(first + 64, _MM_HINT_T0);
  }

  // Those of lists are found here: vectors have nothing else to do while the tiles multiply the next block.
  NUMAGRAFT_INLINE void high_sums(const Int8Visit& v, int row, I (&sums)[2]) {
    sums[0] = sums[1] = I{};
    if (v.listed != nullptr) {
      const RowLists& lists = v.block->lists;
      const std::uint16_t* begin = lists.begin + row;
      const ListedFour* four = lists.fours + row * lists.stride + begin[v.units.first * lists.rows];
      const ListedFour* const end = lists.fours + row * lists.stride + begin[v.units.last * lists.rows];
      if (row + kListsAhead < v.rows) prefetch_list(v, row + kListsAhead);
#pragma GCC unroll 2
      for (; four < end; ++four) {
        const std::byte* weights = v.listed + four->at;
        const __m512i high = _mm512_set1_epi32(static_cast<int>(four->high));
        sums[0] = (I)_mm512_dpbusd_epi32((__m512i)sums[0], _mm512_loadu_si512(weights), high);
        sums[1] = (I)_mm512_dpbusd_epi32((__m512i)sums[1], _mm512_loadu_si512(weights + kTileBytes), high);
      }
    } else if (v.high != nullptr) {
      for (int t = 0; t < 2; ++t) sums[t] = load<I>(v.high + row * kPanelColumns + t * kLanes);
    }
  }
};

// Calls body(panel, first, last, c) for every panel's chunks of up to `units`, nearly equal. Where weights are read once,
// the panel is one chunk and its sums stay in the tiles.
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
  const std::int64_t units = a.last_unit - a.first_unit;
  const bool once = count_steps(a, a.first_unit, a.last_unit) == units;
  alignas(64) std::int32_t high[kBlockRows * kPanelColumns];
  Passes<Multiply::by_unsigned, Int8Visit, kInt8RowsPerStep> passes;
  for_chunks(a, once ? units : longest_chunk(a), [&](std::int64_t panel, std::int64_t first, std::int64_t last, float* c) {
    const std::byte* w = a.panel + panel * layout.panel_bytes;
    const std::int64_t bytes = (last - first) * layout.unit_bytes;
    std::int64_t steps = (last - first) * a.block_count;
    for (int b = 0; !once && b < a.block_count; ++b) {
      if (a.blocks[b].stride_rows <= 16) continue;
      const Units high_units = high_units_of(a.blocks[b], layout.units, first, last);
      steps += count_flagged(a.blocks[b], high_units.first, high_units.last);
    }
    if (first == a.first_unit) prefetch_scales(panel_side(a, panel));
    Ahead ahead(w + first * layout.unit_bytes, bytes, chunk_behind(a, first, last), kNear, steps, once);
    const auto weights = [&](std::int64_t unit) { return w + unit * layout.unit_bytes; };
    const float* side = last < layout.units ? nullptr : panel_side(a, panel);
    for (int b = 0; b < a.block_count; ++b, c += kBlockRows * kPanelColumns) {
      const RowBlock& block = a.blocks[b];
      const float* resumed = first > 0 ? c : nullptr;
      Int8Visit visit{block.rows, &block, c, nullptr, side};
      if (block.stride_rows <= 16) {
        decltype(passes)::finish(passes);
        if (multiply_one_tile<Multiply::by_unsigned>(block, {first, last}, weights, ahead, resumed, c, high)) visit.high = high;
        if (visit.high != nullptr || side != nullptr) Int8Visit::visit(visit, 0, block.rows);
        continue;
      }
      const Units high_units = high_units_of(block, layout.units, first, last);
      if (block.lists.fours != nullptr) {
        visit.listed = w;
        visit.units = {first, last};
      } else if (count_flagged(block, high_units.first, high_units.last) > 0) {
        decltype(passes)::run(passes, units_of(block, high_units, true, weights), nullptr, high, {}, ahead);
        visit.high = high;
      } else if (side == nullptr) {
        visit.rows = 0;
      }
      decltype(passes)::run(passes, units_of(block, {first, last}, false, weights), resumed, c, visit, ahead);
    }
  });
  decltype(passes)::finish(passes);
}

// ---- bf16 and fp8

constexpr std::int64_t kFloatChunkUnits = kChunkUnits / 2;

struct NoVisit {
  static constexpr int rows = 0;
  static void visit(const NoVisit&, int, int) {}
};

// Two steps of a unit: the inputs of each tile are 32 of its 64.
NUMAGRAFT_INLINE Operands float_operands(const RowBlock& block, std::int64_t step, const std::byte* weights) {
  return {block.low + step / 2 * block.stride_rows * kUnitInputs * 2 + step % 2 * 64, 2 * kTileBytes, kUnitInputs * 2, weights};
}

void bf16_one_tile(const std::byte* weights, const RowBlock& block, std::int64_t first, std::int64_t last, Ahead& ahead, float* c) {
  first == 0 ? clear_results<false>() : load_results(c);
  for (std::int64_t at = 2 * first; at < 2 * last; ++at, weights += 2 * kTileBytes) {
    step<Multiply::bf16, false>(float_operands(block, at, weights), ahead);
  }
  store_results<false>(c);
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
  const bool once = a.block_count == 1;
  std::int64_t units = kFloatChunkUnits;  // fp8 is expanded into so much
  if (layout.kind == WeightKind::bf16) units = once ? a.last_unit - a.first_unit : longest_chunk(a) / 2;
  Passes<Multiply::bf16, NoVisit> passes;
  for_chunks(a, units, [&](std::int64_t panel, std::int64_t first, std::int64_t last, float* c) {
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
    Ahead ahead(stream, bytes, chunk_behind(a, first, last), kNear, 2 * (last - first) * a.block_count, once);
    for (int b = 0; b < a.block_count; ++b, c += kBlockRows * kPanelColumns) {
      const RowBlock& block = a.blocks[b];
      if (block.stride_rows <= 16) {
        decltype(passes)::finish(passes);
        bf16_one_tile(weights, block, first, last, ahead, c);
        continue;
      }
      const auto next = [&block, weights, at = 2 * first, first, last](Operands& o) mutable {
        if (at >= 2 * last) return false;
        o = float_operands(block, at, weights + (at - 2 * first) * 2 * kTileBytes);
        ++at;
        return true;
      };
      decltype(passes)::run(passes, next, first > 0 ? c : nullptr, c, {}, ahead);
    }
  });
  decltype(passes)::finish(passes);
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
        return gemm_vnni<false>(a);
    }
  }
  // Few rows: re-rounding a chunk takes longer than its products, and int8 vectors ask memory more evenly than tiles do.
  const int vectors_below = kind == WeightKind::int8 ? kInt8HighRows + 1 : kReroundRowsFrom;
  const bool integers = kind != WeightKind::bf16 && kind != WeightKind::fp8;
  const bool grouped = is_grouped(kind);
  const bool for_vectors = !grouped || a.blocks[0].group_sum != nullptr;  // else the last rows of more
  if (integers && for_vectors && a.block_count == 1 && a.blocks[0].rows < vectors_below) return gemm_vnni<false>(a);
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

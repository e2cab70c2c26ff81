#pragma once

// int4 or mxfp4 as int8 in L1, one scale per column and span: as it is where its grids are whole, else re-rounded.
// Included by one translation unit; everything is internal to it.
#include "kernels/gemm_vnni.h"
#include "kernels/tiles.h"

namespace numagraft::NUMAGRAFT_ISA {
namespace {

// The end of the units that have a unit's side-table scale, as far as they are multiplied; and those scales.
NUMAGRAFT_INLINE std::int64_t span_end(const GemmArgs& a, std::int64_t unit) {
  const std::int64_t end = span_end(*a.layout, unit);
  return end < a.last_unit ? end : a.last_unit;
}
NUMAGRAFT_INLINE const float* span_side(const GemmArgs& a, std::int64_t panel, std::int64_t unit) {
  return panel_side(a, panel) + span_of(*a.layout, unit) * kPanelColumns;
}

// Re-rounded, a weight becomes the upper byte of q s + m, 16-bit integers: s and m are its group's scale and minimum in units of 1/256 of
// the column's int8 scale, m with what rounds. The addition costs nothing: bits above q's four are free, and as s is made odd,
// some multiple k of 16 has k s = m (mod 2^16, m a multiple of 16). So q | k times s is all.
struct Factors {  // of 16 columns of a unit
  __m512i scale[2];   // by group of 32 inputs; in both 16-bit halves of a column's lane
  __m512i offset[2];  // k
};

// Whether the weights of 16 columns of a span are whole: multiples of their scales, which are then positive.
template <WeightKind kind>
NUMAGRAFT_INLINE bool are_whole(const float* side) {
  return kind == WeightKind::int4 && _mm512_movepi32_mask(_mm512_loadu_si512(side)) == 0;
}
// 1 / scale, or 256 / scale, of the columns; 0 for a column of zeros.
NUMAGRAFT_INLINE __m512 inverse_scales(const float* side, bool whole) {
  const __m512 scale = _mm512_loadu_ps(side);
  return _mm512_maskz_div_ps(_mm512_cmp_ps_mask(scale, _mm512_setzero_ps(), _CMP_NEQ_OQ), _mm512_set1_ps(whole ? 1.0f : 256.0f), scale);
}

// Both 16-bit halves of every lane from its lower (0) or upper (1) one.
template <int half>
NUMAGRAFT_INLINE __m512i repeat_half(__m512i v) {
  constexpr char b = 2 * half;
  return _mm512_shuffle_epi8(v, _mm512_broadcast_i32x4(_mm_setr_epi8(b, b + 1, b, b + 1, b + 4, b + 5, b + 4, b + 5, b + 8, b + 9, b + 8,
                                                                     b + 9, b + 12, b + 13, b + 12, b + 13)));
}
// The low halves of `low`, and those of `high` above them.
NUMAGRAFT_INLINE __m512i join_halves(__m512i low, __m512i high) {
  const __m512i up = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 0, 0, 1, 0, 0, 4, 5, 0, 0, 8, 9, 0, 0, 12, 13));
  return _mm512_mask_shuffle_epi8(low, 0xCCCCCCCCCCCCCCCCull, high, up);
}

template <WeightKind kind, bool symmetric>
NUMAGRAFT_INLINE void find_factors_of(const Layout& layout, const std::byte* unit, int tile, __m512 inverse, Factors& to) {
  constexpr int used_bits = kind == WeightKind::mxfp4 ? 5 : 4;  // of a nibble, or of an e2m1 times two plus 12
  const std::byte* scales = unit + layout.data_bytes;
  const __m512 to_integer = _mm512_set1_ps(12582912.0f);  // the sum's low bits are the integer
  const __m512i rounding = _mm512_set1_epi16(128 + (1 << used_bits) / 2);  // to a byte, and to a multiple
  __m512i scale[2];
  __m512i minimum[2];
  for (int g = 0; g < 2; ++g) {
    const int column = (layout.unit_groups == 2 ? g : 0) * kPanelColumns + tile * kTileColumns;
    if constexpr (kind == WeightKind::mxfp4) {
      const __m512 half = _mm512_mul_ps(power_of_two(scales + column), _mm512_set1_ps(0.5f));
      scale[g] = _mm512_castps_si512(_mm512_fmadd_ps(half, inverse, to_integer));
    } else {
      const auto* halves = reinterpret_cast<const std::uint16_t*>(scales);
      scale[g] = _mm512_castps_si512(_mm512_fmadd_ps(widen_bf16(halves + column), inverse, to_integer));
      if constexpr (!symmetric) {
        const __m512 value = widen_bf16(halves + layout.unit_groups * kPanelColumns + column);
        minimum[g] = _mm512_castps_si512(_mm512_fmadd_ps(value, inverse, to_integer));
      }
    }
  }
  const __m512i s = _mm512_or_si512(join_halves(scale[0], scale[1]), _mm512_set1_epi16(1));
  __m512i m;
  if constexpr (kind == WeightKind::mxfp4) {
    m = _mm512_sub_epi16(rounding, _mm512_mullo_epi16(s, _mm512_set1_epi16(kMxfp4Offset)));
  } else if constexpr (symmetric) {
    m = _mm512_sub_epi16(rounding, _mm512_slli_epi16(s, 3));
  } else {
    m = _mm512_add_epi16(join_halves(minimum[0], minimum[1]), rounding);
  }
  m = _mm512_and_si512(m, _mm512_set1_epi16(-(1 << used_bits)));
  // s is its own inverse modulo 8; each step doubles the bits
  const __m512i two = _mm512_set1_epi16(2);
  __m512i x = _mm512_mullo_epi16(s, _mm512_sub_epi16(two, _mm512_mullo_epi16(s, s)));
  x = _mm512_mullo_epi16(x, _mm512_sub_epi16(two, _mm512_mullo_epi16(s, x)));
  const __m512i k = _mm512_mullo_epi16(m, x);
  to.scale[0] = repeat_half<0>(s);
  to.scale[1] = repeat_half<1>(s);
  to.offset[0] = repeat_half<0>(k);
  to.offset[1] = repeat_half<1>(k);
}

// Upper bytes of products: of even inputs from `even`, of odd ones from `odd`.
NUMAGRAFT_INLINE __m512i upper_bytes(__m512i even, __m512i odd) {
  const __m512i down = _mm512_broadcast_i32x4(_mm_setr_epi8(1, 1, 3, 3, 5, 5, 7, 7, 9, 9, 11, 11, 13, 13, 15, 15));
  return _mm512_mask_shuffle_epi8(odd, 0x5555555555555555ull, even, down);
}
NUMAGRAFT_INLINE __m512i masked_or(__m512i value, __m512i mask, __m512i bits) { return _mm512_ternarylogic_epi32(value, mask, bits, 0xEA); }

// Bytes from a line that is expanded to the one that memory is asked for, where a chunk is read once: expanding paces the
// requests. `asks`: whether it does.
constexpr std::int64_t kExpansionAhead = 5120;
NUMAGRAFT_INLINE void prefetch(const std::byte* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1); }

// A tile: 8 lines of 64 bytes to 16.
template <WeightKind kind, bool asks>
NUMAGRAFT_INLINE void expand_tile(const std::byte* from, const Factors& factors, std::byte* to) {
  const __m512i lookup = _mm512_broadcast_i32x4(_mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
  const __m512i nibble = _mm512_set1_epi16(15);
  const __m512i nibbles = _mm512_set1_epi8(15);
  const __m512i byte = _mm512_set1_epi16(255);
  const Factors f = factors;  // in registers: the stores might change what lies in memory
  const __m512i* s = f.scale;
  const __m512i* k = f.offset;
#pragma GCC unroll 8
  for (int row = 0; row < 8; ++row) {
    const std::byte* line = from + row * 64;
    if constexpr (asks) prefetch(line + kExpansionAhead);
    const __m512i v = _mm512_loadu_si512(line);
    __m512i even[2];
    __m512i odd[2];
    if constexpr (kind == WeightKind::mxfp4) {
      const __m512i codes[2] = {_mm512_and_si512(v, nibbles), _mm512_and_si512(_mm512_srli_epi16(v, 4), nibbles)};
      for (int g = 0; g < 2; ++g) {
        const __m512i values = _mm512_shuffle_epi8(lookup, codes[g]);
        even[g] = masked_or(values, byte, k[g]);
        odd[g] = _mm512_or_si512(_mm512_srli_epi16(values, 8), k[g]);
      }
    } else {
      even[0] = masked_or(v, nibble, k[0]);
      even[1] = masked_or(_mm512_srli_epi16(v, 4), nibble, k[1]);
      odd[0] = masked_or(_mm512_srli_epi16(v, 8), nibble, k[0]);
      odd[1] = _mm512_or_si512(_mm512_srli_epi16(v, 12), k[1]);
    }
    for (int g = 0; g < 2; ++g) {
      const __m512i bytes = upper_bytes(_mm512_mullo_epi16(even[g], s[g]), _mm512_mullo_epi16(odd[g], s[g]));
      _mm512_store_si512(to + g * 512 + row * 64, bytes);
    }
  }
}

// Whole tiles, whose scales and minima are integer multiples of the columns' int8 scales: a weight is q s + m in whole numbers,
// and q s stays below 256, so that one multiplication of 16-bit halves serves the two bytes in each.
struct WholeFactors {  // of 16 columns of a unit, by group of 32 inputs
  __m512i scale[2];    // in both halves of a column's lane
  __m512i minimum[2];  // in all bytes of it
  __m512i flip[2];     // 15 in all bytes where the scale is negative: w = 15 - q takes q's place
};

template <bool symmetric>
NUMAGRAFT_INLINE void find_factors_of(const Layout& layout, const std::byte* unit, int tile, __m512 inverse, WholeFactors& to) {
  const __m512i low_to_halves = _mm512_broadcast_i32x4(_mm_setr_epi8(0, -1, 0, -1, 4, -1, 4, -1, 8, -1, 8, -1, 12, -1, 12, -1));
  const __m512i low_to_bytes = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12));
  const __m512 to_integer = _mm512_set1_ps(12582912.0f);  // the sum's low bits are the integer
  const auto* halves = reinterpret_cast<const std::uint16_t*>(unit + layout.data_bytes) + tile * kTileColumns;
  for (int g = 0; g < 2; ++g) {
    const auto* at = halves + (layout.unit_groups == 2 ? g : 0) * kPanelColumns;
    __m512 scale = widen_bf16(at);
    if constexpr (symmetric) {
      const __mmask16 negative = _mm512_movepi32_mask(_mm512_castps_si512(scale));
      scale = _mm512_abs_ps(scale);
      to.flip[g] = _mm512_maskz_mov_epi32(negative, _mm512_set1_epi8(15));
      const __m512i s = _mm512_castps_si512(_mm512_fmadd_ps(scale, inverse, to_integer));
      to.scale[g] = _mm512_shuffle_epi8(s, low_to_halves);
      const __m512i eight = _mm512_mullo_epi16(s, _mm512_mask_blend_epi32(negative, _mm512_set1_epi16(-8), _mm512_set1_epi16(-7)));
      to.minimum[g] = _mm512_shuffle_epi8(eight, low_to_bytes);
    } else {
      const __m512 minimum = widen_bf16(at + layout.unit_groups * kPanelColumns);
      to.scale[g] = _mm512_shuffle_epi8(_mm512_castps_si512(_mm512_fmadd_ps(scale, inverse, to_integer)), low_to_halves);
      to.minimum[g] = _mm512_shuffle_epi8(_mm512_castps_si512(_mm512_fmadd_ps(minimum, inverse, to_integer)), low_to_bytes);
    }
  }
}

template <bool symmetric, bool asks>
NUMAGRAFT_INLINE void expand_tile(const std::byte* from, const WholeFactors& factors, std::byte* to) {
  const WholeFactors f = factors;
  const __m512i nibbles = _mm512_set1_epi8(15);
#pragma GCC unroll 8
  for (int row = 0; row < 8; ++row) {
    const std::byte* line = from + row * 64;
    if constexpr (asks) prefetch(line + kExpansionAhead);
    __m512i low = _mm512_loadu_si512(line);
    __asm__("" : "+v"(low));  // loaded once
    const __m512i high = _mm512_srli_epi16(low, 4);
    for (int g = 0; g < 2; ++g) {
      const __m512i v = g == 0 ? low : high;
      const __m512i q = symmetric ? _mm512_ternarylogic_epi32(v, nibbles, f.flip[g], 0x6A)  // (v & nibbles) ^ flip
                                  : _mm512_and_si512(v, nibbles);
      _mm512_store_si512(to + g * 512 + row * 64, _mm512_add_epi8(_mm512_mullo_epi16(q, f.scale[g]), f.minimum[g]));
    }
  }
}

// Expands the units of a multiplication in their order, chunk after chunk and panel after panel, some before the tiles need them.
// They go to a ring, which is small where tiles go over each once: stores that stay in L1 take half as long as those that fall out of it.
template <WeightKind kind, bool symmetric>
class Expansion {
 public:
  static constexpr std::int64_t kSlots = 2 * kChunkUnits;

  // `kept`: the longest chunk that several passes go over (0: there is none). `asks`: memory is asked for the units here. `to`: room
  // for kSlots units of two tiles.
  Expansion(const GemmArgs& a, std::int64_t kept, bool asks, std::byte* to)
      : a_(a),
        slots_(kept > kEarly ? kept : kEarly + 1),
        early_(asks ? kEarly : 1),
        asks_(asks),
        count_(a.panels * (a.last_unit - a.first_unit)),
        to_(to),
        unit_(a.first_unit) {
    begin_span(*this);
    for (int tile = 0; tile < 2; ++tile) find_factors(*this, tile);
  }
  // The two tiles of a unit, counted from the first of the multiplication. Units before `end` are expanded somewhat before they are needed.
  NUMAGRAFT_INLINE const std::byte* tiles(Expansion& e, std::int64_t index, std::int64_t end) {
    if (index + 1 + e.early_ < end) end = index + 1 + e.early_;
    while (e.done_ < end) e.asks_ ? expand<true>(e) : expand<false>(e);
    return slot(e, index);
  }
  std::int64_t count() const { return count_; }

 private:
  // Odd: 2 and 4 units further lies what is stored at the same place of a page as what is multiplied, and loads wait for it. Where
  // requests come from between the products, what is expanded earlier has not arrived (64 rows: 1.69 T op/s, with 3: 1.59).
  static constexpr std::int64_t kEarly = 3;

  NUMAGRAFT_INLINE std::byte* slot(const Expansion& e, std::int64_t index) {
    return e.to_ + std::int64_t{static_cast<std::uint32_t>(index) % e.slots_} * 2 * kTileBytes;
  }
  // The scales of the inputs that begin.
  NUMAGRAFT_INLINE void begin_span(Expansion& e) {
    const Layout& layout = *e.a_.layout;
    e.weights_ = e.a_.panel + e.panel_ * layout.panel_bytes + e.unit_ * layout.unit_bytes;
    e.span_end_ = span_end(e.a_, e.unit_);
    const float* side = span_side(e.a_, e.panel_, e.unit_);
    for (int tile = 0; tile < 2; ++tile) {
      e.whole_[tile] = are_whole<kind>(side + tile * kTileColumns);
      e.inverses_[tile] = inverse_scales(side + tile * kTileColumns, e.whole_[tile]);
    }
  }
  NUMAGRAFT_INLINE void find_factors(Expansion& e, int tile) {
    if (e.whole_[tile]) {
      find_factors_of<symmetric>(*e.a_.layout, e.weights_, tile, e.inverses_[tile], e.whole_factors_[tile]);
    } else {
      find_factors_of<kind, symmetric>(*e.a_.layout, e.weights_, tile, e.inverses_[tile], e.factors_[tile]);
    }
  }

  template <bool asks>
  __attribute__((noinline)) static void expand(Expansion& e) {
    const Layout& layout = *e.a_.layout;
    const std::byte* unit = e.weights_;
    std::byte* to = slot(e, e.done_);
    if constexpr (asks) {
      for (std::int64_t line = layout.data_bytes; line < layout.unit_bytes; line += 64) prefetch(unit + line + kExpansionAhead);
    }
    const bool whole[2] = {e.whole_[0], e.whole_[1]};
    if (++e.done_ < e.count_) {
      e.weights_ += layout.unit_bytes;
      if (++e.unit_ == e.span_end_) {
        if (e.unit_ == e.a_.last_unit) {
          e.unit_ = e.a_.first_unit;
          ++e.panel_;
        }
        begin_span(e);
      }
    }
    // After each tile's lines come its factors in the next unit: the other tile's lines give their chain of operations time.
    for (int tile = 0; tile < 2; ++tile) {
      const std::byte* lines = unit + tile * kTileBytes / 2;
      std::byte* expanded = to + tile * kTileBytes;
      if (whole[tile]) {
        expand_tile<symmetric, asks>(lines, e.whole_factors_[tile], expanded);
      } else {
        expand_tile<kind, asks>(lines, e.factors_[tile], expanded);
      }
      find_factors(e, tile);
    }
  }

  const GemmArgs& a_;
  std::uint32_t slots_;
  std::int64_t early_;
  bool asks_;
  std::int64_t count_;
  std::byte* to_;
  std::int64_t done_ = 0;
  std::int64_t panel_ = 0;  // of the next unit
  std::int64_t unit_;
  std::int64_t span_end_;
  const std::byte* weights_;
  bool whole_[2];
  __m512 inverses_[2];
  Factors factors_[2];
  WholeFactors whole_factors_[2];  // instead, of a whole tile
};

}  // namespace
}  // namespace numagraft::NUMAGRAFT_ISA

#pragma once

// Grids of int4: w = scale * q + minimum, q in 0..15 (symmetric: minimum = -8 scale), searched for the least squared error over
// a group. Free ones may be any; whole ones have a scale and a minimum that are integer multiples of a step, so that all of a
// span's weights are int8 in steps of it. Included by pack.cpp; everything is internal to it.
#include "kernels/pack_gather.h"

namespace numagraft::NUMAGRAFT_ISA {
namespace {

struct Grid {
  F scale;
  F minimum;
};
struct Found {
  Grid grid;
  F error;  // squared, summed over the group
};

constexpr int kMostGroup = 128;

// Nearest integer of |x| < 2^22, ties to even.
NUMAGRAFT_INLINE F whole_number(F x) { return (x + splat(12582912.0f)) - splat(12582912.0f); }
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

  // Tries grids, several in one pass, and of each the one that fits the integers it gives best (least squares). That one's error
  // follows from sums over the group, without another pass over it. `both`: the first may be chosen as well.
  template <bool both, int grids>
  inline __attribute__((always_inline)) void look_at(const Grid (&tried)[grids]) {
    struct Sums {
      F inverse;
      F offset;
      F squares;
      F q;
      F qq;
      F wq;
    } sums[grids];
#pragma GCC unroll 2
    for (int i = 0; i < grids; ++i) {
      const F inverse = reciprocal_or_zero(tried[i].scale);
      sums[i] = {inverse, -tried[i].minimum * inverse, F{}, F{}, F{}, F{}};
    }
    for (int k = 0; k < inputs; ++k) {
      const F w = at(staged, k, slice);
#pragma GCC unroll 2
      for (int i = 0; i < grids; ++i) {
        const F q = whole_number(minimum(maximum(w * sums[i].inverse + sums[i].offset, F{}), splat(15.0f)));
        if constexpr (both) {
          const F d = w - (tried[i].scale * q + tried[i].minimum);
          sums[i].squares += d * d;
        }
        sums[i].q += q;
        sums[i].qq += q * q;
        sums[i].wq += w * q;
      }
    }
#pragma GCC unroll 2
    for (int i = 0; i < grids; ++i) {
      if constexpr (both) keep(sums[i].squares, tried[i]);
      keep_fitted(sums[i].q, sums[i].qq, sums[i].wq);
    }
  }
  inline __attribute__((always_inline)) void look_at(const Grid& tried) {
    const Grid one[] = {tried};
    look_at<true>(one);
  }

 private:
  inline __attribute__((always_inline)) void keep_fitted(F sq, F sqq, F swq) {
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
  inline __attribute__((always_inline)) void keep(F found, const Grid& tried) {
    const I better = found < error;
    error = select(better, found, error);
    grid = choose(better, tried, grid);
  }
};

// What all searches over a group begin with.
struct Summary {
  F low;
  F high;
  F sum;
  F squares;
};
NUMAGRAFT_INLINE Summary summary_of(const float* staged, int slice, int inputs) {
  Summary group{at(staged, 0, slice), at(staged, 0, slice), F{}, F{}};
  for (int k = 0; k < inputs; ++k) {
    const F w = at(staged, k, slice);
    group.low = minimum(group.low, w);
    group.high = maximum(group.high, w);
    group.sum += w;
    group.squares += w * w;
  }
  return group;
}

// Grids that span less than the range often have the smaller squared error: a few spans are tried, the best refitted once
// more, and, if `thorough`, its neighbours a few per cent wider and narrower, each refitted.
template <bool symmetric, bool thorough>
Found search(const float* staged, int slice, int inputs, const Summary& group) {
  const F n = splat(static_cast<float>(inputs));
  const F middle = (group.low + group.high) * splat(0.5f);
  const F spread = symmetric ? group.squares : maximum(group.squares - group.sum * group.sum / n, F{});
  Search<symmetric> best{staged, slice, inputs, group.sum, spread, splat(__builtin_inff()), {F{}, symmetric ? F{} : middle}};
  if constexpr (symmetric) {
    // The integers reach -8 but only +7: the side with the larger magnitude gets the -8, by the scale's sign, or the +7.
    const F extreme = select(-group.low > group.high, group.low, group.high);
    constexpr float reaches[] = {-8.4f, -7.6f, -6.8f, 7.5f, 6.7f};
    for (float reach : reaches) best.look_at(rounded<true>(extreme * splat(1.0f / reach), F{}));
    best.look_at(best.grid);
    constexpr float neighbours[] = {1.04f, 0.96f};
    for (int i = 0; thorough && i < 2; ++i) best.look_at(rounded<true>(best.grid.scale * splat(neighbours[i]), F{}));
  } else {
    const auto around = [](F centre, F scale) { return rounded<false>(scale, centre - scale * splat(7.5f)); };
    const auto spanning = [&](float span) { return around(middle, (group.high - group.low) * splat(span / 15.0f)); };
    if constexpr (thorough) {
      constexpr float spans[] = {1.0f, 0.9f, 0.8f};
      for (float span : spans) best.look_at(spanning(span));
    } else {
      const Grid spans[] = {spanning(0.95f), spanning(0.85f)};
      best.template look_at<false>(spans);
    }
    best.look_at(best.grid);
    constexpr float neighbours[] = {1.03f, 0.97f};
    for (int i = 0; thorough && i < 2; ++i) {
      best.look_at(around(best.grid.minimum + best.grid.scale * splat(7.5f), best.grid.scale * splat(neighbours[i])));
      best.look_at(best.grid);
    }
  }
  return {best.grid, best.error};
}

// ---- Whole grids: in steps, w = r q + m. Tried in 16-bit integers, two inputs of a column to a lane.

constexpr float kInt8Reach = 127.0f;
constexpr int kParts = 16;             // of a step: what the search calculates in
// Times squared. Of Gaussian weights 3 leaves 0.45 % between tiles and others, 2 0.48 %, and 1 0.51 %; each costs or saves 0.00003 of error.
constexpr float kOffCost = 3;
constexpr float kWholeReach = 126.0f;  // of m and 15 r + m, in magnitude: as bf16 they may lie up to 1.4 beyond, and 127.5 would be too much

#if defined(__AVX512BW__)
NUMAGRAFT_INLINE I rounded_product16(I a, I b) { return (I)_mm512_mulhrs_epi16((__m512i)a, (__m512i)b); }  // a b / 2^15
NUMAGRAFT_INLINE I at_least_zero16(I x) { return (I)_mm512_max_epi16((__m512i)x, __m512i{}); }
NUMAGRAFT_INLINE I at_most16(I x, I most) { return (I)_mm512_min_epi16((__m512i)x, (__m512i)most); }
NUMAGRAFT_INLINE I square_pairs16(I x) { return (I)_mm512_madd_epi16((__m512i)x, (__m512i)x); }
#elif defined(__AVX2__)
NUMAGRAFT_INLINE I rounded_product16(I a, I b) { return (I)_mm256_mulhrs_epi16((__m256i)a, (__m256i)b); }
NUMAGRAFT_INLINE I at_least_zero16(I x) { return (I)_mm256_max_epi16((__m256i)x, __m256i{}); }
NUMAGRAFT_INLINE I at_most16(I x, I most) { return (I)_mm256_min_epi16((__m256i)x, (__m256i)most); }
NUMAGRAFT_INLINE I square_pairs16(I x) { return (I)_mm256_madd_epi16((__m256i)x, (__m256i)x); }
#else
NUMAGRAFT_INLINE I lower16(I x) { return (x << 16) >> 16; }
NUMAGRAFT_INLINE I pair16(I lower, I upper) { return (lower & 0xFFFF) | (upper << 16); }
NUMAGRAFT_INLINE I rounded_product16(I a, I b) { return pair16((lower16(a) * lower16(b) + 0x4000) >> 15, ((a >> 16) * (b >> 16) + 0x4000) >> 15); }
NUMAGRAFT_INLINE I at_least_zero16(I x) { return pair16(lower16(x) & (lower16(x) > 0), (x >> 16) & (x > 0xFFFF)); }
NUMAGRAFT_INLINE I at_most16(I x, I most) {
  const I lower = lower16(x) < lower16(most);
  const I upper = (x >> 16) < (most >> 16);
  return pair16((lower & x) | (~lower & most), (upper & (x >> 16)) | (~upper & (most >> 16)));
}
NUMAGRAFT_INLINE I square_pairs16(I x) { return lower16(x) * lower16(x) + (x >> 16) * (x >> 16); }
#endif
typedef std::int16_t I16Pairs __attribute__((vector_size(kLanes * 4)));
NUMAGRAFT_INLINE I twice16(I x) { return (x & 0xFFFF) | (x << 16); }

template <bool symmetric>
struct WholeSearch {
  const I* pairs;  // the group's weights in parts of a step
  int count;
  F step;
  F inverse_step;
  I error;         // of the best grid so far
  F r;
  F m;

  // What all grids of one scale share.
  struct Scale {
    F r;
    I16Pairs parts;
    I inverse;  // 2^15 / parts
    F off;      // once it is bf16
  };
  inline __attribute__((always_inline)) Scale scale_of(F tried_r) const {
    return {tried_r, (I16Pairs)twice16(round_to_int(tried_r * splat(kParts))), twice16(round_to_int(splat(32768.0f / kParts) / tried_r)),
            finite_rounded_to_bf16(tried_r * step) * inverse_step - tried_r};
  }

  // Several minima in one pass: what is computed for one hides behind the others' weights.
  template <int minima>
  inline __attribute__((always_inline)) void look_at(const Scale& tried, const F (&tried_m)[minima]) {
    I16Pairs least[minima];
    I squares[minima];
#pragma GCC unroll 4
    for (int j = 0; j < minima; ++j) {
      least[j] = (I16Pairs)twice16(round_to_int(tried_m[j] * splat(kParts)));
      // What the middle of the grid is off by once scale and minimum are bf16: tiles multiply whole numbers, others do not.
      const F off_minimum = symmetric ? splat(-8) * tried.off : finite_rounded_to_bf16(tried_m[j] * step) * inverse_step - tried_m[j];
      const F off = (off_minimum + splat(7.5f) * tried.off) * splat(kParts);
      squares[j] = round_to_int(off * off * splat(2 * kOffCost * static_cast<float>(count)));
    }
    for (int i = 0; i < count; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < minima; ++j) {
        const I16Pairs above = (I16Pairs)pairs[i] - least[j];
        const I16Pairs q = (I16Pairs)at_most16(rounded_product16(at_least_zero16((I)above), tried.inverse), twice16(I{} + 15));
        squares[j] += square_pairs16((I)(above - q * tried.parts));
      }
    }
#pragma GCC unroll 4
    for (int j = 0; j < minima; ++j) take(squares[j], tried.r, tried_m[j]);
  }
  inline __attribute__((always_inline)) void take(const WholeSearch& other) { take(other.error, other.r, other.m); }

 private:
  inline __attribute__((always_inline)) void take(I found, F found_r, F found_m) {
    const I better = found < error;
    error = (better & found) | (~better & error);
    r = select(better, found_r, r);
    m = select(better, found_m, m);
  }
};

template <bool symmetric>
Found search_whole(const float* staged, int slice, int inputs, const Grid& free, const Summary& group, F step) {
  const F inverse = reciprocal_or_zero(step);
  I pairs[kMostGroup / 2];
  const int count = (inputs + 1) / 2;
  for (int i = 0; i < count; ++i) {
    const F first = at(staged, 2 * i, slice);
    const F second = 2 * i + 1 < inputs ? at(staged, 2 * i + 1, slice) : first;
    const F parts = inverse * splat(static_cast<float>(kParts));
    pairs[i] = (round_to_int(first * parts) & 0xFFFF) | (round_to_int(second * parts) << 16);
  }
  const WholeSearch<symmetric> none{pairs, count, step, inverse, I{} + 0x7FFFFFFF, splat(1.0f), F{}};
  WholeSearch<symmetric> best = none;
  const auto limited = [](F r, float most) { return maximum(splat(1.0f), minimum(splat(most), r)); };
  if constexpr (symmetric) {
    // w = r (q - 8), or w = -r (q - 8), which is r (15 - q) - 7 r
    const F extreme = maximum(-group.low, group.high) * inverse;
    const F least = whole_number(extreme * splat(1.0f / 9.0f) - splat(0.5f));
    for (int i = 0; i < 6; ++i) {
      const F r = limited(least + splat(static_cast<float>(i)), 15.0f);
      const F minima[] = {splat(-8.0f) * r, splat(-7.0f) * r};
      best.look_at(best.scale_of(r), minima);
    }
    const F scale = select(best.m == splat(-7.0f) * best.r, -best.r, best.r) * step;
    return {rounded<true>(scale, F{}), to_float(best.error) * (step * step) * splat(1.0f / (kParts * kParts))};
  } else {
    const F middle = (free.minimum + free.scale * splat(7.5f)) * inverse;
    const F least = whole_number(free.scale * inverse - splat(0.5f));
    for (int i = 0; i < 3; ++i) {
      WholeSearch<symmetric> at_r = none;
      const F r = limited(least + splat(static_cast<float>(i)), 16.0f);
      const auto scale = at_r.scale_of(r);
      const auto within = [&](F m) { return maximum(splat(-kWholeReach), minimum(splat(kWholeReach) - splat(15.0f) * r, m)); };
      const F centre = whole_number(middle - splat(7.5f) * r);
      const auto around = [&](float off) { return within(centre + splat(off)); };
      const F wide[] = {around(-4), around(0), around(4)};
      at_r.look_at(scale, wide);
      const F near[] = {within(at_r.m - splat(2.0f)), within(at_r.m + splat(2.0f))};
      at_r.look_at(scale, near);
      const F beside[] = {within(at_r.m - splat(1.0f)), within(at_r.m + splat(1.0f))};
      at_r.look_at(scale, beside);
      best.take(at_r);
    }
    return {rounded<false>(best.r * step, best.m * step), to_float(best.error) * (step * step) * splat(1.0f / (kParts * kParts))};
  }
}

}  // namespace
}  // namespace numagraft::NUMAGRAFT_ISA

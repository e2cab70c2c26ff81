#pragma once

// int4: w = scale * q + minimum, q in 0..15 (symmetric: minimum = -8 scale); grids are searched for the least squared error.
// Included by pack.cpp; everything is internal to it.
#include "kernels/pack_nibbles.h"

namespace numagraft::NUMAGRAFT_ISA {
namespace {

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
      store_nibbles(a, unit, slice, nibbles, largest[slice]);
    }
  }
  if (a.power != nullptr) *a.power += sum_lanes(power);
}

}  // namespace
}  // namespace numagraft::NUMAGRAFT_ISA

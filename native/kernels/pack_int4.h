#pragma once

// int4: groups of inputs with a grid each, and per span an int8 scale that tiles expand to.
// Included by pack.cpp; everything is internal to it.
#include "kernels/int4_grids.h"
#include "kernels/pack_nibbles.h"

namespace numagraft::NUMAGRAFT_ISA {
namespace {

// Whole spans, with their inputs in other parts.
void gather_spans(const PackArgs& a, float* staged) {
  Layout spans = *a.layout;
  spans.units = stage_units(*a.layout);
  spans.k = spans.units * kUnitInputs;
  PackArgs all = a;
  all.layout = &spans;
  all.first_input -= a.layout->lead_units * kUnitInputs;
  gather_any(all, staged);
}

// A column takes whole grids where their squared error is at most so many times that of free ones after a short search, in the
// mean over its groups in the span. Weights on a grid of their own, of a checkpoint that was quantised before, keep it.
constexpr float kWholeCost = 1.25f;
constexpr float kExact = 1e-5f;  // of a group's power: an error that does not count

struct Int4Span {
  Grid grids[kSlices][kInt4SpanInputs / 32];
  F step[kSlices];   // of whole grids
  I whole[kSlices];  // mask of the columns that have these
};

// Spans lie at multiples of kInt4SpanInputs in the source, whatever part of it is packed: every placement finds the same grids.
// `staged`: the span's inputs, the first `inputs` of which exist.
template <bool symmetric>
void find_grids(const float* staged, int group, int inputs, Int4Span& span) {
  const auto each_group = [&](auto body) {
    for (int slice = 0; slice < kSlices; ++slice) {
      for (int first = 0; first < inputs; first += group) {
        // padding must not pull the grid towards zero
        body(slice, first / group, staged + first * kPanelColumns, inputs - first < group ? inputs - first : group);
      }
    }
  };
  Summary summaries[kSlices][kInt4SpanInputs / 32];
  for (F& step : span.step) step = F{};
  each_group([&](int slice, int index, const float* members, int count) {
    const Summary summary = summaries[slice][index] = summary_of(members, slice, count);
    span.step[slice] = maximum(maximum(-summary.low, summary.high), span.step[slice]);
  });
  for (F& step : span.step) step *= splat(1.0f / kInt8Reach);
  F cost[kSlices] = {};
  each_group([&](int slice, int index, const float* members, int count) {
    const Summary& summary = summaries[slice][index];
    const Found free = search<symmetric, false>(members, slice, count, summary);
    const Found whole = search_whole<symmetric>(members, slice, count, free.grid, summary, span.step[slice]);
    const F exact = summary.squares * splat(kExact) + splat(1e-30f);
    cost[slice] += (whole.error + exact) / (free.error + exact);
    span.grids[slice][index] = whole.grid;
  });
  const int groups = (inputs + group - 1) / group;
  bool all_whole[kSlices];
  for (int slice = 0; slice < kSlices; ++slice) {
    span.whole[slice] = cost[slice] <= splat(kWholeCost * static_cast<float>(groups));
    all_whole[slice] = sum_lanes(to_float(span.whole[slice])) == -kLanes;
  }
  each_group([&](int slice, int index, const float* members, int count) {
    if (all_whole[slice]) return;
    const Grid free = search<symmetric, true>(members, slice, count, summaries[slice][index]).grid;
    span.grids[slice][index] = choose(span.whole[slice], span.grids[slice][index], free);
  });
}

// `staged`: by gather_spans.
template <bool symmetric>
void pack_int4(const PackArgs& a, const float* staged) {
  const Layout& layout = *a.layout;
  const std::int64_t present = a.source->columns - a.first_input + layout.lead_units * kUnitInputs;
  F power = {};
  for (std::int64_t first = 0; first < layout.lead_units + layout.units; first += layout.span_units) {
    const std::int64_t left = present - first * kUnitInputs;
    const int inputs = left < 0 ? 0 : left < kInt4SpanInputs ? static_cast<int>(left) : static_cast<int>(kInt4SpanInputs);
    const float* span_inputs = staged + first * kUnitInputs * kPanelColumns;
    Int4Span span{};
    find_grids<symmetric>(span_inputs, layout.group, inputs, span);
    for (int slice = 0; slice < kSlices; ++slice) {
      F largest = {};
      for (int u = 0; u < layout.span_units; ++u) {
        const std::int64_t unit = first - layout.lead_units + u;
        const bool packed = unit >= 0 && unit < layout.units;
        auto* scales = reinterpret_cast<std::uint16_t*>(a.panel + unit * layout.unit_bytes + layout.data_bytes) + slice * kLanes;
        I nibbles[kUnitInputs];
        for (int half = 0; half < 2; ++half) {
          const int begin = u * kUnitInputs + half * 32;
          const Grid grid = span.grids[slice][begin / layout.group];
          if (packed && half < layout.unit_groups) {
            store(scales + half * kPanelColumns, to_bf16(grid.scale));
            if (!symmetric) store(scales + (layout.unit_groups + half) * kPanelColumns, to_bf16(grid.minimum));
          }
          const F inverse = reciprocal_or_zero(grid.scale);
          F squares = {};
          for (int k = 0; k < 32; ++k) {
            const F w = at(span_inputs, begin + k, slice);
            const I q = nibbles[half * 32 + k] = round_to_int(minimum(maximum((w - grid.minimum) * inverse, F{}), splat(15.0f)));
            if (begin + k >= inputs) continue;
            const F value = grid.scale * to_float(q) + grid.minimum;
            largest = maximum(magnitude(value), largest);
            squares += value * value;
          }
          if (packed) power += squares;
        }
        if (packed) store_nibbles(a, unit, slice, nibbles);
      }
      const F step = select(span.whole[slice], span.step[slice], largest * splat(-1.0f / kInt8Reach));
      store(a.side + first / layout.span_units * a.side_stride + slice * kLanes, step);
    }
  }
  if (a.power != nullptr) *a.power += sum_lanes(power);
}

}  // namespace
}  // namespace numagraft::NUMAGRAFT_ISA

#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/format.h"

namespace numagraft {

// How a packed matrix lies in memory; docs/kernels.md draws it. A matrix of `rows` output channels over `k` inputs is a
// row of panels; a panel holds 32 output channels ("columns") as one sequential stream of units; a unit covers 64 inputs.
inline constexpr int kPanelColumns = 32;
inline constexpr int kUnitInputs = 64;
inline constexpr int kTileColumns = 16;
// Every tile kernel works through a panel in chunks of this many inputs or a multiple, so that a chunk stays in L1.
inline constexpr int kChunkInputs = 512;
inline constexpr std::int64_t kChunkUnits = kChunkInputs / kUnitInputs;
// Tiles expand int4 and mxfp4 to int8 with a scale per column and span of so many inputs, which the side table holds. Longer
// spans mean fewer sums to scale, and larger scales, as the largest of more weights sets them.
inline constexpr int kInt4SpanInputs = 1024;
inline constexpr int kMxfp4SpanInputs = 512;
// Fewer rows than this multiply int4 and mxfp4 faster, and exactly, without tiles.
inline constexpr int kReroundRowsFrom = 8;
inline constexpr int kFp8Block = 128;
// int8 weights are stored as w + 128 in unsigned bytes: the VNNI instructions multiply unsigned by signed.
inline constexpr int kInt8Offset = 128;
inline constexpr int kMxfp4Offset = 12;  // e2m1 times two lies in -12..12

struct Layout {
  WeightKind kind = WeightKind::int8;
  int group = 32;
  bool symmetric = false;
  std::int64_t rows = 0;
  std::int64_t k = 0;
  std::int64_t panels = 0;
  std::int64_t units = 0;
  std::int64_t data_bytes = 0;   // of one unit, without its scales
  std::int64_t unit_bytes = 0;
  std::int64_t panel_bytes = 0;
  int unit_groups = 0;           // scale rows per unit (int4, mxfp4)
  std::int64_t span_units = kChunkUnits;  // of int4 and mxfp4: under one side-table scale
  std::int64_t lead_units = 0;   // of the first span that belong to the part before this one (int4): see make_layout
  std::int64_t scale_rows = 0;   // of the side table, which holds [panel][row][32] floats: a panel's lie together
};

// `first_input`: where the matrix's inputs begin in the source. The spans of int4 lie at multiples of kInt4SpanInputs there, so
// that every placement has the same: the first and the last may be parts of one.
Layout make_layout(const WeightFormat& format, std::int64_t rows, std::int64_t k, std::int64_t first_input = 0);
static inline std::int64_t span_of(const Layout& layout, std::int64_t unit) { return (layout.lead_units + unit) / layout.span_units; }
static inline std::int64_t span_end(const Layout& layout, std::int64_t unit) {
  const std::int64_t end = (span_of(layout, unit) + 1) * layout.span_units - layout.lead_units;
  return end < layout.units ? end : layout.units;
}

// Inputs that one set of scales covers: shards of the inputs begin at a multiple, so that every placement quantises alike.
int input_alignment(const WeightFormat& format);

static inline std::int64_t matrix_bytes(const Layout& layout) { return layout.panels * layout.panel_bytes; }
static inline std::int64_t side_floats(const Layout& layout) { return layout.scale_rows * layout.panels * kPanelColumns; }
static inline std::int64_t panel_side_floats(const Layout& layout) { return layout.scale_rows * kPanelColumns; }
static inline std::int64_t bias_floats(const Layout& layout) { return layout.panels * kPanelColumns; }

}  // namespace numagraft

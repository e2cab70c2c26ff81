#include "kernels/layout.h"

namespace numagraft {
namespace {

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

}  // namespace

int input_alignment(const WeightFormat& format) {
  if (format.kind == WeightKind::fp8) return kFp8Block;
  if (format.kind == WeightKind::int4 && format.group > kUnitInputs) return format.group;
  return kUnitInputs;
}

Layout make_layout(const WeightFormat& format, std::int64_t rows, std::int64_t k, std::int64_t first_input) {
  constexpr std::int64_t elements = kPanelColumns * kUnitInputs;
  Layout layout;
  layout.kind = format.kind;
  layout.group = format.group;
  layout.symmetric = format.symmetric;
  layout.rows = rows;
  layout.k = k;
  layout.panels = ceil_div(rows, kPanelColumns);
  layout.units = ceil_div(k, kUnitInputs);
  std::int64_t scale_bytes = 0;
  switch (format.kind) {
    case WeightKind::bf16:
      layout.data_bytes = elements * 2;
      break;
    case WeightKind::int8:
      layout.data_bytes = elements;
      layout.scale_rows = 1;
      break;
    case WeightKind::fp8:
      layout.data_bytes = elements;
      layout.scale_rows = ceil_div(k, kFp8Block);
      break;
    case WeightKind::int4:
      layout.data_bytes = elements / 2;
      layout.unit_groups = format.group >= kUnitInputs ? 1 : kUnitInputs / format.group;
      scale_bytes = std::int64_t{layout.unit_groups} * kPanelColumns * 2 * (format.symmetric ? 1 : 2);
      layout.span_units = kInt4SpanInputs / kUnitInputs;
      layout.lead_units = first_input / kUnitInputs % layout.span_units;
      layout.scale_rows = ceil_div(layout.lead_units + layout.units, layout.span_units);
      break;
    case WeightKind::mxfp4:
      layout.data_bytes = elements / 2;
      layout.group = 32;
      layout.symmetric = true;
      layout.unit_groups = 2;
      scale_bytes = std::int64_t{layout.unit_groups} * kPanelColumns;
      layout.span_units = kMxfp4SpanInputs / kUnitInputs;
      layout.scale_rows = ceil_div(k, kMxfp4SpanInputs);
      break;
  }
  layout.unit_bytes = layout.data_bytes + scale_bytes;
  layout.panel_bytes = layout.unit_bytes * layout.units;
  return layout;
}

}  // namespace numagraft

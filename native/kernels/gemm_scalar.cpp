// The reference every other row of the table is compared with: weights expanded to fp32, plain loops.
#include "kernels/dequantise.h"
#include "kernels/kernel_table.h"

namespace numagraft::NUMAGRAFT_ISA {
namespace {

float input(const RowBlock& block, RowForm form, std::int64_t index) {
  if (form == RowForm::f32) return reinterpret_cast<const float*>(block.low)[index];
  const std::int64_t swapped = (index & ~std::int64_t{3}) | (index & 1) << 1 | (index & 2) >> 1;
  return static_cast<float>(reinterpret_cast<const std::int16_t*>(block.low)[swapped]);
}

}  // namespace

void gemm(const GemmArgs& a) {
  const Layout& layout = *a.layout;
  const bool is_float = layout.kind == WeightKind::bf16 || layout.kind == WeightKind::fp8;
  const RowForm form = is_float ? RowForm::f32 : RowForm::wide;
  for (std::int64_t panel = 0; panel < a.panels; ++panel) {
    float* c = a.c + panel * a.c_panel_stride;
    for (std::int64_t unit = a.first_unit; unit < a.last_unit; ++unit) {
      float weights[kUnitInputs * kPanelColumns];
      dequantise_unit(layout, a.panel + panel * layout.panel_bytes, unit, panel_side(a, panel), kPanelColumns,
                      weights);
      float* to = c;
      for (int b = 0; b < a.block_count; ++b) {
        const RowBlock& block = a.blocks[b];
        for (int row = 0; row < block.rows; ++row, to += kPanelColumns) {
          float total[kPanelColumns] = {};
          for (int k = 0; k < kUnitInputs; ++k) {
            const float x = input(block, form, (unit * block.stride_rows + row) * kUnitInputs + k);
            for (int column = 0; column < kPanelColumns; ++column) total[column] += x * weights[k * kPanelColumns + column];
          }
          for (int column = 0; column < kPanelColumns; ++column) {
            const float value = total[column] * block.scale[row];
            to[column] = unit == 0 ? value : to[column] + value;
          }
        }
      }
    }
  }
}

}  // namespace numagraft::NUMAGRAFT_ISA

#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/format.h"
#include "kernels/kernel_table.h"
#include "memory/buffer.h"
#include "ops/weight_source.h"

namespace numagraft {

// Where one packed matrix lies inside a buffer, as byte offsets; each piece starts on a cache line.
struct MatrixPlace {
  Layout layout;
  std::size_t panels = 0;
  std::size_t side = 0;
  std::size_t bias = 0;  // 0: none
  std::size_t end = 0;
};
MatrixPlace place_matrix(const WeightFormat& format, std::int64_t rows, std::int64_t k, bool has_bias, std::size_t at, std::int64_t first_input = 0);

// The same with its buffer: what kernels are given.
struct PackedMatrix {
  const MatrixPlace* place = nullptr;
  std::byte* base = nullptr;

  const Layout& layout() const { return place->layout; }
  std::byte* panel(std::int64_t index) const { return base + place->panels + static_cast<std::size_t>(index * layout().panel_bytes); }
  float* side(std::int64_t panel) const { return reinterpret_cast<float*>(base + place->side) + panel * panel_side_floats(layout()); }
  static constexpr std::int64_t side_stride() { return kPanelColumns; }
  float* bias(std::int64_t panel) const {
    return place->bias == 0 ? nullptr : reinterpret_cast<float*>(base + place->bias) + panel * kPanelColumns;
  }
  std::size_t panel_offset(std::int64_t index) const { return place->panels + static_cast<std::size_t>(index * layout().panel_bytes); }
};

// Packs one panel whose columns are source rows first_row .. first_row + 31 (those outside [row_begin, row_end) as zeros)
// and whose input 0 is the source's column first_input.
// `staged` is scratch of pack_scratch_bytes; `power` as in PackArgs. Throws CheckpointFailure where the source's file cannot be read.
void pack_panel(const KernelTable& kernels, const PackedMatrix& matrix, std::int64_t panel, const WeightSource& source,
                std::int64_t first_row, std::int64_t row_begin, std::int64_t row_end, std::int64_t first_input,
                std::byte* staged, double* power = nullptr);

static inline std::size_t pack_scratch_bytes(const Layout& layout, const WeightSource& source) {
  return static_cast<std::size_t>(stage_bytes(layout)) + panel_scratch_bytes(source);
}

// Products of prepared rows with panels [panel, panel + count) into c[panel][row][32].
void multiply_panels(const KernelTable& kernels, const PackedMatrix& matrix, std::int64_t panel, std::int64_t count,
                     const RowBlock* blocks, std::int64_t block_count, float* c, std::int64_t c_panel_stride);
// The same where the rows' inputs are more than L2 holds: all panels over `units_together` units (whole chunks) at a time.
void multiply_panels_in_pieces(const KernelTable& kernels, const PackedMatrix& matrix, std::int64_t panel, std::int64_t count,
                               const RowBlock* blocks, std::int64_t block_count, std::int64_t units_together, float* c,
                               std::int64_t c_panel_stride);

// Rows of packed matrices as fp32. A panel is dequantised once and kept while rows of it are asked for.
class RowUnpacker {
 public:
  // All inputs of the row; valid until the next call.
  const float* row(const PackedMatrix& matrix, std::int64_t row);

 private:
  const std::byte* panel_ = nullptr;  // the one that rows_ holds
  std::vector<float> rows_;           // [32][whole units]
};

// Writes one fp32 value into a view of any dtype.
void store_element(const MatrixView& to, std::int64_t row, std::int64_t column, float value);
float load_element(const MatrixView& from, std::int64_t row, std::int64_t column);
// Where it lies, in a matrix of fp32 or 16-bit values whose columns are contiguous.
std::byte* element_at(const MatrixView& matrix, std::int64_t row, std::int64_t column = 0);
// A row's values one after the other: its own memory, or a copy as fp32. Sets their dtype.
const void* contiguous_row(const MatrixView& x, std::int64_t row, std::byte* copy, DType& dtype);

// Sum over a matrix's weights of the mean squared error of rounding them to its side table's int8 scales (step^2 / 12; less where
// these are positive, as weights are multiples of them).
double rerounding_noise(const PackedMatrix& matrix);

// Every problem with a format, empty if none.
std::vector<std::string> format_problems(const WeightFormat& format);

}  // namespace numagraft

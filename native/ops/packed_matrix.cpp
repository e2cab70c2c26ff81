#include "ops/packed_matrix.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/dequantise.h"

namespace numagraft {
namespace {

std::size_t whole_lines(std::size_t bytes) { return (bytes + 63) / 64 * 64; }

float bf16_to_float(std::uint16_t half) {
  const std::uint32_t bits = std::uint32_t{half} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

std::uint16_t float_to_bf16(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7FFFFFFF) > 0x7F800000) return static_cast<std::uint16_t>((bits >> 16) | 0x40);
  return static_cast<std::uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

float f16_to_float(std::uint16_t half) {
  const int exponent = (half >> 10) & 31;
  const int mantissa = half & 1023;
  float value = exponent == 0    ? std::ldexp(static_cast<float>(mantissa), -24)
                : exponent == 31 ? (mantissa ? NAN : INFINITY)
                                 : std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
  return half & 0x8000 ? -value : value;
}

std::uint16_t float_to_f16(float value) {
  const std::uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float magnitude = std::fabs(value);
  if (std::isnan(value)) return static_cast<std::uint16_t>(sign | 0x7E00);
  if (magnitude >= 65520.0f) return static_cast<std::uint16_t>(sign | 0x7C00);
  int exponent = 0;
  std::frexp(magnitude, &exponent);
  exponent = exponent < -13 ? -13 : exponent;
  const auto mantissa = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 11 - exponent)));  // ties to even
  if (mantissa < 1024) return static_cast<std::uint16_t>(sign | mantissa);
  return static_cast<std::uint16_t>(sign + ((exponent + 13) << 10) + mantissa);
}

}  // namespace

MatrixPlace place_matrix(const WeightFormat& format, std::int64_t rows, std::int64_t k, bool has_bias, std::size_t at,
                         std::int64_t first_input) {
  MatrixPlace place;
  place.layout = make_layout(format, rows, k, first_input);
  place.panels = whole_lines(at);
  place.side = whole_lines(place.panels + static_cast<std::size_t>(matrix_bytes(place.layout)));
  place.end = whole_lines(place.side + static_cast<std::size_t>(side_floats(place.layout)) * sizeof(float));
  if (has_bias) {
    place.bias = place.end;
    place.end = whole_lines(place.bias + static_cast<std::size_t>(bias_floats(place.layout)) * sizeof(float));
  }
  return place;
}

void pack_panel(const KernelTable& kernels, const PackedMatrix& matrix, std::int64_t panel, const WeightSource& source,
                std::int64_t first_row, std::int64_t row_begin, std::int64_t row_end, std::int64_t first_input,
                std::byte* staged, double* power) {
  MatrixView rows = source;
  if (source.in_file()) {
    const std::int64_t first = std::max(first_row, row_begin);
    rows = read_rows(source, first, std::min(first_row + kPanelColumns, row_end), staged + stage_bytes(matrix.layout()));
  }
  PackArgs args{};
  args.layout = &matrix.layout();
  args.source = &rows;
  args.first_row = first_row;
  args.row_begin = row_begin;
  args.row_end = row_end;
  args.first_input = first_input;
  args.panel = matrix.panel(panel);
  args.side = matrix.side(panel);
  args.side_stride = matrix.side_stride();
  args.staged = staged;
  args.power = power;
  kernels.pack(args);
}

void multiply_panels(const KernelTable& kernels, const PackedMatrix& matrix, std::int64_t panel, std::int64_t count,
                     const RowBlock* blocks, std::int64_t block_count, float* c, std::int64_t c_panel_stride) {
  multiply_panels_in_pieces(kernels, matrix, panel, count, blocks, block_count, matrix.layout().units, c, c_panel_stride);
}

void multiply_panels_in_pieces(const KernelTable& kernels, const PackedMatrix& matrix, std::int64_t panel, std::int64_t count,
                               const RowBlock* blocks, std::int64_t block_count, std::int64_t units_together, float* c,
                               std::int64_t c_panel_stride) {
  GemmArgs args{};
  args.layout = &matrix.layout();
  args.panel = matrix.panel(panel);
  args.side = matrix.side(panel);
  args.panels = count;
  args.blocks = blocks;
  args.block_count = static_cast<int>(block_count);
  args.c = c;
  args.c_panel_stride = c_panel_stride;
  args.in_order = kernels.in_order;
  const std::int64_t units = matrix.layout().units;
  for (args.first_unit = 0; args.first_unit < units; args.first_unit = args.last_unit) {
    args.last_unit = std::min(args.first_unit + units_together, units);
    if (args.last_unit < units) args.last_unit -= (matrix.layout().lead_units + args.last_unit) % matrix.layout().span_units;
    kernels.gemm(args);
  }
}

const float* RowUnpacker::row(const PackedMatrix& matrix, std::int64_t row) {
  const Layout& layout = matrix.layout();
  const std::int64_t panel = row / kPanelColumns;
  const std::int64_t width = layout.units * kUnitInputs;
  if (panel_ != matrix.panel(panel)) {
    panel_ = matrix.panel(panel);
    rows_.resize(static_cast<std::size_t>(width * kPanelColumns));
    float weights[kUnitInputs * kPanelColumns];
    for (std::int64_t unit = 0; unit < layout.units; ++unit) {
      dequantise_unit(layout, panel_, unit, matrix.side(panel), matrix.side_stride(), weights);
      for (std::int64_t column = 0; column < kPanelColumns; ++column) {
        float* to = rows_.data() + column * width + unit * kUnitInputs;
        for (int k = 0; k < kUnitInputs; ++k) to[k] = weights[k * kPanelColumns + column];
      }
    }
  }
  return rows_.data() + row % kPanelColumns * width;
}

// Whole grids of int4 are multiples of the step but for being stored as bf16: of Gaussian weights 0.45 % instead of 0.78 %.
constexpr double kWholeRounding = 0.33;

double rerounding_noise(const PackedMatrix& matrix) {
  const Layout& layout = matrix.layout();
  double noise = 0;
  for (std::int64_t panel = 0; panel < layout.panels; ++panel) {
    const float* side = matrix.side(panel);
    for (std::int64_t unit = 0; unit < layout.units; unit = span_end(layout, unit)) {
      const std::int64_t last = std::min(span_end(layout, unit) * kUnitInputs, layout.k);
      for (int column = 0; column < kPanelColumns; ++column) {
        const double step = side[span_of(layout, unit) * kPanelColumns + column];
        const double rounding = std::signbit(step) ? 1 : kWholeRounding;
        noise += rounding * step * step / 12 * static_cast<double>(last - unit * kUnitInputs);
      }
    }
  }
  return noise;
}

void store_element(const MatrixView& to, std::int64_t row, std::int64_t column, float value) {
  const std::int64_t index = row * to.row_stride + column * to.column_stride;
  void* data = const_cast<void*>(to.data);
  switch (to.dtype) {
    case DType::f32:
      static_cast<float*>(data)[index] = value;
      return;
    case DType::bf16:
      static_cast<std::uint16_t*>(data)[index] = float_to_bf16(value);
      return;
    case DType::f16:
      static_cast<std::uint16_t*>(data)[index] = float_to_f16(value);
      return;
    default:
      return;  // the bindings make no quantised matrix of an output
  }
}

float load_element(const MatrixView& from, std::int64_t row, std::int64_t column) {
  const std::int64_t index = row * from.row_stride + column * from.column_stride;
  if (from.dtype == DType::f32) return static_cast<const float*>(from.data)[index];
  const std::uint16_t half = static_cast<const std::uint16_t*>(from.data)[index];
  return from.dtype == DType::bf16 ? bf16_to_float(half) : f16_to_float(half);
}

std::byte* element_at(const MatrixView& matrix, std::int64_t row, std::int64_t column) {
  const std::int64_t bytes = matrix.dtype == DType::f32 ? 4 : 2;
  return static_cast<std::byte*>(const_cast<void*>(matrix.data)) + (row * matrix.row_stride + column) * bytes;
}

const void* contiguous_row(const MatrixView& x, std::int64_t row, std::byte* copy, DType& dtype) {
  dtype = x.dtype;
  if (x.column_stride == 1) return element_at(x, row);
  dtype = DType::f32;
  auto* values = reinterpret_cast<float*>(copy);
  for (std::int64_t k = 0; k < x.columns; ++k) values[k] = load_element(x, row, k);
  return values;
}

std::vector<std::string> format_problems(const WeightFormat& format) {
  std::vector<std::string> problems;
  const bool floating = format.kind == WeightKind::bf16 || format.kind == WeightKind::fp8;
  if (format.kind == WeightKind::int4 && format.group != 32 && format.group != 64 && format.group != 128) {
    problems.push_back("int4 groups hold 32, 64 or 128 inputs, found " + std::to_string(format.group));
  }
  if (floating && format.activations == Activations::int8) {
    problems.push_back("int8 activations need integer weights; these are kept as floating point");
  }
  return problems;
}

}  // namespace numagraft

#include "ops/row_set.h"

#include <cstring>

namespace numagraft {
namespace {

constexpr std::size_t kLine = 64;
std::size_t whole_lines(std::size_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }

}  // namespace

RowSet::RowSet(const KernelTable& kernels, WeightKind kind, std::int64_t k, std::int64_t rows, int block_rows)
    : kernels_(&kernels),
      form_(row_form(kernels, kind)),
      k_(k),
      units_((k + kUnitInputs - 1) / kUnitInputs),
      rows_(rows),
      block_rows_(block_rows),
      tiles_(block_rows > 1 && kernels.tile_rows_from > 0 && rows >= kernels.tile_rows_from),
      full_block_bytes_(offsets(block_rows).end),
      bytes_(rows == 0 ? 0 : block_offset(blocks() - 1) + offsets(stride_rows(blocks() - 1)).end) {}

int RowSet::stride_rows(std::int64_t block) const {
  const std::int64_t left = rows_ - block * block_rows_;
  const int rows = left < block_rows_ ? static_cast<int>(left) : block_rows_;
  return tiles_ ? (rows + 15) / 16 * 16 : rows;
}

RowSet::Offsets RowSet::offsets(int stride_rows) const {
  const auto rows = static_cast<std::size_t>(stride_rows);
  const auto units = static_cast<std::size_t>(units_);
  const bool integers = form_ == RowForm::halves || form_ == RowForm::wide;
  const std::size_t data = units * rows * kUnitInputs * static_cast<std::size_t>(element_bytes(form_));
  Offsets o{};
  o.low = 0;
  o.high = o.low + data;
  o.scale = o.high + (form_ == RowForm::halves || form_ == RowForm::bf16_f16 ? data : 0);
  o.sum = o.scale + whole_lines(rows * sizeof(float));
  o.group_sum = o.sum + whole_lines(rows * sizeof(std::int32_t));
  o.flags = o.group_sum + (integers ? whole_lines(units * rows * 2 * sizeof(float)) : 0);
  // An odd number of lines keeps blocks of a power-of-two size from falling into the same cache sets.
  o.end = o.flags + whole_lines(units);
  if (o.end / kLine % 2 == 0) o.end += kLine;
  return o;
}

RowBlock RowSet::block(std::byte* base, std::int64_t index) const {
  const int stride = stride_rows(index);
  const Offsets o = offsets(stride);
  std::byte* at = base + block_offset(index);
  const std::int64_t left = rows_ - index * block_rows_;
  RowBlock block;
  block.low = at + o.low;
  block.high = at + o.high;
  block.scale = reinterpret_cast<const float*>(at + o.scale);
  block.sum = reinterpret_cast<const std::int32_t*>(at + o.sum);
  block.group_sum = reinterpret_cast<const float*>(at + o.group_sum);
  block.flags = reinterpret_cast<const std::uint8_t*>(at + o.flags);
  block.rows = left < block_rows_ ? static_cast<int>(left) : block_rows_;
  block.stride_rows = stride;
  return block;
}

void RowSet::clear_flags(std::byte* base, std::int64_t first_block, std::int64_t last_block) const {
  for (std::int64_t block = first_block; block < last_block; ++block) {
    std::memset(base + block_offset(block) + offsets(stride_rows(block)).flags, 0, static_cast<std::size_t>(units_));
  }
}

void RowSet::prepare(std::byte* base, std::int64_t row, const void* x, DType dtype, float target_error) const {
  const std::int64_t index = row / block_rows_;
  const auto in_block = static_cast<std::size_t>(row % block_rows_);
  const int stride = stride_rows(index);
  const Offsets o = offsets(stride);
  std::byte* at = base + block_offset(index);
  const std::size_t first = in_block * kUnitInputs * static_cast<std::size_t>(element_bytes(form_));
  PrepareArgs args{};
  args.x = x;
  args.dtype = dtype;
  args.k = k_;
  args.units = units_;
  args.form = form_;
  args.target_error = target_error;
  args.low = at + o.low + first;
  args.high = at + o.high + first;
  args.unit_stride = std::int64_t{stride} * kUnitInputs;
  args.scale = reinterpret_cast<float*>(at + o.scale) + in_block;
  args.sum = reinterpret_cast<std::int32_t*>(at + o.sum) + in_block;
  args.group_sum = reinterpret_cast<float*>(at + o.group_sum) + in_block * 2;
  args.group_stride = std::int64_t{stride} * 2;
  args.flags = reinterpret_cast<std::uint8_t*>(at + o.flags);
  args.flag_bit = static_cast<std::uint8_t>(1 << (in_block / 16));
  kernels_->prepare(args);
}

void RowSet::copy(std::byte* base, std::int64_t row, const RowSet& source, std::byte* source_base, std::int64_t source_row) const {
  const std::int64_t index = row / block_rows_;
  const auto in_block = static_cast<std::size_t>(row % block_rows_);
  const auto stride = static_cast<std::size_t>(stride_rows(index));
  const Offsets to = offsets(static_cast<int>(stride));
  std::byte* at = base + block_offset(index);
  const std::int64_t source_index = source_row / source.block_rows_;
  const auto in_source = static_cast<std::size_t>(source_row % source.block_rows_);
  const auto source_stride = static_cast<std::size_t>(source.stride_rows(source_index));
  const Offsets from = source.offsets(static_cast<int>(source_stride));
  const std::byte* source_at = source_base + source.block_offset(source_index);
  const std::size_t unit_bytes = kUnitInputs * static_cast<std::size_t>(element_bytes(form_));
  const auto units = static_cast<std::size_t>(units_);
  const bool integers = form_ == RowForm::halves || form_ == RowForm::wide;
  // fp16 values are for rows that are multiplied one by one, where they lie
  const auto bit = static_cast<std::uint8_t>(1 << (in_block / 16));
  const auto source_bit = static_cast<std::uint8_t>(1 << (in_source / 16));
  for (std::size_t unit = 0; unit < units; ++unit) {
    std::memcpy(at + to.low + (unit * stride + in_block) * unit_bytes,
                source_at + from.low + (unit * source_stride + in_source) * unit_bytes, unit_bytes);
    if (integers) {
      std::memcpy(at + to.group_sum + (unit * stride + in_block) * 8,
                  source_at + from.group_sum + (unit * source_stride + in_source) * 8, 8);
    }
  }
  if (form_ == RowForm::halves) {
    // The high half is written only where a flag says that it is read.
    const auto* source_flags = reinterpret_cast<const std::uint8_t*>(source_at + from.flags);
    auto* flags = reinterpret_cast<std::uint8_t*>(at + to.flags);
    for (std::size_t unit = 0; unit < units; ++unit) {
      if (!(source_flags[unit] & source_bit)) continue;
      // A flag of either tile makes kernels read the high half of every row.
      if (flags[unit] == 0) std::memset(at + to.high + unit * stride * unit_bytes, 0, stride * unit_bytes);
      flags[unit] |= bit;
      std::memcpy(at + to.high + (unit * stride + in_block) * unit_bytes,
                  source_at + from.high + (unit * source_stride + in_source) * unit_bytes, unit_bytes);
    }
  }
  std::memcpy(at + to.scale + in_block * 4, source_at + from.scale + in_source * 4, 4);
  std::memcpy(at + to.sum + in_block * 4, source_at + from.sum + in_source * 4, 4);
}

}  // namespace numagraft

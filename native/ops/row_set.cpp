#include "ops/row_set.h"

#include <cstring>

namespace numagraft {
namespace {

constexpr std::size_t kLine = 64;
std::size_t whole_lines(std::size_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }

}  // namespace

RowSet::RowSet(const KernelTable& kernels, WeightKind kind, std::int64_t k, std::int64_t rows, int block_rows, HighHalves high)
    : kernels_(&kernels),
      form_(row_form(kernels, kind)),
      k_(k),
      units_((k + kUnitInputs - 1) / kUnitInputs),
      rows_(rows),
      block_rows_(block_rows),
      tiles_(block_rows > 1 && kernels.tile_rows_from > 0 && rows >= kernels.tile_rows_from),
      lists_from_(high == HighHalves::listed && block_rows > 1 && units_ <= kMostListedUnits ? lists_from(kernels, kind).block_rows : 0),
      group_sums_(is_grouped(kind) && form_ == RowForm::halves),
      sums_read_(group_sums_ && !(tiles_ && kernels.reround_rows_from > 0 && rows >= kernels.reround_rows_from)),
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
  const std::size_t data = units * rows * kUnitInputs * static_cast<std::size_t>(element_bytes(form_));
  Offsets o{};
  o.low = 0;
  o.high = o.low + data;
  const std::size_t list = rows * static_cast<std::size_t>(list_stride());
  const std::size_t begins = rows * (units + 1) * sizeof(std::uint16_t);
  const std::size_t high = form_ == RowForm::halves || form_ == RowForm::bf16_f16 ? data : 0;
  o.scale = o.high + (listed(stride_rows) ? whole_lines(list * sizeof(ListedFour) + begins) : high);
  o.sum = o.scale + whole_lines(rows * sizeof(float));
  o.group_sum = o.sum + whole_lines(rows * sizeof(std::int32_t));
  o.flags = o.group_sum + (group_sums_ ? whole_lines(units * rows * 2 * sizeof(float)) : 0);
  // An odd number of lines keeps blocks of a power-of-two size from falling into the same cache sets.
  o.end = o.flags + whole_lines(units);
  if (o.end / kLine % 2 == 0) o.end += kLine;
  return o;
}

RowLists RowSet::lists(std::byte* block, int stride_rows, std::int64_t first_row) const {
  RowLists lists;
  if (!listed(stride_rows)) return lists;
  lists.stride = list_stride();
  lists.rows = stride_rows;
  const std::int64_t all = stride_rows * lists.stride;
  lists.fours = reinterpret_cast<ListedFour*>(block + offsets(stride_rows).high);
  lists.begin = reinterpret_cast<std::uint16_t*>(lists.fours + all) + first_row;
  lists.fours += first_row * lists.stride;
  return lists;
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
  block.group_sum = sums_read_ ? reinterpret_cast<const float*>(at + o.group_sum) : nullptr;
  block.flags = reinterpret_cast<const std::uint8_t*>(at + o.flags);
  block.rows = left < block_rows_ ? static_cast<int>(left) : block_rows_;
  block.stride_rows = stride;
  block.lists = lists(at, stride, 0);
  return block;
}

void RowSet::clear_flags(std::byte* base, std::int64_t first_block, std::int64_t last_block) const {
  for (std::int64_t block = first_block; block < last_block; ++block) {
    std::memset(base + block_offset(block) + offsets(stride_rows(block)).flags, 0, static_cast<std::size_t>(units_));
  }
}

void RowSet::prepare(std::byte* base, std::int64_t row, const void* x, DType dtype, float target_error, float normal_error,
                     bool* has_high, const void* next, bool streamed) const {
  const std::int64_t index = row / block_rows_;
  const auto in_block = static_cast<std::size_t>(row % block_rows_);
  const int stride = stride_rows(index);
  const Offsets o = offsets(stride);
  std::byte* at = base + block_offset(index);
  const std::size_t first = in_block * kUnitInputs * static_cast<std::size_t>(element_bytes(form_));
  PrepareArgs args{};
  args.x = x;
  args.next = next;
  args.dtype = dtype;
  args.k = k_;
  args.units = units_;
  args.form = form_;
  args.target_error = target_error;
  args.normal_error = normal_error;
  args.low = at + o.low + first;
  args.high = at + o.high + first;
  args.unit_stride = std::int64_t{stride} * kUnitInputs;
  args.scale = reinterpret_cast<float*>(at + o.scale) + in_block;
  args.sum = reinterpret_cast<std::int32_t*>(at + o.sum) + in_block;
  args.group_sum = sums_read_ ? reinterpret_cast<float*>(at + o.group_sum) + in_block * 2 : nullptr;
  args.group_stride = std::int64_t{stride} * 2;
  args.flags = reinterpret_cast<std::uint8_t*>(at + o.flags);
  args.flag_bit = static_cast<std::uint8_t>(1 << (in_block / 16));
  args.has_high = has_high;
  args.streamed = streamed;
  args.lists = lists(at, stride, static_cast<std::int64_t>(in_block));
  kernels_->prepare(args);
}

void RowSet::clear_high(std::byte* base, std::int64_t block, const bool* has_high) const {
  const int stride = stride_rows(block);
  if (form_ != RowForm::halves || listed(stride)) return;
  const Offsets o = offsets(stride);
  std::byte* at = base + block_offset(block);
  const auto* flags = reinterpret_cast<const std::uint8_t*>(at + o.flags);
  const std::int64_t left = rows_ - block * block_rows_;
  const std::int64_t rows = left < block_rows_ ? left : block_rows_;
  for (std::int64_t unit = 0; unit < units_; ++unit) {
    if (!flags[unit]) continue;
    std::byte* high = at + o.high + static_cast<std::size_t>(unit * stride * kUnitInputs);
    for (std::int64_t row = 0; row < rows; ++row) {
      if (!has_high[row]) std::memset(high + row * kUnitInputs, 0, kUnitInputs);
    }
  }
}

void RowSet::gather(std::byte* base, const RowSet& source, std::byte* source_base, std::int64_t first_source,
                    const std::int32_t* sources) const {
  const Offsets from = source.offsets(1);
  const std::size_t unit_bytes = kUnitInputs * static_cast<std::size_t>(element_bytes(form_));
  const auto units = static_cast<std::size_t>(units_);
  const std::byte* rows[kBlockRows];
  for (std::int64_t index = 0; index < blocks(); ++index) {
    const std::int64_t first = index * block_rows_;
    const auto count = static_cast<std::size_t>(rows_ - first < block_rows_ ? rows_ - first : block_rows_);
    const auto stride = static_cast<std::size_t>(stride_rows(index));
    const Offsets to = offsets(static_cast<int>(stride));
    std::byte* at = base + block_offset(index);
    for (std::size_t row = 0; row < count; ++row) {
      const std::int64_t from_row = first_source + sources[static_cast<std::size_t>(first) + row];
      rows[row] = source_base + source.block_offset(from_row);
      std::memcpy(at + to.scale + row * 4, rows[row] + from.scale, 4);
      std::memcpy(at + to.sum + row * 4, rows[row] + from.sum, 4);
    }
    // fp16 values are for rows that are multiplied one by one, where they lie: they stay there.
    // Unit by unit: the rows are read, and the block is written, from front to back.
    for (std::size_t unit = 0; unit < units; ++unit) {
      std::byte* low = at + to.low + unit * stride * unit_bytes;
      for (std::size_t row = 0; row < count; ++row) {
        const std::byte* low_row = rows[row] + from.low + unit * unit_bytes;
        if (unit_bytes == 64) {
          std::memcpy(low + row * 64, low_row, 64);
        } else {
          std::memcpy(low + row * unit_bytes, low_row, unit_bytes);
        }
      }
    }
    if (sums_read_) {
      for (std::size_t unit = 0; unit < units; ++unit) {
        for (std::size_t row = 0; row < count; ++row) {
          std::memcpy(at + to.group_sum + (unit * stride + row) * 8, rows[row] + from.group_sum + unit * 8, 8);
        }
      }
    }
    auto* flags = reinterpret_cast<std::uint8_t*>(at + to.flags);
    std::memset(flags, 0, units);
    if (form_ != RowForm::halves) continue;
    for (std::size_t row = 0; row < count; ++row) {
      const auto* row_flags = reinterpret_cast<const std::uint8_t*>(rows[row] + from.flags);
      for (std::size_t unit = 0; unit < units; ++unit) {
        if (row_flags[unit]) flags[unit] = static_cast<std::uint8_t>(flags[unit] | 1 << (row / 16));
      }
    }
    // A flag of either tile makes kernels read the high half of every row.
    for (std::size_t unit = 0; unit < units; ++unit) {
      if (!flags[unit]) continue;
      std::byte* high = at + to.high + unit * stride * unit_bytes;
      for (std::size_t row = 0; row < count; ++row) {
        if (reinterpret_cast<const std::uint8_t*>(rows[row] + from.flags)[unit]) {
          std::memcpy(high + row * unit_bytes, rows[row] + from.high + unit * unit_bytes, unit_bytes);
        } else {
          std::memset(high + row * unit_bytes, 0, unit_bytes);
        }
      }
    }
  }
}

}  // namespace numagraft

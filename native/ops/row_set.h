#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/kernel_table.h"

namespace numagraft {

// What rounding the inputs may cost, as a share of their typical size (docs/kernels.md derives the figures).
struct InputErrors {
  float any = 0;
  float normal = 0;  // of rows that are normally distributed, if larger
};

// How integers beyond int8 are kept: a second half of the row's, where some unit has one, or that as lists, where the kernel takes
// these for the format and the block's rows.
enum class HighHalves { apart, listed };

// How prepared input rows lie in scratch memory: blocks of up to `block_rows` rows (32, or 1: each row by itself), all
// full but the last. Arithmetic only; it owns nothing.
class RowSet {
 public:
  // Rows whose high halves are listed are prepared with an error of kListedError or more.
  RowSet(const KernelTable& kernels, WeightKind kind, std::int64_t k, std::int64_t rows, int block_rows = kBlockRows,
         HighHalves high = HighHalves::apart);

  std::int64_t rows() const { return rows_; }
  std::int64_t blocks() const { return (rows_ + block_rows_ - 1) / block_rows_; }
  std::size_t bytes() const { return bytes_; }
  // Rows with the padding of the last block: what a panel of results must have room for.
  std::int64_t padded_rows() const { return rows_ == 0 ? 0 : (blocks() - 1) * block_rows_ + stride_rows(blocks() - 1); }
  // What a kernel reads of a full block while few units have a high half.
  std::size_t low_block_bytes() const { return offsets(block_rows_).high; }

  RowBlock block(std::byte* base, std::int64_t index) const;
  // Call before rows of these blocks are prepared or gathered.
  void clear_flags(std::byte* base, std::int64_t first_block, std::int64_t last_block) const;

  // Row `row` from k contiguous values of any dtype. With `has_high` a row's high halves are not stored where it has none
  // (*has_high says so): enough for a row by itself; a block of more is finished by clear_high. Memory is asked for `next`.
  // `streamed`: what is prepared goes past the caches; `base` is then the beginning of a cache line.
  void prepare(std::byte* base, std::int64_t row, const void* x, DType dtype, float target_error, float normal_error = 0,
               bool* has_high = nullptr, const void* next = nullptr, bool streamed = false) const;
  // Zeros in the flagged units of the rows that have no high half, once all rows of the block are prepared.
  void clear_high(std::byte* base, std::int64_t block, const bool* has_high) const;
  // Every row, row i from prepared row first_source + sources[i] of another set over the same inputs whose blocks hold one
  // row each. Clears the flags itself.
  void gather(std::byte* base, const RowSet& source, std::byte* source_base, std::int64_t first_source,
              const std::int32_t* sources) const;

 private:
  struct Place;
  struct Offsets {
    std::size_t low, high, scale, sum, group_sum, flags, end;
  };
  Offsets offsets(int stride_rows) const;
  // Of rows from the block's `first_row` on.
  RowLists lists(std::byte* block, int stride_rows, std::int64_t first_row) const;
  bool listed(int stride_rows) const { return lists_from_ > 0 && stride_rows >= lists_from_; }
  std::int64_t list_stride() const { return units_ * kListedPerUnit + 16; }  // a vector is stored behind the last
  int stride_rows(std::int64_t block) const;
  std::size_t block_offset(std::int64_t block) const { return static_cast<std::size_t>(block) * full_block_bytes_; }

  const KernelTable* kernels_;
  RowForm form_;
  std::int64_t k_;
  std::int64_t units_;
  std::int64_t rows_;
  int block_rows_;
  bool tiles_;
  int lists_from_;  // rows of a block from which high halves are listed; 0: never
  bool group_sums_;  // int4 and mxfp4 in halves: there is room for them
  bool sums_read_;   // by vectors, which few rows are left to
  std::size_t full_block_bytes_;
  std::size_t bytes_;
};

}  // namespace numagraft

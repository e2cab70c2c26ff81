#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "kernels/format.h"

namespace numagraft {

// A weight on its way into packed memory: a matrix in memory, or one whose rows lie contiguously in an open file (`data` is
// then unused; scales are in memory always). Of a file each packing thread reads the rows of one panel at a time into its
// own scratch: they are packed out of that thread's cache, and no thread waits for another one's reading.
struct WeightSource : MatrixView {
  WeightSource() = default;
  WeightSource(const MatrixView& matrix) : MatrixView(matrix) {}  // NOLINT: a matrix in memory is one
  WeightSource(const MatrixView& matrix, int descriptor, std::int64_t first_byte, std::int64_t least_size)
      : MatrixView(matrix), file(descriptor), offset(first_byte), file_size(least_size) {}

  int file = -1;  // not owned
  std::int64_t offset = 0;     // of element (0, 0), in bytes
  std::int64_t file_size = 0;  // for messages

  bool in_file() const { return file >= 0; }
  bool quantised() const { return dtype == DType::e4m3 || dtype == DType::e2m1; }
  std::int64_t row_bytes() const { return row_stride * element_bits(dtype) / 8; }
};

// What makes a source unfit for packing, as lines of text; empty if nothing.
std::string source_problems(const WeightSource& source);

// Scratch that rows of one panel of the source take; 0 for a matrix in memory.
std::size_t panel_scratch_bytes(const WeightSource& source);

// The source's rows [first, last) (at most a panel) as a matrix in memory with the same row numbers; others are not there.
// Throws CheckpointFailure where the file ends early or cannot be read.
MatrixView read_rows(const WeightSource& source, std::int64_t first, std::int64_t last, std::byte* scratch);

}  // namespace numagraft

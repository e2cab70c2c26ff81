#include "ops/weight_source.h"

#include <cerrno>

#include "kernels/layout.h"
#include "system/error.h"
#include "system/syscalls.h"

namespace numagraft {

std::string source_problems(const WeightSource& source) {
  std::string problems;
  if ((source.quantised() || source.in_file()) && source.column_stride != 1) {
    problems += "\n  its columns have the stride " + std::to_string(source.column_stride) + ", expected 1 of quantised weights and of weights in a file";
  }
  if (source.quantised() && source.scales == nullptr) problems += "\n  it is quantised and has no scales";
  if (source.dtype == DType::e2m1 && (source.columns % 32 != 0 || source.row_stride % 32 != 0)) {
    problems += "\n  its " + std::to_string(source.columns) + " columns are no multiple of the 32 that share an exponent";
  }
  return problems;
}

std::size_t panel_scratch_bytes(const WeightSource& source) {
  return source.in_file() ? static_cast<std::size_t>(kPanelColumns * source.row_bytes()) : 0;
}

MatrixView read_rows(const WeightSource& source, std::int64_t first, std::int64_t last, std::byte* scratch) {
  MatrixView rows = source;
  if (first >= last) return rows;
  const std::int64_t stride = source.row_bytes();
  const std::int64_t begin = source.offset + first * stride;
  const std::int64_t bytes = (last - first - 1) * stride + source.columns * element_bits(source.dtype) / 8;
  std::int64_t done = 0;
  while (done < bytes) {
    std::int64_t got = 0;
    const int error = sys::read_at(source.file, scratch + done, static_cast<std::size_t>(bytes - done), begin + done, got);
    if (error == EINTR) continue;
    if (error != 0) {
      throw CheckpointFailure("reading " + std::to_string(bytes) + " bytes at " + std::to_string(begin) + " failed: pread says " + describe_errno(error),
                              "check the disk, or copy or download the file again");
    }
    if (got == 0) {
      throw CheckpointFailure("the file ends at byte " + std::to_string(begin + done) + ", but had " + std::to_string(source.file_size) + " when its header was read",
                              "the file was truncated meanwhile; copy or download it again");
    }
    done += got;
  }
  rows.data = reinterpret_cast<const void*>(reinterpret_cast<std::uintptr_t>(scratch) - static_cast<std::uintptr_t>(first * stride));
  return rows;
}

}  // namespace numagraft

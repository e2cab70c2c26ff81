#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "threads/runtime.h"

namespace numagraft {

// Memory to read, and the runtime nodes whose workers read it, each an equal share.
struct StreamRegion {
  const std::byte* data = nullptr;  // 64-byte aligned
  std::size_t bytes = 0;            // whole cache lines are read; a rest below 64 bytes is not
  std::vector<int> nodes;           // indices of Runtime::nodes(), unique, not empty
};

struct StreamVariant {
  int streams;         // sequential streams per worker
  int prefetch_bytes;  // distance of the software prefetch, 0: none
};

struct StreamPass {
  double seconds;          // one fork-join in which every region is read once
  std::uint64_t bytes;     // that were read
  std::uint64_t checksum;  // xor of every 64-bit word read
};

// The fixed set that the "streaming read bandwidth" of every benchmark is the best of.
std::span<const StreamVariant> stream_variants();
// Widths this CPU can run ("sse2", "avx2", "avx512"), widest last.
std::vector<std::string> stream_widths();

// Throws std::invalid_argument for a width that this CPU lacks, a stream count outside 1, 2, 4, 8, a node that is not
// there or has no threads, and memory that is not aligned.
StreamPass read_stream(Runtime& runtime, std::span<const StreamRegion> regions, StreamVariant variant,
                       const std::string& width);

}  // namespace numagraft

#pragma once

#include <cstddef>
#include <cstdint>

namespace numagraft {

// Reads `lines` cache lines from `data` (64-byte aligned) as `streams` (1, 2, 4 or 8) interleaved sequential streams, with
// `prefetcht1` that many bytes ahead in each (0: none), and returns a value that depends on every line.
using StreamKernel = std::uint64_t (*)(const std::byte* data, std::size_t lines, int streams, int prefetch_bytes);

namespace stream_sse2 {
std::uint64_t read(const std::byte* data, std::size_t lines, int streams, int prefetch_bytes);
}
namespace stream_avx2 {
std::uint64_t read(const std::byte* data, std::size_t lines, int streams, int prefetch_bytes);
}
namespace stream_avx512 {
std::uint64_t read(const std::byte* data, std::size_t lines, int streams, int prefetch_bytes);
}

}  // namespace numagraft

#include "bench/stream.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <stdexcept>

#include "bench/stream_kernel.h"

namespace numagraft {
namespace {

constexpr std::array kVariants{
    StreamVariant{1, 0},    StreamVariant{2, 0},    StreamVariant{4, 0},    StreamVariant{8, 0},
    StreamVariant{1, 2048}, StreamVariant{2, 2048}, StreamVariant{4, 2048}, StreamVariant{8, 2048},
    StreamVariant{1, 4096}, StreamVariant{2, 4096}, StreamVariant{4, 4096}, StreamVariant{8, 4096},
};
constexpr std::size_t kLine = 64;

StreamKernel kernel_of(const std::string& width) {
  const std::vector<std::string> supported = stream_widths();
  if (std::find(supported.begin(), supported.end(), width) == supported.end())
    throw std::invalid_argument("stream width '" + width + "' does not run on this CPU; widest here: " + supported.back());
  return width == "avx512" ? stream_avx512::read : width == "avx2" ? stream_avx2::read : stream_sse2::read;
}

void check(const Runtime& runtime, std::span<const StreamRegion> regions, StreamVariant variant) {
  constexpr std::array streams{1, 2, 4, 8};
  if (std::find(streams.begin(), streams.end(), variant.streams) == streams.end() || variant.prefetch_bytes < 0)
    throw std::invalid_argument("a stream variant has 1, 2, 4 or 8 streams and a prefetch distance of 0 bytes or more; got " +
                                std::to_string(variant.streams) + " and " + std::to_string(variant.prefetch_bytes));
  for (const StreamRegion& region : regions) {
    if (reinterpret_cast<std::uintptr_t>(region.data) % kLine != 0)
      throw std::invalid_argument("a region to stream must begin on a cache line (64 bytes)");
    if (region.nodes.empty()) throw std::invalid_argument("a region to stream names no node that reads it");
    for (int node : region.nodes)
      if (node < 0 || node >= static_cast<int>(runtime.nodes().size()) || runtime.nodes()[node].threads == 0)
        throw std::invalid_argument("node " + std::to_string(node) + " of the runtime is not there or has no threads to read with");
  }
}

}  // namespace

std::span<const StreamVariant> stream_variants() { return kVariants; }

std::vector<std::string> stream_widths() {
  std::vector<std::string> found{"sse2"};
  if (__builtin_cpu_supports("avx2")) found.push_back("avx2");
  if (__builtin_cpu_supports("avx512f")) found.push_back("avx512");
  return found;
}

StreamPass read_stream(Runtime& runtime, std::span<const StreamRegion> regions, StreamVariant variant,
                       const std::string& width) {
  const StreamKernel read = kernel_of(width);
  check(runtime, regions, variant);
  std::vector<int> nodes;
  std::uint64_t bytes = 0;
  for (const StreamRegion& region : regions) {
    nodes.insert(nodes.end(), region.nodes.begin(), region.nodes.end());
    bytes += region.bytes / kLine * kLine;
  }
  std::sort(nodes.begin(), nodes.end());
  nodes.erase(std::unique(nodes.begin(), nodes.end()), nodes.end());
  std::atomic<std::uint64_t> checksum{0};
  auto work = [&](const Worker& worker, Barriers&) {
    std::uint64_t own = 0;
    for (const StreamRegion& region : regions) {
      std::size_t before = 0, readers = 0;
      bool mine = false;
      for (int node : region.nodes) {
        if (node == worker.node) {
          mine = true;
          before = readers + static_cast<std::size_t>(worker.rank_in_node);
        }
        readers += static_cast<std::size_t>(runtime.nodes()[node].threads);
      }
      if (!mine) continue;
      const std::size_t lines = region.bytes / kLine;
      const std::size_t begin = lines * before / readers, end = lines * (before + 1) / readers;
      own ^= read(region.data + begin * kLine, end - begin, variant.streams, variant.prefetch_bytes);
    }
    checksum.fetch_xor(own, std::memory_order_relaxed);
  };
  const auto started = std::chrono::steady_clock::now();
  runtime.run(nodes, work);
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - started;
  return {seconds.count(), bytes, checksum.load()};
}

}  // namespace numagraft

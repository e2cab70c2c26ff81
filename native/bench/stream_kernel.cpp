#include "bench/stream_kernel.h"

#define NUMAGRAFT_JOIN_(a, b) a##b
#define NUMAGRAFT_JOIN(a, b) NUMAGRAFT_JOIN_(a, b)

namespace numagraft::NUMAGRAFT_JOIN(stream_, NUMAGRAFT_STREAM_WIDTH) {
namespace {

// One cache line; the compiler splits it into the registers it was told it has.
typedef std::uint64_t Line __attribute__((vector_size(64), may_alias));

constexpr std::size_t kLine = 64;
constexpr std::size_t kUnroll = 4;

template <int Streams, bool Prefetch>
Line pass(const std::byte* data, std::size_t lines, std::size_t ahead) {
  const std::size_t each = lines / Streams / kUnroll * kUnroll;
  Line sum[Streams] = {};
  for (std::size_t i = 0; i < each; i += kUnroll) {
#pragma GCC unroll 8
    for (int s = 0; s < Streams; ++s) {
      const std::byte* at = data + (s * each + i) * kLine;
#pragma GCC unroll 4
      for (std::size_t j = 0; j < kUnroll; ++j) {
        if constexpr (Prefetch) __builtin_prefetch(at + j * kLine + ahead, 0, 2);
        sum[s] ^= *reinterpret_cast<const Line*>(at + j * kLine);
      }
    }
  }
  for (std::size_t i = each * Streams; i < lines; ++i) sum[0] ^= *reinterpret_cast<const Line*>(data + i * kLine);
  for (int s = 1; s < Streams; ++s) sum[0] ^= sum[s];
  return sum[0];
}

template <int Streams>
Line choose(const std::byte* data, std::size_t lines, int prefetch_bytes) {
  return prefetch_bytes > 0 ? pass<Streams, true>(data, lines, prefetch_bytes) : pass<Streams, false>(data, lines, 0);
}

}  // namespace

std::uint64_t read(const std::byte* data, std::size_t lines, int streams, int prefetch_bytes) {
  Line sum;
  switch (streams) {
    case 8: sum = choose<8>(data, lines, prefetch_bytes); break;
    case 4: sum = choose<4>(data, lines, prefetch_bytes); break;
    case 2: sum = choose<2>(data, lines, prefetch_bytes); break;
    default: sum = choose<1>(data, lines, prefetch_bytes); break;
  }
  std::uint64_t folded = 0;
  for (int i = 0; i < 8; ++i) folded ^= sum[i];
  return folded;
}

}  // namespace numagraft::NUMAGRAFT_JOIN(stream_, NUMAGRAFT_STREAM_WIDTH)

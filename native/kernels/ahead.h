#pragma once

// What memory is asked for while tiles multiply.
// Included by one translation unit; everything is internal to it.
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "kernels/kernel_table.h"
#include "kernels/simd.h"

namespace numagraft::NUMAGRAFT_ISA {
namespace {

// Asks memory for what the tiles need soon, a share between every two products. A chunk that is read once, as fast as memory
// delivers: the lines a little ahead. A chunk that is read several times: the one behind it, from four places in turn. Each
// is a stream of its own to the hardware's prefetcher, which runs on where a single one would wait for the tiles (measured
// at 64 rows: 17 to 24 GB/s; docs/kernels.md).
class Ahead {
 public:
  static constexpr int kAsksPerStep = 4;
  Ahead(const std::byte* chunk, std::int64_t bytes, std::int64_t chunk_bytes, std::int64_t near, std::int64_t steps, bool once)
      : from_(chunk + (once ? near : chunk_bytes)),
        stream_(once ? 0 : bytes / kStreams & ~std::int64_t{63}),
        dense_(once || bytes / 64 > steps * kStreams),
        share_(((once ? bytes : stream_) / 64 << kShift) / (steps * (dense_ ? kAsksPerStep : 1))) {}

  // Where there is less than a line of each stream for a step, once is enough.
  NUMAGRAFT_INLINE void ask_more(Ahead& a) {
    if (a.dense_) ask(a);
  }

  NUMAGRAFT_INLINE void ask(Ahead& a) {
    std::int64_t line = a.at_ >> kShift;
    a.at_ += a.share_;
    const std::int64_t end = a.at_ >> kShift;
    if (a.stream_ == 0) {
      for (; line < end; ++line) prefetch(a.from_ + line * 64);
      return;
    }
    for (; line < end; ++line) {
      for (int stream = 0; stream < kStreams; ++stream) prefetch(a.from_ + line * 64 + stream * a.stream_);
    }
  }

 private:
  static constexpr int kStreams = 4;
  static constexpr int kShift = 16;
  NUMAGRAFT_INLINE void prefetch(const std::byte* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1); }

  const std::byte* from_;
  std::int64_t stream_;  // bytes
  bool dense_;
  std::int64_t share_;   // lines of a stream per ask, in fixed point
  std::int64_t at_ = (1 << kShift) - 1;
};
// From a chunk of a panel to the one that follows it: in the panel, or the next panel's first.
NUMAGRAFT_INLINE std::int64_t chunk_behind(const GemmArgs& a, std::int64_t first, std::int64_t last) {
  return last < a.last_unit ? (last - first) * a.layout->unit_bytes
                            : a.layout->panel_bytes - (first - a.first_unit) * a.layout->unit_bytes;
}

constexpr std::int64_t kNear = 2048;  // measured: 1 to 2.5 KiB alike, further is slower

}  // namespace
}  // namespace numagraft::NUMAGRAFT_ISA

#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "threads/function_ref.h"
#include "threads/wait_word.h"

namespace numagraft {

// One replica's share of a call, in stages of chunks that any worker may take: a stage opens when every chunk of the one
// before it is finished. Nodes write here only when they steal from each other.
class alignas(64) ChunkQueue {
 public:
  static constexpr int kMostStages = 4;
  struct Chunk {
    int stage = 0;
    std::int64_t index = 0;
  };

  // Before the work begins.
  void add_stage(std::int64_t chunks);
  std::optional<Chunk> claim() noexcept;
  // Whether this opened a stage or ended the queue.
  bool finish(int stage) noexcept;
  // No chunk can be claimed any more; the last ones may still be at work.
  bool drained() const noexcept;

 private:
  struct alignas(64) Stage {
    std::int64_t count = 0;
    std::atomic<std::int64_t> claimed{0};
    std::atomic<std::int64_t> finished{0};
  };
  std::array<Stage, kMostStages> stages_;
  int stage_count_ = 0;
  alignas(64) std::atomic<int> open_{0};
};

// The queues of one call. A worker serves its own replica's queue and, when nothing is left to take there, the others':
// with its own copy of the weights, so that a node that is late costs no remote reads of weights.
class Exchange {
 public:
  Exchange(std::size_t queues, bool steal) : queues_(queues), steal_(steal) {}

  ChunkQueue& queue(std::size_t index) { return queues_[index]; }
  // Returns when no chunk is left to take; others' last chunks may still be at work. The first exception of `run` passes
  // through here, and the other workers return.
  void work(std::size_t own, SpinTime spin, FunctionRef<void(std::size_t queue, ChunkQueue::Chunk)> run);

 private:
  bool serve(std::size_t queue, FunctionRef<void(std::size_t, ChunkQueue::Chunk)> run);
  bool finished_for(std::size_t own) const;

  std::vector<ChunkQueue> queues_;
  bool steal_;
  std::atomic<bool> failed_{false};
  WaitWord changed_;  // stages that opened
};

}  // namespace numagraft

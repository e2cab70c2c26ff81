#include "ops/chunk_queue.h"

namespace numagraft {

void ChunkQueue::add_stage(std::int64_t chunks) {
  stages_[static_cast<std::size_t>(stage_count_)].count = chunks;
  if (open_.load(std::memory_order_relaxed) == stage_count_ && chunks == 0) open_.store(stage_count_ + 1, std::memory_order_relaxed);
  ++stage_count_;
}

std::optional<ChunkQueue::Chunk> ChunkQueue::claim() noexcept {
  const int stage = open_.load(std::memory_order_acquire);
  if (stage >= stage_count_) return std::nullopt;
  Stage& open = stages_[static_cast<std::size_t>(stage)];
  // Looked at first: whoever waits for the next stage must not keep writing to the line.
  if (open.claimed.load(std::memory_order_relaxed) >= open.count) return std::nullopt;
  const std::int64_t index = open.claimed.fetch_add(1, std::memory_order_relaxed);
  if (index >= open.count) return std::nullopt;
  return Chunk{stage, index};
}

bool ChunkQueue::finish(int stage) noexcept {
  Stage& done = stages_[static_cast<std::size_t>(stage)];
  if (done.finished.fetch_add(1, std::memory_order_acq_rel) + 1 < done.count) return false;
  int next = stage + 1;
  while (next < stage_count_ && stages_[static_cast<std::size_t>(next)].count == 0) ++next;
  open_.store(next, std::memory_order_release);
  return true;
}

bool ChunkQueue::drained() const noexcept {
  for (int stage = open_.load(std::memory_order_acquire); stage < stage_count_; ++stage) {
    const Stage& at = stages_[static_cast<std::size_t>(stage)];
    if (at.claimed.load(std::memory_order_relaxed) < at.count) return false;
  }
  return true;
}

bool Exchange::serve(std::size_t index, FunctionRef<void(std::size_t, ChunkQueue::Chunk)> run) {
  ChunkQueue& queue = queues_[index];
  const auto chunk = queue.claim();
  if (!chunk) return false;
  run(index, *chunk);
  if (queue.finish(chunk->stage)) changed_.add_and_wake(1);
  return true;
}

bool Exchange::finished_for(std::size_t own) const {
  if (!steal_) return queues_[own].drained();
  for (const ChunkQueue& queue : queues_) {
    if (!queue.drained()) return false;
  }
  return true;
}

void Exchange::work(std::size_t own, SpinTime spin, FunctionRef<void(std::size_t, ChunkQueue::Chunk)> run) {
  try {
    while (!failed_.load(std::memory_order_acquire)) {
      const std::uint32_t seen = changed_.load();  // before looking: a stage that opens from here on is not missed
      bool served = serve(own, run);
      // One chunk of another, then home again: a stage may have opened there.
      for (std::size_t step = 1; steal_ && !served && step < queues_.size(); ++step) served = serve((own + step) % queues_.size(), run);
      if (served) continue;
      if (finished_for(own)) return;
      changed_.wait_while(seen, spin);
    }
  } catch (...) {
    failed_.store(true, std::memory_order_release);
    changed_.add_and_wake(1);
    throw;
  }
}

}  // namespace numagraft

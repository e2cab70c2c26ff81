#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <span>
#include <vector>

#include "threads/affinity_scope.h"
#include "threads/function_ref.h"
#include "threads/runtime.h"
#include "threads/wait_word.h"

namespace numagraft {

// What the workers of one node share during a call; lies in that node's pool, so that waiting there polls local lines.
struct NodeSync {
  WaitWord barrier_node;  // generation of the node's barrier
  WaitWord barrier_all;   // generation of the call's barrier, released node by node
  WaitWord remaining;     // workers of the node that have not finished
  alignas(64) std::atomic<std::uint32_t> arrived_node{0};
  alignas(64) std::atomic<std::uint32_t> arrived_all{0};
};

// One fork-join: who takes part and how it ends. Lies in the pool of the call's first node and is used again and again:
// a late waker may still look at it after the caller has gone on.
class Call : public Barriers {
 public:
  using Work = FunctionRef<void(const Worker&, Barriers&)>;

  struct Seat {  // one node of the call
    int node = 0;
    int workers = 0;
    int first_rank = 0;
    NodeSync* sync = nullptr;
  };

  // Before the workers are told; nobody else looks at the call then.
  void begin(std::span<const Seat> seats, const Work& work, SpinTime spin);
  // Runs one worker's share on the calling thread, kept on `cpu` meanwhile (negative: as it is); a watched one is looked after
  // at every barrier. What it throws, a refused pin included, is kept for `join` and releases the others' barriers.
  void take_part(int seat, int rank_in_node, int cpu, Pinning pinning = Pinning::always) noexcept;
  // Waits for all workers, then rethrows the first exception.
  void join();

  void all(const Worker& worker) override;
  void node(const Worker& worker) override;
  SpinTime spin() const override { return spin_; }

 private:
  void wait(WaitWord& generation, std::uint32_t old);
  void abort() noexcept;

  std::vector<Seat> seats_;
  const Work* work_ = nullptr;
  AffinityScope* caller_ = nullptr;  // of the worker of rank 0, where it is watched
  SpinTime spin_{};
  int workers_ = 0;
  std::atomic<bool> failed_{false};
  std::exception_ptr error_;
  alignas(64) std::atomic<std::uint32_t> arrived_nodes_{0};
  alignas(64) std::atomic<bool> aborted_{false};
};

}  // namespace numagraft

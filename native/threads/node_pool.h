#pragma once

#include <pthread.h>

#include <atomic>
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include "threads/call.h"
#include "threads/wait_word.h"

namespace numagraft {

// The threads of one node: slot i is pinned to its i-th CPU (unpinned where there are none). Slot 0 is the caller's when a
// call starts at this node, and a thread of its own otherwise, made when first needed. Threads are made by callers, who are
// not pinned then, and block every signal, so that Ctrl-C reaches Python's thread.
class NodePool {
 public:
  NodePool(std::vector<int> cpus, int threads, std::uint32_t process_generation, std::uint64_t order);
  ~NodePool();
  NodePool(const NodePool&) = delete;
  NodePool& operator=(const NodePool&) = delete;

  const std::vector<int>& cpus() const { return cpus_; }
  int threads() const { return threads_; }
  std::uint32_t process_generation() const { return process_generation_; }  // of the process that made the threads
  std::uint64_t order() const { return order_; }  // calls lock pools in this order
  int cpu_of(int slot) const { return cpus_.empty() ? -1 : cpus_[static_cast<std::size_t>(slot) % cpus_.size()]; }
  // More threads than CPUs: waiting by spinning would keep the others from running.
  bool crowded() const { return !cpus_.empty() && static_cast<int>(cpus_.size()) < threads_; }

  // Who computes here when several callers share the nodes of a mirror (group_lease.h). Hints: the lock alone decides.
  struct Tenancy {
    std::atomic<std::uint64_t> holder{0};         // the caller of the call that runs, where it asked for a lease
    std::atomic<std::uint64_t> reserved_by{0};    // a caller that shares, and until when its next call is expected
    std::atomic<std::int64_t> reserved_until{0};  // nanoseconds of the steady clock
    std::atomic<int> waiting{0};
  };
  Tenancy& tenancy() { return tenancy_; }

  // The rest only by the thread that holds `calls`.
  std::mutex& calls() { return calls_; }
  Call& call() { return call_; }
  NodeSync& sync() { return sync_; }
  void ensure_threads(bool with_slot_0);  // throws PlacementFailure when a thread cannot be made or pinned
  void start(Call& call, int seat, bool with_slot_0, SpinTime spin);

 private:
  struct Starting;
  void make_threads(int first, int end);
  static void* thread_main(void* starting);
  void serve(int slot, std::uint32_t seen);
  void stop_threads() noexcept;

  const std::vector<int> cpus_;
  const int threads_;
  const std::uint32_t process_generation_;
  const std::uint64_t order_;
  std::mutex calls_;
  Tenancy tenancy_;
  std::vector<pthread_t> made_;
  bool has_slot_0_ = false;
  bool has_others_ = false;

  NodeSync sync_;
  Call call_;
  // What is told to the workers: written before the epoch they wait on moves.
  Call* told_call_ = nullptr;
  int told_seat_ = 0;
  SpinTime told_spin_{};
  bool stopping_ = false;
  std::atomic<int> start_error_{0};
  WaitWord started_;  // threads that ever started; here, not with their maker: they may still look at it when it has gone on
  WaitWord epoch_slot_0_;
  WaitWord epoch_others_;
};

bool inside_call() noexcept;  // whether this thread is a worker now: a call from inside a call would wait for itself
class InsideCall {
 public:
  InsideCall() noexcept;
  ~InsideCall();
};

}  // namespace numagraft

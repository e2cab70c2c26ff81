#include "threads/call.h"

#include <utility>

namespace numagraft {
namespace {

struct Aborted {};  // unwinds workers that wait for one that has failed

}  // namespace

void Call::begin(std::span<const Seat> seats, const Work& work, SpinTime spin) {
  seats_.assign(seats.begin(), seats.end());
  work_ = &work;
  caller_ = nullptr;
  spin_ = spin;
  workers_ = 0;
  error_ = nullptr;
  failed_.store(false, std::memory_order_relaxed);
  aborted_.store(false, std::memory_order_relaxed);
  arrived_nodes_.store(0, std::memory_order_relaxed);
  for (Seat& seat : seats_) {
    seat.first_rank = workers_;
    workers_ += seat.workers;
    seat.sync->arrived_node.store(0, std::memory_order_relaxed);
    seat.sync->arrived_all.store(0, std::memory_order_relaxed);
    seat.sync->remaining.store(static_cast<std::uint32_t>(seat.workers));
  }
}

void Call::take_part(int seat_index, int rank_in_node, int cpu, Pinning pinning) noexcept {
  const Seat& seat = seats_[static_cast<std::size_t>(seat_index)];
  NodeSync* sync = seat.sync;
  const Worker worker{
      .node = seat.node,
      .node_rank = seat_index,
      .node_count = static_cast<int>(seats_.size()),
      .rank_in_node = rank_in_node,
      .workers_in_node = seat.workers,
      .rank = seat.first_rank + rank_in_node,
      .workers = workers_,
  };
  try {
    AffinityScope kept(cpu, pinning);
    if (pinning == Pinning::watched) caller_ = &kept;
    (*work_)(worker, *this);
  } catch (const Aborted&) {
  } catch (...) {
    if (!failed_.exchange(true)) error_ = std::current_exception();
    abort();
  }
  // After this the caller may begin the next call: nothing of this one may be touched but the word to wake.
  if (sync->remaining.subtract(1) == 0) sync->remaining.wake();
}

void Call::join() {
  for (Seat& seat : seats_) {
    while (const std::uint32_t left = seat.sync->remaining.load()) seat.sync->remaining.wait_while(left, spin_);
  }
  work_ = nullptr;
  if (failed_.load(std::memory_order_acquire)) std::rethrow_exception(std::exchange(error_, nullptr));
}

void Call::node(const Worker& worker) {
  if (worker.rank == 0 && caller_ != nullptr) caller_->look();
  const Seat& seat = seats_[static_cast<std::size_t>(worker.node_rank)];
  if (seat.workers == 1) return;
  NodeSync& sync = *seat.sync;
  const std::uint32_t old = sync.barrier_node.load();
  if (sync.arrived_node.fetch_add(1, std::memory_order_acq_rel) + 1 == static_cast<std::uint32_t>(seat.workers)) {
    sync.arrived_node.store(0, std::memory_order_relaxed);
    sync.barrier_node.add_and_wake(1);
  } else {
    wait(sync.barrier_node, old);
  }
}

void Call::all(const Worker& worker) {
  if (worker.rank == 0 && caller_ != nullptr) caller_->look();
  const Seat& seat = seats_[static_cast<std::size_t>(worker.node_rank)];
  NodeSync& sync = *seat.sync;
  const std::uint32_t old = sync.barrier_all.load();
  if (sync.arrived_all.fetch_add(1, std::memory_order_acq_rel) + 1 == static_cast<std::uint32_t>(seat.workers)) {
    sync.arrived_all.store(0, std::memory_order_relaxed);
    if (arrived_nodes_.fetch_add(1, std::memory_order_acq_rel) + 1 == seats_.size()) {
      arrived_nodes_.store(0, std::memory_order_relaxed);
      for (Seat& each : seats_) each.sync->barrier_all.add_and_wake(1);
      return;
    }
  }
  wait(sync.barrier_all, old);
}

void Call::wait(WaitWord& generation, std::uint32_t old) {
  // A generation read after the abort no longer changes: look before waiting as well.
  if (!aborted_.load(std::memory_order_acquire)) generation.wait_while(old, spin_);
  if (aborted_.load(std::memory_order_acquire)) throw Aborted{};
}

void Call::abort() noexcept {
  aborted_.store(true, std::memory_order_seq_cst);
  for (Seat& seat : seats_) {
    seat.sync->barrier_node.add_and_wake(1);
    seat.sync->barrier_all.add_and_wake(1);
  }
}

}  // namespace numagraft

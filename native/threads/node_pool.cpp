#include "threads/node_pool.h"

#include <signal.h>

#include <cerrno>
#include <cstdio>
#include <memory>

#include "system/error.h"
#include "system/process.h"
#include "system/syscalls.h"
#include "threads/affinity_scope.h"

namespace numagraft {
namespace {

thread_local bool inside = false;

// All but those that a fault in the thread's own code raises.
sigset_t blocked_in_workers() {
  sigset_t blocked;
  ::sigfillset(&blocked);
  for (int fatal : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGABRT}) ::sigdelset(&blocked, fatal);
  return blocked;
}

}  // namespace

bool inside_call() noexcept { return inside; }
InsideCall::InsideCall() noexcept { inside = true; }
InsideCall::~InsideCall() { inside = false; }

// Handed to a thread that starts, which copies it before it reports.
struct NodePool::Starting {
  NodePool* pool;
  int slot;
  std::uint32_t seen;  // the epoch before its first call
};

NodePool::NodePool(std::vector<int> cpus, int threads, std::uint32_t process_generation, std::uint64_t order)
    : cpus_(std::move(cpus)), threads_(threads), process_generation_(process_generation), order_(order) {}

NodePool::~NodePool() {
  // In a forked child the threads do not exist.
  if (process_generation_ == numagraft::process_generation()) stop_threads();
}

void NodePool::ensure_threads(bool with_slot_0) {
  if (!has_others_) {
    make_threads(1, threads_);
    has_others_ = true;
  }
  if (with_slot_0 && !has_slot_0_) {
    make_threads(0, 1);
    has_slot_0_ = true;
  }
}

void NodePool::make_threads(int first, int end) {
  if (first >= end) return;
  start_error_.store(0);
  const std::uint32_t before_start = started_.load();
  int create_error = 0;
  std::uint32_t made = 0;
  std::vector<std::unique_ptr<Starting>> starting;
  const sigset_t blocked = blocked_in_workers();
  sigset_t before;
  ::pthread_sigmask(SIG_SETMASK, &blocked, &before);  // a new thread inherits it
  for (int slot = first; slot < end && create_error == 0; ++slot) {
    const WaitWord& epoch = slot == 0 ? epoch_slot_0_ : epoch_others_;
    starting.push_back(std::make_unique<Starting>(Starting{this, slot, epoch.load()}));
    pthread_t thread;
    create_error = ::pthread_create(&thread, nullptr, &NodePool::thread_main, starting.back().get());
    if (create_error == 0) {
      char name[16];
      std::snprintf(name, sizeof name, "numagraft/%d", cpu_of(slot) < 0 ? slot : cpu_of(slot));
      ::pthread_setname_np(thread, name);
      made_.push_back(thread);
      ++made;
    }
  }
  ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
  for (std::uint32_t seen = started_.load(); seen - before_start != made; seen = started_.load()) started_.wait_while(seen, SpinTime(0));
  if (create_error == 0 && start_error_.load() == 0) return;
  const int pin_error = start_error_.load();
  stop_threads();
  if (create_error != 0) {
    throw PlacementFailure("cannot make the threads of a node (" + std::to_string(end - first) + " wanted): pthread_create says " + describe_errno(create_error),
                           "raise the limit on processes (ulimit -u, the container's pids limit), or ask for fewer threads_per_node");
  }
  // The CPU that failed is lost by now; name the first of the node.
  throw_pin_refused(cpu_of(first), pin_error);
}

void* NodePool::thread_main(void* argument) {
  const Starting starting = *static_cast<Starting*>(argument);
  NodePool& pool = *starting.pool;
  if (const int cpu = pool.cpu_of(starting.slot); cpu >= 0) {
    const int wanted[] = {cpu};
    if (const int error = sys::set_affinity(sys::CpuMask(wanted)); error != 0) pool.start_error_.store(error);
  }
  pool.started_.add_and_wake(1);
  pool.serve(starting.slot, starting.seen);
  return nullptr;
}

void NodePool::serve(int slot, std::uint32_t seen) {
  inside = true;
  WaitWord& epoch = slot == 0 ? epoch_slot_0_ : epoch_others_;
  SpinTime spin{0};
  while (true) {
    epoch.wait_while(seen, spin);
    seen = epoch.load();
    if (stopping_) return;
    spin = told_spin_;
    told_call_->take_part(told_seat_, slot, -1);
  }
}

void NodePool::start(Call& call, int seat, bool with_slot_0, SpinTime spin) {
  told_call_ = &call;
  told_seat_ = seat;
  told_spin_ = spin;
  if (threads_ > 1) epoch_others_.add_and_wake(1);
  if (with_slot_0) epoch_slot_0_.add_and_wake(1);
}

void NodePool::stop_threads() noexcept {
  stopping_ = true;
  epoch_others_.add_and_wake(1);
  epoch_slot_0_.add_and_wake(1);
  for (pthread_t thread : made_) ::pthread_join(thread, nullptr);
  made_.clear();
  stopping_ = false;
  has_slot_0_ = has_others_ = false;
}

}  // namespace numagraft

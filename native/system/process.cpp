#include "system/process.h"

#include <pthread.h>

#include <atomic>

namespace numagraft {
namespace {

std::atomic<std::uint32_t> generation{0};

void before_fork() { fork_safe_mutex().lock(); }
void after_fork_in_parent() { fork_safe_mutex().unlock(); }
void after_fork_in_child() {
  generation.fetch_add(1, std::memory_order_release);
  fork_safe_mutex().unlock();
}

}  // namespace

std::uint32_t process_generation() noexcept { return generation.load(std::memory_order_acquire); }

std::mutex& fork_safe_mutex() {
  // Never destroyed: workers may still run while the process exits.
  static std::mutex* const instance = [] {
    ::pthread_atfork(&before_fork, &after_fork_in_parent, &after_fork_in_child);
    return new std::mutex;
  }();
  return *instance;
}

}  // namespace numagraft

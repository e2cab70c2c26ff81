#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

namespace numagraft {

using SpinTime = std::chrono::nanoseconds;

// A counter that threads wait on: they spin for a while, then sleep in the kernel. Waking costs a system call only when
// someone sleeps. On its own cache line, since it is what the waiters poll.
class alignas(64) WaitWord {
 public:
  std::uint32_t load() const noexcept { return value_.load(std::memory_order_acquire); }

  // Publishes everything written before it to whoever sees the new value.
  void add_and_wake(std::uint32_t amount) noexcept {
    value_.fetch_add(amount, std::memory_order_seq_cst);
    wake();
  }
  std::uint32_t subtract(std::uint32_t amount) noexcept {
    return value_.fetch_sub(amount, std::memory_order_seq_cst) - amount;
  }
  void store(std::uint32_t value) noexcept { value_.store(value, std::memory_order_seq_cst); }
  void wake() noexcept {
    if (sleepers_.load(std::memory_order_seq_cst) != 0) wake_sleepers();
  }

  // Returns once the value is no longer `old`.
  void wait_while(std::uint32_t old, SpinTime spin) noexcept {
    if (load() == old) wait_slowly(old, spin);
  }

 private:
  void wait_slowly(std::uint32_t old, SpinTime spin) noexcept;
  void wake_sleepers() noexcept;

  std::atomic<std::uint32_t> value_{0};
  std::atomic<std::uint32_t> sleepers_{0};
};

}  // namespace numagraft

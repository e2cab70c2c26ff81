#include "threads/wait_word.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>

namespace numagraft {
namespace {

void relax() noexcept {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

void WaitWord::wait_slowly(std::uint32_t old, SpinTime spin) noexcept {
  using Clock = std::chrono::steady_clock;
  if (spin.count() > 0) {
    const auto until = Clock::now() + spin;
    do {
      // The clock costs as much as a few pauses: look at it now and then.
      for (int i = 0; i < 32; ++i) {
        if (load() != old) return;
        relax();
      }
    } while (Clock::now() < until);
  }
  // Both sides are sequentially consistent: a waker that sees no sleeper has changed the value before the futex looks.
  sleepers_.fetch_add(1, std::memory_order_seq_cst);
  while (value_.load(std::memory_order_seq_cst) == old) {
    ::syscall(SYS_futex, reinterpret_cast<std::uint32_t*>(&value_), FUTEX_WAIT_PRIVATE, old, nullptr, nullptr, 0);
  }
  sleepers_.fetch_sub(1, std::memory_order_seq_cst);
}

void WaitWord::wake_sleepers() noexcept {
  ::syscall(SYS_futex, reinterpret_cast<std::uint32_t*>(&value_), FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

}  // namespace numagraft

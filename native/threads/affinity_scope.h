#pragma once

#include "system/syscalls.h"

namespace numagraft {

// How a thread that lends itself to a call is kept on its CPU. Pinning and restoring cost two system calls, 1 to 5 µs, which
// short calls notice: `watched` does it only when the thread is found on another CPU.
enum class Pinning { always, watched };

// The calling thread runs on one CPU until the scope ends; then its mask is what it was. A negative CPU leaves it alone.
class AffinityScope {
 public:
  explicit AffinityScope(int cpu, Pinning pinning = Pinning::always);  // throws PlacementFailure when the kernel refuses
  ~AffinityScope();
  // Pins a watched thread that has moved. Throws as the constructor.
  void look() {
    if (watched_ && sys::current_cpu() != cpu_) pin();
  }
  AffinityScope(const AffinityScope&) = delete;
  AffinityScope& operator=(const AffinityScope&) = delete;

 private:
  void pin();

  int cpu_;
  bool watched_;  // and not pinned so far
  sys::CpuMask saved_;
  bool changed_ = false;
};

[[noreturn]] void throw_pin_refused(int cpu, int error);

}  // namespace numagraft

#pragma once

#include "system/syscalls.h"

namespace numagraft {

// The calling thread runs on one CPU until the scope ends; then its mask is what it was. A negative CPU leaves it alone.
class AffinityScope {
 public:
  explicit AffinityScope(int cpu);  // throws PlacementFailure when the kernel refuses
  ~AffinityScope();
  AffinityScope(const AffinityScope&) = delete;
  AffinityScope& operator=(const AffinityScope&) = delete;

 private:
  sys::CpuMask saved_;
  bool changed_ = false;
};

[[noreturn]] void throw_pin_refused(int cpu, int error);

}  // namespace numagraft

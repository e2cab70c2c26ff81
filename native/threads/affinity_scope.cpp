#include "threads/affinity_scope.h"

#include <cerrno>
#include <string>

#include "system/error.h"

namespace numagraft {

void throw_pin_refused(int cpu, int error) {
  std::string remedy;
  if (error == EINVAL) {
    remedy = "CPU " + std::to_string(cpu) + " is offline or outside this process's cpuset now: detect the platform again and plan anew";
  } else {
    remedy = "allow sched_setaffinity in the sandbox that refuses it, or use a virtual layout (nothing is pinned, placement is not proven)";
  }
  throw PlacementFailure("cannot pin a thread to CPU " + std::to_string(cpu) + ": sched_setaffinity says " + describe_errno(error), remedy);
}

AffinityScope::AffinityScope(int cpu, Pinning pinning) : cpu_(cpu), watched_(pinning == Pinning::watched && cpu >= 0) {
  if (watched_) {
    look();
  } else if (cpu >= 0) {
    pin();
  }
}

void AffinityScope::pin() {
  watched_ = false;
  const int wanted[] = {cpu_};
  const sys::CpuMask mask(wanted);
  if (const int error = sys::get_affinity(saved_); error != 0) throw_pin_refused(cpu_, error);
  if (saved_ == mask) return;
  if (const int error = sys::set_affinity(mask); error != 0) throw_pin_refused(cpu_, error);
  changed_ = true;
}

AffinityScope::~AffinityScope() {
  if (!changed_ || sys::set_affinity(saved_) == 0) return;
  // The saved CPUs left the cpuset meanwhile: whatever is allowed is better than one CPU for good.
  (void)!sys::set_affinity(sys::CpuMask::every());
}

}  // namespace numagraft

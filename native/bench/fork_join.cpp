#include "bench/fork_join.h"

#include <chrono>
#include <stdexcept>

namespace numagraft {

std::vector<double> measure_fork_join(Runtime& runtime, std::span<const int> nodes, int barriers, int repetitions) {
  using Clock = std::chrono::steady_clock;
  if (barriers < 0 || repetitions < 1) throw std::invalid_argument("at least one repetition and no fewer than zero barriers");
  auto work = [barriers](const Worker& worker, Barriers& between) {
    for (int i = 0; i < barriers; ++i) between.all(worker);
  };
  constexpr int kWarmUp = 100;
  std::vector<double> seconds;
  seconds.reserve(static_cast<std::size_t>(repetitions));
  for (int i = -kWarmUp; i < repetitions; ++i) {
    const Clock::time_point begin = Clock::now();
    runtime.run(nodes, work, Pinning::watched);
    const std::chrono::duration<double> took = Clock::now() - begin;
    if (i >= 0) seconds.push_back(took.count());
  }
  return seconds;
}

}  // namespace numagraft

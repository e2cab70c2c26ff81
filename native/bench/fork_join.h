#pragma once

#include <span>
#include <vector>

#include "threads/runtime.h"

namespace numagraft {

// Seconds of each of `repetitions` empty calls, one after another (so that the pools are awake), with `barriers` waits of
// all workers for each other inside.
std::vector<double> measure_fork_join(Runtime& runtime, std::span<const int> nodes, int barriers, int repetitions);

}  // namespace numagraft

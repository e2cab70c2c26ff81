#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "threads/runtime.h"

namespace numagraft {

// A multiply-accumulate loop that touches registers only. An operation is a multiplication or an addition of the dot
// product, so a multiply-accumulate counts two; the additions that an instruction set needs besides do not count.
struct Peak {
  const char* name;
  const char* what;                              // the instructions, for a person
  std::uint64_t (*run)(std::uint64_t rounds);    // returns operations done
  bool (*supported)();
};

std::span<const Peak> peaks();
// Throws std::invalid_argument for a name that is unknown or that this CPU cannot run.
const Peak& peak_by_name(const std::string& name);

// Operations per second of all threads of `nodes` together, over about `seconds`; one figure per repetition.
std::vector<double> measure_peak(Runtime& runtime, std::span<const int> nodes, const Peak& peak, double seconds,
                                 int repetitions);

}  // namespace numagraft

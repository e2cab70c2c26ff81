#pragma once

#include <cstdint>
#include <vector>

#include "memory/buffer.h"

namespace numagraft {

// One stretch of a packed weight: units [begin, end) (linear: output features; experts: intermediate features) lie on
// `memory` and are computed by the workers of the nodes in `workers`. Parts that cover the same units are replicas; parts
// that cover different units are shards. Node numbers index Runtime::nodes(). The framework's placement.py makes them.
struct Part {
  MemoryTarget memory;
  std::vector<int> workers;
  std::int64_t begin = 0;
  std::int64_t end = 0;
};

}  // namespace numagraft

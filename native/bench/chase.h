#pragma once

#include <cstddef>
#include <cstdint>

#include "threads/runtime.h"

namespace numagraft {

// Fills the memory with one random cycle over all its cache lines: each holds the address of the next, so that no
// prefetcher guesses it and no load starts before the one before it is done. A worker of `node` writes.
// Throws std::invalid_argument for memory that is not aligned or holds fewer than two lines, or a node without threads.
void make_chase(Runtime& runtime, int node, std::byte* data, std::size_t bytes);

// Seconds for `steps` loads along that cycle by one worker of `node`, the others idle.
double run_chase(Runtime& runtime, int node, const std::byte* data, std::int64_t steps);

}  // namespace numagraft

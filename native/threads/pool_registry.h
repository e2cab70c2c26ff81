#pragma once

#include <memory>
#include <vector>

#include "threads/node_pool.h"

namespace numagraft {

// The live pools of this process. A pool belongs to its CPU set: runtimes that name the same CPUs share it, and it lives as
// long as one of them does. `cpus` empty: an unpinned pool of its own. Throws ConfigurationFailure when a live pool has some
// of these CPUs but not the same set and thread count, since two pools spinning on one CPU starve each other.
// The caller holds no lock of fork_safe_mutex().
std::shared_ptr<NodePool> acquire_pool(const std::vector<int>& cpus, int threads);

}  // namespace numagraft

#include "threads/pool_registry.h"

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <string>

#include "system/error.h"
#include "system/process.h"

namespace numagraft {
namespace {

struct Registry {
  std::vector<std::weak_ptr<NodePool>> pools;
  std::uint64_t made = 0;
};

// Guarded by fork_safe_mutex(). Never destroyed: workers may still run while the process exits.
Registry& registry() {
  static Registry* const instance = new Registry;
  return *instance;
}

std::string list_cpus(const std::vector<int>& cpus) {
  std::string text;
  for (std::size_t i = 0; i < cpus.size();) {
    std::size_t last = i;
    while (last + 1 < cpus.size() && cpus[last + 1] == cpus[last] + 1) ++last;
    text += (text.empty() ? "" : ",") + std::to_string(cpus[i]);
    if (last > i) text += "-" + std::to_string(cpus[last]);
    i = last + 1;
  }
  return text;
}

std::vector<int> sorted(std::vector<int> cpus) {
  std::sort(cpus.begin(), cpus.end());
  return cpus;
}

}  // namespace

std::shared_ptr<NodePool> acquire_pool(const std::vector<int>& cpus, int threads) {
  Registry& known = registry();
  std::vector<std::shared_ptr<NodePool>> kept;  // let go after the lock: the last one to go joins its threads
  const std::lock_guard lock(fork_safe_mutex());
  if (cpus.empty()) return std::make_shared<NodePool>(cpus, threads, process_generation(), known.made++);
  const std::vector<int> wanted = sorted(cpus);
  std::erase_if(known.pools, [](const auto& pool) { return pool.expired(); });
  for (const auto& weak : known.pools) {
    const auto pool = weak.lock();
    if (pool == nullptr || pool->process_generation() != process_generation()) continue;
    kept.push_back(pool);
    const std::vector<int> taken = sorted(pool->cpus());
    if (taken == wanted && pool->threads() == threads) return pool;
    std::vector<int> common;
    std::set_intersection(taken.begin(), taken.end(), wanted.begin(), wanted.end(), std::back_inserter(common));
    if (common.empty()) continue;
    throw ConfigurationFailure("CPUs " + list_cpus(wanted) + " with " + std::to_string(threads) + " threads are asked for, but a live runtime already runs " +
                                   std::to_string(pool->threads()) + " threads on CPUs " + list_cpus(taken),
                               "give both runtimes the same nodes and threads_per_node, or drop the other model and its runtime first");
  }
  auto pool = std::make_shared<NodePool>(cpus, threads, process_generation(), known.made++);
  known.pools.push_back(pool);
  return pool;
}

}  // namespace numagraft

#include "threads/group_lease.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>

namespace numagraft {
namespace {

// Longer than what lies between two operator calls of a caller that goes on (attention over a long prompt, sampling).
constexpr std::int64_t kKeptNanoseconds = 100'000'000;
constexpr std::uint64_t kAnonymous = ~std::uint64_t{0};  // somebody whose call asked for no lease, or who waits

std::uint64_t this_caller() {
  static std::atomic<std::uint64_t> callers{0};
  thread_local const std::uint64_t id = ++callers;
  return id;
}

std::int64_t now() { return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// The other caller that counts on this pool; 0: none.
std::uint64_t other_tenant(NodePool& pool, std::uint64_t me) {
  NodePool::Tenancy& tenancy = pool.tenancy();
  if (tenancy.waiting.load(std::memory_order_seq_cst) > 0) return kAnonymous;
  const std::uint64_t by = tenancy.reserved_by.load(std::memory_order_acquire);
  return by != 0 && by != me && tenancy.reserved_until.load(std::memory_order_acquire) > now() ? by : 0;
}

}  // namespace

GroupLease::GroupLease(std::span<const std::vector<NodePool*>> groups, int near, bool confined) : all_(groups) {
  if (confined) {
    shared_ = true;
    wait_for(near);
    return;
  }
  const std::uint64_t me = this_caller();
  std::vector<std::uint64_t> others;
  const auto note = [&](std::uint64_t caller) {
    if (std::find(others.begin(), others.end(), caller) == others.end()) others.push_back(caller);
  };
  std::vector<int> open;
  for (int group = 0; group < static_cast<int>(groups.size()); ++group) {
    std::uint64_t other = 0;
    for (NodePool* pool : groups[static_cast<std::size_t>(group)]) other = other != 0 ? other : other_tenant(*pool, me);
    if (other != 0) {
      note(other);
    } else {
      open.push_back(group);
    }
  }
  // Its own node before others, one that it had before all: a change would move the caller and its scratch memory.
  const auto rank = [&](int group) {
    const bool mine = groups[static_cast<std::size_t>(group)].front()->tenancy().reserved_by.load(std::memory_order_relaxed) == me;
    return mine ? 0 : group == near ? 1 : 2;
  };
  if (!others.empty() || near > 0) std::stable_sort(open.begin(), open.end(), [&](int a, int b) { return rank(a) < rank(b); });
  const auto fair = [&] { return std::max<std::size_t>(groups.size() / (others.size() + 1), 1); };
  const auto take = [&] {
    for (int group : open) {
      if (held_.size() >= fair()) return;
      if (std::find(held_.begin(), held_.end(), group) != held_.end() || try_hold(group)) continue;
      const std::uint64_t holder = groups[static_cast<std::size_t>(group)].front()->tenancy().holder.load(std::memory_order_relaxed);
      note(holder == 0 || holder == me ? kAnonymous : holder);
    }
  };
  take();
  if (held_.empty()) {
    int best = open.empty() ? 0 : open.front();
    if (open.empty()) {
      for (int group = 1; group < static_cast<int>(groups.size()); ++group) {
        const auto waiting = [&](int g) { return groups[static_cast<std::size_t>(g)].front()->tenancy().waiting.load(std::memory_order_relaxed); };
        if (waiting(group) < waiting(best)) best = group;
      }
    }
    wait_for(best);
    take();
  }
  while (held_.size() > fair()) {  // met another caller on the way
    let_go(held_.back());
    held_.pop_back();
  }
  std::sort(held_.begin(), held_.end());
  shared_ = !others.empty();
}

GroupLease::~GroupLease() {
  const std::uint64_t me = this_caller();
  const std::int64_t until = shared_ ? now() + kKeptNanoseconds : 0;
  for (int group : held_) {
    for (NodePool* pool : all_[static_cast<std::size_t>(group)]) {
      NodePool::Tenancy& tenancy = pool->tenancy();
      if (!shared_) continue;
      tenancy.reserved_until.store(until, std::memory_order_release);
      tenancy.reserved_by.store(me, std::memory_order_release);
    }
    let_go(group);
  }
}

bool GroupLease::try_hold(int group) {
  const std::vector<NodePool*>& pools = all_[static_cast<std::size_t>(group)];
  for (std::size_t i = 0; i < pools.size(); ++i) {
    if (pools[i]->calls().try_lock()) continue;
    while (i > 0) pools[--i]->calls().unlock();
    return false;
  }
  for (NodePool* pool : pools) pool->tenancy().holder.store(this_caller(), std::memory_order_relaxed);
  held_.push_back(group);
  return true;
}

void GroupLease::wait_for(int group) {
  std::vector<NodePool*> pools = all_[static_cast<std::size_t>(group)];
  std::sort(pools.begin(), pools.end(), [](const NodePool* a, const NodePool* b) { return a->order() < b->order(); });
  for (NodePool* pool : pools) pool->tenancy().waiting.fetch_add(1, std::memory_order_seq_cst);
  for (NodePool* pool : pools) pool->calls().lock();
  for (NodePool* pool : pools) {
    pool->tenancy().waiting.fetch_sub(1, std::memory_order_seq_cst);
    pool->tenancy().holder.store(this_caller(), std::memory_order_relaxed);
  }
  held_.push_back(group);
}

void GroupLease::let_go(int group) noexcept {
  for (NodePool* pool : all_[static_cast<std::size_t>(group)]) {
    pool->tenancy().holder.store(0, std::memory_order_relaxed);
    pool->calls().unlock();
  }
}

}  // namespace numagraft

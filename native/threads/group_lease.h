#pragma once

#include <span>
#include <vector>

#include "threads/node_pool.h"

namespace numagraft {

// Pools held for one call that any of several groups of them could compute: each group is the nodes of one replica.
//
// A caller that is alone gets every group. Callers at the same time get an equal number of groups each, and keep theirs for
// 100 ms after every call, so that neither waits for the other between two layers. A caller waits only where every group
// is held: at most for the call that runs, since the next call of whoever holds a group leaves out those waited for.
class GroupLease {
 public:
  // `near`: the group whose CPUs the caller runs on, -1 where that is not known. `confined`: the caller may run on no others,
  // it is served there and nowhere else.
  GroupLease(std::span<const std::vector<NodePool*>> groups, int near, bool confined);
  ~GroupLease();
  GroupLease(const GroupLease&) = delete;
  GroupLease& operator=(const GroupLease&) = delete;

  const std::vector<int>& groups() const { return held_; }  // sorted, never empty

 private:
  bool try_hold(int group);
  void wait_for(int group);
  void let_go(int group) noexcept;

  std::span<const std::vector<NodePool*>> all_;
  std::vector<int> held_;
  bool shared_ = false;  // with another caller: the groups stay reserved
};

}  // namespace numagraft

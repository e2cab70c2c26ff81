#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "ops/placement.h"
#include "threads/runtime.h"

namespace numagraft {

// The parts of a packed weight that cover the same units: one, or several replicas.
struct Shard {
  std::int64_t begin = 0;
  std::int64_t end = 0;
  std::vector<int> parts;  // indices into the parts
};

// A worker's place in the work on one shard.
struct Role {
  int shard = 0;
  int part = 0;            // the replica it reads
  int rank = 0;            // among all workers of the shard
  int size = 0;
  int replica = 0;         // which of the shard's replicas
  int replicas = 0;
  int replica_rank = 0;    // among the workers of its replica
  int replica_size = 0;
  int replica_begin = 0;   // workers of the replicas before it
};

// [begin, end) of `count` things for one of `size` workers.
struct Range {
  std::int64_t begin = 0;
  std::int64_t end = 0;
};
inline Range share(std::int64_t count, int rank, int size) { return {count * rank / size, count * (rank + 1) / size}; }
// The things of all workers of a role's replica.
inline Range share_of_replica(std::int64_t count, const Role& role) {
  return {count * role.replica_begin / role.size, count * (role.replica_begin + role.replica_size) / role.size};
}

// Who computes in one call: its nodes, and the roles of their workers.
class Roster {
 public:
  const std::vector<int>& nodes() const { return nodes_; }   // every node with a worker, sorted
  bool single_node_teams() const { return single_node_teams_; }  // no shard is computed by more than one node
  bool single_node_replicas() const { return single_node_replicas_; }
  const std::vector<Role>& roles_of_first(int node) const { return roles_of_node_[static_cast<std::size_t>(node)]; }
  std::vector<Role> roles(const Worker& worker) const;

 private:
  friend class Teams;
  struct Replica {
    int part = 0;
    std::vector<int> nodes;
  };
  explicit Roster(std::size_t nodes) : roles_of_node_(nodes) {}
  void seat(const Runtime& runtime, int shard, const std::vector<Replica>& replicas);

  std::vector<int> nodes_;
  std::vector<std::vector<Role>> roles_of_node_;  // of its first worker
  bool single_node_teams_ = true;
  bool single_node_replicas_ = true;
};

// Who computes what: parts grouped into shards, and for every node the roles of its workers. Throws PlacementFailure naming
// every part that overlaps another one in part, has no threads, or names a node that is not there, and units not covered.
// Where every part holds everything, each replica's nodes can serve a call by themselves.
class Teams {
 public:
  Teams(const Runtime& runtime, const std::vector<Part>& parts, std::int64_t units, const std::string& owner);

  const std::vector<Shard>& shards() const { return shards_; }
  const std::vector<int>& nodes() const { return everyone_.nodes(); }
  std::vector<Role> roles(const Worker& worker) const { return everyone_.roles(worker); }
  const Roster& everyone() const { return everyone_; }
  // The nodes of each replica where all replicas hold everything; empty where there are not two of them.
  const std::vector<std::vector<int>>& mirrors() const { return mirrors_; }
  // A call that only these of mirrors() serve.
  Roster some(const Runtime& runtime, const std::vector<int>& chosen) const;

 private:
  std::vector<Shard> shards_;
  std::vector<Roster::Replica> replicas_;  // behind mirrors_
  std::vector<std::vector<int>> mirrors_;
  Roster everyone_;
};

}  // namespace numagraft

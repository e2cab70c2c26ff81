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
};

// Who computes what: parts grouped into shards, and for every node the roles of its workers. Throws PlacementFailure naming
// every part that overlaps another one in part, has no threads, or names a node that is not there, and units not covered.
class Teams {
 public:
  Teams(const Runtime& runtime, const std::vector<Part>& parts, std::int64_t units, const std::string& owner);

  const std::vector<Shard>& shards() const { return shards_; }
  const std::vector<int>& nodes() const { return nodes_; }   // every node with a worker, sorted
  bool single_node_teams() const { return single_node_teams_; }  // no shard is computed by more than one node
  bool single_node_replicas() const { return single_node_replicas_; }
  std::vector<Role> roles(const Worker& worker) const;

 private:
  std::vector<Shard> shards_;
  std::vector<int> nodes_;
  std::vector<std::vector<Role>> roles_of_node_;  // of its first worker
  bool single_node_teams_ = true;
  bool single_node_replicas_ = true;
};

// [begin, end) of `count` things for one of `size` workers.
struct Range {
  std::int64_t begin = 0;
  std::int64_t end = 0;
};
inline Range share(std::int64_t count, int rank, int size) { return {count * rank / size, count * (rank + 1) / size}; }

}  // namespace numagraft

#include "ops/teams.h"

#include <algorithm>

#include "system/error.h"

namespace numagraft {
namespace {

std::string name_of(const Part& part, std::size_t index) {
  return "part " + std::to_string(index) + " [" + std::to_string(part.begin) + ", " + std::to_string(part.end) + ")";
}

void check_nodes(const Runtime& runtime, const std::vector<Part>& parts, std::vector<std::string>& problems) {
  const auto count = static_cast<int>(runtime.nodes().size());
  for (std::size_t i = 0; i < parts.size(); ++i) {
    const Part& part = parts[i];
    int threads = 0;
    for (const std::vector<int>* nodes : {&part.memory.nodes, &part.workers}) {
      if (nodes->empty()) problems.push_back(name_of(part, i) + (nodes == &part.workers ? " has no worker nodes" : " has no memory nodes"));
      for (int node : *nodes) {
        if (node < 0 || node >= count) {
          problems.push_back(name_of(part, i) + " names node " + std::to_string(node) + "; the runtime has " + std::to_string(count));
        } else if (nodes == &part.workers) {
          threads += runtime.nodes()[static_cast<std::size_t>(node)].threads;
        }
      }
    }
    if (threads == 0 && !part.workers.empty()) problems.push_back(name_of(part, i) + ": its worker nodes have no threads");
  }
}

void check_cover(const std::vector<Shard>& shards, std::int64_t units, std::vector<std::string>& problems) {
  std::int64_t next = 0;
  for (const Shard& shard : shards) {
    if (shard.begin < next) problems.push_back("units [" + std::to_string(shard.begin) + ", " + std::to_string(std::min(next, shard.end)) + ") lie in parts that are not replicas of each other");
    if (shard.begin > next) problems.push_back("units [" + std::to_string(next) + ", " + std::to_string(shard.begin) + ") lie in no part");
    next = std::max(next, shard.end);
  }
  if (next != units) problems.push_back("the parts end at unit " + std::to_string(next) + ", the weight at " + std::to_string(units));
}

}  // namespace

Teams::Teams(const Runtime& runtime, const std::vector<Part>& parts, std::int64_t units, const std::string& owner)
    : everyone_(runtime.nodes().size()) {
  std::vector<std::string> problems;
  check_nodes(runtime, parts, problems);
  for (std::size_t i = 0; i < parts.size(); ++i) {
    const Part& part = parts[i];
    if (part.begin >= part.end) continue;  // more shards were asked for than there are units
    const auto same = std::find_if(shards_.begin(), shards_.end(), [&](const Shard& s) { return s.begin == part.begin && s.end == part.end; });
    Shard& shard = same != shards_.end() ? *same : shards_.emplace_back(Shard{part.begin, part.end, {}});
    shard.parts.push_back(static_cast<int>(i));
  }
  std::sort(shards_.begin(), shards_.end(), [](const Shard& a, const Shard& b) { return a.begin < b.begin; });
  check_cover(shards_, units, problems);
  if (!problems.empty()) {
    std::string text = owner + ": the placement cannot be computed";
    for (const std::string& problem : problems) text += "\n  " + problem;
    throw PlacementFailure(text, "parts must cover every unit; parts of the same units are replicas");
  }

  for (std::size_t s = 0; s < shards_.size(); ++s) {
    std::vector<bool> taken(runtime.nodes().size(), false);
    std::vector<Roster::Replica> replicas;
    for (int part : shards_[s].parts) {
      Roster::Replica replica{part, {}};
      for (int node : parts[static_cast<std::size_t>(part)].workers) {
        const auto n = static_cast<std::size_t>(node);
        if (taken[n] || runtime.nodes()[n].threads == 0) continue;  // a node computes with the first replica that names it
        taken[n] = true;
        replica.nodes.push_back(node);
      }
      std::sort(replica.nodes.begin(), replica.nodes.end());
      if (!replica.nodes.empty()) replicas.push_back(std::move(replica));
    }
    std::sort(replicas.begin(), replicas.end(), [](const auto& a, const auto& b) { return a.nodes[0] < b.nodes[0]; });
    everyone_.seat(runtime, static_cast<int>(s), replicas);
    if (shards_.size() == 1 && replicas.size() > 1) {
      for (const Roster::Replica& replica : replicas) mirrors_.push_back(replica.nodes);
      replicas_ = std::move(replicas);
    }
  }
}

Roster Teams::some(const Runtime& runtime, const std::vector<int>& chosen) const {
  std::vector<Roster::Replica> replicas;
  for (int replica : chosen) replicas.push_back(replicas_[static_cast<std::size_t>(replica)]);
  Roster roster(runtime.nodes().size());
  roster.seat(runtime, 0, replicas);
  return roster;
}

void Roster::seat(const Runtime& runtime, int shard, const std::vector<Replica>& replicas) {
  std::vector<int> team;
  std::vector<Role> of_nodes(roles_of_node_.size());
  int before = 0;
  for (std::size_t r = 0; r < replicas.size(); ++r) {
    int in_replica = 0;
    for (int node : replicas[r].nodes) {
      Role& role = of_nodes[static_cast<std::size_t>(node)];
      role.shard = shard;
      role.part = replicas[r].part;
      role.replica = static_cast<int>(r);
      role.replicas = static_cast<int>(replicas.size());
      role.replica_rank = in_replica;
      role.replica_begin = before;
      in_replica += runtime.nodes()[static_cast<std::size_t>(node)].threads;
      team.push_back(node);
    }
    for (int node : replicas[r].nodes) of_nodes[static_cast<std::size_t>(node)].replica_size = in_replica;
    before += in_replica;
    if (replicas[r].nodes.size() > 1) single_node_replicas_ = false;
  }
  if (team.size() > 1) single_node_teams_ = false;
  std::sort(team.begin(), team.end());
  int rank = 0;
  for (int node : team) {
    Role& role = of_nodes[static_cast<std::size_t>(node)];
    role.rank = rank;
    role.size = before;
    rank += runtime.nodes()[static_cast<std::size_t>(node)].threads;
    roles_of_node_[static_cast<std::size_t>(node)].push_back(role);
    if (std::find(nodes_.begin(), nodes_.end(), node) == nodes_.end()) nodes_.push_back(node);
  }
  std::sort(nodes_.begin(), nodes_.end());
}

std::vector<Role> Roster::roles(const Worker& worker) const {
  std::vector<Role> roles = roles_of_first(worker.node);
  for (Role& role : roles) {
    role.rank += worker.rank_in_node;
    role.replica_rank += worker.rank_in_node;
  }
  return roles;
}

}  // namespace numagraft

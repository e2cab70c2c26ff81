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
    : roles_of_node_(runtime.nodes().size()) {
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
    const Shard& shard = shards_[s];
    std::vector<Role> of_nodes(roles_of_node_.size());
    std::vector<bool> taken(roles_of_node_.size(), false);
    std::vector<int> team;
    for (std::size_t r = 0; r < shard.parts.size(); ++r) {
      int in_replica = 0;
      int replica_nodes = 0;
      std::vector<int> members;
      for (int node : parts[static_cast<std::size_t>(shard.parts[r])].workers) {
        const auto n = static_cast<std::size_t>(node);
        const int threads = runtime.nodes()[n].threads;
        if (taken[n] || threads == 0) continue;  // a node computes with the first replica that names it
        taken[n] = true;
        Role role;
        role.shard = static_cast<int>(s);
        role.part = shard.parts[r];
        role.replica = static_cast<int>(r);
        role.replica_rank = in_replica;
        of_nodes[n] = role;
        members.push_back(node);
        in_replica += threads;
        ++replica_nodes;
      }
      for (int node : members) of_nodes[static_cast<std::size_t>(node)].replica_size = in_replica;
      if (replica_nodes > 1) single_node_replicas_ = false;
      team.insert(team.end(), members.begin(), members.end());
    }
    std::sort(team.begin(), team.end());
    if (team.size() > 1) single_node_teams_ = false;
    int size = 0;
    for (int node : team) {
      of_nodes[static_cast<std::size_t>(node)].rank = size;
      size += runtime.nodes()[static_cast<std::size_t>(node)].threads;
    }
    int replicas = 0;
    std::vector<int> numbering(shard.parts.size(), -1);
    for (int node : team) {
      int& number = numbering[static_cast<std::size_t>(of_nodes[static_cast<std::size_t>(node)].replica)];
      if (number < 0) number = replicas++;
      of_nodes[static_cast<std::size_t>(node)].replica = number;
    }
    for (int node : team) {
      Role role = of_nodes[static_cast<std::size_t>(node)];
      role.size = size;
      role.replicas = replicas;
      roles_of_node_[static_cast<std::size_t>(node)].push_back(role);
      if (std::find(nodes_.begin(), nodes_.end(), node) == nodes_.end()) nodes_.push_back(node);
    }
  }
  std::sort(nodes_.begin(), nodes_.end());
}

std::vector<Role> Teams::roles(const Worker& worker) const {
  std::vector<Role> roles = roles_of_node_[static_cast<std::size_t>(worker.node)];
  for (Role& role : roles) {
    role.rank += worker.rank_in_node;
    role.replica_rank += worker.rank_in_node;
  }
  return roles;
}

}  // namespace numagraft

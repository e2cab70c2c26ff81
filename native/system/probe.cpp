#include "system/probe.h"

#include <sys/mman.h>

#include <thread>

#include "system/error.h"
#include "system/syscalls.h"

namespace numagraft::sys {
namespace {

std::string outcome(int error) { return error == 0 ? "" : errno_name(error); }

}  // namespace

std::map<std::string, std::string> probe_calls() {
  std::map<std::string, std::string> found;
  // Policies and masks belong to a thread: what is tried here dies with it.
  std::thread prober([&found] {
    CpuMask mask;
    int error = get_affinity(mask);
    found["sched_setaffinity"] = outcome(error != 0 ? error : set_affinity(mask));

    NodeMask allowed;
    error = get_mems_allowed(allowed);
    found["get_mempolicy"] = outcome(error);
    if (error != 0) {
      allowed = NodeMask();
      allowed.add(std::max(0, current_node()));
    }
    const int node = allowed.nodes().empty() ? 0 : allowed.nodes().front();
    const int wanted[] = {node};

    std::byte* page = nullptr;
    if (const int failed = map_anonymous(page_bytes(), PROT_READ | PROT_WRITE, 0, page); failed != 0) {
      found["mmap"] = outcome(failed);
      return;
    }
    found["mmap"] = "";
    found["mbind"] = outcome(mbind(page, page_bytes(), kPolicyBind, NodeMask(wanted)));
    *reinterpret_cast<volatile char*>(page) = 1;
    void* pages[] = {page};
    int status[] = {-1};
    found["move_pages"] = outcome(query_pages(pages, status));
    if (found["mbind"].empty() && found["move_pages"].empty() && status[0] != node) found["mbind"] = "misplaced";
    found["set_mempolicy"] = outcome(set_mempolicy(kPolicyBind, NodeMask(wanted)));
    unmap(page, page_bytes());
  });
  prober.join();
  return found;
}

Policy inherited_policy() {
  Policy policy;
  NodeMask nodes;
  if (get_mempolicy(policy.mode, nodes) != 0) return policy;
  static constexpr const char* names[] = {"default", "preferred", "bind", "interleave", "local", "preferred_many", "weighted_interleave"};
  const int mode = policy.mode & 0xff;  // above: mode flags
  policy.name = mode < 7 ? names[mode] : "mode " + std::to_string(mode);
  for (int node : nodes.nodes()) policy.nodes += (policy.nodes.empty() ? "" : ",") + std::to_string(node);
  return policy;
}

}  // namespace numagraft::sys

#include "memory/room.h"

#include <algorithm>
#include <chrono>
#include <limits>
#include <mutex>
#include <optional>

#include "system/error.h"
#include "system/free_memory.h"
#include "system/process.h"

namespace numagraft {
namespace {

constexpr std::size_t kMiB = std::size_t{1} << 20;

// Claims in progress: (node, size of explicit huge pages or 0) -> bytes still to be touched. Guarded by fork_safe_mutex();
// never destroyed.
using Claims = std::map<std::pair<int, std::size_t>, std::int64_t>;
Claims& claims() {
  static Claims* const instance = new Claims;
  return *instance;
}

std::int64_t claimed_on(const Claims& outstanding, int node, std::size_t unit) {
  const auto found = outstanding.find({node, unit});
  return found == outstanding.end() ? 0 : std::max<std::int64_t>(0, found->second);
}

// Adds (or with a negative part takes back) `part` of what is needed, evenly over the nodes of a share.
void add_claims(const Need& need, double part) {
  const std::size_t unit = is_explicit(need.pages) ? page_kind_bytes(need.pages) : 0;
  for (const Need::Share& share : need.shares) {
    for (int node : share.nodes) {
      std::int64_t& claimed = claims()[{node, unit}];
      claimed += static_cast<std::int64_t>(static_cast<double>(share.bytes) / static_cast<double>(share.nodes.size()) * part);
    }
  }
}

std::string name_of(const std::vector<int>& nodes) {
  if (nodes.front() < 0) return "this machine";
  std::string text = nodes.size() > 1 ? "nodes " : "node ";
  for (std::size_t i = 0; i < nodes.size(); ++i) text += (i > 0 ? "," : "") + std::to_string(nodes[i]);
  return text;
}

// Page tables (1/512 of small pages) and what the kernel and the process itself still want.
std::int64_t with_margin(std::size_t bytes) { return static_cast<std::int64_t>(bytes + bytes / 256 + 32 * kMiB); }

[[noreturn]] void throw_full(const std::string& owner, std::size_t bytes, std::int64_t left, const std::string& where, const std::string& remedy) {
  throw PlacementFailure(owner + " needs " + format_bytes(static_cast<double>(bytes)) + " on " + where + ", which has " +
                             format_bytes(static_cast<double>(std::max<std::int64_t>(0, left))) + " left",
                         remedy);
}

void check_huge_pages(const Need& need, const std::string& owner, const Claims& outstanding) {
  const auto size = static_cast<std::int64_t>(page_kind_bytes(need.pages));
  const std::string size_name = format_bytes(static_cast<double>(size));
  for (const Need::Share& share : need.shares) {
    std::int64_t free = 0;
    const std::string file = sys::huge_pages_file(share.nodes.front(), page_kind_bytes(need.pages));
    for (int node : share.nodes) {
      const auto found = sys::free_huge_pages(node, page_kind_bytes(need.pages));
      if (!found) {
        throw PlacementFailure("the kernel has no huge pages of " + size_name + " on " + name_of({node}) + " (" + sys::huge_pages_file(node, page_kind_bytes(need.pages)) + " is missing)",
                               need.pages == PageKind::huge_1g ? "boot with `hugepagesz=1G hugepages=N`, or use `pages: 2m`" : "use `pages: thp` or `pages: 4k`");
      }
      free += *found - (claimed_on(outstanding, node, page_kind_bytes(need.pages)) + size - 1) / size;
    }
    const std::int64_t wanted = (static_cast<std::int64_t>(share.bytes) + size - 1) / size;
    if (wanted <= free) continue;
    const std::int64_t total = sys::total_huge_pages(share.nodes.front(), page_kind_bytes(need.pages)).value_or(0) + wanted - std::max<std::int64_t>(0, free);
    throw PlacementFailure(owner + " needs " + std::to_string(wanted) + " huge pages of " + size_name + " on " + name_of(share.nodes) + ", which has " +
                               std::to_string(std::max<std::int64_t>(0, free)) + " free",
                           "echo " + std::to_string(total) + " > " + file + "    (as root), or use `pages: auto`");
  }
}

// What every node has left, other claims taken off.
std::map<int, std::int64_t> look_at_nodes(const Need& need, const Claims& outstanding) {
  std::map<int, std::int64_t> left;
  if (need.shares.front().nodes.front() >= 0) {
    left = sys::available_by_node();
  } else if (const auto total = sys::available_total()) {
    left[-1] = *total;
  }
  for (auto& [node, bytes] : left) bytes -= claimed_on(outstanding, node, 0);
  return left;
}

void check_nodes(const Need& need, double part, const std::string& owner, const std::map<int, std::int64_t>& left) {
  for (const Need::Share& share : need.shares) {
    const auto bytes = static_cast<std::size_t>(static_cast<double>(share.bytes) * part);
    std::int64_t free = 0;
    for (int node : share.nodes) {
      const auto found = left.find(node);
      if (found == left.end()) {
        throw PlacementFailure("cannot learn how much memory " + name_of({node}) + " has left: it is in neither /proc/zoneinfo nor /sys/devices/system/node",
                               "is the node still there? Otherwise make /proc/zoneinfo readable to this process; filling a node that is full would end in the OOM killer");
      }
      free += std::max<std::int64_t>(0, found->second);
    }
    if (with_margin(bytes) > free) {
      throw_full(owner, bytes, free, name_of(share.nodes),
                 "free memory there (numastat -m shows who has it), use a smaller format, or another placement: `shard` takes 1/N per node of what `mirror` takes");
    }
  }
}

std::size_t total_of(const Need& need) {
  std::size_t bytes = 0;
  for (const Need::Share& share : need.shares) bytes += share.bytes;
  return bytes;
}

// What the tightest cgroup has left, other claims taken off.
std::int64_t check_cgroup(const Need& need, double part, const std::string& owner, const Claims& outstanding) {
  const auto limit = sys::tightest_cgroup_limit();
  if (!limit) return std::numeric_limits<std::int64_t>::max();
  std::int64_t left = limit->left;
  for (const auto& [key, pending] : outstanding) left -= key.second == 0 ? pending : 0;
  const auto bytes = static_cast<std::size_t>(static_cast<double>(total_of(need)) * part);
  if (with_margin(bytes) > left) {
    throw_full(owner, bytes, left, "the memory cgroup (" + limit->file + " = " + format_bytes(static_cast<double>(limit->limit)) + ")",
               "raise the limit (docker run --memory, systemd MemoryMax, the pod's limits.memory), or use a smaller format");
  }
  return left;
}

// What the last look found, less what was claimed since: while far more is left than is asked for, the next of ten thousand
// small weights need not read /proc again. Guarded by fork_safe_mutex().
struct LastLook {
  std::chrono::steady_clock::time_point when{};
  std::map<int, std::int64_t> left;  // by node; -1: the system
  std::int64_t cgroup_left = 0;

  void take(const Need& need) {
    for (const Need::Share& share : need.shares) {
      for (int node : share.nodes) left[node] -= static_cast<std::int64_t>(share.bytes);  // any of them may give it all
    }
    cgroup_left -= static_cast<std::int64_t>(total_of(need));
  }
};
constexpr std::chrono::milliseconds kLookLasts{500};
constexpr std::int64_t kFarMore = std::int64_t{2} << 30;

LastLook& last_look() {
  static LastLook* const instance = new LastLook;
  return *instance;
}

bool plenty_left(const Need& need) {
  const LastLook& look = last_look();
  if (sys::availability_planted() || std::chrono::steady_clock::now() - look.when > kLookLasts) return false;
  for (const Need::Share& share : need.shares) {
    for (int node : share.nodes) {
      const auto left = look.left.find(node);
      if (left == look.left.end() || left->second - static_cast<std::int64_t>(share.bytes) < kFarMore) return false;
    }
  }
  return look.cgroup_left - static_cast<std::int64_t>(total_of(need)) >= kFarMore;
}

void check(const Need& need, const std::string& owner) {
  if (is_explicit(need.pages)) {
    check_huge_pages(need, owner, claims());
    return;  // hugetlb pages are set apart already, and a memory cgroup does not count them
  }
  LastLook& look = last_look();
  if (!plenty_left(need)) {
    LastLook fresh;
    fresh.left = look_at_nodes(need, claims());
    check_nodes(need, 1, owner, fresh.left);
    fresh.cgroup_left = check_cgroup(need, 1, owner, claims());
    fresh.when = std::chrono::steady_clock::now();
    look = std::move(fresh);
  }
  look.take(need);
}

}  // namespace

Need need_of(std::size_t bytes, const std::vector<int>& os_nodes, MemoryTarget::Mode mode, PageKind pages, bool bind) {
  Need need;
  need.pages = pages;
  if (!bind || os_nodes.empty()) {
    need.shares.push_back({{-1}, bytes});
  } else if (mode == MemoryTarget::Mode::interleave) {
    const std::size_t unit = page_kind_bytes(pages);
    const std::size_t units = (bytes + unit - 1) / unit;
    for (int node : os_nodes) need.shares.push_back({{node}, (units + os_nodes.size() - 1) / os_nodes.size() * unit});
  } else {
    need.shares.push_back({os_nodes, bytes});  // MPOL_BIND to several nodes fills one after the other
  }
  return need;
}

RoomClaim::RoomClaim(Need need, std::string owner) : need_(std::move(need)), owner_(std::move(owner)) {
  const std::lock_guard lock(fork_safe_mutex());
  check(need_, owner_);
  add_claims(need_, claimed_);
}

void RoomClaim::shrink(double part) {
  if (is_explicit(need_.pages)) return;  // the kernel itself says when there is none left, and kills nobody
  const std::lock_guard lock(fork_safe_mutex());
  if (part >= claimed_) return;  // another thread is further
  add_claims(need_, -claimed_);
  claimed_ = 0;
  const std::string owner = owner_ + " (while its memory was being filled)";
  check_nodes(need_, part, owner, look_at_nodes(need_, claims()));
  check_cgroup(need_, part, owner, claims());
  add_claims(need_, part);
  claimed_ = part;
}

RoomClaim::~RoomClaim() {
  const std::lock_guard lock(fork_safe_mutex());
  add_claims(need_, -claimed_);
  std::erase_if(claims(), [](const auto& claim) { return claim.second <= 0; });
}

}  // namespace numagraft

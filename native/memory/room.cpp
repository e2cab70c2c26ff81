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

// Claims in progress: (node, page size) -> bytes that will be touched. Guarded by fork_safe_mutex(); never destroyed.
using Claims = std::map<std::pair<int, std::size_t>, std::size_t>;
Claims& claims() {
  static Claims* const instance = new Claims;
  return *instance;
}

std::size_t claim_unit(PageKind pages) { return is_explicit(pages) ? page_kind_bytes(pages) : 0; }

std::string place_name(int node) { return node < 0 ? "this machine" : "node " + std::to_string(node); }

// Page tables (1/512 of small pages) and what the kernel and the process itself still want.
std::size_t with_margin(std::size_t bytes) { return bytes + bytes / 256 + 32 * kMiB; }

[[noreturn]] void throw_full(const std::string& owner, std::size_t bytes, std::int64_t left, const std::string& where, const std::string& remedy) {
  throw PlacementFailure(owner + " needs " + format_bytes(static_cast<double>(bytes)) + " on " + where + ", which has " +
                             format_bytes(static_cast<double>(left)) + " left",
                         remedy);
}

void check_huge_pages(const Need& need, const std::string& owner, const Claims& outstanding) {
  const std::size_t size = page_kind_bytes(need.pages);
  for (const auto& [node, bytes] : need.per_node) {
    const auto free = sys::free_huge_pages(node, size);
    const std::string size_name = format_bytes(static_cast<double>(size));
    if (!free) {
      throw PlacementFailure("the kernel has no huge pages of " + size_name + " on " + place_name(node) + " (" + sys::huge_pages_file(node, size) + " is missing)",
                             size > 2 * kMiB ? "boot with `default_hugepagesz=1G hugepagesz=1G hugepages=N`, or use `pages: 2m`" : "use `pages: thp` or `pages: 4k`");
    }
    const auto pending = outstanding.find({node, size});
    const std::size_t wanted = (bytes + size - 1) / size + (pending == outstanding.end() ? 0 : pending->second / size);
    if (static_cast<std::int64_t>(wanted) <= *free) continue;
    const std::int64_t total = sys::total_huge_pages(node, size).value_or(0) + static_cast<std::int64_t>(wanted) - *free;
    throw PlacementFailure(owner + " needs " + std::to_string(wanted) + " huge pages of " + size_name + " on " + place_name(node) + ", which has " + std::to_string(*free) + " free",
                           "echo " + std::to_string(total) + " > " + sys::huge_pages_file(node, size) + "    (as root), or use `pages: auto`");
  }
}

// What is left of each node beyond the need and the outstanding claims.
std::map<int, std::int64_t> check_nodes(const Need& need, const std::string& owner, const Claims& outstanding) {
  std::map<int, std::int64_t> available;
  if (need.per_node.begin()->first >= 0) {
    available = sys::available_by_node();
  } else if (const auto total = sys::available_total()) {
    available[-1] = *total;
  }
  std::map<int, std::int64_t> beyond = available;
  for (const auto& [claim, bytes] : outstanding) {
    if (claim.second == 0 && beyond.contains(claim.first)) beyond[claim.first] -= static_cast<std::int64_t>(bytes);
  }
  for (const auto& [node, bytes] : need.per_node) {
    const auto left = available.find(node);
    if (left == available.end()) {
      throw PlacementFailure("cannot learn how much memory " + place_name(node) + " has left: it is in neither /proc/zoneinfo nor /sys/devices/system/node",
                             "make /proc/zoneinfo readable to this process; filling a node that is full would end in the OOM killer");
    }
    const auto pending = outstanding.find({node, 0});
    const std::size_t taken = pending == outstanding.end() ? 0 : pending->second;
    const std::int64_t free = std::max<std::int64_t>(0, left->second - static_cast<std::int64_t>(taken));
    if (static_cast<std::int64_t>(with_margin(bytes)) > free) {
      throw_full(owner, bytes, free, place_name(node),
                 "free memory there (numastat -m shows who has it), use a smaller format, or another placement: `shard` takes 1/N per node of what `mirror` takes");
    }
    beyond[node] -= static_cast<std::int64_t>(bytes);
  }
  return beyond;
}

std::int64_t check_cgroup(const Need& need, const std::string& owner, const Claims& outstanding) {
  const auto limit = sys::tightest_cgroup_limit();
  if (!limit) return std::numeric_limits<std::int64_t>::max();
  std::size_t bytes = 0;
  for (const auto& [node, wanted] : need.per_node) bytes += wanted;
  for (const auto& [key, pending] : outstanding) bytes += key.second == 0 ? pending : 0;
  if (static_cast<std::int64_t>(with_margin(bytes)) > limit->left) {
    throw_full(owner, bytes, limit->left, "the memory cgroup (" + limit->file + " = " + format_bytes(static_cast<double>(limit->limit)) + ")",
               "raise the limit (docker run --memory, systemd MemoryMax, the pod's limits.memory), or use a smaller format");
  }
  return limit->left - static_cast<std::int64_t>(bytes);
}

// What the last look found, less what was claimed since: while far more is left than is asked for, the next of ten thousand
// small weights need not read /proc again. Guarded by fork_safe_mutex().
struct LastLook {
  std::chrono::steady_clock::time_point when{};
  std::map<int, std::int64_t> left;  // by node; -1: the system
  std::int64_t cgroup_left = 0;
};
constexpr std::chrono::milliseconds kLookLasts{500};
constexpr std::int64_t kFarMore = std::int64_t{2} << 30;

LastLook& last_look() {
  static LastLook* const instance = new LastLook;
  return *instance;
}

bool plenty_left(const Need& need) {
  LastLook& look = last_look();
  if (sys::availability_planted() || std::chrono::steady_clock::now() - look.when > kLookLasts) return false;
  std::int64_t sum = 0;
  for (const auto& [node, bytes] : need.per_node) {
    const auto left = look.left.find(node);
    if (left == look.left.end() || left->second - static_cast<std::int64_t>(bytes) < kFarMore) return false;
    sum += static_cast<std::int64_t>(bytes);
  }
  if (look.cgroup_left - sum < kFarMore) return false;
  for (const auto& [node, bytes] : need.per_node) look.left[node] -= static_cast<std::int64_t>(bytes);
  look.cgroup_left -= sum;
  return true;
}

void check_locked(const Need& need, const std::string& owner) {
  if (need.per_node.empty()) return;
  const Claims& outstanding = claims();
  if (is_explicit(need.pages)) {
    check_huge_pages(need, owner, outstanding);
    return;  // hugetlb pages are set apart already, and a memory cgroup does not count them
  }
  if (plenty_left(need)) return;
  LastLook& look = last_look();
  look.left = check_nodes(need, owner, outstanding);
  look.cgroup_left = check_cgroup(need, owner, outstanding);
  look.when = std::chrono::steady_clock::now();
}

}  // namespace

Need need_of(std::size_t bytes, const std::vector<int>& os_nodes, MemoryTarget::Mode mode, PageKind pages, bool bind) {
  Need need;
  need.pages = pages;
  if (!bind || os_nodes.empty()) {
    need.per_node[-1] = bytes;
  } else if (mode == MemoryTarget::Mode::interleave) {
    const std::size_t unit = page_kind_bytes(pages);
    const std::size_t units = (bytes + unit - 1) / unit;
    for (int node : os_nodes) need.per_node[node] = (units + os_nodes.size() - 1) / os_nodes.size() * unit;
  } else {
    // MPOL_BIND to several nodes fills one first: it fits when the first that is asked for it all could give it.
    need.per_node[os_nodes.front()] = bytes;
  }
  return need;
}

void check_room(const Need& need, const std::string& owner) {
  const std::lock_guard lock(fork_safe_mutex());
  check_locked(need, owner);
}

RoomClaim::RoomClaim(Need need, const std::string& owner) : need_(std::move(need)), owner_(owner) {
  const std::lock_guard lock(fork_safe_mutex());
  check_locked(need_, owner);
  for (const auto& [node, bytes] : need_.per_node) claims()[{node, claim_unit(need_.pages)}] += bytes;
}

void RoomClaim::check_again(double share) const {
  if (is_explicit(need_.pages)) return;  // the kernel says so itself, and kills nobody
  Need rest = need_;
  for (auto& [node, bytes] : rest.per_node) bytes = static_cast<std::size_t>(static_cast<double>(bytes) * share);
  check_nodes(rest, owner_ + " (while its memory was being filled)", Claims());
  check_cgroup(rest, owner_ + " (while its memory was being filled)", Claims());
}

RoomClaim::~RoomClaim() {
  const std::lock_guard lock(fork_safe_mutex());
  for (const auto& [node, bytes] : need_.per_node) {
    const auto claim = claims().find({node, claim_unit(need_.pages)});
    if (claim != claims().end() && (claim->second -= std::min(claim->second, bytes)) == 0) claims().erase(claim);
  }
}

}  // namespace numagraft

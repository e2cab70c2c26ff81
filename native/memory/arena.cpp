#include "memory/arena.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "system/error.h"
#include "system/free_memory.h"

namespace numagraft {
namespace {

constexpr std::size_t kMiB = std::size_t{1} << 20;
constexpr int kHugeShift = 26;  // MAP_HUGE_SHIFT

std::size_t round_up(std::size_t value, std::size_t multiple) { return (value + multiple - 1) / multiple * multiple; }

std::string list(const std::vector<int>& nodes) {
  std::string text;
  for (int node : nodes) text += (text.empty() ? "" : ",") + std::to_string(node);
  return text;
}

[[noreturn]] void throw_map_refused(std::size_t bytes, PageKind pages, int error) {
  const std::string what = "cannot reserve " + format_bytes(static_cast<double>(bytes)) + " of address space: mmap says " + describe_errno(error);
  if (error == EAGAIN) throw PlacementFailure(what, "this process locks its memory (mlockall) beyond its limit: raise it with `ulimit -l unlimited`");
  if (is_explicit(pages)) {
    throw PlacementFailure(what, "reserve huge pages first: echo N > " + sys::huge_pages_file(-1, page_kind_bytes(pages)) + " (as root)");
  }
  if (error == ENOMEM) {
    throw PlacementFailure(what, "lift the address space limit (`ulimit -v unlimited`), check `sysctl vm.overcommit_memory` (2 counts reserved memory) and raise "
                                 "`sysctl -w vm.max_map_count=262144`");
  }
  throw PlacementFailure(what, "see what restricts mmap in this process (a sandbox, a resource limit)");
}

// The nodes this process may take memory from: a cpuset narrows them, and mbind drops the others without a word.
std::optional<sys::NodeMask> allowed_nodes() {
  sys::NodeMask allowed;
  if (sys::get_mems_allowed(allowed) == 0) return allowed;
  const auto status = sys::read_file("/proc/self/status");
  const std::size_t at = status ? status->find("Mems_allowed_list:") : std::string::npos;
  if (at == std::string::npos) return std::nullopt;
  const char* text = status->c_str() + at + std::strlen("Mems_allowed_list:");
  while (*text != '\0' && *text != '\n') {  // "0-1,4"
    char* rest = nullptr;
    const long first = std::strtol(text, &rest, 10);
    if (rest == text) break;
    long last = first;
    if (*rest == '-') last = std::strtol(rest + 1, &rest, 10);
    for (long node = first; node <= last; ++node) allowed.add(static_cast<int>(node));
    text = *rest == ',' ? rest + 1 : rest;
  }
  return allowed;
}

// Whether the threads that touch may carry the policy instead: tried without changing it.
bool may_set_policy() {
  int mode = 0;
  sys::NodeMask nodes;
  return sys::get_mempolicy(mode, nodes) == 0 && sys::set_mempolicy(mode, nodes) == 0;
}

}  // namespace

std::size_t page_kind_bytes(PageKind kind) {
  switch (kind) {
    case PageKind::huge_1g: return 1024 * kMiB;
    case PageKind::huge_2m:
    case PageKind::transparent: return 2 * kMiB;
    default: return sys::page_bytes();
  }
}

bool is_explicit(PageKind kind) { return kind == PageKind::huge_2m || kind == PageKind::huge_1g; }

const char* name_of(Obtained obtained) {
  switch (obtained) {
    case Obtained::mbind: return "mbind";
    case Obtained::set_mempolicy: return "set_mempolicy";
    case Obtained::first_touch: return "first_touch";
    default: return "unbound";
  }
}

Arena::Arena(std::size_t bytes, std::size_t preferred_bytes, MemoryTarget target, std::vector<int> os_nodes, PageKind pages, bool bind)
    : target_(std::move(target)), os_nodes_(std::move(os_nodes)), pages_(pages) {
  map(bytes, preferred_bytes);
  try {
    if (bind) place();
    // Interleaving by hand goes page by page: a transparent huge page would put 512 of them on one node.
    const bool by_hand = obtained_ == Obtained::first_touch && target_.mode == MemoryTarget::Mode::interleave;
    if (!is_explicit(pages_)) {
      const bool huge = pages_ == PageKind::transparent && !by_hand;
      (void)!sys::advise(data_, bytes_, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);  // EINVAL: a kernel without them
    }
  } catch (...) {
    sys::unmap(mapped_, mapped_bytes_);
    throw;
  }
  free_[0] = bytes_;
}

Arena::~Arena() { sys::unmap(mapped_, mapped_bytes_); }

void Arena::map(std::size_t bytes, std::size_t preferred_bytes) {
  const std::size_t unit = std::max(page_kind_bytes(pages_), 2 * kMiB);
  const std::size_t least = round_up(bytes, unit);
  int error = 0;
  for (std::size_t size = std::max(least, round_up(preferred_bytes, unit));; size = std::max(least, round_up(size / 2, unit))) {
    if (is_explicit(pages_)) {
      const int shift = pages_ == PageKind::huge_1g ? 30 : 21;
      error = sys::map_anonymous(size, PROT_READ | PROT_WRITE, MAP_NORESERVE | MAP_HUGETLB | shift << kHugeShift, mapped_);
      mapped_bytes_ = bytes_ = size;
      data_ = mapped_;
      if (error == 0) return;
    } else {
      // Guards of two megabytes: room to align, and no neighbour with which the kernel would merge the mapping, since
      // numa_maps tells mappings apart and nothing finer.
      error = sys::map_anonymous(size + 2 * unit, PROT_NONE, MAP_NORESERVE, mapped_);
      if (error == 0) {
        // Under mlockall(MCL_FUTURE) the kernel would fill the whole reservation, before it has a policy.
        sys::unlock(mapped_, size + 2 * unit);
        mapped_bytes_ = size + 2 * unit;
        bytes_ = size;
        data_ = mapped_ + (round_up(reinterpret_cast<std::uintptr_t>(mapped_) + 1, unit) - reinterpret_cast<std::uintptr_t>(mapped_));
        error = sys::protect(data_, bytes_, PROT_READ | PROT_WRITE);
        if (error == 0) return;
        sys::unmap(mapped_, mapped_bytes_);
      }
    }
    if (size == least) break;
  }
  throw_map_refused(least, pages_, error);
}

void Arena::place() {
  const auto allowed = allowed_nodes();
  for (int node : os_nodes_) {
    if (allowed && !allowed->contains(node)) {
      throw PlacementFailure("memory of node " + std::to_string(node) + " is not allowed to this process: it may use nodes " + list(allowed->nodes()),
                             "widen the cpuset (docker --cpuset-mems, systemd AllowedMemoryNodes, the batch system's binding), or leave node " + std::to_string(node) + " out");
    }
  }
  refused_ = sys::mbind(data_, bytes_, policy(), sys::NodeMask(os_nodes_));
  if (refused_ == 0) {
    obtained_ = Obtained::mbind;
  } else if (refused_ == EINVAL) {
    throw PlacementFailure("mbind to node " + list(os_nodes_) + " says " + describe_errno(refused_),
                           "the node is gone, has no memory or is outside this process's cpuset: detect the platform again and plan anew");
  } else if (refused_ == ENOMEM) {
    throw PlacementFailure("mbind to node " + list(os_nodes_) + " says " + describe_errno(refused_), "raise the number of mappings: sysctl -w vm.max_map_count=262144");
  } else {
    // Refused by a sandbox (EPERM, ENOSYS): what counts is where the pages come to lie, which is verified.
    obtained_ = may_set_policy() ? Obtained::set_mempolicy : Obtained::first_touch;
  }
}

bool Arena::serves(const MemoryTarget& target, PageKind pages) const {
  return pages == pages_ && target.mode == target_.mode && target.nodes == target_.nodes;
}

std::optional<std::size_t> Arena::take(std::size_t bytes, const std::string& owner) {
  for (auto extent = free_.begin(); extent != free_.end(); ++extent) {
    if (extent->second < bytes) continue;
    const auto [offset, room] = *extent;
    free_.erase(extent);
    if (room > bytes) free_[offset + bytes] = room - bytes;
    placed_[offset] = {bytes, owner, std::make_shared<Residency>()};
    used_ += bytes;
    restore_policy(offset, bytes);
    return offset;
  }
  return std::nullopt;
}

// A policy belongs to addresses, not to who held them: what a debugger, migratepages or a cpuset that changed left on this
// stretch would decide where its next owner's pages go. Where the policy is as it was the kernel changes nothing, and a
// refusal does no harm: pages that then come to lie elsewhere are found when they are verified.
void Arena::restore_policy(std::size_t offset, std::size_t bytes) {
  if (obtained_ != Obtained::mbind) return;
  const std::size_t unit = is_explicit(pages_) ? page_kind_bytes(pages_) : sys::page_bytes();
  const std::size_t first = offset / unit * unit;
  (void)!sys::mbind(data_ + first, round_up(offset + bytes, unit) - first, policy(), sys::NodeMask(os_nodes_));
}

int Arena::policy() const { return target_.mode == MemoryTarget::Mode::bind ? sys::kPolicyBind : sys::kPolicyInterleave; }

std::size_t Arena::untouched_bytes(std::size_t offset) const {
  const auto piece = placed_.find(offset);
  if (!is_explicit(pages_)) return piece->second.bytes;
  const std::size_t page = page_kind_bytes(pages_);
  std::size_t first = offset / page;
  std::size_t end = (offset + piece->second.bytes + page - 1) / page;
  if (piece != placed_.begin()) {
    const auto before = std::prev(piece);
    first = std::max(first, (before->first + before->second.bytes + page - 1) / page);
  }
  if (const auto after = std::next(piece); after != placed_.end()) end = std::min(end, after->first / page);
  return end > first ? (end - first) * page : 0;
}

void Arena::give_back(std::size_t offset, bool touched) {
  const auto placed = placed_.find(offset);
  if (placed == placed_.end()) throw std::invalid_argument("this buffer was not handed out, or was already given back");
  std::size_t bytes = placed->second.bytes;
  placed_.erase(placed);
  used_ -= bytes;
  if (touched && used_ > 0) forget(offset, bytes);  // else the whole arena goes
  auto next = free_.lower_bound(offset);
  if (next != free_.end() && next->first == offset + bytes) {
    bytes += next->second;
    next = free_.erase(next);
  }
  if (next != free_.begin() && std::prev(next)->first + std::prev(next)->second == offset) {
    std::prev(next)->second += bytes;
  } else {
    free_[offset] = bytes;
  }
}

// The next owner finds zeros, and the kernel has the memory back where whole pages are free.
void Arena::forget(std::size_t offset, std::size_t bytes) {
  if (!is_explicit(pages_)) {
    if (sys::advise(data_ + offset, bytes, MADV_DONTNEED) != 0) std::memset(data_ + offset, 0, bytes);
    return;
  }
  const std::size_t page = page_kind_bytes(pages_);
  const std::size_t first = std::min(round_up(offset, page), offset + bytes);
  const std::size_t last = std::max(first, (offset + bytes) / page * page);
  std::memset(data_ + offset, 0, first - offset);
  std::memset(data_ + last, 0, offset + bytes - last);
  if (last > first && sys::advise(data_ + first, last - first, MADV_DONTNEED) != 0) std::memset(data_ + first, 0, last - first);
}

}  // namespace numagraft

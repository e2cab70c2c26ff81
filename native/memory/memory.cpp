#include "memory/memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <mutex>
#include <stdexcept>

#include "system/error.h"
#include "system/process.h"
#include "system/syscalls.h"

namespace numagraft {
namespace {

constexpr std::size_t kMiB = std::size_t{1} << 20;
constexpr std::size_t kFirstArena = 64 * kMiB;
constexpr std::size_t kLargestArena = std::size_t{16} << 30;  // of address space: a few hundred GiB take a few dozen mappings
constexpr int kPopulateWrite = 23;                            // MADV_POPULATE_WRITE, Linux 5.14

std::size_t round_up(std::size_t value, std::size_t multiple) { return (value + multiple - 1) / multiple * multiple; }

}  // namespace

Memory::Memory(std::vector<int> os_nodes, bool bind, PageKind pages) : os_nodes_(std::move(os_nodes)), bind_(bind), pages_(pages) {}

std::vector<int> Memory::os_nodes_of(const MemoryTarget& target) const {
  std::vector<int> found;
  for (int node : target.nodes) {
    const int os_node = os_nodes_[static_cast<std::size_t>(node)];
    if (os_node >= 0 && std::find(found.begin(), found.end(), os_node) == found.end()) found.push_back(os_node);
  }
  return found;
}

Memory::Reserved Memory::reserve(std::size_t bytes, const MemoryTarget& target, const std::string& owner) {
  if (bytes == 0 || bytes > (std::size_t{1} << 50)) throw std::invalid_argument(owner + ": cannot allocate " + std::to_string(bytes) + " bytes");
  if (target.nodes.empty()) throw std::invalid_argument(owner + ": a memory target names no node");
  for (int node : target.nodes) {
    if (node < 0 || node >= static_cast<int>(os_nodes_.size())) {
      throw std::invalid_argument(owner + ": node " + std::to_string(node) + " is not one of the runtime's " + std::to_string(os_nodes_.size()));
    }
  }
  bytes = round_up(bytes, sys::page_bytes());
  const std::vector<int> os_nodes = os_nodes_of(target);
  const auto claim = [&](std::size_t untouched) {
    return std::make_unique<RoomClaim>(need_of(untouched, os_nodes, target.mode, pages_, bind_), owner);
  };
  if (!is_explicit(pages_)) {
    auto room = claim(bytes);
    Reserved reserved = hand_out(bytes, target, os_nodes, owner);
    reserved.claim = std::move(room);
    return reserved;
  }
  // Of explicit huge pages a small buffer needs none where its neighbours have touched them already.
  Reserved reserved = hand_out(bytes, target, os_nodes, owner);
  try {
    reserved.claim = claim(reserved.untouched);
  } catch (...) {
    give_back(reserved.buffer.data, false);
    throw;
  }
  return reserved;
}

Memory::Reserved Memory::hand_out(std::size_t bytes, const MemoryTarget& target, const std::vector<int>& os_nodes, const std::string& owner) {
  const std::lock_guard lock(fork_safe_mutex());
  std::size_t next_arena = kFirstArena;
  const auto from = [&](Arena& arena) -> std::optional<Reserved> {
    const auto offset = arena.take(bytes, owner);
    if (!offset) return std::nullopt;
    Buffer buffer{arena.data() + *offset, bytes, target, owner, arena.placed().at(*offset).residency};
    return Reserved{std::move(buffer), arena.obtained(), arena.pages(), *offset, arena.untouched_bytes(*offset), nullptr};
  };
  for (const auto& arena : arenas_) {
    if (!arena->serves(target, pages_)) continue;
    next_arena = std::min(kLargestArena, std::max(next_arena, arena->bytes() * 2));
    if (auto reserved = from(*arena)) return std::move(*reserved);
  }
  arenas_.push_back(std::make_unique<Arena>(bytes, next_arena, target, os_nodes, pages_, bind_));
  return *from(*arenas_.back());
}

void Memory::release(const std::byte* data) { give_back(data, true); }

void Memory::give_back(const std::byte* data, bool touched) {
  std::unique_ptr<Arena> emptied;  // unmapped after the lock
  const std::lock_guard lock(fork_safe_mutex());
  for (auto arena = arenas_.begin(); arena != arenas_.end(); ++arena) {
    if (!(*arena)->contains(data)) continue;
    (*arena)->give_back(static_cast<std::size_t>(data - (*arena)->data()), touched);
    if ((*arena)->used_bytes() == 0) {
      emptied = std::move(*arena);
      arenas_.erase(arena);
    }
    return;
  }
  throw std::invalid_argument("this buffer does not belong to this runtime");
}

std::shared_ptr<Residency> Memory::residency_of(const std::byte* data) const {
  const std::lock_guard lock(fork_safe_mutex());
  for (const auto& arena : arenas_) {
    if (!arena->contains(data)) continue;
    const auto placed = arena->placed().find(static_cast<std::size_t>(data - arena->data()));
    if (placed != arena->placed().end()) return placed->second.residency;
  }
  throw std::invalid_argument("no buffer of this runtime starts at this address");
}

std::vector<Memory::ArenaReport> Memory::report() const {
  const std::lock_guard lock(fork_safe_mutex());
  std::vector<ArenaReport> reports;
  for (const auto& arena : arenas_) {
    reports.push_back({
        .address = reinterpret_cast<std::uintptr_t>(arena->data()),
        .reserved_bytes = arena->bytes(),
        .used_bytes = arena->used_bytes(),
        .buffers = arena->placed().size(),
        .nodes = arena->target().nodes,
        .os_nodes = arena->os_nodes(),
        .interleaved = arena->target().mode == MemoryTarget::Mode::interleave,
        .obtained = name_of(arena->obtained()),
        .refused = arena->refused() == 0 ? "" : errno_name(arena->refused()),
        .pages = arena->pages(),
    });
  }
  return reports;
}

void touch_pages(std::byte* begin, std::byte* end, PageKind pages) {
  int error = 0;
  do {
    error = sys::advise(begin, static_cast<std::size_t>(end - begin), kPopulateWrite);
  } while (error == EINTR || error == EAGAIN);
  if (error == 0) return;
  if (error == EFAULT || error == EHWPOISON || (error == ENOMEM && is_explicit(pages))) {
    const std::string what = "touching " + format_bytes(static_cast<double>(end - begin)) + " failed: madvise says " + describe_errno(error);
    if (is_explicit(pages)) throw PlacementFailure(what, "the node has run out of huge pages since they were counted: reserve more");
    throw PlacementFailure(what, "the memory is damaged (see the kernel log) or was taken by others meanwhile");
  }
  if (error == ENOMEM) throw PlacementFailure("touching memory failed: madvise says " + describe_errno(error), "free memory on the node, or use a smaller format");
  // A kernel before 5.14, or a sandbox: by hand.
  const std::size_t step = sys::page_bytes();
  for (std::byte* page = begin; page < end; page += step) *reinterpret_cast<volatile char*>(page) = 0;
}

PolicyScope::PolicyScope(std::span<const int> os_nodes, MemoryTarget::Mode mode) {
  int error = sys::get_mempolicy(mode_, nodes_);
  if (error == 0) error = sys::set_mempolicy(mode == MemoryTarget::Mode::bind ? sys::kPolicyBind : sys::kPolicyInterleave, sys::NodeMask(os_nodes));
  if (error != 0) {
    throw PlacementFailure("set_mempolicy worked a moment ago and now says " + describe_errno(error), "the process's cpuset or sandbox changed while loading: start again");
  }
}

PolicyScope::~PolicyScope() { (void)!sys::set_mempolicy(mode_, nodes_); }

}  // namespace numagraft

#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "memory/arena.h"
#include "memory/buffer.h"
#include "memory/room.h"

namespace numagraft {

// The arenas of one runtime. Hands out stretches of them; touching (which decides where pages lie) is the threads' part.
class Memory {
 public:
  // `os_nodes[i]` is the kernel node of the runtime's node i (-1: virtual).
  Memory(std::vector<int> os_nodes, bool bind, PageKind pages);

  // A stretch of untouched (or zeroed) pages under the right policy, and a claim on the room that touching will take.
  struct Reserved {
    Buffer buffer;
    Obtained obtained;
    PageKind pages;
    std::size_t offset;     // in its arena: interleaving by hand goes on where the last buffer ended
    std::size_t untouched;  // what touching will take
    std::unique_ptr<RoomClaim> claim;
  };
  Reserved reserve(std::size_t bytes, const MemoryTarget& target, const std::string& owner);
  void release(const std::byte* data);

  // Where a buffer's pages were found; throws std::invalid_argument for an address that was not handed out.
  std::shared_ptr<Residency> residency_of(const std::byte* data) const;

  struct ArenaReport {
    std::uintptr_t address = 0;
    std::size_t reserved_bytes = 0;  // address space
    std::size_t used_bytes = 0;      // handed out
    std::size_t buffers = 0;
    std::vector<int> nodes;     // of the runtime
    std::vector<int> os_nodes;  // of the kernel; empty when virtual
    bool interleaved = false;
    std::string obtained;
    std::string refused;  // what mbind said, "" when it was not refused
    PageKind pages = PageKind::normal;
  };
  std::vector<ArenaReport> report() const;

 private:
  Reserved hand_out(std::size_t bytes, const MemoryTarget& target, const std::vector<int>& os_nodes, const std::string& owner);
  void give_back(const std::byte* data, bool touched);
  std::vector<int> os_nodes_of(const MemoryTarget& target) const;

  const std::vector<int> os_nodes_;
  const bool bind_;
  const PageKind pages_;
  std::vector<std::unique_ptr<Arena>> arenas_;  // guarded by fork_safe_mutex()
};

// Makes [begin, end) of a buffer resident, from the thread that calls. Throws PlacementFailure.
void touch_pages(std::byte* begin, std::byte* end, PageKind pages);

// While it lives, memory that the calling thread touches first goes to `os_nodes`; then its policy is what it was.
class PolicyScope {
 public:
  PolicyScope(std::span<const int> os_nodes, MemoryTarget::Mode mode);
  ~PolicyScope();
  PolicyScope(const PolicyScope&) = delete;
  PolicyScope& operator=(const PolicyScope&) = delete;

 private:
  int mode_ = 0;
  sys::NodeMask nodes_;
};

}  // namespace numagraft

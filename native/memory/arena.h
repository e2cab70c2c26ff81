#pragma once

#include <cstddef>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "memory/buffer.h"
#include "memory/residency.h"
#include "system/syscalls.h"

namespace numagraft {

enum class PageKind : std::uint8_t { normal, transparent, huge_2m, huge_1g };
std::size_t page_kind_bytes(PageKind kind);  // what one page of it takes: 4096 (the base page), 2 MiB, 1 GiB
bool is_explicit(PageKind kind);

// How an arena's pages get to their nodes.
enum class Obtained : std::uint8_t {
  mbind,          // the mapping carries the policy
  set_mempolicy,  // mbind is refused: the threads that touch first carry it
  first_touch,    // both are refused: threads pinned to the node touch first
  unbound,        // a virtual runtime: wherever the kernel likes
};
const char* name_of(Obtained obtained);

// One address range, reserved whole and handed out in pieces: few mappings, whatever the number of weights. Only pieces that
// were handed out and touched take memory.
class Arena {
 public:
  struct Placed {  // a piece that was handed out
    std::size_t bytes = 0;
    std::string owner;
    std::shared_ptr<Residency> residency;
  };

  // Maps at least `bytes`, `preferred_bytes` if the kernel lets it, and asks for the placement; touches nothing.
  // Throws PlacementFailure.
  Arena(std::size_t bytes, std::size_t preferred_bytes, MemoryTarget target, std::vector<int> os_nodes, PageKind pages, bool bind);
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  std::byte* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }
  std::size_t used_bytes() const { return used_; }
  const MemoryTarget& target() const { return target_; }
  const std::vector<int>& os_nodes() const { return os_nodes_; }
  PageKind pages() const { return pages_; }
  Obtained obtained() const { return obtained_; }
  int refused() const { return refused_; }  // what mbind said, 0 when it was not refused
  const std::map<std::size_t, Placed>& placed() const { return placed_; }

  bool serves(const MemoryTarget& target, PageKind pages) const;
  std::optional<std::size_t> take(std::size_t bytes, const std::string& owner);  // the offset; none: no room
  // What touching this piece will take: all of it, or the explicit huge pages that no other piece lies in.
  std::size_t untouched_bytes(std::size_t offset) const;
  void give_back(std::size_t offset, bool touched);  // frees its memory
  bool contains(const std::byte* address) const { return address >= data_ && address < data_ + bytes_; }

 private:
  void map(std::size_t bytes, std::size_t preferred_bytes);
  void place();
  void restore_policy(std::size_t offset, std::size_t bytes);
  void forget(std::size_t offset, std::size_t bytes);
  int policy() const;

  const MemoryTarget target_;
  const std::vector<int> os_nodes_;
  const PageKind pages_;
  Obtained obtained_ = Obtained::unbound;
  int refused_ = 0;
  std::byte* mapped_ = nullptr;  // with the guards around it
  std::size_t mapped_bytes_ = 0;
  std::byte* data_ = nullptr;
  std::size_t bytes_ = 0;
  std::size_t used_ = 0;
  std::map<std::size_t, std::size_t> free_;  // offset -> bytes, neighbours merged
  std::map<std::size_t, Placed> placed_;
};

}  // namespace numagraft

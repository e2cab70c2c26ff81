#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "memory/arena.h"

namespace numagraft {

// What an allocation will take from where, in bytes; node -1: from the system as a whole.
struct Need {
  std::map<int, std::size_t> per_node;
  PageKind pages = PageKind::normal;
};
Need need_of(std::size_t bytes, const std::vector<int>& os_nodes, MemoryTarget::Mode mode, PageKind pages, bool bind);

// Looks whether the nodes, the memory cgroups and the huge page pools have room for `need`, on top of what other claims of
// this process are still filling. Throws PlacementFailure that names who wants how much, what is left and what to do:
// MPOL_BIND on a full node ends in the OOM killer, not in an error.
void check_room(const Need& need, const std::string& owner);

// Checks, then holds the claim while the memory is being touched.
class RoomClaim {
 public:
  RoomClaim(Need need, const std::string& owner);
  ~RoomClaim();
  RoomClaim(const RoomClaim&) = delete;
  RoomClaim& operator=(const RoomClaim&) = delete;

  // Looks again whether `share` (0 to 1) of the claim still finds room: others may fill the node while it is being touched.
  void check_again(double share) const;

 private:
  Need need_;
  std::string owner_;
};

}  // namespace numagraft

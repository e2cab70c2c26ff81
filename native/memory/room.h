#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "memory/arena.h"

namespace numagraft {

// What an allocation will take: each share from any of its nodes (kernel ids; -1: wherever the system likes).
struct Need {
  struct Share {
    std::vector<int> nodes;
    std::size_t bytes = 0;
  };
  std::vector<Share> shares;
  PageKind pages = PageKind::normal;
};
Need need_of(std::size_t bytes, const std::vector<int>& os_nodes, MemoryTarget::Mode mode, PageKind pages, bool bind);

// Room for memory that is about to be touched. Making one looks whether the nodes, the memory cgroups and the huge page
// pools have it, on top of what other claims of this process are still filling, and throws PlacementFailure that names who
// wants how much, what is left and what to do: MPOL_BIND on a full node ends in the OOM killer, not in an error.
class RoomClaim {
 public:
  RoomClaim(Need need, std::string owner);
  ~RoomClaim();
  RoomClaim(const RoomClaim&) = delete;
  RoomClaim& operator=(const RoomClaim&) = delete;

  // `part` (0 to 1) of the memory is still untouched: claims no more than that, and looks whether it still finds room, since
  // others may fill the node meanwhile. From any thread.
  void shrink(double part);

 private:
  const Need need_;
  const std::string owner_;
  double claimed_ = 1;
};

}  // namespace numagraft

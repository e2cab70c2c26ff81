#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "system/page_sizes.h"

// Where pages really are, asked of the kernel. Node numbers are the kernel's.
namespace numagraft::sys {

struct PageRange {
  std::uintptr_t begin = 0;
  std::uintptr_t end = 0;
};

struct PageCount {
  std::map<int, std::int64_t> per_node;  // pages of `page_bytes`
  std::int64_t absent = 0;               // never touched, swapped out or unmapped
  // "move_pages": the kernel named every page's node. "numa_maps": move_pages is refused; numa_maps counts whole mappings,
  // `exact` says that this settles the range: one node holds all of its mapping, or the mapping lies inside the range.
  // "unverifiable": neither answers.
  std::string method;
  bool exact = true;
  std::size_t page_bytes = 4096;  // the base page, also where huge pages are counted
};

// Asks many ranges at once: what must be read once for all of them (smaps, numa_maps) is read once. With `per_page`, also
// the node of every base page of each range (-1: absent), empty where the kernel does not tell single pages.
struct PageQuery {
  std::vector<PageCount> counts;
  std::vector<std::vector<std::int16_t>> per_page;
  std::int64_t asked = 0;  // pages that move_pages was asked for: one per huge page where smaps proves them
};
// `known`: what read_mappings() just told, where the caller needs it too; reading it walks all memory of the process.
PageQuery query_ranges(std::span<const PageRange> ranges, bool per_page, const std::vector<Mapping>* known = nullptr);

// The lines of /proc/self/numa_maps: pages per node of each mapping, by first address.
class NumaMaps {
 public:
  NumaMaps(const std::string& numa_maps, std::vector<Mapping> mappings, std::size_t base_page);
  static std::optional<NumaMaps> read();  // none: the kernel has no numa_maps, or it cannot be read
  PageCount count(const PageRange& range) const;

 private:
  std::map<std::uintptr_t, std::map<int, std::int64_t>> nodes_;  // in base pages
  std::vector<Mapping> mappings_;
  std::size_t base_page_;
};

}  // namespace numagraft::sys

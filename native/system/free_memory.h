#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>

// How much memory may still be taken before the kernel kills: the node's own, and every memory cgroup above this process.
namespace numagraft::sys {

// Bytes each kernel node can give without swapping: free pages above the watermarks and the lower zones' reserves, plus
// page cache and slab that reclaim can take, as the kernel computes MemAvailable. Empty where neither /proc/zoneinfo nor
// /sys/devices/system/node can be read.
std::map<int, std::int64_t> available_by_node();
// The test seam: from the `after`-th look on, every node (and the system) has `bytes` available; negative ends it.
void plant_available(std::int64_t bytes, int after = 0);
bool availability_planted();
std::map<int, std::int64_t> parse_zoneinfo(const std::string& text, std::int64_t page_bytes);

std::optional<std::int64_t> available_total();  // MemAvailable of /proc/meminfo

struct CgroupLimit {
  std::string file;          // the file that holds the limit, to name in messages
  std::int64_t limit = 0;    // bytes
  std::int64_t left = 0;     // limit - usage + page cache that reclaim can take
};
// The tightest memory limit along this process's cgroup hierarchy (v2, or v1's memory controller); none: unlimited.
// `root` holds proc/ and sys/.
std::optional<CgroupLimit> tightest_cgroup_limit(const std::string& root = "/");

// Huge pages of this size (bytes) that a node, or with node -1 the whole system, has free; none: the kernel has no such size.
std::optional<std::int64_t> free_huge_pages(int node, std::size_t size);
std::optional<std::int64_t> total_huge_pages(int node, std::size_t size);
std::string huge_pages_file(int node, std::size_t size);  // .../nr_hugepages

std::string transparent_huge_pages_mode();  // "always", "madvise", "never", or "" when the kernel has none

std::optional<std::string> read_file(const std::string& path);  // none when it cannot be read

}  // namespace numagraft::sys

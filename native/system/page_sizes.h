#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <vector>

namespace numagraft::sys {

// One mapping of this process.
struct Mapping {
  std::uintptr_t begin = 0;
  std::uintptr_t end = 0;
  std::size_t kernel_page_bytes = 4096;  // or the size of explicit huge pages
  std::size_t resident_bytes = 0;
  std::size_t transparent_bytes = 0;     // mapped by transparent huge pages of 2 MiB
};

std::vector<Mapping> read_mappings();        // from /proc/self/smaps, by address; empty when it cannot be read
std::vector<Mapping> read_mapping_bounds();  // from /proc/self/maps: no sizes, but fast
std::vector<Mapping> parse_smaps(const std::string& text);

// Resident bytes by page size in [begin, end). A mapping that reaches beyond the range counts in proportion: smaps knows
// only wholes.
std::map<std::size_t, std::int64_t> count_page_sizes(std::span<const Mapping> mappings, std::uintptr_t begin, std::uintptr_t end);

}  // namespace numagraft::sys

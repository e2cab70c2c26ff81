#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <vector>

// Where pages really are, asked of the kernel. Node numbers are the kernel's.
namespace numagraft::sys {

struct PageCount {
  std::map<int, std::int64_t> per_node;  // pages of `page_bytes`
  std::int64_t absent = 0;               // never touched, swapped out or unmapped
  // "move_pages": every page was asked for. "numa_maps": move_pages is refused; counts of the whole mappings that hold the
  // range (`exact` only when they lie on one node, then scaled to the range). "unverifiable": neither answers.
  std::string method;
  bool exact = true;
  std::size_t page_bytes = 4096;
};

PageCount count_pages(const void* address, std::size_t bytes);

// The kernel node of every `stride`-th page (-1: absent); empty when move_pages is refused, the reason in `error`.
std::vector<std::int16_t> nodes_of_pages(const void* address, std::size_t bytes, std::size_t stride, int& error);

// One mapping of /proc/self/smaps that overlaps what was asked for.
struct Mapping {
  std::uintptr_t begin = 0;
  std::uintptr_t end = 0;
  std::size_t kernel_page_bytes = 0;   // 4096, or the size of explicit huge pages
  std::size_t resident_bytes = 0;
  std::size_t transparent_bytes = 0;   // mapped by transparent huge pages of 2 MiB
};
std::vector<Mapping> read_mappings(std::uintptr_t begin, std::uintptr_t end);
std::vector<Mapping> parse_smaps(const std::string& text, std::uintptr_t begin, std::uintptr_t end);

// Bytes by page size of the resident memory in the range. A mapping that lies only partly in the range counts in
// proportion to the overlap, whole sizes where it is all of one kind.
std::map<std::size_t, std::int64_t> count_page_sizes(std::uintptr_t begin, std::uintptr_t end);

PageCount parse_numa_maps(const std::string& maps, std::span<const Mapping> mappings, std::uintptr_t begin, std::uintptr_t end);

}  // namespace numagraft::sys

#include "system/page_query.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <sstream>
#include <string_view>

#include "system/free_memory.h"
#include "system/syscalls.h"

namespace numagraft::sys {
namespace {

constexpr std::size_t kChunk = 1 << 14;  // pages per move_pages call: 192 KiB of arguments

std::uintptr_t address_of(const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer); }

}  // namespace

std::vector<std::int16_t> nodes_of_pages(const void* address, std::size_t bytes, std::size_t stride, int& error) {
  const std::uintptr_t page = page_bytes();
  const std::uintptr_t first = address_of(address) / page * page;
  const std::uintptr_t end = address_of(address) + bytes;
  std::vector<std::int16_t> nodes;
  nodes.reserve((end - first + stride - 1) / stride);
  std::vector<void*> pages;
  std::vector<int> status;
  for (std::uintptr_t at = first; at < end;) {
    pages.clear();
    for (; at < end && pages.size() < kChunk; at += stride) pages.push_back(reinterpret_cast<void*>(at));
    status.assign(pages.size(), -1);
    error = query_pages(pages, status);
    if (error != 0) return {};
    for (int node : status) nodes.push_back(static_cast<std::int16_t>(node < 0 ? -1 : node));
  }
  return nodes;
}

PageCount count_pages(const void* address, std::size_t bytes) {
  PageCount count;
  count.page_bytes = page_bytes();
  if (bytes == 0) {
    count.method = "move_pages";
    return count;
  }
  int error = 0;
  const auto nodes = nodes_of_pages(address, bytes, count.page_bytes, error);
  if (error == 0) {
    count.method = "move_pages";
    for (int node : nodes) node < 0 ? ++count.absent : ++count.per_node[node];
    return count;
  }
  const std::uintptr_t begin = address_of(address);
  const auto maps = read_file("/proc/self/numa_maps");
  const auto mappings = maps ? read_mappings(begin, begin + bytes) : std::vector<Mapping>();
  if (mappings.empty()) {
    count.method = "unverifiable";
    count.exact = false;
    return count;
  }
  return parse_numa_maps(*maps, mappings, begin, begin + bytes);
}

std::vector<Mapping> parse_smaps(const std::string& text, std::uintptr_t begin, std::uintptr_t end) {
  std::vector<Mapping> found;
  Mapping* current = nullptr;
  std::size_t at = 0;
  while (at < text.size()) {
    const std::size_t newline = std::min(text.find('\n', at), text.size());
    const std::string_view line(text.data() + at, newline - at);
    at = newline + 1;
    const std::size_t name_end = line.find_first_of(" :-");
    if (name_end != std::string_view::npos && line[name_end] == '-') {  // "7f00-7f10 rw-p ..." opens a mapping
      char* rest = nullptr;
      const std::uintptr_t from = std::strtoull(line.data(), &rest, 16);
      const std::uintptr_t to = std::strtoull(rest + 1, nullptr, 16);
      if (from >= end) break;  // sorted by address
      current = nullptr;
      if (to > begin) {
        found.push_back({from, to, page_bytes(), 0, 0});
        current = &found.back();
      }
      continue;
    }
    if (current == nullptr) continue;
    const auto kib = [&](std::string_view name) -> long {
      return line.starts_with(name) ? std::strtol(line.data() + name.size(), nullptr, 10) : -1;
    };
    if (const long value = kib("KernelPageSize:"); value > 0) current->kernel_page_bytes = static_cast<std::size_t>(value) * 1024;
    if (const long value = kib("Rss:"); value >= 0) current->resident_bytes += static_cast<std::size_t>(value) * 1024;
    if (const long value = kib("AnonHugePages:"); value >= 0) current->transparent_bytes = static_cast<std::size_t>(value) * 1024;
    // Explicit huge pages are not in Rss.
    if (const long value = kib("Private_Hugetlb:"); value > 0) current->resident_bytes += static_cast<std::size_t>(value) * 1024;
    if (const long value = kib("Shared_Hugetlb:"); value > 0) current->resident_bytes += static_cast<std::size_t>(value) * 1024;
  }
  return found;
}

std::vector<Mapping> read_mappings(std::uintptr_t begin, std::uintptr_t end) {
  const auto text = read_file("/proc/self/smaps");
  return text ? parse_smaps(*text, begin, end) : std::vector<Mapping>();
}

std::map<std::size_t, std::int64_t> count_page_sizes(std::uintptr_t begin, std::uintptr_t end) {
  constexpr std::size_t kTransparent = std::size_t{2} << 20;
  std::map<std::size_t, std::int64_t> sizes;
  for (const Mapping& mapping : read_mappings(begin, end)) {
    const auto overlap = static_cast<double>(std::min(end, mapping.end) - std::max(begin, mapping.begin));
    // Of a mapping that reaches beyond the range only the whole is known; what is resident is spread over it evenly
    // unless the overlap alone can hold it (an arena's untouched tail is not resident).
    const double resident = std::min(overlap, static_cast<double>(mapping.resident_bytes));
    const double share = mapping.resident_bytes == 0 ? 0.0 : resident / static_cast<double>(mapping.resident_bytes);
    const auto transparent = static_cast<std::int64_t>(share * static_cast<double>(mapping.transparent_bytes));
    if (transparent > 0) sizes[kTransparent] += transparent;
    const auto rest = static_cast<std::int64_t>(resident) - transparent;
    if (rest > 0) sizes[mapping.kernel_page_bytes] += rest;
  }
  return sizes;
}

PageCount parse_numa_maps(const std::string& maps, std::span<const Mapping> mappings, std::uintptr_t begin, std::uintptr_t end) {
  PageCount count;
  count.method = "numa_maps";
  count.page_bytes = page_bytes();
  bool found_any = false;
  for (const Mapping& mapping : mappings) {
    // A line of numa_maps starts with the mapping's first address and counts pages of kernelpagesize_kB per node.
    char key[32];
    std::snprintf(key, sizeof key, "%08lx ", static_cast<unsigned long>(mapping.begin));
    std::size_t at = maps.starts_with(key) ? 0 : maps.find(std::string("\n") + key);
    if (at == std::string::npos) continue;
    if (at != 0) ++at;
    found_any = true;
    std::istringstream words(maps.substr(at, maps.find('\n', at) - at));
    std::map<int, std::int64_t> nodes;
    std::int64_t unit = 4;
    std::string word;
    while (words >> word) {
      if (word.starts_with("kernelpagesize_kB=")) unit = std::strtol(word.c_str() + 18, nullptr, 10);
      if (word.size() > 2 && word[0] == 'N' && word[1] >= '0' && word[1] <= '9') {
        char* rest = nullptr;
        const int node = static_cast<int>(std::strtol(word.c_str() + 1, &rest, 10));
        if (*rest == '=') nodes[node] += std::strtoll(rest + 1, nullptr, 10);
      }
    }
    const std::int64_t scale = unit * 1024 / static_cast<std::int64_t>(count.page_bytes);
    std::int64_t total = 0;
    for (auto& [node, pages] : nodes) total += pages *= scale;
    const auto asked = static_cast<std::int64_t>((std::min(end, mapping.end) - std::max(begin, mapping.begin) + count.page_bytes - 1) / count.page_bytes);
    if (nodes.size() == 1 && total >= asked) {
      count.per_node[nodes.begin()->first] += asked;
      continue;
    }
    const bool whole = begin <= mapping.begin && mapping.end <= end;
    count.exact = count.exact && whole;
    if (whole) count.absent += asked - total;
    for (const auto& [node, pages] : nodes) count.per_node[node] += pages;
  }
  if (!found_any) {
    count.method = "unverifiable";
    count.exact = false;
  }
  return count;
}

}  // namespace numagraft::sys

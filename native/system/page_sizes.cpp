#include "system/page_sizes.h"

#include <algorithm>
#include <cstdlib>
#include <string_view>

#include "system/free_memory.h"
#include "system/syscalls.h"

namespace numagraft::sys {

std::vector<Mapping> parse_smaps(const std::string& text) {
  std::vector<Mapping> found;
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t newline = std::min(text.find('\n', at), text.size());
    const std::string_view line(text.data() + at, newline - at);
    at = newline + 1;
    const std::size_t mark = line.find_first_of(" :-");
    if (mark == std::string_view::npos) continue;
    if (line[mark] == '-') {  // "7f00-7f10 rw-p ..." opens a mapping
      char* rest = nullptr;
      const std::uintptr_t begin = std::strtoull(line.data(), &rest, 16);
      if (*rest != '-') continue;
      found.push_back({begin, std::strtoull(rest + 1, nullptr, 16), page_bytes(), 0, 0});
      continue;
    }
    if (found.empty()) continue;
    Mapping& mapping = found.back();
    const auto bytes = [&](std::string_view name) -> std::size_t {
      if (!line.starts_with(name)) return 0;
      return static_cast<std::size_t>(std::max(0l, std::strtol(line.data() + name.size(), nullptr, 10))) * 1024;
    };
    if (const std::size_t size = bytes("KernelPageSize:")) mapping.kernel_page_bytes = size;
    // Explicit huge pages are not in Rss.
    mapping.resident_bytes += bytes("Rss:") + bytes("Private_Hugetlb:") + bytes("Shared_Hugetlb:");
    mapping.transparent_bytes += bytes("AnonHugePages:");
  }
  return found;
}

std::vector<Mapping> read_mappings() {
  const auto text = read_file("/proc/self/smaps");
  return text ? parse_smaps(*text) : std::vector<Mapping>();
}

std::vector<Mapping> read_mapping_bounds() {
  const auto text = read_file("/proc/self/maps");  // the lines that open a mapping, and nothing else
  return text ? parse_smaps(*text) : std::vector<Mapping>();
}

std::map<std::size_t, std::int64_t> count_page_sizes(std::span<const Mapping> mappings, std::uintptr_t begin, std::uintptr_t end) {
  constexpr std::size_t kTransparent = std::size_t{2} << 20;
  std::map<std::size_t, std::int64_t> sizes;
  for (const Mapping& mapping : mappings) {
    if (mapping.end <= begin || mapping.begin >= end || mapping.resident_bytes == 0) continue;
    const auto overlap = static_cast<double>(std::min(end, mapping.end) - std::max(begin, mapping.begin));
    const double share = std::min(1.0, overlap / static_cast<double>(mapping.resident_bytes));
    const auto transparent = static_cast<std::int64_t>(share * static_cast<double>(mapping.transparent_bytes));
    const auto rest = static_cast<std::int64_t>(share * static_cast<double>(mapping.resident_bytes)) - transparent;
    if (transparent > 0) sizes[kTransparent] += transparent;
    if (rest > 0) sizes[mapping.kernel_page_bytes] += rest;
  }
  return sizes;
}

}  // namespace numagraft::sys

#include "system/page_query.h"

#include <algorithm>
#include <cstdlib>
#include <string_view>

#include "system/free_memory.h"
#include "system/syscalls.h"

namespace numagraft::sys {
namespace {

constexpr std::size_t kChunk = 1 << 14;                       // pages per move_pages call: 192 KiB of arguments
constexpr std::size_t kWorthSmaps = std::size_t{1} << 30;     // below, asking for every page is faster than reading smaps
constexpr std::size_t kTransparent = std::size_t{2} << 20;

// The nodes of the range's base pages, one question per `stride` bytes (a huge page lies on one node); false with the
// errno when move_pages is refused.
bool ask_pages(const PageRange& range, std::size_t stride, std::vector<std::int16_t>& nodes, std::int64_t& asked) {
  const std::uintptr_t base = page_bytes();
  nodes.clear();
  nodes.reserve((range.end - range.begin + base - 1) / base);
  std::vector<void*> pages;
  std::vector<int> status;
  std::uintptr_t at = range.begin;
  std::uintptr_t answered = range.begin;
  while (at < range.end) {
    pages.clear();
    for (; at < range.end && pages.size() < kChunk; at = (at / stride + 1) * stride) pages.push_back(reinterpret_cast<void*>(at));
    status.assign(pages.size(), -1);
    if (sys::query_pages(pages, status) != 0) return false;
    asked += static_cast<std::int64_t>(pages.size());
    for (int node : status) {
      const std::uintptr_t next = std::min((answered / stride + 1) * stride, range.end);
      for (; answered < next; answered += base) nodes.push_back(static_cast<std::int16_t>(node < 0 ? -1 : node));
    }
  }
  return true;
}

// The largest step at which asking is still exact: every resident page of the range's mapping is huge.
std::size_t stride_of(const PageRange& range, std::span<const Mapping> mappings) {
  const auto after = std::upper_bound(mappings.begin(), mappings.end(), range.begin, [](std::uintptr_t at, const Mapping& mapping) { return at < mapping.begin; });
  if (after == mappings.begin()) return page_bytes();
  const Mapping& mapping = *std::prev(after);
  if (range.end > mapping.end) return page_bytes();
  if (mapping.kernel_page_bytes > page_bytes()) return mapping.kernel_page_bytes;
  const bool all_huge = mapping.resident_bytes > 0 && mapping.transparent_bytes == mapping.resident_bytes;
  return all_huge ? kTransparent : page_bytes();
}

PageCount count_of(std::span<const std::int16_t> nodes) {
  PageCount count;
  count.method = "move_pages";
  count.page_bytes = page_bytes();
  for (std::size_t i = 0; i < nodes.size();) {  // runs: a map look-up per page would cost more than the question
    std::size_t last = i;
    while (last < nodes.size() && nodes[last] == nodes[i]) ++last;
    const auto pages = static_cast<std::int64_t>(last - i);
    if (nodes[i] < 0) {
      count.absent += pages;
    } else {
      count.per_node[nodes[i]] += pages;
    }
    i = last;
  }
  return count;
}

}  // namespace

PageQuery query_ranges(std::span<const PageRange> asked_ranges, bool per_page, const std::vector<Mapping>* known) {
  PageQuery query;
  std::vector<PageRange> ranges;
  std::size_t total = 0;
  const std::uintptr_t base = page_bytes();
  for (const PageRange& range : asked_ranges) {
    ranges.push_back({range.begin / base * base, std::max(range.end, range.begin / base * base)});
    total += ranges.back().end - ranges.back().begin;
  }
  std::vector<Mapping> own;
  if (known == nullptr && total >= kWorthSmaps) own = read_mappings();
  const std::vector<Mapping>& mappings = known != nullptr ? *known : own;
  std::optional<NumaMaps> maps;
  bool refused = false;
  std::vector<std::int16_t> nodes;
  for (const PageRange& range : ranges) {
    refused = refused || !ask_pages(range, stride_of(range, mappings), nodes, query.asked);
    if (refused) {
      if (!maps) maps = NumaMaps::read().value_or(NumaMaps("", {}, base));
      query.counts.push_back(maps->count(range));
      if (per_page) query.per_page.emplace_back();
      continue;
    }
    query.counts.push_back(count_of(nodes));
    if (per_page) query.per_page.push_back(std::move(nodes));
  }
  return query;
}

NumaMaps::NumaMaps(const std::string& numa_maps, std::vector<Mapping> mappings, std::size_t base_page) : mappings_(std::move(mappings)), base_page_(base_page) {
  for (std::size_t at = 0; at < numa_maps.size();) {
    const std::size_t newline = std::min(numa_maps.find('\n', at), numa_maps.size());
    const std::string line = numa_maps.substr(at, newline - at);
    at = newline + 1;
    // "7f0000000000 bind:0 anon=512 dirty=512 N0=512 kernelpagesize_kB=4": counts are in pages of that size
    char* rest = nullptr;
    const std::uintptr_t begin = std::strtoull(line.c_str(), &rest, 16);
    std::map<int, std::int64_t>& nodes = nodes_[begin];
    std::int64_t unit = 1;
    for (std::size_t space = line.find(' '); space != std::string::npos; space = line.find(' ', space + 1)) {
      const char* word = line.c_str() + space + 1;
      if (std::string_view(word).starts_with("kernelpagesize_kB=")) unit = std::strtoll(word + 18, nullptr, 10) * 1024 / static_cast<std::int64_t>(base_page_);
      if (word[0] != 'N' || word[1] < '0' || word[1] > '9') continue;
      const long node = std::strtol(word + 1, &rest, 10);
      if (*rest == '=') nodes[static_cast<int>(node)] += std::strtoll(rest + 1, nullptr, 10);
    }
    for (auto& [node, pages] : nodes) pages *= std::max<std::int64_t>(1, unit);
  }
}

std::optional<NumaMaps> NumaMaps::read() {
  if (planted_fault("numa_maps") != 0) return std::nullopt;
  const auto text = read_file("/proc/self/numa_maps");
  if (!text || text->empty()) return std::nullopt;
  return NumaMaps(*text, read_mapping_bounds(), page_bytes());
}

PageCount NumaMaps::count(const PageRange& range) const {
  PageCount count;
  count.method = "numa_maps";
  count.page_bytes = base_page_;
  std::uintptr_t covered = 0;
  auto mapping = std::upper_bound(mappings_.begin(), mappings_.end(), range.begin, [](std::uintptr_t at, const Mapping& each) { return at < each.begin; });
  if (mapping != mappings_.begin()) --mapping;
  for (; mapping != mappings_.end() && mapping->begin < range.end; ++mapping) {
    const auto line = nodes_.find(mapping->begin);
    if (mapping->end <= range.begin || line == nodes_.end()) continue;
    const std::uintptr_t begin = std::max(range.begin, mapping->begin);
    const std::uintptr_t end = std::min(range.end, mapping->end);
    covered += end - begin;
    const auto pages = static_cast<std::int64_t>((end - begin + base_page_ - 1) / base_page_);
    const auto& nodes = line->second;
    std::int64_t total = 0;
    for (const auto& [node, held] : nodes) total += held;
    const bool whole = begin == mapping->begin && end == mapping->end;
    if (whole) {
      count.absent += std::max<std::int64_t>(0, pages - total);
      for (const auto& [node, held] : nodes) count.per_node[node] += held;
    } else if (nodes.size() == 1 && total >= pages) {
      // Were some of the range absent, its pages elsewhere in the mapping would be counted instead: residency is what
      // touching ensured, the node is what is asked.
      count.per_node[nodes.begin()->first] += pages;
    } else {
      count.exact = false;
      for (const auto& [node, held] : nodes) count.per_node[node] += held;
    }
  }
  if (covered < range.end - range.begin) {
    count.exact = false;
    if (covered == 0) count.method = "unverifiable";
  }
  return count;
}

}  // namespace numagraft::sys

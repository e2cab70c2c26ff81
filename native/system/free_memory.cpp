#include "system/free_memory.h"

#include <dirent.h>
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <charconv>
#include <cstring>
#include <limits>
#include <sstream>
#include <string_view>
#include <vector>

#include "system/syscalls.h"

namespace numagraft::sys {
namespace {

std::atomic<std::int64_t> planted_bytes{-1};
std::atomic<int> planted_after{0};

bool planted() { return planted_bytes.load() >= 0 && planted_after.fetch_sub(1) <= 0; }

std::optional<std::int64_t> parse_number(std::string_view text) {
  const std::size_t first = text.find_first_not_of(" \t\n");
  if (first == std::string_view::npos) return std::nullopt;
  text.remove_prefix(first);
  std::int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end == text.data()) return std::nullopt;
  return value;
}

// "Name:  123 kB" lines, in bytes.
std::optional<std::int64_t> kib_field(const std::string& text, std::string_view name) {
  const std::size_t at = text.find(name);
  if (at == std::string::npos) return std::nullopt;
  const auto kib = parse_number(std::string_view(text).substr(at + name.size()));
  return kib ? std::optional(*kib * 1024) : std::nullopt;
}

std::optional<std::int64_t> meminfo_available() {
  const auto text = read_file("/proc/meminfo");
  return text ? kib_field(*text, "MemAvailable:") : std::nullopt;
}

std::string huge_page_folder(int node, std::size_t size) {
  const std::string leaf = "hugepages-" + std::to_string(size / 1024) + "kB/";
  if (node < 0) return "/sys/kernel/mm/hugepages/" + leaf;
  return "/sys/devices/system/node/node" + std::to_string(node) + "/hugepages/" + leaf;
}

std::optional<std::int64_t> number_in(const std::string& path) {
  const auto text = read_file(path);
  return text ? parse_number(*text) : std::nullopt;
}

std::map<int, std::int64_t> available_from_sysfs() {
  std::map<int, std::int64_t> found;
  const std::string folder = "/sys/devices/system/node";
  DIR* entries = ::opendir(folder.c_str());
  if (entries == nullptr) return found;
  while (const dirent* entry = ::readdir(entries)) {
    const std::string_view name = entry->d_name;
    if (!name.starts_with("node")) continue;
    const auto node = parse_number(name.substr(4));
    const auto text = node ? read_file(folder + "/" + std::string(name) + "/meminfo") : std::nullopt;
    const auto free = text ? kib_field(*text, "MemFree:") : std::nullopt;
    if (free) found[static_cast<int>(*node)] = *free;
  }
  ::closedir(entries);
  return found;
}

// One cgroup folder: its limit and what is left of it.
std::optional<CgroupLimit> limit_of(const std::string& folder, bool v2) {
  const std::string file = folder + (v2 ? "/memory.max" : "/memory.limit_in_bytes");
  const auto limit = number_in(file);  // v2 says "max" for no limit: not a number
  if (!limit || *limit >= std::numeric_limits<std::int64_t>::max() / 2) return std::nullopt;
  const auto usage = number_in(folder + (v2 ? "/memory.current" : "/memory.usage_in_bytes"));
  if (!usage) return std::nullopt;
  std::int64_t reclaimable = 0;
  if (const auto stat = read_file(folder + "/memory.stat")) {
    std::istringstream lines(*stat);
    std::string name;
    std::int64_t value = 0;
    while (lines >> name >> value) {
      const bool counts = v2 ? name == "inactive_file" || name == "active_file"
                             : name == "total_inactive_file" || name == "total_active_file";
      if (counts) reclaimable += value;
    }
  }
  return CgroupLimit{file, *limit, std::max<std::int64_t>(0, *limit - *usage + reclaimable)};
}

}  // namespace

std::optional<std::string> read_file(const std::string& path) {
  const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) return std::nullopt;
  std::string text;
  char chunk[1 << 14];
  ssize_t got = 0;
  while ((got = ::read(file, chunk, sizeof chunk)) > 0) text.append(chunk, static_cast<std::size_t>(got));
  ::close(file);
  if (got < 0) return std::nullopt;
  return text;
}

std::map<int, std::int64_t> parse_zoneinfo(const std::string& text, std::int64_t page_bytes) {
  struct Node {
    std::int64_t usable = 0, low = 0, file = 0, slab = 0;
  };
  std::map<int, Node> nodes;
  Node* node = nullptr;
  std::int64_t free = 0, low = 0;
  bool device_zone = false;
  std::istringstream lines(text);
  std::string line;
  while (std::getline(lines, line)) {
    if (line.starts_with("Node ")) {
      node = &nodes[static_cast<int>(parse_number(std::string_view(line).substr(5)).value_or(0))];
      device_zone = line.find("Device") != std::string::npos;
      free = low = 0;
      continue;
    }
    if (node == nullptr) continue;
    std::istringstream words(line);
    std::string name, second;
    words >> name >> second;
    if (name == "pages" && second == "free") {
      words >> free;
      continue;
    }
    const std::int64_t value = parse_number(second).value_or(0);
    if (name == "nr_inactive_file" || name == "nr_active_file") {
      node->file += value;
    } else if (name == "nr_slab_reclaimable") {
      node->slab += value;
    } else if (name == "low") {
      low = value;
    } else if (name == "protection:" && !device_zone) {
      // The last line of a zone's sizes: what it must keep from allocations that would rather have a higher zone.
      std::int64_t reserve = 0;
      for (std::size_t at = line.find('('); at != std::string::npos && at + 1 < line.size(); at = line.find(',', at + 1)) {
        reserve = std::max(reserve, parse_number(std::string_view(line).substr(at + 1)).value_or(0));
      }
      node->usable += std::max<std::int64_t>(0, free - low - reserve);
      node->low += low;
    }
  }
  std::map<int, std::int64_t> available;
  for (const auto& [id, sums] : nodes) {
    const std::int64_t file = sums.file - std::min(sums.file / 2, sums.low);
    const std::int64_t slab = sums.slab - std::min(sums.slab / 2, sums.low);
    available[id] = std::max<std::int64_t>(0, sums.usable + file + slab) * page_bytes;
  }
  return available;
}

std::map<int, std::int64_t> available_by_node() {
  const auto text = read_file("/proc/zoneinfo");
  auto available = text && !text->empty() ? parse_zoneinfo(*text, static_cast<std::int64_t>(page_bytes())) : available_from_sysfs();
  // Kernels that initialise memory on demand (some micro virtual machines) count it in meminfo before it is in a zone. With
  // one node the system's memory is the node's.
  if (available.size() == 1) {
    auto& only = available.begin()->second;
    only = std::max(only, meminfo_available().value_or(0));
  }
  if (planted()) {
    for (auto& [node, bytes] : available) bytes = planted_bytes.load();
  }
  return available;
}

std::optional<std::int64_t> available_total() { return planted() ? planted_bytes.load() : meminfo_available(); }

bool availability_planted() { return planted_bytes.load() >= 0; }

void plant_available(std::int64_t bytes, int after) {
  planted_after.store(after);
  planted_bytes.store(bytes);
}

std::optional<CgroupLimit> tightest_cgroup_limit(const std::string& root) {
  const std::string base = root.ends_with('/') ? root.substr(0, root.size() - 1) : root;
  const auto groups = read_file(base + "/proc/self/cgroup");
  if (!groups) return std::nullopt;
  std::optional<CgroupLimit> tightest;
  std::istringstream lines(*groups);
  std::string line;
  while (std::getline(lines, line)) {  // "4:memory:/path" (v1) or "0::/path" (v2)
    const std::size_t first = line.find(':');
    const std::size_t second = line.find(':', first == std::string::npos ? first : first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
    const bool v2 = controllers == ",,";
    if (!v2 && controllers.find(",memory,") == std::string::npos) continue;
    const std::string top = base + (v2 ? "/sys/fs/cgroup" : "/sys/fs/cgroup/memory");
    // Inside a container the path may be the host's while the mount shows only the container's own folder: then every
    // folder of the path is missing but the mount's top, which is read last.
    std::string path = line.substr(second + 1);
    while (true) {
      while (path.ends_with('/')) path.pop_back();
      const auto limit = limit_of(top + path, v2);
      if (limit && (!tightest || limit->left < tightest->left)) tightest = limit;
      if (path.empty()) break;
      const std::size_t slash = path.rfind('/');
      path.resize(slash == std::string::npos ? 0 : slash);
    }
  }
  return tightest;
}

std::optional<std::int64_t> free_huge_pages(int node, std::size_t size) {
  const std::string folder = huge_page_folder(node, size);
  const auto free = number_in(folder + "free_hugepages");
  if (!free) return std::nullopt;
  const auto reserved = number_in(folder + "resv_hugepages");  // only the system-wide folder has it
  return std::max<std::int64_t>(0, *free - reserved.value_or(0));
}

std::optional<std::int64_t> total_huge_pages(int node, std::size_t size) { return number_in(huge_pages_file(node, size)); }

std::string huge_pages_file(int node, std::size_t size) { return huge_page_folder(node, size) + "nr_hugepages"; }

std::string transparent_huge_pages_mode() {
  const auto text = read_file("/sys/kernel/mm/transparent_hugepage/enabled");
  if (!text) return "";
  const std::size_t open = text->find('[');
  const std::size_t close = text->find(']');
  return open == std::string::npos || close == std::string::npos ? "" : text->substr(open + 1, close - open - 1);
}

}  // namespace numagraft::sys

#include "memory/residency.h"

#include <algorithm>

namespace numagraft {

void Residency::store(std::span<const std::int16_t> nodes, std::size_t page_bytes) {
  auto map = std::make_unique<Map>();
  map->page_bytes = page_bytes;
  const bool same = !nodes.empty() && nodes[0] >= 0 && std::all_of(nodes.begin(), nodes.end(), [&](auto node) { return node == nodes[0]; });
  if (same) {
    map->homogeneous = nodes[0];
  } else {
    map->nodes.assign(nodes.begin(), nodes.end());
    for (const std::int16_t node : nodes) {
      if (node >= 0 && std::find(map->ids.begin(), map->ids.end(), node) == map->ids.end()) map->ids.push_back(node);
    }
    for (const std::int16_t id : map->ids) {
      auto& before = map->pages_before.emplace_back();
      before.reserve(nodes.size() + 1);
      std::uint32_t count = 0;
      for (const std::int16_t node : nodes) {
        before.push_back(count);
        count += node == id;
      }
      before.push_back(count);
    }
  }
  publish(std::move(map));
}

void Residency::store_homogeneous(int node) {
  auto map = std::make_unique<Map>();
  map->homogeneous = node;
  publish(std::move(map));
}

void Residency::clear() { map_.store(nullptr, std::memory_order_release); }

void Residency::publish(std::unique_ptr<const Map> map) {
  const std::lock_guard lock(mutex_);
  for (const auto& known : maps_) {
    if (known->homogeneous == map->homogeneous && known->page_bytes == map->page_bytes && known->nodes == map->nodes) {
      map_.store(known.get(), std::memory_order_release);
      return;
    }
  }
  map_.store(map.get(), std::memory_order_release);
  maps_.push_back(std::move(map));
}

int Residency::homogeneous_node() const {
  const Map* map = map_.load(std::memory_order_acquire);
  return map == nullptr ? kUnknown : map->homogeneous;
}

int Residency::node_at(std::size_t offset) const {
  const Map* map = map_.load(std::memory_order_acquire);
  if (map == nullptr) return kUnknown;
  if (map->homogeneous >= 0) return map->homogeneous;
  const std::size_t page = offset / map->page_bytes;
  return page < map->nodes.size() ? map->nodes[page] : kUnknown;
}

std::size_t Residency::bytes_on(const Map& map, std::size_t index, std::size_t begin, std::size_t end) {
  const auto& before = map.pages_before[index];
  const std::size_t last_page = map.nodes.size();
  const auto up_to = [&](std::size_t offset) {
    const std::size_t page = std::min(offset / map.page_bytes, last_page);
    std::size_t bytes = before[page] * map.page_bytes;
    if (page < last_page && map.nodes[page] == map.ids[index]) bytes += offset - page * map.page_bytes;
    return bytes;
  };
  return up_to(end) - up_to(begin);
}

std::size_t Residency::remote_bytes(std::size_t begin, std::size_t end, int node) const {
  const Map* map = map_.load(std::memory_order_acquire);
  if (map == nullptr || end <= begin) return 0;
  if (map->homogeneous >= 0) return map->homogeneous == node ? 0 : end - begin;
  std::size_t remote = 0;
  for (std::size_t i = 0; i < map->ids.size(); ++i) {
    if (map->ids[i] != node) remote += bytes_on(*map, i, begin, end);
  }
  return remote;
}

}  // namespace numagraft

#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

namespace numagraft {

// Which kernel node holds each page of a buffer, as last verified; asked on every operator call to count remote bytes, so
// reading it is lock-free and takes constant time. Empty until verified.
class Residency {
 public:
  static constexpr int kUnknown = -1;

  // From the nodes of consecutive pages of `page_bytes` (-1: absent).
  void store(std::span<const std::int16_t> nodes, std::size_t page_bytes);
  void store_homogeneous(int node);
  void clear();

  bool verified() const { return map_.load(std::memory_order_acquire) != nullptr; }
  int homogeneous_node() const;              // the node that holds every page; kUnknown when mixed or unverified
  int node_at(std::size_t offset) const;     // kUnknown when unverified or absent
  // Bytes of [begin, end) on verified pages of nodes other than `node`; page granular at neither end.
  std::size_t remote_bytes(std::size_t begin, std::size_t end, int node) const;

 private:
  struct Map {
    int homogeneous = kUnknown;
    std::size_t page_bytes = 4096;
    std::vector<std::int16_t> nodes;                     // by page; empty when homogeneous
    std::vector<std::int16_t> ids;                       // distinct nodes
    std::vector<std::vector<std::uint32_t>> pages_before;  // [id][page]: pages of that node before this one
  };
  void publish(std::unique_ptr<const Map> map);
  static std::size_t bytes_on(const Map& map, std::size_t index, std::size_t begin, std::size_t end);

  std::atomic<const Map*> map_{nullptr};
  std::mutex mutex_;
  // A reader may still look at an old map: verification is rare, so they are kept. An equal map is not stored again.
  std::vector<std::unique_ptr<const Map>> maps_;
};

}  // namespace numagraft

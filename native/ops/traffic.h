#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "memory/buffer.h"
#include "memory/residency.h"
#include "system/syscalls.h"

namespace numagraft {

// What the workers of one node did. A chunk is what a worker takes from a queue in prefill (chunk_queue.h).
struct NodeStats {
  std::int64_t calls = 0;            // that the node took part in
  std::int64_t bytes_read = 0;       // of packed weights
  std::int64_t remote_bytes = 0;     // of those, on verified pages of another kernel node than the reading worker's
  std::int64_t chunks = 0;
  std::int64_t stolen_chunks = 0;    // of those, from the share of another node
  std::int64_t off_node_chunks = 0;  // of those, begun while the kernel said that the worker ran on another node
};

struct OperatorStats {
  std::int64_t calls = 0;
  double seconds = 0;
  std::int64_t bytes_read = 0;
  std::int64_t remote_bytes = 0;
  std::vector<NodeStats> nodes;  // by index in Runtime::nodes()
};

// Counts of one operator over all its calls; every node counts on lines of its own.
class Traffic {
 public:
  explicit Traffic(std::size_t nodes) : nodes_(nodes) {}

  OperatorStats stats() const {
    OperatorStats stats{calls_.load(), static_cast<double>(nanoseconds_.load()) * 1e-9, 0, 0, {}};
    for (const Slot& slot : nodes_) {
      stats.nodes.push_back({slot.calls.load(), slot.bytes.load(), slot.remote.load(), slot.chunks.load(), slot.stolen.load(), slot.off_node.load()});
      stats.bytes_read += stats.nodes.back().bytes_read;
      stats.remote_bytes += stats.nodes.back().remote_bytes;
    }
    return stats;
  }
  void add_call(std::chrono::steady_clock::duration spent) {
    calls_ += 1;
    nanoseconds_ += std::chrono::duration_cast<std::chrono::nanoseconds>(spent).count();
  }
  void add(int node, const NodeStats& more) {
    Slot& slot = nodes_[static_cast<std::size_t>(node)];
    const auto count = [](std::atomic<std::int64_t>& total, std::int64_t amount) {
      if (amount != 0) total.fetch_add(amount, std::memory_order_relaxed);
    };
    count(slot.calls, more.calls);
    count(slot.bytes, more.bytes_read);
    count(slot.remote, more.remote_bytes);
    count(slot.chunks, more.chunks);
    count(slot.stolen, more.stolen_chunks);
    count(slot.off_node, more.off_node_chunks);
  }

 private:
  struct alignas(64) Slot {
    std::atomic<std::int64_t> calls{0}, bytes{0}, remote{0}, chunks{0}, stolen{0}, off_node{0};
  };
  std::atomic<std::int64_t> calls_{0};
  std::atomic<std::int64_t> nanoseconds_{0};
  std::vector<Slot> nodes_;
};

// What one worker did during one call; handed to the operator's traffic at its end.
class Reader {
 public:
  // `os_node`: the kernel node that the worker's CPUs belong to; negative in a virtual runtime.
  Reader(Traffic& traffic, int node, int os_node, bool first_of_node)
      : traffic_(traffic), node_(node), os_node_(os_node), at_(sys::current_node()) {
    found_.calls = first_of_node ? 1 : 0;
  }
  ~Reader() { traffic_.add(node_, found_); }
  Reader(const Reader&) = delete;
  Reader& operator=(const Reader&) = delete;

  void read(const Buffer& buffer, std::size_t begin, std::size_t end) {
    found_.bytes_read += static_cast<std::int64_t>(end - begin);
    if (buffer.residency) found_.remote_bytes += static_cast<std::int64_t>(buffer.residency->remote_bytes(begin, end, at_));
  }
  // Asks the kernel again where this worker runs.
  void begin_chunk(bool stolen) {
    at_ = sys::current_node();
    found_.chunks += 1;
    found_.stolen_chunks += stolen ? 1 : 0;
    found_.off_node_chunks += os_node_ >= 0 && at_ != os_node_ ? 1 : 0;
  }

 private:
  Traffic& traffic_;
  int node_;
  int os_node_;
  int at_;
  NodeStats found_;
};

}  // namespace numagraft

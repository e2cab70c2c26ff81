#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

#include "memory/buffer.h"
#include "memory/residency.h"
#include "system/syscalls.h"

namespace numagraft {

struct OperatorStats {
  std::int64_t calls = 0;
  double seconds = 0;
  std::int64_t bytes_read = 0;    // of packed weights
  std::int64_t remote_bytes = 0;  // of those, on verified pages of another kernel node than the reading worker's
};

// Counts of one operator over all its calls.
class Traffic {
 public:
  OperatorStats stats() const {
    return {calls_.load(), static_cast<double>(nanoseconds_.load()) * 1e-9, bytes_.load(), remote_.load()};
  }
  void add_call(std::chrono::steady_clock::duration spent) {
    calls_ += 1;
    nanoseconds_ += std::chrono::duration_cast<std::chrono::nanoseconds>(spent).count();
  }
  void add(std::int64_t bytes, std::int64_t remote) {
    bytes_ += bytes;
    if (remote > 0) remote_ += remote;
  }

 private:
  std::atomic<std::int64_t> calls_{0};
  std::atomic<std::int64_t> nanoseconds_{0};
  std::atomic<std::int64_t> bytes_{0};
  std::atomic<std::int64_t> remote_{0};
};

// What one worker read during one call; handed to the operator's traffic at its end.
class Reader {
 public:
  explicit Reader(Traffic& traffic) : traffic_(traffic), node_(sys::current_node()) {}
  ~Reader() { traffic_.add(bytes_, remote_); }
  Reader(const Reader&) = delete;
  Reader& operator=(const Reader&) = delete;
  void read(const Buffer& buffer, std::size_t begin, std::size_t end) {
    bytes_ += static_cast<std::int64_t>(end - begin);
    if (buffer.residency) remote_ += static_cast<std::int64_t>(buffer.residency->remote_bytes(begin, end, node_));
  }

 private:
  Traffic& traffic_;
  int node_;
  std::int64_t bytes_ = 0;
  std::int64_t remote_ = 0;
};

}  // namespace numagraft

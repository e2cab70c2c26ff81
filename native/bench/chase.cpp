#include "bench/chase.h"

#include <array>
#include <chrono>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace numagraft {
namespace {

constexpr std::size_t kLine = 64;

struct Link {
  const Link* next;
};

void check_node(const Runtime& runtime, int node) {
  if (node < 0 || node >= static_cast<int>(runtime.nodes().size()) || runtime.nodes()[static_cast<std::size_t>(node)].threads == 0)
    throw std::invalid_argument("node " + std::to_string(node) + " of the runtime is not there or has no threads");
}

// Sattolo's shuffle: a permutation that is one cycle, so that a chase visits every line before it comes back.
std::vector<std::uint32_t> random_cycle(std::size_t count) {
  std::vector<std::uint32_t> next(count);
  std::iota(next.begin(), next.end(), 0U);
  std::uint64_t state = 0x9E3779B97F4A7C15U;
  for (std::size_t i = count - 1; i > 0; --i) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    std::swap(next[i], next[state % i]);
  }
  return next;
}

}  // namespace

void make_chase(Runtime& runtime, int node, std::byte* data, std::size_t bytes) {
  check_node(runtime, node);
  const std::size_t count = bytes / kLine;
  if (reinterpret_cast<std::uintptr_t>(data) % kLine != 0 || count < 2 || count > UINT32_MAX)
    throw std::invalid_argument("a chase needs memory on a cache line, of at least two lines and less than 256 GiB");
  const std::array nodes{node};
  runtime.run(nodes, [&](const Worker& worker, Barriers&) {
    if (worker.rank != 0) return;
    const std::vector<std::uint32_t> next = random_cycle(count);
    for (std::size_t i = 0; i < count; ++i) {
      auto* link = reinterpret_cast<Link*>(data + i * kLine);
      link->next = reinterpret_cast<const Link*>(data + next[i] * kLine);
    }
  });
}

double run_chase(Runtime& runtime, int node, const std::byte* data, std::int64_t steps) {
  using Clock = std::chrono::steady_clock;
  check_node(runtime, node);
  if (steps < 1) throw std::invalid_argument("a chase takes at least one step");
  std::chrono::duration<double> took{};
  const std::array nodes{node};
  runtime.run(nodes, [&](const Worker& worker, Barriers&) {
    if (worker.rank != 0) return;
    const auto* at = reinterpret_cast<const Link*>(data);
    const Clock::time_point begin = Clock::now();
    for (std::int64_t i = 0; i < steps; ++i) at = at->next;
    // Without a use of the last link the loop could go.
    asm volatile("" : : "r"(at) : "memory");
    took = Clock::now() - begin;
  });
  return took.count();
}

}  // namespace numagraft

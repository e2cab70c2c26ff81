#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

// The kernel's calls that placement rests on, by syscall(2): no libnuma, so NUMA support cannot be compiled out. Every
// function returns 0 or a positive errno and throws nothing.
namespace numagraft::sys {

// linux/mempolicy.h, which a build machine may lack
inline constexpr int kPolicyDefault = 0;
inline constexpr int kPolicyPreferred = 1;
inline constexpr int kPolicyBind = 2;
inline constexpr int kPolicyInterleave = 3;
inline constexpr int kPolicyLocal = 4;

// A set of kernel node ids.
class NodeMask {
 public:
  static constexpr int kMaxNodes = 1024;  // CONFIG_NODES_SHIFT is at most 10
  NodeMask() = default;
  explicit NodeMask(std::span<const int> nodes);
  void add(int node);
  bool contains(int node) const;
  std::vector<int> nodes() const;
  unsigned long* words() { return words_.data(); }
  const unsigned long* words() const { return words_.data(); }

 private:
  std::array<unsigned long, kMaxNodes / (8 * sizeof(unsigned long))> words_{};
};

// A set of CPU ids, wide enough for every kernel.
class CpuMask {
 public:
  static constexpr int kMaxCpus = 8192;
  CpuMask() = default;
  explicit CpuMask(std::span<const int> cpus);
  static CpuMask every();
  void add(int cpu);
  std::vector<int> cpus() const;
  int count() const;
  CpuMask& operator|=(const CpuMask& other);
  bool contains(const CpuMask& other) const;
  bool operator==(const CpuMask&) const = default;
  unsigned long* words() { return words_.data(); }
  const unsigned long* words() const { return words_.data(); }

 private:
  std::array<unsigned long, kMaxCpus / (8 * sizeof(unsigned long))> words_{};
};

[[nodiscard]] int mbind(void* address, std::size_t bytes, int mode, const NodeMask& nodes, unsigned flags = 0);
[[nodiscard]] int set_mempolicy(int mode, const NodeMask& nodes);  // of the calling thread
[[nodiscard]] int get_mempolicy(int& mode, NodeMask& nodes);       // of the calling thread
[[nodiscard]] int get_mems_allowed(NodeMask& nodes);
// Asks only: status[i] becomes the kernel node of the page at pages[i], or a negative errno (-EFAULT, -ENOENT: not there).
[[nodiscard]] int query_pages(std::span<void* const> pages, std::span<int> status);
[[nodiscard]] int set_affinity(const CpuMask& cpus);  // of the calling thread
[[nodiscard]] int get_affinity(CpuMask& cpus);
[[nodiscard]] int map_anonymous(std::size_t bytes, int protection, int extra_flags, std::byte*& address);
[[nodiscard]] int advise(void* address, std::size_t bytes, int advice);
[[nodiscard]] int protect(void* address, std::size_t bytes, int protection);
// `got` bytes of the open file at `offset` came; 0 at its end.
[[nodiscard]] int read_at(int descriptor, void* to, std::size_t bytes, std::int64_t offset, std::int64_t& got);
void unlock(void* address, std::size_t bytes) noexcept;  // munlock
void unmap(void* address, std::size_t bytes) noexcept;

int current_node() noexcept;  // the kernel node of the CPU this thread runs on
int current_cpu() noexcept;
std::size_t page_bytes() noexcept;

// The test seam: the named call ("mbind", "set_mempolicy", "get_mempolicy", "move_pages", "sched_setaffinity", "mmap",
// "madvise", "pread", or "numa_maps": reading that file) fails with `error` once `after` more of them got through; 0 ends it. Throws
// std::invalid_argument for another name.
int planted_fault(std::string_view call);  // counts as one use of it
void set_fault(std::string_view call, int error, int after = 0);

}  // namespace numagraft::sys

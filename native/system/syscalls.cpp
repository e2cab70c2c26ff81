#include "system/syscalls.h"

#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <bit>
#include <cerrno>
#include <stdexcept>
#include <string>

namespace numagraft::sys {
namespace {

constexpr int kWordBits = 8 * sizeof(unsigned long);
constexpr unsigned kFlagMemsAllowed = 1u << 2;  // MPOL_F_MEMS_ALLOWED

enum Call : int { kMbind, kSetMempolicy, kGetMempolicy, kMovePages, kSetAffinity, kMmap, kMadvise, kPread, kNumaMaps, kCalls };
constexpr const char* kCallNames[kCalls] = {"mbind", "set_mempolicy", "get_mempolicy", "move_pages", "sched_setaffinity",
                                              "mmap", "madvise", "pread", "numa_maps"};

struct Fault {
  std::atomic<int> error{0};
  std::atomic<int> after{0};
};
Fault faults[kCalls];

// The planted errno of this call, or 0.
int fault(Call call) {
  Fault& planted = faults[call];
  const int error = planted.error.load(std::memory_order_relaxed);
  if (error == 0 || planted.after.fetch_sub(1, std::memory_order_relaxed) > 0) return 0;
  planted.after.store(0, std::memory_order_relaxed);
  return error;
}

int result(long code) { return code < 0 ? errno : 0; }

}  // namespace

NodeMask::NodeMask(std::span<const int> nodes) {
  for (int node : nodes) add(node);
}

void NodeMask::add(int node) {
  if (node < 0 || node >= kMaxNodes) throw std::invalid_argument("node " + std::to_string(node) + " is outside 0-1023");
  words_[node / kWordBits] |= 1ul << (node % kWordBits);
}

bool NodeMask::contains(int node) const {
  return node >= 0 && node < kMaxNodes && (words_[node / kWordBits] >> (node % kWordBits) & 1);
}

std::vector<int> NodeMask::nodes() const {
  std::vector<int> found;
  for (int node = 0; node < kMaxNodes; ++node) {
    if (contains(node)) found.push_back(node);
  }
  return found;
}

CpuMask::CpuMask(std::span<const int> cpus) {
  for (int cpu : cpus) add(cpu);
}

CpuMask CpuMask::every() {
  CpuMask mask;
  mask.words_.fill(~0ul);
  return mask;
}

void CpuMask::add(int cpu) {
  if (cpu < 0 || cpu >= kMaxCpus) throw std::invalid_argument("CPU " + std::to_string(cpu) + " is outside 0-8191");
  words_[cpu / kWordBits] |= 1ul << (cpu % kWordBits);
}

std::vector<int> CpuMask::cpus() const {
  std::vector<int> found;
  for (int cpu = 0; cpu < kMaxCpus; ++cpu) {
    if (words_[cpu / kWordBits] >> (cpu % kWordBits) & 1) found.push_back(cpu);
  }
  return found;
}

CpuMask& CpuMask::operator|=(const CpuMask& other) {
  for (std::size_t i = 0; i < words_.size(); ++i) words_[i] |= other.words_[i];
  return *this;
}

bool CpuMask::contains(const CpuMask& other) const {
  for (std::size_t i = 0; i < words_.size(); ++i) {
    if ((other.words_[i] & ~words_[i]) != 0) return false;
  }
  return true;
}

int CpuMask::count() const {
  int total = 0;
  for (unsigned long word : words_) total += std::popcount(word);
  return total;
}

// The kernel reads one bit less than `maxnode` says, hence the + 1 everywhere.
int mbind(void* address, std::size_t bytes, int mode, const NodeMask& nodes, unsigned flags) {
  if (int error = fault(kMbind)) return error;
  return result(::syscall(SYS_mbind, address, bytes, mode, nodes.words(), NodeMask::kMaxNodes + 1, flags));
}

int set_mempolicy(int mode, const NodeMask& nodes) {
  if (int error = fault(kSetMempolicy)) return error;
  const bool wants_nodes = mode != kPolicyDefault && mode != kPolicyLocal;
  return result(::syscall(SYS_set_mempolicy, mode, wants_nodes ? nodes.words() : nullptr, wants_nodes ? NodeMask::kMaxNodes + 1 : 0));
}

int get_mempolicy(int& mode, NodeMask& nodes) {
  if (int error = fault(kGetMempolicy)) return error;
  return result(::syscall(SYS_get_mempolicy, &mode, nodes.words(), NodeMask::kMaxNodes + 1, nullptr, 0));
}

int get_mems_allowed(NodeMask& nodes) {
  if (int error = fault(kGetMempolicy)) return error;
  return result(::syscall(SYS_get_mempolicy, nullptr, nodes.words(), NodeMask::kMaxNodes + 1, nullptr, kFlagMemsAllowed));
}

int query_pages(std::span<void* const> pages, std::span<int> status) {
  if (int error = fault(kMovePages)) return error;
  return result(::syscall(SYS_move_pages, 0, pages.size(), pages.data(), nullptr, status.data(), 0));
}

int set_affinity(const CpuMask& cpus) {
  if (int error = fault(kSetAffinity)) return error;
  return result(::syscall(SYS_sched_setaffinity, 0, CpuMask::kMaxCpus / 8, cpus.words()));
}

int get_affinity(CpuMask& cpus) {
  return result(::syscall(SYS_sched_getaffinity, 0, CpuMask::kMaxCpus / 8, cpus.words()));
}

int map_anonymous(std::size_t bytes, int protection, int extra_flags, std::byte*& address) {
  if (int error = fault(kMmap)) return error;
  void* mapped = ::mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | extra_flags, -1, 0);
  if (mapped == MAP_FAILED) return errno;
  address = static_cast<std::byte*>(mapped);
  return 0;
}

int advise(void* address, std::size_t bytes, int advice) {
  if (int error = fault(kMadvise)) return error;
  return result(::madvise(address, bytes, advice));
}

int protect(void* address, std::size_t bytes, int protection) { return result(::mprotect(address, bytes, protection)); }

int read_at(int descriptor, void* to, std::size_t bytes, std::int64_t offset, std::int64_t& got) {
  if (int error = fault(kPread)) return error;
  const ssize_t count = ::pread(descriptor, to, bytes, offset);
  if (count < 0) return errno;
  got = count;
  return 0;
}

void unlock(void* address, std::size_t bytes) noexcept { ::munlock(address, bytes); }

void unmap(void* address, std::size_t bytes) noexcept { ::munmap(address, bytes); }

int current_node() noexcept {
  unsigned cpu = 0;
  unsigned node = 0;
  return ::getcpu(&cpu, &node) == 0 ? static_cast<int>(node) : -1;
}

int current_cpu() noexcept { return ::sched_getcpu(); }

std::size_t page_bytes() noexcept {
  static const std::size_t bytes = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  return bytes;
}

int planted_fault(std::string_view call) {
  for (int i = 0; i < kCalls; ++i) {
    if (call == kCallNames[i]) return fault(static_cast<Call>(i));
  }
  return 0;
}

void set_fault(std::string_view call, int error, int after) {
  for (int i = 0; i < kCalls; ++i) {
    if (call == kCallNames[i]) {
      faults[i].error.store(0);
      faults[i].after.store(after);
      faults[i].error.store(error);
      return;
    }
  }
  std::string known;
  for (const char* name : kCallNames) known += (known.empty() ? "" : ", ") + std::string(name);
  throw std::invalid_argument("no system call named '" + std::string(call) + "' here; known: " + known);
}

}  // namespace numagraft::sys

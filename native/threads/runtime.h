#pragma once

#include <atomic>
#include <cstddef>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "memory/buffer.h"
#include "memory/memory.h"
#include "system/page_query.h"
#include "threads/affinity_scope.h"
#include "threads/function_ref.h"
#include "threads/wait_word.h"

namespace numagraft {

// One node of a runtime: memory of one kernel node and threads on a set of its CPUs.
struct NodeSpec {
  int os_node = -1;       // the kernel's node id; -1 in a virtual runtime: memory is not bound
  std::vector<int> cpus;  // CPUs to pin to, physical cores first; empty: threads are not pinned
  int threads = 0;        // 0: a memory-only node
};

enum class Pages { normal, transparent, huge_2m, huge_1g, automatic };

struct RuntimeOptions {
  bool bind = true;  // false: a virtual runtime, for tests and for planning; nothing is bound or pinned
  Pages pages = Pages::automatic;
  // How long a thread that waits for the next call, a barrier or the join polls before it sleeps. Long enough to bridge what
  // lies between two operators of a decode step, short enough that idle pools cost nothing.
  int spin_microseconds = 200;
};

// A worker's place in one fork-join.
struct Worker {
  int node;             // index into Runtime::nodes()
  int node_rank;        // rank of that node among the nodes of this call
  int node_count;       // nodes of this call
  int rank_in_node;     // 0 .. workers_in_node-1
  int workers_in_node;
  int rank;             // 0 .. workers-1 over the whole call, ordered by node rank, then rank in node
  int workers;
};

// Lets the workers of one fork-join wait for each other.
class Barriers {
 public:
  virtual ~Barriers() = default;
  virtual void all(const Worker&) = 0;   // every worker of the call
  virtual void node(const Worker&) = 0;  // every worker of this worker's node
  virtual SpinTime spin() const = 0;     // how long whoever waits polls before it sleeps
};

// Nodes, their memory and their pinned threads; no singleton, every packed weight holds a shared_ptr to its runtime.
// Pools belong to a process-wide registry keyed by process id and CPU set (DESIGN section 8).
class Runtime {
 public:
  // Throws ConfigurationFailure (nodes that make no sense, CPUs that another live runtime uses differently) and
  // PlacementFailure (pages that this kernel does not have). Threads are made by the first call.
  Runtime(std::vector<NodeSpec> nodes, RuntimeOptions options);
  ~Runtime();
  Runtime(const Runtime&) = delete;
  Runtime& operator=(const Runtime&) = delete;

  std::span<const NodeSpec> nodes() const;
  const RuntimeOptions& options() const;
  int threads_on(std::span<const int> nodes) const;

  // Runs `work` once on every worker of the given nodes and returns when all are done; the caller takes a slot. Calls on
  // overlapping nodes queue, calls on disjoint nodes run side by side. The first exception thrown by a worker is
  // rethrown here (the others' barriers are released). Must be called without the GIL. `pinning`: of the caller; `watched` is
  // for work that only reads and computes, which a move makes slower and not wrong.
  void run(std::span<const int> nodes, FunctionRef<void(const Worker&, Barriers&)> work, Pinning pinning = Pinning::always);

  // For work that any of several groups of nodes can do by itself, such as a call on a mirrored weight: one group at least,
  // every one where no other caller is there (group_lease.h says who gets which), held until the lease goes. A caller that
  // is confined to the CPUs of one group gets that one. Not from inside `run`; no call but on the lease meanwhile.
  class Lease;
  Lease lease(std::span<const std::vector<int>> groups);
  void run(const Lease& lease, FunctionRef<void(const Worker&, Barriers&)> work, Pinning pinning = Pinning::always);

  // Zeroed pages as asked, touched by threads of their nodes; throws PlacementFailure before anything is changed (it looks
  // at free memory first: MPOL_BIND on a full node ends in the OOM killer), or with everything given back. `owner` names the
  // module in messages and reports. Not from inside `run`.
  Buffer allocate(std::size_t bytes, const MemoryTarget& target, const std::string& owner);
  void release(const Buffer& buffer);

  // Asks the kernel where every page of these buffers is, and keeps the answers in their residency, from which operators
  // count remote bytes. Addresses are those of buffers (std::invalid_argument otherwise). `known`: as in query_ranges.
  sys::PageQuery verify(std::span<const sys::PageRange> buffers, const std::vector<sys::Mapping>* known = nullptr);

  std::vector<Memory::ArenaReport> memory_report() const;

  // Scratch memory of one worker, local to its node, kept between calls and grown as needed (64-byte aligned, contents
  // undefined). Call only from inside `run`, by that worker.
  std::byte* scratch(const Worker& worker, std::size_t bytes);
  // Scratch shared by all workers of a call; call before `run`; lies on `node`. Yours until the lease goes, which must not
  // outlive the runtime.
  class SharedScratch;
  std::shared_ptr<SharedScratch> shared_scratch(std::size_t bytes, int node, const Lease* lease = nullptr);

  // Test seams. Without stealing every node computes its own share only; a delay makes a node late at every chunk and every
  // piece that few tokens leave to whoever is free.
  void set_stealing(bool on) noexcept { stealing_.store(on, std::memory_order_relaxed); }
  bool stealing() const noexcept { return stealing_.load(std::memory_order_relaxed); }
  void set_chunk_delay(int node, int microseconds);
  void delay_chunk(int node) const noexcept;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
  std::atomic<bool> stealing_{true};
};

class Runtime::Lease {
 public:
  ~Lease();
  Lease(Lease&&) noexcept;
  const std::vector<int>& groups() const;                // indices into the groups asked for, sorted
  const std::vector<int>& nodes() const { return nodes_; }  // of all of them, sorted

 private:
  friend class Runtime;
  Lease();
  struct Held;
  std::unique_ptr<Held> held_;
  std::vector<int> nodes_;
};

class Runtime::SharedScratch {
 public:
  std::byte* data = nullptr;
  std::size_t bytes = 0;
  virtual ~SharedScratch() = default;  // gives the block back to the runtime's free list
};

}  // namespace numagraft

#include "threads/runtime.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <mutex>
#include <optional>
#include <stdexcept>

#include "system/error.h"
#include "system/free_memory.h"
#include "system/process.h"
#include "system/syscalls.h"
#include "threads/call.h"
#include "threads/group_lease.h"
#include "threads/node_pool.h"
#include "threads/pool_registry.h"

namespace numagraft {
namespace {

constexpr std::size_t kMiB = std::size_t{1} << 20;
constexpr std::size_t kTouchChunk = 16 * kMiB;  // what one worker touches before it takes the next piece
constexpr std::size_t kPiecesPerLook = 8;       // between looks at what the node has left

std::size_t round_up(std::size_t value, std::size_t multiple) { return (value + multiple - 1) / multiple * multiple; }

PageKind resolve_pages(Pages pages) {
  const std::string mode = sys::transparent_huge_pages_mode();
  switch (pages) {
    case Pages::normal: return PageKind::normal;
    case Pages::huge_2m: return PageKind::huge_2m;
    case Pages::huge_1g: return PageKind::huge_1g;
    case Pages::automatic: return mode == "always" || mode == "madvise" ? PageKind::transparent : PageKind::normal;
    case Pages::transparent: break;
  }
  if (mode == "never") {
    throw PlacementFailure("`pages: thp` is asked for, but the kernel gives no transparent huge pages (enabled = never)",
                           "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled    (as root), or use `pages: auto`");
  }
  if (mode.empty()) throw PlacementFailure("`pages: thp` is asked for, but this kernel has no transparent huge pages", "use `pages: auto` or `pages: 4k`");
  return PageKind::transparent;
}

std::vector<int> os_nodes_of(const std::vector<NodeSpec>& nodes) {
  std::vector<int> found;
  for (const NodeSpec& node : nodes) found.push_back(node.os_node);
  return found;
}

void check(const std::vector<NodeSpec>& nodes, const RuntimeOptions& options) {
  std::string problems;
  const auto complain = [&](std::size_t node, const std::string& what) { problems += "\n  node " + std::to_string(node) + " of the layout " + what; };
  std::vector<int> all_cpus;
  int threads = 0;
  for (std::size_t i = 0; i < nodes.size(); ++i) {
    const NodeSpec& node = nodes[i];
    threads += std::max(0, node.threads);
    if (node.threads < 0) complain(i, "has " + std::to_string(node.threads) + " threads");
    if (!options.bind) continue;
    if (node.os_node < 0 || node.os_node >= sys::NodeMask::kMaxNodes) complain(i, "has no kernel node, which a bound layout needs");
    if (node.threads > 0 && node.cpus.empty()) complain(i, "has threads but no CPUs to pin them to");
    for (int cpu : node.cpus) {
      if (cpu < 0 || cpu >= sys::CpuMask::kMaxCpus) complain(i, "names CPU " + std::to_string(cpu));
      if (node.threads > 0 && std::find(all_cpus.begin(), all_cpus.end(), cpu) != all_cpus.end()) complain(i, "names CPU " + std::to_string(cpu) + ", which is named before");
      if (node.threads > 0) all_cpus.push_back(cpu);
    }
  }
  if (nodes.empty()) problems += "\n  it has no node";
  if (!nodes.empty() && threads == 0) problems += "\n  no node has a thread";
  if (!problems.empty()) throw ConfigurationFailure("this runtime layout cannot be used:" + problems, "make it with RuntimeLayout.from_platform, or correct the nodes");
}

void check_outside_call() {
  if (inside_call()) throw std::logic_error("Runtime::run inside Runtime::run: the workers would wait for themselves");
}

struct alignas(64) WorkerScratch {
  std::byte* data = nullptr;
  std::size_t bytes = 0;
};

}  // namespace

struct Runtime::Impl {
  // The pools of one process; a forked child makes its own and lets the others be.
  struct Pools {
    std::uint32_t generation = 0;
    std::vector<std::shared_ptr<NodePool>> by_node;  // null for a node without threads
  };
  struct SharedBlock {
    Buffer buffer;
    int node = 0;
    bool leased = false;
  };

  Impl(std::vector<NodeSpec> nodes_, RuntimeOptions options_)
      : nodes((check(nodes_, options_), std::move(nodes_))),
        options(options_),
        memory(os_nodes_of(nodes), options.bind, resolve_pages(options.pages)),
        chunk_delays(nodes.size()) {
    scratch.resize(nodes.size());
    for (const NodeSpec& node : nodes) cpu_masks.emplace_back(node.cpus);
    int threads = 0;
    for (std::size_t i = 0; i < nodes.size(); ++i) {
      scratch[i].resize(static_cast<std::size_t>(nodes[i].threads));
      threads += nodes[i].threads;
    }
    sys::CpuMask usable;
    crowded = sys::get_affinity(usable) == 0 && usable.count() < threads && !options.bind;
    pools();
  }

  const NodeSpec& node(int index) const {
    if (index < 0 || index >= static_cast<int>(nodes.size())) throw std::invalid_argument("node " + std::to_string(index) + " is not one of the runtime's " + std::to_string(nodes.size()));
    return nodes[static_cast<std::size_t>(index)];
  }

  Pools& pools() {
    Pools* made = current.load(std::memory_order_acquire);
    if (made != nullptr && made->generation == process_generation()) return *made;
    return rebuild();
  }

  Pools& rebuild() {
    auto made = std::make_unique<Pools>();
    made->generation = process_generation();
    for (const NodeSpec& node : nodes) {
      made->by_node.push_back(node.threads == 0 ? nullptr : acquire_pool(options.bind ? node.cpus : std::vector<int>(), node.threads));
    }
    const std::lock_guard lock(fork_safe_mutex());
    Pools* known = current.load(std::memory_order_acquire);
    if (known != nullptr && known->generation == process_generation()) return *known;  // another thread was faster
    current.store(made.get(), std::memory_order_release);
    all_pools.push_back(std::move(made));
    return *all_pools.back();
  }

  NodePool& pool(Pools& mine, int index) {
    node(index);
    return *mine.by_node[static_cast<std::size_t>(index)];
  }

  void run(std::span<const int> on, FunctionRef<void(const Worker&, Barriers&)> work, Pinning pinning);
  // `on` are nodes with threads whose pools this thread holds.
  void run_held(std::span<const int> on, FunctionRef<void(const Worker&, Barriers&)> work, Pinning pinning);
  void touch(const Memory::Reserved& reserved, const Lease* lease);
  Buffer allocate(std::size_t bytes, const MemoryTarget& target, const std::string& owner, const Lease* lease);

  const std::vector<NodeSpec> nodes;
  const RuntimeOptions options;
  bool crowded = false;  // more threads than CPUs: waiting must not spin
  Memory memory;
  std::atomic<Pools*> current{nullptr};
  std::vector<std::unique_ptr<Pools>> all_pools;
  std::vector<std::vector<WorkerScratch>> scratch;       // [node][rank]: only its worker looks at it
  std::vector<std::unique_ptr<SharedBlock>> shared_blocks;  // guarded by fork_safe_mutex()
  std::vector<sys::CpuMask> cpu_masks;                   // by node
  std::vector<std::atomic<int>> chunk_delays;            // by node, microseconds
};

void Runtime::Impl::run(std::span<const int> on, FunctionRef<void(const Worker&, Barriers&)> work, Pinning pinning) {
  check_outside_call();
  Pools& mine = pools();
  thread_local std::vector<int> with_threads;
  thread_local std::vector<NodePool*> in_order;
  with_threads.clear();
  in_order.clear();
  for (int node : on) {
    this->node(node);
    NodePool* pool = mine.by_node[static_cast<std::size_t>(node)].get();
    if (pool == nullptr) continue;
    if (std::find(in_order.begin(), in_order.end(), pool) != in_order.end()) throw std::invalid_argument("node " + std::to_string(node) + " is named twice");
    in_order.push_back(pool);
    with_threads.push_back(node);
  }
  if (in_order.empty()) throw std::invalid_argument("none of the nodes asked for has a thread");

  // Everyone locks in the same order, so that calls that overlap queue instead of waiting for each other.
  std::sort(in_order.begin(), in_order.end(), [](const NodePool* a, const NodePool* b) { return a->order() < b->order(); });
  struct Unlock {
    std::size_t locked = 0;
    ~Unlock() {
      while (locked > 0) in_order[--locked]->calls().unlock();
    }
  } unlock;
  for (NodePool* pool : in_order) {
    pool->calls().lock();
    ++unlock.locked;
  }
  run_held(with_threads, work, pinning);
}

void Runtime::Impl::run_held(std::span<const int> on, FunctionRef<void(const Worker&, Barriers&)> work, Pinning pinning) {
  check_outside_call();
  Pools& mine = pools();
  thread_local std::vector<Call::Seat> seats;
  thread_local std::vector<NodePool*> seated;
  seats.clear();
  seated.clear();
  bool calm = !crowded;
  for (int node : on) {
    NodePool& held = pool(mine, node);
    seats.push_back({.node = node, .workers = held.threads(), .first_rank = 0, .sync = &held.sync()});
    seated.push_back(&held);
    calm = calm && !held.crowded();
  }

  for (std::size_t i = 0; i < seated.size(); ++i) seated[i]->ensure_threads(i != 0);  // while the caller is not pinned
  const SpinTime spin = calm ? SpinTime(std::chrono::microseconds(options.spin_microseconds)) : SpinTime(0);
  Call& call = seated.front()->call();
  call.begin(seats, work, spin);
  for (std::size_t i = 0; i < seated.size(); ++i) seated[i]->start(call, static_cast<int>(i), i != 0, spin);
  {
    const InsideCall inside;
    call.take_part(0, 0, seated.front()->cpu_of(0), pinning);
  }
  call.join();
}

void Runtime::Impl::touch(const Memory::Reserved& reserved, const Lease* lease) {
  const Buffer& buffer = reserved.buffer;
  const bool interleaved = buffer.target.mode == MemoryTarget::Mode::interleave;
  std::vector<int> touchers;
  for (int node : buffer.target.nodes) {
    if (nodes[static_cast<std::size_t>(node)].threads > 0) touchers.push_back(node);
  }
  const bool by_hand = reserved.obtained == Obtained::first_touch;
  if (by_hand && (touchers.empty() || (interleaved && touchers.size() < buffer.target.nodes.size()))) {
    throw PlacementFailure(buffer.owner + ": memory of a node without threads can only be placed by mbind or set_mempolicy, and both are refused here",
                           "allow these calls (docker run --cap-add SYS_NICE, or a seccomp profile that permits mbind), or leave memory-only nodes out");
  }
  if (touchers.empty()) {  // the policy, not the thread, decides where the pages go
    for (std::size_t i = 0; i < nodes.size(); ++i) {
      if (nodes[i].threads > 0) touchers.push_back(static_cast<int>(i));
    }
  }
  std::vector<int> os_nodes;
  for (int node : buffer.target.nodes) os_nodes.push_back(nodes[static_cast<std::size_t>(node)].os_node);

  const auto run_here = [&](FunctionRef<void(const Worker&, Barriers&)> work) { lease != nullptr ? run_held(touchers, work, Pinning::always) : run(touchers, work, Pinning::always); };
  std::byte* const begin = buffer.data;
  std::byte* const end = buffer.data + buffer.bytes;
  if (by_hand && interleaved) {
    // Page by page, going on where the arena's last buffer ended; its pages are small (see Arena).
    const std::size_t unit = is_explicit(reserved.pages) ? page_kind_bytes(reserved.pages) : sys::page_bytes();
    const std::size_t first_unit = reserved.offset / unit;
    const std::size_t units = (reserved.offset + buffer.bytes + unit - 1) / unit - first_unit;
    run_here([&](const Worker& worker, Barriers&) {
      const auto stride = static_cast<std::size_t>(worker.node_count);
      for (std::size_t i = 0; i < units; ++i) {
        if ((first_unit + i) % stride != static_cast<std::size_t>(worker.node_rank)) continue;
        if (static_cast<int>((first_unit + i) / stride % static_cast<std::size_t>(worker.workers_in_node)) != worker.rank_in_node) continue;
        *reinterpret_cast<volatile char*>(std::max(begin, begin - reserved.offset + (first_unit + i) * unit)) = 0;
      }
    });
    return;
  }
  // Pieces are several pages of the largest kind that is asked for.
  const std::size_t piece = std::max(kTouchChunk, page_kind_bytes(reserved.pages));
  std::atomic<std::size_t> next{0};
  const std::size_t pieces = (buffer.bytes + piece - 1) / piece;
  run_here([&](const Worker&, Barriers&) {
    std::optional<PolicyScope> policy;
    if (reserved.obtained == Obtained::set_mempolicy) policy.emplace(os_nodes, buffer.target.mode);
    for (std::size_t i = next.fetch_add(1); i < pieces; i = next.fetch_add(1)) {
      if (i > 0 && i % kPiecesPerLook == 0) reserved.claim->shrink(static_cast<double>(pieces - i) / static_cast<double>(pieces));
      touch_pages(begin + i * piece, std::min(end, begin + (i + 1) * piece), reserved.pages);
    }
  });
}

Runtime::Runtime(std::vector<NodeSpec> nodes, RuntimeOptions options) : impl_(std::make_unique<Impl>(std::move(nodes), options)) {}
Runtime::~Runtime() = default;

std::span<const NodeSpec> Runtime::nodes() const { return impl_->nodes; }
const RuntimeOptions& Runtime::options() const { return impl_->options; }

int Runtime::threads_on(std::span<const int> nodes) const {
  int threads = 0;
  for (int node : nodes) threads += impl_->node(node).threads;
  return threads;
}

void Runtime::run(std::span<const int> nodes, FunctionRef<void(const Worker&, Barriers&)> work, Pinning pinning) { impl_->run(nodes, work, pinning); }

Buffer Runtime::Impl::allocate(std::size_t bytes, const MemoryTarget& target, const std::string& owner, const Lease* lease) {
  Memory::Reserved reserved = memory.reserve(bytes, target, owner);
  try {
    touch(reserved, lease);
  } catch (...) {
    memory.release(reserved.buffer.data);
    throw;
  }
  return std::move(reserved.buffer);
}

Buffer Runtime::allocate(std::size_t bytes, const MemoryTarget& target, const std::string& owner) { return impl_->allocate(bytes, target, owner, nullptr); }

struct Runtime::Lease::Held {
  Held(std::vector<std::vector<NodePool*>> pools_, int near, bool confined) : pools(std::move(pools_)), lease(pools, near, confined) {}
  const std::vector<std::vector<NodePool*>> pools;
  GroupLease lease;
};

Runtime::Lease::Lease() = default;
Runtime::Lease::~Lease() = default;
Runtime::Lease::Lease(Lease&&) noexcept = default;
const std::vector<int>& Runtime::Lease::groups() const { return held_->lease.groups(); }

Runtime::Lease Runtime::lease(std::span<const std::vector<int>> groups) {
  check_outside_call();
  if (groups.empty()) throw std::invalid_argument("a lease of no group of nodes");
  Impl::Pools& mine = impl_->pools();
  std::vector<std::vector<NodePool*>> pools(groups.size());
  for (std::size_t g = 0; g < groups.size(); ++g) {
    for (int node : groups[g]) {
      if (impl_->node(node).threads > 0) pools[g].push_back(&impl_->pool(mine, node));
    }
    if (pools[g].empty()) throw std::invalid_argument("a group of nodes without threads cannot be leased");
  }
  int near = -1;
  bool confined = false;
  if (impl_->options.bind && groups.size() > 1) {
    sys::CpuMask mask;
    const bool known = sys::get_affinity(mask) == 0;
    const int at = sys::current_node();
    for (std::size_t g = 0; g < groups.size() && !confined; ++g) {
      sys::CpuMask here;
      for (int node : groups[g]) {
        here |= impl_->cpu_masks[static_cast<std::size_t>(node)];
        if (impl_->nodes[static_cast<std::size_t>(node)].os_node == at && near < 0) near = static_cast<int>(g);
      }
      if (known && here.contains(mask)) {
        near = static_cast<int>(g);
        confined = true;
      }
    }
  }
  Lease lease;
  lease.held_ = std::make_unique<Lease::Held>(std::move(pools), near, confined);
  for (int group : lease.groups()) {
    for (int node : groups[static_cast<std::size_t>(group)]) {
      if (impl_->node(node).threads > 0) lease.nodes_.push_back(node);
    }
  }
  std::sort(lease.nodes_.begin(), lease.nodes_.end());
  return lease;
}

void Runtime::run(const Lease& lease, FunctionRef<void(const Worker&, Barriers&)> work, Pinning pinning) { impl_->run_held(lease.nodes(), work, pinning); }

void Runtime::set_chunk_delay(int node, int microseconds) {
  impl_->node(node);
  impl_->chunk_delays[static_cast<std::size_t>(node)].store(microseconds, std::memory_order_relaxed);
}

void Runtime::delay_chunk(int node) const noexcept {
  const int delay = impl_->chunk_delays[static_cast<std::size_t>(node)].load(std::memory_order_relaxed);
  if (delay > 0) ::usleep(static_cast<useconds_t>(delay));
}

void Runtime::release(const Buffer& buffer) { impl_->memory.release(buffer.data); }

sys::PageQuery Runtime::verify(std::span<const sys::PageRange> buffers, const std::vector<sys::Mapping>* known) {
  std::vector<std::shared_ptr<Residency>> residencies;
  for (const sys::PageRange& buffer : buffers) residencies.push_back(impl_->memory.residency_of(reinterpret_cast<const std::byte*>(buffer.begin)));
  sys::PageQuery query = sys::query_ranges(buffers, true, known);
  for (std::size_t i = 0; i < residencies.size(); ++i) {
    const sys::PageCount& count = query.counts[i];
    if (!query.per_page[i].empty()) {
      residencies[i]->store(query.per_page[i], count.page_bytes);
    } else if (count.exact && count.absent == 0 && count.per_node.size() == 1) {
      residencies[i]->store_homogeneous(count.per_node.begin()->first);
    } else {
      residencies[i]->clear();
    }
  }
  return query;
}

std::vector<Memory::ArenaReport> Runtime::memory_report() const { return impl_->memory.report(); }

std::byte* Runtime::scratch(const Worker& worker, std::size_t bytes) {
  WorkerScratch& mine = impl_->scratch[static_cast<std::size_t>(worker.node)][static_cast<std::size_t>(worker.rank_in_node)];
  if (mine.bytes >= bytes) return mine.data;
  // Grown by halves at least; the worker itself touches it, so that it is local however that was arranged.
  const std::size_t wanted = round_up(std::max({bytes, mine.bytes + mine.bytes / 2, std::size_t{64} << 10}), 64 << 10);
  if (mine.data != nullptr) impl_->memory.release(mine.data);
  mine = WorkerScratch();
  const MemoryTarget target{{worker.node}, MemoryTarget::Mode::bind};
  const Memory::Reserved reserved = impl_->memory.reserve(wanted, target, "scratch memory of node " + std::to_string(worker.node));
  try {
    // A caller that is only watched may be elsewhere.
    const AffinityScope here(reserved.obtained == Obtained::first_touch ? impl_->pool(impl_->pools(), worker.node).cpu_of(worker.rank_in_node) : -1);
    std::optional<PolicyScope> policy;
    if (reserved.obtained == Obtained::set_mempolicy) policy.emplace(std::span(&impl_->nodes[static_cast<std::size_t>(worker.node)].os_node, 1), target.mode);
    touch_pages(reserved.buffer.data, reserved.buffer.data + reserved.buffer.bytes, reserved.pages);
  } catch (...) {
    impl_->memory.release(reserved.buffer.data);
    throw;
  }
  mine = {reserved.buffer.data, reserved.buffer.bytes};
  return mine.data;
}

namespace {

class LeasedScratch : public Runtime::SharedScratch {
 public:
  LeasedScratch(std::byte* block, std::size_t size, bool& leased) : leased_(leased) {
    data = block;
    bytes = size;
  }
  ~LeasedScratch() override {
    const std::lock_guard lock(fork_safe_mutex());
    leased_ = false;
  }

 private:
  bool& leased_;
};

}  // namespace

std::shared_ptr<Runtime::SharedScratch> Runtime::shared_scratch(std::size_t bytes, int node, const Lease* lease) {
  using Block = Impl::SharedBlock;
  impl_->node(node);
  {
    const std::lock_guard lock(fork_safe_mutex());
    Block* best = nullptr;
    for (const auto& block : impl_->shared_blocks) {
      if (!block->leased && block->node == node && block->buffer.bytes >= bytes && (best == nullptr || block->buffer.bytes < best->buffer.bytes)) best = block.get();
    }
    if (best != nullptr) {
      best->leased = true;
      return std::make_shared<LeasedScratch>(best->buffer.data, best->buffer.bytes, best->leased);
    }
  }
  // A larger one takes the place of a smaller one that is free.
  std::optional<Buffer> outgrown;
  {
    const std::lock_guard lock(fork_safe_mutex());
    const auto small = std::find_if(impl_->shared_blocks.begin(), impl_->shared_blocks.end(), [&](const auto& block) { return !block->leased && block->node == node; });
    if (small != impl_->shared_blocks.end()) {
      outgrown = std::move((*small)->buffer);
      impl_->shared_blocks.erase(small);
    }
  }
  if (outgrown) impl_->memory.release(outgrown->data);
  std::size_t size = std::size_t{64} << 10;
  while (size < bytes) size *= 2;
  auto block = std::make_unique<Block>();
  block->buffer = impl_->allocate(size, {{node}, MemoryTarget::Mode::bind}, "shared scratch memory of node " + std::to_string(node), lease);
  block->node = node;
  block->leased = true;
  const std::lock_guard lock(fork_safe_mutex());
  impl_->shared_blocks.push_back(std::move(block));
  Block& added = *impl_->shared_blocks.back();
  return std::make_shared<LeasedScratch>(added.buffer.data, added.buffer.bytes, added.leased);
}

}  // namespace numagraft

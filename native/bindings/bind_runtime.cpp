#include <pybind11/stl.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/bind.h"
#include "system/syscalls.h"
#include "threads/runtime.h"

namespace py = pybind11;

namespace numagraft {
namespace {

Pages parse_pages(const std::string& name) {
  if (name == "auto") return Pages::automatic;
  if (name == "4k") return Pages::normal;
  if (name == "thp") return Pages::transparent;
  if (name == "2m") return Pages::huge_2m;
  if (name == "1g") return Pages::huge_1g;
  throw std::invalid_argument("pages is '" + name + "': expected auto, 4k, thp, 2m or 1g");
}

const char* name_of_pages(PageKind kind) {
  switch (kind) {
    case PageKind::normal: return "4k";
    case PageKind::transparent: return "thp";
    case PageKind::huge_2m: return "2m";
    default: return "1g";
  }
}

// Where a worker of one call ran, as the kernel says.
struct WorkerPlace {
  int node, rank_in_node, rank, cpu, os_node;
};

std::vector<WorkerPlace> observe_workers(Runtime& runtime, const std::vector<int>& nodes) {
  std::vector<WorkerPlace> places(static_cast<std::size_t>(runtime.threads_on(nodes)));
  runtime.run(nodes, [&](const Worker& worker, Barriers& barriers) {
    barriers.all(worker);
    places[static_cast<std::size_t>(worker.rank)] = {worker.node, worker.rank_in_node, worker.rank, sys::current_cpu(), sys::current_node()};
  });
  return places;
}

// Seconds per call: `calls` fork-joins of `all_barriers` and `node_barriers` barriers each.
double time_calls(Runtime& runtime, const std::vector<int>& nodes, int calls, int all_barriers, int node_barriers) {
  using Clock = std::chrono::steady_clock;
  const auto start = Clock::now();
  for (int i = 0; i < calls; ++i) {
    runtime.run(nodes, [&](const Worker& worker, Barriers& barriers) {
      for (int b = 0; b < all_barriers; ++b) barriers.all(worker);
      for (int b = 0; b < node_barriers; ++b) barriers.node(worker);
    });
  }
  return std::chrono::duration<double>(Clock::now() - start).count() / calls;
}

// Every worker counts to the same sums through barriers; the result is wrong if a barrier lets anyone through early.
// `leave_out` leaves the barriers out: the control that shows what they are for.
bool barriers_hold(Runtime& runtime, const std::vector<int>& nodes, int rounds, bool leave_out) {
  const std::vector<int> on = nodes;
  std::vector<std::int64_t> cells(static_cast<std::size_t>(runtime.threads_on(on)) * 8, 0);  // plain memory: a race here is the barrier's fault
  std::atomic<bool> held{true};
  runtime.run(on, [&](const Worker& worker, Barriers& barriers) {
    const auto mine = static_cast<std::size_t>(worker.rank) * 8;
    for (int round = 1; round <= rounds; ++round) {
      cells[mine] = round;
      if (!leave_out) barriers.all(worker);
      for (int other = 0; other < worker.workers; ++other) {
        if (cells[static_cast<std::size_t>(other) * 8] != round) held = false;
      }
      if (!leave_out) barriers.all(worker);
      cells[mine + 1] = round;
      if (!leave_out) barriers.node(worker);
      const int first = worker.rank - worker.rank_in_node;
      for (int other = first; other < first + worker.workers_in_node; ++other) {
        if (cells[static_cast<std::size_t>(other) * 8 + 1] != round) held = false;
      }
      if (!leave_out) barriers.node(worker);
    }
  });
  return held;
}

// The worker of this rank throws while the others wait for it in a barrier.
void fail_in_worker(Runtime& runtime, const std::vector<int>& nodes, int rank, const std::string& message) {
  runtime.run(nodes, [&](const Worker& worker, Barriers& barriers) {
    if (worker.rank == rank) throw std::runtime_error(message);
    barriers.all(worker);
    barriers.node(worker);
  });
}

// Computes for that long on every worker; when the first of them began and ended, in seconds of the monotonic clock.
std::pair<double, double> keep_busy(Runtime& runtime, const std::vector<int>& nodes, double seconds) {
  const auto now = [] { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); };
  std::pair<double, double> span;
  runtime.run(nodes, [&](const Worker& worker, Barriers&) {
    const double begin = now();
    while (now() < begin + seconds) {
    }
    if (worker.rank == 0) span = {begin, now()};
  });
  return span;
}

// Leases and computes nothing for that long; which of the groups it got, and when it began and ended.
std::tuple<std::vector<int>, double, double> hold_lease(Runtime& runtime, const std::vector<std::vector<int>>& groups, double seconds) {
  const auto now = [] { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); };
  const Runtime::Lease lease = runtime.lease(groups);
  const double begin = now();
  runtime.run(lease, [](const Worker&, Barriers&) {});
  std::this_thread::sleep_for(std::chrono::duration<double>(seconds));
  return {lease.groups(), begin, now()};
}

py::dict scratch_of_workers(Runtime& runtime, const std::vector<int>& nodes, std::size_t bytes) {
  std::vector<std::uintptr_t> addresses(static_cast<std::size_t>(runtime.threads_on(nodes)));
  {
    const py::gil_scoped_release release;
    runtime.run(nodes, [&](const Worker& worker, Barriers&) {
      std::byte* data = runtime.scratch(worker, bytes);
      for (std::size_t i = 0; i < bytes; i += 4096) data[i] = std::byte{1};
      addresses[static_cast<std::size_t>(worker.rank)] = reinterpret_cast<std::uintptr_t>(data);
    });
  }
  py::dict found;
  for (std::size_t rank = 0; rank < addresses.size(); ++rank) found[py::int_(rank)] = addresses[rank];
  return found;
}

}  // namespace

void bind_runtime(py::module_& m) {
  using Released = py::call_guard<py::gil_scoped_release>;

  py::class_<NodeSpec>(m, "NodeSpec")
      .def(py::init([](int os_node, std::vector<int> cpus, int threads) { return NodeSpec{os_node, std::move(cpus), threads}; }), py::arg("os_node"),
           py::arg("cpus"), py::arg("threads"))
      .def_readonly("os_node", &NodeSpec::os_node)
      .def_readonly("cpus", &NodeSpec::cpus)
      .def_readonly("threads", &NodeSpec::threads);

  py::class_<WorkerPlace>(m, "WorkerPlace")
      .def_readonly("node", &WorkerPlace::node)
      .def_readonly("rank_in_node", &WorkerPlace::rank_in_node)
      .def_readonly("rank", &WorkerPlace::rank)
      .def_readonly("cpu", &WorkerPlace::cpu)
      .def_readonly("os_node", &WorkerPlace::os_node);

  py::class_<Buffer>(m, "Buffer")
      .def_property_readonly("address", [](const Buffer& buffer) { return reinterpret_cast<std::uintptr_t>(buffer.data); })
      .def_readonly("bytes", &Buffer::bytes)
      .def_readonly("owner", &Buffer::owner)
      .def_property_readonly("nodes", [](const Buffer& buffer) { return buffer.target.nodes; })
      .def_property_readonly("interleaved", [](const Buffer& buffer) { return buffer.target.mode == MemoryTarget::Mode::interleave; })
      .def_property_readonly("verified", [](const Buffer& buffer) { return buffer.residency->verified(); })
      .def("node_at", [](const Buffer& buffer, std::size_t offset) { return buffer.residency->node_at(offset); })
      .def("remote_bytes", [](const Buffer& buffer, std::size_t begin, std::size_t end, int os_node) { return buffer.residency->remote_bytes(begin, end, os_node); });

  py::class_<Residency, std::shared_ptr<Residency>>(m, "Residency")
      .def(py::init())
      .def("store", [](Residency& residency, const std::vector<std::int16_t>& nodes, std::size_t page_bytes) { residency.store(nodes, page_bytes); })
      .def("node_at", &Residency::node_at)
      .def("remote_bytes", &Residency::remote_bytes);

  py::class_<Memory::ArenaReport>(m, "ArenaReport")
      .def_readonly("address", &Memory::ArenaReport::address)
      .def_readonly("reserved_bytes", &Memory::ArenaReport::reserved_bytes)
      .def_readonly("used_bytes", &Memory::ArenaReport::used_bytes)
      .def_readonly("buffers", &Memory::ArenaReport::buffers)
      .def_readonly("nodes", &Memory::ArenaReport::nodes)
      .def_readonly("os_nodes", &Memory::ArenaReport::os_nodes)
      .def_readonly("interleaved", &Memory::ArenaReport::interleaved)
      .def_readonly("obtained", &Memory::ArenaReport::obtained)
      .def_readonly("refused", &Memory::ArenaReport::refused)
      .def_property_readonly("pages", [](const Memory::ArenaReport& report) { return name_of_pages(report.pages); });

  py::class_<Runtime, std::shared_ptr<Runtime>>(m, "Runtime")
      .def(py::init([](std::vector<NodeSpec> nodes, bool bind, const std::string& pages, int spin_microseconds) {
             return std::make_shared<Runtime>(std::move(nodes), RuntimeOptions{bind, parse_pages(pages), spin_microseconds});
           }),
           py::arg("nodes"), py::arg("bind"), py::arg("pages"), py::arg("spin_microseconds") = RuntimeOptions().spin_microseconds)
      .def("threads_on", [](const Runtime& runtime, const std::vector<int>& nodes) { return runtime.threads_on(nodes); })
      .def(
          "allocate",
          [](Runtime& runtime, std::size_t bytes, std::vector<int> nodes, bool interleaved, const std::string& owner) {
            const MemoryTarget target{std::move(nodes), interleaved ? MemoryTarget::Mode::interleave : MemoryTarget::Mode::bind};
            const py::gil_scoped_release release;
            return runtime.allocate(bytes, target, owner);
          },
          py::arg("bytes"), py::arg("nodes"), py::arg("interleaved"), py::arg("owner"))
      .def("release", &Runtime::release, Released())
      .def(
          "verify",
          [](Runtime& runtime, const std::vector<std::pair<std::uintptr_t, std::size_t>>& buffers) {
            const py::gil_scoped_release release;
            std::vector<sys::PageRange> ranges;
            for (const auto& [address, bytes] : buffers) ranges.push_back({address, address + bytes});
            sys::PageQuery query = runtime.verify(ranges);
            return std::make_pair(std::move(query.counts), query.asked);
          },
          py::arg("buffers"))
      .def(
          // verify, and bytes by page size of every arena of memory_report, from one reading of smaps
          "survey",
          [](Runtime& runtime, const std::vector<std::pair<std::uintptr_t, std::size_t>>& buffers) {
            const py::gil_scoped_release release;
            std::vector<sys::PageRange> ranges;
            for (const auto& [address, bytes] : buffers) ranges.push_back({address, address + bytes});
            const std::vector<sys::Mapping> mappings = sys::read_mappings();
            sys::PageQuery query = runtime.verify(ranges, &mappings);
            std::vector<Memory::ArenaReport> arenas = runtime.memory_report();
            std::vector<std::map<std::size_t, std::int64_t>> sizes;
            for (const auto& arena : arenas) sizes.push_back(sys::count_page_sizes(mappings, arena.address, arena.address + arena.reserved_bytes));
            return std::make_tuple(std::move(query.counts), std::move(arenas), std::move(sizes));
          },
          py::arg("buffers"))
      .def("memory_report", &Runtime::memory_report)
      .def("observe_workers", &observe_workers, py::arg("nodes"), Released())
      .def("time_calls", &time_calls, py::arg("nodes"), py::arg("calls"), py::arg("all_barriers") = 0, py::arg("node_barriers") = 0, Released())
      // test seams
      .def("set_stealing", &Runtime::set_stealing, py::arg("on"))
      .def("set_chunk_delay", &Runtime::set_chunk_delay, py::arg("node"), py::arg("microseconds"))
      .def("hold_lease", &hold_lease, py::arg("groups"), py::arg("seconds"), Released())
      .def("barriers_hold", &barriers_hold, py::arg("nodes"), py::arg("rounds"), py::arg("leave_out") = false, Released())
      .def("fail_in_worker", &fail_in_worker, py::arg("nodes"), py::arg("rank"), py::arg("message"), Released())
      .def("keep_busy", &keep_busy, py::arg("nodes"), py::arg("seconds"), Released())
      .def("scratch_of_workers", &scratch_of_workers, py::arg("nodes"), py::arg("bytes"))
      .def(
          "shared_scratch",
          [](Runtime& runtime, std::size_t bytes, int node) {
            std::shared_ptr<Runtime::SharedScratch> lease;
            {
              const py::gil_scoped_release release;
              lease = runtime.shared_scratch(bytes, node);
            }
            return lease;
          },
          py::arg("bytes"), py::arg("node"), py::keep_alive<0, 1>());
  py::class_<Runtime::SharedScratch, std::shared_ptr<Runtime::SharedScratch>>(m, "SharedScratch")
      .def_property_readonly("address", [](const Runtime::SharedScratch& scratch) { return reinterpret_cast<std::uintptr_t>(scratch.data); })
      .def_readonly("bytes", &Runtime::SharedScratch::bytes);
}

}  // namespace numagraft

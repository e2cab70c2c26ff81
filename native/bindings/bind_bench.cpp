#include "bindings/bind.h"

#include <pybind11/stl.h>

#include <cstdint>
#include <tuple>
#include <vector>

#include "bench/chase.h"
#include "bench/fork_join.h"
#include "bench/peaks.h"
#include "bench/stream.h"

namespace py = pybind11;

namespace numagraft {
namespace {

using RegionTuple = std::tuple<std::uintptr_t, std::size_t, std::vector<int>>;

StreamPass stream(Runtime& runtime, const std::vector<RegionTuple>& tuples, int streams, int prefetch_bytes,
                  const std::string& width) {
  std::vector<StreamRegion> regions;
  for (const auto& [address, bytes, nodes] : tuples)
    regions.push_back({reinterpret_cast<const std::byte*>(address), bytes, nodes});
  py::gil_scoped_release release;
  return read_stream(runtime, regions, {streams, prefetch_bytes}, width);
}

std::vector<std::tuple<std::string, std::string, bool>> list_peaks() {
  std::vector<std::tuple<std::string, std::string, bool>> found;
  for (const Peak& peak : peaks()) found.emplace_back(peak.name, peak.what, peak.supported());
  return found;
}

std::vector<double> multiply_peak(Runtime& runtime, const std::vector<int>& nodes, const std::string& name, double seconds,
                                  int repetitions) {
  const Peak& peak = peak_by_name(name);
  py::gil_scoped_release release;
  return measure_peak(runtime, nodes, peak, seconds, repetitions);
}

std::vector<double> fork_join(Runtime& runtime, const std::vector<int>& nodes, int barriers, int repetitions) {
  py::gil_scoped_release release;
  return measure_fork_join(runtime, nodes, barriers, repetitions);
}

}  // namespace

void bind_bench(py::module_& m) {
  m.def("bench_stream_variants", [] {
    std::vector<std::pair<int, int>> found;
    for (const StreamVariant& variant : stream_variants()) found.emplace_back(variant.streams, variant.prefetch_bytes);
    return found;
  });
  m.def("bench_stream_widths", &stream_widths);
  m.def(
      "bench_stream",
      [](Runtime& runtime, const std::vector<RegionTuple>& regions, int streams, int prefetch_bytes, const std::string& width) {
        const StreamPass pass = stream(runtime, regions, streams, prefetch_bytes, width);
        return std::tuple{pass.seconds, pass.bytes, pass.checksum};
      },
      py::arg("runtime"), py::arg("regions"), py::kw_only(), py::arg("streams"), py::arg("prefetch_bytes"), py::arg("width"));
  m.def("bench_peaks", &list_peaks);
  m.def("bench_multiply_peak", &multiply_peak, py::arg("runtime"), py::arg("nodes"), py::arg("name"), py::kw_only(),
        py::arg("seconds"), py::arg("repetitions"));
  m.def(
      "bench_make_chase",
      [](Runtime& runtime, int node, std::uintptr_t address, std::size_t bytes) {
        make_chase(runtime, node, reinterpret_cast<std::byte*>(address), bytes);
      },
      py::arg("runtime"), py::arg("node"), py::arg("address"), py::arg("bytes"), py::call_guard<py::gil_scoped_release>());
  m.def(
      "bench_run_chase",
      [](Runtime& runtime, int node, std::uintptr_t address, std::int64_t steps) {
        return run_chase(runtime, node, reinterpret_cast<const std::byte*>(address), steps);
      },
      py::arg("runtime"), py::arg("node"), py::arg("address"), py::arg("steps"), py::call_guard<py::gil_scoped_release>());
  m.def("bench_fork_join", &fork_join, py::arg("runtime"), py::arg("nodes"), py::kw_only(), py::arg("barriers"),
        py::arg("repetitions"));
}

}  // namespace numagraft

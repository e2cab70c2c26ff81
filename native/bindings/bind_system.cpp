#include <pybind11/stl.h>

#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "bindings/bind.h"
#include "system/free_memory.h"
#include "system/page_query.h"
#include "system/probe.h"
#include "system/syscalls.h"

namespace py = pybind11;

namespace numagraft {

void bind_system(py::module_& m) {
  py::class_<sys::PageCount>(m, "PageCount")
      .def_readonly("per_node", &sys::PageCount::per_node)
      .def_readonly("absent", &sys::PageCount::absent)
      .def_readonly("method", &sys::PageCount::method)
      .def_readonly("exact", &sys::PageCount::exact)
      .def_readonly("page_bytes", &sys::PageCount::page_bytes);
  m.def(
      "query_pages",
      [](std::uintptr_t address, std::size_t bytes) {
        const py::gil_scoped_release release;
        const sys::PageRange range{address, address + bytes};
        return sys::query_ranges({&range, 1}, false).counts.front();
      },
      py::arg("address"), py::arg("bytes"));
  m.def(
      "query_page_sizes",
      [](const std::vector<std::pair<std::uintptr_t, std::size_t>>& ranges) {
        const py::gil_scoped_release release;
        const auto mappings = sys::read_mappings();
        std::vector<std::map<std::size_t, std::int64_t>> sizes;
        for (const auto& [address, bytes] : ranges) sizes.push_back(sys::count_page_sizes(mappings, address, address + bytes));
        return sizes;
      },
      py::arg("ranges"));
  m.def(
      "count_in_numa_maps",
      [](const std::string& numa_maps, const std::string& maps, std::uintptr_t begin, std::uintptr_t end) {
        return sys::NumaMaps(numa_maps, sys::parse_smaps(maps), 4096).count({begin, end});
      },
      py::arg("numa_maps"), py::arg("maps"), py::arg("begin"), py::arg("end"));
  m.def(
      "page_sizes_in_smaps",
      [](const std::string& smaps, std::uintptr_t begin, std::uintptr_t end) { return sys::count_page_sizes(sys::parse_smaps(smaps), begin, end); },
      py::arg("smaps"), py::arg("begin"), py::arg("end"));
  m.def("probe_calls", [] {
    const py::gil_scoped_release release;
    return sys::probe_calls();
  });
  m.def("inherited_policy", [] {
    const sys::Policy policy = sys::inherited_policy();
    return py::make_tuple(policy.name, policy.nodes);
  });
  m.def("available_by_node", &sys::available_by_node);
  m.def("parse_zoneinfo", &sys::parse_zoneinfo, py::arg("text"), py::arg("page_bytes"));
  m.def(
      "tightest_cgroup_limit",
      [](const std::string& root) -> py::object {
        const auto limit = sys::tightest_cgroup_limit(root);
        if (!limit) return py::none();
        return py::make_tuple(limit->file, limit->limit, limit->left);
      },
      py::arg("root") = "/");
  m.def("set_fault", &sys::set_fault, py::arg("call"), py::arg("error"), py::arg("after") = 0);
  m.def("plant_available", &sys::plant_available, py::arg("bytes"), py::arg("after") = 0);
  m.def("current_node", &sys::current_node);
}

}  // namespace numagraft

#include <pybind11/pybind11.h>

#include "system/build_info.h"

namespace py = pybind11;

PYBIND11_MODULE(_native, m) {
  m.doc() = "numagraft's native backend; use it through numagraft.native";
  m.def("compiler", &numagraft::compiler);
  m.def("sanitizer", &numagraft::sanitizer);
}

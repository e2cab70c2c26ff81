#include "bindings/bind.h"
#include "system/build_info.h"

PYBIND11_MODULE(_native, m) {
  m.doc() = "numagraft's native backend; use it through numagraft.native";
  m.def("compiler", &numagraft::compiler);
  m.def("sanitizer", &numagraft::sanitizer);
  numagraft::bind_errors(m);
  numagraft::bind_system(m);
  numagraft::bind_runtime(m);
  numagraft::bind_bench(m);
  numagraft::bind_weights(m);
}

#pragma once

#include <pybind11/pybind11.h>

namespace numagraft {

void bind_bench(pybind11::module_& m);
void bind_errors(pybind11::module_& m);
void bind_system(pybind11::module_& m);
void bind_runtime(pybind11::module_& m);
void bind_weights(pybind11::module_& m);

}  // namespace numagraft

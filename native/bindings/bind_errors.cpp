#include <string>

#include "bindings/bind.h"
#include "system/error.h"

namespace py = pybind11;

namespace numagraft {
namespace {

void raise(const char* name, const Failure& failure) {
  const py::object kind = py::module_::import("numagraft.errors").attr(name);
  const std::string text = failure.remedy().empty() ? failure.what() : std::string(failure.what()) + "\n    " + failure.remedy();
  py::set_error(kind, text.c_str());
}

}  // namespace

void bind_errors(py::module_&) {
  py::register_local_exception_translator([](std::exception_ptr thrown) {
    try {
      if (thrown) std::rethrow_exception(thrown);
    } catch (const PlacementFailure& failure) {
      raise("PlacementError", failure);
    } catch (const ConfigurationFailure& failure) {
      raise("ConfigurationError", failure);
    } catch (const WeightFailure& failure) {
      raise("WeightError", failure);
    } catch (const CheckpointFailure& failure) {
      raise("CheckpointError", failure);
    }
  });
}

}  // namespace numagraft

#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bindings/bind.h"
#include "kernels/kernel_table.h"
#include "ops/experts.h"
#include "ops/linear.h"
#include "system/error.h"
#include "threads/runtime.h"

namespace py = pybind11;

namespace numagraft {
namespace {

DType parse_dtype(const std::string& name) {
  if (name == "f32") return DType::f32;
  if (name == "bf16") return DType::bf16;
  if (name == "f16") return DType::f16;
  throw ConfigurationFailure("dtype is '" + name + "': expected f32, bf16 or f16", "");
}

DType parse_source_dtype(const std::string& name) {
  if (name == "e4m3") return DType::e4m3;
  if (name == "e2m1") return DType::e2m1;
  return parse_dtype(name);
}

WeightKind parse_kind(const std::string& name) {
  if (name == "bf16") return WeightKind::bf16;
  if (name == "int8") return WeightKind::int8;
  if (name == "int4") return WeightKind::int4;
  if (name == "fp8") return WeightKind::fp8;
  if (name == "mxfp4") return WeightKind::mxfp4;
  throw ConfigurationFailure("weight format is '" + name + "': expected bf16, int8, int4, fp8 or mxfp4", "");
}

Activations parse_activations(const std::string& name) {
  if (name == "auto") return Activations::automatic;
  if (name == "int8") return Activations::int8;
  if (name == "bf16") return Activations::bf16;
  throw ConfigurationFailure("activations is '" + name + "': expected auto, int8 or bf16", "");
}

MatrixView view(std::uintptr_t address, const std::string& dtype, std::int64_t rows, std::int64_t columns, std::int64_t row_stride,
                std::int64_t column_stride) {
  return MatrixView{reinterpret_cast<const void*>(address), parse_dtype(dtype), rows, columns, row_stride, column_stride};  // NOLINT
}

WeightSource source(std::uintptr_t address, const std::string& dtype, std::int64_t rows, std::int64_t columns, std::int64_t row_stride,
                    std::int64_t column_stride, std::uintptr_t scales, std::int64_t scale_stride, int file, std::int64_t offset, std::int64_t file_size) {
  const MatrixView matrix{reinterpret_cast<const void*>(address), parse_source_dtype(dtype), rows, columns, row_stride, column_stride,  // NOLINT
                          reinterpret_cast<const void*>(scales), scale_stride};                                                          // NOLINT
  return {matrix, file, offset, file_size};
}

Part part(std::vector<int> memory_nodes, bool interleaved, std::vector<int> workers, std::int64_t begin, std::int64_t end) {
  return Part{{std::move(memory_nodes), interleaved ? MemoryTarget::Mode::interleave : MemoryTarget::Mode::bind}, std::move(workers), begin, end};
}

GateKind parse_gate(const std::string& name) {
  if (name == "silu") return GateKind::silu;
  if (name == "gelu") return GateKind::gelu;
  if (name == "gelu_tanh") return GateKind::gelu_tanh;
  if (name == "relu") return GateKind::relu;
  if (name == "clamped_swiglu") return GateKind::clamped_swiglu;
  throw ConfigurationFailure("gate is '" + name + "': expected silu, gelu, gelu_tanh, relu or clamped_swiglu", "");
}

ExpertsWeights::Piece parse_piece(const std::string& name) {
  if (name == "gate") return ExpertsWeights::Piece::gate;
  if (name == "up") return ExpertsWeights::Piece::up;
  if (name == "down") return ExpertsWeights::Piece::down;
  throw ConfigurationFailure("piece is '" + name + "': expected gate, up or down", "");
}

ExpertIds expert_ids(std::uintptr_t address, std::int64_t tokens, std::int64_t slots, std::int64_t token_stride, std::int64_t slot_stride) {
  return ExpertIds{reinterpret_cast<const std::int64_t*>(address), tokens, slots, token_stride, slot_stride};  // NOLINT
}

// The kernels in use, or those of a name.
const KernelTable& chosen_kernels(const std::string& isa = "") {
  try {
    return isa.empty() ? active_kernels() : kernels_by_name(isa.c_str());
  } catch (const std::invalid_argument& error) {
    throw ConfigurationFailure(error.what(), "");
  }
}

std::vector<std::string> supported_names() {
  const KernelTable* const* tables = nullptr;
  const int count = supported_kernels(&tables);
  std::vector<std::string> names;
  for (int i = 0; i < count; ++i) names.emplace_back(tables[i]->isa);
  return names;
}

}  // namespace

void bind_weights(py::module_& m) {
  using Released = py::call_guard<py::gil_scoped_release>;

  m.def("active_isa", [] { return std::string(chosen_kernels().isa); });
  m.def("supported_isas", &supported_names);
  m.def("isa_forced", &kernels_forced);

  py::class_<MatrixView>(m, "MatrixView")
      .def(py::init(&view), py::arg("address"), py::arg("dtype"), py::arg("rows"), py::arg("columns"), py::arg("row_stride"), py::arg("column_stride"));
  py::class_<WeightSource>(m, "WeightSource")
      .def(py::init<const MatrixView&>())
      .def(py::init(&source), py::arg("address"), py::arg("dtype"), py::arg("rows"), py::arg("columns"), py::arg("row_stride"), py::arg("column_stride"),
           py::arg("scales"), py::arg("scale_stride"), py::arg("file"), py::arg("offset"), py::arg("file_size"));
  py::implicitly_convertible<MatrixView, WeightSource>();
  py::class_<Part>(m, "Part")
      .def(py::init(&part), py::arg("memory_nodes"), py::arg("interleaved"), py::arg("workers"), py::arg("begin"), py::arg("end"));
  py::class_<WeightFormat>(m, "WeightFormat")
      .def(py::init([](const std::string& kind, int group, bool symmetric, const std::string& activations) {
             const WeightFormat format{parse_kind(kind), group, symmetric, parse_activations(activations)};
             std::string text;
             for (const std::string& problem : format_problems(format)) text += (text.empty() ? "" : "; ") + problem;
             if (!text.empty()) throw ConfigurationFailure(text, "");
             return format;
           }),
           py::arg("kind"), py::arg("group"), py::arg("symmetric"), py::arg("activations"));
  py::class_<NodeStats>(m, "NodeStats")
      .def_readonly("calls", &NodeStats::calls)
      .def_readonly("bytes_read", &NodeStats::bytes_read)
      .def_readonly("remote_bytes", &NodeStats::remote_bytes)
      .def_readonly("chunks", &NodeStats::chunks)
      .def_readonly("stolen_chunks", &NodeStats::stolen_chunks)
      .def_readonly("off_node_chunks", &NodeStats::off_node_chunks);
  py::class_<OperatorStats>(m, "OperatorStats")
      .def_readonly("nodes", &OperatorStats::nodes)
      .def_readonly("calls", &OperatorStats::calls)
      .def_readonly("seconds", &OperatorStats::seconds)
      .def_readonly("bytes_read", &OperatorStats::bytes_read)
      .def_readonly("remote_bytes", &OperatorStats::remote_bytes);

  py::class_<LinearWeights>(m, "LinearWeights")
      .def(py::init([](std::shared_ptr<Runtime> runtime, std::int64_t out_features, std::int64_t in_features, const WeightFormat& format,
                       std::vector<Part> parts, bool has_bias, std::string owner, const std::string& isa) {
             return std::make_unique<LinearWeights>(std::move(runtime), out_features, in_features, format, std::move(parts), has_bias,
                                                    std::move(owner), chosen_kernels(isa));
           }),
           py::arg("runtime"), py::arg("out_features"), py::arg("in_features"), py::arg("format"), py::arg("parts"), py::arg("has_bias"),
           py::arg("owner"), py::arg("isa"), Released())
      .def("load_weight", &LinearWeights::load_weight, py::arg("matrix"), py::arg("first_row"), Released())
      .def("load_bias", &LinearWeights::load_bias, py::arg("matrix"), Released())
      .def("missing", &LinearWeights::missing)
      .def("forward", &LinearWeights::forward, py::arg("x"), py::arg("out"), Released())
      .def(
          "forward_rows",
          [](LinearWeights& weights, std::uintptr_t x, const std::string& dtype, std::int64_t rows, std::uintptr_t out) {
            weights.forward(view(x, dtype, rows, weights.in_features(), weights.in_features(), 1),
                            view(out, dtype, rows, weights.out_features(), weights.out_features(), 1));
          },
          Released())
      .def("unpack", &LinearWeights::unpack, py::arg("out"), py::arg("replica"), Released())
      .def("buffers", &LinearWeights::buffers)
      .def_property_readonly("packed_bytes", &LinearWeights::packed_bytes)
      .def("stats", &LinearWeights::stats)
      .def_property_readonly("isa", &LinearWeights::isa);
  m.def("linear_packed_bytes", &linear_packed_bytes, py::arg("out_features"), py::arg("in_features"), py::arg("format"), py::arg("has_bias"), py::arg("part"));

  py::class_<Gate>(m, "Gate").def(py::init([](const std::string& kind, float alpha, float limit) { return Gate{parse_gate(kind), alpha, limit}; }),
                                  py::arg("kind"), py::arg("alpha"), py::arg("limit"));
  py::class_<ExpertIds>(m, "ExpertIds")
      .def(py::init(&expert_ids), py::arg("address"), py::arg("tokens"), py::arg("slots"), py::arg("token_stride"), py::arg("slot_stride"));
  py::class_<ExpertsShape>(m, "ExpertsShape")
      .def(py::init([](std::int64_t experts, std::int64_t hidden, std::int64_t intermediate, bool has_bias) {
             return ExpertsShape{experts, hidden, intermediate, has_bias};
           }),
           py::arg("experts"), py::arg("hidden"), py::arg("intermediate"), py::arg("has_bias"));
  py::class_<ExpertsWeights>(m, "ExpertsWeights")
      .def(py::init([](std::shared_ptr<Runtime> runtime, const ExpertsShape& shape, const WeightFormat& format, const Gate& gate,
                       std::vector<Part> parts, std::string owner, const std::string& isa) {
             return std::make_unique<ExpertsWeights>(std::move(runtime), shape, format, gate, std::move(parts), std::move(owner), chosen_kernels(isa));
           }),
           py::arg("runtime"), py::arg("shape"), py::arg("format"), py::arg("gate"), py::arg("parts"), py::arg("owner"), py::arg("isa"), Released())
      .def("load", &ExpertsWeights::load, py::arg("gate"), py::arg("up"), py::arg("down"), py::arg("first_expert"), Released())
      .def(
          "load_bias",
          [](ExpertsWeights& weights, const std::string& piece, std::int64_t expert, const MatrixView& values) {
            weights.load_bias(parse_piece(piece), expert, values);
          },
          py::arg("piece"), py::arg("expert"), py::arg("values"), Released())
      .def("missing", &ExpertsWeights::missing)
      .def("forward", &ExpertsWeights::forward, py::arg("x"), py::arg("ids"), py::arg("weights"), py::arg("out"), Released())
      .def(
          "forward_rows",
          [](ExpertsWeights& experts, std::uintptr_t x, const std::string& dtype, std::int64_t tokens, std::uintptr_t ids,
             std::int64_t slots, std::uintptr_t weights, const std::string& weights_dtype, std::uintptr_t out) {
            const std::int64_t hidden = experts.shape().hidden;
            experts.forward(view(x, dtype, tokens, hidden, hidden, 1), expert_ids(ids, tokens, slots, slots, 1),
                            view(weights, weights_dtype, tokens, slots, slots, 1), view(out, dtype, tokens, hidden, hidden, 1));
          },
          Released())
      .def(
          "unpack",
          [](const ExpertsWeights& weights, const std::string& piece, std::int64_t expert, const MatrixView& out, int replica) {
            weights.unpack(parse_piece(piece), expert, out, replica);
          },
          py::arg("piece"), py::arg("expert"), py::arg("out"), py::arg("replica"), Released())
      .def("buffers", &ExpertsWeights::buffers)
      .def_property_readonly("packed_bytes", &ExpertsWeights::packed_bytes)
      .def("stats", &ExpertsWeights::stats)
      .def_property_readonly("isa", &ExpertsWeights::isa);
  m.def("experts_packed_bytes", &experts_packed_bytes, py::arg("shape"), py::arg("format"), py::arg("part"));
}

}  // namespace numagraft

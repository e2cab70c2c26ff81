// The experts' memory and how weights get into it; experts.cpp computes.
#include <algorithm>
#include <utility>

#include "ops/experts.h"
#include "system/error.h"

namespace numagraft {
namespace {

constexpr const char* kNames[] = {"gate", "up", "down", "gate_bias", "up_bias", "down_bias"};

std::string shape_of(const MatrixView& m) { return "[" + std::to_string(m.rows) + ", " + std::to_string(m.columns) + "]"; }

}  // namespace

ExpertsPlace place_experts(const ExpertsShape& shape, const WeightFormat& format, const Part& part) {
  ExpertsPlace place;
  if (part.begin >= part.end) return place;
  const std::int64_t alignment = input_alignment(format);
  place.frame_begin = part.begin / alignment * alignment;
  // Whole groups, also where the part ends inside one; the last frame ends with the features.
  const std::int64_t left = shape.intermediate - place.frame_begin;
  const std::int64_t grouped = (part.end - place.frame_begin + alignment - 1) / alignment * alignment;
  const std::int64_t inputs = grouped < left ? grouped : left;
  place.frame = (inputs + kUnitInputs - 1) / kUnitInputs * kUnitInputs;
  place.gate_up = place_matrix(format, 2 * place.frame, shape.hidden, shape.has_bias, 0);
  place.down = place_matrix(format, shape.hidden, inputs, shape.has_bias, place.gate_up.end, place.frame_begin);
  place.stride = place.down.end;
  return place;
}

std::int64_t experts_packed_bytes(const ExpertsShape& shape, const WeightFormat& format, const Part& part) {
  return static_cast<std::int64_t>(place_experts(shape, format, part).stride) * shape.experts;
}

ExpertsWeights::ExpertsWeights(std::shared_ptr<Runtime> runtime, const ExpertsShape& shape, const WeightFormat& format,
                               const Gate& gate, std::vector<Part> parts, std::string owner, const KernelTable& kernels)
    : runtime_(std::move(runtime)),
      kernels_(&kernels),
      shape_(shape),
      format_(format),
      gate_(gate),
      parts_(std::move(parts)),
      owner_(std::move(owner)),
      teams_(*runtime_, parts_, shape.intermediate, owner_),
      traffic_(runtime_->nodes().size()) {
  if (const auto problems = format_problems(format); !problems.empty()) {
    std::string text = owner_ + ": the weight format cannot be packed";
    for (const std::string& problem : problems) text += "\n  " + problem;
    throw ConfigurationFailure(text, "");
  }
  for (int piece = 0; piece < (shape.has_bias ? 6 : 3); ++piece) {
    loaded_[piece].assign(static_cast<std::size_t>(shape.experts), false);
    missing_count_ += shape.experts;
  }
  try {
    for (const Part& part : parts_) {
      places_.push_back(place_experts(shape_, format_, part));
      const auto bytes = static_cast<std::size_t>(experts_packed_bytes(shape_, format_, part));
      buffers_.push_back(bytes > 0 ? runtime_->allocate(bytes, part.memory, owner_) : Buffer{});
    }
  } catch (...) {
    for (const Buffer& buffer : buffers_) {
      if (buffer.data != nullptr) runtime_->release(buffer);
    }
    throw;
  }
}

ExpertsWeights::~ExpertsWeights() {
  for (const Buffer& buffer : buffers_) {
    if (buffer.data != nullptr) runtime_->release(buffer);
  }
}

std::int64_t ExpertsWeights::packed_bytes() const {
  std::int64_t total = 0;
  for (const Part& part : parts_) total += experts_packed_bytes(shape_, format_, part);
  return total;
}

PackedMatrix ExpertsWeights::gate_up(int part, std::int64_t expert) const {
  const auto p = static_cast<std::size_t>(part);
  return {&places_[p].gate_up, buffers_[p].data + static_cast<std::size_t>(expert) * places_[p].stride};
}

PackedMatrix ExpertsWeights::down(int part, std::int64_t expert) const {
  const auto p = static_cast<std::size_t>(part);
  return {&places_[p].down, buffers_[p].data + static_cast<std::size_t>(expert) * places_[p].stride};
}

void ExpertsWeights::load(const std::vector<WeightSource>& gate, const std::vector<WeightSource>& up,
                          const std::vector<WeightSource>& down_matrices, std::int64_t first_expert) {
  const std::vector<WeightSource>* pieces[] = {&gate, &up, &down_matrices};
  std::string problems;
  std::size_t panel_scratch = 0;
  for (int piece = 0; piece < 3; ++piece) {
    const std::int64_t rows = piece == 2 ? shape_.hidden : shape_.intermediate;
    const std::int64_t columns = piece == 2 ? shape_.intermediate : shape_.hidden;
    for (std::size_t i = 0; i < pieces[piece]->size(); ++i) {
      const WeightSource& matrix = (*pieces[piece])[i];
      panel_scratch = std::max(panel_scratch, panel_scratch_bytes(matrix));
      const std::int64_t expert = first_expert + static_cast<std::int64_t>(i);
      const std::string name = "\n  " + std::string(kNames[piece]) + " of expert " + std::to_string(expert) + ": ";
      if (expert < 0 || expert >= shape_.experts) {
        problems += name + "there are " + std::to_string(shape_.experts) + " experts";
        continue;
      }
      if (matrix.rows != rows || matrix.columns != columns) {
        problems += name + "found " + shape_of(matrix) + ", expected [" + std::to_string(rows) + ", " + std::to_string(columns) + "]";
      }
      if (const std::string unfit = source_problems(matrix); !unfit.empty()) problems += name + "it cannot be packed" + unfit;
      if (loaded_[piece][static_cast<std::size_t>(expert)]) problems += name + "it was loaded before";
    }
  }
  if (!problems.empty()) throw WeightFailure(owner_ + ": weights do not fit" + problems, "");

  runtime_->run(teams_.nodes(), [&](const Worker& worker, Barriers&) {
    for (const Role& role : teams_.roles(worker)) {
      const ExpertsPlace& place = places_[static_cast<std::size_t>(role.part)];
      const Part& part = parts_[static_cast<std::size_t>(role.part)];
      const std::int64_t stage = std::max(stage_bytes(place.gate_up.layout), stage_bytes(place.down.layout));
      std::byte* staged = runtime_->scratch(worker, static_cast<std::size_t>(stage) + panel_scratch);
      const std::int64_t inner_panels = place.frame / kPanelColumns;
      for (int piece = 0; piece < 3; ++piece) {
        const std::int64_t panels = piece == 2 ? place.down.layout.panels : inner_panels;
        const auto count = static_cast<std::int64_t>(pieces[piece]->size());
        const Range mine = share(panels * count, role.replica_rank, role.replica_size);
        for (std::int64_t i = mine.begin; i < mine.end; ++i) {
          const std::int64_t expert = first_expert + i / panels;
          const std::int64_t panel = i % panels;
          const WeightSource& source = (*pieces[piece])[static_cast<std::size_t>(i / panels)];
          const std::int64_t row = panel * kPanelColumns;
          if (piece == 2) {
            pack_panel(*kernels_, down(role.part, expert), panel, source, row, 0, shape_.hidden, place.frame_begin, staged);
          } else {
            pack_panel(*kernels_, gate_up(role.part, expert), 2 * panel + piece, source, place.frame_begin + row, part.begin, part.end, 0, staged);
          }
        }
      }
    }
  });
  for (int piece = 0; piece < 3; ++piece) {
    for (std::size_t i = 0; i < pieces[piece]->size(); ++i) loaded_[piece][static_cast<std::size_t>(first_expert) + i] = true;
    missing_count_ -= static_cast<std::int64_t>(pieces[piece]->size());
  }
}

void ExpertsWeights::load_bias(Piece piece, std::int64_t expert, const MatrixView& values) {
  const int index = 3 + static_cast<int>(piece);
  const std::string name = owner_ + ": " + kNames[index] + " of expert " + std::to_string(expert) + ": ";
  const std::int64_t count = piece == Piece::down ? shape_.hidden : shape_.intermediate;
  if (!shape_.has_bias) throw WeightFailure(name + "these experts have no biases", "");
  if (expert < 0 || expert >= shape_.experts) throw WeightFailure(name + "there are " + std::to_string(shape_.experts) + " experts", "");
  if (values.rows != 1 || values.columns != count) {
    throw WeightFailure(name + "found " + shape_of(values) + ", expected [1, " + std::to_string(count) + "]", "");
  }
  if (loaded_[index][static_cast<std::size_t>(expert)]) throw WeightFailure(name + "it was loaded before", "");
  for (std::size_t p = 0; p < parts_.size(); ++p) {
    const Part& part = parts_[p];
    if (part.begin >= part.end) continue;
    if (piece == Piece::down) {
      float* to = down(static_cast<int>(p), expert).bias(0);
      for (std::int64_t i = 0; i < count; ++i) to[i] = load_element(values, 0, i);
      continue;
    }
    const PackedMatrix matrix = gate_up(static_cast<int>(p), expert);
    for (std::int64_t i = part.begin; i < part.end; ++i) {
      const std::int64_t feature = i - places_[p].frame_begin;
      matrix.bias(2 * (feature / kPanelColumns) + static_cast<int>(piece))[feature % kPanelColumns] = load_element(values, 0, i);
    }
  }
  loaded_[index][static_cast<std::size_t>(expert)] = true;
  --missing_count_;
}

std::vector<std::string> ExpertsWeights::missing() const {
  std::vector<std::string> names;
  for (int piece = 0; piece < 6; ++piece) {
    const auto absent = std::count(loaded_[piece].begin(), loaded_[piece].end(), false);
    if (absent == 0) continue;
    if (absent == shape_.experts) {
      names.emplace_back(kNames[piece]);
      continue;
    }
    for (std::size_t expert = 0; expert < loaded_[piece].size(); ++expert) {
      if (!loaded_[piece][expert]) names.push_back(std::string(kNames[piece]) + " of expert " + std::to_string(expert));
    }
  }
  return names;
}

void ExpertsWeights::unpack(Piece piece, std::int64_t expert, const MatrixView& out, int replica) const {
  const std::int64_t rows = piece == Piece::down ? shape_.hidden : shape_.intermediate;
  const std::int64_t columns = piece == Piece::down ? shape_.intermediate : shape_.hidden;
  if (expert < 0 || expert >= shape_.experts || out.rows != rows || out.columns != columns) {
    throw WeightFailure(owner_ + ": unpack of expert " + std::to_string(expert) + " into " + shape_of(out) + ", expected one of " +
                            std::to_string(shape_.experts) + " experts into [" + std::to_string(rows) + ", " + std::to_string(columns) + "]",
                        "");
  }
  for (const Shard& shard : teams_.shards()) {
    if (replica < 0 || replica >= static_cast<int>(shard.parts.size())) {
      throw ConfigurationFailure(owner_ + ": there is no replica " + std::to_string(replica) + " of a part with " + std::to_string(shard.parts.size()), "");
    }
    const int part = shard.parts[static_cast<std::size_t>(replica)];
    const ExpertsPlace& place = places_[static_cast<std::size_t>(part)];
    RowUnpacker unpacker;
    if (piece == Piece::down) {
      for (std::int64_t r = 0; r < rows; ++r) {
        const float* row = unpacker.row(down(part, expert), r);
        for (std::int64_t k = shard.begin; k < shard.end; ++k) store_element(out, r, k, row[k - place.frame_begin]);
      }
      continue;
    }
    for (std::int64_t r = shard.begin; r < shard.end; ++r) {
      const std::int64_t feature = r - place.frame_begin;
      const std::int64_t panel = 2 * (feature / kPanelColumns) + static_cast<int>(piece);
      const float* row = unpacker.row(gate_up(part, expert), panel * kPanelColumns + feature % kPanelColumns);
      for (std::int64_t k = 0; k < columns; ++k) store_element(out, r, k, row[k]);
    }
  }
}

}  // namespace numagraft

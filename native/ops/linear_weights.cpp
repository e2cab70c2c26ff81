// The packed weights of a linear layer and their loading; linear.cpp computes with them.
#include "ops/linear.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <utility>

#include "system/error.h"

namespace numagraft {
namespace {

constexpr std::int64_t kShardKey = std::int64_t{1} << 40;

std::string shape_of(const MatrixView& m) { return "[" + std::to_string(m.rows) + ", " + std::to_string(m.columns) + "]"; }

}  // namespace

std::int64_t linear_packed_bytes(std::int64_t out_features, std::int64_t in_features, const WeightFormat& format, bool has_bias,
                                 const Part& part) {
  (void)out_features;
  if (part.begin >= part.end) return 0;
  return static_cast<std::int64_t>(place_matrix(format, part.end - part.begin, in_features, has_bias, 0).end);
}

LinearWeights::LinearWeights(std::shared_ptr<Runtime> runtime, std::int64_t out_features, std::int64_t in_features,
                             const WeightFormat& format, std::vector<Part> parts, bool has_bias, std::string owner,
                             const KernelTable& kernels)
    : runtime_(std::move(runtime)),
      kernels_(&kernels),
      out_features_(out_features),
      in_features_(in_features),
      format_(format),
      parts_(std::move(parts)),
      has_bias_(has_bias),
      owner_(std::move(owner)),
      teams_(*runtime_, parts_, out_features, owner_),
      row_loaded_(static_cast<std::size_t>(out_features), false),
      traffic_(runtime_->nodes().size()) {
  if (const auto problems = format_problems(format); !problems.empty()) {
    std::string text = owner_ + ": the weight format cannot be packed";
    for (const std::string& problem : problems) text += "\n  " + problem;
    throw ConfigurationFailure(text, "");
  }
  try {
    for (const Part& part : parts_) {
      places_.push_back(place_matrix(format_, std::max<std::int64_t>(part.end - part.begin, 0), in_features_, has_bias_, 0));
      buffers_.push_back(part.begin < part.end ? runtime_->allocate(places_.back().end, part.memory, owner_) : Buffer{});
    }
  } catch (...) {
    for (const Buffer& buffer : buffers_) {
      if (buffer.data != nullptr) runtime_->release(buffer);
    }
    throw;
  }
}

LinearWeights::~LinearWeights() {
  for (const Buffer& buffer : buffers_) {
    if (buffer.data != nullptr) runtime_->release(buffer);
  }
}

std::int64_t LinearWeights::packed_bytes() const {
  std::int64_t total = 0;
  for (const Part& part : parts_) total += linear_packed_bytes(out_features_, in_features_, format_, has_bias_, part);
  return total;
}

void LinearWeights::check_rows(const WeightSource& matrix, std::int64_t first_row) const {
  std::string problems;
  if (matrix.columns != in_features_) {
    problems += "\n  found " + std::to_string(matrix.columns) + " input features, expected " + std::to_string(in_features_);
  }
  if (first_row < 0 || matrix.rows < 0 || first_row + matrix.rows > out_features_) {
    problems += "\n  found rows " + std::to_string(first_row) + " to " + std::to_string(first_row + matrix.rows) + ", expected rows within 0 to " +
                std::to_string(out_features_);
  } else {
    std::int64_t twice = 0;
    std::int64_t first = -1;
    for (std::int64_t row = first_row; row < first_row + matrix.rows; ++row) {
      if (!row_loaded_[static_cast<std::size_t>(row)]) continue;
      if (first < 0) first = row;
      ++twice;
    }
    if (twice > 0) problems += "\n  " + std::to_string(twice) + " rows were loaded before, the first of them row " + std::to_string(first);
  }
  problems += source_problems(matrix);
  if ((matrix.quantised() || matrix.in_file()) && (first_row != 0 || matrix.rows != out_features_)) {
    problems += "\n  quantised weights and weights in a file come whole, found " + std::to_string(matrix.rows) + " of " + std::to_string(out_features_) + " rows";
  }
  if (!problems.empty()) {
    throw WeightFailure(owner_ + ": weight " + shape_of(matrix) + " at row " + std::to_string(first_row) + " does not fit" + problems, "");
  }
}

void LinearWeights::load_weight(const WeightSource& source, std::int64_t first_row) {
  check_rows(source, first_row);
  const std::int64_t last_row = first_row + source.rows;
  // Panels wholly inside the piece are packed from it; the rows of others wait until their panel is complete.
  struct Ready {
    std::int64_t panel;
    std::vector<float> rows;
  };
  std::vector<Range> whole(teams_.shards().size());
  std::vector<std::vector<Ready>> completed(teams_.shards().size());
  for (std::size_t s = 0; s < teams_.shards().size(); ++s) {
    const Shard& shard = teams_.shards()[s];
    const std::int64_t begin = std::max(shard.begin, first_row);
    const std::int64_t end = std::min(shard.end, last_row);
    if (begin >= end) continue;
    const std::int64_t shard_rows = shard.end - shard.begin;
    std::int64_t first_whole = (begin - shard.begin + kPanelColumns - 1) / kPanelColumns;
    std::int64_t last_whole = end == shard.end ? (shard_rows + kPanelColumns - 1) / kPanelColumns : (end - shard.begin) / kPanelColumns;
    if (last_whole < first_whole) last_whole = first_whole;
    whole[s] = {first_whole, last_whole};
    for (std::int64_t panel = (begin - shard.begin) / kPanelColumns; panel * kPanelColumns + shard.begin < end; ++panel) {
      if (panel >= first_whole && panel < last_whole) {
        panel = last_whole - 1;
        continue;
      }
      const std::int64_t panel_begin = shard.begin + panel * kPanelColumns;
      const std::int64_t panel_end = std::min(panel_begin + kPanelColumns, shard.end);
      const std::int64_t key = static_cast<std::int64_t>(s) * kShardKey + panel;
      std::vector<float>& rows = pending_[key];
      rows.resize(static_cast<std::size_t>((panel_end - panel_begin) * in_features_));
      for (std::int64_t row = std::max(begin, panel_begin); row < std::min(end, panel_end); ++row) {
        for (std::int64_t k = 0; k < in_features_; ++k) {
          rows[static_cast<std::size_t>((row - panel_begin) * in_features_ + k)] = load_element(source, row - first_row, k);
        }
      }
      bool complete = true;
      for (std::int64_t row = panel_begin; row < panel_end && complete; ++row) {
        complete = (row >= begin && row < end) || row_loaded_[static_cast<std::size_t>(row)];
      }
      if (complete) {
        completed[s].push_back({panel, std::move(rows)});
        pending_.erase(key);
      }
    }
  }
  std::atomic<double> power{0};
  runtime_->run(teams_.nodes(), [&](const Worker& worker, Barriers&) {
    for (const Role& role : teams_.roles(worker)) {
      const auto s = static_cast<std::size_t>(role.shard);
      const Shard& shard = teams_.shards()[s];
      const PackedMatrix to = matrix(role.part);
      double own_power = 0;
      double* const counted = role.replica == 0 ? &own_power : nullptr;
      std::byte* staged = runtime_->scratch(worker, pack_scratch_bytes(to.layout(), source));
      const Range mine = share(whole[s].end - whole[s].begin, role.replica_rank, role.replica_size);
      for (std::int64_t i = mine.begin; i < mine.end; ++i) {
        const std::int64_t panel = whole[s].begin + i;
        pack_panel(*kernels_, to, panel, source, shard.begin + panel * kPanelColumns - first_row, 0,
                   std::min(shard.end - first_row, source.rows), 0, staged, counted);
      }
      for (std::size_t i = 0; i < completed[s].size(); ++i) {
        if (static_cast<int>(i % static_cast<std::size_t>(role.replica_size)) != role.replica_rank) continue;
        const Ready& ready = completed[s][i];
        const auto rows = static_cast<std::int64_t>(ready.rows.size()) / in_features_;
        const MatrixView view{ready.rows.data(), DType::f32, rows, in_features_, in_features_, 1};
        pack_panel(*kernels_, to, ready.panel, view, 0, 0, rows, 0, staged, counted);
      }
      power.fetch_add(own_power);
    }
  });
  for (std::int64_t row = first_row; row < last_row; ++row) row_loaded_[static_cast<std::size_t>(row)] = true;
  rows_loaded_ += source.rows;
  weight_power_ += power;
  if (rows_loaded_ == out_features_) measure_rerounding();
}

// Over the whole matrix, whatever its placement: all parts then prepare inputs alike.
void LinearWeights::measure_rerounding() {
  if (format_.kind != WeightKind::int4 && format_.kind != WeightKind::mxfp4) return;
  double noise = 0;
  for (const Shard& shard : teams_.shards()) {
    if (shard.begin < shard.end) noise += rerounding_noise(matrix(shard.parts[0]));
  }
  rerounding_ = weight_power_ > 0 ? static_cast<float>(std::sqrt(noise / weight_power_)) : 0.0f;
}

void LinearWeights::load_bias(const MatrixView& source) {
  if (!has_bias_) throw WeightFailure(owner_ + ": found a bias, expected none", "");
  if (source.rows != 1 || source.columns != out_features_) {
    throw WeightFailure(owner_ + ": found a bias " + shape_of(source) + ", expected [1, " + std::to_string(out_features_) + "]", "");
  }
  if (bias_loaded_) throw WeightFailure(owner_ + ": the bias was loaded before", "");
  for (std::size_t p = 0; p < parts_.size(); ++p) {
    if (parts_[p].begin >= parts_[p].end) continue;
    float* to = matrix(static_cast<int>(p)).bias(0);
    for (std::int64_t i = parts_[p].begin; i < parts_[p].end; ++i) to[i - parts_[p].begin] = load_element(source, 0, i);
  }
  bias_loaded_ = true;
}

std::vector<std::string> LinearWeights::missing() const {
  std::vector<std::string> names;
  if (rows_loaded_ == 0) {
    names.push_back("weight");
  } else if (rows_loaded_ < out_features_) {
    std::int64_t first = 0;
    while (row_loaded_[static_cast<std::size_t>(first)]) ++first;
    names.push_back("weight (" + std::to_string(out_features_ - rows_loaded_) + " rows, the first of them row " + std::to_string(first) + ")");
  }
  if (has_bias_ && !bias_loaded_) names.push_back("bias");
  return names;
}

void LinearWeights::unpack(const MatrixView& out, int replica) const {
  if (out.rows != out_features_ || out.columns != in_features_) {
    throw WeightFailure(owner_ + ": unpack into " + shape_of(out) + ", expected [" + std::to_string(out_features_) + ", " + std::to_string(in_features_) + "]", "");
  }
  RowUnpacker unpacker;
  for (const Shard& shard : teams_.shards()) {
    if (replica < 0 || replica >= static_cast<int>(shard.parts.size())) {
      throw ConfigurationFailure(owner_ + ": there is no replica " + std::to_string(replica) + " of a part with " + std::to_string(shard.parts.size()), "");
    }
    for (std::int64_t r = shard.begin; r < shard.end; ++r) {
      const float* row = unpacker.row(matrix(shard.parts[static_cast<std::size_t>(replica)]), r - shard.begin);
      for (std::int64_t k = 0; k < in_features_; ++k) store_element(out, r, k, row[k]);
    }
  }
}

}  // namespace numagraft

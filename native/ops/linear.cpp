#include "ops/linear.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <utility>

#include "system/error.h"

namespace numagraft {
namespace {

constexpr std::int64_t kSelfPreparedRows = 2;    // up to here every worker prepares all rows itself: cheaper than a barrier
constexpr std::int64_t kSplitReplicaRows = 64;   // from here replicas split the rows instead of the columns
constexpr std::int64_t kSplitRows = 384;         // from here workers split the rows instead of the columns
constexpr std::int64_t kPreparedBytes = 1 << 20; // prepared rows that a worker keeps in its L2 while it goes over the panels
constexpr std::int64_t kSlabBytes = 64 << 20;    // prepared rows of one slab of a call
constexpr std::int64_t kShardKey = std::int64_t{1} << 40;

std::string shape_of(const MatrixView& m) { return "[" + std::to_string(m.rows) + ", " + std::to_string(m.columns) + "]"; }

}  // namespace

// Held to 1.2 % of the output on the real model's layers, the worst of which raises errors by half. Tiles re-round int4
// weights to 8 bits, which takes 1.1 % there already: inputs must then cost next to nothing.
float linear_input_error(const WeightFormat& format, bool rerounded) {
  if (format.activations == Activations::bf16) return 0.0f;
  return rerounded ? 0.0010f : 0.0090f;
}

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
      row_loaded_(static_cast<std::size_t>(out_features), false) {
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
  runtime_->run(teams_.nodes(), [&](const Worker& worker, Barriers&) {
    for (const Role& role : teams_.roles(worker)) {
      const auto s = static_cast<std::size_t>(role.shard);
      const Shard& shard = teams_.shards()[s];
      const PackedMatrix to = matrix(role.part);
      std::byte* staged = runtime_->scratch(worker, pack_scratch_bytes(to.layout(), source));
      const Range mine = share(whole[s].end - whole[s].begin, role.replica_rank, role.replica_size);
      for (std::int64_t i = mine.begin; i < mine.end; ++i) {
        const std::int64_t panel = whole[s].begin + i;
        pack_panel(*kernels_, to, panel, source, shard.begin + panel * kPanelColumns - first_row, 0,
                   std::min(shard.end - first_row, source.rows), 0, staged);
      }
      for (std::size_t i = 0; i < completed[s].size(); ++i) {
        if (static_cast<int>(i % static_cast<std::size_t>(role.replica_size)) != role.replica_rank) continue;
        const Ready& ready = completed[s][i];
        const auto rows = static_cast<std::int64_t>(ready.rows.size()) / in_features_;
        const MatrixView view{ready.rows.data(), DType::f32, rows, in_features_, in_features_, 1};
        pack_panel(*kernels_, to, ready.panel, view, 0, 0, rows, 0, staged);
      }
    }
  });
  for (std::int64_t row = first_row; row < last_row; ++row) row_loaded_[static_cast<std::size_t>(row)] = true;
  rows_loaded_ += source.rows;
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
  std::vector<float> row(static_cast<std::size_t>(in_features_));
  for (const Shard& shard : teams_.shards()) {
    if (replica < 0 || replica >= static_cast<int>(shard.parts.size())) {
      throw ConfigurationFailure(owner_ + ": there is no replica " + std::to_string(replica) + " of a part with " + std::to_string(shard.parts.size()), "");
    }
    for (std::int64_t r = shard.begin; r < shard.end; ++r) {
      unpack_row(matrix(shard.parts[static_cast<std::size_t>(replica)]), r - shard.begin, row.data());
      for (std::int64_t k = 0; k < in_features_; ++k) store_element(out, r, k, row[static_cast<std::size_t>(k)]);
    }
  }
}

// One slab of rows of one forward.
struct LinearWeights::Call {
  MatrixView x;
  MatrixView out;
  std::int64_t first = 0;
  std::int64_t rows = 0;
  bool split_replicas = false;
  bool split_rows = false;
  float error = 0;

  // Rows of the slab that the role's replica computes; whole blocks.
  Range replica_rows(const Role& role) const {
    if (!split_replicas || role.replicas == 1) return {0, rows};
    const std::int64_t blocks = (rows + kBlockRows - 1) / kBlockRows;
    const Range mine = share(blocks, role.replica, role.replicas);
    return {mine.begin * kBlockRows, std::min(mine.end * kBlockRows, rows)};
  }
};

void LinearWeights::forward(const MatrixView& x, const MatrixView& out) {
  if (x.columns != in_features_ || out.columns != out_features_ || x.rows != out.rows) {
    throw WeightFailure(owner_ + ": found input " + shape_of(x) + " and output " + shape_of(out) + ", expected [T, " + std::to_string(in_features_) +
                            "] and [T, " + std::to_string(out_features_) + "]",
                        "");
  }
  if (out.column_stride != 1 && out.columns > 1 && out.rows > 0) throw WeightFailure(owner_ + ": the output's columns must be contiguous", "");
  if (const auto names = missing(); !names.empty()) {
    throw WeightFailure(owner_ + ": computing with weights that never arrived: " + names[0], "load every weight first");
  }
  if (x.rows == 0 || out_features_ == 0) return;
  const auto start = std::chrono::steady_clock::now();
  const RowSet one(*kernels_, format_.kind, in_features_, kBlockRows);
  const std::int64_t slab = std::max<std::int64_t>(kSlabBytes / static_cast<std::int64_t>(one.bytes()), 8) * kBlockRows;
  for (std::int64_t first = 0; first < x.rows; first += slab) {
    Call call;
    call.x = x;
    call.out = out;
    call.first = first;
    call.rows = std::min(slab, x.rows - first);
    call.split_replicas = call.rows >= kSplitReplicaRows;
    call.split_rows = call.rows >= kSplitRows;
    const bool in_groups = format_.kind == WeightKind::int4 || format_.kind == WeightKind::mxfp4;
    const bool tiles = kernels_->tile_rows_from > 0 && call.rows >= kernels_->tile_rows_from;
    call.error = linear_input_error(format_, in_groups && tiles);
    const RowSet all(*kernels_, format_.kind, in_features_, call.rows);
    const bool shared = call.rows > kSelfPreparedRows;
    std::vector<std::shared_ptr<Runtime::SharedScratch>> leases(runtime_->nodes().size());
    if (shared) {
      for (int node : teams_.nodes()) {
        auto& lease = leases[static_cast<std::size_t>(node)];
        lease = runtime_->shared_scratch(all.bytes(), node);
        all.clear_flags(lease->data, 0, all.blocks());
      }
    }
    runtime_->run(teams_.nodes(), [&](const Worker& worker, Barriers& barriers) {
      Reader reader(traffic_);
      const std::vector<Role> roles = teams_.roles(worker);
      std::byte* prepared = shared ? leases[static_cast<std::size_t>(worker.node)]->data : nullptr;
      if (shared) {
        std::byte* row = runtime_->scratch(worker, static_cast<std::size_t>(in_features_) * sizeof(float) + 64);
        const Range rows = roles.size() == 1 ? call.replica_rows(roles[0]) : Range{0, call.rows};
        prepare_rows(call, worker, rows, prepared, row);
        barriers.node(worker);
      }
      for (const Role& role : roles) multiply(call, worker, role, prepared, reader);
    });
  }
  traffic_.add_call(std::chrono::steady_clock::now() - start);
}

namespace {

// A row whose values are contiguous: its own memory, or a copy.
const void* contiguous_row(const MatrixView& x, std::int64_t row, std::byte* copy, DType& dtype) {
  dtype = x.dtype;
  if (x.column_stride == 1) {
    const std::int64_t bytes = x.dtype == DType::f32 ? 4 : 2;
    return static_cast<const std::byte*>(x.data) + row * x.row_stride * bytes;
  }
  dtype = DType::f32;
  auto* values = reinterpret_cast<float*>(copy);
  for (std::int64_t k = 0; k < x.columns; ++k) values[k] = load_element(x, row, k);
  return values;
}

}  // namespace

void LinearWeights::prepare_rows(const Call& call, const Worker& worker, Range rows, std::byte* prepared, std::byte* scratch) const {
  const RowSet all(*kernels_, format_.kind, in_features_, call.rows);
  const Range mine = share(rows.end - rows.begin, worker.rank_in_node, worker.workers_in_node);
  for (std::int64_t row = rows.begin + mine.begin; row < rows.begin + mine.end; ++row) {
    DType dtype;
    const void* x = contiguous_row(call.x, call.first + row, scratch, dtype);
    all.prepare(prepared, row, x, dtype, call.error);
  }
}

void LinearWeights::multiply(const Call& call, const Worker& worker, const Role& role, std::byte* prepared, Reader& reader) {
  const RowSet all(*kernels_, format_.kind, in_features_, call.rows);
  const PackedMatrix weights = matrix(role.part);
  const Range rows = call.replica_rows(role);
  const bool own_rows = call.split_replicas && role.replicas > 1;
  int rank = own_rows ? role.replica_rank : role.rank;
  int size = own_rows ? role.replica_size : role.size;
  Range blocks{rows.begin / kBlockRows, (rows.end + kBlockRows - 1) / kBlockRows};
  Range panels{0, weights.layout().panels};
  if (call.split_rows) {
    const Range mine = share(blocks.end - blocks.begin, rank, size);
    blocks = {blocks.begin + mine.begin, blocks.begin + mine.end};
  } else {
    panels = share(panels.end, rank, size);
  }
  if (blocks.begin >= blocks.end || panels.begin >= panels.end) return;

  const std::int64_t block_bytes = static_cast<std::int64_t>(RowSet(*kernels_, format_.kind, in_features_, kBlockRows).bytes());
  const std::int64_t together = std::max<std::int64_t>(kPreparedBytes / block_bytes, 2);  // blocks that share a pass over the panels
  const std::int64_t most_rows = std::min(together, blocks.end - blocks.begin) * kBlockRows;
  const std::size_t own_bytes = prepared == nullptr ? (all.bytes() + 63) / 64 * 64 : 0;
  const std::size_t row_bytes = prepared == nullptr ? static_cast<std::size_t>(in_features_) * sizeof(float) + 64 : 0;
  const auto c_bytes = static_cast<std::size_t>(most_rows * kPanelColumns) * sizeof(float);
  std::byte* scratch = runtime_->scratch(worker, c_bytes + own_bytes + row_bytes);
  auto* c = reinterpret_cast<float*>(scratch);
  if (prepared == nullptr) {
    prepared = scratch + c_bytes;
    all.clear_flags(prepared, 0, all.blocks());
    for (std::int64_t row = 0; row < call.rows; ++row) {
      DType dtype;
      const void* x = contiguous_row(call.x, call.first + row, prepared + own_bytes, dtype);
      all.prepare(prepared, row, x, dtype, call.error);
    }
  }

  const Part& part = parts_[static_cast<std::size_t>(role.part)];
  const std::int64_t element = call.out.dtype == DType::f32 ? 4 : 2;
  std::vector<RowBlock> views(static_cast<std::size_t>(together));
  for (std::int64_t first = blocks.begin; first < blocks.end; first += together) {
    const std::int64_t count = std::min(together, blocks.end - first);
    std::int64_t row_count = 0;
    for (std::int64_t b = 0; b < count; ++b) {
      views[static_cast<std::size_t>(b)] = all.block(prepared, first + b);
      row_count += views[static_cast<std::size_t>(b)].rows;
    }
    for (std::int64_t panel = panels.begin; panel < panels.end; ++panel) {
      multiply_panels(*kernels_, weights, panel, 1, views.data(), count, c, most_rows * kPanelColumns);
      StoreArgs store{};
      store.c = c;
      store.bias = weights.bias(panel);
      store.rows = row_count;
      store.columns = static_cast<int>(std::min<std::int64_t>(kPanelColumns, part.end - part.begin - panel * kPanelColumns));
      store.dtype = call.out.dtype;
      store.row_stride = call.out.row_stride;
      store.out = static_cast<std::byte*>(const_cast<void*>(call.out.data)) +
                  ((call.first + first * kBlockRows) * call.out.row_stride + part.begin + panel * kPanelColumns) * element;
      kernels_->store(store);
    }
    reader.read(buffers_[static_cast<std::size_t>(role.part)], weights.panel_offset(panels.begin), weights.panel_offset(panels.end));
  }
}

}  // namespace numagraft

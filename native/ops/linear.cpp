// The forward of a linear layer; linear_weights.cpp loads it.
#include "ops/linear.h"

#include <algorithm>
#include <chrono>
#include <cmath>

#include "ops/chunk_queue.h"
#include "ops/work_split.h"
#include "system/error.h"

namespace numagraft {
namespace {

constexpr std::int64_t kSelfPreparedRows = 2;    // up to here every worker prepares all rows itself: cheaper than a barrier
constexpr std::int64_t kSplitReplicaRows = 64;   // from here replicas split the rows instead of the columns
constexpr std::int64_t kSplitRows = 384;         // from here workers split the rows instead of the columns
constexpr std::int64_t kPreparedBytes = 1 << 20; // prepared rows that a worker keeps in its L2 while it goes over the panels
constexpr float kFewHighHalves = 0.005f;         // input error from which high halves are few
constexpr float kLinearError = 0.0117f;          // of the output, all roundings together
constexpr float kBf16Output = 0.0017f;           // its last one
constexpr float kLightRerounding = 0.0085f;      // normally distributed weights: 0.0074 (mxfp4), 0.0078 (int4)
constexpr float kRerounding = 0.0002f;
constexpr float kWholeRerounding = 0.0050f;      // whole grids of int4: 0.0045
// Of normal rows few have a largest input that uses all they are allowed: of 4096 inputs 3.8 times their deviation in the mean,
// allowed 4.17 times. Each may take more than all of them together.
constexpr float kRarely = 1.07f;
constexpr std::int64_t kFewRows = 32;            // beyond, several panels' results are stored together: rows lie far apart
constexpr std::int64_t kPanelsTogether = 4;
constexpr std::int64_t kPanelsOfOneRow = 64;     // read as two halves side by side, see row_strips.h
constexpr std::int64_t kLeastPieceBytes = 32 << 10;  // of weights that a worker takes when it is done with its own
constexpr std::int64_t kSlabBytes = 64 << 20;    // prepared rows of one slab of a call
constexpr std::int64_t kChunksPerWorker = 4;     // of a queue: what the last to finish keep the others waiting is a quarter of it

std::string shape_of(const MatrixView& m) { return "[" + std::to_string(m.rows) + ", " + std::to_string(m.columns) + "]"; }

}  // namespace

// Held to 1.2 % of the output on the real model's layers, the worst of which raises errors by half. Tiles re-round int4
// weights to 8 bits, which takes 1.1 % there already: inputs must then cost next to nothing. Where neither the weights nor a
// row have values that stand out, errors add up as those of independent numbers do: the row may take what is left of 1.17 %.
// Beside exact weights a row may take nearly all of it: of thousands of normally distributed inputs then hardly one row in a
// hundred needs a second half, and the others err by what their own largest input makes of it (of 4096: 0.87 % in the mean).
InputErrors linear_input_errors(const WeightFormat& format, bool rerounded, float rerounding) {
  if (format.activations == Activations::bf16) return {};
  if (!rerounded) return {0.0090f, 0.0110f};
  if (rerounding > 0 && rerounding <= kWholeRerounding) return {0.0080f, 0.0102f};  // with it, as exact weights
  if (!(rerounding > 0) || rerounding > kLightRerounding) return {0.0010f, 0};
  // in steps, so that no placement's order of summation decides
  const float cost = std::ceil(rerounding / kRerounding) * kRerounding;
  const float left = std::sqrt(kLinearError * kLinearError - kBf16Output * kBf16Output - cost * cost);
  return {0.0010f, kRarely * left};
}

// One slab of rows of one forward.
struct LinearWeights::Call {
  MatrixView x;
  MatrixView out;
  std::int64_t first = 0;
  std::int64_t rows = 0;
  bool split_replicas = false;
  bool split_rows = false;
  InputErrors errors;

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
  if (teams_.mirrors().empty()) {
    compute(x, out, teams_.everyone(), nullptr);
  } else {
    const Runtime::Lease lease = runtime_->lease(teams_.mirrors());
    if (lease.groups().size() == teams_.mirrors().size()) {
      compute(x, out, teams_.everyone(), &lease);
    } else {
      compute(x, out, teams_.some(*runtime_, lease.groups()), &lease);
    }
  }
  traffic_.add_call(std::chrono::steady_clock::now() - start);
}

void LinearWeights::compute(const MatrixView& x, const MatrixView& out, const Roster& roster, const Runtime::Lease* lease) {
  const RowSet one(*kernels_, format_.kind, in_features_, kBlockRows);
  const std::int64_t slab = std::max<std::int64_t>(kSlabBytes / static_cast<std::int64_t>(one.bytes()), 8) * kBlockRows;
  const bool several_mirrors = lease != nullptr && lease->groups().size() > 1;
  for (std::int64_t first = 0; first < x.rows; first += slab) {
    Call call;
    call.x = x;
    call.out = out;
    call.first = first;
    call.rows = std::min(slab, x.rows - first);
    call.split_replicas = call.rows >= kSplitReplicaRows;
    call.split_rows = call.rows >= kSplitRows;
    const bool in_groups = is_grouped(format_.kind);
    const bool rerounded = kernels_->reround_rows_from > 0 && call.rows >= kernels_->reround_rows_from;
    call.errors = linear_input_errors(format_, in_groups && rerounded, rerounding_);
    if (several_mirrors && call.split_replicas) {
      compute_in_chunks(call, roster, *lease);
      continue;
    }
    const RowSet all(*kernels_, format_.kind, in_features_, call.rows);
    const bool shared = call.rows > kSelfPreparedRows;
    std::vector<std::shared_ptr<Runtime::SharedScratch>> blocks(runtime_->nodes().size());
    if (shared) {
      for (int node : roster.nodes()) {
        auto& block = blocks[static_cast<std::size_t>(node)];
        block = runtime_->shared_scratch(all.bytes(), node, lease);
        all.clear_flags(block->data, 0, all.blocks());
      }
    }
    std::vector<std::deque<WorkSplit>> splits = split_panels(call, roster);
    const auto work = [&](const Worker& worker, Barriers& barriers) {
      Reader reader = reader_of(worker);
      const std::vector<Role> roles = roster.roles(worker);
      const std::size_t row_bytes = static_cast<std::size_t>(in_features_) * sizeof(float) + 64;
      const std::size_t own_bytes = shared ? 0 : (all.bytes() + 63) / 64 * 64;
      const std::size_t c_bytes = sums_bytes(call, all.blocks());
      std::byte* const scratch = runtime_->scratch(worker, c_bytes + own_bytes + row_bytes);
      std::byte* const prepared = shared ? blocks[static_cast<std::size_t>(worker.node)]->data : scratch + c_bytes;
      Range rows = shared && roles.size() == 1 ? call.replica_rows(roles[0]) : Range{0, call.rows};
      if (shared) {
        const Range mine = share(rows.end - rows.begin, worker.rank_in_node, worker.workers_in_node);
        rows = {rows.begin + mine.begin, rows.begin + mine.end};
      } else {
        all.clear_flags(prepared, 0, all.blocks());
      }
      prepare_rows(call, rows, prepared, scratch + c_bytes + own_bytes);
      if (shared) barriers.node(worker);
      for (const Role& role : roles) {
        const auto replica = static_cast<std::size_t>(call.split_replicas ? role.replica : 0);
        WorkSplit* split = call.split_rows ? nullptr : &splits[static_cast<std::size_t>(role.shard)][replica];
        multiply(call, worker, role, split, prepared, reinterpret_cast<float*>(scratch), reader);
      }
    };
    lease != nullptr ? runtime_->run(*lease, work, Pinning::watched) : runtime_->run(roster.nodes(), work, Pinning::watched);
  }
}

// By shard, and by replica where these divide the rows; nothing where workers do.
std::vector<std::deque<WorkSplit>> LinearWeights::split_panels(const Call& call, const Roster& roster) const {
  std::vector<std::deque<WorkSplit>> splits(teams_.shards().size());
  if (call.split_rows) return splits;
  for (int node : roster.nodes()) {
    for (const Role& role : roster.roles_of_first(node)) {
      auto& of_shard = splits[static_cast<std::size_t>(role.shard)];
      if (static_cast<int>(of_shard.size()) > (call.split_replicas ? role.replica : 0)) continue;
      const Layout& layout = places_[static_cast<std::size_t>(role.part)].layout;
      const std::int64_t pairs = (kLeastPieceBytes / 2 + layout.panel_bytes - 1) / layout.panel_bytes;
      const int workers = call.split_replicas ? role.replica_size : role.size;
      of_shard.emplace_back(layout.panels, workers, kernels_->in_order, kernels_->in_order ? 2 * pairs : 1);
    }
  }
  return splits;
}

// Replicas divide the rows by their workers, and whoever is done with its own takes chunks of the others.
void LinearWeights::compute_in_chunks(const Call& call, const Roster& roster, const Runtime::Lease& lease) {
  const RowSet all(*kernels_, format_.kind, in_features_, call.rows);
  const std::int64_t panels = places_[static_cast<std::size_t>(teams_.shards()[0].parts[0])].layout.panels;
  const std::int64_t together = blocks_together();
  enum Stage { kPrepare, kMultiply };
  struct Queued {
    Range rows;               // whole blocks
    std::int64_t step = 1;    // rows of one chunk of preparing
    std::int64_t groups = 1;  // of blocks, and pieces of the panels: together the chunks of multiplying
    std::int64_t pieces = 1;
    std::shared_ptr<Runtime::SharedScratch> prepared;
    Range blocks() const { return {rows.begin / kBlockRows, (rows.end + kBlockRows - 1) / kBlockRows}; }
  };
  std::vector<Queued> queued(lease.groups().size());
  Exchange exchange(queued.size(), runtime_->stealing());
  for (int node : roster.nodes()) {
    const Role& role = roster.roles_of_first(node)[0];
    Queued& mine = queued[static_cast<std::size_t>(role.replica)];
    if (mine.prepared != nullptr) continue;  // a replica of several nodes
    const Range blocks = share_of_replica(all.blocks(), role);
    const std::int64_t count = blocks.end - blocks.begin;
    mine.rows = {blocks.begin * kBlockRows, std::min(blocks.end * kBlockRows, call.rows)};
    mine.prepared = runtime_->shared_scratch(all.bytes(), node, &lease);
    all.clear_flags(mine.prepared->data, blocks.begin, blocks.end);
    const std::int64_t rows = std::max<std::int64_t>(mine.rows.end - mine.rows.begin, 0);
    const std::int64_t wanted = kChunksPerWorker * role.replica_size;
    mine.step = std::max<std::int64_t>(rows / wanted, 1);
    mine.groups = (count + together - 1) / together;
    mine.pieces = std::min(panels, (wanted + mine.groups - 1) / std::max<std::int64_t>(mine.groups, 1));
    if (mine.groups * mine.pieces < wanted) mine.groups = std::min(count, (wanted + mine.pieces - 1) / mine.pieces);
    ChunkQueue& queue = exchange.queue(static_cast<std::size_t>(role.replica));
    queue.add_stage((rows + mine.step - 1) / mine.step);
    queue.add_stage(mine.groups * mine.pieces);
  }
  runtime_->run(lease, [&](const Worker& worker, Barriers& barriers) {
    Reader reader = reader_of(worker);
    const Role role = roster.roles(worker)[0];
    exchange.work(static_cast<std::size_t>(role.replica), barriers.spin(), [&](std::size_t owner, ChunkQueue::Chunk chunk) {
      runtime_->delay_chunk(worker.node);
      reader.begin_chunk(static_cast<int>(owner) != role.replica);
      const Queued& of = queued[owner];
      if (chunk.stage == kPrepare) {
        std::byte* row = runtime_->scratch(worker, static_cast<std::size_t>(in_features_) * sizeof(float) + 64);
        const std::int64_t begin = of.rows.begin + chunk.index * of.step;
        prepare_rows(call, {begin, std::min(begin + of.step, of.rows.end)}, of.prepared->data, row);
        return;
      }
      const Range own = of.blocks();
      const std::int64_t count = own.end - own.begin;
      const std::int64_t group = chunk.index / of.pieces;
      const std::int64_t piece = chunk.index % of.pieces;
      const Range blocks{own.begin + count * group / of.groups, own.begin + count * (group + 1) / of.groups};
      auto* c = reinterpret_cast<float*>(runtime_->scratch(worker, sums_bytes(call, blocks.end - blocks.begin)));
      multiply_blocks(call, role.part, blocks, {panels * piece / of.pieces, panels * (piece + 1) / of.pieces}, of.prepared->data, c, reader);
    });
  }, Pinning::watched);
}

void LinearWeights::prepare_rows(const Call& call, Range rows, std::byte* prepared, std::byte* scratch) const {
  const RowSet all(*kernels_, format_.kind, in_features_, call.rows);
  bool has_high[kBlockRows] = {};  // of a block
  for (std::int64_t row = rows.begin; row < rows.end; ++row) {
    const std::int64_t block = row / kBlockRows * kBlockRows;
    const std::int64_t block_end = std::min(block + kBlockRows, call.rows);
    // Others may be preparing the rest of a block.
    const bool own = block >= rows.begin && block_end <= rows.end;
    DType dtype;
    const void* x = contiguous_row(call.x, call.first + row, scratch, dtype);
    const void* next = row + 1 < rows.end && call.x.column_stride == 1 ? element_at(call.x, call.first + row + 1) : nullptr;
    all.prepare(prepared, row, x, dtype, call.errors.any, call.errors.normal, own ? has_high + (row - block) : nullptr, next);
    if (own && row + 1 == block_end) all.clear_high(prepared, block / kBlockRows, has_high);
  }
}

// Blocks that share a pass over the panels.
std::int64_t LinearWeights::blocks_together() const {
  const RowSet block(*kernels_, format_.kind, in_features_, kBlockRows);
  const bool rerounds = kernels_->reround_rows_from > 0 && is_grouped(format_.kind);
  // Inputs that keep 15 bits have a high half in nearly every unit.
  const InputErrors errors = linear_input_errors(format_, rerounds, rerounding_);
  const bool halves = std::max(errors.any, errors.normal) < kFewHighHalves;
  const auto block_bytes = static_cast<std::int64_t>(block.low_block_bytes()) * (halves ? 2 : 1);
  return std::max<std::int64_t>(kPreparedBytes / block_bytes, 2);
}

// Panels whose results are stored together, of a call with so many rows.
std::int64_t LinearWeights::panels_together(std::int64_t rows) const {
  if (rows == 1 && kernels_->in_order) return kPanelsOfOneRow;
  return rows > kFewRows || kernels_->in_order ? kPanelsTogether : 1;
}

// Results of a pass over up to so many blocks.
std::size_t LinearWeights::sums_bytes(const Call& call, std::int64_t blocks) const {
  return static_cast<std::size_t>(panels_together(call.rows) * std::min(blocks_together(), blocks) * kBlockRows * kPanelColumns) * sizeof(float);
}

// `split`: of the panels; null where workers split the rows.
void LinearWeights::multiply(const Call& call, const Worker& worker, const Role& role, WorkSplit* split, std::byte* prepared, float* c, Reader& reader) {
  const Range rows = call.replica_rows(role);
  const int rank = call.split_replicas ? role.replica_rank : role.rank;
  const Range blocks{rows.begin / kBlockRows, (rows.end + kBlockRows - 1) / kBlockRows};
  if (blocks.begin >= blocks.end) return;
  if (split != nullptr) {
    split->each(rank, [&](Range panels) {
      runtime_->delay_chunk(worker.node);
      multiply_blocks(call, role.part, blocks, panels, prepared, c, reader);
    });
    return;
  }
  const Range mine = share(blocks.end - blocks.begin, rank, call.split_replicas ? role.replica_size : role.size);
  const std::int64_t panels = places_[static_cast<std::size_t>(role.part)].layout.panels;
  if (mine.begin < mine.end && panels > 0) {
    multiply_blocks(call, role.part, {blocks.begin + mine.begin, blocks.begin + mine.end}, {0, panels}, prepared, c, reader);
  }
}

// `c`: sums_bytes() of the blocks.
void LinearWeights::multiply_blocks(const Call& call, int part_index, Range blocks, Range panels, std::byte* prepared, float* c, Reader& reader) {
  const RowSet all(*kernels_, format_.kind, in_features_, call.rows);
  const PackedMatrix weights = matrix(part_index);
  const std::int64_t together = blocks_together();
  const std::int64_t most_rows = std::min(together, blocks.end - blocks.begin) * kBlockRows;
  const std::int64_t panel_stride = most_rows * kPanelColumns;
  const std::int64_t step = panels_together(call.rows);
  const Part& part = parts_[static_cast<std::size_t>(part_index)];
  std::vector<RowBlock> views(static_cast<std::size_t>(together));
  for (std::int64_t first = blocks.begin; first < blocks.end; first += together) {
    const std::int64_t count = std::min(together, blocks.end - first);
    std::int64_t row_count = 0;
    for (std::int64_t b = 0; b < count; ++b) {
      views[static_cast<std::size_t>(b)] = all.block(prepared, first + b);
      row_count += views[static_cast<std::size_t>(b)].rows;
    }
    for (std::int64_t panel = panels.begin; panel < panels.end; panel += step) {
      const std::int64_t now = std::min(step, panels.end - panel);
      multiply_panels(*kernels_, weights, panel, now, views.data(), count, c, panel_stride);
      StoreArgs store{};
      store.c = c;
      store.c_panel_stride = panel_stride;
      store.bias = weights.bias(panel);
      store.rows = row_count;
      store.columns = static_cast<int>(std::min(now * kPanelColumns, part.end - part.begin - panel * kPanelColumns));
      store.dtype = call.out.dtype;
      store.row_stride = call.out.row_stride;
      store.out = element_at(call.out, call.first + first * kBlockRows, part.begin + panel * kPanelColumns);
      kernels_->store(store);
    }
    reader.read(buffers_[static_cast<std::size_t>(part_index)], weights.panel_offset(panels.begin), weights.panel_offset(panels.end));
  }
}

}  // namespace numagraft

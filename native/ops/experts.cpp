// The forward of the experts; experts_weights.cpp loads them.
#include "ops/experts.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <deque>
#include <optional>

#include "ops/chunk_queue.h"
#include "ops/work_split.h"
#include "system/error.h"

namespace numagraft {
namespace {

constexpr std::int64_t kSelfPreparedTokens = 2;   // up to here every worker prepares all tokens itself: cheaper than a barrier
constexpr std::int64_t kSplitReplicaTokens = 64;  // from here replicas split the tokens instead of the columns
constexpr std::int64_t kFewRows = 4;              // experts with no more rows wait for memory: work is split by bytes
constexpr std::int64_t kGuidedTokens = 64;        // up to here workers take down's panels as they come: more would read all inner rows per piece
constexpr std::int64_t kItemsPerWorker = 6;       // of the dynamic split
constexpr std::int64_t kChunksPerWorker = 4;      // of the other stages, where nodes take from each other
constexpr std::int64_t kGatheredBytes = 1 << 20;  // prepared rows that stay in L2 while a worker goes over the panels
constexpr std::int64_t kGatheredForInt4 = 5 << 18;  // its weights take less of L2
// One more pass over an expert's rows reads its weights again: with 256 rows in the mean hardly an expert has more than these.
constexpr std::int64_t kMostGatheredRows = 320;
constexpr std::int64_t kResultBytes = 256 << 10;  // of one multiplication
constexpr std::int64_t kSumBytes = 4 << 20;       // fp32 sums of a pass over the experts; with each pass the inner rows come from L3
// The same where inputs are taken in pieces: a piece comes from L3 again for every group of panels.
constexpr std::int64_t kResultBytesInPieces = 512 << 10;
constexpr std::int64_t kSumBytesInPieces = 8 << 20;
constexpr std::int64_t kStreamedInnerBytes = 2 << 20;  // inner rows that caches would lose before they are read
constexpr std::int64_t kStreamedPreparedBytes = 16 << 20;  // the same of what they are quantised to (6 MiB: slower, 28: faster)
constexpr std::int64_t kSlabTokens = 2048;

std::size_t whole_lines(std::size_t bytes) { return (bytes + 63) / 64 * 64; }
std::string shape_of(std::int64_t rows, std::int64_t columns) { return "[" + std::to_string(rows) + ", " + std::to_string(columns) + "]"; }

// Rows that a multiplication takes together, so that it reads weights once, and how much of their inputs at a time, so that
// these stay in L2.
struct Pieces {
  std::int64_t blocks = 1;
  std::int64_t units = 0;
  bool whole = true;
  std::int64_t result_bytes() const { return whole ? kResultBytes : kResultBytesInPieces; }
  std::int64_t sum_bytes() const { return whole ? kSumBytes : kSumBytesInPieces; }
};
// Of `count` blocks those of each pass, where one takes up to `most`: nearly equal.
std::int64_t evenly(std::int64_t count, std::int64_t most) {
  const std::int64_t passes = (count + most - 1) / most;
  return (count + passes - 1) / passes;
}
// `block_bytes`: of a full block's inputs over k.
Pieces pieces_of(const Layout& weights, std::int64_t most_rows, std::size_t block_bytes) {
  Pieces pieces;
  const std::int64_t units = weights.units;
  pieces.blocks = std::clamp<std::int64_t>((most_rows + kBlockRows - 1) / kBlockRows, 1, kMostGatheredRows / kBlockRows);
  const std::int64_t rows = std::min(most_rows, kMostGatheredRows);
  const std::int64_t unit_bytes = std::max<std::int64_t>(rows * static_cast<std::int64_t>(block_bytes) / (kBlockRows * units), 1);
  const std::int64_t together = weights.kind == WeightKind::int4 ? kGatheredForInt4 : kGatheredBytes;
  pieces.units = std::max<std::int64_t>(together / unit_bytes / weights.span_units, 1) * weights.span_units;
  pieces.whole = pieces.units >= units;
  if (pieces.whole) pieces.units = units;
  return pieces;
}

// Rounding the inputs costs gate and up about the same, so their product 1.4 times as much. Inputs whose largest is below
// 4.6 times their typical size keep one half, and below 4.9 times where they are normally distributed: of 4096 such inputs the
// largest is 3.8 times in the mean, and only one row in 300 goes to that limit, so tiles that re-round int4 and mxfp4, which
// adds an error of its own, may take it as well (Gaussian, before and after: int4 0.0150 and 0.0150, mxfp4 0.0190 and 0.0191).
InputErrors input_errors(const WeightFormat& format, bool rerounds) {
  if (format.activations == Activations::bf16) return {};
  const bool rerounded = rerounds && is_grouped(format.kind);
  return {rerounded ? 0.0090f : 0.0105f, 0.0112f};
}
// silu(g) u is heavy-tailed: of 32 rows, every unit of 64 inputs has some that exceed one half. A list takes as long as it has
// entries: at 0.85 % allowed it would hold 14 % of the groups of four, at kListedError 3.5 %.
float inner_error(const WeightFormat& format, HighHalves high) {
  if (format.activations == Activations::bf16) return 0.0f;
  return high == HighHalves::listed ? kListedError : 0.0085f;
}

}  // namespace

// What one team computes of a slab: all tokens, or those of its replica.
struct ExpertsWeights::Work {
  int shard = 0;
  Range tokens;  // within the slab
  const Routing* routing = nullptr;
  std::vector<RowSet> inner_rows;          // by expert of the routing
  std::vector<std::size_t> inner_offsets;  // of their prepared rows
  std::shared_ptr<Runtime::SharedScratch> lease;
  std::uint16_t* inner = nullptr;          // [pair][frame] bf16
  std::byte* prepared = nullptr;
  float* partial = nullptr;                // [token][hidden], when shards are to be added
  std::shared_ptr<Runtime::SharedScratch> partial_lease;
  std::vector<std::pair<std::size_t, Range>> items;  // expert of the routing, pairs of panels
  std::atomic<std::size_t> next_item{0};
  std::optional<WorkSplit> pairs;                  // without items: of all experts, one after the other
  std::optional<WorkSplit> down_panels;            // of few tokens
  int workers = 0;                                   // of its team
  std::shared_ptr<Runtime::SharedScratch> inputs;    // prepared tokens of the slab, where nodes take from each other
};

enum Stage { kPrepareInputs, kGateAndUp, kPrepareInner, kDown };  // of a work whose chunks nodes take from each other

struct ExpertsWeights::Call {
  MatrixView x;
  MatrixView out;
  Range tokens;  // of the slab
  bool split_replicas = false;
  bool self_prepared = false;
  bool in_chunks = false;  // replicas take from each other's work
  HighHalves inner_high = HighHalves::apart;  // of inner rows: decided for all tokens of a call, so that every placement agrees
  std::deque<Routing> routings;
  std::deque<Work> works;
  std::vector<std::vector<Work*>> works_of_shard;
  std::vector<std::shared_ptr<Runtime::SharedScratch>> inputs;  // by node
};

// A worker at one of its works.
struct ExpertsWeights::Seat {
  Role role;
  int node = 0;
  Work* work = nullptr;
  int rank = 0;
  int size = 0;
  std::byte* inputs = nullptr;  // prepared tokens of the work
  std::byte* gathered = nullptr;
  std::int64_t gathered_rows = 0;
  Pieces pieces;  // of gathered rows
  float* c = nullptr;
  float* sums = nullptr;
  std::vector<RowBlock> blocks;
};

void ExpertsWeights::forward(const MatrixView& x, const ExpertIds& ids, const MatrixView& weights, const MatrixView& out) {
  if (x.columns != shape_.hidden || out.columns != shape_.hidden || x.rows != out.rows || ids.tokens != x.rows || weights.rows != x.rows ||
      weights.columns != ids.slots) {
    throw WeightFailure(owner_ + ": found input " + shape_of(x.rows, x.columns) + ", ids " + shape_of(ids.tokens, ids.slots) + ", weights " +
                            shape_of(weights.rows, weights.columns) + ", output " + shape_of(out.rows, out.columns) + "; expected [T, " +
                            std::to_string(shape_.hidden) + "], [T, k], [T, k], [T, " + std::to_string(shape_.hidden) + "]",
                        "");
  }
  if (out.column_stride != 1 && out.columns > 1 && out.rows > 0) throw WeightFailure(owner_ + ": the output's columns must be contiguous", "");
  if (missing_count_ > 0) throw WeightFailure(owner_ + ": computing with weights that never arrived: " + missing()[0], "load every weight first");
  check_ids(ids, shape_.experts, owner_);
  if (x.rows == 0) return;
  const auto start = std::chrono::steady_clock::now();
  if (teams_.mirrors().empty()) {
    compute(x, ids, weights, out, teams_.everyone(), nullptr);
  } else {
    const Runtime::Lease lease = runtime_->lease(teams_.mirrors());
    if (lease.groups().size() == teams_.mirrors().size()) {
      compute(x, ids, weights, out, teams_.everyone(), &lease);
    } else {
      compute(x, ids, weights, out, teams_.some(*runtime_, lease.groups()), &lease);
    }
  }
  traffic_.add_call(std::chrono::steady_clock::now() - start);
}

void ExpertsWeights::compute(const MatrixView& x, const ExpertIds& ids, const MatrixView& weights, const MatrixView& out, const Roster& roster,
                             const Runtime::Lease* lease) {
  for (std::int64_t first = 0; first < x.rows; first += kSlabTokens) {
    Call call;
    call.x = x;
    call.out = out;
    call.tokens = {first, std::min(first + kSlabTokens, x.rows)};
    const std::int64_t tokens = call.tokens.end - call.tokens.begin;
    call.split_replicas = tokens >= kSplitReplicaTokens;
    call.self_prepared = tokens <= kSelfPreparedTokens;
    call.inner_high = inner_high(x.rows * ids.slots);
    call.in_chunks = call.split_replicas && lease != nullptr && lease->groups().size() > 1;
    const auto& shards = teams_.shards();
    call.works_of_shard.resize(shards.size());
    for (int node : roster.nodes()) {
      for (const Role& role : roster.roles_of_first(node)) {
        const auto s = static_cast<std::size_t>(role.shard);
        const int replica = call.split_replicas ? role.replica : 0;
        if (static_cast<int>(call.works_of_shard[s].size()) > replica) continue;
        Work& work = call.works.emplace_back();
        call.works_of_shard[s].push_back(&work);
        work.shard = role.shard;
        work.tokens = call.split_replicas ? share_of_replica(tokens, role) : Range{0, tokens};
        work.workers = call.split_replicas ? role.replica_size : role.size;
        const Range absolute{first + work.tokens.begin, first + work.tokens.end};
        for (std::size_t other = 0; other < s && work.routing == nullptr; ++other) {
          for (const Work* same : call.works_of_shard[other]) {
            if (same->tokens.begin == work.tokens.begin && same->tokens.end == work.tokens.end) work.routing = same->routing;
          }
        }
        if (work.routing == nullptr) work.routing = &call.routings.emplace_back(route(ids, weights, absolute, shape_.experts));
        const ExpertsPlace& place = places_[static_cast<std::size_t>(role.part)];
        std::size_t bytes = whole_lines(static_cast<std::size_t>(work.routing->pairs() * place.frame) * 2);
        const std::size_t prepared_at = bytes;
        for (const Routing::Expert& expert : work.routing->experts) {
          work.inner_rows.emplace_back(*kernels_, format_.kind, place.frame, expert.rows, kBlockRows, call.inner_high);
          work.inner_offsets.push_back(bytes - prepared_at);
          bytes += whole_lines(work.inner_rows.back().bytes());
        }
        work.lease = runtime_->shared_scratch(std::max<std::size_t>(bytes, 64), node, lease);
        work.inner = reinterpret_cast<std::uint16_t*>(work.lease->data);
        work.prepared = work.lease->data + prepared_at;
        for (std::size_t e = 0; e < work.inner_rows.size(); ++e) {
          work.inner_rows[e].clear_flags(work.prepared + work.inner_offsets[e], 0, work.inner_rows[e].blocks());
        }
        if (shards.size() > 1) {
          const std::int64_t own = work.tokens.end - work.tokens.begin;
          work.partial_lease = runtime_->shared_scratch(std::max<std::size_t>(static_cast<std::size_t>(own * shape_.hidden) * sizeof(float), 64), node, lease);
          work.partial = reinterpret_cast<float*>(work.partial_lease->data);
        }
        if (call.in_chunks) {
          const RowSet rows(*kernels_, format_.kind, shape_.hidden, tokens, 1);
          work.inputs = runtime_->shared_scratch(rows.bytes(), node, lease);
          rows.clear_flags(work.inputs->data, work.tokens.begin, work.tokens.end);
        }
        const std::int64_t pairs = place.frame / kPanelColumns;
        const auto active = static_cast<std::int64_t>(work.routing->experts.size());
        const bool in_items = call.in_chunks || work.routing->most_rows > kFewRows;
        if (!in_items) work.pairs.emplace(active * pairs, work.workers, kernels_->in_order);
        if (!call.in_chunks && tokens <= kGuidedTokens) work.down_panels.emplace(place.down.layout.panels, work.workers, kernels_->in_order, kernels_->in_order ? 2 : 1);
        if (in_items && active > 0) {
          const std::int64_t pieces = std::clamp<std::int64_t>((kItemsPerWorker * work.workers + active - 1) / active, 1, pairs);
          for (std::size_t e = 0; e < work.routing->experts.size(); ++e) {
            for (std::int64_t piece = 0; piece < pieces; ++piece) {
              work.items.push_back({e, Range{pairs * piece / pieces, pairs * (piece + 1) / pieces}});
            }
          }
          // Large ones first, so that the last to finish are small.
          std::stable_sort(work.items.begin(), work.items.end(), [&](const auto& a, const auto& b) {
            return work.routing->experts[a.first].rows > work.routing->experts[b.first].rows;
          });
        }
      }
    }
    if (!call.self_prepared && !call.in_chunks) {
      const RowSet rows(*kernels_, format_.kind, shape_.hidden, tokens, 1);
      call.inputs.resize(runtime_->nodes().size());
      for (int node : roster.nodes()) {
        auto& inputs = call.inputs[static_cast<std::size_t>(node)];
        inputs = runtime_->shared_scratch(rows.bytes(), node, lease);
        rows.clear_flags(inputs->data, 0, tokens);
      }
    }
    Exchange exchange(call.in_chunks ? call.works.size() : 0, runtime_->stealing());
    for (std::size_t w = 0; call.in_chunks && w < call.works.size(); ++w) {
      const Work& work = call.works[w];
      const std::int64_t most = kChunksPerWorker * work.workers;
      ChunkQueue& queue = exchange.queue(w);
      queue.add_stage(std::min(most, work.tokens.end - work.tokens.begin));
      queue.add_stage(static_cast<std::int64_t>(work.items.size()));
      queue.add_stage(std::min(most, work.routing->pairs()));
      queue.add_stage(work.tokens.begin < work.tokens.end ? std::min(most, places_[static_cast<std::size_t>(teams_.shards()[0].parts[0])].down.layout.panels) : 0);
    }

    const bool local = call.split_replicas ? roster.single_node_replicas() : roster.single_node_teams();
    const auto share_work = [&](const Worker& worker, Barriers& barriers) {
      Reader reader(traffic_, worker.node, runtime_->nodes()[static_cast<std::size_t>(worker.node)].os_node, worker.rank_in_node == 0);
      const auto meet = [&] { local ? barriers.node(worker) : barriers.all(worker); };
      std::vector<Seat> seats;
      std::size_t bytes = 0;
      std::int64_t most_gathered = 0;
      std::int64_t most_panels = 0;
      const std::size_t block_bytes = RowSet(*kernels_, format_.kind, shape_.hidden, kBlockRows).low_block_bytes();
      for (const Role& role : roster.roles(worker)) {
        Seat seat;
        seat.role = role;
        seat.node = worker.node;
        seat.work = call.works_of_shard[static_cast<std::size_t>(role.shard)][call.split_replicas ? static_cast<std::size_t>(role.replica) : 0];
        seat.rank = call.split_replicas ? role.replica_rank : role.rank;
        seat.size = call.split_replicas ? role.replica_size : role.size;
        std::int64_t most_rows = seat.work->routing->most_rows;
        for (const Work& work : call.works) most_rows = call.in_chunks ? std::max(most_rows, work.routing->most_rows) : most_rows;
        seat.gathered_rows = std::min(kMostGatheredRows, most_rows);
        seat.pieces = pieces_of(places_[static_cast<std::size_t>(role.part)].gate_up.layout, most_rows, block_bytes);
        most_gathered = std::max(most_gathered, seat.gathered_rows);
        const ExpertsPlace& place = places_[static_cast<std::size_t>(role.part)];
        most_panels = std::max({most_panels, 2 * place.frame / kPanelColumns, place.down.layout.panels});
        seats.push_back(std::move(seat));
      }
      // Scratch: prepared tokens (few), gathered rows, products, sums.
      const RowSet own_inputs(*kernels_, format_.kind, shape_.hidden, tokens, 1);
      const std::size_t inputs_bytes = call.self_prepared ? whole_lines(own_inputs.bytes()) : 0;
      const std::size_t gathered_bytes = whole_lines(RowSet(*kernels_, format_.kind, shape_.hidden, most_gathered).bytes());
      const std::size_t row_bytes = whole_lines(static_cast<std::size_t>(shape_.hidden) * sizeof(float));
      // At most what the limits say, and one step beyond; few tokens need less than that.
      const std::int64_t panel_bytes = (most_gathered + kBlockRows - 1) / kBlockRows * kBlockRows * kPanelColumns * 4;
      const std::size_t c_bytes = static_cast<std::size_t>(std::min(kResultBytesInPieces, most_panels * panel_bytes) + 2 * panel_bytes);
      const std::int64_t sum_panel_bytes = tokens * kPanelColumns * 4;
      const std::size_t sums_bytes = static_cast<std::size_t>(std::min(kSumBytesInPieces, most_panels * sum_panel_bytes) + sum_panel_bytes);
      bytes = inputs_bytes + gathered_bytes + row_bytes + c_bytes + sums_bytes;
      std::byte* scratch = runtime_->scratch(worker, bytes);
      for (Seat& seat : seats) {
        if (!call.in_chunks) seat.inputs = call.self_prepared ? scratch : call.inputs[static_cast<std::size_t>(worker.node)]->data;
        seat.gathered = scratch + inputs_bytes;
        seat.c = reinterpret_cast<float*>(scratch + inputs_bytes + gathered_bytes + row_bytes);
        seat.sums = reinterpret_cast<float*>(scratch + inputs_bytes + gathered_bytes + row_bytes + c_bytes);
      }
      std::byte* const row = scratch + inputs_bytes + gathered_bytes;
      if (call.in_chunks) {
        Seat& seat = seats[0];
        exchange.work(static_cast<std::size_t>(seat.role.replica), barriers.spin(), [&](std::size_t owner, ChunkQueue::Chunk chunk) {
          runtime_->delay_chunk(worker.node);
          reader.begin_chunk(static_cast<int>(owner) != seat.role.replica);
          seat.work = &call.works[owner];
          run_chunk(call, seat, chunk.stage, chunk.index, row, reader);
        });
        return;
      }
      if (call.self_prepared) own_inputs.clear_flags(scratch, 0, tokens);
      prepare_inputs(call, needed_tokens(call, worker, seats), seats[0].inputs, row);
      if (!call.self_prepared) barriers.node(worker);
      for (Seat& seat : seats) gate_and_up(call, seat, reader);
      meet();
      for (const Seat& seat : seats) prepare_inner(call, *seat.work, share(seat.work->routing->pairs(), seat.rank, seat.size));
      meet();
      for (Seat& seat : seats) {
        const auto multiply = [&](Range panels) {
          runtime_->delay_chunk(worker.node);
          multiply_down(call, seat, panels, reader);
        };
        auto& few = seat.work->down_panels;
        few ? few->each(seat.rank, multiply) : multiply(share(down_panels(seat), seat.rank, seat.size));
      }
      if (shards.size() > 1) {
        barriers.all(worker);
        add_shards(call, worker);
      }
    };
    lease != nullptr ? runtime_->run(*lease, share_work, Pinning::watched) : runtime_->run(roster.nodes(), share_work, Pinning::watched);
  }
}

// One chunk of the seat's work, which may be another node's, with the weights of the seat's own replica.
void ExpertsWeights::run_chunk(const Call& call, Seat& seat, int stage, std::int64_t index, std::byte* row, Reader& reader) const {
  Work& work = *seat.work;
  const std::int64_t most = kChunksPerWorker * work.workers;
  const auto piece = [&](std::int64_t count) {
    const std::int64_t pieces = std::min(most, count);
    return Range{count * index / pieces, count * (index + 1) / pieces};
  };
  seat.inputs = work.inputs->data;
  switch (stage) {
    case kPrepareInputs: {
      const Range tokens = piece(work.tokens.end - work.tokens.begin);
      prepare_inputs(call, {work.tokens.begin + tokens.begin, work.tokens.begin + tokens.end}, seat.inputs, row);
      return;
    }
    case kGateAndUp: {
      const auto& item = work.items[static_cast<std::size_t>(index)];
      gate_and_up_of(call, seat, item.first, item.second, reader);
      return;
    }
    case kPrepareInner: prepare_inner(call, work, piece(work.routing->pairs())); return;
    default: multiply_down(call, seat, piece(down_panels(seat)), reader);
  }
}

// Of a call with so many rows, all experts together. silu(g) u is so heavy-tailed that nearly every unit of inner rows has integers
// beyond int8, but few groups of four.
HighHalves ExpertsWeights::inner_high(std::int64_t rows) const {
  if (format_.activations == Activations::bf16) return HighHalves::apart;
  const std::int64_t from = lists_from(*kernels_, format_.kind).mean_rows;
  return from > 0 && rows >= from * shape_.experts ? HighHalves::listed : HighHalves::apart;
}

std::int64_t ExpertsWeights::down_panels(const Seat& seat) const { return places_[static_cast<std::size_t>(seat.role.part)].down.layout.panels; }

// The tokens that a worker prepares: all, or its share of those that its node needs.
Range ExpertsWeights::needed_tokens(const Call& call, const Worker& worker, const std::vector<Seat>& seats) const {
  // A node with one work needs that work's tokens only.
  const Range needed = seats.size() == 1 ? seats[0].work->tokens : Range{0, call.tokens.end - call.tokens.begin};
  if (call.self_prepared) return needed;
  const Range mine = share(needed.end - needed.begin, worker.rank_in_node, worker.workers_in_node);
  return {needed.begin + mine.begin, needed.begin + mine.end};
}

void ExpertsWeights::prepare_inputs(const Call& call, Range needed, std::byte* inputs, std::byte* row) const {
  const RowSet rows(*kernels_, format_.kind, shape_.hidden, call.tokens.end - call.tokens.begin, 1);
  const InputErrors errors = input_errors(format_, kernels_->reround_rows_from > 0);
  for (std::int64_t token = needed.begin; token < needed.end; ++token) {
    DType dtype;
    const void* x = contiguous_row(call.x, call.tokens.begin + token, row, dtype);
    bool has_high = false;  // gathering looks at the flags, row by row
    const bool more = token + 1 < needed.end && call.x.column_stride == 1;
    rows.prepare(inputs, token, x, dtype, errors.any, errors.normal, &has_high, more ? element_at(call.x, call.tokens.begin + token + 1) : nullptr);
  }
}

void ExpertsWeights::gate_and_up(const Call& call, Seat& seat, Reader& reader) const {
  Work& work = *seat.work;
  if (!work.items.empty()) {
    for (;;) {
      const std::size_t item = work.next_item.fetch_add(1, std::memory_order_relaxed);
      if (item >= work.items.size()) return;
      gate_and_up_of(call, seat, work.items[item].first, work.items[item].second, reader);
    }
  }
  const std::int64_t pairs = places_[static_cast<std::size_t>(seat.role.part)].frame / kPanelColumns;
  work.pairs->each(seat.rank, [&](Range mine) {
    runtime_->delay_chunk(seat.node);
    for (std::int64_t at = mine.begin; at < mine.end;) {
      const std::int64_t expert = at / pairs;
      const std::int64_t end = std::min(mine.end, (expert + 1) * pairs);
      gate_and_up_of(call, seat, static_cast<std::size_t>(expert), Range{at - expert * pairs, end - expert * pairs}, reader);
      at = end;
    }
  });
}

void ExpertsWeights::gate_and_up_of(const Call& call, Seat& seat, std::size_t expert, Range pairs, Reader& reader) const {
  const Work& work = *seat.work;
  const Routing::Expert& chosen = work.routing->experts[expert];
  const PackedMatrix weights = gate_up(seat.role.part, chosen.id);
  const ExpertsPlace& place = places_[static_cast<std::size_t>(seat.role.part)];
  const std::int64_t tokens = call.tokens.end - call.tokens.begin;
  const RowSet inputs(*kernels_, format_.kind, shape_.hidden, tokens, 1);
  const std::int64_t each = evenly((chosen.rows + kBlockRows - 1) / kBlockRows, kMostGatheredRows / kBlockRows) * kBlockRows;
  for (std::int64_t first = 0; first < chosen.rows; first += each) {
    const std::int64_t rows = std::min(each, chosen.rows - first);
    const RowSet gathered(*kernels_, format_.kind, shape_.hidden, rows);
    seat.blocks.clear();
    if (rows == 1) {
      seat.blocks.push_back(inputs.block(seat.inputs, work.tokens.begin + work.routing->tokens[static_cast<std::size_t>(chosen.first + first)]));
    } else {
      gathered.gather(seat.gathered, inputs, seat.inputs, work.tokens.begin, work.routing->tokens.data() + chosen.first + first);
      for (std::int64_t b = 0; b < gathered.blocks(); ++b) seat.blocks.push_back(gathered.block(seat.gathered, b));
    }
    const std::int64_t panel_stride = gathered.padded_rows() * kPanelColumns;
    const std::int64_t together = std::clamp<std::int64_t>(seat.pieces.result_bytes() / (2 * panel_stride * 4), 1, pairs.end - pairs.begin);
    for (std::int64_t pair = pairs.begin; pair < pairs.end; pair += together) {
      const std::int64_t count = std::min(together, pairs.end - pair);
      multiply_panels_in_pieces(*kernels_, weights, 2 * pair, 2 * count, seat.blocks.data(), static_cast<std::int64_t>(seat.blocks.size()),
                                seat.pieces.units, seat.c, panel_stride);
      for (std::int64_t i = 0; i < count; ++i) {
        GateArgs args{};
        args.gate = seat.c + 2 * i * panel_stride;
        args.up = args.gate + panel_stride;
        args.gate_bias = weights.bias(2 * (pair + i));
        args.up_bias = weights.bias(2 * (pair + i) + 1);
        args.rows = rows;
        args.kind = gate_;
        args.inner = work.inner + (chosen.first + first) * place.frame + (pair + i) * kPanelColumns;
        args.row_stride = place.frame;
        args.streamed = work.routing->pairs() * place.frame * 2 > kStreamedInnerBytes;
        kernels_->gate(args);
      }
    }
    const auto base = static_cast<std::size_t>(chosen.id) * place.stride;
    reader.read(buffers_[static_cast<std::size_t>(seat.role.part)], base + weights.panel_offset(2 * pairs.begin), base + weights.panel_offset(2 * pairs.end));
  }
}

void ExpertsWeights::prepare_inner(const Call& call, const Work& work, Range mine) const {
  const std::int64_t frame = places_[static_cast<std::size_t>(teams_.shards()[static_cast<std::size_t>(work.shard)].parts[0])].frame;
  const bool streamed = work.routing->pairs() * frame > kStreamedPreparedBytes;
  std::size_t expert = 0;
  for (std::int64_t pair = mine.begin; pair < mine.end; ++pair) {
    while (pair >= work.routing->experts[expert].first + work.routing->experts[expert].rows) ++expert;
    work.inner_rows[expert].prepare(work.prepared + work.inner_offsets[expert], pair - work.routing->experts[expert].first,
                                    work.inner + pair * frame, DType::bf16, inner_error(format_, call.inner_high), 0, nullptr,
                                    pair + 1 < mine.end ? work.inner + (pair + 1) * frame : nullptr, streamed);
  }
}

void ExpertsWeights::multiply_down(const Call& call, Seat& seat, Range mine, Reader& reader) const {
  const Work& work = *seat.work;
  const std::int64_t tokens = work.tokens.end - work.tokens.begin;
  if (tokens == 0) return;
  const ExpertsPlace& place = places_[static_cast<std::size_t>(seat.role.part)];
  // Most units of the inner rows have a high half, where these are apart.
  const RowSet full(*kernels_, format_.kind, place.frame, kBlockRows, kBlockRows, call.inner_high);
  const bool low = call.inner_high == HighHalves::listed;
  const Pieces pieces = pieces_of(place.down.layout, work.routing->most_rows, low ? full.low_block_bytes() : full.bytes());
  const std::int64_t chunk = std::max<std::int64_t>(pieces.sum_bytes() / (tokens * kPanelColumns * 4), 1);
  for (std::int64_t first = mine.begin; first < mine.end; first += chunk) {
    const std::int64_t panels = std::min(chunk, mine.end - first);
    const std::int64_t width = panels * kPanelColumns;
    std::memset(seat.sums, 0, static_cast<std::size_t>(tokens * width) * sizeof(float));
    for (std::size_t e = 0; e < work.routing->experts.size(); ++e) {
      const Routing::Expert& chosen = work.routing->experts[e];
      const PackedMatrix weights = down(seat.role.part, chosen.id);
      const RowSet& rows = work.inner_rows[e];
      const std::int64_t blocks_together = evenly(rows.blocks(), pieces.blocks);
      for (std::int64_t block = 0; block < rows.blocks(); block += blocks_together) {
        seat.blocks.clear();
        std::int64_t count = 0;
        for (std::int64_t b = block; b < std::min(block + blocks_together, rows.blocks()); ++b) {
          seat.blocks.push_back(rows.block(work.prepared + work.inner_offsets[e], b));
          count += seat.blocks.back().rows;
        }
        const std::int64_t panel_stride = ((seat.blocks.size() - 1) * kBlockRows + seat.blocks.back().stride_rows) * kPanelColumns;
        const std::int64_t together = std::clamp<std::int64_t>(pieces.result_bytes() / (panel_stride * 4), 1, panels);
        for (std::int64_t panel = 0; panel < panels; panel += together) {
          const std::int64_t now = std::min(together, panels - panel);
          multiply_panels_in_pieces(*kernels_, weights, first + panel, now, seat.blocks.data(), static_cast<std::int64_t>(seat.blocks.size()),
                                    pieces.units, seat.c, panel_stride);
          AccumulateArgs args{};
          args.c = seat.c;
          args.c_panel_stride = panel_stride;
          args.bias = seat.role.shard == 0 ? weights.bias(first + panel) : nullptr;  // once, not per shard
          args.panels = now;
          args.rows = count;
          args.index = work.routing->tokens.data() + chosen.first + block * kBlockRows;
          args.weight = work.routing->weights.data() + chosen.first + block * kBlockRows;
          args.acc = seat.sums + panel * kPanelColumns;
          args.acc_stride = width;
          kernels_->accumulate(args);
        }
      }
      const auto base = static_cast<std::size_t>(chosen.id) * place.stride;
      reader.read(buffers_[static_cast<std::size_t>(seat.role.part)], base + weights.panel_offset(first), base + weights.panel_offset(first + panels));
    }
    const std::int64_t columns = std::min(width, shape_.hidden - first * kPanelColumns);
    for (std::int64_t token = 0; token < tokens; ++token) {
      const float* sums = seat.sums + token * width;
      if (work.partial != nullptr) {
        std::memcpy(work.partial + token * shape_.hidden + first * kPanelColumns, sums, static_cast<std::size_t>(columns) * sizeof(float));
        continue;
      }
      ReduceArgs args{};
      args.sources = &sums;
      args.count = 1;
      args.columns = columns;
      args.dtype = call.out.dtype;
      args.out = element_at(call.out, call.tokens.begin + work.tokens.begin + token, first * kPanelColumns);
      kernels_->reduce(args);
    }
  }
}

void ExpertsWeights::add_shards(const Call& call, const Worker& worker) const {
  const Range mine = share(call.tokens.end - call.tokens.begin, worker.rank, worker.workers);
  std::vector<const float*> sources(call.works_of_shard.size());
  for (std::int64_t token = mine.begin; token < mine.end; ++token) {
    for (std::size_t s = 0; s < sources.size(); ++s) {
      for (const Work* work : call.works_of_shard[s]) {
        if (token >= work->tokens.begin && token < work->tokens.end) sources[s] = work->partial + (token - work->tokens.begin) * shape_.hidden;
      }
    }
    ReduceArgs args{};
    args.sources = sources.data();
    args.count = static_cast<int>(sources.size());
    args.columns = shape_.hidden;
    args.dtype = call.out.dtype;
    args.out = element_at(call.out, call.tokens.begin + token);
    kernels_->reduce(args);
  }
}

}  // namespace numagraft

#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kernels/format.h"
#include "kernels/kernel_table.h"
#include "ops/packed_matrix.h"
#include "ops/placement.h"
#include "ops/routing.h"
#include "ops/row_set.h"
#include "ops/teams.h"
#include "ops/traffic.h"
#include "threads/runtime.h"

namespace numagraft {

struct ExpertsShape {
  std::int64_t experts = 0;
  std::int64_t hidden = 0;
  std::int64_t intermediate = 0;
  bool has_bias = false;
};

// How one part of the experts lies in its buffer: per expert the gate/up matrix, panels of both in turn, then the down
// matrix. The intermediate features of a part are packed from a multiple of the format's input alignment on, so that
// every placement quantises alike; features outside the part are zeros.
struct ExpertsPlace {
  std::int64_t frame_begin = 0;
  std::int64_t frame = 0;  // features packed
  MatrixPlace gate_up;
  MatrixPlace down;
  std::size_t stride = 0;  // bytes from one expert to the next
};
ExpertsPlace place_experts(const ExpertsShape& shape, const WeightFormat& format, const Part& part);
std::int64_t experts_packed_bytes(const ExpertsShape& shape, const WeightFormat& format, const Part& part);

// The weighted sum over a token's chosen experts of down(gate(x) * up(x)). Loading is serial; forward may be called from
// many threads once nothing is missing.
class ExpertsWeights {
 public:
  enum class Piece { gate, up, down };

  ExpertsWeights(std::shared_ptr<Runtime> runtime, const ExpertsShape& shape, const WeightFormat& format, const Gate& gate,
                 std::vector<Part> parts, std::string owner, const KernelTable& kernels = active_kernels());
  ~ExpertsWeights();
  ExpertsWeights(const ExpertsWeights&) = delete;
  ExpertsWeights& operator=(const ExpertsWeights&) = delete;

  // One matrix per expert from first_expert on; gate and up [intermediate, hidden], down [hidden, intermediate]; a piece
  // may be left empty. Throws WeightFailure before anything is changed, CheckpointFailure where a file cannot be read.
  void load(const std::vector<WeightSource>& gate, const std::vector<WeightSource>& up, const std::vector<WeightSource>& down,
            std::int64_t first_expert);
  void load_bias(Piece piece, std::int64_t expert, const MatrixView& values);
  std::vector<std::string> missing() const;
  // Throws std::out_of_range for ids that do not exist, before anything is computed.
  void forward(const MatrixView& x, const ExpertIds& ids, const MatrixView& weights, const MatrixView& out);
  void unpack(Piece piece, std::int64_t expert, const MatrixView& out, int replica) const;

  const ExpertsShape& shape() const { return shape_; }
  const std::vector<Buffer>& buffers() const { return buffers_; }
  std::int64_t packed_bytes() const;
  OperatorStats stats() const { return traffic_.stats(); }
  const char* isa() const { return kernels_->isa; }

 private:
  struct Call;
  struct Work;
  struct Seat;

  PackedMatrix gate_up(int part, std::int64_t expert) const;
  PackedMatrix down(int part, std::int64_t expert) const;
  std::vector<bool>& loaded(Piece piece, bool bias);
  void compute(const MatrixView& x, const ExpertIds& ids, const MatrixView& weights, const MatrixView& out, const Roster& roster,
               const Runtime::Lease* lease);
  void run_chunk(const Call& call, Seat& seat, int stage, std::int64_t index, std::byte* row, Reader& reader) const;
  Range needed_tokens(const Call& call, const Worker& worker, const std::vector<Seat>& seats) const;
  std::int64_t down_panels(const Seat& seat) const;
  HighHalves inner_high(std::int64_t rows) const;
  void prepare_inputs(const Call& call, Range needed, std::byte* inputs, std::byte* row) const;
  void gate_and_up(const Call& call, Seat& seat, Reader& reader) const;
  void gate_and_up_of(const Call& call, Seat& seat, std::size_t expert, Range pairs_of_panels, Reader& reader) const;
  void prepare_inner(const Call& call, const Work& work, Range pairs) const;
  void multiply_down(const Call& call, Seat& seat, Range panels, Reader& reader) const;
  void add_shards(const Call& call, const Worker& worker) const;

  std::shared_ptr<Runtime> runtime_;
  const KernelTable* kernels_;
  ExpertsShape shape_;
  WeightFormat format_;
  Gate gate_;
  std::vector<Part> parts_;
  std::string owner_;
  Teams teams_;
  std::vector<ExpertsPlace> places_;
  std::vector<Buffer> buffers_;
  std::vector<bool> loaded_[6];  // gate, up, down and their biases, by expert
  std::int64_t missing_count_ = 0;
  mutable Traffic traffic_;
};

}  // namespace numagraft

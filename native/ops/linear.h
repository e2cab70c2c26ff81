#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "kernels/format.h"
#include "kernels/kernel_table.h"
#include "ops/packed_matrix.h"
#include "ops/placement.h"
#include "ops/row_set.h"
#include "ops/teams.h"
#include "ops/traffic.h"
#include "threads/runtime.h"

namespace numagraft {

class WorkSplit;

// y = x W^T + b with W [out, in] packed in node memory. Loading is serial (one thread at a time); forward may be called
// from many threads once nothing is missing.
class LinearWeights {
 public:
  // Throws ConfigurationFailure (format), PlacementFailure (parts, memory).
  LinearWeights(std::shared_ptr<Runtime> runtime, std::int64_t out_features, std::int64_t in_features,
                const WeightFormat& format, std::vector<Part> parts, bool has_bias, std::string owner,
                const KernelTable& kernels = active_kernels());
  ~LinearWeights();
  LinearWeights(const LinearWeights&) = delete;
  LinearWeights& operator=(const LinearWeights&) = delete;

  // Rows [first_row, first_row + matrix.rows), each exactly once; quantised weights and files only whole. Throws WeightFailure
  // before anything is changed, CheckpointFailure where the file cannot be read.
  void load_weight(const WeightSource& matrix, std::int64_t first_row);
  void load_bias(const MatrixView& matrix);
  std::vector<std::string> missing() const;
  void forward(const MatrixView& x, const MatrixView& out);
  void unpack(const MatrixView& out, int replica) const;  // dequantised

  std::int64_t in_features() const { return in_features_; }
  std::int64_t out_features() const { return out_features_; }
  const std::vector<Buffer>& buffers() const { return buffers_; }
  std::int64_t packed_bytes() const;
  OperatorStats stats() const { return traffic_.stats(); }
  const char* isa() const { return kernels_->isa; }

 private:
  struct Call;
  PackedMatrix matrix(int part) const {
    const auto index = static_cast<std::size_t>(part);
    return {&places_[index], buffers_[index].data};
  }
  void check_rows(const WeightSource& matrix, std::int64_t first_row) const;
  Reader reader_of(const Worker& worker) {
    return Reader(traffic_, worker.node, runtime_->nodes()[static_cast<std::size_t>(worker.node)].os_node, worker.rank_in_node == 0);
  }
  void compute(const MatrixView& x, const MatrixView& out, const Roster& roster, const Runtime::Lease* lease);
  std::vector<std::deque<WorkSplit>> split_panels(const Call& call, const Roster& roster) const;
  void compute_in_chunks(const Call& call, const Roster& roster, const Runtime::Lease& lease);
  void prepare_rows(const Call& call, Range rows, std::byte* prepared, std::byte* scratch) const;
  void measure_rerounding();
  std::int64_t blocks_together() const;
  std::int64_t panels_together(std::int64_t rows) const;
  std::size_t sums_bytes(const Call& call, std::int64_t blocks) const;
  void multiply(const Call& call, const Worker& worker, const Role& role, WorkSplit* split, std::byte* prepared, float* c, Reader& reader);
  void multiply_blocks(const Call& call, int part, Range blocks, Range panels, std::byte* prepared, float* c, Reader& reader);

  std::shared_ptr<Runtime> runtime_;
  const KernelTable* kernels_;
  std::int64_t out_features_;
  std::int64_t in_features_;
  WeightFormat format_;
  std::vector<Part> parts_;
  bool has_bias_;
  std::string owner_;
  Teams teams_;
  std::vector<MatrixPlace> places_;
  std::vector<Buffer> buffers_;
  std::vector<bool> row_loaded_;
  std::int64_t rows_loaded_ = 0;
  double weight_power_ = 0;  // int4 and mxfp4: the sum of all weights' squares
  float rerounding_ = 0;     // and what rounding them to int8 costs of the output; 0: not known, or nothing
  bool bias_loaded_ = false;
  // Rows of panels that are not complete yet, as fp32, by (shard, panel).
  std::unordered_map<std::int64_t, std::vector<float>> pending_;
  Traffic traffic_;
};

// Bytes of one part; no runtime needed.
std::int64_t linear_packed_bytes(std::int64_t out_features, std::int64_t in_features, const WeightFormat& format, bool has_bias,
                                 const Part& part);

// What rounding the inputs may cost. `rerounded`: the kernel rounds the weights as well, which costs the share `rerounding` of the output (0: not known).
InputErrors linear_input_errors(const WeightFormat& format, bool rerounded, float rerounding);

}  // namespace numagraft

#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/format.h"
#include "ops/teams.h"

namespace numagraft {

// Which expert each slot of each token chose: int64 ids [tokens, slots], strides in elements.
struct ExpertIds {
  const std::int64_t* data = nullptr;
  std::int64_t tokens = 0;
  std::int64_t slots = 0;
  std::int64_t token_stride = 0;
  std::int64_t slot_stride = 1;

  std::int64_t at(std::int64_t token, std::int64_t slot) const { return data[token * token_stride + slot * slot_stride]; }
};

// Throws std::out_of_range naming every token with an id below 0 or above `experts` (an id equal to it skips the slot).
void check_ids(const ExpertIds& ids, std::int64_t experts, const std::string& owner);

// The chosen (token, weight) pairs of some tokens, ordered by expert; experts that nobody chose do not occur.
struct Routing {
  struct Expert {
    std::int64_t id = 0;
    std::int64_t first = 0;  // pair
    std::int64_t rows = 0;   // pairs
  };
  std::vector<Expert> experts;
  std::vector<std::int32_t> tokens;  // [pair], counted from the first token of the range
  std::vector<float> weights;        // [pair]
  std::int64_t most_rows = 0;

  std::int64_t pairs() const { return static_cast<std::int64_t>(tokens.size()); }
};
Routing route(const ExpertIds& ids, const MatrixView& weights, Range tokens, std::int64_t experts);

}  // namespace numagraft

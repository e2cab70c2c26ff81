#include "ops/routing.h"

#include <algorithm>
#include <stdexcept>

#include "ops/packed_matrix.h"

namespace numagraft {

void check_ids(const ExpertIds& ids, std::int64_t experts, const std::string& owner) {
  constexpr int kNamed = 8;
  std::string named;
  std::int64_t wrong = 0;
  for (std::int64_t token = 0; token < ids.tokens; ++token) {
    for (std::int64_t slot = 0; slot < ids.slots; ++slot) {
      const std::int64_t id = ids.at(token, slot);
      if (id >= 0 && id <= experts) continue;
      if (++wrong <= kNamed) named += (wrong > 1 ? ", " : "") + std::string("token ") + std::to_string(token) + " chose expert " + std::to_string(id);
    }
  }
  if (wrong == 0) return;
  if (wrong > kNamed) named += " and " + std::to_string(wrong - kNamed) + " more";
  throw std::out_of_range(owner + ": " + named + "; expected 0 to " + std::to_string(experts - 1) + ", or " + std::to_string(experts) + " to skip a slot");
}

Routing route(const ExpertIds& ids, const MatrixView& weights, Range tokens, std::int64_t experts) {
  std::vector<std::int64_t> counts(static_cast<std::size_t>(experts), 0);
  for (std::int64_t token = tokens.begin; token < tokens.end; ++token) {
    for (std::int64_t slot = 0; slot < ids.slots; ++slot) {
      const std::int64_t id = ids.at(token, slot);
      if (id < experts) ++counts[static_cast<std::size_t>(id)];
    }
  }
  Routing routing;
  std::int64_t pairs = 0;
  for (std::int64_t id = 0; id < experts; ++id) {
    const std::int64_t rows = counts[static_cast<std::size_t>(id)];
    if (rows == 0) continue;
    routing.experts.push_back({id, pairs, rows});
    routing.most_rows = std::max(routing.most_rows, rows);
    counts[static_cast<std::size_t>(id)] = pairs;  // from here on: where the expert's next pair goes
    pairs += rows;
  }
  routing.tokens.resize(static_cast<std::size_t>(pairs));
  routing.weights.resize(static_cast<std::size_t>(pairs));
  for (std::int64_t token = tokens.begin; token < tokens.end; ++token) {
    for (std::int64_t slot = 0; slot < ids.slots; ++slot) {
      const std::int64_t id = ids.at(token, slot);
      if (id >= experts) continue;
      const auto pair = static_cast<std::size_t>(counts[static_cast<std::size_t>(id)]++);
      routing.tokens[pair] = static_cast<std::int32_t>(token - tokens.begin);
      routing.weights[pair] = load_element(weights, token, slot);
    }
  }
  return routing;
}

}  // namespace numagraft

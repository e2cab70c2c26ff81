#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "ops/teams.h"

namespace numagraft {

// [0, count) for the workers of a team, divided beforehand. `guided`: three quarters of it, and the rest is taken by whoever is
// done with its own, in pieces that shrink (guided self-scheduling; Polychronopoulos and Kuck 1987). Cores of one node seldom get
// the same bandwidth at a time, and those that are done would wait at the next barrier.
class WorkSplit {
 public:
  // Pieces begin at multiples of `step`.
  WorkSplit(std::int64_t count, int workers, bool guided, std::int64_t step = 1) : workers_(workers), step_(step), count_(count) {
    const std::int64_t steps = count / step;
    own_steps_ = guided && workers > 1 ? steps * 3 / 4 : steps;
    if (own_steps_ == steps) {
      pieces_.push_back(count);
      return;
    }
    for (std::int64_t at = own_steps_; at < steps; at += std::max<std::int64_t>((steps - at) / (2 * workers), 1)) pieces_.push_back(at * step);
    pieces_.push_back(count);
  }
  WorkSplit(const WorkSplit&) = delete;
  WorkSplit& operator=(const WorkSplit&) = delete;

  // What a worker begins with; may be empty.
  Range own(int rank) const {
    const Range steps = share(own_steps_, rank, workers_);
    return {steps.begin * step_, rank + 1 == workers_ ? pieces_[0] : steps.end * step_};
  }
  // One more piece; empty when none is left.
  Range next() noexcept {
    const auto pieces = static_cast<std::int64_t>(pieces_.size()) - 1;
    // Looked at first: the line is written no more once nothing is left.
    if (taken_.load(std::memory_order_relaxed) >= pieces) return {count_, count_};
    const std::int64_t piece = taken_.fetch_add(1, std::memory_order_relaxed);
    if (piece >= pieces) return {count_, count_};
    return {pieces_[static_cast<std::size_t>(piece)], pieces_[static_cast<std::size_t>(piece) + 1]};
  }
  // Calls `run` with every range that is the worker's.
  template <class Run>
  void each(int rank, const Run& run) {
    if (const Range mine = own(rank); mine.begin < mine.end) run(mine);
    for (Range piece = next(); piece.begin < piece.end; piece = next()) run(piece);
  }

 private:
  int workers_;
  std::int64_t step_;
  std::int64_t count_;
  std::int64_t own_steps_;
  std::vector<std::int64_t> pieces_;  // where they begin, and count
  alignas(64) std::atomic<std::int64_t> taken_{0};
};

}  // namespace numagraft

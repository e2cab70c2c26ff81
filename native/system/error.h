#pragma once

#include <stdexcept>
#include <string>
#include <utility>

namespace numagraft {

// What went wrong and what to do about it; the bindings raise them as the classes of numagraft.errors of the same stem.
class Failure : public std::runtime_error {
 public:
  Failure(const std::string& message, std::string remedy) : std::runtime_error(message), remedy_(std::move(remedy)) {}
  const std::string& remedy() const noexcept { return remedy_; }

 private:
  std::string remedy_;
};

class PlacementFailure : public Failure {  // PlacementError
 public:
  using Failure::Failure;
};

class ConfigurationFailure : public Failure {  // ConfigurationError
 public:
  using Failure::Failure;
};

class WeightFailure : public Failure {  // WeightError
 public:
  using Failure::Failure;
};

class CheckpointFailure : public Failure {  // CheckpointError
 public:
  using Failure::Failure;
};

std::string errno_name(int error);      // "EPERM"; "errno 1234" for one it does not know
std::string describe_errno(int error);  // "EPERM (Operation not permitted)"
std::string format_bytes(double bytes);  // "1.5 GiB"

}  // namespace numagraft

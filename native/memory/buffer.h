#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace numagraft {

class Residency;  // memory/residency.h

// Where a buffer's pages are asked to lie. Numbers index Runtime::nodes(), never the kernel's own node ids.
struct MemoryTarget {
  enum class Mode : std::uint8_t { bind, interleave };
  std::vector<int> nodes;  // sorted, unique, not empty
  Mode mode = Mode::bind;
};

// A stretch of an arena: page-aligned, zeroed, prefaulted on its nodes before it is handed out. It lives as long as the
// Memory that made it (arenas are freed whole), or until it is given back with Memory::release.
struct Buffer {
  std::byte* data = nullptr;
  std::size_t bytes = 0;  // a multiple of the page size
  MemoryTarget target;
  std::string owner;  // the grafted module's qualified name, for the report and for error messages
  std::shared_ptr<Residency> residency;  // where its pages were last found; filled by Runtime::verify, shared by all copies
};

}  // namespace numagraft

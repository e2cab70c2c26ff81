#pragma once

#include <cstdint>
#include <mutex>

namespace numagraft {

// Counts the forks that made this process: what was made in another generation has no threads here.
std::uint32_t process_generation() noexcept;

// Guards rare bookkeeping (pools, arenas, scratch lists). Held across fork, so that the child never finds it locked.
std::mutex& fork_safe_mutex();

}  // namespace numagraft

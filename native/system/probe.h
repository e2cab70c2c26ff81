#pragma once

#include <map>
#include <string>

namespace numagraft::sys {

// Each call that placement rests on, tried for real on one page in a thread of its own: its name -> "" when it worked, or
// the errno's name ("EPERM" under Docker's default seccomp filter). "mbind" also covers that the page then lies where asked
// ("misplaced" when it does not).
std::map<std::string, std::string> probe_calls();

struct Policy {
  int mode = 0;
  std::string name;        // "default", "bind", "interleave", ...; "" when get_mempolicy is refused
  std::string nodes;       // "0,2"
};
Policy inherited_policy();  // of the calling thread

}  // namespace numagraft::sys

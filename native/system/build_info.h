#pragma once

#include <string>

namespace numagraft {

std::string compiler();   // name and version of the compiler that built this
std::string sanitizer();  // "address", "thread" or ""

}  // namespace numagraft

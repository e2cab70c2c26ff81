#include "kernels/kernel_table.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels/cpu_features.h"

namespace numagraft {

#define NUMAGRAFT_ROW(isa) \
  namespace isa {          \
  extern const KernelTable kernels[2]; \
  }
NUMAGRAFT_ROW(scalar)
NUMAGRAFT_ROW(avx2)
NUMAGRAFT_ROW(avx512)
NUMAGRAFT_ROW(avx512_vnni)
NUMAGRAFT_ROW(amx)
#undef NUMAGRAFT_ROW

namespace {

struct Supported {
  const KernelTable* rows[5][2];  // [in_order]
  const KernelTable* chosen[5];
  int count = 0;
};

const Supported& supported() {
  static const Supported result = [] {
    const CpuFeatures cpu = detect_cpu_features();
    Supported s{};
    const auto add = [&](const KernelTable (&row)[2]) {
      s.rows[s.count][0] = &row[0];
      s.rows[s.count][1] = &row[1];
      s.chosen[s.count++] = &row[cpu.zen ? 1 : 0];
    };
    add(scalar::kernels);
    if (cpu.avx2) add(avx2::kernels);
    if (cpu.avx512) add(avx512::kernels);
    if (cpu.avx512_vnni) add(avx512_vnni::kernels);
    if (cpu.amx) add(amx::kernels);
    return s;
  }();
  return result;
}

const char* forced_name() {
  const char* name = std::getenv("NUMAGRAFT_ISA");
  return name != nullptr && *name != '\0' ? name : nullptr;
}

}  // namespace

int supported_kernels(const KernelTable* const** tables) {
  *tables = supported().chosen;
  return supported().count;
}

const KernelTable& kernels_by_name(const char* isa) {
  const Supported& s = supported();
  std::string names;
  for (int i = 0; i < s.count; ++i) {
    const std::string name = s.chosen[i]->isa;
    if (name == isa) return *s.chosen[i];
    if (name + ":in-turn" == isa) return *s.rows[i][0];
    if (name + ":in-order" == isa) return *s.rows[i][1];
    names += (i > 0 ? ", " : "") + name;
  }
  throw std::invalid_argument("no kernels for '" + std::string(isa) + "' on this machine: its CPU and operating system support " +
                              names);
}

const KernelTable& active_kernels() {
  if (const char* name = forced_name()) {
    try {
      return kernels_by_name(name);
    } catch (const std::invalid_argument& error) {
      throw std::invalid_argument(std::string("NUMAGRAFT_ISA: ") + error.what() + "; set it to one of these or unset it");
    }
  }
  const Supported& s = supported();
  return *s.chosen[s.count - 1];
}

bool kernels_forced() { return forced_name() != nullptr; }

}  // namespace numagraft

#include "kernels/cpu_features.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#endif

namespace numagraft {

#if defined(__x86_64__)
namespace {

struct Registers {
  unsigned a = 0, b = 0, c = 0, d = 0;
};

Registers leaf(unsigned number, unsigned sub = 0) {
  Registers r;
  if (__get_cpuid_max(0, nullptr) >= number) __cpuid_count(number, sub, r.a, r.b, r.c, r.d);
  return r;
}

std::uint64_t saved_state() {
  std::uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return std::uint64_t{high} << 32 | low;
}

// AuthenticAMD or HygonGenuine, from the family of the first Zen on.
bool zen() {
  const Registers vendor = leaf(0);
  const bool made_by = (vendor.b == 0x68747541 && vendor.d == 0x69746E65 && vendor.c == 0x444D4163) ||
                       (vendor.b == 0x6F677948 && vendor.d == 0x6E65476E && vendor.c == 0x656E6975);
  const unsigned signature = leaf(1).a;
  const unsigned family = (signature >> 8 & 0xF) + ((signature >> 8 & 0xF) == 0xF ? signature >> 20 & 0xFF : 0);
  return made_by && family >= 0x17;
}

bool bit(unsigned value, int index) { return (value >> index) & 1; }

// Linux hands out the 8 KiB tile state only to processes that asked (threads and children inherit it).
bool tile_permission() {
  constexpr int kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr int kTileData = 18;               // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace

CpuFeatures detect_cpu_features() {
  CpuFeatures features;
  features.zen = zen();
  const Registers basic = leaf(1);
  const Registers extended = leaf(7);
  if (!bit(basic.c, 27)) return features;  // OSXSAVE: without it XGETBV faults
  const std::uint64_t saved = saved_state();
  const bool ymm = (saved & 0x6) == 0x6;
  const bool zmm = ymm && (saved & 0xE0) == 0xE0;
  const bool tiles = (saved & 0x60000) == 0x60000;
  features.avx2 = ymm && bit(basic.c, 28) && bit(basic.c, 12) && bit(basic.c, 29) && bit(extended.b, 5) &&
                  bit(extended.b, 3) && bit(extended.b, 8);
  features.avx512 = features.avx2 && zmm && bit(extended.b, 16) && bit(extended.b, 17) && bit(extended.b, 28) &&
                    bit(extended.b, 30) && bit(extended.b, 31);
  features.avx512_vnni = features.avx512 && bit(extended.c, 11);
  const bool bf16 = extended.a >= 1 && bit(leaf(7, 1).a, 5);
  const bool floats = bf16 && bit(extended.d, 23);  // AVX512_FP16
  features.amx = features.avx512_vnni && floats && bit(extended.c, 1) && tiles && bit(extended.d, 22) && bit(extended.d, 24) && bit(extended.d, 25) &&
                 tile_permission();
#if defined(NUMAGRAFT_EMULATED)
  features.avx512 = features.avx512_vnni = features.avx2;
#endif
  return features;
}
#else
CpuFeatures detect_cpu_features() { return {}; }
#endif

}  // namespace numagraft

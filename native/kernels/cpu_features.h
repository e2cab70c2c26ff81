#pragma once

namespace numagraft {

// What this CPU has and the operating system saves on a context switch (XGETBV), per row of the kernel table.
struct CpuFeatures {
  bool avx2 = false;         // with FMA and F16C
  bool avx512 = false;       // F, BW, DQ, VL, CD
  bool avx512_vnni = false;
  bool zen = false;          // AMD's or Hygon's: what matters is the prefetchers, see docs/kernels-zen.md
  bool amx = false;          // tile, int8, bf16, and the kernel's permission for this process; implies avx512_vnni, and VBMI
};

CpuFeatures detect_cpu_features();

}  // namespace numagraft

// AVX-512 with VNNI.
#include "kernels/gemm_float.h"
#include "kernels/gemm_vnni.h"

namespace numagraft::NUMAGRAFT_ISA {

void gemm(const GemmArgs& a) {
  switch (a.layout->kind) {
    case WeightKind::bf16:
      return gemm_float<WeightKind::bf16>(a);
    case WeightKind::fp8:
      return gemm_float<WeightKind::fp8>(a);
    default:
      return gemm_vnni<true>(a);
  }
}

}  // namespace numagraft::NUMAGRAFT_ISA

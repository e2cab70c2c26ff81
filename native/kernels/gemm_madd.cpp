// AVX2 and AVX-512 without VNNI: 16-bit multiply-adds.
#include "kernels/gemm_float.h"
#include "kernels/kernel_table.h"
#include "kernels/madd_int8.h"
#include "kernels/madd_nibbles.h"
#include "kernels/unpacked_nibbles.h"
#include "kernels/widened_floats.h"
#include "kernels/widened_int8.h"

namespace numagraft::NUMAGRAFT_ISA {
namespace {

// Strips from which widening a chunk first pays; fewer wait for memory, which small chunks keep busy.
constexpr std::int64_t kWidenedInt8Strips = 3;
constexpr std::int64_t kWidenedFloatStrips = 2;
constexpr std::int64_t kUnpackedStrips = 3;

template <WeightKind kind, bool symmetric>
void gemm_nibbles(const GemmArgs& a) {
  count_strips(a, kMostRows) >= kUnpackedStrips ? gemm_unpacked<kind, symmetric>(a) : gemm_strips<Nibbles<kind, symmetric>>(a);
}

}  // namespace

void gemm(const GemmArgs& a) {
  const std::int64_t strips = count_strips(a, kMostRows);
  switch (a.layout->kind) {
    case WeightKind::bf16:
      return strips >= kWidenedFloatStrips ? gemm_widened<WidenedBf16>(a) : gemm_float<WeightKind::bf16>(a);
    case WeightKind::fp8:
      return strips >= kWidenedFloatStrips ? gemm_widened<WidenedFp8>(a) : gemm_float<WeightKind::fp8>(a);
    case WeightKind::int8:
      return strips >= kWidenedInt8Strips ? gemm_widened<WidenedInt8>(a) : gemm_strips<Int8>(a);
    case WeightKind::mxfp4:
      return gemm_nibbles<WeightKind::mxfp4, true>(a);
    case WeightKind::int4:
      return a.layout->symmetric ? gemm_nibbles<WeightKind::int4, true>(a) : gemm_nibbles<WeightKind::int4, false>(a);
  }
}

}  // namespace numagraft::NUMAGRAFT_ISA

#include "bench/peaks.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <stdexcept>

// Every loop is written in assembly: nothing is spilled, reordered or left out, and the file needs no ISA flags.
// There are enough accumulators to hide the latency; the operands are constants, as no multiplier here minds the data.

namespace numagraft {
namespace {

#define VECTOR_CLOBBERS                                                                                            \
  "eax", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", \
      "xmm13", "xmm14", "xmm15", "memory", "cc"
#define UP_TO_8 "0,1,2,3,4,5,6,7"
#define UP_TO_12 UP_TO_8 ",8,9,10,11"
#define UP_TO_24 UP_TO_12 ",12,13,14,15,16,17,18,19,20,21,22,23"
#define FOR(list, body) ".irp r," list "\n" body ".endr\n"
#define LOOP(body) "1:\n" body "dec %0\n jnz 1b\n vzeroupper\n"
// A 32-bit constant in every lane of a register.
#define SPREAD(value, reg, n) "mov $" value ", %%eax\n vmovd %%eax, %%xmm" n "\n vpbroadcastd %%xmm" n ", %%" reg n "\n"

std::uint64_t run_sse2_fp32(std::uint64_t rounds) {
  std::uint64_t left = rounds;
  asm volatile(
      "mov $0x3f800000, %%eax\n movd %%eax, %%xmm14\n shufps $0, %%xmm14, %%xmm14\n movaps %%xmm14, %%xmm15\n"
      "1:\n" FOR(UP_TO_12, "movaps %%xmm14, %%xmm13\n mulps %%xmm15, %%xmm13\n addps %%xmm13, %%xmm\\r\n")
      "dec %0\n jnz 1b\n"
      : "+r"(left)::VECTOR_CLOBBERS);
  return rounds * 12 * 4 * 2;
}

std::uint64_t run_avx2_fp32(std::uint64_t rounds) {
  std::uint64_t left = rounds;
  asm volatile(SPREAD("0x3f800000", "ymm", "14") SPREAD("0x3f800000", "ymm", "15")
                   LOOP(FOR(UP_TO_12, "vfmadd231ps %%ymm14, %%ymm15, %%ymm\\r\n"))
               : "+r"(left)::VECTOR_CLOBBERS);
  return rounds * 12 * 8 * 2;
}

std::uint64_t run_avx2_int8(std::uint64_t rounds) {
  std::uint64_t left = rounds;
  asm volatile(SPREAD("0x01010101", "ymm", "14") SPREAD("0x01010101", "ymm", "15") SPREAD("0x00010001", "ymm", "13")
                   LOOP(FOR(UP_TO_12, "vpmaddubsw %%ymm14, %%ymm15, %%ymm12\n vpmaddwd %%ymm12, %%ymm13, %%ymm12\n"
                                      "vpaddd %%ymm12, %%ymm\\r, %%ymm\\r\n"))
               : "+r"(left)::VECTOR_CLOBBERS);
  return rounds * 12 * 32 * 2;
}

// 4-bit weights leave room for eight byte products in 16 bits, so widening to 32 bits is paid once in eight.
std::uint64_t run_avx2_int4(std::uint64_t rounds) {
  std::uint64_t left = rounds;
  asm volatile(SPREAD("0x01010101", "ymm", "14") SPREAD("0x01010101", "ymm", "15") SPREAD("0x00010001", "ymm", "13")
                   LOOP(".rept 8\n" FOR("0,1,2,3", "vpmaddubsw %%ymm14, %%ymm15, %%ymm12\n"
                                                   "vpaddw %%ymm12, %%ymm\\r, %%ymm\\r\n") ".endr\n"
                        FOR("0,1,2,3", "vpmaddwd %%ymm\\r, %%ymm13, %%ymm12\n vpaddd %%ymm12, %%ymm4, %%ymm4\n"
                                       "vpxor %%ymm\\r, %%ymm\\r, %%ymm\\r\n"))
               : "+r"(left)::VECTOR_CLOBBERS);
  return rounds * 4 * 8 * 32 * 2;
}

std::uint64_t run_avx_vnni_int8(std::uint64_t rounds) {
  std::uint64_t left = rounds;
  asm volatile(SPREAD("0x01010101", "ymm", "14") SPREAD("0x01010101", "ymm", "15")
                   LOOP(FOR(UP_TO_12, "%{vex%} vpdpbusd %%ymm14, %%ymm15, %%ymm\\r\n"))
               : "+r"(left)::VECTOR_CLOBBERS);
  return rounds * 12 * 32 * 2;
}

// Registers 16 to 31 exist only with AVX-512; code compiled without it never keeps anything there.
std::uint64_t run_avx512_fp32(std::uint64_t rounds) {
  std::uint64_t left = rounds;
  asm volatile("mov $0x3f800000, %%eax\n vpbroadcastd %%eax, %%zmm30\n vpbroadcastd %%eax, %%zmm31\n"
               LOOP(FOR(UP_TO_24, "vfmadd231ps %%zmm30, %%zmm31, %%zmm\\r\n"))
               : "+r"(left)::VECTOR_CLOBBERS);
  return rounds * 24 * 16 * 2;
}

std::uint64_t run_avx512_int8(std::uint64_t rounds) {
  std::uint64_t left = rounds;
  asm volatile("mov $0x01010101, %%eax\n vpbroadcastd %%eax, %%zmm30\n vpbroadcastd %%eax, %%zmm31\n"
               "mov $0x00010001, %%eax\n vpbroadcastd %%eax, %%zmm29\n"
               LOOP(FOR(UP_TO_24, "vpmaddubsw %%zmm30, %%zmm31, %%zmm28\n vpmaddwd %%zmm28, %%zmm29, %%zmm28\n"
                                  "vpaddd %%zmm28, %%zmm\\r, %%zmm\\r\n"))
               : "+r"(left)::VECTOR_CLOBBERS);
  return rounds * 24 * 64 * 2;
}

std::uint64_t run_avx512_vnni_int8(std::uint64_t rounds) {
  std::uint64_t left = rounds;
  asm volatile("mov $0x01010101, %%eax\n vpbroadcastd %%eax, %%zmm30\n vpbroadcastd %%eax, %%zmm31\n"
               LOOP(FOR(UP_TO_24, "vpdpbusd %%zmm30, %%zmm31, %%zmm\\r\n"))
               : "+r"(left)::VECTOR_CLOBBERS);
  return rounds * 24 * 64 * 2;
}

std::uint64_t run_avx512_bf16(std::uint64_t rounds) {
  std::uint64_t left = rounds;
  asm volatile("mov $0x3f803f80, %%eax\n vpbroadcastd %%eax, %%zmm30\n vpbroadcastd %%eax, %%zmm31\n"
               LOOP(FOR(UP_TO_24, "vdpbf16ps %%zmm30, %%zmm31, %%zmm\\r\n"))
               : "+r"(left)::VECTOR_CLOBBERS);
  return rounds * 24 * 32 * 2;
}

struct alignas(64) TileConfig {
  std::uint8_t palette = 1;
  std::uint8_t start_row = 0;
  std::uint8_t reserved[14] = {};
  std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64);

// The whole 64 bytes are the operand: with the compiler's intrinsic only 8 are, and the stores to the rest may be dropped.
#define TILE_LOOP(instruction)                                                                              \
  const TileConfig config;                                                                                  \
  std::uint64_t left = rounds;                                                                              \
  asm volatile(                                                                                             \
      "ldtilecfg %1\n" FOR(UP_TO_8, "tilezero %%tmm\\r\n")                                                  \
      "1:\n .rept 4\n" instruction " %%tmm6, %%tmm4, %%tmm0\n" instruction " %%tmm7, %%tmm4, %%tmm1\n"      \
      instruction " %%tmm6, %%tmm5, %%tmm2\n" instruction " %%tmm7, %%tmm5, %%tmm3\n .endr\n"               \
      "dec %0\n jnz 1b\n tilerelease\n"                                                                     \
      : "+r"(left)                                                                                          \
      : "m"(config)                                                                                         \
      : "memory", "cc")

std::uint64_t run_amx_int8(std::uint64_t rounds) {
  TILE_LOOP("tdpbssd");
  return rounds * 4 * 4 * (16 * 16 * 64) * 2;
}

std::uint64_t run_amx_bf16(std::uint64_t rounds) {
  TILE_LOOP("tdpbf16ps");
  return rounds * 4 * 4 * (16 * 16 * 32) * 2;
}

struct Leaf7 {
  unsigned edx = 0, eax1 = 0;
  Leaf7() {
    unsigned a, b, c, d;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) edx = d;
    if (__get_cpuid_count(7, 1, &a, &b, &c, &d)) eax1 = a;
  }
};

// Tile data is a state that each process asks the kernel for once; the answer also says whether the kernel knows it.
bool tiles_permitted() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

bool has_avx512() { return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw"); }
bool has_avx_vnni() { return __builtin_cpu_supports("avx2") && (Leaf7{}.eax1 >> 4 & 1) != 0; }

constexpr std::array kPeaks{
    Peak{"sse2_fp32", "mulps, addps", run_sse2_fp32, [] { return true; }},
    Peak{"avx2_fp32", "vfmadd231ps ymm", run_avx2_fp32,
         [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
    Peak{"avx2_int8", "vpmaddubsw, vpmaddwd, vpaddd ymm", run_avx2_int8,
         [] { return __builtin_cpu_supports("avx2") != 0; }},
    Peak{"avx2_int4", "vpmaddubsw, vpaddw ymm, widened once in eight", run_avx2_int4,
         [] { return __builtin_cpu_supports("avx2") != 0; }},
    Peak{"avx_vnni_int8", "vpdpbusd ymm (VEX)", run_avx_vnni_int8, has_avx_vnni},
    Peak{"avx512_fp32", "vfmadd231ps zmm", run_avx512_fp32, has_avx512},
    Peak{"avx512_int8", "vpmaddubsw, vpmaddwd, vpaddd zmm", run_avx512_int8, has_avx512},
    Peak{"avx512_vnni_int8", "vpdpbusd zmm", run_avx512_vnni_int8,
         [] { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }},
    Peak{"avx512_bf16", "vdpbf16ps zmm", run_avx512_bf16,
         [] { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }},
    Peak{"amx_int8", "tdpbssd", run_amx_int8, [] { return (Leaf7{}.edx >> 25 & 1) != 0 && tiles_permitted(); }},
    Peak{"amx_bf16", "tdpbf16ps", run_amx_bf16, [] { return (Leaf7{}.edx >> 22 & 1) != 0 && tiles_permitted(); }},
};

}  // namespace

std::span<const Peak> peaks() { return kPeaks; }

const Peak& peak_by_name(const std::string& name) {
  for (const Peak& peak : kPeaks)
    if (name == peak.name) {
      if (!peak.supported()) throw std::invalid_argument("this CPU cannot run the peak loop '" + name + "' (" + peak.what + ")");
      return peak;
    }
  throw std::invalid_argument("there is no peak loop named '" + name + "'");
}

std::vector<double> measure_peak(Runtime& runtime, std::span<const int> nodes, const Peak& peak, double seconds,
                                 int repetitions) {
  using Clock = std::chrono::steady_clock;
  if (!(seconds > 0) || seconds > 60 || repetitions < 1)
    throw std::invalid_argument("a peak is measured over 0 to 60 seconds and at least once");
  const auto workers = static_cast<std::size_t>(runtime.threads_on(nodes));
  struct alignas(64) Span {
    Clock::time_point begin, end;
    std::uint64_t operations;
  };
  std::vector<Span> spans(workers);
  auto once = [&](std::uint64_t rounds) {
    runtime.run(nodes, [&](const Worker& worker, Barriers& barriers) {
      barriers.all(worker);
      Span& own = spans[static_cast<std::size_t>(worker.rank)];
      own.begin = Clock::now();
      own.operations = peak.run(rounds);
      own.end = Clock::now();
    });
    Clock::time_point begin = spans[0].begin, end = spans[0].end;
    std::uint64_t operations = 0;
    for (const Span& span : spans) {
      begin = std::min(begin, span.begin);
      end = std::max(end, span.end);
      operations += span.operations;
    }
    return std::pair{static_cast<double>(operations), std::chrono::duration<double>(end - begin).count()};
  };
  std::uint64_t rounds = 256;
  for (double took = once(rounds).second; took < seconds / 2; took = once(rounds).second)
    rounds = static_cast<std::uint64_t>(static_cast<double>(rounds) * std::clamp(seconds / std::max(took, 1e-9), 2.0, 64.0));
  std::vector<double> rates;
  for (int i = 0; i < repetitions; ++i) {
    const auto [operations, took] = once(rounds);
    rates.push_back(operations / took);
  }
  return rates;
}

}  // namespace numagraft

// SPDX-License-Identifier: Apache-2.0
// Picks the microkernels, once: the widest instruction set that this CPU runs, or the one that the
// environment variable DSA_CPU_ISA names (baseline, avx2, avx512). A name that cannot be honoured
// is not passed over in silence: `isa` of the result, which the build report prints, then says so.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cpu/simd/microkernels.h"

namespace dsa::cpu {

extern const MicroKernels kMicroKernels_baseline;
#if defined(__x86_64__)
extern const MicroKernels kMicroKernels_avx2;
extern const MicroKernels kMicroKernels_avx512;
#endif

namespace {

struct Candidate {
  const MicroKernels* kernels;
  bool runs_here;
};

#if defined(__x86_64__)
// What x86-64-v3 and x86-64-v4 ask for beyond their predecessors; the operating system's part
// (saving the wide registers) is in the answers of __builtin_cpu_supports.
bool runs_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
}
bool runs_avx512() {
  return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}
#endif

MicroKernels select() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const Candidate candidates[] = {
      {&kMicroKernels_avx512, runs_avx512()},
      {&kMicroKernels_avx2, runs_avx2()},
      {&kMicroKernels_baseline, true},
  };
#else
  const Candidate candidates[] = {{&kMicroKernels_baseline, true}};
#endif
  const MicroKernels* best = nullptr;
  for (const Candidate& c : candidates) {
    if (best == nullptr && c.runs_here) best = c.kernels;
  }

  const char* forced = std::getenv("DSA_CPU_ISA");
  if (forced == nullptr || *forced == '\0') return *best;
  const char* problem = "not an instruction set of this build";
  for (const Candidate& c : candidates) {
    if (std::strcmp(forced, c.kernels->isa) != 0) continue;
    if (c.runs_here) return *c.kernels;
    problem = "not supported by this CPU";
  }
  static char report[96];
  std::snprintf(report, sizeof(report), "%s (DSA_CPU_ISA=%.24s: %s)", best->isa, forced, problem);
  MicroKernels result = *best;
  result.isa = report;
  return result;
}

}  // namespace

const MicroKernels& microkernels() {
  static const MicroKernels selected = select();
  return selected;
}

}  // namespace dsa::cpu

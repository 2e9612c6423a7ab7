// SPDX-License-Identifier: Apache-2.0
// Barriers of part of a CTA. PTX ISA, "Parallel Synchronization and Communication Instructions:
// bar".
#pragma once

#include <cstdint>

namespace dsa::cuda::ptx {

template <int kBarrier, int kThreads>
__device__ __forceinline__ void named_sync() {
  asm volatile("bar.sync %0, %1;" ::"n"(kBarrier), "n"(kThreads) : "memory");
}

// Some of kThreads arrive, the others sync.
template <int kBarrier, int kThreads>
__device__ __forceinline__ void named_arrive() {
  asm volatile("bar.arrive %0, %1;" ::"n"(kBarrier), "n"(kThreads) : "memory");
}

// Whether `flag` holds in any of the threads.
template <int kBarrier, int kThreads>
__device__ __forceinline__ bool named_any(bool flag) {
  std::uint32_t any;
  asm volatile(
      "{\n"
      ".reg .pred p, q;\n"
      "setp.ne.u32 p, %1, 0;\n"
      "bar.red.or.pred q, %2, %3, p;\n"
      "selp.u32 %0, 1, 0, q;\n"
      "}"
      : "=r"(any)
      : "r"(static_cast<std::uint32_t>(flag)), "n"(kBarrier), "n"(kThreads)
      : "memory");
  return any != 0;
}

}  // namespace dsa::cuda::ptx

// SPDX-License-Identifier: Apache-2.0
// cp.async (SM80): copies global -> shared memory without registers. PTX ISA, "Data Movement and
// Conversion Instructions: cp.async".
#pragma once

#include <cstdint>

namespace dsa::cuda::ptx {

// 4, 8 or 16 bytes; both addresses are multiples of that. 16 go past L1.
template <int kBytes>
__device__ __forceinline__ void cp_async(std::uint32_t shared, const void* global) {
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared), "l"(global), "n"(kBytes)
                 : "memory");
  }
}

// The same if `valid`; else zeros, and `global` is not read.
template <int kBytes>
__device__ __forceinline__ void cp_async_or_zeros(std::uint32_t shared, const void* global,
                                                  bool valid) {
  const int bytes = valid ? kBytes : 0;
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
                 "r"(bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared), "l"(global),
                 "n"(kBytes), "r"(bytes)
                 : "memory");
  }
}

// Closes a group of this thread's copies; groups complete in order.
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most kPending of this thread's groups are not complete.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace dsa::cuda::ptx

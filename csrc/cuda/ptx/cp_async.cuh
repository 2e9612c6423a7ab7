// SPDX-License-Identifier: Apache-2.0
// cp.async (SM80): copies global -> shared memory without registers. PTX ISA, "Data Movement and
// Conversion Instructions: cp.async".
#pragma once

#include <cstdint>

namespace dsa::cuda::ptx {

// 16 bytes, both addresses 16-byte aligned, past L1.
__device__ __forceinline__ void cp_async_16(std::uint32_t shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}

// 4 bytes, both addresses 4-byte aligned.
__device__ __forceinline__ void cp_async_4(std::uint32_t shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared), "l"(global) : "memory");
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

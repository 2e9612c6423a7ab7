// SPDX-License-Identifier: Apache-2.0
// mbarrier (SM90's forms): barriers in shared memory that count arrivals and bytes. PTX ISA,
// "Parallel Synchronization and Communication Instructions: mbarrier".
#pragma once

#include <cstdint>

#include "cuda/ptx/ldst.cuh"

namespace dsa::cuda::ptx {

// __syncthreads(), for warps that meet from different places.
__device__ __forceinline__ void cta_sync() { asm volatile("barrier.sync 0;" ::: "memory"); }

using Mbarrier = std::uint64_t;  // in shared memory

// By one thread; others may use it after mbarrier_fence_init() and a barrier of the CTA.
__device__ __forceinline__ void mbarrier_init(Mbarrier& barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)),
               "r"(arrivals)
               : "memory");
}

// Makes the initialisations visible to the copy engine and to other CTAs of the cluster.
__device__ __forceinline__ void mbarrier_fence_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(Mbarrier& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier))
               : "memory");
}

// Arrives `count` times.
__device__ __forceinline__ void mbarrier_arrive(Mbarrier& barrier, std::uint32_t count) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)),
               "r"(count)
               : "memory");
}

// Arrives, and lets the phase wait for so many bytes more.
__device__ __forceinline__ void mbarrier_arrive_expect(Mbarrier& barrier, std::uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)),
      "r"(bytes)
      : "memory");
}

// Arrives once this thread's cp.async so far are complete; one of the arrivals that were set.
__device__ __forceinline__ void mbarrier_arrive_after_cp_async(Mbarrier& barrier) {
  asm volatile(
      "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(&barrier))
      : "memory");
}

// Waits until the phase of this parity is complete. A fresh barrier is in phase 0, and the one
// before it, of parity 1, counts as complete.
__device__ __forceinline__ void mbarrier_wait(Mbarrier& barrier, std::uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again_%=:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again_%=;\n"
      "}" ::"r"(shared_address(&barrier)),
      "r"(parity)
      : "memory");
}

}  // namespace dsa::cuda::ptx

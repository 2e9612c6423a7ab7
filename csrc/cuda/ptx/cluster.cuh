// SPDX-License-Identifier: Apache-2.0
// Clusters of CTAs (SM90). PTX ISA, "Special Registers: %cluster_ctarank" and others,
// "barrier.cluster" and "mapa". Compiled for older GPUs, where nobody launches clusters, they trap.
#pragma once

#include <cstdint>

namespace dsa::cuda::ptx {

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

__device__ __forceinline__ std::uint32_t cluster_rank() {
  std::uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ std::uint32_t cluster_size() {
  std::uint32_t size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

// Of a one-dimensional grid.
__device__ __forceinline__ std::uint32_t cluster_index() {
  std::uint32_t index;
  asm volatile("mov.u32 %0, %%clusterid.x;" : "=r"(index));
  return index;
}

// All threads of all CTAs arrive, each once, then wait. What one wrote before it arrived, in its
// own or in another's shared memory, all see after they waited.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait;" ::: "memory");
}

// The same variable of this CTA's shared memory in another CTA, which must have begun.
template <typename T>
__device__ __forceinline__ T& of_cta(T& shared, std::uint32_t rank) {
  std::uint64_t address;
  asm volatile("mapa.u64 %0, %1, %2;"
               : "=l"(address)
               : "l"(reinterpret_cast<std::uint64_t>(&shared)), "r"(rank));
  return *reinterpret_cast<T*>(address);
}

#else

__device__ __forceinline__ std::uint32_t cluster_rank() { return 0; }
__device__ __forceinline__ std::uint32_t cluster_size() { return 1; }
__device__ __forceinline__ std::uint32_t cluster_index() { return 0; }
__device__ __forceinline__ void cluster_arrive() { __trap(); }
__device__ __forceinline__ void cluster_wait() { __trap(); }
template <typename T>
__device__ __forceinline__ T& of_cta(T& shared, std::uint32_t) {
  __trap();
  return shared;
}

#endif

__device__ __forceinline__ void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

}  // namespace dsa::cuda::ptx

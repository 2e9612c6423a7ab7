// SPDX-License-Identifier: Apache-2.0
// Clusters of CTAs (SM90). PTX ISA, "Special Registers: %cluster_ctarank" and others,
// "barrier.cluster", "mapa" and "st.async". Compiled for older GPUs, where nobody launches
// clusters, they trap.
#pragma once

#include <cstdint>

#include "cuda/ptx/mbarrier.cuh"

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

// The same for a barrier that orders no writes: a tenth of the time. Mailboxes opened and fenced
// before it are there after it.
__device__ __forceinline__ void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
}

// Waits for words that CTAs of the cluster send to this one; addresses are alike in each. Used
// once. A word told to all of 16 CTAs took 450 to 600 cycles with what is around it, a cluster
// barrier that waits for its threads' writes 800 to 1100 alone.
struct Mailbox {
  Mbarrier barrier;

  // By one thread, before a fence_mailboxes() and a barrier of the cluster.
  __device__ __forceinline__ void open(std::uint32_t bytes) {
    mbarrier_init(barrier, 1);
    mbarrier_arrive_expect(barrier, bytes);
  }

  // To `place` in the CTA of that rank.
  __device__ __forceinline__ void send(std::uint32_t& place, std::uint32_t value,
                                       std::uint32_t rank) {
    asm volatile(
        "{\n"
        ".reg .u32 to, box;\n"
        "mapa.shared::cluster.u32 to, %0, %3;\n"
        "mapa.shared::cluster.u32 box, %2, %3;\n"
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u32 [to], %1, [box];\n"
        "}" ::"r"(shared_address(&place)),
        "r"(value), "r"(shared_address(&barrier)), "r"(rank)
        : "memory");
  }
  // To it and the three after it; at a multiple of 16 bytes.
  __device__ __forceinline__ void send(std::uint32_t& place, const uint4& values,
                                       std::uint32_t rank) {
    asm volatile(
        "{\n"
        ".reg .u32 to, box;\n"
        "mapa.shared::cluster.u32 to, %0, %6;\n"
        "mapa.shared::cluster.u32 box, %5, %6;\n"
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.u32 [to], {%1, %2, %3, %4}, "
        "[box];\n"
        "}" ::"r"(shared_address(&place)),
        "r"(values.x), "r"(values.y), "r"(values.z), "r"(values.w), "r"(shared_address(&barrier)),
        "r"(rank)
        : "memory");
  }

  // By each thread that reads what came.
  __device__ __forceinline__ void wait() {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again_%=:\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], 0;\n"
        "@!done bra again_%=;\n"
        "}" ::"r"(shared_address(&barrier))
        : "memory");
  }
};

__device__ __forceinline__ void fence_mailboxes() { mbarrier_fence_init(); }

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
__device__ __forceinline__ void cluster_arrive_relaxed() { __trap(); }
struct Mailbox {
  std::uint64_t barrier;
  __device__ void open(std::uint32_t) { __trap(); }
  __device__ void send(std::uint32_t&, std::uint32_t, std::uint32_t) { __trap(); }
  __device__ void send(std::uint32_t&, const uint4&, std::uint32_t) { __trap(); }
  __device__ void wait() { __trap(); }
};
__device__ __forceinline__ void fence_mailboxes() { __trap(); }

#endif

__device__ __forceinline__ void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

}  // namespace dsa::cuda::ptx

// SPDX-License-Identifier: Apache-2.0
// Tensor copies by the copy engine (SM90): a box of a tensor, global -> shared memory, completing
// on an mbarrier. PTX ISA, "Data Movement and Conversion Instructions: cp.async.bulk.tensor".
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cuda/ptx/mbarrier.cuh"

namespace dsa::cuda::ptx {

// By one thread. What is outside the tensor arrives as zeros, and counts as bytes.
__device__ __forceinline__ void tma_load(void* shared, const CUtensorMap& map, Mbarrier& barrier,
                                         std::int32_t c0, std::int32_t c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4}], [%2];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(c0), "r"(c1)
      : "memory");
}

__device__ __forceinline__ void tma_load(void* shared, const CUtensorMap& map, Mbarrier& barrier,
                                         std::int32_t c0, std::int32_t c1, std::int32_t c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}

}  // namespace dsa::cuda::ptx

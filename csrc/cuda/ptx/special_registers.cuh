// SPDX-License-Identifier: Apache-2.0
// Where a thread is, read anew at each call: threadIdx and blockIdx the compiler keeps in
// registers, which may be short. PTX ISA, "Special Registers".
#pragma once

#include <cstdint>

namespace dsa::cuda::ptx {

__device__ __forceinline__ int thread_index() {
  int x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  return x;
}

__device__ __forceinline__ std::uint32_t cta_x() {
  std::uint32_t x;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(x));
  return x;
}

__device__ __forceinline__ std::uint32_t cta_y() {
  std::uint32_t y;
  asm volatile("mov.u32 %0, %%ctaid.y;" : "=r"(y));
  return y;
}

}  // namespace dsa::cuda::ptx

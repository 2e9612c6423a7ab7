// SPDX-License-Identifier: Apache-2.0
// 16 bytes of global memory into shared memory, from any address.
#pragma once

#include <cstdint>

#include "cuda/ptx/cp_async.cuh"

namespace dsa::cuda {

inline constexpr int kChunk = 16;  // bytes: one ldmatrix row, one cp.async

// 16 bytes from any address.
__device__ inline uint4 load_unaligned_16(const std::uint8_t* src) {
  std::uint32_t words[4];
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    words[w] = src[4 * w] | src[4 * w + 1] << 8 | src[4 * w + 2] << 16 |
               static_cast<std::uint32_t>(src[4 * w + 3]) << 24;
  }
  return {words[0], words[1], words[2], words[3]};
}

__device__ __forceinline__ void store_chunk(std::uint32_t shared, uint4 v) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w)
               : "memory");
}

// A chunk, or zeros.
template <bool kAligned>
__device__ __forceinline__ void copy_chunk(std::uint32_t shared, const std::uint8_t* src,
                                           bool valid) {
  if constexpr (kAligned) {
    ptx::cp_async_or_zeros<kChunk>(shared, src, valid);
  } else {
    store_chunk(shared, valid ? load_unaligned_16(src) : uint4{0, 0, 0, 0});
  }
}

}  // namespace dsa::cuda

// SPDX-License-Identifier: Apache-2.0
// Of the softmax over 16-bit latents of 64 heads, whose scores [64, 64] are wgmma's results: a head
// is a row, which four lanes share, and a thread has parts of two.
#pragma once

#include <cmath>

namespace dsa::cuda::sm90a {

// Bases move where what a thread sums of 2^(score - base), of 16 scores, is more than this.
inline constexpr float kLatentMost = 4096.0f;

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

// The largest of a thread's scores of each of its two rows.
__device__ __forceinline__ void thread_maxima(const float (&scores)[32], float (&largest)[2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) largest[i] = fmaxf(scores[2 * i], scores[2 * i + 1]);
#pragma unroll
  for (int j = 1; j < 8; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      largest[i] = fmaxf(largest[i], fmaxf(scores[4 * j + 2 * i], scores[4 * j + 2 * i + 1]));
    }
  }
}

}  // namespace dsa::cuda::sm90a

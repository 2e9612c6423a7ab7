// SPDX-License-Identifier: Apache-2.0
// Of the softmax over 16-bit latents of 64 heads, whose scores [64, 64] are wgmma's results: a head
// is a row, which four lanes share, and a thread has parts of two.
#pragma once

#include <cmath>

namespace dsa::cuda::sm90a {

// Scores may be above their base by this much, in powers of two.
inline constexpr float kLatentSlack = 8.0f;

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// The largest scores of a thread's two rows.
__device__ __forceinline__ void row_maxima(const float (&scores)[32], float (&largest)[2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) largest[i] = fmaxf(scores[2 * i], scores[2 * i + 1]);
#pragma unroll
  for (int j = 1; j < 8; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      largest[i] = fmaxf(largest[i], fmaxf(scores[4 * j + 2 * i], scores[4 * j + 2 * i + 1]));
    }
  }
#pragma unroll
  for (int lanes = 1; lanes < 4; lanes *= 2) {
    const float other[2] = {__shfl_xor_sync(~0u, largest[0], lanes),
                            __shfl_xor_sync(~0u, largest[1], lanes)};
    largest[0] = fmaxf(largest[0], other[0]);
    largest[1] = fmaxf(largest[1], other[1]);
  }
}

}  // namespace dsa::cuda::sm90a

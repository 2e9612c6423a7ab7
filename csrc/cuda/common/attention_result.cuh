// SPDX-License-Identifier: Apache-2.0
// From a softmax in base 2 to what attention returns.
#pragma once

#include <cmath>
#include <numbers>

namespace dsa::cuda {

inline constexpr float kAttentionInf = __builtin_huge_valf();

// The factor of an output that is 0 whatever was accumulated; others are not below 0.
inline constexpr float kZeroOutput = -1.0f;

// What a head's statistics mean for its output.
struct HeadResult {
  bool empty;    // nothing valid, or nothing above -inf
  float weight;  // what the output is divided by
  float lse2;    // base 2; -inf: empty
  float max_logit;

  // Sums are of 2^(s - base); weights: the same as the values were multiplied by it, rounded.
  __device__ HeadResult(float sum, float base, float max2) : HeadResult(sum, sum, base, max2) {}
  __device__ HeadResult(float sum, float weights, float base, float max2)
      : empty(max2 == -kAttentionInf && sum == 0.0f),
        weight(weights),
        lse2(empty ? -kAttentionInf : base + log2f(sum)),
        max_logit(isnan(sum) && max2 != kAttentionInf ? sum : max2 * std::numbers::ln2_v<float>) {}

  __device__ float lse() const { return empty ? kAttentionInf : lse2 * std::numbers::ln2_v<float>; }
  // What the accumulated output is multiplied by.
  __device__ float factor() const { return empty ? kZeroOutput : 1.0f / weight; }
};

// The share of the softmax that a sink leaves to the keys.
__device__ __forceinline__ float share_beside(float sink, float lse) {
  return 1.0f / (1.0f + expf(sink - lse));
}

}  // namespace dsa::cuda

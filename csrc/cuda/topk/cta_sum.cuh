// SPDX-License-Identifier: Apache-2.0
// Sums over the lanes of a warp, and what a sum over a CTA's warps gives.
#pragma once

#include <cstdint>

namespace dsa::cuda::topk {

inline constexpr int kWarpSize = 32;
inline constexpr std::uint32_t kAllLanes = 0xFFFF'FFFFu;

__device__ inline std::uint32_t warp_inclusive_sum(std::uint32_t value) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const std::uint32_t lower = __shfl_up_sync(kAllLanes, value, distance);
    if (lane >= distance) value += lower;
  }
  return value;
}

struct CtaSum {
  std::uint32_t before;  // of the warps before this one
  std::uint32_t total;
};

}  // namespace dsa::cuda::topk

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

template <int kThreads>
struct WarpTotals {
  static constexpr int kWarps = kThreads / kWarpSize;
  static_assert(kWarps <= kWarpSize);
  std::uint32_t totals[2][kWarps];
};

// A barrier. Sums a value of each warp, which its last lane has. `turn` is 0 or 1, in turns: the
// next sum's barrier stands between these reads and a rewrite.
template <int kThreads>
__device__ CtaSum sum_over_warps(WarpTotals<kThreads>& shared, std::uint32_t& turn,
                                 std::uint32_t warp_total) {
  constexpr int kWarps = WarpTotals<kThreads>::kWarps;
  std::uint32_t (&totals)[kWarps] = shared.totals[turn];
  turn ^= 1;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  if (lane == kWarpSize - 1) totals[warp] = warp_total;
  __syncthreads();
  const std::uint32_t total = lane < kWarps ? totals[lane] : 0;
  return {__reduce_add_sync(kAllLanes, lane < warp ? total : 0),
          __reduce_add_sync(kAllLanes, total)};
}

}  // namespace dsa::cuda::topk

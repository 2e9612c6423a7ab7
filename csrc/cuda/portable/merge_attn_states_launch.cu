// SPDX-License-Identifier: Apache-2.0
// merge_attn_states. A warp takes one (row, head): its lanes share the weights of up to 32 states,
// then sum over the states in tiles of kStates states by kVectors vectors of 16 bytes a lane, all
// of a tile in flight together. The first tile is loaded before the weights are known. Sums over
// states run in one order whatever the batch. No shared memory, no barriers.
#include <cstdint>

#include "cuda/common/fast_divisor.h"
#include "cuda/common/launch.h"
#include "cuda/common/vector.cuh"
#include "cuda/cuda_kernels.h"

namespace dsa::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kStates = 2;
constexpr int kVectors = 2;

struct MergeAttnStates {
  TensorView outs;  // [n, s, h, d]
  TensorView lses;  // [n, s, h]
  TensorView out;   // [s, h, d]
  TensorView lse;   // [s, h]
  FastDivisor num_heads;
};

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
    x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, mask));
  }
  return x;
}
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) x += __shfl_xor_sync(kAllLanes, x, mask);
  return x;
}

// The lse of one (row, head) in each state; -inf and +inf: the state is empty.
struct StateLses {
  const float* first;
  std::int64_t stride;
  std::int64_t count;

  // -inf for an empty state and past the last.
  __device__ float operator()(std::int64_t state) const {
    const float lse = state < count ? first[state * stride] : -INFINITY;
    return isinf(lse) ? -INFINITY : lse;
  }
};

__device__ __forceinline__ float weight(float lse, float max) {
  return isinf(lse) ? 0.0f : expf(lse - max);
}

// States `first` on, of which bit i of `read` allows the i-th, at values `begin` of a lane.
template <typename T, bool kWhole>
struct StateTile {
  static constexpr int kValues = kVectorBytes / static_cast<int>(sizeof(T));
  static constexpr int kStep = kWarpSize * kValues;  // from one vector of a lane to the next
  Pack<T, kValues> vectors[kStates][kVectors];

  __device__ __forceinline__ StateTile(const T* outs, std::int64_t stride, std::int64_t d,
                                       std::int64_t first, std::int64_t begin, unsigned read) {
#pragma unroll
    for (int i = 0; i < kStates; ++i) {
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
        const std::int64_t at = begin + j * kStep;
        vectors[i][j] =
            load<kWhole, T, kValues>(outs + (first + i) * stride + at, read >> i & 1u ? d - at : 0);
      }
    }
  }
};

template <typename T, bool kWhole>
__global__ void __launch_bounds__(kThreads, 4)
    portable_merge_attn_states_kernel(MergeAttnStates merge) {
  using Tile = StateTile<T, kWhole>;
  constexpr int kValues = Tile::kValues;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const std::int64_t item =
      std::int64_t{blockIdx.x} * kWarps + static_cast<int>(threadIdx.x) / kWarpSize;
  const std::int64_t row = merge.num_heads.quotient(item);
  const std::int64_t head = item - row * merge.num_heads.divisor();
  if (row >= merge.out.size(0)) return;  // the whole warp

  const std::int64_t num_states = merge.outs.size(0);
  const std::int64_t d = merge.out.size(2);
  const std::int64_t state_stride = merge.outs.stride(0);
  const T* outs =
      merge.outs.ptr<const T>() + row * merge.outs.stride(1) + head * merge.outs.stride(2);
  const auto all_states = num_states >= kStates ? (1u << kStates) - 1 : (1u << num_states) - 1;
  Tile tile(outs, state_stride, d, 0, lane * kValues, all_states);

  const StateLses lses{
      merge.lses.ptr<const float>() + row * merge.lses.stride(1) + head * merge.lses.stride(2),
      merge.lses.stride(0), num_states};
  float max = -INFINITY;  // over numbers: fmaxf passes over a NaN
  for (std::int64_t state = lane; state < num_states; state += kWarpSize) {
    max = fmaxf(max, lses(state));
  }
  max = warp_max(max);
  float sum = 0.0f;
  for (std::int64_t state = lane; state < num_states; state += kWarpSize) {
    sum += weight(lses(state), max);
  }
  sum = warp_sum(sum);
  if (lane == 0) {
    merge.lse.ptr<float>()[row * merge.lse.stride(0) + head * merge.lse.stride(1)] =
        sum == 0.0f ? INFINITY : max + logf(sum);
  }

  T* out = merge.out.ptr<T>() + row * merge.out.stride(0) + head * merge.out.stride(1);
  bool loaded = true;  // the next tile, by the load above
  // Whole warps, since the weights are shuffled; lanes past the row's end load and store nothing.
  for (std::int64_t begin_of_warp = 0; begin_of_warp < d; begin_of_warp += kVectors * Tile::kStep) {
    const std::int64_t begin = begin_of_warp + lane * kValues;
    float merged[kVectors][kValues] = {};
    for (std::int64_t first = 0; first < num_states; first += kWarpSize) {
      const float lse = lses(first + lane);
      const unsigned used = __ballot_sync(kAllLanes, !isinf(lse));
      const float share = isinf(lse) ? 0.0f : weight(lse, max) / sum;
      // Up to the last state that is used.
      for (int state = 0; state < kWarpSize && used >> state != 0; state += kStates) {
        if (!loaded) tile = Tile(outs, state_stride, d, first + state, begin, used >> state);
        loaded = false;
#pragma unroll
        for (int i = 0; i < kStates; ++i) {
          const float part_share = __shfl_sync(kAllLanes, share, state + i);
          if ((used >> (state + i) & 1u) == 0) continue;  // may be NaN
#pragma unroll
          for (int j = 0; j < kVectors; ++j) {
#pragma unroll
            for (int k = 0; k < kValues; ++k) {
              merged[j][k] = fmaf(part_share, to_float(tile.vectors[i][j], k), merged[j][k]);
            }
          }
        }
      }
      loaded = false;
    }
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      const std::int64_t at = begin + j * Tile::kStep;
      store<kWhole>(out + at, pack_from_float<T>(merged[j]), d - at);
    }
  }
}

}  // namespace

Status merge_attn_states(const MergeAttnStatesParams& params) {
  const std::int64_t items = params.out.size(0) * params.out.size(1);
  const std::int64_t ctas = ceil_div<std::int64_t>(items, kWarps);
  if (ctas > kMaxGridX) return Status::internal("portable_merge_attn_states_kernel: too many rows");
  return with_value_type(params.outs.dtype, [&](auto zero) {
    using T = decltype(zero);
    const MergeAttnStates merge{
        params.outs, params.lses, params.out, params.lse, FastDivisor(params.out.size(1)),
    };
    const bool whole = params.out.size(2) * sizeof(T) % kVectorBytes == 0 &&
                       rows_aligned(params.outs, sizeof(T), kVectorBytes) &&
                       rows_aligned(params.out, sizeof(T), kVectorBytes);
    return with_flag(whole, [&](auto flag) {
      return launch<portable_merge_attn_states_kernel<T, decltype(flag)::value>>(
          "portable_merge_attn_states_kernel", params.launch, dim3(static_cast<unsigned>(ctas)),
          kThreads, 0, merge);
    });
  });
}

}  // namespace dsa::cuda

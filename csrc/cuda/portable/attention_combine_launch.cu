// SPDX-License-Identifier: Apache-2.0
// Combines the splits of each (query token, head): out = sum_s w_s out_s / sum_s w_s with
// w_s = 2^(lse_s - max lse). A warp has 128 dims of a head, a lane 4 of them; lanes share the
// weights of up to 32 splits, and 8 splits are loaded together. Reads every partial result once.
#include <cstdint>

#include "cuda/common/attention_result.cuh"
#include "cuda/common/attention_splits.h"
#include "cuda/common/launch.h"
#include "cuda/common/pair.cuh"
#include "cuda/common/vector.cuh"
#include "cuda/ptx/arithmetic.cuh"

namespace dsa::cuda {
namespace {

constexpr int kCombineWarps = 4;
constexpr int kWarpDims = 128;

template <typename Element>
__global__ void __launch_bounds__(32 * kCombineWarps)
    portable_attention_combine_kernel(const __grid_constant__ AttentionArgs args,
                                      std::int64_t heads_of_launch) {
  const int parts = (args.d_v + kWarpDims - 1) / kWarpDims;
  const std::int64_t warp = std::int64_t{blockIdx.x} * kCombineWarps + threadIdx.x / 32;
  const std::int64_t item = warp / parts;
  if (item >= heads_of_launch) return;
  const int lane = threadIdx.x % 32;
  const int part = static_cast<int>(warp % parts);
  const int column = part * kWarpDims + 4 * lane;
  const std::int64_t launch_row = item / args.num_heads;
  const int head = static_cast<int>(item % args.num_heads);

  const auto split_at = [&](int split) {
    return (launch_row * args.num_splits + split) * args.num_heads + head;
  };
  const auto lse2_of = [&](int split) {
    return split < args.num_splits ? args.partial_lse[split_at(split)] : -kAttentionInf;
  };
  float largest = -kAttentionInf;
  for (int s = lane; s < args.num_splits; s += 32) largest = fmaxf(largest, lse2_of(s));
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, step));
  }
  const float base = largest == -kAttentionInf ? 0.0f : largest;

  float out[4] = {};
  float sum = 0.0f;
  for (int first = 0; first < args.num_splits; first += 32) {
    const float own = lse2_of(first + lane);
    const unsigned filled = __ballot_sync(kAllLanes, own != -kAttentionInf);
    const float own_weight = own == -kAttentionInf ? 0.0f : ptx::exp2_approx(own - base);
    constexpr int kTogether = 8;
    for (int s = 0; s < 32 && filled >> s != 0; s += kTogether) {
      float4 x[kTogether] = {};
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        if ((filled >> (s + i) & 1u) == 0 || column >= args.d_v) continue;  // an empty split
        x[i] = *reinterpret_cast<const float4*>(args.partial_out +
                                                split_at(first + s + i) * args.d_v + column);
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const float weight = __shfl_sync(kAllLanes, own_weight, s + i);
        sum += weight;
        out[0] = fmaf(weight, x[i].x, out[0]);
        out[1] = fmaf(weight, x[i].y, out[1]);
        out[2] = fmaf(weight, x[i].z, out[2]);
        out[3] = fmaf(weight, x[i].w, out[3]);
      }
    }
  }

  const std::int64_t row = args.first_row + launch_row;
  const std::int64_t b = row / args.tokens_per_request;
  const std::int64_t j = row % args.tokens_per_request;
  const HeadResult result(sum, largest, largest);
  if (lane == 0 && part == 0) {
    args.lse[b * args.lse_stride_b + j * args.lse_stride_j + head * args.lse_stride_h] =
        result.lse();
  }
  if (column >= args.d_v) return;
  float factor = result.empty ? 0.0f : result.factor();
  if (args.sink != nullptr && !result.empty) {
    factor *= share_beside(args.sink[head * args.sink_stride], result.lse());
  }
  std::uint16_t* dst =
      args.out + b * args.out_stride_b + j * args.out_stride_j + head * args.out_stride_h + column;
  const uint2 packed = {pack<Element>(out[0] * factor, out[1] * factor),
                        pack<Element>(out[2] * factor, out[3] * factor)};
  if (args.out_aligned) {
    *reinterpret_cast<uint2*>(dst) = packed;
  } else {
    dst[0] = static_cast<std::uint16_t>(packed.x);
    dst[1] = static_cast<std::uint16_t>(packed.x >> 16);
    dst[2] = static_cast<std::uint16_t>(packed.y);
    dst[3] = static_cast<std::uint16_t>(packed.y >> 16);
  }
}

}  // namespace

Status attention_combine(const AttentionArgs& args, std::int64_t rows, DType out,
                         const Launch& where) {
  const std::int64_t heads = rows * args.num_heads;
  const std::int64_t warps = heads * ceil_div(args.d_v, kWarpDims);
  const dim3 grid(static_cast<unsigned>(ceil_div<std::int64_t>(warps, kCombineWarps)));
  const auto launch_for = [&](auto element) {
    return launch<portable_attention_combine_kernel<decltype(element)>>(
        "portable_attention_combine_kernel", where, grid, 32 * kCombineWarps, 0, args, heads);
  };
  return out == DType::kBFloat16 ? launch_for(__nv_bfloat16{}) : launch_for(__half{});
}

}  // namespace dsa::cuda

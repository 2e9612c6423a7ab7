// SPDX-License-Identifier: Apache-2.0
// Combines the splits of each (query token, head): out = sum_s w_s out_s / sum_s w_s with
// w_s = 2^(lse_s - max lse). One warp a head; a lane holds 4 neighbouring dims of each 128.
// Registers: 16 fp32 of output. Reads every partial result once, 16 bytes a lane.
#pragma once

#include "cuda/portable/attention_kernel.cuh"

namespace dsa::cuda {

inline constexpr int kCombineWarps = 4;

template <typename Element>
__global__ void __launch_bounds__(32 * kCombineWarps)
    portable_attention_combine_kernel(const __grid_constant__ AttentionArgs args,
                                      std::int64_t heads_of_launch) {
  const std::int64_t item = std::int64_t{blockIdx.x} * kCombineWarps + threadIdx.x / 32;
  if (item >= heads_of_launch) return;
  const int lane = threadIdx.x % 32;
  const std::int64_t launch_row = item / args.num_heads;
  const int head = static_cast<int>(item % args.num_heads);

  const auto split_at = [&](int split) {
    return (launch_row * args.num_splits + split) * args.num_heads + head;
  };
  float largest = -kAttentionInf;
  for (int s = lane; s < args.num_splits; s += 32) {
    largest = fmaxf(largest, args.partial_lse[split_at(s)]);
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
  }
  const float base = largest == -kAttentionInf ? 0.0f : largest;

  constexpr int kVectors = kMaxDimV / 128;
  float out[kVectors][4] = {};
  float sum = 0.0f;
  for (int s = 0; s < args.num_splits; ++s) {
    const float lse2 = args.partial_lse[split_at(s)];
    if (lse2 == -kAttentionInf) continue;  // an empty split
    const float weight = exp2_approx(lse2 - base);
    sum += weight;
    const float* partial = args.partial_out + split_at(s) * args.d_v;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int column = 128 * v + 4 * lane;
      if (column >= args.d_v) break;
      const float4 x = *reinterpret_cast<const float4*>(partial + column);
      out[v][0] = fmaf(weight, x.x, out[v][0]);
      out[v][1] = fmaf(weight, x.y, out[v][1]);
      out[v][2] = fmaf(weight, x.z, out[v][2]);
      out[v][3] = fmaf(weight, x.w, out[v][3]);
    }
  }

  const std::int64_t row = args.first_row + launch_row;
  const std::int64_t b = row / args.tokens_per_request;
  const std::int64_t j = row % args.tokens_per_request;
  const HeadResult result(sum, sum, largest, largest);
  if (lane == 0) {
    args.lse[b * args.lse_stride_b + j * args.lse_stride_j + head * args.lse_stride_h] =
        result.lse();
  }
  float factor = result.empty ? 0.0f : result.factor();
  if (args.sink != nullptr && !result.empty) {
    factor *= share_beside(args.sink[head * args.sink_stride], result.lse());
  }
  std::uint16_t* dst =
      args.out + b * args.out_stride_b + j * args.out_stride_j + head * args.out_stride_h;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int column = 128 * v + 4 * lane;
    if (column >= args.d_v) break;
    const uint2 packed = {pack<Element>(out[v][0] * factor, out[v][1] * factor),
                          pack<Element>(out[v][2] * factor, out[v][3] * factor)};
    if (args.out_aligned) {
      *reinterpret_cast<uint2*>(dst + column) = packed;
    } else {
      dst[column] = static_cast<std::uint16_t>(packed.x);
      dst[column + 1] = static_cast<std::uint16_t>(packed.x >> 16);
      dst[column + 2] = static_cast<std::uint16_t>(packed.y);
      dst[column + 3] = static_cast<std::uint16_t>(packed.y >> 16);
    }
  }
}

}  // namespace dsa::cuda

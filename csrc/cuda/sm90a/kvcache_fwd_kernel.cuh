// SPDX-License-Identifier: Apache-2.0
// Attention of decode over the paged cache of 656-byte rows, on Hopper: sparse, by slots, or dense.
//
// Tile       64 tokens, all of whose 512 values and RoPE are K, and whose values are V, for 8, 16,
//            32 or 64 heads of a query token. Both products have tokens or dims as the rows of
//            wgmma, which come from registers, and heads as its columns, so that their time goes
//            with the heads: S^T [64, heads] = K Q^T; out^T [512, heads] += V^T P^T.
// Scales     e4m3 values become f16, exactly. K's products of a group of 128 dims meet their fp32
//            scale in fp32: S goes from group to group times the one's scale over the next one's.
//            V's scales are f16 * 2^exponent, of which values are multiplied by the f16 (2^-12) and
//            P by the power: the softmax's base is that of score + exponent, so that P is at most
//            2^8 in f16. The sum is of P without it.
// Warpgroups 0: scores and softmax; 64 tokens by 16 in each warp. 1 and 2: 256 of the output's
//            dims each. 3: producer: two warps copy rows as they are, by cp.async; two make
//            of their scales what the others need.
// Registers  scores 112 (64 heads: 32 of S, 16 of sums; fewer: two sums in turns); output 176, of
//            which 128 are fp32 sums; producer 48.
// Shared     64 heads: q 72 KiB, P 2 x 8 KiB, raw rows 3 x 41 KiB; fewer: 4 x 41 KiB.
// Barriers   full_q: the bytes of q. full_raw: the 64 copying threads' copies, and their two warps.
//            full_scales: the producer's other two warps. empty_raw: the 12 warps of the others.
//            full_p: the four of scores. empty_p: the eight of output. bar.sync 1: the scores'
//            warpgroup; 2: all three, at the start (twice) and at the end.
// Grid       x: query token, block of heads; y: split of its tokens.
#pragma once

#include <cuda.h>

#include <algorithm>
#include <cstdint>

#include "cuda/common/attention_args.h"
#include "cuda/common/attention_result.cuh"
#include "cuda/common/pair.cuh"
#include "cuda/ptx/ldst.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/sm90a/kvcache_fwd_config.h"
#include "cuda/sm90a/kvcache_fwd_producer.cuh"
#include "cuda/sm90a/kvcache_fwd_queries.cuh"
#include "cuda/sm90a/kvcache_fwd_scores.cuh"
#include "cuda/sm90a/kvcache_fwd_values.cuh"

namespace dsa::cuda::sm90a {

// By one thread.
template <typename Config>
__device__ void initialise_barriers(typename Config::SharedStorage& shared) {
  ptx::mbarrier_init(shared.full_q, 1);
  for (int i = 0; i < Config::kStages; ++i) {
    ptx::mbarrier_init(shared.full_raw[i], Config::kCopyArrivals);
    ptx::mbarrier_init(shared.full_scales[i], 2);
    ptx::mbarrier_init(shared.empty_raw[i], Config::kReaderWarps);
  }
  for (int i = 0; i < 2; ++i) {
    ptx::mbarrier_init(shared.full_p[i], 4);
    ptx::mbarrier_init(shared.empty_p[i], 4 * Config::kValueWarpgroups);
  }
  ptx::mbarrier_fence_init();
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    sm90a_kvcache_fwd_kernel(const __grid_constant__ AttentionArgs args,
                             const __grid_constant__ CUtensorMap q_map) {
  extern __shared__ __align__(1024) std::uint8_t shared_bytes[];
  auto& shared = ptx::pinned_in_shared<typename Config::SharedStorage>(shared_bytes);
  const int warpgroup = threadIdx.x / 128;
  const unsigned head_tiles = (args.num_heads + Config::kHeads - 1) / Config::kHeads;
  const std::int64_t launch_row = blockIdx.x / head_tiles;
  const std::int64_t row = args.first_row + launch_row;
  const std::int64_t b = row / args.tokens_per_request, j = row % args.tokens_per_request;
  const int first_head = static_cast<int>(blockIdx.x % head_tiles) * Config::kHeads;
  const int heads = std::min(args.num_heads - first_head, int{Config::kHeads});
  const int split = blockIdx.y;

  if (threadIdx.x == 0) {
    initialise_barriers<Config>(shared);
    ptx::mbarrier_arrive_expect(shared.full_q, sizeof(shared.q));
    for (int i = 0; i < Config::kQueryBlocks; ++i) {
      ptx::tma_load(shared.q[i], q_map, shared.full_q, i * 128, first_head,
                    static_cast<std::int32_t>(j), static_cast<std::int32_t>(b));
    }
  } else if (threadIdx.x == 32) {
    shared.keys.init(args, b, j);
  }
  __syncthreads();
  const int all = (shared.keys.size() + Config::kTokens - 1) / Config::kTokens;
  const int each = (all + args.num_splits - 1) / args.num_splits;
  const int begin = std::min(split * each, all), end = std::min(begin + each, all);
  const int tiles = end - begin;
  const std::int64_t partial = (launch_row * args.num_splits + split) * args.num_heads + first_head;

  if (warpgroup == Config::kProducer) {
    ptx::set_max_registers_down<Config::kProducerRegisters>();
    KvCacheFwdProducer<Config>(shared, args, threadIdx.x / 32 % 4).run(begin, end);
    return;
  }
  constexpr int kMathThreads = 128 * Config::kProducer;
  if (warpgroup == Config::kScores) {
    ptx::set_max_registers_down<Config::kScoreRegisters>();
    KvCacheFwdScores<Config> scores(shared,
                                    args.scale_log2 * convert_queries<Config>(shared).down());
    scores.run(tiles);
    scores.finish([&](int head, const HeadResult& result) {
      float factor = result.empty ? 0.0f : result.factor();
      const int h = first_head + head;
      if (head >= heads) {
      } else if (args.num_splits > 1) {
        args.partial_lse[partial + head] = result.lse2;
      } else {
        args.lse[b * args.lse_stride_b + j * args.lse_stride_j + h * args.lse_stride_h] =
            result.lse();
        if (args.sink != nullptr && !result.empty) {
          factor *= share_beside(args.sink[h * args.sink_stride], result.lse());
        }
      }
      shared.out_factor[head] = factor * (1.0f / (1 << Config::kScaleBits));
    });
    named_sync<kMathBarrier, kMathThreads>();
    return;
  }
  ptx::set_max_registers_up<Config::kValueRegisters>();
  convert_queries<Config>(shared);
  KvCacheFwdValues<Config> values(shared, warpgroup - Config::kFirstValues);
  values.run(tiles);
  named_sync<kMathBarrier, kMathThreads>();
  if (args.num_splits > 1) {
    float* out = args.partial_out + partial * Config::kDimV;
    values.store_out([&](int head, int dim, float x0, float x1) {
      if (head < heads) *reinterpret_cast<float2*>(out + head * Config::kDimV + dim) = {x0, x1};
    });
    return;
  }
  std::uint16_t* out =
      args.out + b * args.out_stride_b + j * args.out_stride_j + first_head * args.out_stride_h;
  values.store_out([&](int head, int dim, float x0, float x1) {
    if (head >= heads) return;
    std::uint16_t* to = out + head * args.out_stride_h + dim;
    const std::uint32_t packed = pack<__nv_bfloat16>(x0, x1);
    if (args.out_aligned) {
      *reinterpret_cast<std::uint32_t*>(to) = packed;
    } else {
      to[0] = static_cast<std::uint16_t>(packed);
      to[1] = static_cast<std::uint16_t>(packed >> 16);
    }
  });
}

}  // namespace dsa::cuda::sm90a

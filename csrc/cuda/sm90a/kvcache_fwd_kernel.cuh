// SPDX-License-Identifier: Apache-2.0
// Attention over the paged FP8 caches, V3.2's and V4's, on Hopper: decode, sparse, by slots, or
// dense, and sparse prefill.
//
// Tile       64 tokens, whose values and RoPE are K, and whose values, of V4 also RoPE, are V, by
//            8, 16, 32 or 64 heads of a query token. Both products have tokens or dims as the rows
//            of wgmma, which come from registers, and heads as its columns, so that their time goes
//            with the heads: S^T [64, heads] = K Q^T; out^T [512, heads] += V^T P^T.
// Scales     e4m3 values become f16, exactly. A row's scales are f16 * 2^exponent, of which V is
//            multiplied by the f16 (2^-12; of V4 exactly) and P by the power: the softmax's base is
//            that of score + exponent, so that P is at most 2^8 in f16. The sum is of P without it.
//            V3.2's K: products of a group of 128 dims meet their fp32 scale in fp32: a sum goes
//            from group to group times the one's scale over the next one's, and last, to RoPE,
//            times the scale. V4's K is as V. RoPE is bf16, of V4's V with a second P, bf16 and
//            without the power.
// Warpgroups 0: scores; 64 tokens by 16 in each warp. 1 and 2: their softmax, by halves of the
//            heads, and 256 of the output's dims each. 3: producer: two warps copy rows as they
//            are, a bulk copy each; two make of their scales what the others need.
// Registers  scores 96 (64 heads: one sum of 32; fewer: two sums in turns); output 192, of which
//            128 are fp32 sums; producer 32.
// Shared     64 heads: q 72 KiB, P 8 KiB, scores 16 KiB, raw rows 3 x 41 KiB; fewer: 4 x 41 KiB.
//            V4: q 64 KiB, P 16 KiB, raw rows of 37 KiB.
// Barriers   full_q: the bytes of q. full_raw: the bytes of rows, and the two warps that copy (V4:
//            and their lanes, as the scales they copy arrive). full_scales: the producer's other
//            two warps. empty_raw: the 12 warps of the others. bar.sync 1: these, for the queries
//            (twice). 2: the output's 256 threads: P is there, and bases move. 3 and 4: scores are
//            there, and have been read, the ones arriving and the others waiting.
// Grid       x: query token, block of heads; y: split of its tokens. With kInClusters the splits
//            are a cluster, which combines them: kvcache_fwd_combination.cuh; barrier.cluster, by
//            the output's threads alone, twice.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>

#include <cstdint>

#include "cuda/common/attention_args.h"
#include "cuda/common/attention_place.cuh"
#include "cuda/common/attention_result.cuh"
#include "cuda/ptx/ldst.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/sm90a/kvcache_fwd_combination.cuh"
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
    ptx::mbarrier_init(shared.full_raw[i], Config::kFullRawArrivals);
    ptx::mbarrier_init(shared.full_scales[i], Config::kPrepareWarps);
    ptx::mbarrier_init(shared.empty_raw[i], Config::kReaderWarps);
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
  const auto place = [&] { return AttentionPlace::of_cta(args, Config::kHeads); };

  if (threadIdx.x == 0) {
    const AttentionPlace at = place();
    initialise_barriers<Config>(shared);
    ptx::mbarrier_arrive_expect(shared.full_q, sizeof(shared.q));
    for (int i = 0; i < Config::kQueryBlocks; ++i) {
      ptx::tma_load(shared.q[i], q_map, shared.full_q, i * 128, at.first_head,
                    static_cast<std::int32_t>(at.j), static_cast<std::int32_t>(at.b));
    }
  } else if (threadIdx.x == 32) {
    const AttentionPlace at = place();
    shared.keys.init(args, at.b, at.j);
    const TileShare share(args, shared.keys.size(), Config::kTokens, blockIdx.y);
    shared.first_tile = share.first;
    shared.tiles = share.count;
  }
  __syncthreads();

  if (warpgroup == Config::kProducer) {
    ptx::set_max_registers_down<Config::kProducerRegisters>();
    KvCacheFwdProducer<Config>(shared, args, threadIdx.x / 32 % 4).run();
    return;
  }
  const QueryScale scale = convert_queries<Config>(shared);
  if (warpgroup == Config::kScores) {
    ptx::set_max_registers_down<Config::kScoreRegisters>();
    KvCacheFwdScores<Config> scores(shared);
    scores.run();
    return;
  }
  ptx::set_max_registers_up<Config::kValueRegisters>();
  KvCacheFwdValues<Config> values(shared, args.scale_log2 * scale.down(),
                                  warpgroup - Config::kFirstValues);
  values.run();
  constexpr float kDown = 1.0f / (1 << Config::kScaleBits);
  if constexpr (Config::kInClusters) {
    values.finish([&](int head, const HeadResult& result) {
      shared.splits().results[head] = {result.lse2, result.factor() * kDown};
    });
    values.stage();
    KvCacheFwdCombination<Config>(shared, args, threadIdx.x - 128 * Config::kFirstValues).run();
  } else {
    const AttentionPlace at = place();
    values.finish([&](int head, const HeadResult& result) {
      const float factor = head < at.heads ? store_head(args, at, head, result) : 0.0f;
      shared.out_factor[head] = factor * kDown;
    });
    if (args.num_splits > 1) {
      values.store(args.partial_out + at.partial * Config::kDimV, Config::kDimV, at.heads, true);
    } else {
      values.store(reinterpret_cast<__nv_bfloat16*>(args.out) + at.b * args.out_stride_b +
                       at.j * args.out_stride_j + at.first_head * args.out_stride_h,
                   args.out_stride_h, at.heads, args.out_aligned);
    }
  }
}

}  // namespace dsa::cuda::sm90a

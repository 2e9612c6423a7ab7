// SPDX-License-Identifier: Apache-2.0
// Attention over 16-bit latents on Hopper: sparse prefill, and decode over the paged cache, sparse
// or dense.
//
// Tile       64 heads of a query token by two blocks of 64 tokens. Scores S = Q K^T [64, 64] of
// each
//            block; out [64, 512] += P V. All operands are 16-bit and in shared memory, but for a
//            warpgroup's own P, which is in registers.
// Warpgroups 0 and 1: the scores and the softmax of a tile's first and second block, and the first
//            and second 256 dims of the output for both: they exchange P. 2: producer; four warps
//            copy rows, cp.async of 16 bytes a lane, or one thread whole blocks of a dense cache's
//            pages, by tensor copies.
// Turns      0 has its next scores while 1 has its softmax, and its softmax while both multiply the
//            second block's values.
// Softmax    Its base goes from block to block, from warpgroup to warpgroup, and moves only where a
//            score is 2^8 above it.
// Registers  232, of which 128 are the output's sums and 32 the scores; producer 40.
// Shared     q 72 KiB; two blocks of 72 KiB, where P takes the place of RoPE. Without RoPE 64 KiB
//            each, and P 16 KiB.
// Barriers   full, empty: of each block's first and second 256 dims and RoPE. full_q: the bytes of
//            q. bar.sync 1: both of the mathematics' warpgroups, at the end. 2 and 3: one of them,
//            RoPE has been read. 4 and 5: P and bases of a block are there. 6: the producer's, rows
//            of a block have been looked up.
// Grid       x: query token, block of heads; y: split of its tokens.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/common/attention_args.h"
#include "cuda/common/attention_place.cuh"
#include "cuda/common/attention_result.cuh"
#include "cuda/ptx/ldst.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/sm90a/latent_fwd_config.h"
#include "cuda/sm90a/latent_fwd_math.cuh"
#include "cuda/sm90a/latent_fwd_producer.cuh"

namespace dsa::cuda::sm90a {

// By one thread.
template <typename Config>
__device__ void initialise_latent_barriers(typename Config::SharedStorage& shared) {
  constexpr int kWarps = 4;  // of a warpgroup
  ptx::mbarrier_init(shared.full_q, 1);
  for (int block = 0; block < 2; ++block) {
    for (int part = 0; part < Config::kParts; ++part) {
      ptx::mbarrier_init(shared.full[block][part], Config::full_arrivals(part));
      ptx::mbarrier_init(shared.empty[block][part], kWarps);
    }
  }
  ptx::mbarrier_fence_init();
}

template <typename Config, int kOwn>
__device__ void attend(typename Config::SharedStorage& shared, const AttentionArgs& args,
                       int thread) {
  LatentFwdMath<Config, kOwn> math(shared, args.scale_log2, thread);
  math.run();
  const AttentionPlace at(args, Config::kHeads);
  math.finish([&](int head, const HeadResult& result) {
    shared.out_factor[head] = head < at.heads ? store_head(args, at, head, result) : 0.0f;
  });
  if (args.num_splits > 1) {
    math.store(args.partial_out + at.partial * Config::kDimV, at.heads);
  } else {
    math.store(args.out + at.b * args.out_stride_b + at.j * args.out_stride_j +
                   at.first_head * args.out_stride_h,
               args.out_stride_h, at.heads, args.out_aligned);
  }
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    sm90a_latent_fwd_kernel(const __grid_constant__ AttentionArgs args,
                            const __grid_constant__ CUtensorMap q_map,
                            const __grid_constant__ CUtensorMap page_map, bool by_pages) {
  extern __shared__ __align__(1024) std::uint8_t shared_bytes[];
  auto& shared = ptx::pinned_in_shared<typename Config::SharedStorage>(shared_bytes);
  const int warpgroup = threadIdx.x / 128, thread = threadIdx.x % 128;

  if (threadIdx.x == 0) {
    const AttentionPlace at(args, Config::kHeads);
    initialise_latent_barriers<Config>(shared);
    ptx::mbarrier_arrive_expect(shared.full_q, sizeof(shared.q));
    for (int i = 0; i < Config::kDimBlocks; ++i) {
      ptx::tma_load(shared.q[i], q_map, shared.full_q, i * 128, at.first_head,
                    static_cast<std::int32_t>(at.j), static_cast<std::int32_t>(at.b));
    }
  } else if (threadIdx.x == 32) {
    const AttentionPlace at(args, Config::kHeads);
    shared.keys.init(args, at.b, at.j);
    const TileShare share(args, shared.keys.size(), Config::kTokens);
    shared.first_block = share.first;
    shared.blocks = share.count;
  }
  __syncthreads();

  if (warpgroup == Config::kProducer) {
    ptx::set_max_registers_down<Config::kProducerRegisters>();
    LatentFwdProducer<Config>(shared, args, page_map, by_pages, thread).run();
    return;
  }
  ptx::set_max_registers_up<Config::kMathRegisters>();
  if (warpgroup == 0) {
    attend<Config, 0>(shared, args, thread);
  } else {
    attend<Config, 1>(shared, args, thread);
  }
}

}  // namespace dsa::cuda::sm90a

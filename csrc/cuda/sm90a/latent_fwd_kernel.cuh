// SPDX-License-Identifier: Apache-2.0
// Attention over 16-bit latents on Hopper: sparse prefill, and decode over the paged cache, sparse
// or dense. A tile has 64 heads, or 8, 16 or, in prefill, 32 if there are no more than these.
//
// 64 heads
// Tile       a query token's heads by two blocks of 64 tokens: scores S = Q K^T [64, 64] of each
//            block; out [64, 512] += P V. All operands are 16-bit; P is in registers.
// Warpgroups 0 and 1: the scores and the softmax of a tile's first and second block, and the first
//            and second 256 dims of the output for both: they exchange P. 2 and 3: producers of the
//            first and second blocks. Rows by cp.async, 16 bytes a lane; whole blocks of a dense
//            cache's pages by tensor copies, some of the parts by each warp. 3 also copies q.
// Overlap    0 has its next scores while 1 has its softmax, and its softmax while both multiply the
//            second block's values and 1 begins with its next scores. A CTA has work after work:
//            nobody waits between two but where q or the output must be ready.
// Softmax    Its base goes from block to block, from warpgroup to warpgroup, and moves only where a
//            score is 2^8 above it. The sum of P that divides the output is a product with ones.
// Registers  224 and 208, of which 128 are the output's sums and 32 the scores; producers 40.
// Shared     q 72 KiB; two blocks of 72 KiB (without RoPE 64 KiB each); P 8 KiB.
//
// Few heads
// Tile       a query token's heads by a block of 64 tokens, which are the product's rows, as dims
//            are of the output's: S^T [64, heads] = K Q^T; out^T [512, heads] += V^T P^T.
// Warpgroups 0 and 2, 1 and 3: two workers, that have work for themselves. The first of each has
//            the mathematics, the second is its producer, as above.
// Registers  216, with 32 heads 128 of the output's sums and 16 scores; producers 40.
// Shared     for 32 heads q 2 x 36 KiB; a block of 72 KiB each; P [heads, tokens] 2 x 4 KiB.
//
// Barriers   full, empty: of each block's parts, 128 dims of the values or RoPE. full_q, empty_q.
//            64 heads: bar.sync 1: both of the mathematics' warpgroups, at the end. 2 and 3: P and
//            bases of a block are there. 4: 1 has stored. Few heads: 2 and 3: the mathematics of a
//            worker. 5 and 6: a producer's.
// Grid       as many CTAs as SMs; they, or their workers, take query tokens, blocks of heads and
//            splits in turns.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "cuda/common/attention_args.h"
#include "cuda/common/attention_place.cuh"
#include "cuda/common/attention_result.cuh"
#include "cuda/ptx/ldst.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/sm90a/latent_fwd_config.h"
#include "cuda/sm90a/latent_fwd_few.cuh"
#include "cuda/sm90a/latent_fwd_math.cuh"
#include "cuda/sm90a/latent_fwd_producer.cuh"

namespace dsa::cuda::sm90a {

// By one thread.
template <typename Config>
__device__ void initialise_latent_barriers(typename Config::SharedStorage& shared) {
  constexpr int kWarps = 4;  // of a warpgroup
  for (int i = 0; i < Config::kWorkers; ++i) {
    ptx::mbarrier_init(shared.full_q[i], Config::kProducerThreads + 1);
    ptx::mbarrier_init(shared.empty_q[i], 2 / Config::kWorkers * kWarps);
  }
  for (int block = 0; block < 2; ++block) {
    for (int part = 0; part < Config::kParts; ++part) {
      ptx::mbarrier_init(shared.full[block][part], Config::full_arrivals(part));
      ptx::mbarrier_init(shared.empty[block][part], kWarps);
    }
  }
  ptx::mbarrier_fence_init();
}

template <typename Config, int kPlace>
__device__ void find_first_task(typename Config::SharedStorage& shared, const AttentionArgs& args,
                                const LatentFwdGrid& grid) {
  const typename Config::template Turns<kPlace> turns(grid);
  if (turns.has(0)) find_latent_task<Config>(args, turns.work(0), shared.tasks[kPlace][0]);
}

template <typename Config, int kOwn>
__device__ void attend(typename Config::SharedStorage& shared, const AttentionArgs& args,
                       const LatentFwdGrid& grid, int thread) {
  using Math =
      std::conditional_t<Config::kFew, LatentFwdFew<Config, kOwn>, LatentFwdMath<Config, kOwn>>;
  Math math(shared, args.scale_log2, thread);
  const typename Config::template Turns<kOwn> turns(grid);
  for (unsigned n = 0; turns.has(n); ++n) {
    const bool is_last = !turns.has(n + 1);
    math.run(n, is_last);
    const AttentionPlace& at = shared.places[Config::worker_of(kOwn)][n % 2];
    math.finish([&](int head, const HeadResult& result) {
      return head < at.heads ? store_head(args, at, head, result) : 0.0f;
    });
    if (args.num_splits > 1) {
      math.store(args.partial_out + at.partial * Config::kDimV, at.heads);
    } else {
      math.store(args.out + at.b * args.out_stride_b + at.j * args.out_stride_j +
                     at.first_head * args.out_stride_h,
                 args.out_stride_h, at.heads);
    }
    math.end(is_last);
  }
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    sm90a_latent_fwd_kernel(const __grid_constant__ AttentionArgs args,
                            const __grid_constant__ LatentFwdPages pages,
                            const __grid_constant__ LatentFwdGrid grid) {
  extern __shared__ __align__(1024) std::uint8_t shared_bytes[];
  auto& shared = ptx::pinned_in_shared<typename Config::SharedStorage>(shared_bytes);
  const int warpgroup = threadIdx.x / 128, thread = threadIdx.x % 128;

  if (threadIdx.x == 0) {
    initialise_latent_barriers<Config>(shared);
  } else if (threadIdx.x == 256) {
    find_first_task<Config, 0>(shared, args, grid);
  } else if (threadIdx.x == 384) {
    find_first_task<Config, 1>(shared, args, grid);
  }
  if constexpr (!Config::kFew) {
    if (threadIdx.x < sizeof(shared.math.ones) / 4) {
      reinterpret_cast<std::uint32_t*>(shared.math.ones)[threadIdx.x] =
          pack<typename Config::Element>(1.0f, 1.0f);
      ptx::fence_async_shared();
    }
  }
  __syncthreads();

  if (warpgroup == 0) {
    ptx::set_max_registers_up<Config::kRegisters[0]>();
    attend<Config, 0>(shared, args, grid, thread);
  } else if (warpgroup == 1) {
    ptx::set_max_registers_up<Config::kRegisters[1]>();
    attend<Config, 1>(shared, args, grid, thread);
  } else if (warpgroup == 2) {
    ptx::set_max_registers_down<Config::kRegisters[2]>();
    LatentFwdProducer<Config, 0>(shared, args, pages, thread).run(grid);
  } else {
    ptx::set_max_registers_down<Config::kRegisters[3]>();
    LatentFwdProducer<Config, 1>(shared, args, pages, thread).run(grid);
  }
}

}  // namespace dsa::cuda::sm90a

// SPDX-License-Identifier: Apache-2.0
// Attention of few heads over 16-bit latents on Hopper: up to 32 of sparse prefill, up to 16 of
// decode over the paged cache, sparse or dense.
//
// Tile       a query token's 8, 16 or 32 heads by a block of 64 tokens, which are the product's
//            rows, as dims are of the output's: S^T [64, heads] = K Q^T; out^T [512, heads] += V^T
//            P^T. All operands are 16-bit and in shared memory.
// Warpgroups 0 and 2, 1 and 3: two workers, that have work for themselves. The first of each has
//            the mathematics, the second is its producer: rows by cp.async, 16 bytes a lane; whole
//            blocks of a dense cache's pages by tensor copies, some of the parts by each warp.
// Overlap    A worker's mathematics with the other one's; its loads with its own, part by part.
// Registers  216, with 32 heads 128 of the output's sums and 16 scores; producers 40.
// Shared     for 32 heads q 2 x 36 KiB; a block of 72 KiB each; P [heads, tokens] 2 x 4 KiB.
//
// Barriers   full, empty: of each block's parts, 128 dims of the values or RoPE. full_q, empty_q.
//            bar.sync 1 and 2: the mathematics of a worker. 3 and 4: its producer.
// Grid       as many CTAs as SMs; their workers take query tokens, blocks of heads and splits in
//            turns.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cuda/common/attention_args.h"
#include "cuda/common/attention_place.cuh"
#include "cuda/common/attention_result.cuh"
#include "cuda/ptx/ldst.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/sm90a/latent_few_config.h"
#include "cuda/sm90a/latent_few_math.cuh"
#include "cuda/sm90a/latent_few_producer.cuh"

namespace dsa::cuda::sm90a {

// By one thread.
template <typename Config>
__device__ void initialise_latent_few_barriers(typename Config::SharedStorage& shared) {
  constexpr int kWarps = Config::kMathThreads / 32;
  for (int worker = 0; worker < Config::kWorkers; ++worker) {
    ptx::mbarrier_init(shared.full_q[worker], Config::kProducerThreads + 1);
    ptx::mbarrier_init(shared.empty_q[worker], kWarps);
    for (int part = 0; part < Config::kParts; ++part) {
      ptx::mbarrier_init(shared.full[worker][part], Config::full_arrivals(part));
      ptx::mbarrier_init(shared.empty[worker][part], kWarps);
    }
  }
  ptx::mbarrier_fence_init();
}

template <typename Config, int kWorker>
__device__ void find_first_task(typename Config::SharedStorage& shared, const AttentionArgs& args,
                                const LatentFwdGrid& grid) {
  const typename Config::template Turns<kWorker> turns(grid);
  if (turns.has(0)) find_latent_task<Config>(args, grid, turns.work(0), shared.tasks[kWorker][0]);
}

template <typename Config, int kWorker>
__device__ void attend_few(typename Config::SharedStorage& shared, const AttentionArgs& args,
                           const LatentFwdGrid& grid, int thread) {
  LatentFewMath<Config, kWorker> math(shared, args.scale_log2, thread);
  const typename Config::template Turns<kWorker> turns(grid);
  for (unsigned n = 0; turns.has(n); ++n) {
    math.run(n);
    const AttentionPlace& at = shared.places[kWorker][n % 2];
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
  }
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    sm90a_latent_few_fwd_kernel(const __grid_constant__ AttentionArgs args,
                                const __grid_constant__ LatentFewPages pages,
                                const __grid_constant__ LatentFwdGrid grid) {
  extern __shared__ __align__(1024) std::uint8_t shared_bytes[];
  auto& shared = ptx::pinned_in_shared<typename Config::SharedStorage>(shared_bytes);
  const int warpgroup = threadIdx.x / 128, thread = threadIdx.x % 128;

  if (threadIdx.x == 0) {
    initialise_latent_few_barriers<Config>(shared);
  } else if (threadIdx.x == 256) {
    find_first_task<Config, 0>(shared, args, grid);
  } else if (threadIdx.x == 384) {
    find_first_task<Config, 1>(shared, args, grid);
  }
  __syncthreads();

  if (warpgroup == 0) {
    ptx::set_max_registers_up<Config::kMathRegisters>();
    attend_few<Config, 0>(shared, args, grid, thread);
  } else if (warpgroup == 1) {
    ptx::set_max_registers_up<Config::kMathRegisters>();
    attend_few<Config, 1>(shared, args, grid, thread);
  } else if (warpgroup == 2) {
    ptx::set_max_registers_down<Config::kProducerRegisters>();
    LatentFewProducer<Config, 0>(shared, args, pages, thread).run(grid);
  } else {
    ptx::set_max_registers_down<Config::kProducerRegisters>();
    LatentFewProducer<Config, 1>(shared, args, pages, thread).run(grid);
  }
}

}  // namespace dsa::cuda::sm90a

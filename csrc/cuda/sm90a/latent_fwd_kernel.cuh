// SPDX-License-Identifier: Apache-2.0
// Attention over 16-bit latents on Hopper, of 64 heads: sparse prefill, and decode over the paged
// cache, sparse or dense. Or of 32 or 16 heads of two or four neighbouring query tokens, over the
// union of their rows (row_unions.cuh), where a warp's scores are masked by its token's rows.
//
// Tile       a query token's 64 heads by one block after another: scores S = Q K^T [64, 64]; out
//            [64, 512] += P V. Operands are 16-bit. 384 dims of q are in registers, as the first
//            operand; all else is in shared memory.
// Warpgroups 0: the scores and the softmax. 1 and 2: the first and second 256 dims of the output.
//            3: the producer, which finds what there is to do and loads q and, part by part,
//            blocks: rows by cp.async, 16 bytes a lane of four warps; pages that are whole blocks
//            of 64 tokens by one thread and the copy engine.
// Overlap    The tensor cores have a block's scores, then the output's products of the block
//            before, while the scores' softmax is on its way. A CTA has work after work.
//            The output's second half begins when the first has read its first part, whose place
//            is the one that the scores will wait for.
// Softmax    Of the base that there is: sums tell afterwards where scores are far above it, which
//            then moves, and the output's sums follow.
// Registers  168, of which 96 are q and 32 the scores; 160, 128 the output's sums; producer 24. The
//            assembler keeps 24 from wgmma's operands: 128 sums take 154, so that 160 and 168 is
//            all there is.
// Shared     11 places of 16 KiB for parts, 128 dims of a block; one of 8 KiB for RoPE; q's other
//            192 dims 24 KiB; P 2 x 8 KiB. q's 384 dims come through three of the places.
// No token   a row that is not there is copied as zeros, unread, and its scores are masked. Rows
//            of a page behind the last token are whatever they are, and cleared in shared memory.
//
// Barriers   full, empty: of each place. full_q, empty_q: q in shared memory. full_p, empty_p: of
//            each P, full when the next scores' products are nearly done; the last of a work is
//            let go when the output is stored. full_factor: of a work's output. full_task,
//            empty_task: of a work and the next. bar.sync 1, 2: the output's warpgroups, rows are
//            cleared; 3: both, P is no longer read; 4: the producer by rows, there is a task.
// Grid       as many CTAs as SMs; they take query tokens, blocks of heads and splits in turns.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cuda/common/attention_args.h"
#include "cuda/ptx/ldst.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/sm90a/latent_fwd_config.h"
#include "cuda/sm90a/latent_fwd_pages.cuh"
#include "cuda/sm90a/latent_fwd_rows.cuh"
#include "cuda/sm90a/latent_fwd_scores.cuh"
#include "cuda/sm90a/latent_fwd_values.cuh"

namespace dsa::cuda::sm90a {

// By one thread.
template <typename Config>
__device__ void initialise_latent_barriers(typename Config::SharedStorage& shared) {
  constexpr int kWarps = 4;  // of a warpgroup
  const auto initialise = [](auto& full, auto& empty, int full_arrivals, int empty_arrivals) {
    for (auto& barrier : full) ptx::mbarrier_init(barrier, full_arrivals);
    for (auto& barrier : empty) ptx::mbarrier_init(barrier, empty_arrivals);
  };
  initialise(shared.full, shared.empty, Config::kFullArrivals, kWarps);
  initialise(shared.full_rope, shared.empty_rope, Config::kFullArrivals, kWarps);
  initialise(shared.full_p, shared.empty_p, kWarps, 2 * kWarps);
  initialise(shared.full_task, shared.empty_task, 1, 2 * kWarps);
  for (auto& barrier : shared.full_factor) ptx::mbarrier_init(barrier, kWarps);
  ptx::mbarrier_init(shared.full_q, Config::kFullArrivals);
  ptx::mbarrier_init(shared.empty_q, kWarps);
  ptx::mbarrier_fence_init();
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    sm90a_latent_fwd_kernel(const __grid_constant__ AttentionArgs args,
                            const __grid_constant__ LatentFwdMaps maps,
                            const __grid_constant__ LatentFwdGrid grid) {
  extern __shared__ __align__(1024) std::uint8_t shared_bytes[];
  auto& shared = ptx::pinned_in_shared<typename Config::SharedStorage>(shared_bytes);
  const int warpgroup = threadIdx.x / 128, thread = threadIdx.x % 128;
  if (threadIdx.x == 0) initialise_latent_barriers<Config>(shared);
  __syncthreads();

  if (warpgroup == 0) {
    ptx::set_max_registers_up<Config::kScoreRegisters>();
    LatentFwdScores<Config>(shared, args, thread).run(grid);
  } else if (warpgroup <= 2) {
    ptx::set_max_registers_up<Config::kValueRegisters>();
    LatentFwdValues<Config>(shared, args, warpgroup - 1, thread).run(grid);
  } else {
    ptx::set_max_registers_down<Config::kProducerRegisters>();
    if constexpr (Config::kByRows) {
      LatentFwdRows<Config>(shared, args, thread).run(grid);
    } else if (thread == 0) {
      LatentFwdPages<Config>(shared, args, maps).run(grid);
    }
  }
}

}  // namespace dsa::cuda::sm90a

// SPDX-License-Identifier: Apache-2.0
// Dense decode over 16-bit latents on Hopper, of pages that are whole blocks of 64 tokens.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cuda/common/attention_args.h"
#include "cuda/ptx/ldst.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/sm90a/dense_fwd_config.h"
#include "cuda/sm90a/dense_fwd_producer.cuh"
#include "cuda/sm90a/dense_fwd_scores.cuh"
#include "cuda/sm90a/dense_fwd_values.cuh"

namespace dsa::cuda::sm90a {

// By one thread.
template <typename Config>
__device__ void initialise_dense_barriers(typename Config::SharedStorage& shared) {
  constexpr int kWarps = 4;  // of a warpgroup
  const auto initialise = [](auto& full, auto& empty, int full_arrivals, int empty_arrivals) {
    for (auto& barrier : full) ptx::mbarrier_init(barrier, full_arrivals);
    for (auto& barrier : empty) ptx::mbarrier_init(barrier, empty_arrivals);
  };
  initialise(shared.full, shared.empty, 1, kWarps);
  initialise(shared.full_rope, shared.empty_rope, 1, kWarps);
  initialise(shared.full_p, shared.empty_p, kWarps, 2 * kWarps);
  initialise(shared.full_task, shared.empty_task, 1, 2 * kWarps);
  ptx::mbarrier_init(shared.full_q, 1);
  ptx::mbarrier_init(shared.empty_q, kWarps);
  ptx::mbarrier_fence_init();
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    sm90a_dense_fwd_kernel(const __grid_constant__ AttentionArgs args,
                           const __grid_constant__ CUtensorMap q_map,
                           const __grid_constant__ CUtensorMap pages,
                           const __grid_constant__ LatentFwdGrid grid) {
  extern __shared__ __align__(1024) std::uint8_t shared_bytes[];
  auto& shared = ptx::pinned_in_shared<typename Config::SharedStorage>(shared_bytes);
  const int warpgroup = threadIdx.x / 128, thread = threadIdx.x % 128;
  if (threadIdx.x == 0) initialise_dense_barriers<Config>(shared);
  __syncthreads();

  if (warpgroup == 0) {
    ptx::set_max_registers_up<Config::kScoreRegisters>();
    DenseFwdScores<Config>(shared, args, thread).run(grid);
  } else if (warpgroup <= 2) {
    ptx::set_max_registers_up<Config::kValueRegisters>();
    DenseFwdValues<Config>(shared, args, warpgroup - 1, thread).run(grid);
  } else {
    ptx::set_max_registers_down<Config::kProducerRegisters>();
    if (thread == 0) DenseFwdProducer<Config>(shared, args, q_map, pages).run(grid);
  }
}

}  // namespace dsa::cuda::sm90a

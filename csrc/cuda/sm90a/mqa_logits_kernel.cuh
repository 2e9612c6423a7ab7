// SPDX-License-Identifier: Apache-2.0
// Indexer logits on Hopper: out[query, key] = scale[key] * sum over heads of weight * relu(q . k).
//
// Tile       D [keys, columns] = K Q^T, e4m3. A column is a head of a query, a row a key, so that a
//            thread sums over heads in registers. Prefill: 128 keys by 512 columns, which are
//            512 / kHeads queries. Decode: 64 to 512 columns, as a request needs, by 256 keys (128
//            where the columns are 512).
// Warpgroups 0 to 3 (0 to 2 in prefill of 16 heads): math, 64 or 128 columns each, 64 keys a
//            product; while one sums, the products of the others run. In prefill each has columns
//            of its own; in decode those that have the same have other keys. The last: producer.
//            Its warp 0 copies keys, warp 1 queries, their weights and windows, warps 2 and 3 write
//            -inf to what no tile covers.
// Registers  math 112: 64 of D, 32 of weights; producer 32. Half of D and of weights: 104 and 64.
// Shared     prefill (D = 128): q 2 x 64 KiB, k 5 x 16 KiB. Decode of 64 columns: q 2 x 8 KiB,
//            k and scales 6 x 33 KiB.
// Barriers   full_q: warp 1's arrival and the bytes of q. full_k: warp 0's and its bytes.
//            empty_q, empty_k: all math warps. full_taken, empty_taken: warps 0 and 1.
// Grid       a CTA an SM; of all keys, block of queries after block, each takes an equal share. Of
//            long decodes an eighth is left, and goes to the CTAs in pieces as they end.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cuda/ptx/ldst.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/sm90a/mqa_logits_config.h"
#include "cuda/sm90a/mqa_logits_math.cuh"
#include "cuda/sm90a/mqa_logits_producer.cuh"
#include "cuda/sm90a/mqa_logits_share.cuh"

namespace dsa::cuda::sm90a {

// By one thread.
template <typename Config>
__device__ void initialise_barriers(typename Config::SharedStorage& shared) {
  for (int i = 0; i < Config::kQuerySlots; ++i) {
    ptx::mbarrier_init(shared.full_q[i], 1);
    ptx::mbarrier_init(shared.empty_q[i], Config::kMathWarps);
  }
  for (int i = 0; i < Config::kKeyStages; ++i) {
    ptx::mbarrier_init(shared.full_k[i], 1);
    ptx::mbarrier_init(shared.empty_k[i], Config::kMathWarps);
  }
  for (int i = 0; i < Config::kTakenSlots; ++i) {
    ptx::mbarrier_init(shared.full_taken[i], 1);
    ptx::mbarrier_init(shared.empty_taken[i], 1);
  }
  ptx::mbarrier_fence_init();
}

template <typename Config, typename Keys>
__global__ void __launch_bounds__(Config::kThreads, 1)
    sm90a_mqa_logits_kernel(const __grid_constant__ MqaLogitsRange range,
                            const __grid_constant__ MqaTask<Keys> task,
                            const __grid_constant__ CUtensorMap q_map,
                            const __grid_constant__ CUtensorMap k_map) {
  extern __shared__ __align__(1024) std::uint8_t shared_bytes[];
  auto& shared = ptx::pinned_in_shared<typename Config::SharedStorage>(shared_bytes);
  constexpr int kMathThreads = 128 * Config::kMathWarpgroups;
  const int thread = threadIdx.x;
  if (thread == 0) {
    initialise_barriers<Config>(shared);
  } else if (thread == 32) {
    ptx::prefetch_tensor_map(k_map);
    ptx::prefetch_tensor_map(q_map);
  }
  if constexpr (Keys::kMayMiss) {
    constexpr int kFirst = 64;
    if (thread >= kFirst && thread < kMathThreads) {
      prefetch_tables(task, range, thread - kFirst, kMathThreads - kFirst);
    }
  }
  if (range.blocks > kFewBlocks<Keys>) find_share<Config>(shared, task, range);
  if (thread >= kMathThreads) {
    const int warp = (thread - kMathThreads) / 32;
    if (range.blocks <= kFewBlocks<Keys> && warp < 2) {
      find_share_of_few<Config>(shared, warp, task, range);
    }
    ptx::set_max_registers_down<Config::kProducerRegisters>();
    MqaLogitsProducer<Config, Keys>(shared, task, range, q_map, k_map).run();
  } else {
    ptx::cta_sync();
    ptx::set_max_registers_up<Config::kMathRegisters>();
    MqaLogitsMath<Config, Keys>(shared, task, range).run();
  }
}

}  // namespace dsa::cuda::sm90a

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
//            Its warp 0 copies queries and keys, warp 1 stages weights and windows, warps 2 and 3
//            write -inf to what no tile covers.
// Registers  math 112: 64 of D, 32 of weights; producer 32. Half of D and of weights: 104 and 64.
// Shared     prefill (D = 128): q 2 x 64 KiB, k 5 x 16 KiB. Decode of 64 columns: q 2 x 8 KiB,
//            k and scales 6 x 33 KiB.
// Barriers   full_q: warp 0's expect, warp 1, and the bytes of q. empty_q: all math warps.
//            full_k: warp 0's expect and bytes. empty_k: all math warps.
// Grid       a CTA an SM; of all tiles, block of queries after block, each takes an equal share.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/sm90a/mqa_logits_config.h"
#include "cuda/sm90a/mqa_logits_math.cuh"
#include "cuda/sm90a/mqa_logits_producer.cuh"
#include "cuda/sm90a/mqa_logits_share.cuh"

namespace dsa::cuda::sm90a {

template <typename Config, typename Keys>
__global__ void __launch_bounds__(Config::kThreads, 1)
    sm90a_mqa_logits_kernel(const __grid_constant__ MqaTask<Keys> task,
                            const __grid_constant__ MqaLogitsRange range,
                            const __grid_constant__ CUtensorMap q_map,
                            const __grid_constant__ CUtensorMap k_map) {
  extern __shared__ __align__(1024) std::uint8_t shared_bytes[];
  auto& shared = *reinterpret_cast<typename Config::SharedStorage*>(shared_bytes);
  if (threadIdx.x == 0) {
    ptx::prefetch_tensor_map(q_map);
    ptx::prefetch_tensor_map(k_map);
    for (int i = 0; i < Config::kQuerySlots; ++i) {
      ptx::mbarrier_init(shared.full_q[i], 2);
      ptx::mbarrier_init(shared.empty_q[i], Config::kMathWarps);
    }
    for (int i = 0; i < Config::kKeyStages; ++i) {
      ptx::mbarrier_init(shared.full_k[i], 1);
      ptx::mbarrier_init(shared.empty_k[i], Config::kMathWarps);
    }
    ptx::mbarrier_fence_init();
  }
  if constexpr (Keys::kMayMiss) prefetch_tables<Config>(task, range);
  const bool is_producer = threadIdx.x / 128 == Config::kMathWarpgroups;
  typename Config::Share share{};
  if (range.blocks > 32) {
    find_share<Config>(shared, task, range);
  } else if (is_producer) {
    share = find_share_of_few<Config>(task, range);
  }
  __syncthreads();
  if (is_producer) {
    ptx::set_max_registers_down<Config::kProducerRegisters>();
    if (range.blocks > 32) share = shared.share;
    MqaLogitsProducer<Config, Keys>(shared, task, range, q_map, k_map, share).run();
  } else {
    ptx::set_max_registers_up<Config::kMathRegisters>();
    MqaLogitsMath<Config, Keys>(shared, task, range).run();
  }
}

}  // namespace dsa::cuda::sm90a

// SPDX-License-Identifier: Apache-2.0
// What there is to do for the attention kernels over 16-bit latents, and who does it.
#pragma once

#include "cuda/common/attention_args.h"
#include "cuda/common/attention_keys.cuh"
#include "cuda/common/attention_place.cuh"

namespace dsa::cuda::sm90a {

struct LatentFwdWork {
  unsigned tile;  // query token, block of heads
  unsigned split;
};

// The pieces of work that CTAs take in turns: each split of each tile.
struct LatentFwdGrid {
  unsigned tiles;
  unsigned works;
};

// Those of one of kWorkers of a CTA.
template <int kWorkers, int kWorker>
class LatentFwdTurns {
 public:
  __device__ explicit LatentFwdTurns(const LatentFwdGrid& grid) : grid_(grid) {}

  // Whether there is an n-th piece; the n-th piece.
  __device__ bool has(unsigned n) const { return number(n) < grid_.works; }
  __device__ LatentFwdWork work(unsigned n) const {
    const unsigned split = number(n) < grid_.tiles ? 0 : number(n) / grid_.tiles;
    return {number(n) - split * grid_.tiles, split};
  }

 private:
  __device__ static unsigned number(unsigned n) {
    return blockIdx.x + (kWorkers * n + kWorker) * gridDim.x;
  }

  const LatentFwdGrid& grid_;
};

// What a producer knows of a piece of work.
struct LatentFwdTask {
  AttentionPlace place;
  KeySequence keys;
  int first_block, blocks;
};

template <typename Config>
__device__ void find_latent_task(const AttentionArgs& args, const LatentFwdWork& work,
                                 LatentFwdTask& task) {
  task.place = AttentionPlace(args, Config::kHeads, work.tile, work.split);
  task.keys.init(args, task.place.b, task.place.j);
  const TileShare share(args, task.keys.size(), Config::kTokens, work.split);
  task.first_block = share.first;
  task.blocks = share.count;
}

}  // namespace dsa::cuda::sm90a

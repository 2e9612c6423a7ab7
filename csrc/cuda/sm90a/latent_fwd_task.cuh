// SPDX-License-Identifier: Apache-2.0
// What there is to do for the attention kernels over 16-bit latents, and who does it.
#pragma once

#include "cuda/common/attention_args.h"
#include "cuda/common/attention_keys.cuh"
#include "cuda/common/attention_place.cuh"
#include "cuda/sm90a/row_unions.cuh"

namespace dsa::cuda::sm90a {

struct LatentFwdWork {
  unsigned tile;  // query token, block of heads
  unsigned split;
};

// The pieces of work that CTAs take in turns: each split of each tile. Or, of one split, only some
// of the tiles, if they are given.
struct LatentFwdGrid {
  unsigned tiles;
  unsigned works;
  const unsigned* some_tiles = nullptr;
  const unsigned* num_some = nullptr;
  RowUnions unions = {};  // of the tiles, if they are of several query tokens
};

// Those of one of kWorkers of a CTA.
template <int kWorkers, int kWorker, bool kMayBeSome>
class LatentFwdTurns {
 public:
  __device__ explicit LatentFwdTurns(const LatentFwdGrid& grid) : grid_(grid) {}

  // Whether there is an n-th piece; the n-th piece.
  __device__ bool has(unsigned n) const {
    if (are_some()) return number(n) < *grid_.num_some;
    return number(n) < grid_.works;
  }
  __device__ LatentFwdWork work(unsigned n) const {
    if (are_some()) return {grid_.some_tiles[number(n)], 0};
    const unsigned split = number(n) < grid_.tiles ? 0 : number(n) / grid_.tiles;
    return {number(n) - split * grid_.tiles, split};
  }

 private:
  __device__ bool are_some() const { return kMayBeSome && grid_.some_tiles != nullptr; }
  __device__ static unsigned number(unsigned n) {
    return blockIdx.x + (kWorkers * n + kWorker) * gridDim.x;
  }

  const LatentFwdGrid& grid_;
};

// What a producer knows of a piece of work.
template <typename Keys>
struct LatentTask {
  AttentionPlace place;  // of the first query token
  Keys keys;
  int first_block, blocks;
};
using LatentFwdTask = LatentTask<KeySequence>;
using LatentUnionTask = LatentTask<UnionSequence>;

template <typename Config>
__device__ void find_latent_task(const AttentionArgs& args, const LatentFwdGrid&,
                                 const LatentFwdWork& work, LatentFwdTask& task) {
  task.place = AttentionPlace(args, Config::kHeads, work.tile, work.split);
  task.keys.init(args, task.place.b, task.place.j);
  const TileShare share(args, task.keys.size(), Config::kTokens, work.split);
  task.first_block = share.first;
  task.blocks = share.count;
}
template <typename Config>
__device__ void find_latent_task(const AttentionArgs& args, const LatentFwdGrid& grid,
                                 const LatentFwdWork& work, LatentUnionTask& task) {
  task.place = AttentionPlace(args, Config::kHeadsOfQuery, work.tile * Config::kQueries, 0);
  task.keys.init(grid.unions, work.tile);
  task.first_block = 0;
  task.blocks = (task.keys.size() + Config::kTokens - 1) / Config::kTokens;
}

}  // namespace dsa::cuda::sm90a

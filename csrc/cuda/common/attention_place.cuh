// SPDX-License-Identifier: Apache-2.0
// What a CTA of an attention kernel works on: query token, heads, keys; where its heads' statistics
// go.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/common/attention_args.h"
#include "cuda/common/attention_result.cuh"
#include "cuda/ptx/special_registers.cuh"

namespace dsa::cuda {

// x: query token, block of heads.
struct AttentionPlace {
  std::int64_t b, j;  // of the query token
  int first_head;
  int heads;             // up to those of a tile
  std::int64_t partial;  // the first head's number among partial results

  __device__ AttentionPlace(const AttentionArgs& args, int heads_of_tile, unsigned x,
                            unsigned split) {
    const unsigned head_tiles = (args.num_heads + heads_of_tile - 1) / heads_of_tile;
    // Divisions are long, and code that runs once is slow: not where there is nothing to divide.
    const unsigned launch_row = head_tiles == 1 ? x : x / head_tiles;
    const auto row = static_cast<unsigned>(args.first_row) + launch_row;
    const auto tokens = static_cast<unsigned>(args.tokens_per_request);
    const unsigned request = tokens == 1 ? row : row / tokens;
    b = request;
    j = row - request * tokens;
    first_head = static_cast<int>(x - launch_row * head_tiles) * heads_of_tile;
    heads = std::min(args.num_heads - first_head, heads_of_tile);
    partial = (std::int64_t{launch_row} * args.num_splits + split) * args.num_heads + first_head;
  }

  // Of a later query token, where a request has one.
  __device__ AttentionPlace after(int queries) const {
    AttentionPlace place = *this;
    place.b += queries;
    return place;
  }

  // Of this CTA, to be found again where it is needed: registers may be short between.
  __device__ static AttentionPlace of_cta(const AttentionArgs& args, int heads_of_tile) {
    const std::uint32_t x = ptx::cta_x(), split = ptx::cta_y();  // in this order
    return {args, heads_of_tile, x, split};
  }
};

// A split of a row's `keys` keys, in tiles.
struct TileShare {
  int first, count;

  __device__ TileShare(const AttentionArgs& args, int keys, int tokens_of_tile, unsigned split) {
    const int all = (keys + tokens_of_tile - 1) / tokens_of_tile;
    if (args.num_splits == 1) {
      first = 0;
      count = all;
      return;
    }
    const int each = std::max((all + args.num_splits - 1) / args.num_splits,
                              args.least_split_tokens / tokens_of_tile);
    first = std::min(static_cast<int>(split) * each, all);
    count = std::min(each, all - first);
  }
};

__device__ __forceinline__ void store_statistics(const AttentionArgs& args,
                                                 const AttentionPlace& at, int head,
                                                 const HeadResult& result) {
  const int h = at.first_head + head;
  args.lse[at.b * args.lse_stride_b + at.j * args.lse_stride_j + h * args.lse_stride_h] =
      result.lse();
  if (args.max_logits != nullptr) {
    args.max_logits[at.b * args.max_stride_b + at.j * args.max_stride_j + h * args.max_stride_h] =
        result.max_logit;
  }
}

// The factor of a head's output if there is a sink.
__device__ __forceinline__ float beside_sink(const AttentionArgs& args, const AttentionPlace& at,
                                             int head, const HeadResult& result, float factor) {
  if (args.sink == nullptr || result.empty) return factor;
  return factor * share_beside(args.sink[(at.first_head + head) * args.sink_stride], result.lse());
}

// Stores the statistics of head `head` of the tile; the factor of its output, or kZeroOutput.
__device__ __forceinline__ float store_head(const AttentionArgs& args, const AttentionPlace& at,
                                            int head, const HeadResult& result) {
  const float factor = result.factor();
  if (args.num_splits > 1) {
    args.partial_lse[at.partial + head] = result.lse2;
    return factor;
  }
  store_statistics(args, at, head, result);
  return beside_sink(args, at, head, result, factor);
}

}  // namespace dsa::cuda

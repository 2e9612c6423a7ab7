// SPDX-License-Identifier: Apache-2.0
// Tiles, warpgroups and shared memory of the attention kernel over 16-bit latents on Hopper.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/common/attention_keys.cuh"
#include "cuda/common/attention_place.cuh"
#include "cuda/ptx/mbarrier.cuh"

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
    return {number(n) % grid_.tiles, number(n) / grid_.tiles};
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

// Element: of q, of the latents and of the output. kRope_: dims of the latents after the 512
// values. kHeads_: of a tile, 64, or as few as 8, 16 or 32.
template <typename Element_, int kRope_, int kHeads_>
struct LatentFwdConfig {
  using Element = Element_;
  static constexpr int kHeads = kHeads_;
  static constexpr bool kFew = kHeads < 64;
  // That share a CTA: 64 heads take all of it, few of them one warpgroup of the mathematics, one
  // producer and one place for blocks.
  static constexpr int kWorkers = kFew ? 2 : 1;
  static constexpr int worker_of(int place) { return kFew ? place : 0; }
  template <int kPlace>
  using Turns = LatentFwdTurns<kWorkers, worker_of(kPlace)>;
  static constexpr int kTokens = 64;  // of a block; a tile of 64 heads has two
  static constexpr int kDimV = 512;
  static constexpr int kRope = kRope_;
  static constexpr int kHalf = kDimV / 2;  // dims of the output, of a warpgroup

  static constexpr int kBlock = 64;  // dims, or tokens, of 128 bytes: the span of a swizzle
  static constexpr int kBlockBytes = 64 * 2 * kBlock;
  static constexpr int kHeadBlockBytes = kHeads * 2 * kBlock;
  static constexpr int kDimBlocks = (kDimV + kRope) / kBlock;
  static constexpr int kHalfBlocks = kHalf / kBlock;

  // Of a block of tokens, each loaded and let go by itself: 128 dims of the values, or RoPE.
  static constexpr int kPartBlocks = 2;
  static constexpr int kPartDims = kPartBlocks * kBlock;
  static constexpr int kHalfParts = kHalf / kPartDims;
  static constexpr int kValueParts = 2 * kHalfParts;
  static constexpr int kRopePart = kValueParts;
  static constexpr int kParts = kValueParts + (kRope > 0 ? 1 : 0);
  static constexpr int first_dim_block(int part) { return part * kPartBlocks; }
  static constexpr int dim_blocks(int part) {
    return part < kValueParts ? kPartBlocks : kRope / kBlock;
  }
  // The parts of a place's block in the order in which they are let go, and come again: RoPE, then
  // of the first place the halves' in turn, of the second the second half's first. Of few heads in
  // both places the same, since scores are added up in this order.
  static constexpr int part_at(int place, int i) {
    if (kRope > 0 && i == 0) return kRopePart;
    const int value = kRope > 0 ? i - 1 : i;
    if (kFew) return value;
    return place == 0 ? value / 2 + value % 2 * kHalfParts : value ^ kHalfParts;
  }

  // Two warpgroups of mathematics, then two producers.
  static constexpr int kMathThreads = 256, kProducerThreads = 128;
  static constexpr int kThreads = kMathThreads + 2 * kProducerThreads;
  static constexpr int kRegisters[4] = {kFew ? 216 : 224, kFew ? 216 : 208, 40, 40};

  // A producer's thread as its copies do, and a warp with the first part: which tokens there are.
  static constexpr int full_arrivals(int part) {
    return kProducerThreads + (part == 0 ? kProducerThreads / 32 : 0);
  }

  struct ManyHeads {
    std::uint16_t ones[8][16];  // a product with them sums P; on 256 bytes
    float bases[2][kHeads];     // of the softmax after a block
    float factors[2][kHeads];   // what was summed before is multiplied by, if its warp's moved
    bool moved[2][4];
    float sums[kHeads], weights[kHeads], maxima[kHeads];  // of the second warpgroup
    float out_factor[kHeads];
  };

  // In the place of a worker's P, when there is none.
  struct FewHeads {
    float sums[4][kHeads], weights[4][kHeads], maxima[4][kHeads];  // of each warp
    float factors[kHeads];                                         // of the output
  };
  static_assert(sizeof(FewHeads) <= kHeadBlockBytes || !kFew);

  struct SharedStorage {
    alignas(1024) std::uint8_t q[kWorkers][kDimBlocks][kHeadBlockBytes];  // [heads, 64 dims]
    alignas(1024) std::uint8_t kv[2][kDimBlocks][kBlockBytes];            // [tokens, 64 dims]
    // P [heads, tokens] of a block; at last some columns of the output at a time. This and the
    // others above are swizzled.
    alignas(1024) std::uint8_t p[kWorkers][kHeadBlockBytes];
    alignas(256) std::conditional_t<kFew, std::uint8_t, ManyHeads> math;
    std::uint8_t valid[2][kTokens];  // whether there is a token
    union {
      bool by_warp[kProducerThreads / 32];
      std::uint32_t any;
    } lacks[2];  // tokens
    ptx::Mbarrier full_q[kWorkers], empty_q[kWorkers];
    ptx::Mbarrier full[2][kParts], empty[2][kParts];
    LatentFwdTask tasks[2][2];  // of each producer: a work and the next
    // What the mathematics have to know of their work.
    int blocks[kWorkers];                // with two warpgroups of a work, of each
    AttentionPlace places[kWorkers][2];  // of a work and the next
  };
  static_assert(sizeof(SharedStorage) <= 227 * 1024);
};

// Barriers of part of the CTA, by bar.sync; 0 is all of it.
struct LatentFwdBarrier {
  static constexpr int kMath = 1;
  static constexpr int kFullP = 2;     // and 3: of a block; its warpgroup arrives, the other syncs
  static constexpr int kStored = 4;    // the second warpgroup's output is
  static constexpr int kProducer = 5;  // and 6: one of them
  static constexpr int kWorker = 2;    // and 3: with few heads, a warpgroup of the mathematics
};

}  // namespace dsa::cuda::sm90a

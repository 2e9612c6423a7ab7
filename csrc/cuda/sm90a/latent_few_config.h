// SPDX-License-Identifier: Apache-2.0
// Tiles, warpgroups and shared memory of attention of few heads over 16-bit latents on Hopper.
#pragma once

#include <cstdint>

#include "cuda/common/attention_place.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/sm90a/latent_fwd_task.cuh"

namespace dsa::cuda::sm90a {

// Element: of q, of the latents and of the output. kRope_: dims of the latents after the 512
// values. kHeads_: of a tile, 8, 16 or 32.
template <typename Element_, int kRope_, int kHeads_>
struct LatentFewConfig {
  using Element = Element_;
  static constexpr int kHeads = kHeads_;
  static constexpr int kWorkers = 2;  // that share a CTA
  template <int kWorker>
  using Turns = LatentFwdTurns<kWorkers, kWorker, true>;
  static constexpr int kTokens = 64;  // of a block
  static constexpr int kDimV = 512;
  static constexpr int kRope = kRope_;

  static constexpr int kBlock = 64;  // dims, or tokens, of 128 bytes: the span of a swizzle
  static constexpr int kBlockBytes = 64 * 2 * kBlock;
  static constexpr int kHeadBlockBytes = kHeads * 2 * kBlock;
  static constexpr int kDimBlocks = (kDimV + kRope) / kBlock;

  // Of a block of tokens, each loaded and let go by itself: 128 dims of the values, or RoPE.
  static constexpr int kPartBlocks = 2;
  static constexpr int kPartDims = kPartBlocks * kBlock;
  static constexpr int kValueParts = kDimV / kPartDims;
  static constexpr int kRopePart = kValueParts;
  static constexpr int kParts = kValueParts + (kRope > 0 ? 1 : 0);
  static constexpr int first_dim_block(int part) { return part * kPartBlocks; }
  static constexpr int dim_blocks(int part) {
    return part < kValueParts ? kPartBlocks : kRope / kBlock;
  }
  // The parts of a block in the order in which they are let go, and come again: RoPE first.
  static constexpr int part_at(int i) {
    if (kRope == 0) return i;
    return i == 0 ? kRopePart : i - 1;
  }

  // Of each worker a warpgroup of the mathematics, then of each a producer.
  static constexpr int kMathThreads = 128, kProducerThreads = 128;
  static constexpr int kThreads = kWorkers * (kMathThreads + kProducerThreads);
  static constexpr int kMathRegisters = 216, kProducerRegisters = 40;
  static_assert(kWorkers * (kMathRegisters + kProducerRegisters) <= 512);

  // A producer's thread as its copies do, and a warp with the first part: which tokens there are.
  static constexpr int full_arrivals(int part) {
    return kProducerThreads + (part == 0 ? kProducerThreads / 32 : 0);
  }

  // In the place of a worker's P, when there is none.
  struct Heads {
    float sums[4][kHeads], maxima[4][kHeads];  // of each warp
    float factors[kHeads];                     // of the output
  };
  static_assert(sizeof(Heads) <= kHeadBlockBytes);

  struct SharedStorage {
    alignas(1024) std::uint8_t q[kWorkers][kDimBlocks][kHeadBlockBytes];  // [heads, 64 dims]
    alignas(1024) std::uint8_t kv[kWorkers][kDimBlocks][kBlockBytes];     // [tokens, 64 dims]
    // P [heads, tokens] of a block; at last some columns of the output at a time. This and the
    // others above are swizzled.
    alignas(1024) std::uint8_t p[kWorkers][kHeadBlockBytes];
    std::uint8_t valid[kWorkers][kTokens];  // whether there is a token
    union {
      bool by_warp[kProducerThreads / 32];
      std::uint32_t any;
    } lacks[kWorkers];  // tokens
    ptx::Mbarrier full_q[kWorkers], empty_q[kWorkers];
    ptx::Mbarrier full[kWorkers][kParts], empty[kWorkers][kParts];
    LatentFwdTask tasks[kWorkers][2];  // a work and the next
    // What the mathematics have to know of their work.
    int blocks[kWorkers];
    AttentionPlace places[kWorkers][2];  // of a work and the next
  };
  static_assert(sizeof(SharedStorage) <= 227 * 1024);
};

// Barriers of part of the CTA, by bar.sync; 0 is all of it.
struct LatentFewBarrier {
  static constexpr int kMath = 1;      // and 2: of a worker
  static constexpr int kProducer = 3;  // and 4
};

}  // namespace dsa::cuda::sm90a

// SPDX-License-Identifier: Apache-2.0
// Tiles, warpgroups and shared memory of the attention kernel over 16-bit latents on Hopper.
#pragma once

#include <cstdint>

#include "cuda/common/attention_keys.cuh"
#include "cuda/ptx/mbarrier.cuh"

namespace dsa::cuda::sm90a {

// Element: of q, of the latents and of the output. kRope_: dims of the latents after the 512
// values.
template <typename Element_, int kRope_>
struct LatentFwdConfig {
  using Element = Element_;
  static constexpr int kHeads = 64;   // of a tile
  static constexpr int kTokens = 64;  // of a block, of which a tile has two
  static constexpr int kDimV = 512;
  static constexpr int kRope = kRope_;
  static constexpr int kHalf = kDimV / 2;  // dims of the output, of a warpgroup

  static constexpr int kBlock = 64;  // dims, or tokens, of 128 bytes: the span of a swizzle
  static constexpr int kBlockBytes = 64 * 2 * kBlock;
  static constexpr int kDimBlocks = (kDimV + kRope) / kBlock;
  static constexpr int kHalfBlocks = kHalf / kBlock;

  // Of a block of tokens, each loaded and let go by itself.
  static constexpr int kParts = kRope > 0 ? 3 : 2;  // the values' halves, RoPE
  static constexpr int first_dim_block(int part) { return part * kHalfBlocks; }
  static constexpr int dim_blocks(int part) { return part < 2 ? kHalfBlocks : kRope / kBlock; }

  static constexpr int kProducer = 2;  // warpgroup; before it the mathematics'
  static constexpr int kMathThreads = 256, kProducerThreads = 128;
  static constexpr int kThreads = kMathThreads + kProducerThreads;
  static constexpr int kMathRegisters = 232, kProducerRegisters = 40;

  // A producer's thread as its copies do, and a warp with the first part: which rows there are.
  static constexpr int full_arrivals(int part) {
    return kProducerThreads + (part == 0 ? kProducerThreads / 32 : 0);
  }

  struct SharedStorage {
    alignas(1024) std::uint8_t q[kDimBlocks][kBlockBytes];      // [heads, 64 dims], swizzled
    alignas(1024) std::uint8_t kv[2][kDimBlocks][kBlockBytes];  // [tokens, 64 dims], swizzled
    // P [heads, tokens] of a block, swizzled, where its RoPE was.
    alignas(1024) std::uint8_t p[kRope > 0 ? 1 : 2][kRope > 0 ? 16 : kBlockBytes];
    const std::uint8_t* rows[2][kTokens];  // that are being copied
    std::uint8_t valid[2][kTokens];        // whether there is a row
    bool all_valid[2];
    float bases[2][kHeads];    // of the softmax after a block
    float factors[2][kHeads];  // what was summed before is multiplied by, if its warp's moved
    bool moved[2][4];
    float sums[2][kHeads], weights[2][kHeads], maxima[2][kHeads];
    float out_factor[kHeads];
    ptx::Mbarrier full_q;
    ptx::Mbarrier full[2][kParts], empty[2][kParts];
    KeySequence keys;
    int first_block, blocks;  // of this CTA

    __device__ std::uint8_t* p_of(int block) {
      return kRope > 0 ? kv[block][kDimBlocks - 1] : p[block % (kRope > 0 ? 1 : 2)];
    }
  };
  static_assert(sizeof(SharedStorage) <= 227 * 1024);
};

// Barriers of part of the CTA, by bar.sync; 0 is all of it.
struct LatentFwdBarrier {
  static constexpr int kMath = 1;
  static constexpr int kWarpgroup = 2;  // and 3: one of the mathematics' warpgroups
  static constexpr int kFullP = 4;      // and 5: of a block; its warpgroup arrives, the other syncs
  static constexpr int kProducer = 6;
};

}  // namespace dsa::cuda::sm90a

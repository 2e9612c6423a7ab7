// SPDX-License-Identifier: Apache-2.0
// Tiles, warpgroups and shared memory of attention of 64 heads over 16-bit latents on Hopper.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/ptx/mbarrier.cuh"
#include "cuda/sm90a/latent_fwd_task.cuh"

namespace dsa::cuda::sm90a {

// Where a block's tokens are: anywhere, or all in one page of a dense cache, one after another.
enum class LatentSource { kRows, kPages };

// Element: of q, of the latents and of the output. kRope_: dims of the latents after the 512
// values. kQueries_: query tokens of a tile, of which more than one have the union of their rows.
template <typename Element_, int kRope_, LatentSource kSource, int kQueries_ = 1>
struct LatentFwdConfig {
  using Element = Element_;
  static constexpr int kQueries = kQueries_;
  using Turns = LatentFwdTurns<1, 0, (kQueries > 1)>;
  using Task = std::conditional_t<kQueries == 1, LatentFwdTask, LatentUnionTask>;
  static constexpr int kHeads = 64;  // of a tile
  static constexpr int kHeadsOfQuery = kHeads / kQueries;
  static constexpr int kTokens = 64;  // of a block
  static constexpr int kDimV = 512;
  static constexpr int kRope = kRope_;
  static constexpr int kHalf = kDimV / 2;  // dims of the output, of a warpgroup

  static constexpr int kBlock = 64;  // dims, or tokens, of 128 bytes: the span of a swizzle
  static constexpr int kBlockBytes = 64 * 2 * kBlock;
  static constexpr int kDimBlocks = kDimV / kBlock;
  // Of a block of tokens, each waited for and let go by itself: 128 dims.
  static constexpr int kPartBlocks = 2;
  static constexpr int kPartDims = kPartBlocks * kBlock;
  static constexpr int kParts = kDimV / kPartDims;
  static constexpr int kHalfParts = kParts / 2;

  static constexpr int kPlaces = 11;     // for parts: those of q, then of block after block
  static constexpr int kRopePlaces = 1;  // for blocks' RoPE

  // Queries' dims in registers, as wgmma's first operand; the others are in shared memory.
  static constexpr int kHeldBlocks = 6;
  static constexpr int kHeldParts = kHeldBlocks / kPartBlocks;
  static constexpr int kRopeBlock = kDimBlocks - kHeldBlocks;

  static constexpr bool kByRows = kSource == LatentSource::kRows;
  static_assert(kQueries == 1 || kByRows);
  static_assert(kHeadsOfQuery % 16 == 0);  // a warp has heads of one token
  static constexpr int kScoreThreads = 128, kValueThreads = 256;
  static constexpr int kProducerThreads = 128;  // of which one loads pages
  static constexpr int kThreads = kScoreThreads + kValueThreads + kProducerThreads;
  // By rows a thread as its copies do, and a warp for what it has stored.
  static constexpr int kFullArrivals = kByRows ? kProducerThreads + kProducerThreads / 32 : 1;
  static constexpr int kScoreRegisters = 168, kValueRegisters = 160, kProducerRegisters = 24;
  static_assert(kScoreRegisters + 2 * kValueRegisters + kProducerRegisters <= 512);

  // Of a block whose first part is there, which tokens are: with pages the first ones.
  struct RowTokens {
    // For each query token: as warps have looked them up, LatentRowCopy::own_row.
    alignas(8) std::uint16_t valid[kQueries][kProducerThreads / 32];
  };
  struct PageTokens {
    std::int32_t count;
  };

  struct SharedStorage {
    alignas(1024) std::uint8_t kv[kPlaces][kPartBlocks][kBlockBytes];  // [tokens, 64 dims]
    alignas(1024) std::uint8_t rope[kRopePlaces][kBlockBytes];
    alignas(1024) std::uint8_t q[kRopeBlock + kRope / kBlock][kBlockBytes];  // [heads, 64 dims]
    // P [heads, tokens] of two blocks; at last some columns of the output at a time. This and the
    // others above are swizzled.
    alignas(1024) std::uint8_t p[2][kBlockBytes];
    // With P: by what the output before is multiplied, in warps where bases moved.
    float factors[2][kHeads];
    bool moved[2][4];
    std::int32_t tokens[2];       // of a page's block; the values of others are not to be read
    float out_factor[2][kHeads];  // of a work and the next
    std::conditional_t<kByRows, RowTokens, PageTokens> tokens_of[kPlaces];
    ptx::Mbarrier full[kPlaces], empty[kPlaces];
    ptx::Mbarrier full_rope[kRopePlaces], empty_rope[kRopePlaces];
    ptx::Mbarrier full_q, empty_q;
    ptx::Mbarrier full_p[2], empty_p[2];
    ptx::Mbarrier full_factor[2];
    ptx::Mbarrier full_task[2], empty_task[2];
    Task tasks[2];  // of a work and the next
  };
  static_assert(sizeof(SharedStorage) <= 227 * 1024);
};

// Barriers of part of the CTA, by bar.sync; 0 is all of it.
struct LatentFwdBarrier {
  static constexpr int kFirstHalf = 1, kSecondHalf = 2;  // of the output
  static constexpr int kBoth = 3;
  static constexpr int kProducer = 4;
};

// Where something has its place, and the phase of its barriers.
template <int kPlaces>
struct LatentFwdRing {
  std::uint32_t index = 0, phase = 0;

  __device__ void next(std::uint32_t count = 1) {
    index += count;
    if (index >= kPlaces) {
      index -= kPlaces;
      phase ^= 1;
    }
  }
};

}  // namespace dsa::cuda::sm90a

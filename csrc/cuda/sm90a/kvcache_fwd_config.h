// SPDX-License-Identifier: Apache-2.0
// Tiles, warpgroups and shared memory of the decode kernel on Hopper.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/common/attention_keys.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "dsa/kv_layout.h"

namespace dsa::cuda::sm90a {

// Of a head in one of the CTAs that share its keys.
struct SplitResult {
  float lse2;
  float factor;  // of what was summed
};

// Layout: of the cache, MlaV32Layout or MlaV4Layout. kHasMaxima: the largest logits are asked for.
// kInClusters: splits are CTAs of a cluster, which combine them.
template <typename Layout, int kHeads_, bool kHasMaxima_, bool kInClusters_ = false>
struct KvCacheFwdConfig {
  static constexpr bool kInClusters = kInClusters_;
  using InClusters = KvCacheFwdConfig<Layout, kHeads_, false, true>;
  static constexpr bool kHasMaxima = kHasMaxima_;
  static constexpr bool kIsV32 = std::is_same_v<Layout, MlaV32Layout>;
  static constexpr int kHeads = kHeads_;  // of a tile: 8, 16, 32 or 64
  static constexpr int kTokens = 64;      // of a tile

  static constexpr int kNope = static_cast<int>(Layout::kDimNope);
  static constexpr int kRope = static_cast<int>(Layout::kDimRope);
  static constexpr int kGroup = static_cast<int>(Layout::kGroup);
  static constexpr int kGroups = kNope / kGroup;
  static constexpr int kDimV = static_cast<int>(Layout::kDimV);
  static constexpr int kRopeOffset = static_cast<int>(Layout::rope(0));
  static constexpr int kRowBytes =  // that are copied; without V4's scales
      static_cast<int>(kIsV32 ? MlaV32Layout::kTokenBytes : MlaV4Layout::kDataBytes);
  // In shared memory eight rows' 16-byte chunks are in different banks.
  static constexpr int kRowPitch = kRowBytes + (kRowBytes / 16 % 2 == 0 ? 16 : 0);
  static_assert(kRowPitch / 16 % 2 == 1 && kRowPitch % 16 == 0);

  // Warpgroups.
  static constexpr int kScores = 0, kFirstValues = 1, kProducer = 3;
  static constexpr int kMathThreads = 128 * kProducer;
  static constexpr int kValueWarpgroups = kProducer - kFirstValues;
  static constexpr int kValueThreads = 128 * kValueWarpgroups;
  static constexpr int kThreads = 128 * (kProducer + 1);
  static constexpr int kScoreRegisters = 96;
  static constexpr int kValueRegisters = 192;
  static constexpr int kProducerRegisters = 32;
  static constexpr int kRegisters = 65536 / kThreads;  // at the start
  static_assert(kScoreRegisters <= kRegisters && kValueRegisters > kRegisters);
  static_assert(kScoreRegisters + kValueWarpgroups * kValueRegisters + kProducerRegisters <=
                4 * kRegisters);
  static constexpr int kCopyWarps = 2, kPrepareWarps = 2;
  // One a warp; of V4's scales also one a lane.
  static constexpr int kFullRawArrivals = kCopyWarps * (kIsV32 ? 1 : 33);
  static constexpr int kReaderWarps = 4 * (1 + kValueWarpgroups);  // of a raw tile

  static constexpr int kBlock = 64;  // dims, or tokens, of 128 bytes: the span of a swizzle
  static constexpr int kBlockBytes = kHeads * 2 * kBlock;
  static constexpr int kQueryBlocks = (kNope + kRope) / kBlock;
  static constexpr int kValueTiles = kDimV / kValueWarpgroups / 64;  // of a warpgroup, of 64 dims

  // Of scores, that take turns: as many as there are registers for.
  static constexpr int kSums = kHeads == 64 ? 1 : 2;

  static constexpr int kStages = kHeads == 64 ? 3 : 4;  // of raw tiles

  // Of a tile's rows.
  struct V32Scales {
    // A row's scales are f16 * 2^(exponent - kScaleBits), for V; for K as prepare_k says.
    alignas(16) std::uint16_t f16[kGroups][kTokens];
    float ratios[kGroups][kTokens];
  };
  struct V4Scales {
    alignas(16) std::uint16_t f16[kGroups][kTokens];  // the same, for K and V
    alignas(16) std::uint64_t codes[kTokens];         // ue8m0, as copied
    float of_scores[kTokens];                         // what a row's scores are multiplied by
  };

  // For the combination of splits in a cluster.
  struct Splits {
    SplitResult results[kHeads];  // of this CTA
    float weights[4 * kHeads];    // of its parts, of all splits
  };

  struct SharedStorage {
    alignas(1024) std::uint8_t q[kQueryBlocks][kBlockBytes];  // [heads, 64 dims], swizzled
    // [heads, 64 tokens], swizzled: f16; of V4 also bf16, for RoPE, without the rows' exponents.
    alignas(1024) std::uint8_t p[kIsV32 ? 1 : 2][kBlockBytes];
    alignas(16) float4 scores[kHeads / 8][128];  // as their threads have them
    alignas(128) std::uint8_t raw[kStages][kTokens * kRowPitch];
    std::conditional_t<kIsV32, V32Scales, V4Scales> scales[kStages];
    std::int32_t exponents[kStages][kTokens];  // kNoRow: there is none
    alignas(16) const std::uint8_t* rows[kCopyWarps][kTokens / kCopyWarps];  // of the next copies
    std::uint32_t valid[kStages][kCopyWarps];
    alignas(16) float bases[kHeads];         // of the softmax
    std::uint8_t has_base[kHeads];           // whether there is a score so far
    alignas(16) float ups[kHeads];           // what they rise by
    alignas(16) float factors[kHeads];       // what was summed is multiplied by then
    std::uint32_t query_bits[kReaderWarps];  // of each warp the largest |q|
    alignas(16) float out_factor[kHeads];
    ptx::Mbarrier full_q;
    ptx::Mbarrier full_raw[kStages], full_scales[kStages], empty_raw[kStages];
    KeySequence keys;
    std::int32_t first_tile, tiles;  // of this CTA; the output has no register for it

    // Where scales were, when all tiles are done.
    __device__ Splits& splits() {
      static_assert(sizeof(Splits) <= sizeof(scales));
      return *reinterpret_cast<Splits*>(scales);
    }
  };
  static_assert(sizeof(SharedStorage) <= 227 * 1024);

  static constexpr std::int32_t kNoRow = -1024;
  static constexpr int kScaleBits = 5;  // scales are up to 2^5
  // Exponents of what is far outside stay where powers of two of them are numbers.
  static constexpr int kLeastExponent = kIsV32 ? -30 : -60, kMostExponent = kIsV32 ? 110 : 60;
};

// Eight words of two operands for wgmma.
struct OperandPair {
  std::uint32_t first[4], second[4];

  // Until here its registers are read by products.
  __device__ __forceinline__ void keep() {
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(first[i]), "+r"(second[i])::"memory");
  }
};

// Barriers of part of the CTA, by bar.sync; 0 is all of it.
inline constexpr int kMathBarrier = 1, kValueBarrier = 2;  // all but the producer; the output's
inline constexpr int kFullScores = 3, kEmptyScores = 4;    // by all but the producer

}  // namespace dsa::cuda::sm90a

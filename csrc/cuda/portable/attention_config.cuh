// SPDX-License-Identifier: Apache-2.0
// Tiles of the portable attention kernel.
//
// A CTA has one query token, kHeads of its heads and one split of its keys. 64 heads is what the
// register file holds of a [heads, 512] fp32 output; 16 is one row tile of mma.sync.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "cuda/portable/attention_keys.cuh"
#include "dsa/kv_layout.h"

namespace dsa::cuda {

enum class LatentFormat { kBf16, kF16, kMlaV32, kMlaV4 };

inline constexpr int kMaxDimQk = 576;
inline constexpr int kMaxDimV = 512;
inline constexpr int kDimBlock = 64;             // dims: 128 bytes, the span of a swizzle
inline constexpr int kRowBytes = kMaxDimQk * 2;  // pitch of q and of the key tile
inline constexpr int kChunk = 16;                // bytes: one ldmatrix row, one cp.async
static_assert(kRowBytes % (2 * kDimBlock) == 0);

template <LatentFormat kFormat_, int kHeads_, int kTokens_>
struct AttentionConfig {
  static constexpr LatentFormat kFormat = kFormat_;
  static constexpr int kHeads = kHeads_;
  static constexpr int kTokens = kTokens_;
  static constexpr bool kIsV32 = kFormat == LatentFormat::kMlaV32;
  static constexpr bool kIsV4 = kFormat == LatentFormat::kMlaV4;
  static constexpr bool kIsFp8 = kIsV32 || kIsV4;

  // V3.2's scales are no powers of two and must not be rounded into K or V. The tile keeps its e4m3
  // values, exact in f16; for K the scales enter the fp32 scores, for V the probabilities, which
  // f16 rounds by 2^-11 at most. RoPE stays bf16. The other formats are one type throughout, of q
  // too.
  using QueryElement = std::conditional_t<kFormat == LatentFormat::kF16, __half, __nv_bfloat16>;
  using ValueElement = std::conditional_t<kIsV32, __half, QueryElement>;
  static constexpr int kScales = kIsV32 ? MlaV32Layout::kNumScales : 1;
  // Room for probabilities below the largest, in f16.
  static constexpr float kProbabilityUnit = 0x1p-6f;

  static constexpr int kWarps = kHeads == 32 ? 4 : 8;
  static constexpr int kThreads = 32 * kWarps;
  // For the register budget; before SM90 the shared memory of an SM holds one CTA of 32 heads.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  static constexpr int kCtasPerSm = kHeads == 16 ? 2 : 1;
#else
  static constexpr int kCtasPerSm = kHeads == 64 ? 1 : 2;
#endif

  // QK: warps in a kWarpsM x kWarpsN grid over [kHeads, kTokens]. Two neighbours along the keys
  // multiply both their tiles, each over half of the dimensions, and exchange the halves of the
  // sums: a fragment from shared memory then serves twice as many products.
  // 16 heads are too little work for more than 4 of the warps.
  static constexpr int kQkWarps = kHeads == 64 ? 8 : 4;
  static constexpr int kWarpsM = kHeads == 64 ? 2 : 1;
  static constexpr int kWarpsN = kQkWarps / kWarpsM;
  static constexpr int kMTiles = kHeads / (16 * kWarpsM);
  static constexpr int kNTiles = kTokens / (8 * kWarpsN);
  static_assert(kWarpsN % 2 == 0);
  // Accumulators in turn, to hide the latency of mma.sync where an SM has few warps.
  static constexpr int kChains = kHeads == 64 ? 1 : 2;
  static_assert(kScales == 1 || kScales % kChains == 0);

  // PV: each warp has all heads and kColumns of the value's dimensions.
  static constexpr int kRowTiles = kHeads / 16;
  static constexpr int kColumns = kMaxDimV / kWarps;
  static constexpr int kColumnTiles = kColumns / 8;
  static_assert(!kIsV32 || MlaV32Layout::kGroup % kColumns == 0);

  // The key tile is double-buffered where cp.async fills it; FP8 rows arrive raw and are widened
  // into one tile.
  static constexpr int kTileStages = kIsFp8 ? 1 : 2;
  static constexpr int kRowCopyBytes =  // of a raw row, without V4's scales
      static_cast<int>(kIsV32 ? MlaV32Layout::kTokenBytes : MlaV4Layout::kDataBytes);
  static constexpr int kRawBytes = kRowCopyBytes + (kIsV4 ? kChunk : 0);
  static_assert(kRawBytes % kChunk == 0);

  // Warps that QK leaves over load the next tile meanwhile; else all do. A lane copies kRowsPerLane
  // rows of each tile, eight lanes together one row.
  static constexpr int kLoadWarps = kWarps > kQkWarps ? kWarps - kQkWarps : kWarps;
  static constexpr int kRowsPerWarp = kTokens / kLoadWarps;
  static constexpr int kRowsPerLane = kRowsPerWarp / 4;
  static_assert(kRowsPerLane * 4 == kRowsPerWarp);

  struct SharedStorage {
    alignas(128) std::uint8_t q[kHeads * kRowBytes];
    alignas(128) std::uint8_t tile[kTileStages][kTokens * kRowBytes];
    alignas(128) std::uint8_t p[kScales][kHeads * kTokens * 2];
    float row_max[kWarpsN][kHeads];  // of a tile
    float alpha[kHeads];             // what the output so far is multiplied by
    float base[2][kHeads];           // of the softmax, for this tile and the next
    float q_factor[kIsV32 ? kHeads : 1];
    float scale[kIsV32 ? kTokens : 1][kScales];
    int scale_exponent[kScales];     // the largest so far, as the fp32 exponent field
    std::uint8_t valid[2][kTokens];  // of this tile and the next
    KeySequence keys;
    alignas(kChunk) std::uint8_t raw[kIsFp8 ? kTokens * kRawBytes : kChunk];
  };

  // What a CTA knows about its heads at the end, in the place of p.
  struct Statistics {
    float sum[kWarpsN][kHeads];     // of 2^(s - base)
    float weight[kWarpsN][kHeads];  // of the same as V was multiplied by it: rounded
    float base[kHeads];
    float max[kHeads];
  };
  static_assert(sizeof(Statistics) <= kScales * kHeads * kTokens * 2);
};

}  // namespace dsa::cuda

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

#include "cuda/common/attention_keys.cuh"
#include "dsa/kv_layout.h"

namespace dsa::cuda {

inline constexpr int kMaxDimQk = 576;
inline constexpr int kMaxDimV = 512;
inline constexpr int kMaxFp8RowBytes = 640;      // 512 e4m3, 64 bf16; in whole swizzles
inline constexpr int kDimBlock = 64;             // dims: 128 bytes, the span of a swizzle
inline constexpr int kRowBytes = kMaxDimQk * 2;  // pitch of q, and of keys of 16 bits
inline constexpr int kChunk = 16;                // bytes: one ldmatrix row, one cp.async
inline constexpr int kSwizzle = 8;               // chunks, and rows, of a swizzle
static_assert(kRowBytes % (kSwizzle * kChunk) == 0);
inline constexpr int kRopeChunks = kDimBlock * 2 / kChunk;  // of an FP8 row

// Of a CTA of an architecture (10 * major + minor).
constexpr std::size_t most_shared_bytes(int arch) {
  if (arch >= 90 && arch < 120) return 227 * 1024;
  if (arch == 80 || arch == 87) return 163 * 1024;
  return 99 * 1024;
}

template <LatentFormat kFormat_, int kHeads_, int kTokens_>
struct AttentionConfig {
  static constexpr LatentFormat kFormat = kFormat_;
  static constexpr int kHeads = kHeads_;
  static constexpr int kTokens = kTokens_;
  static constexpr bool kIsV32 = kFormat == LatentFormat::kMlaV32;
  static constexpr bool kIsV4 = kFormat == LatentFormat::kMlaV4;
  static constexpr bool kIsFp8 = kIsV32 || kIsV4;

  // 16-bit rows are one type throughout, that of q. FP8 rows stay 8-bit in shared memory. As K
  // their e4m3 values are widened to f16, exactly, to meet q in f16, and the scales enter the fp32
  // scores. As V: V3.2's scales are no powers of two and must not be rounded into V, so they enter
  // the probabilities, which f16 rounds by 2^-11 at most; V4's powers of two are multiplied into
  // bf16 values. RoPE stays bf16.
  using QueryElement = std::conditional_t<kFormat == LatentFormat::kF16, __half, __nv_bfloat16>;
  using ValueElement = std::conditional_t<kIsV32, __half, QueryElement>;
  static constexpr int kNope =  // of an FP8 row
      static_cast<int>(kIsV32 ? MlaV32Layout::kDimNope : MlaV4Layout::kDimNope);
  static constexpr int kGroup =  // values of one scale
      static_cast<int>(kIsV32 ? MlaV32Layout::kGroup : MlaV4Layout::kGroup);
  static constexpr int kGroups = kNope / kGroup;
  static constexpr int kScaleBytes =  // of a row
      kIsV32 ? MlaV32Layout::kNumScales * 4 : static_cast<int>(MlaV4Layout::kScaleBytes);
  static constexpr int kProbabilityTiles = kIsV32 ? kGroups : 1;
  // Whether a column of V is e4m3 in shared memory.
  static constexpr bool holds_codes(int column) { return kIsV32 || (kIsV4 && column < kNope); }
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
  static constexpr int kChains = kHeads == 64 || kIsV4 ? 1 : 2;
  static_assert(!kIsFp8 || kGroups % kChains == 0);

  // PV: each warp has all heads and kColumns of the value's dimensions.
  static constexpr int kRowTiles = kHeads / 16;
  static constexpr int kColumns = kMaxDimV / kWarps;
  static constexpr int kColumnTiles = kColumns / 8;
  static_assert(!kIsV32 || kGroup % kColumns == 0);

  // A row of the key tile. FP8: values, then RoPE, as in memory; V3.2's scales, which stand between
  // them there, and V4's are kept apart.
  static constexpr int kTileRowBytes = kIsFp8 ? kMaxFp8RowBytes : kRowBytes;
  static_assert(kTileRowBytes % (kSwizzle * kChunk) == 0);
  static constexpr int kRopeChunk = kNope / kChunk;
  static constexpr int kRowParts = kTileRowBytes / (kSwizzle * kChunk);

  // Warps that QK leaves over load the next tile meanwhile; else all do.
  static constexpr int kLoadWarps = kWarps > kQkWarps ? kWarps - kQkWarps : kWarps;

  struct SharedStorage {
    alignas(128) std::uint8_t q[kHeads * kRowBytes];
    alignas(128) std::uint8_t tile[2][kTokens * kTileRowBytes];  // this one and the next
    alignas(128) std::uint8_t p[kProbabilityTiles][kHeads * kTokens * 2];
    alignas(kChunk) std::uint8_t scales[2][kIsFp8 ? kTokens * kScaleBytes : kChunk];
    float row_max[kWarpsN][kHeads];  // of a tile
    float alpha[kHeads];             // what the output so far is multiplied by
    float base[2][kHeads];           // of the softmax, for this tile and the next
    float q_factor[kIsFp8 ? kHeads : 1];
    int scale_exponent[kProbabilityTiles];  // the largest so far, as the fp32 exponent field
    std::uint8_t valid[2][kTokens];         // of this tile and the next
    KeySequence keys;
  };

  // What a CTA knows about its heads at the end, in the place of p.
  struct Statistics {
    float sum[kWarpsN][kHeads];     // of 2^(s - base)
    float weight[kWarpsN][kHeads];  // of the same as V was multiplied by it: rounded
    float base[kHeads];
    float max[kHeads];
  };
  static_assert(sizeof(Statistics) <= sizeof(SharedStorage::p));
};

}  // namespace dsa::cuda

// SPDX-License-Identifier: Apache-2.0
// Tiles of the portable attention kernel and its arguments.
//
// A CTA has one query token, kHeads of its heads and one split of its keys. 64 heads is what the
// register file holds of a [heads, 512] fp32 output; 16 is one row tile of mma.sync.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "dsa/host_device.h"
#include "dsa/kv_layout.h"

namespace dsa::cuda {

enum class LatentFormat { kBf16, kF16, kMlaV32, kMlaV4 };

inline constexpr int kMaxDimQk = 576;
inline constexpr int kMaxDimV = 512;
inline constexpr int kDimBlock = 64;             // dims: 128 bytes, the span of a swizzle
inline constexpr int kRowBytes = kMaxDimQk * 2;  // pitch of q and of the key tile
inline constexpr int kChunk = 16;                // bytes: one ldmatrix row, one cp.async
static_assert(kRowBytes % (2 * kDimBlock) == 0);

template <LatentFormat kFormat_, int kHeads_, int kTokens_, int kStages_>
struct AttentionConfig {
  static constexpr LatentFormat kFormat = kFormat_;
  static constexpr int kHeads = kHeads_;
  static constexpr int kTokens = kTokens_;
  static constexpr bool kIsV32 = kFormat == LatentFormat::kMlaV32;
  static constexpr bool kIsV4 = kFormat == LatentFormat::kMlaV4;
  static constexpr bool kIsFp8 = kIsV32 || kIsV4;

  // V3.2's scales are no powers of two and must not be rounded into K or V. The tile keeps its e4m3
  // values, exact in f16; for K the scales enter the fp32 scores, for V the probabilities, which
  // f16 rounds 2^-12 at most. RoPE stays bf16. The other formats are one type throughout, of q too.
  using QueryElement = std::conditional_t<kFormat == LatentFormat::kF16, __half, __nv_bfloat16>;
  using ValueElement = std::conditional_t<kIsV32, __half, QueryElement>;
  static constexpr int kScales = kIsV32 ? MlaV32Layout::kNumScales : 1;
  // Widened e4m3 is 2^-8 of its value: its exponent is placed as it is.
  static constexpr float kWidenedUnit = 0x1p8f;
  // Room for probabilities below the largest, in f16.
  static constexpr float kProbabilityUnit = 0x1p-6f;

  static constexpr int kWarps = kHeads == 16 ? 4 : 8;
  static constexpr int kThreads = 32 * kWarps;
  // For the register budget; before SM90 the shared memory of an SM holds one CTA of 32 heads.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  static constexpr int kCtasPerSm = kHeads == 16 ? 2 : 1;
#else
  static constexpr int kCtasPerSm = kHeads == 64 ? 1 : 2;
#endif

  // QK: warps in a kWarpsM x kWarpsN grid over [kHeads, kTokens].
  static constexpr int kWarpsM = kHeads == 16 ? 1 : 2;
  static constexpr int kWarpsN = kWarps / kWarpsM;
  static constexpr int kMTiles = kHeads / (16 * kWarpsM);
  static constexpr int kNTiles = kTokens / (8 * kWarpsN);
  // Accumulators in turn, to hide the latency of mma.sync where an SM has few warps.
  static constexpr int kChains = kHeads == 16 ? 4 : kHeads == 32 ? 2 : 1;
  static_assert(kScales == 1 || kScales % kChains == 0);
  static_assert(kNTiles == 1 || kNTiles == 2, "one ldmatrix.x4 holds 8 or 16 keys");

  // PV: each warp has all heads and kColumns of the value's dimensions.
  static constexpr int kRowTiles = kHeads / 16;
  static constexpr int kColumns = kMaxDimV / kWarps;
  static constexpr int kColumnTiles = kColumns / 8;
  static_assert(!kIsV32 || MlaV32Layout::kGroup % kColumns == 0);

  // The key tile is double-buffered where cp.async fills it; FP8 rows arrive raw, kStages of them,
  // and are widened into one tile.
  static constexpr int kTileStages = kIsFp8 ? 1 : kStages_;
  static constexpr int kRawStages = kIsFp8 ? kStages_ : 0;
  static constexpr int kRowCopyBytes =  // of a raw row, without V4's scales
      static_cast<int>(kIsV32 ? MlaV32Layout::kTokenBytes : MlaV4Layout::kDataBytes);
  static constexpr int kRawBytes = kRowCopyBytes + (kIsV4 ? kChunk : 0);
  static_assert(kRawBytes % kChunk == 0);

  // A lane copies kRowsPerLane rows of each tile, eight lanes together one row.
  static constexpr int kRowsPerWarp = kTokens / kWarps;
  static constexpr int kRowsPerLane = kRowsPerWarp / 4;
  static_assert(kRowsPerLane * 4 == kRowsPerWarp);

  struct SharedStorage {
    alignas(128) std::uint8_t q[kHeads * kRowBytes];
    alignas(128) std::uint8_t tile[kTileStages][kTokens * kRowBytes];
    alignas(128) std::uint8_t raw[kIsFp8 ? kRawStages * kTokens * kRawBytes : kChunk];
    alignas(128) std::uint8_t p[kScales][kHeads * kTokens * 2];
    float row_max[kWarpsN][kHeads];  // of a tile
    float alpha[kHeads];             // what the output so far is multiplied by
    float q_factor[kIsV32 ? kHeads : 1];
    float scale[kTokens][kScales];
    int scale_exponent[kScales];  // the largest so far, as the fp32 exponent field
    int valid[2][kTokens];        // of this tile and the next
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

// Rows of latents, one a slot: page p begins at data + p * page_stride, its token t token_stride
// further for each.
struct LatentRows {
  const std::uint8_t* data = nullptr;
  std::int64_t num_slots = 0;
  std::int64_t num_pages = 0;
  std::uint32_t page_size = 1;     // slots are int32: a larger page is one page
  std::int64_t page_stride = 0;    // bytes
  std::int64_t token_stride = 0;   // bytes
  std::int64_t scales_offset = 0;  // bytes from a page's begin to its scales (V4)
  bool aligned = true;             // every row on 16 bytes
};

// Selected slots of one cache: slots[b, j, 0 .. count), of which `length` many count.
struct SlotList {
  LatentRows rows;
  const std::int32_t* slots = nullptr;
  std::int64_t stride_b = 0, stride_j = 0;
  const std::int32_t* length = nullptr;  // optional
  std::int64_t length_stride_b = 0, length_stride_j = 0;
  int count = 0;
};

// Query token r is token j = r % tokens_per_request of request b = r / tokens_per_request.
struct AttentionArgs {
  const std::uint16_t* q = nullptr;  // [b, j, heads, d_qk], strides in elements
  std::int64_t q_stride_b = 0, q_stride_j = 0, q_stride_h = 0;
  bool q_aligned = false;
  std::uint16_t* out = nullptr;  // [b, j, heads, d_v]
  std::int64_t out_stride_b = 0, out_stride_j = 0, out_stride_h = 0;
  bool out_aligned = false;
  float* lse = nullptr;  // [b, j, heads]
  std::int64_t lse_stride_b = 0, lse_stride_j = 0, lse_stride_h = 0;
  float* max_logits = nullptr;  // optional
  std::int64_t max_stride_b = 0, max_stride_j = 0, max_stride_h = 0;
  const float* sink = nullptr;  // [heads], optional
  std::int64_t sink_stride = 0;
  float scale_log2 = 0.0f;  // softmax scale * log2(e)
  int tokens_per_request = 1;
  int num_heads = 0;
  int d_qk = 0, d_v = 0;

  // Sparse: up to two lists, one softmax over both.
  SlotList lists[2];
  // Dense, if block_table is given: the first tokens of the request, in lists[0].rows.
  const std::int32_t* block_table = nullptr;  // [b, table_width]
  std::int64_t table_stride = 0;
  std::int64_t table_width = 0;
  const std::int32_t* seqlens = nullptr;  // [b]
  std::int64_t seqlens_stride = 0;
  bool causal = false;

  // Splits of a row's keys; more than one write partial results for attention_combine.
  std::int64_t first_row = 0;
  int num_splits = 1;
  float* partial_out = nullptr;  // [rows of the launch, splits, heads, d_v], normalised
  float* partial_lse = nullptr;  // [rows of the launch, splits, heads], base 2; -inf: empty
};

}  // namespace dsa::cuda

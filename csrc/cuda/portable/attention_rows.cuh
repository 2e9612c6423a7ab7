// SPDX-License-Identifier: Apache-2.0
// Which rows of the latent cache a split reads, and their way into shared memory: cp.async of each
// row, then, for FP8, widening of the raw bytes into the bf16 key tile.
//
// Rows in shared memory are swizzled: of the 16-byte chunks of every 128 bytes, chunk c of row r
// stands at c ^ (r % 8), so that ldmatrix finds eight rows in eight different bank groups.
#pragma once

#include <cstdint>

#include "core/fp8.h"
#include "cuda/portable/attention_config.h"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/ldst.cuh"

namespace dsa::cuda {

__device__ __forceinline__ std::uint32_t swizzled(int row, int chunk) {
  return static_cast<std::uint32_t>(row * kRowBytes + (chunk & ~7) * kChunk +
                                    ((chunk ^ row) & 7) * kChunk);
}

// 16 bytes from any address.
__device__ inline uint4 load_unaligned_16(const std::uint8_t* src) {
  std::uint32_t words[4];
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    words[w] = src[4 * w] | src[4 * w + 1] << 8 | src[4 * w + 2] << 16 |
               static_cast<std::uint32_t>(src[4 * w + 3]) << 24;
  }
  return {words[0], words[1], words[2], words[3]};
}

template <bool kAligned>
__device__ __forceinline__ void copy_chunk(std::uint32_t shared, const std::uint8_t* src,
                                           bool valid) {
  if constexpr (kAligned) return ptx::cp_async_16(shared, src, valid);
  const uint4 v = valid ? load_unaligned_16(src) : uint4{0, 0, 0, 0};
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w)
               : "memory");
}

// The keys of one query token, numbered 0 .. size(): the two lists one after the other, or the
// first tokens of the request.
class KeySequence {
 public:
  __device__ KeySequence(const AttentionArgs& args, std::int64_t b, std::int64_t j) : args_(args) {
    if (args.block_table != nullptr) {
      slots_[0] = args.block_table + b * args.table_stride;
      const std::int64_t most = args.table_width * args.lists[0].rows.page_size;
      std::int64_t length = args.seqlens[b * args.seqlens_stride];
      length = max(std::int64_t{0}, min(length, most));
      if (args.causal) length = max(std::int64_t{0}, length - args.tokens_per_request + 1 + j);
      size_ = first_ = static_cast<int>(length);
      return;
    }
    first_ = list_size(args.lists[0], b, j);
    size_ = first_ + list_size(args.lists[1], b, j);
    slots_[0] = args.lists[0].slots + b * args.lists[0].stride_b + j * args.lists[0].stride_j;
    slots_[1] = args.lists[1].slots + b * args.lists[1].stride_b + j * args.lists[1].stride_j;
  }

  __device__ int size() const { return size_; }

  // What memory says about a key: its slot, or the page of a dense request. Not to be trusted, and
  // not looked at before row() needs it: the load has a whole tile's time.
  __device__ std::int32_t fetch(int key) const {
    if (key >= size_) return -1;
    if (args_.block_table != nullptr) {
      return slots_[0][static_cast<std::uint32_t>(key) / args_.lists[0].rows.page_size];
    }
    return key < first_ ? slots_[0][key] : slots_[1][key - first_];
  }

  struct Row {
    const std::uint8_t* values = nullptr;  // nullptr: no valid row
    const std::uint8_t* scales = nullptr;  // V4's second plane
  };
  __device__ Row row(int key, std::int32_t fetched) const {
    const LatentRows& rows = args_.lists[key < first_ ? 0 : 1].rows;
    std::int64_t page = fetched;
    std::uint32_t token = static_cast<std::uint32_t>(key) % rows.page_size;
    bool valid = fetched >= 0 && key < size_;
    if (args_.block_table != nullptr) {
      valid = valid && page < rows.num_pages;
    } else {
      valid = valid && fetched < rows.num_slots;
      page = static_cast<std::uint32_t>(fetched) / rows.page_size;
      token = static_cast<std::uint32_t>(fetched) % rows.page_size;
    }
    if (!valid) return {};
    const std::uint8_t* base = rows.data + page * rows.page_stride;
    return {base + token * rows.token_stride,
            base + rows.scales_offset + token * MlaV4Layout::kScaleBytes};
  }

 private:
  __device__ static int list_size(const SlotList& list, std::int64_t b, std::int64_t j) {
    if (list.length == nullptr) return list.count;
    const int length = list.length[b * list.length_stride_b + j * list.length_stride_j];
    return max(0, min(length, list.count));
  }

  const AttentionArgs& args_;
  const std::int32_t* slots_[2] = {};  // of a dense request: its pages
  int first_ = 0;                      // keys of the first list
  int size_ = 0;
};

// Brings tiles of keys into shared memory. A warp has kRowsPerWarp rows of each tile; lane i looks
// up row i; eight lanes copy a row, 128 bytes at a time.
template <typename Config>
class TileLoader {
 public:
  __device__ TileLoader(const KeySequence& keys, typename Config::SharedStorage& shared,
                        const AttentionArgs& args)
      : keys_(keys),
        shared_(shared),
        chunks_(args.d_qk * 2 / kChunk),
        aligned_(args.lists[0].rows.aligned && args.lists[1].rows.aligned),
        lane_(threadIdx.x % 32),
        first_row_(threadIdx.x / 32 * Config::kRowsPerWarp) {}

  // Asks for the slots of a tile, ahead of issue().
  __device__ void prefetch(int tile) { fetched_ = keys_.fetch(key_of_lane(tile)); }

  // Starts the copies of the tile that was prefetched last: raw FP8 rows into raw stage `stage`,
  // 16-bit rows into tile[stage]. Completes with the thread's next cp.async group.
  __device__ void issue(int tile, int stage) {
    const KeySequence::Row mine = keys_.row(key_of_lane(tile), fetched_);
    if (lane_ < Config::kRowsPerWarp) {
      shared_.valid[tile & 1][first_row_ + lane_] = mine.values != nullptr;
    }
    if (aligned_) {
      copy<true>(mine, stage);
    } else {
      copy<false>(mine, stage);
    }
  }

 private:
  __device__ int key_of_lane(int tile) const {
    return tile * Config::kTokens + first_row_ + min(lane_, Config::kRowsPerWarp - 1);
  }

  template <bool kAligned>
  __device__ void copy(const KeySequence::Row& mine, int stage) {
    const int lane_chunk = lane_ % 8;
#pragma unroll
    for (int i = 0; i < Config::kRowsPerLane; ++i) {
      const int row_of_warp = 4 * i + lane_ / 8;
      const int row = first_row_ + row_of_warp;
      const std::uint8_t* values = shuffle(mine.values, row_of_warp);
      const bool valid = values != nullptr;
      values += lane_chunk * kChunk;
      if constexpr (Config::kIsFp8) {
        constexpr int kRowChunks = Config::kRowCopyBytes / kChunk;
        std::uint8_t* raw = shared_.raw + (stage * Config::kTokens + row) * Config::kRawBytes;
        const std::uint32_t dst = ptx::shared_address(raw) + lane_chunk * kChunk;
#pragma unroll
        for (int c = 0; c < kRowChunks; c += 8) {
          if (c + 8 > kRowChunks && lane_chunk >= kRowChunks - c) break;
          copy_chunk<kAligned>(dst + c * kChunk, values + c * kChunk, valid);
        }
        if constexpr (Config::kIsV4) {
          const std::uint8_t* scales = shuffle(mine.scales, row_of_warp);
          copy_scales<kAligned>(raw + Config::kRowCopyBytes, scales, valid, lane_chunk);
        }
      } else {
        const std::uint32_t dst =
            ptx::shared_address(shared_.tile[stage]) + swizzled(row, lane_chunk);
#pragma unroll
        for (int c = 0; c < kRowBytes / kChunk; c += 8) {
          if (c >= chunks_) break;
          copy_chunk<kAligned>(dst + c * kChunk, values + c * kChunk,
                               valid && c + lane_chunk < chunks_);
        }
      }
    }
  }

  __device__ static const std::uint8_t* shuffle(const std::uint8_t* pointer, int lane) {
    return reinterpret_cast<const std::uint8_t*>(
        __shfl_sync(~0u, reinterpret_cast<unsigned long long>(pointer), lane));
  }

  template <bool kAligned>
  __device__ static void copy_scales(std::uint8_t* dst, const std::uint8_t* src, bool valid,
                                     int lane_chunk) {
    if constexpr (kAligned) {
      if (lane_chunk >= 2) return;
      ptx::cp_async_4(ptx::shared_address(dst) + 4 * lane_chunk, src + 4 * lane_chunk, valid);
    } else {
      dst[lane_chunk] = valid ? src[lane_chunk] : 0;
    }
  }

  const KeySequence& keys_;
  typename Config::SharedStorage& shared_;
  int chunks_;  // of a 16-bit row; what is past its end is zero
  bool aligned_;
  int lane_, first_row_;
  std::int32_t fetched_ = -1;
};

// ---- e4m3 widened to 16 bits --------------------------------------------------------------------

// The top bit of each byte that is a NaN code (0x7F, 0xFF).
__device__ __forceinline__ std::uint32_t e4m3_nan_bits(std::uint32_t codes) {
  return ((codes & 0x7F7F'7F7Fu) + 0x0101'0101u) & 0x8080'8080u;
}

// NaN in those 16-bit halves of `wide` whose codes were.
__device__ inline uint2 put_nan(uint2 wide, std::uint32_t nan_bits) {
  constexpr std::uint32_t kNaN = 0x7FFFu;  // of bf16 and of f16
  if (nan_bits & 0x80u) wide.x |= kNaN;
  if (nan_bits & 0x8000u) wide.x |= kNaN << 16;
  if (nan_bits & 0x80'0000u) wide.y |= kNaN;
  if (nan_bits & 0x8000'0000u) wide.y |= kNaN << 16;
  return wide;
}

// Two e4m3 values, in the high bytes of 16-bit halves, as f16 times 2^-8: the exponent is placed as
// it is. Exact, subnormals too.
__device__ __forceinline__ std::uint32_t widen_to_f16x2(std::uint32_t high_bytes) {
  return (high_bytes & 0x8000'8000u) | ((high_bytes >> 1) & 0x3F80'3F80u);
}

__device__ __forceinline__ std::uint32_t multiply_bf16x2(std::uint32_t a, std::uint32_t b) {
  const __nv_bfloat162 product = __hmul2(reinterpret_cast<const __nv_bfloat162&>(a),
                                         reinterpret_cast<const __nv_bfloat162&>(b));
  return reinterpret_cast<const std::uint32_t&>(product);
}

// The same as bf16, where the placed exponent is 120 too low: times 2^120, then times the scale, a
// power of two. Exact but for results below bf16's normal range.
__device__ __forceinline__ std::uint32_t widen_to_bf16x2(std::uint32_t high_bytes,
                                                         std::uint32_t scale) {
  constexpr std::uint32_t kTwoTo120 = 0x7B80'7B80u;
  const std::uint32_t placed = (high_bytes & 0x8000'8000u) | ((high_bytes >> 4) & 0x07F0'07F0u);
  return multiply_bf16x2(multiply_bf16x2(placed, kTwoTo120), scale);
}

// A ue8m0 scale as a pair of bf16, which hold every power of two that it can be.
__device__ __forceinline__ std::uint32_t ue8m0_to_bf16x2(std::uint8_t byte) {
  const std::uint32_t code = byte == 0 ? 0x0040u : byte == 255 ? 0x7FC0u : byte << 7;
  return code | code << 16;
}

// raw -> tile: a thread widens 16 codes at a time, neighbouring lanes neighbouring ones. V4's
// scales are multiplied in; V3.2's are put aside in `scale`.
template <typename Config>
__device__ void widen_tile(typename Config::SharedStorage& shared, int stage) {
  constexpr int kNope =
      static_cast<int>(Config::kIsV4 ? MlaV4Layout::kDimNope : MlaV32Layout::kDimNope);
  constexpr int kRope =
      static_cast<int>(Config::kIsV4 ? MlaV4Layout::rope(0) : MlaV32Layout::rope(0));
  constexpr int kCodeChunks = kNope / kChunk;
  constexpr int kRopeChunks = 64 * 2 / kChunk;
  const std::uint8_t* raw = shared.raw + stage * Config::kTokens * Config::kRawBytes;
  std::uint8_t* tile = shared.tile[0];

#pragma unroll 4
  for (int i = threadIdx.x; i < Config::kTokens * kCodeChunks; i += Config::kThreads) {
    const int row = i / kCodeChunks;
    const int chunk = i % kCodeChunks;
    const std::uint8_t* src = raw + row * Config::kRawBytes;
    const uint4 codes = *reinterpret_cast<const uint4*>(src + chunk * kChunk);
    const std::uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
    std::uint32_t scale = 0;
    if constexpr (Config::kIsV4) {
      scale = ue8m0_to_bf16x2(src[Config::kRowCopyBytes + chunk * kChunk / MlaV4Layout::kGroup]);
    }
    uint2 wide[4];
    std::uint32_t any_nan = 0;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const std::uint32_t low = __byte_perm(words[w], 0, 0x1404);
      const std::uint32_t high = __byte_perm(words[w], 0, 0x3424);
      if constexpr (Config::kIsV4) {
        wide[w] = {widen_to_bf16x2(low, scale), widen_to_bf16x2(high, scale)};
      } else {
        wide[w] = {widen_to_f16x2(low), widen_to_f16x2(high)};
      }
      any_nan |= e4m3_nan_bits(words[w]);
    }
    if (any_nan != 0) {
#pragma unroll
      for (int w = 0; w < 4; ++w) wide[w] = put_nan(wide[w], e4m3_nan_bits(words[w]));
    }
    const uint4 low = {wide[0].x, wide[0].y, wide[1].x, wide[1].y};
    const uint4 high = {wide[2].x, wide[2].y, wide[3].x, wide[3].y};
    // Every other four lanes store their second half first: eight lanes then fill 128 bytes.
    const int second = chunk / 4 % 2;
    *reinterpret_cast<uint4*>(tile + swizzled(row, 2 * chunk + second)) = second ? high : low;
    *reinterpret_cast<uint4*>(tile + swizzled(row, 2 * chunk + 1 - second)) = second ? low : high;
  }

#pragma unroll
  for (int i = threadIdx.x; i < Config::kTokens * kRopeChunks; i += Config::kThreads) {
    const int row = i / kRopeChunks;
    const int chunk = i % kRopeChunks;
    *reinterpret_cast<uint4*>(tile + swizzled(row, kNope * 2 / kChunk + chunk)) =
        *reinterpret_cast<const uint4*>(raw + row * Config::kRawBytes + kRope + chunk * kChunk);
  }

  if constexpr (Config::kIsV32) {
    for (int i = threadIdx.x; i < Config::kTokens * Config::kScales; i += Config::kThreads) {
      const int row = i / Config::kScales;
      const int group = i % Config::kScales;
      const float scale = *reinterpret_cast<const float*>(raw + row * Config::kRawBytes +
                                                          MlaV32Layout::kScaleOffset + group * 4);
      shared.scale[row][group] = scale;
      const int exponent = static_cast<int>(__float_as_uint(scale) >> 23 & 0xFFu);
      // A plain read first: atomics on one address wait for each other.
      if (exponent > shared.scale_exponent[group]) {
        atomicMax(&shared.scale_exponent[group], exponent);
      }
    }
  }
}

}  // namespace dsa::cuda

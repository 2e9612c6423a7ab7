// SPDX-License-Identifier: Apache-2.0
// The way of key rows into shared memory: cp.async of each row, then, for FP8, widening of the raw
// bytes into the bf16 key tile.
//
// Rows in shared memory are swizzled: of the 16-byte chunks of every 128 bytes, chunk c of row r
// stands at c ^ (r % 8), so that ldmatrix finds eight rows in eight different bank groups.
#pragma once

#include <cstdint>

#include "cuda/portable/attention_config.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/cvt_e4m3.cuh"
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

__device__ __forceinline__ void store_chunk(std::uint32_t shared, uint4 v) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w)
               : "memory");
}

template <bool kAligned>
__device__ __forceinline__ void copy_chunk(std::uint32_t shared, const std::uint8_t* src) {
  if constexpr (kAligned) {
    ptx::cp_async_16(shared, src);
  } else {
    store_chunk(shared, load_unaligned_16(src));
  }
}

// Brings tiles of keys into shared memory. A warp has kRowsPerWarp rows of each tile; lane i looks
// up row i; eight lanes copy a row, 128 bytes at a time.
template <typename Config>
class TileLoader {
 public:
  __device__ TileLoader(typename Config::SharedStorage& shared, const AttentionArgs& args)
      : shared_(shared),
        args_(args),
        chunks_(args.d_qk * 2 / kChunk),
        aligned_(args.lists[0].rows.aligned && args.lists[1].rows.aligned),
        lane_(threadIdx.x % 32),
        first_row_((static_cast<int>(threadIdx.x) / 32 - (Config::kWarps - Config::kLoadWarps)) *
                   Config::kRowsPerWarp) {}

  // Whether this warp loads.
  __device__ bool has_rows() const {
    return Config::kLoadWarps == Config::kWarps || first_row_ >= 0;
  }

  // A tile's copies in three steps, each well before the next: ask memory for its slots, work out
  // its rows, start the copies. FP8 rows go into raw, 16-bit rows into tile[stage]; they complete
  // with the thread's next cp.async group.
  __device__ void fetch(int tile) { fetched_ = shared_.keys.fetch(args_, key_of_lane(tile)); }
  __device__ void locate(int tile) { row_ = shared_.keys.row(args_, key_of_lane(tile), fetched_); }
  __device__ void issue(int tile, int stage) const {
    if (lane_ < Config::kRowsPerWarp) {
      shared_.valid[tile & 1][first_row_ + lane_] = row_.values != nullptr;
    }
    if (aligned_) {
      copy<true>(stage);
    } else {
      copy<false>(stage);
    }
  }

 private:
  __device__ int key_of_lane(int tile) const {
    return tile * Config::kTokens + first_row_ + min(lane_, Config::kRowsPerWarp - 1);
  }

  template <bool kAligned>
  __device__ void copy(int stage) const {
    const int lane_chunk = lane_ % 8;
#pragma unroll
    for (int i = 0; i < Config::kRowsPerLane; ++i) {
      const int row_of_warp = 4 * i + lane_ / 8;
      const int row = first_row_ + row_of_warp;
      const std::uint8_t* values = shuffle(row_.values, row_of_warp);
      const bool valid = values != nullptr;
      values += lane_chunk * kChunk;
      if constexpr (Config::kIsFp8) {
        std::uint8_t* raw = shared_.raw + row * Config::kRawBytes;
        constexpr int kRowChunks = Config::kRowCopyBytes / kChunk;
        copy_row<kAligned, kRowChunks>(ptx::shared_address(raw) + lane_chunk * kChunk, values,
                                       valid, kRowChunks);
        if constexpr (Config::kIsV4) {
          const std::uint8_t* scales = shuffle(row_.scales, row_of_warp);
          copy_scales<kAligned>(raw + Config::kRowCopyBytes, scales, valid, lane_chunk);
        }
      } else {
        copy_row<kAligned, kRowBytes / kChunk>(
            ptx::shared_address(shared_.tile[stage]) + swizzled(row, lane_chunk), values, valid,
            chunks_);
      }
    }
  }

  // This lane's chunks of a row, every eighth; zeros where there is no row. What a partial block of
  // 64 dims of the tile leaves over is zeroed too; raw rows stand back to back.
  template <bool kAligned, int kMaxChunks>
  __device__ void copy_row(std::uint32_t dst, const std::uint8_t* src, bool valid,
                           int chunks) const {
    if (valid) {
#pragma unroll
      for (int c = 0; c + 8 <= kMaxChunks; c += 8) {
        if (c + 8 > chunks) break;
        copy_chunk<kAligned>(dst + c * kChunk, src + c * kChunk);
      }
    } else {
#pragma unroll
      for (int c = 0; c + 8 <= kMaxChunks; c += 8) {
        if (c + 8 > chunks) break;
        store_chunk(dst + c * kChunk, uint4{0, 0, 0, 0});
      }
    }
    const int full = chunks & ~7;
    if (full == chunks) return;
    const bool in_row = lane_ % 8 < chunks - full;
    if (valid && in_row) {
      copy_chunk<kAligned>(dst + full * kChunk, src + full * kChunk);
    } else if (in_row || !Config::kIsFp8) {
      store_chunk(dst + full * kChunk, uint4{0, 0, 0, 0});
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
      const std::uint32_t at = ptx::shared_address(dst) + 4 * lane_chunk;
      if (valid) {
        ptx::cp_async_4(at, src + 4 * lane_chunk);
      } else {
        *reinterpret_cast<std::uint32_t*>(dst + 4 * lane_chunk) = 0;
      }
    } else {
      dst[lane_chunk] = valid ? src[lane_chunk] : 0;
    }
  }

  typename Config::SharedStorage& shared_;
  const AttentionArgs& args_;
  int chunks_;  // of a 16-bit row; what is past its end is zero
  bool aligned_;
  int lane_, first_row_;
  std::int32_t fetched_ = -1;  // of this lane's row of the tile to come
  KeyRow row_;
};

// ---- e4m3 widened to 16 bits --------------------------------------------------------------------

__device__ __forceinline__ std::uint32_t multiply_bf16x2(std::uint32_t a, std::uint32_t b) {
  const __nv_bfloat162 product = __hmul2(reinterpret_cast<const __nv_bfloat162&>(a),
                                         reinterpret_cast<const __nv_bfloat162&>(b));
  return reinterpret_cast<const std::uint32_t&>(product);
}

// NaN (of bf16 and of f16) in those halves of `wide` whose codes were NaN.
__device__ __forceinline__ uint2 with_nan(uint2 wide, std::uint32_t codes) {
  constexpr std::uint32_t kNaN = 0x7FFFu;
  const std::uint32_t nan = ((codes & 0x7F7F'7F7Fu) + 0x0101'0101u) & 0x8080'8080u;
  if (nan != 0) {
    if (nan & 0x80u) wide.x |= kNaN;
    if (nan & 0x8000u) wide.x |= kNaN << 16;
    if (nan & 0x80'0000u) wide.y |= kNaN;
    if (nan & 0x8000'0000u) wide.y |= kNaN << 16;
  }
  return wide;
}

// Four e4m3 values as bf16, times a scale (a pair of the same power of two): the exponent is placed
// as it is, 120 too low, and a multiplication by 2^120 puts it right, subnormals too. Exact but for
// results below bf16's normal range; NaN codes become NaN.
__device__ __forceinline__ uint2 widen_to_bf16(std::uint32_t codes, std::uint32_t scale) {
  constexpr std::uint32_t kTwoTo120 = 0x7B80'7B80u;
  const auto widen_pair = [&](std::uint32_t high_bytes) {
    const std::uint32_t placed = (high_bytes & 0x8000'8000u) | ((high_bytes >> 4) & 0x07F0'07F0u);
    return multiply_bf16x2(multiply_bf16x2(placed, kTwoTo120), scale);
  };
  return with_nan(
      {widen_pair(__byte_perm(codes, 0, 0x1404)), widen_pair(__byte_perm(codes, 0, 0x3424))},
      codes);
}

// Four e4m3 values as f16. Exact; NaN codes become NaN.
__device__ __forceinline__ uint2 widen_to_f16(std::uint32_t codes) {
#if __CUDA_ARCH__ >= 890
  return ptx::f16x4_from_e4m3x4(codes);
#else
  // As above, the exponent 8 too low.
  constexpr std::uint32_t kTwoTo8 = 0x5C00'5C00u;
  const auto widen_pair = [&](std::uint32_t high_bytes) {
    const std::uint32_t placed = (high_bytes & 0x8000'8000u) | ((high_bytes >> 1) & 0x3F80'3F80u);
    const __half2 value = __hmul2(reinterpret_cast<const __half2&>(placed),
                                  reinterpret_cast<const __half2&>(kTwoTo8));
    return reinterpret_cast<const std::uint32_t&>(value);
  };
  return with_nan(
      {widen_pair(__byte_perm(codes, 0, 0x1404)), widen_pair(__byte_perm(codes, 0, 0x3424))},
      codes);
#endif
}

// A ue8m0 scale as a pair of bf16, which hold every power of two that it can be.
__device__ __forceinline__ std::uint32_t ue8m0_to_bf16x2(std::uint32_t byte) {
  const std::uint32_t code = byte == 0 ? 0x0040u : byte == 255 ? 0x7FC0u : byte << 7;
  return code | code << 16;
}

// raw -> tile: a thread widens 8 codes at a time, always the same ones of a row; a row is 64
// threads. V4's scales are multiplied in; V3.2's are put aside in `scale`.
template <typename Config>
__device__ void widen_tile(typename Config::SharedStorage& shared) {
  constexpr int kNope =
      static_cast<int>(Config::kIsV4 ? MlaV4Layout::kDimNope : MlaV32Layout::kDimNope);
  constexpr int kRope =
      static_cast<int>(Config::kIsV4 ? MlaV4Layout::rope(0) : MlaV32Layout::rope(0));
  constexpr int kRopeChunks = 64 * 2 / kChunk;
  constexpr int kCodes = 8;  // a thread: 16 bytes of the tile
  [[maybe_unused]] constexpr int kV4Group = static_cast<int>(MlaV4Layout::kGroup);
  constexpr int kRowsAtOnce = Config::kThreads / 64;
  const std::uint8_t* raw = shared.raw;
  std::uint8_t* tile = shared.tile[0];

  // Opaque, so that addresses are formed for each tile: kept through it they would cost registers.
  int thread = threadIdx.x;
  asm volatile("" : "+r"(thread));
  const int chunk = thread % 64;
  const int first_row = thread / 64;
  if (chunk * kCodes < kNope) {
    // The swizzle repeats after 8 rows.
    constexpr int kPeriod = 8 / kRowsAtOnce;
    const std::uint8_t* src = raw + first_row * Config::kRawBytes;
    std::uint8_t* dst[kPeriod];
#pragma unroll
    for (int i = 0; i < kPeriod; ++i) dst[i] = tile + swizzled(first_row + i * kRowsAtOnce, chunk);
    // Loads before stores, eight rows at a time: the compiler may not move one past the other.
    constexpr int kRows = Config::kTokens / kRowsAtOnce;
    constexpr int kBatch = 8;
    static_assert(kRows % kBatch == 0);
#pragma unroll
    for (int first = 0; first < kRows; first += kBatch) {
      uint2 codes[kBatch];
      std::uint32_t scales[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const std::uint8_t* row = src + (first + i) * kRowsAtOnce * Config::kRawBytes;
        codes[i] = *reinterpret_cast<const uint2*>(row + chunk * kCodes);
        if constexpr (Config::kIsV4) {
          scales[i] = row[Config::kRowCopyBytes + chunk * kCodes / kV4Group];
        }
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        uint2 low, high;
        if constexpr (Config::kIsV4) {
          const std::uint32_t scale = ue8m0_to_bf16x2(scales[i]);
          low = widen_to_bf16(codes[i].x, scale);
          high = widen_to_bf16(codes[i].y, scale);
        } else {
          low = widen_to_f16(codes[i].x);
          high = widen_to_f16(codes[i].y);
        }
        *reinterpret_cast<uint4*>(dst[(first + i) % kPeriod] +
                                  (first + i) / kPeriod * 8 * kRowBytes) = {low.x, low.y, high.x,
                                                                            high.y};
      }
    }
  }

  constexpr int kRopeCopies = Config::kTokens * kRopeChunks / Config::kThreads;
  static_assert(kRopeCopies * Config::kThreads == Config::kTokens * kRopeChunks);
  uint4 rope[kRopeCopies];
#pragma unroll
  for (int i = 0; i < kRopeCopies; ++i) {
    const int at = thread + i * Config::kThreads;
    rope[i] = *reinterpret_cast<const uint4*>(raw + at / kRopeChunks * Config::kRawBytes + kRope +
                                              at % kRopeChunks * kChunk);
  }
#pragma unroll
  for (int i = 0; i < kRopeCopies; ++i) {
    const int at = thread + i * Config::kThreads;
    *reinterpret_cast<uint4*>(
        tile + swizzled(at / kRopeChunks, kNope * 2 / kChunk + at % kRopeChunks)) = rope[i];
  }

  if constexpr (Config::kIsV32) {
    for (int i = thread; i < Config::kTokens * Config::kScales; i += Config::kThreads) {
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

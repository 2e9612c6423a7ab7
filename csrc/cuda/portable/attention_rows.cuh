// SPDX-License-Identifier: Apache-2.0
// The way of key rows into shared memory: cp.async of each row as it is in the cache.
//
// Rows in shared memory are swizzled: of the 16-byte chunks of every 128 bytes, chunk c of row r
// stands at c ^ (r % 8), so that ldmatrix finds eight rows in eight different bank groups.
#pragma once

#include <cstdint>

#include "cuda/portable/attention_config.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/ldst.cuh"

namespace dsa::cuda {

// Where chunk `chunk` of row `row` stands. For addresses on 128 bytes, another chunk of the same
// 128 bytes stands at the address ^ (chunk ^ other) * kChunk.
template <int kPitch>
__device__ __forceinline__ std::uint32_t swizzled(int row, int chunk) {
  constexpr int kInSwizzle = kSwizzle - 1;
  return static_cast<std::uint32_t>(row * kPitch + (chunk & ~kInSwizzle) * kChunk +
                                    ((chunk ^ row) & kInSwizzle) * kChunk);
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

// A chunk, or zeros.
template <bool kAligned>
__device__ __forceinline__ void copy_chunk(std::uint32_t shared, const std::uint8_t* src,
                                           bool valid) {
  if constexpr (kAligned) {
    ptx::cp_async_or_zeros<kChunk>(shared, src, valid);
  } else {
    store_chunk(shared, valid ? load_unaligned_16(src) : uint4{0, 0, 0, 0});
  }
}

// Brings tiles of keys into shared memory. A warp has eight rows of each tile. Lane i looks up row
// i; then eight lanes copy a row, 128 bytes of it at a time, and a lane has rows lane / 8 and lane
// / 8 + 4.
template <typename Config>
class TileLoader {
 public:
  __device__ TileLoader(typename Config::SharedStorage& shared, const AttentionArgs& args)
      : shared_(shared),
        args_(args),
        chunks_(Config::kIsFp8 ? Config::kRopeChunk + kRopeChunks : args.d_qk * 2 / kChunk),
        aligned_(args.lists[0].rows.aligned && args.lists[1].rows.aligned),
        offset_(swizzled<Config::kTileRowBytes>(first_row() + lane() / 8, lane() % 8)) {}

  // Whether this warp loads.
  __device__ static bool has_rows() {
    return Config::kLoadWarps == Config::kWarps || first_row() >= 0;
  }

  // A tile's copies, each step well before the next: ask memory for its slots, work out its rows,
  // begin, and the parts of 128 bytes in any order. They complete with the thread's next cp.async
  // group.
  __device__ void fetch(int tile) { fetched_ = shared_.keys.fetch(args_, key_of_lane(tile)); }

  // Only after all have done with the scores of tile - 2.
  __device__ void locate(int tile) {
    const KeyRow row = shared_.keys.row(args_, key_of_lane(tile), fetched_);
    if (lane() < kRows) {
      shared_.valid[tile & 1][first_row() + lane()] = row.values != nullptr;
    }
    valid_ = __ballot_sync(~0u, row.values != nullptr) >> (lane() / 8);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const auto of_row =
          __shfl_sync(~0u, reinterpret_cast<unsigned long long>(row.values), 4 * i + lane() / 8);
      source_[i] = reinterpret_cast<const std::uint8_t*>(of_row) + lane() % 8 * kChunk;
    }
    if constexpr (Config::kIsFp8) scales_ = row.scales;
  }

  // Scales, and all of rows that cp.async cannot copy.
  __device__ void begin(int stage) const {
    if (aligned_) {
      if constexpr (Config::kIsFp8) copy_scales<true>(stage);
      return;
    }
    if constexpr (Config::kIsFp8) copy_scales<false>(stage);
#pragma unroll 1
    for (int part = 0; part < Config::kRowParts; ++part) copy<false>(stage, part);
  }

  __device__ void issue(int stage, int part) const {
    if (aligned_) copy<true>(stage, part);
  }

 private:
  static constexpr int kRows = 8;  // of a warp
  static_assert(Config::kTokens == Config::kLoadWarps * kRows);

  __device__ static int lane() { return threadIdx.x % 32; }
  __device__ static int first_row() {
    return (static_cast<int>(threadIdx.x) / 32 - (Config::kWarps - Config::kLoadWarps)) * kRows;
  }
  __device__ static int key_of_lane(int tile) {
    return tile * Config::kTokens + first_row() + min(lane(), kRows - 1);
  }

  // Part `part` of this lane's rows; zeros where there is no row or it has ended.
  template <bool kAligned>
  __device__ void copy(int stage, int part) const {
    constexpr int kPartBytes = kSwizzle * kChunk;
    const bool in_row = Config::kIsV32 || part * kSwizzle + lane() % 8 < chunks_;
    // V3.2's scales stand before its RoPE.
    const int gap = Config::kIsV32 && part == Config::kRowParts - 1 ? Config::kScaleBytes : 0;
    const std::uint32_t tile = ptx::shared_address(shared_.tile[stage]) + part * kPartBytes;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const std::uint32_t offset = (offset_ ^ (i * 4 * kChunk)) + i * 4 * Config::kTileRowBytes;
      copy_chunk<kAligned>(tile + offset, source_[i] + part * kPartBytes + gap,
                           (valid_ & (1u << 4 * i)) != 0 && in_row);
    }
  }

  // Scales of the row that this lane has looked up.
  template <bool kAligned>
  __device__ void copy_scales(int stage) const {
    if (lane() >= kRows) return;
    constexpr int kBytes = Config::kScaleBytes;
    std::uint8_t* dst = shared_.scales[stage] + (first_row() + lane()) * kBytes;
    if constexpr (kAligned) {
      ptx::cp_async_or_zeros<kBytes>(ptx::shared_address(dst), scales_, scales_ != nullptr);
    } else {
      for (int i = 0; i < kBytes; ++i) dst[i] = scales_ != nullptr ? scales_[i] : 0;
    }
  }

  typename Config::SharedStorage& shared_;
  const AttentionArgs& args_;
  int chunks_;  // of a row
  bool aligned_;
  std::uint32_t offset_;  // of this lane's first row in the tile
  // Of the tile to come:
  std::int32_t fetched_ = -1;             // of the row that this lane looks up
  const std::uint8_t* scales_ = nullptr;  // of the same; nullptr: no valid row
  const std::uint8_t* source_[2];         // where this lane copies from
  unsigned valid_ = 0;                    // bits 0 and 4: whether those rows are valid
};

}  // namespace dsa::cuda

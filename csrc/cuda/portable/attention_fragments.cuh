// SPDX-License-Identifier: Apache-2.0
// Operands of mma.sync from shared memory, and e4m3 widened to 16 bits on the way.
//
// ldmatrix gives a lane two 16-bit elements; of FP8 rows that is four e4m3 values, and these are
// put to use as they come:
//   K   of 16 dims, lane t of a row has dims 4t .. 4t + 3: B's rows 2t, 2t + 1 and 2t + 8, 2t + 9.
//       The dims of q are in the same order (narrow_queries).
//   V   transposed, a lane has dims 2g, 2g + 1 of two keys: column g of two products, one for the
//       even and one for the odd of 16 dims.
#pragma once

#include <cstdint>

#include "cuda/common/pair.cuh"
#include "cuda/portable/attention_rows.cuh"
#include "cuda/ptx/cvt_e4m3.cuh"
#include "cuda/ptx/mma.cuh"

namespace dsa::cuda {

// ---- e4m3 ---------------------------------------------------------------------------------------

// Four e4m3 values as f16. Exact; NaN codes become NaN.
__device__ __forceinline__ uint2 widen_to_f16(std::uint32_t codes) {
#if __CUDA_ARCH__ >= 890
  return ptx::f16x4_from_e4m3x4(codes);
#else
  // The exponent is placed as it is, 8 too low, and a multiplication by 2^8 puts it right,
  // subnormals too.
  constexpr std::uint32_t kTwoTo8 = 0x5C00'5C00u;
  const auto widen_pair = [&](std::uint32_t high_bytes) {
    const std::uint32_t placed = (high_bytes & 0x8000'8000u) | ((high_bytes >> 1) & 0x3F80'3F80u);
    const __half2 value = __hmul2(reinterpret_cast<const __half2&>(placed),
                                  reinterpret_cast<const __half2&>(kTwoTo8));
    return reinterpret_cast<const std::uint32_t&>(value);
  };
  uint2 wide{widen_pair(__byte_perm(codes, 0, 0x1404)), widen_pair(__byte_perm(codes, 0, 0x3424))};
  const std::uint32_t nan = ((codes & 0x7F7F'7F7Fu) + 0x0101'0101u) & 0x8080'8080u;
  if (nan != 0) {
    constexpr std::uint32_t kNaN = 0x7FFFu;
    if (nan & 0x80u) wide.x |= kNaN;
    if (nan & 0x8000u) wide.x |= kNaN << 16;
    if (nan & 0x80'0000u) wide.y |= kNaN;
    if (nan & 0x8000'0000u) wide.y |= kNaN << 16;
  }
  return wide;
#endif
}

__device__ __forceinline__ float ue8m0_to_float(std::uint32_t byte) {
  return __uint_as_float(byte == 0 ? 0x0040'0000u : byte == 255 ? 0x7FC0'0000u : byte << 23);
}

// The scale of group `group` of a row of the tile in `scales`.
template <typename Config>
__device__ __forceinline__ float scale_of(const std::uint8_t* scales, int row, int group) {
  scales += row * Config::kScaleBytes;
  if constexpr (Config::kIsV32) return reinterpret_cast<const float*>(scales)[group];
  return ue8m0_to_float(scales[group]);
}

// ---- QK -----------------------------------------------------------------------------------------

// q and keys for one warp: kMTiles * 16 heads, kKeys keys, and one half (0 or 1) of every block or
// group of dims.
template <typename Config>
class QkFragments {
 public:
  static constexpr int kMTiles = Config::kMTiles;
  static constexpr int kKeys = 2 * Config::kNTiles * 8;
  using Sums = float[kMTiles][kKeys / 8][4];

  __device__ QkFragments(const typename Config::SharedStorage& shared, int stage, int head, int key,
                         int half, int lane) {
    const std::uint32_t q = ptx::shared_address(shared.q);
    const std::uint32_t tile = ptx::shared_address(shared.tile[stage]);
    q_ = q + swizzled<kRowBytes>(head + lane % 16, 4 * half + lane / 16);
    wide_ = tile + swizzled<Config::kTileRowBytes>(
                       key + lane % 8 + lane / 16 * 8,
                       (Config::kIsFp8 ? Config::kRopeChunk : 0) + 4 * half + lane / 8 % 2);
    if constexpr (Config::kIsFp8) {
      const int matrix = lane / 8;
      q_codes_ = q + swizzled<kRowBytes>(head + lane % 16, half * kHalfGroup / 8 + lane / 16);
      codes_ =
          tile + swizzled<Config::kTileRowBytes>(key + lane % 8 + matrix * 8 % kKeys,
                                                 half * kHalfGroup / kChunk + matrix * 8 / kKeys);
    }
  }

  // sums += q . k over half of 64 dims: of 16-bit keys, or of the RoPE of FP8 keys.
  template <typename Element>
  __device__ void multiply_block(int q_block, int key_block, Sums& sums) const {
#pragma unroll
    for (int step = 0; step < 2; ++step) {  // of 16 dims
      const std::uint32_t chunk_bits = step * 2 * kChunk;
      std::uint32_t a[kMTiles][4];
      load_q(a, (q_ ^ chunk_bits) + q_block * (2 * kDimBlock));
#pragma unroll
      for (int n = 0; n < kKeys / 8; n += 2) {
        std::uint32_t b[4];
        ptx::ldmatrix_x4(
            b, (wide_ ^ chunk_bits) + key_block * (2 * kDimBlock) + n * 8 * Config::kTileRowBytes);
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) {
          ptx::mma_16816<Element>(sums[m][n], a[m], b[0], b[1]);
          ptx::mma_16816<Element>(sums[m][n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }

  // sums += q . k over half of the dims of one scale.
  __device__ void multiply_group(int group, Sums& sums) const {
    constexpr int kChunksPerLoad = 32 / kKeys;
    static_assert(kHalfGroup / kChunk % kChunksPerLoad == 0);
    const std::uint32_t q = q_codes_ + group * (Config::kGroup * 2);
    // Two groups of 64, or one of 128, in a swizzle.
    const std::uint32_t group_bits = group * Config::kGroup % kSwizzleBytes;
    const std::uint32_t codes =
        (codes_ ^ group_bits) + group * Config::kGroup / kSwizzleBytes * kSwizzleBytes;
#pragma unroll
    for (int chunk = 0; chunk < kHalfGroup / kChunk; chunk += kChunksPerLoad) {
      std::uint32_t loaded[4];
      ptx::ldmatrix_x4(loaded, codes ^ (chunk * kChunk));
#pragma unroll
      for (int c = 0; c < kChunksPerLoad; ++c) {
        std::uint32_t a[kMTiles][4];
        load_q(a, q ^ ((chunk + c) * 2 * kChunk));
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
          const uint2 b = widen_to_f16(loaded[c * (kKeys / 8) + n]);
#pragma unroll
          for (int m = 0; m < kMTiles; ++m) ptx::mma_16816<__half>(sums[m][n], a[m], b.x, b.y);
        }
      }
    }
  }

 private:
  static constexpr int kHalfGroup = Config::kGroup / 2;
  static constexpr int kSwizzleBytes = kSwizzle * kChunk;
  static_assert(kKeys == 16 || kKeys == 32);

  __device__ static void load_q(std::uint32_t (&a)[kMTiles][4], std::uint32_t address) {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) ptx::ldmatrix_x4(a[m], address + m * 16 * kRowBytes);
  }

  // Addresses of this lane's ldmatrix rows.
  std::uint32_t q_, wide_, q_codes_, codes_;
};

// ---- PV -----------------------------------------------------------------------------------------

// Values for one warp: its kColumns columns of the keys of a tile.
template <typename Config>
class ValueFragments {
 public:
  __device__ ValueFragments(const typename Config::SharedStorage& shared, int stage, int column,
                            int lane)
      : scales_(shared.scales[stage]), column_(column), lane_(lane) {
    const std::uint32_t tile = ptx::shared_address(shared.tile[stage]);
    const int row = lane % 16;
    wide_ = tile + swizzled<Config::kTileRowBytes>(
                       row, (Config::kIsFp8 ? Config::kRopeChunk : column / 8) + lane / 16);
    if constexpr (Config::kIsFp8) {
      codes_ = tile + swizzled<Config::kTileRowBytes>(row, column / kChunk + lane / 16);
    }
  }

  // Loads keys [key, key + 16) of block `block` of 64 columns and calls use(c, b0, b1) with the B
  // fragment of each product, c = 0 .. 7. Which columns of the block product c has:
  // AttentionTile::store_out.
  template <typename Use>
  __device__ void load_block(int key, int block, const Use& use) const {
    if (Config::holds_codes(column_ + block * kDimBlock)) {
      load_codes(key, block, use);
    } else {
      load_wide(key, block, use);
    }
  }

 private:
  template <typename Use>
  __device__ void load_wide(int key, int block, const Use& use) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // of 16 columns
      // RoPE begins within a swizzle.
      const int swizzles =
          Config::kIsFp8 ? (Config::kRopeChunk % kSwizzle + 2 * i) / kSwizzle : block;
      std::uint32_t b[4];
      ptx::ldmatrix_x4_trans(b, (wide_ ^ (i * 2 * kChunk)) + key * Config::kTileRowBytes +
                                    swizzles * (kSwizzle * kChunk));
      use(2 * i, b[0], b[1]);
      use(2 * i + 1, b[2], b[3]);
    }
  }

  template <typename Use>
  __device__ void load_codes(int key, int block, const Use& use) const {
    [[maybe_unused]] float scale[2][2];
    if constexpr (Config::kIsV4) {
      const int group = column_ / Config::kGroup + block;
      const int row = key + lane_ % 4 * 2;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        scale[i][0] = scale_of<Config>(scales_, row + 8 * i, group);
        scale[i][1] = scale_of<Config>(scales_, row + 8 * i + 1, group);
      }
    }
    const auto widen = [&](std::uint32_t codes, int i) {
      // Of two keys two values each -> of each value the two keys'.
      uint2 wide = widen_to_f16(__byte_perm(codes, 0, 0x3120));
      if constexpr (Config::kIsV4) {
        wide.x = times(wide.x, scale[i]);
        wide.y = times(wide.y, scale[i]);
      }
      return wide;
    };
#pragma unroll
    for (int i = 0; i < 2; ++i) {  // of 32 columns
      std::uint32_t codes[4];
      ptx::ldmatrix_x4_trans(
          codes, (codes_ ^ (block * 4 * kChunk) ^ (i * 2 * kChunk)) + key * Config::kTileRowBytes);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint2 low = widen(codes[2 * half], 0);
        const uint2 high = widen(codes[2 * half + 1], 1);
        use(4 * i + 2 * half, low.x, high.x);
        use(4 * i + 2 * half + 1, low.y, high.y);
      }
    }
  }

  __device__ static std::uint32_t times(std::uint32_t halves, const float (&scale)[2]) {
    const float2 v = unpack<__half>(halves);
    return pack<__nv_bfloat16>(v.x * scale[0], v.y * scale[1]);
  }

  // Addresses of this lane's ldmatrix rows.
  std::uint32_t wide_, codes_;
  const std::uint8_t* scales_;
  int column_, lane_;
};

}  // namespace dsa::cuda

// SPDX-License-Identifier: Apache-2.0
// mla_kv_quant_and_cache and gather_mla_kv_cache, for the two FP8 formats and for 16-bit caches.
//
// A team of 8 lanes takes a token, a cta kMlaTokens of them. All of a lane's loads of a token are
// in flight together (FP8 formats) or kCopyInFlight of them (16-bit caches).
//
// Write: 128 values of the latent at once, 16 a lane; 8 (V3.2) or 4 lanes (V4) make a group under
// one scale. Then RoPE, 8 values a lane. No shared memory, no barriers. Gather: once the cta's
// places are found (shared memory: the places and a request a row; the barriers are find_places'),
// 64 values of the latent at once, 8 a lane, so that every store is a whole line.
#pragma once

#include <cstdint>

#include "core/half.h"
#include "cuda/common/quantise.cuh"
#include "cuda/common/ragged_rows.cuh"
#include "cuda/common/slot_mapping.cuh"
#include "cuda/common/vector.cuh"
#include "dsa/kv_layout.h"

namespace dsa::cuda {

inline constexpr int kMlaThreads = 256;
inline constexpr int kMlaTeam = 8;
inline constexpr int kMlaTokens = kMlaThreads / kMlaTeam;
inline constexpr int kGatherCtasPerSm = 4;      // a gather waits twice in a row: many at once
inline constexpr int kUnit = kVectorBytes / 2;  // 16-bit values of a vector
inline constexpr int kCopyInFlight = 3;         // 9 vectors a lane, 576 values, in three goes

__device__ __forceinline__ int mla_lane() { return static_cast<int>(threadIdx.x) % kMlaTeam; }
__device__ __forceinline__ int mla_team() { return static_cast<int>(threadIdx.x) / kMlaTeam; }

// What sets the two FP8 formats apart: where bytes stand, and how a group's scale is stored.
struct MlaV32Format {
  using Layout = MlaV32Layout;

  static Layout layout(std::int64_t) { return {}; }
  // The scale that readers will apply.
  __device__ static float stored_scale(float scale) { return scale; }
  __device__ static void store_scale(std::uint8_t* scales, int group, float scale) {
    store_unaligned(scales + group * sizeof(float), scale);
  }
  static constexpr int kScaleBytes = static_cast<int>(Layout::kNumScales * sizeof(float));
  __device__ static float scale_of(const Pack<std::uint8_t, kScaleBytes>& scales, int group) {
    return __uint_as_float(scales.words[group]);
  }
};

struct MlaV4Format {
  using Layout = MlaV4Layout;

  static Layout layout(std::int64_t page_size) { return {page_size}; }
  __device__ static float stored_scale(float scale) { return ue8m0_decode(ue8m0_encode(scale)); }
  // The group past the last is the pad byte.
  __device__ static void store_scale(std::uint8_t* scales, int group, float scale) {
    scales[group] = group < Layout::kNumScales ? ue8m0_encode(scale) : std::uint8_t{0};
  }
  static constexpr int kScaleBytes = static_cast<int>(Layout::kScaleBytes);
  __device__ static float scale_of(const Pack<std::uint8_t, kScaleBytes>& scales, int group) {
    return ue8m0_decode(static_cast<std::uint8_t>(scales.words[group / 4] >> group % 4 * 8));
  }
};

struct MlaWrite {
  TensorView kv_c;          // [T, d_nope]
  TensorView k_pe;          // [T, d_rope]
  TensorView kv_cache;      // [pages, page_size, 1, ..]
  TensorView slot_mapping;  // [T]
  FastDivisor page_size;

  __device__ CachePlace place(std::int64_t token) const {
    const std::int64_t slot = read_slot(slot_mapping, token, kv_cache.size(0) * kv_cache.size(1));
    if (slot < 0) return {-1, 0};
    const std::int64_t page = page_size.quotient(slot);
    return {page, slot - page * page_size.divisor()};
  }
};

struct MlaGather {
  TensorView kv_cache;
  RaggedRows rows;
  TensorView out;  // [num_tokens, d]
};

__device__ __forceinline__ std::uint8_t* page_bytes(const TensorView& cache, std::int64_t page) {
  return cache.ptr<std::uint8_t>() + page * cache.stride(0);
}
__device__ __forceinline__ std::uint16_t* row_of_16_bits(const TensorView& cache,
                                                         const CachePlace& place) {
  return cache.ptr<std::uint16_t>() + place.page * cache.stride(0) + place.token * cache.stride(1);
}

// A team copies n 16-bit values, or stores zeros where src is null.
template <bool kWhole>
__device__ __forceinline__ void copy_by_team(const std::uint16_t* src, std::uint16_t* dst,
                                             std::int64_t n) {
  constexpr int kStep = kMlaTeam * kUnit;
  for (std::int64_t begin = mla_lane() * kUnit; begin < n; begin += kCopyInFlight * kStep) {
    Pack<std::uint16_t, kUnit> units[kCopyInFlight];
#pragma unroll
    for (int i = 0; i < kCopyInFlight; ++i) {
      const std::int64_t at = begin + i * kStep;
      units[i] = load<kWhole, std::uint16_t, kUnit>(src + at, src != nullptr ? n - at : 0);
    }
#pragma unroll
    for (int i = 0; i < kCopyInFlight; ++i) {
      const std::int64_t at = begin + i * kStep;
      store<kWhole>(dst + at, units[i], n - at);
    }
  }
}

template <typename T, typename Format, bool kWhole>
__global__ void __launch_bounds__(kMlaThreads, 4)
    portable_mla_cache_write_kernel(MlaWrite write, typename Format::Layout layout) {
  using Layout = typename Format::Layout;
  constexpr int kDimNope = static_cast<int>(Layout::kDimNope);
  constexpr int kChunk = kMlaTeam * kLaneValues;
  constexpr int kChunks = (kDimNope + kChunk - 1) / kChunk;
  constexpr int kGroupLanes = static_cast<int>(Layout::kGroup) / kLaneValues;
  constexpr int kGroupsPerChunk = kMlaTeam / kGroupLanes;
  static_assert(Layout::kDimRope == kMlaTeam * kUnit && kChunks <= kGroupLanes);
  const int lane = mla_lane();
  const std::int64_t token = std::int64_t{blockIdx.x} * kMlaTokens + mla_team();
  // Teams past the last token go on with nothing, since the warp's shuffles need all lanes.
  const bool any = token < write.kv_c.size(0);
  const auto valid = [&](int chunk) { return kDimNope - chunk * kChunk - lane * kLaneValues; };

  const std::int64_t row = any ? token : 0;
  const T* kv_c = write.kv_c.ptr<const T>() + row * write.kv_c.stride(0) + lane * kLaneValues;
  Pack<T, kLaneValues> values[kChunks];
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    values[i] = load<kWhole, T, kLaneValues>(kv_c + i * kChunk, any ? valid(i) : 0);
  }
  const auto rope = load<kWhole, T, kUnit>(
      write.k_pe.ptr<const T>() + row * write.k_pe.stride(0) + lane * kUnit, any ? kUnit : 0);
  // After the values, so that those do not wait for the slot.
  const CachePlace place = any ? write.place(token) : CachePlace{-1, 0};
  const bool mapped = place.page >= 0;
  std::uint8_t* page = page_bytes(write.kv_cache, mapped ? place.page : 0);

  // Lane i of a group keeps the scale of its group in chunk i: one store for all scales.
  float kept_scale = 0.0f;
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    const float scale = group_scale_of_team<kGroupLanes>(values[i]);
    if (lane % kGroupLanes == i) kept_scale = scale;
    const auto codes = quantise(values[i], Format::stored_scale(scale));
    store<kWhole>(page + layout.values(place.token) + i * kChunk + lane * kLaneValues, codes,
                  mapped ? valid(i) : 0);
  }
  if (!mapped) return;
  if (lane % kGroupLanes < kChunks) {
    const int group = lane % kGroupLanes * kGroupsPerChunk + lane / kGroupLanes;
    Format::store_scale(page + layout.scales(place.token), group, kept_scale);
  }
  // RoPE is stored as bf16 whatever the type of k_pe.
  Pack<std::uint8_t, kVectorBytes> rope_bytes;
#pragma unroll
  for (int i = 0; i < kUnit; i += 2) {
    rope_bytes.words[i / 2] = bf16_from_float(to_float(rope, i)) |
                              static_cast<std::uint32_t>(bf16_from_float(to_float(rope, i + 1)))
                                  << 16;
  }
  store<kWhole>(page + layout.rope(place.token) + lane * kVectorBytes, rope_bytes, kVectorBytes);
}

template <bool kWhole>
__global__ void __launch_bounds__(kMlaThreads)
    portable_mla_cache_write_16bit_kernel(MlaWrite write) {
  const std::int64_t token = std::int64_t{blockIdx.x} * kMlaTokens + mla_team();
  if (token >= write.kv_c.size(0)) return;
  const CachePlace place = write.place(token);
  if (place.page < 0) return;
  const std::int64_t d_nope = write.kv_c.size(1);
  std::uint16_t* latent = row_of_16_bits(write.kv_cache, place);
  copy_by_team<kWhole>(write.kv_c.ptr<const std::uint16_t>() + token * write.kv_c.stride(0), latent,
                       d_nope);
  copy_by_team<kWhole>(write.k_pe.ptr<const std::uint16_t>() + token * write.k_pe.stride(0),
                       latent + d_nope, write.k_pe.size(1));
}

// One token, dequantised to bf16 by a team; zeros where there is none.
template <typename Format, bool kWhole>
__device__ __forceinline__ void read_fp8_token(const TensorView& kv_cache,
                                               const typename Format::Layout& layout,
                                               const CachePlace& place, __nv_bfloat16* out) {
  using Layout = typename Format::Layout;
  constexpr int kDimNope = static_cast<int>(Layout::kDimNope);
  constexpr int kChunk = kMlaTeam * kUnit;
  constexpr int kChunks = kDimNope / kChunk;
  static_assert(kDimNope % kChunk == 0 && Layout::kGroup % kChunk == 0);
  static_assert(Layout::kDimRope == kChunk);
  const int lane = mla_lane();
  const bool mapped = place.page >= 0;
  const std::uint8_t* page = page_bytes(kv_cache, mapped ? place.page : 0);
  const std::uint8_t* values = page + layout.values(place.token) + lane * kUnit;

  const auto scales = load<kWhole, std::uint8_t, Format::kScaleBytes>(
      page + layout.scales(place.token), mapped ? Format::kScaleBytes : 0);
  Pack<std::uint8_t, kUnit> codes[kChunks];
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    codes[i] = load<kWhole, std::uint8_t, kUnit>(values + i * kChunk, mapped ? kUnit : 0);
  }
  const auto rope = load<kWhole, std::uint8_t, kVectorBytes>(
      page + layout.rope(place.token) + lane * kVectorBytes, mapped ? kVectorBytes : 0);

  out += lane * kUnit;
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    const float scale = Format::scale_of(scales, i * kChunk / static_cast<int>(Layout::kGroup));
    float x[kUnit];
    e4m3_decode4(codes[i].words[0], x);
    e4m3_decode4(codes[i].words[1], x + 4);
#pragma unroll
    for (int j = 0; j < kUnit; ++j) x[j] *= scale;
    store<kWhole>(out + i * kChunk, pack_from_float<__nv_bfloat16>(x), kUnit);
  }
  store<kWhole>(reinterpret_cast<std::uint8_t*>(out + kDimNope), rope, kVectorBytes);
}

// read(place, out) of each row of the cta; page -1 where a row has no place.
template <typename Read>
__device__ __forceinline__ void gather_rows(const MlaGather& gather, Read&& read) {
  __shared__ CachePlace places[kMlaTokens];
  const std::int64_t first_row = std::int64_t{blockIdx.x} * kMlaTokens;
  find_places<kMlaTokens, kMlaThreads>(gather.rows, first_row, places);
  const std::int64_t row = first_row + mla_team();
  if (row >= gather.out.size(0)) return;
  read(places[mla_team()], gather.out.ptr<std::uint16_t>() + row * gather.out.stride(0));
}

template <typename Format, bool kWhole>
__global__ void __launch_bounds__(kMlaThreads, kGatherCtasPerSm)
    portable_mla_cache_gather_kernel(MlaGather gather, typename Format::Layout layout) {
  gather_rows(gather, [&](const CachePlace& place, std::uint16_t* out) {
    read_fp8_token<Format, kWhole>(gather.kv_cache, layout, place,
                                   reinterpret_cast<__nv_bfloat16*>(out));
  });
}

template <bool kWhole>
__global__ void __launch_bounds__(kMlaThreads, kGatherCtasPerSm)
    portable_mla_cache_gather_16bit_kernel(MlaGather gather) {
  gather_rows(gather, [&](const CachePlace& place, std::uint16_t* out) {
    const std::uint16_t* row = place.page >= 0 ? row_of_16_bits(gather.kv_cache, place) : nullptr;
    copy_by_team<kWhole>(row, out, gather.out.size(1));
  });
}

}  // namespace dsa::cuda

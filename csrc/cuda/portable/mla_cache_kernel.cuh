// SPDX-License-Identifier: Apache-2.0
// mla_kv_quant_and_cache and gather_mla_kv_cache, for the two FP8 formats and for 16-bit caches.
//
// A warp takes a token. Write: 16 values of the latent a lane, of which 8 (V3.2) or 4 lanes (V4)
// make a group under one scale; the first 8 lanes also move RoPE, 8 values each. No shared memory,
// no barriers. Gather: a cta takes kGatherRows rows, kRowsPerWarp a warp, once their places are
// found (shared memory: the places and a request a row; the barriers are find_places'); 8 values a
// lane, so that a warp's stores are whole lines.
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
inline constexpr int kMlaWarps = kMlaThreads / kWarpSize;
inline constexpr int kGatherCtasPerSm = 4;  // a gather waits three times in a row: many at once
inline constexpr int kRowsPerWarp = 4;
inline constexpr int kMlaGatherRows = kMlaWarps * kRowsPerWarp;
inline constexpr int kUnit = kVectorBytes / 2;  // 16-bit values of a vector

// What sets the two FP8 formats apart: where bytes stand, and how a group's scale is stored.
struct MlaV32Format {
  using Layout = MlaV32Layout;

  static Layout layout(std::int64_t) { return {}; }
  // The scale that readers will apply.
  __device__ static float stored_scale(float scale) { return scale; }
  __device__ static void store_scale(std::uint8_t* scales, int group, float scale) {
    store_unaligned(scales + group * sizeof(float), scale);
  }
  __device__ static float load_scale(const std::uint8_t* scales, int group) {
    return load_unaligned(scales + group * sizeof(float));
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
  __device__ static float load_scale(const std::uint8_t* scales, int group) {
    return ue8m0_decode(scales[group]);
  }
};

struct MlaWrite {
  TensorView kv_c;          // [T, d_nope]
  TensorView k_pe;          // [T, d_rope]
  TensorView kv_cache;      // [pages, page_size, 1, ..]
  TensorView slot_mapping;  // [T]
  FastDivisor page_size;
  bool kv_c_aligned;
  bool k_pe_aligned;
  bool cache_aligned;

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
  bool cache_aligned;
  bool out_aligned;
};

__device__ __forceinline__ std::uint8_t* page_bytes(const TensorView& cache, std::int64_t page) {
  return cache.ptr<std::uint8_t>() + page * cache.stride(0);
}
__device__ __forceinline__ std::uint16_t* row_of_16_bits(const TensorView& cache,
                                                         const CachePlace& place) {
  return cache.ptr<std::uint16_t>() + place.page * cache.stride(0) + place.token * cache.stride(1);
}

// A warp copies n 16-bit values, several vectors a lane in flight.
__device__ __forceinline__ void copy_by_warp(const std::uint16_t* src, std::uint16_t* dst,
                                             std::int64_t n, bool aligned) {
  constexpr int kInFlight = 3;  // 72 vectors, 576 values, in one go
  constexpr int kStep = kWarpSize * kUnit;
  const std::int64_t lane = threadIdx.x % kWarpSize;
  for (std::int64_t begin = lane * kUnit; begin < n; begin += kInFlight * kStep) {
    Pack<std::uint16_t, kUnit> units[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const std::int64_t at = begin + i * kStep;
      units[i] = load<std::uint16_t, kUnit>(src + at, n - at, aligned);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const std::int64_t at = begin + i * kStep;
      store(dst + at, units[i], n - at, aligned);
    }
  }
}

__device__ __forceinline__ void zero_by_warp(std::uint16_t* dst, std::int64_t n, bool aligned) {
  const std::int64_t lane = threadIdx.x % kWarpSize;
  for (std::int64_t begin = lane * kUnit; begin < n; begin += kWarpSize * kUnit) {
    store(dst + begin, Pack<std::uint16_t, kUnit>{}, n - begin, aligned);
  }
}

template <typename T, typename Format>
__global__ void __launch_bounds__(kMlaThreads)
    portable_mla_cache_write_kernel(MlaWrite write, typename Format::Layout layout) {
  using Layout = typename Format::Layout;
  constexpr int kTeam = static_cast<int>(Layout::kGroup) / kLaneValues;
  constexpr int kRopeLanes = static_cast<int>(Layout::kDimRope) / kUnit;
  static_assert(Layout::kDimNope <= kWarpSize * kLaneValues && kRopeLanes <= kWarpSize);
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const std::int64_t token =
      std::int64_t{blockIdx.x} * kMlaWarps + static_cast<int>(threadIdx.x) / kWarpSize;
  if (token >= write.kv_c.size(0)) return;  // the whole warp
  const CachePlace place = write.place(token);

  const int begin = lane * kLaneValues;
  const int valid = static_cast<int>(Layout::kDimNope) - begin;
  const int rope_valid = lane < kRopeLanes ? kUnit : 0;
  float values[kLaneValues], rope[kUnit];
  load_as_float(write.kv_c.ptr<const T>() + token * write.kv_c.stride(0) + begin, valid,
                write.kv_c_aligned, values);
  load_as_float(write.k_pe.ptr<const T>() + token * write.k_pe.stride(0) + lane * kUnit, rope_valid,
                write.k_pe_aligned, rope);

  // Only here, so that the loads above do not wait for the slot. The whole warp, too.
  if (place.page < 0) return;
  const float scale = group_scale_of_team<kTeam>(values);
  std::uint8_t* page = page_bytes(write.kv_cache, place.page);
  store(page + layout.values(place.token) + begin, quantise(values, Format::stored_scale(scale)),
        valid, write.cache_aligned);
  if (lane % kTeam == 0) {
    Format::store_scale(page + layout.scales(place.token), lane / kTeam, scale);
  }
  // RoPE is stored as bf16 whatever the type of k_pe.
  Pack<std::uint8_t, kVectorBytes> rope_bytes;
#pragma unroll
  for (int i = 0; i < kUnit; i += 2) {
    reinterpret_cast<std::uint32_t*>(rope_bytes.values)[i / 2] =
        bf16_from_float(rope[i]) | static_cast<std::uint32_t>(bf16_from_float(rope[i + 1])) << 16;
  }
  store(page + layout.rope(place.token) + lane * kVectorBytes, rope_bytes,
        rope_valid > 0 ? kVectorBytes : 0, write.cache_aligned);
}

__global__ void __launch_bounds__(kMlaThreads)
    portable_mla_cache_write_16bit_kernel(MlaWrite write) {
  const std::int64_t token =
      std::int64_t{blockIdx.x} * kMlaWarps + static_cast<int>(threadIdx.x) / kWarpSize;
  if (token >= write.kv_c.size(0)) return;
  const CachePlace place = write.place(token);
  if (place.page < 0) return;
  const std::int64_t d_nope = write.kv_c.size(1);
  std::uint16_t* latent = row_of_16_bits(write.kv_cache, place);
  copy_by_warp(write.kv_c.ptr<const std::uint16_t>() + token * write.kv_c.stride(0), latent, d_nope,
               write.kv_c_aligned && write.cache_aligned);
  copy_by_warp(write.k_pe.ptr<const std::uint16_t>() + token * write.k_pe.stride(0),
               latent + d_nope, write.k_pe.size(1),
               write.k_pe_aligned && write.cache_aligned && d_nope % kUnit == 0);
}

// One token, dequantised to bf16 by a warp.
template <typename Format>
__device__ __forceinline__ void read_fp8_token(const MlaGather& gather,
                                               const typename Format::Layout& layout,
                                               const CachePlace& place, __nv_bfloat16* out) {
  using Layout = typename Format::Layout;
  constexpr int kDimNope = static_cast<int>(Layout::kDimNope);
  constexpr int kSteps = (kDimNope + kWarpSize * kUnit - 1) / (kWarpSize * kUnit);
  constexpr int kRopeLanes = static_cast<int>(Layout::kDimRope) / kUnit;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const std::uint8_t* page = page_bytes(gather.kv_cache, place.page);
  const std::uint8_t* values = page + layout.values(place.token);
  const std::uint8_t* scales = page + layout.scales(place.token);

  Pack<std::uint8_t, kUnit> codes[kSteps];
  float scale[kSteps];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int begin = (step * kWarpSize + lane) * kUnit;
    codes[step] = load<std::uint8_t, kUnit>(values + begin, kDimNope - begin, gather.cache_aligned);
    const int group = begin / static_cast<int>(Layout::kGroup);
    scale[step] = begin < kDimNope ? Format::load_scale(scales, group) : 0.0f;
  }
  const auto rope =
      load<std::uint8_t, kVectorBytes>(page + layout.rope(place.token) + lane * kVectorBytes,
                                       lane < kRopeLanes ? kVectorBytes : 0, gather.cache_aligned);

#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int begin = (step * kWarpSize + lane) * kUnit;
    float x[kUnit];
#pragma unroll
    for (int i = 0; i < kUnit; i += 4) {
      e4m3_decode4(reinterpret_cast<const std::uint32_t*>(codes[step].values)[i / 4], x + i);
    }
#pragma unroll
    for (int i = 0; i < kUnit; ++i) x[i] *= scale[step];
    store_from_float(out + begin, x, kDimNope - begin, gather.out_aligned);
  }
  if (lane < kRopeLanes) {
    Pack<__nv_bfloat16, kUnit> rope_values;
    __builtin_memcpy(rope_values.values, rope.values, kVectorBytes);
    store(out + kDimNope + lane * kUnit, rope_values, kUnit, gather.out_aligned);
  }
}

// read(place, out) of each row of the cta that has a place; zeros for the others.
template <typename Read>
__device__ __forceinline__ void gather_rows(const MlaGather& gather, Read&& read) {
  __shared__ CachePlace places[kMlaGatherRows];
  const std::int64_t first_row = std::int64_t{blockIdx.x} * kMlaGatherRows;
  find_places<kMlaGatherRows, kMlaThreads>(gather.rows, first_row, places);
  for (int i = 0; i < kRowsPerWarp; ++i) {
    const int row = i * kMlaWarps + static_cast<int>(threadIdx.x) / kWarpSize;
    if (first_row + row >= gather.out.size(0)) return;
    std::uint16_t* out = gather.out.ptr<std::uint16_t>() + (first_row + row) * gather.out.stride(0);
    if (places[row].page >= 0) {
      read(places[row], out);
    } else {
      zero_by_warp(out, gather.out.size(1), gather.out_aligned);
    }
  }
}

template <typename Format>
__global__ void __launch_bounds__(kMlaThreads, kGatherCtasPerSm)
    portable_mla_cache_gather_kernel(MlaGather gather, typename Format::Layout layout) {
  gather_rows(gather, [&](const CachePlace& place, std::uint16_t* out) {
    read_fp8_token<Format>(gather, layout, place, reinterpret_cast<__nv_bfloat16*>(out));
  });
}

__global__ void __launch_bounds__(kMlaThreads, kGatherCtasPerSm)
    portable_mla_cache_gather_16bit_kernel(MlaGather gather) {
  gather_rows(gather, [&](const CachePlace& place, std::uint16_t* out) {
    copy_by_warp(row_of_16_bits(gather.kv_cache, place), out, gather.out.size(1),
                 gather.cache_aligned && gather.out_aligned);
  });
}

}  // namespace dsa::cuda

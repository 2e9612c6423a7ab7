// SPDX-License-Identifier: Apache-2.0
// Runs of values between memory and registers: vectors of up to 16 bytes where the addresses allow
// it, one value at a time where they do not or where a row ends.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "cuda/ptx/st_global.cuh"
#include "dsa/params.h"
#include "dsa/status.h"

namespace dsa::cuda {

inline constexpr int kVectorBytes = 16;
inline constexpr int kWarpSize = 32;
inline constexpr unsigned kAllLanes = 0xFFFF'FFFFu;

template <int kBytes>
using Word = std::conditional_t<kBytes % 16 == 0, uint4,
                                std::conditional_t<kBytes == 8, uint2, std::uint32_t>>;

// kCount consecutive values in registers.
template <typename T, int kCount>
struct Pack {
  using Access = Word<static_cast<int>(kCount * sizeof(T))>;
  static constexpr int kAccesses = static_cast<int>(kCount * sizeof(T) / sizeof(Access));
  static_assert(kAccesses * sizeof(Access) == kCount * sizeof(T));

  alignas(Access) T values[kCount];
};

// All of the pack; src is aligned to an access.
template <typename T, int kCount>
__device__ __forceinline__ Pack<T, kCount> load_vectors(const T* src) {
  using Access = typename Pack<T, kCount>::Access;
  Pack<T, kCount> pack;
#pragma unroll
  for (int i = 0; i < Pack<T, kCount>::kAccesses; ++i) {
    reinterpret_cast<Access*>(pack.values)[i] = reinterpret_cast<const Access*>(src)[i];
  }
  return pack;
}
template <typename T, int kCount>
__device__ __forceinline__ void store_vectors(T* dst, const Pack<T, kCount>& pack) {
  using Access = typename Pack<T, kCount>::Access;
#pragma unroll
  for (int i = 0; i < Pack<T, kCount>::kAccesses; ++i) {
    const Access word = reinterpret_cast<const Access*>(pack.values)[i];
    if constexpr (std::is_same_v<Access, uint4>) {
      ptx::st_global_16(reinterpret_cast<Access*>(dst) + i, word);
    } else {
      reinterpret_cast<Access*>(dst)[i] = word;
    }
  }
}

// The first `valid` of the pack, which may be none or more than there are; the others are zero, or
// are not stored. `aligned`: src or dst is aligned to an access.
template <typename T, int kCount>
__device__ __forceinline__ Pack<T, kCount> load(const T* src, std::int64_t valid, bool aligned) {
  if (aligned && valid >= kCount) return load_vectors<T, kCount>(src);
  Pack<T, kCount> pack;
#pragma unroll
  for (int i = 0; i < kCount; ++i) pack.values[i] = i < valid ? src[i] : T(0.0f);
  return pack;
}
template <typename T, int kCount>
__device__ __forceinline__ void store(T* dst, const Pack<T, kCount>& pack, std::int64_t valid,
                                      bool aligned) {
  if (aligned && valid >= kCount) return store_vectors(dst, pack);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (i < valid) dst[i] = pack.values[i];
  }
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

// Round to nearest even.
template <typename T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __float2bfloat16_rn(x);
  if constexpr (std::is_same_v<T, __half>) return __float2half_rn(x);
  if constexpr (std::is_same_v<T, float>) return x;
}

template <typename T, int kCount>
__device__ __forceinline__ void load_as_float(const T* src, std::int64_t valid, bool aligned,
                                              float (&x)[kCount]) {
  const Pack<T, kCount> pack = load<T, kCount>(src, valid, aligned);
#pragma unroll
  for (int i = 0; i < kCount; ++i) x[i] = to_float(pack.values[i]);
}
template <typename T, int kCount>
__device__ __forceinline__ void store_from_float(T* dst, const float (&x)[kCount],
                                                 std::int64_t valid, bool aligned) {
  Pack<T, kCount> pack;
#pragma unroll
  for (int i = 0; i < kCount; ++i) pack.values[i] = from_float<T>(x[i]);
  store(dst, pack, valid, aligned);
}

// fp32 at any address.
__device__ __forceinline__ float load_unaligned(const std::uint8_t* src) {
  if (reinterpret_cast<std::uintptr_t>(src) % sizeof(float) == 0) {
    return *reinterpret_cast<const float*>(src);
  }
  std::uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) bits |= static_cast<std::uint32_t>(src[i]) << 8 * i;
  return __uint_as_float(bits);
}
__device__ __forceinline__ void store_unaligned(std::uint8_t* dst, float x) {
  if (reinterpret_cast<std::uintptr_t>(dst) % sizeof(float) == 0) {
    *reinterpret_cast<float*>(dst) = x;
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) dst[i] = static_cast<std::uint8_t>(__float_as_uint(x) >> 8 * i);
}

// body(T{}) with the type of an f32, bf16 or f16 tensor's elements.
template <typename Body>
Status with_value_type(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::kFloat32: return body(float{});
    case DType::kBFloat16: return body(__nv_bfloat16{});
    default: return body(__half{});
  }
}

// Whether the rows of `t`, whatever its leading dimensions, all start at multiples of `bytes`.
inline bool rows_aligned(const TensorView& t, std::int64_t element_bytes, std::int64_t bytes) {
  if (reinterpret_cast<std::uintptr_t>(t.data) % static_cast<std::uintptr_t>(bytes) != 0) {
    return false;
  }
  for (int dim = 0; dim + 1 < t.ndim; ++dim) {
    if (t.sizes[dim] > 1 && t.strides[dim] * element_bytes % bytes != 0) return false;
  }
  return true;
}
// Whether the pages of a cache do; what stands where in a page is for its layout to say.
inline bool pages_aligned(const TensorView& cache, std::int64_t element_bytes, std::int64_t bytes) {
  TensorView pages = cache;
  pages.ndim = 2;  // [pages, bytes or elements of a page]
  return rows_aligned(pages, element_bytes, bytes);
}

}  // namespace dsa::cuda

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

template <typename T>
using UnsignedOf =
    std::conditional_t<sizeof(T) == 4, std::uint32_t,
                       std::conditional_t<sizeof(T) == 2, std::uint16_t, std::uint8_t>>;

// A pair of 16-bit values <-> its bits.
template <typename Pair>
__device__ __forceinline__ Pair word_as(std::uint32_t word) {
  Pair pair;
  __builtin_memcpy(&pair, &word, sizeof(word));
  return pair;
}
template <typename Pair>
__device__ __forceinline__ std::uint32_t as_word(const Pair& pair) {
  std::uint32_t word;
  __builtin_memcpy(&word, &pair, sizeof(word));
  return word;
}

// kCount consecutive values in registers, as words: 16-bit values in registers of their own would
// cost a move each, and a wait for the load that brings them.
template <typename T, int kCount>
struct Pack {
  static constexpr int kBytes = static_cast<int>(kCount * sizeof(T));
  using Access = Word<kBytes>;
  static constexpr int kAccesses = kBytes / static_cast<int>(sizeof(Access));
  static_assert(kAccesses * sizeof(Access) == kBytes);

  alignas(Access) std::uint32_t words[kBytes / 4];
};

// All of the pack; src is aligned to an access.
template <typename T, int kCount>
__device__ __forceinline__ Pack<T, kCount> load_vectors(const T* src) {
  using Access = typename Pack<T, kCount>::Access;
  Pack<T, kCount> pack;
#pragma unroll
  for (int i = 0; i < Pack<T, kCount>::kAccesses; ++i) {
    reinterpret_cast<Access*>(pack.words)[i] = reinterpret_cast<const Access*>(src)[i];
  }
  return pack;
}
template <typename T, int kCount>
__device__ __forceinline__ void store_vectors(T* dst, const Pack<T, kCount>& pack) {
  using Access = typename Pack<T, kCount>::Access;
#pragma unroll
  for (int i = 0; i < Pack<T, kCount>::kAccesses; ++i) {
    const Access word = reinterpret_cast<const Access*>(pack.words)[i];
    if constexpr (std::is_same_v<Access, uint4>) {
      ptx::st_global_16(reinterpret_cast<Access*>(dst) + i, word);
    } else {
      reinterpret_cast<Access*>(dst)[i] = word;
    }
  }
}

// The first `valid` of the pack, which may be none or more than there are; the others are zero, or
// are not stored. kWhole: all or none are valid, and src or dst is aligned to an access, so that no
// code for anything else stands between one load and the next.
template <bool kWhole, typename T, int kCount>
__device__ __forceinline__ Pack<T, kCount> load(const T* src, std::int64_t valid) {
  Pack<T, kCount> pack{};
  if constexpr (kWhole) {
    if (valid > 0) pack = load_vectors<T, kCount>(src);
  } else {
    using Bits = UnsignedOf<T>;
    constexpr int kPerWord = 4 / static_cast<int>(sizeof(T));
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i >= valid) continue;
      const std::uint32_t bits = reinterpret_cast<const Bits*>(src)[i];
      pack.words[i / kPerWord] |= bits << (i % kPerWord * 8 * static_cast<int>(sizeof(T)));
    }
  }
  return pack;
}
template <bool kWhole, typename T, int kCount>
__device__ __forceinline__ void store(T* dst, const Pack<T, kCount>& pack, std::int64_t valid) {
  if constexpr (kWhole) {
    if (valid > 0) store_vectors(dst, pack);
  } else {
    using Bits = UnsignedOf<T>;
    constexpr int kPerWord = 4 / static_cast<int>(sizeof(T));
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i >= valid) continue;
      const std::uint32_t word = pack.words[i / kPerWord];
      reinterpret_cast<Bits*>(dst)[i] =
          static_cast<Bits>(word >> (i % kPerWord * 8 * static_cast<int>(sizeof(T))));
    }
  }
}

// Value i of a pack of f32, bf16 or f16.
template <typename T, int kCount>
__device__ __forceinline__ float to_float(const Pack<T, kCount>& pack, int i) {
  if constexpr (std::is_same_v<T, float>) {
    return __uint_as_float(pack.words[i]);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const std::uint32_t pair = pack.words[i / 2];
    return __uint_as_float(i % 2 == 0 ? pair << 16 : pair & 0xFFFF'0000u);
  } else {
    const __half2 pair = word_as<__half2>(pack.words[i / 2]);
    return i % 2 == 0 ? __low2float(pair) : __high2float(pair);
  }
}

// Rounds to nearest even.
template <typename T, int kCount>
__device__ __forceinline__ Pack<T, kCount> pack_from_float(const float (&x)[kCount]) {
  Pack<T, kCount> pack;
  if constexpr (std::is_same_v<T, float>) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) pack.words[i] = __float_as_uint(x[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
      if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        pack.words[i / 2] = as_word(__floats2bfloat162_rn(x[i], x[i + 1]));
      } else {
        pack.words[i / 2] = as_word(__floats2half2_rn(x[i], x[i + 1]));
      }
    }
  }
  return pack;
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

// body(std::true_type{}) or body(std::false_type{}).
template <typename Body>
Status with_flag(bool flag, Body&& body) {
  return flag ? body(std::true_type{}) : body(std::false_type{});
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

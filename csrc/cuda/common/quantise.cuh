// SPDX-License-Identifier: Apache-2.0
// core/quant_group.h by a team of neighbouring lanes, kLaneValues values each: the same bytes, with
// one reciprocal for a group instead of a division for a value.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/fp8.h"
#include "core/quant_group.h"
#include "cuda/common/vector.cuh"
#include "cuda/ptx/cvt_e4m3.cuh"

namespace dsa::cuda {

inline constexpr int kLaneValues = 16;  // their codes are one 16-byte store

// max |x|; a NaN does not enter it, unless there is nothing else.
template <typename T>
__device__ __forceinline__ float abs_max(const Pack<T, kLaneValues>& x) {
  if constexpr (std::is_same_v<T, float>) {
    float amax = 0.0f;
#pragma unroll
    for (int i = 0; i < kLaneValues; ++i) amax = fmaxf(amax, fabsf(to_float(x, i)));
    return amax;
  } else {
    using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
    const auto magnitudes = [&](int i) { return word_as<Pair>(x.words[i] & 0x7FFF'7FFFu); };
    Pair amax = magnitudes(0);
#pragma unroll
    for (int i = 1; i < kLaneValues / 2; ++i) amax = __hmax2(amax, magnitudes(i));
    return fmaxf(__low2float(amax), __high2float(amax));
  }
}

// amax / 448 for amax >= 1e-4: a product and one refinement round as the division does, as a run
// over all floats has shown. Only infinity needs the division's rule.
__device__ __forceinline__ float divide_by_e4m3_max(float amax) {
  constexpr float kReciprocal = 1.0f / kE4m3Max;
  const float quotient = amax * kReciprocal;
  const float refined = fmaf(fmaf(-quotient, kE4m3Max, amax), kReciprocal, quotient);
  return isinf(amax) ? amax : refined;
}

// The scale of the group that a team of kLanes lanes holds. All lanes of the warp call it.
template <int kLanes, typename T>
__device__ __forceinline__ float group_scale_of_team(const Pack<T, kLaneValues>& x) {
  float amax = fmaxf(abs_max(x), 1e-4f);  // fmaxf passes over a NaN, as group_scale does
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2) {
    amax = fmaxf(amax, __shfl_xor_sync(kAllLanes, amax, mask));
  }
  return divide_by_e4m3_max(amax);
}

// The top bytes of values i to i + 3, the first in the low byte: their signs.
template <typename T>
__device__ __forceinline__ std::uint32_t top_bytes(const Pack<T, kLaneValues>& x, int i) {
  if constexpr (sizeof(T) == 2) {
    return __byte_perm(x.words[i / 2], x.words[i / 2 + 1], 0x7531);
  } else {
    const std::uint32_t low = __byte_perm(x.words[i], x.words[i + 1], 0x0073);
    const std::uint32_t high = __byte_perm(x.words[i + 2], x.words[i + 3], 0x0073);
    return __byte_perm(low, high, 0x5410);
  }
}

// Four e4m3_encode in one word, the first in the low byte; zeros and NaNs may have either sign.
__device__ __forceinline__ std::uint32_t e4m3_encode4(const float* x) {
#if __CUDA_ARCH__ >= 890
  return ptx::e4m3x2_from_float(x[0], x[1]) | ptx::e4m3x2_from_float(x[2], x[3]) << 16;
#else
  std::uint32_t codes = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) codes |= static_cast<std::uint32_t>(e4m3_encode(x[i])) << 8 * i;
  return codes;
#endif
}

// The codes of x / scale, those of a division bit for bit. `reciprocal` is correctly rounded. One
// refinement brings x * reciprocal to less than an ulp off, so that the next rounds correctly
// (Markstein). Of 16-bit values the first already gives the codes: a run over all pairs of a value
// and a maximum has shown it. The residuals are exact for |x| >= 2^-102, and smaller ones give 0
// under any scale that is at least 1e-4 / 448. Zero and NaN may come out of the refinements with
// another sign than they had, so that the signs are taken from x.
template <typename T>
__device__ __forceinline__ Pack<std::uint8_t, kLaneValues> quantise(const Pack<T, kLaneValues>& x,
                                                                    float scale) {
  constexpr float kLargestOfNumbers = 0x1p120f;  // amax / 448 of any group without an infinity
  constexpr int kRefinements = sizeof(T) == 2 ? 1 : 2;
  const float reciprocal = __frcp_rn(scale);
  // By inf, or by 2^127 as ue8m0 rounds it, the product is the quotient.
  const bool refine = scale <= kLargestOfNumbers;
  Pack<std::uint8_t, kLaneValues> codes;
#pragma unroll
  for (int i = 0; i < kLaneValues; i += 4) {
    float quotients[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float value = to_float(x, i + j);
      float quotient = value * reciprocal;
      if (refine) {
#pragma unroll
        for (int k = 0; k < kRefinements; ++k) {
          quotient = fmaf(fmaf(-quotient, scale, value), reciprocal, quotient);
        }
      }
      quotients[j] = quotient;
    }
    codes.words[i / 4] =
        (e4m3_encode4(quotients) & 0x7F7F'7F7Fu) | (top_bytes(x, i) & 0x8080'8080u);
  }
  return codes;
}

// e4m3_decode of four codes, the first in the low byte. A NaN may lose its sign.
__device__ __forceinline__ void e4m3_decode4(std::uint32_t codes, float* x) {
#if __CUDA_ARCH__ >= 890
  const float2 low = ptx::e4m3x2_to_float(static_cast<std::uint16_t>(codes));
  const float2 high = ptx::e4m3x2_to_float(static_cast<std::uint16_t>(codes >> 16));
  x[0] = low.x, x[1] = low.y, x[2] = high.x, x[3] = high.y;
#else
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] = e4m3_decode(static_cast<std::uint8_t>(codes >> 8 * i));
#endif
}

}  // namespace dsa::cuda

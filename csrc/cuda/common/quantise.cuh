// SPDX-License-Identifier: Apache-2.0
// core/quant_group.h by a team of neighbouring lanes, kLaneValues values each: the same bytes, with
// one reciprocal for a group instead of a division for a value.
#pragma once

#include <cstdint>

#include "core/fp8.h"
#include "core/quant_group.h"
#include "cuda/common/vector.cuh"
#include "cuda/ptx/cvt_e4m3.cuh"

namespace dsa::cuda {

inline constexpr int kLaneValues = 16;  // their codes are one 16-byte store

// The scale of the group that a team of kLanes lanes holds. All lanes of the warp call it.
template <int kLanes>
__device__ __forceinline__ float group_scale_of_team(const float (&x)[kLaneValues]) {
  float amax = 0.0f;  // fmaxf passes over a NaN, as group_scale does
#pragma unroll
  for (int i = 0; i < kLaneValues; ++i) amax = fmaxf(amax, fabsf(x[i]));
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2) {
    amax = fmaxf(amax, __shfl_xor_sync(kAllLanes, amax, mask));
  }
  return group_scale(&amax, 1);
}

// Four e4m3_encode in one word, the first in the low byte.
__device__ __forceinline__ std::uint32_t e4m3_encode4(const float* x) {
#if __CUDA_ARCH__ >= 890
  const std::uint32_t codes =
      ptx::e4m3x2_from_float(x[0], x[1]) | ptx::e4m3x2_from_float(x[2], x[3]) << 16;
  // The top bytes of x: a NaN keeps its sign.
  const std::uint32_t low = __byte_perm(float_to_bits(x[0]), float_to_bits(x[1]), 0x0073);
  const std::uint32_t high = __byte_perm(float_to_bits(x[2]), float_to_bits(x[3]), 0x0073);
  const std::uint32_t signs = __byte_perm(low, high, 0x5410);
  return (codes & 0x7F7F'7F7Fu) | (signs & 0x8080'8080u);
#else
  std::uint32_t codes = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) codes |= static_cast<std::uint32_t>(e4m3_encode(x[i])) << 8 * i;
  return codes;
#endif
}

// The codes of x / scale. The quotient is that of a division, bit for bit, wherever a code depends
// on it: `reciprocal` is correctly rounded and one refinement brings x * reciprocal to less than an
// ulp off, so that the next rounds correctly (Markstein). The residuals are exact for |x| >=
// 2^-102, and smaller ones give 0 under any scale that is at least 1e-4 / 448. Only zero and NaN
// may come out of the refinements with another sign than they had.
__device__ __forceinline__ Pack<std::uint8_t, kLaneValues> quantise(const float (&x)[kLaneValues],
                                                                    float scale) {
  constexpr float kLargestOfNumbers = 0x1p120f;  // amax / 448 of any group without an infinity
  const float reciprocal = __frcp_rn(scale);
  float quotients[kLaneValues];
  if (scale <= kLargestOfNumbers) {
#pragma unroll
    for (int i = 0; i < kLaneValues; ++i) {
      float quotient = x[i] * reciprocal;
      quotient = fmaf(fmaf(-quotient, scale, x[i]), reciprocal, quotient);
      quotient = fmaf(fmaf(-quotient, scale, x[i]), reciprocal, quotient);
      quotients[i] = copysignf(quotient, x[i]);
    }
  } else {
    // By inf, or by 2^127 as ue8m0 rounds it: the product is the quotient.
#pragma unroll
    for (int i = 0; i < kLaneValues; ++i) quotients[i] = x[i] * reciprocal;
  }
  Pack<std::uint8_t, kLaneValues> codes;
#pragma unroll
  for (int i = 0; i < kLaneValues; i += 4) {
    reinterpret_cast<std::uint32_t*>(codes.values)[i / 4] = e4m3_encode4(quotients + i);
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

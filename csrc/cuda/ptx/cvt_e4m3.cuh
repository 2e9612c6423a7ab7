// SPDX-License-Identifier: Apache-2.0
// e4m3 <-> wider floats in pairs, SM89. PTX ISA, "Data Movement and Conversion Instructions: cvt".
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

namespace dsa::cuda::ptx {

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 890
// Nearest even, saturating at 448; a NaN becomes 0x7F whatever its sign. `low` is in the low byte.
__device__ __forceinline__ std::uint32_t e4m3x2_from_float(float low, float high) {
  std::uint16_t codes;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(high), "f"(low));
  return codes;
}

// Exact; two f16, that of the low byte low.
__device__ __forceinline__ std::uint32_t f16x2_from_e4m3x2(std::uint16_t codes) {
  std::uint32_t halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(codes));
  return halves;
}

// The same for four, without taking the halves apart.
__device__ __forceinline__ uint2 f16x4_from_e4m3x4(std::uint32_t codes) {
  uint2 halves;
  asm("{\n"
      ".reg .b16 low, high;\n"
      "mov.b32 {low, high}, %2;\n"
      "cvt.rn.f16x2.e4m3x2 %0, low;\n"
      "cvt.rn.f16x2.e4m3x2 %1, high;\n"
      "}"
      : "=r"(halves.x), "=r"(halves.y)
      : "r"(codes));
  return halves;
}

// Exact.
__device__ __forceinline__ float2 e4m3x2_to_float(std::uint16_t codes) {
  const std::uint32_t halves = f16x2_from_e4m3x2(codes);
  __half2_raw raw;
  raw.x = static_cast<unsigned short>(halves);
  raw.y = static_cast<unsigned short>(halves >> 16);
  return __half22float2(__half2(raw));
}
#endif

}  // namespace dsa::cuda::ptx

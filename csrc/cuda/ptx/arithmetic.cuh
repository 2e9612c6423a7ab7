// SPDX-License-Identifier: Apache-2.0
// fp32 instructions that C++ has no words for. PTX ISA, "Floating Point Instructions".
#pragma once

namespace dsa::cuda::ptx {

// 2^x within 2 ulp; subnormal results are 0.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// max(x, 0), a NaN stays one: on the integer pipe, at half the rate of a sum.
__device__ __forceinline__ float relu(float x) {
  float y;
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(y) : "f"(x));
  return y;
}

// x *= y: the compiler would take another register for the product.
__device__ __forceinline__ void multiply_in_place(float& x, float y) {
  asm volatile("mul.f32 %0, %0, %1;" : "+f"(x) : "f"(y));
}

}  // namespace dsa::cuda::ptx

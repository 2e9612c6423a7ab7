// SPDX-License-Identifier: Apache-2.0
// mma.sync: D = A B + D on the tensor cores, fp32 accumulators. PTX ISA, "Warp Level Matrix
// Multiply-Accumulate Instructions: mma".
//
// Fragments of m16n8k16 (lane = 4 * g + t, two 16-bit elements a register):
//   A [16, 16] row-major: a[0] (row g, cols 2t, 2t+1), a[1] (row g + 8), a[2] (cols + 8), a[3] both
//   B [16, 8] col-major:  b[0] (rows 2t, 2t+1, col g), b[1] (rows + 8)
//   D [16, 8]:            d[0], d[1] (row g, cols 2t, 2t+1), d[2], d[3] (row g + 8)
// m16n8k32 of 8-bit elements is the same with four elements a register (k = 4t.., + 16).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace dsa::cuda::ptx {

template <typename T>  // __nv_bfloat16 or __half
__device__ __forceinline__ void mma_16816(float (&d)[4], const std::uint32_t (&a)[4],
                                          std::uint32_t b0, std::uint32_t b1);

template <>
__device__ __forceinline__ void mma_16816<__nv_bfloat16>(float (&d)[4], const std::uint32_t (&a)[4],
                                                         std::uint32_t b0, std::uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void mma_16816<__half>(float (&d)[4], const std::uint32_t (&a)[4],
                                                  std::uint32_t b0, std::uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// e4m3 operands: SM89 and newer. Native on SM89 and SM12x; on SM90 and SM100 the assembler widens
// to f16 and issues two f16 products, so that widening once by hand is better there.
__device__ __forceinline__ void mma_16832_e4m3(float (&d)[4], const std::uint32_t (&a)[4],
                                               std::uint32_t b0, std::uint32_t b1) {
#if __CUDA_ARCH__ >= 890
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  __trap();  // dispatch never comes here: the kernel's supports() asks for SM89
#endif
}

}  // namespace dsa::cuda::ptx

// SPDX-License-Identifier: Apache-2.0
// wgmma (SM90a): products of a warpgroup with operands in shared memory, the first also in
// registers. PTX ISA, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions".
//
// D [64, N]: warp w of the warpgroup has rows 16 w + g and + 8 (lane = 4 g + t); d[4 j + 0, 1] are
// columns 8 j + 2 t, + 1 of row g, d[4 j + 2, 3] the same of row g + 8.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "cuda/ptx/ldst.cuh"

namespace dsa::cuda::ptx {

// Registers change hands between warpgroups; all its warps execute it.
template <int kRegisters>
__device__ __forceinline__ void set_max_registers_up() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void set_max_registers_down() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// After a wait: nothing that reads d may be scheduled before it. No instructions.
template <int kRegisters>
__device__ __forceinline__ void wgmma_result(float (&d)[kRegisters]) {
#pragma unroll
  for (int i = 0; i < kRegisters; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Descriptor of a K-major operand whose rows are kRowBytes (32, 64 or 128) long and back to back,
// swizzled over that length, as a tensor copy with the same swizzle leaves them. Its base is on
// 8 * kRowBytes; adding bytes moves along a row or to other rows.
template <int kRowBytes>
class WgmmaDescriptor {
  static_assert(kRowBytes == 32 || kRowBytes == 64 || kRowBytes == 128);
  static constexpr std::uint64_t kSwizzle = kRowBytes == 128 ? 1 : kRowBytes == 64 ? 2 : 3;
  static constexpr std::uint64_t kEightRows = 8 * kRowBytes / 16;

 public:
  __device__ explicit WgmmaDescriptor(const void* shared)
      : low_((shared_address(shared) & 0x3FFFFu) >> 4 | 1u << 16) {
    asm volatile("" : "+r"(low_));  // not to be found anew in loops
  }

  __device__ WgmmaDescriptor operator+(std::uint32_t bytes) const {
    WgmmaDescriptor moved = *this;
    moved.low_ += bytes / 16;
    return moved;
  }
  __device__ std::uint64_t bits() const { return low_ | kEightRows << 32 | kSwizzle << 62; }

 private:
  std::uint32_t low_;  // the address stays below its 14 bits
};

// d (+)= A B^T of e4m3, A [64, 32], B [64 or 128, 32], both K-major in shared memory.
template <int kRowBytes>
__device__ __forceinline__ void wgmma_e4m3(float (&d)[32], WgmmaDescriptor<kRowBytes> a,
                                           WgmmaDescriptor<kRowBytes> b, bool accumulate) {
  asm volatile(
      "{\n"
      ".reg .pred accumulate;\n"
      "setp.ne.b32 accumulate, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "%32, %33, accumulate, 1, 1;\n"
      "}"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
        "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),
        "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]),
        "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),
        "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
      : "l"(a.bits()), "l"(b.bits()), "r"(static_cast<int>(accumulate)));
}

template <int kRowBytes>
__device__ __forceinline__ void wgmma_e4m3(float (&d)[64], WgmmaDescriptor<kRowBytes> a,
                                           WgmmaDescriptor<kRowBytes> b, bool accumulate) {
  asm volatile(
      "{\n"
      ".reg .pred accumulate;\n"
      "setp.ne.b32 accumulate, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "%64, %65, accumulate, 1, 1;\n"
      "}"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
        "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),
        "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]),
        "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),
        "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]),
        "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]),
        "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]),
        "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),
        "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]),
        "+f"(d[63])
      : "l"(a.bits()), "l"(b.bits()), "r"(static_cast<int>(accumulate)));
}

// d (+)= A B^T of f16 or bf16, A [64, 16] from registers (rows and k as in mma.sync's A: words g k,
// g + 8 k, g k + 8, g + 8 k + 8), B [N, 16] K-major in shared memory. The words are the products'
// until they are waited for.
#define DSA_WGMMA_16_BIT(TYPE, N, D, A0, A1, A2, A3, B, ACCUMULATE, ...)                      \
  asm volatile(                                                                               \
      "{\n"                                                                                   \
      ".reg .pred accumulate;\n"                                                              \
      "setp.ne.b32 accumulate, " ACCUMULATE                                                   \
      ", 0;\n"                                                                                \
      "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" D "}, {" A0 ", " A1 \
      ", " A2 ", " A3 "}, " B                                                                 \
      ", accumulate, 1, 1, 0;\n"                                                              \
      "}"                                                                                     \
      : __VA_ARGS__                                                                           \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.bits()),                            \
        "r"(static_cast<int>(accumulate)))

template <typename Element, int kRowBytes>
__device__ __forceinline__ void wgmma_16_bit(float (&d)[4], const std::uint32_t (&a)[4],
                                             WgmmaDescriptor<kRowBytes> b, bool accumulate) {
  if constexpr (std::is_same_v<Element, __half>) {
    DSA_WGMMA_16_BIT("f16", "8", "%0, %1, %2, %3", "%4", "%5", "%6", "%7", "%8", "%9", "+f"(d[0]),
                     "+f"(d[1]), "+f"(d[2]), "+f"(d[3]));
  } else {
    DSA_WGMMA_16_BIT("bf16", "8", "%0, %1, %2, %3", "%4", "%5", "%6", "%7", "%8", "%9", "+f"(d[0]),
                     "+f"(d[1]), "+f"(d[2]), "+f"(d[3]));
  }
}

template <typename Element>
__device__ __forceinline__ void wgmma_16_bit(float (&d)[8], const std::uint32_t (&a)[4],
                                             WgmmaDescriptor<128> b, bool accumulate) {
  if constexpr (std::is_same_v<Element, __half>) {
    DSA_WGMMA_16_BIT("f16", "16", "%0, %1, %2, %3, %4, %5, %6, %7", "%8", "%9", "%10", "%11", "%12",
                     "%13", "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]),
                     "+f"(d[6]), "+f"(d[7]));
  } else {
    DSA_WGMMA_16_BIT("bf16", "16", "%0, %1, %2, %3, %4, %5, %6, %7", "%8", "%9", "%10", "%11",
                     "%12", "%13", "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]),
                     "+f"(d[5]), "+f"(d[6]), "+f"(d[7]));
  }
}

template <typename Element>
__device__ __forceinline__ void wgmma_16_bit(float (&d)[16], const std::uint32_t (&a)[4],
                                             WgmmaDescriptor<128> b, bool accumulate) {
  if constexpr (std::is_same_v<Element, __half>) {
    DSA_WGMMA_16_BIT(
        "f16", "32", "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15", "%16",
        "%17", "%18", "%19", "%20", "%21", "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]),
        "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]),
        "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]));
  } else {
    DSA_WGMMA_16_BIT(
        "bf16", "32", "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15", "%16",
        "%17", "%18", "%19", "%20", "%21", "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]),
        "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]),
        "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]));
  }
}

template <typename Element>
__device__ __forceinline__ void wgmma_16_bit(float (&d)[32], const std::uint32_t (&a)[4],
                                             WgmmaDescriptor<128> b, bool accumulate) {
  if constexpr (std::is_same_v<Element, __half>) {
    DSA_WGMMA_16_BIT("f16", "64",
                     "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, "
                     "%17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31",
                     "%32", "%33", "%34", "%35", "%36", "%37", "+f"(d[0]), "+f"(d[1]), "+f"(d[2]),
                     "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
                     "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]),
                     "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]),
                     "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]),
                     "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]));
  } else {
    DSA_WGMMA_16_BIT("bf16", "64",
                     "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, "
                     "%17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31",
                     "%32", "%33", "%34", "%35", "%36", "%37", "+f"(d[0]), "+f"(d[1]), "+f"(d[2]),
                     "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
                     "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]),
                     "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]),
                     "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]),
                     "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]));
  }
}

#undef DSA_WGMMA_16_BIT

// Descriptor of an operand of 16-bit elements whose rows are the product's k: rows of 64 elements
// (128 bytes) back to back, swizzled over that length, and `block_bytes` from 64 elements to the
// next 64. Its base is on 1024 bytes; 16 rows on are 2048 bytes on.
class WgmmaRowsDescriptor {
 public:
  __device__ WgmmaRowsDescriptor(const void* shared, std::uint32_t block_bytes)
      : low_((shared_address(shared) & 0x3FFFFu) >> 4 | block_bytes / 16 << 16) {
    asm volatile("" : "+r"(low_));  // not to be found anew in loops
  }

  __device__ WgmmaRowsDescriptor operator+(std::uint32_t bytes) const {
    WgmmaRowsDescriptor moved = *this;
    moved.low_ += bytes / 16;
    return moved;
  }
  __device__ std::uint64_t bits() const {
    return low_ | std::uint64_t{1024 / 16} << 32 | std::uint64_t{1} << 62;
  }

 private:
  std::uint32_t low_;
};

// d (+)= A B^T of f16 or bf16, A [64, 16], B [64, 16], both K-major in shared memory.
#define DSA_WGMMA_64_64(TYPE)                                                                      \
  asm volatile(                                                                                    \
      "{\n"                                                                                        \
      ".reg .pred accumulate;\n"                                                                   \
      "setp.ne.b32 accumulate, %34, 0;\n"                                                          \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE                                  \
      " {"                                                                                         \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                     \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"             \
      "}, %32, %33, accumulate, 1, 1, 0, 0;\n"                                                     \
      "}"                                                                                          \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),        \
        "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),    \
        "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), \
        "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), \
        "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])                                         \
      : "l"(a.bits()), "l"(b.bits()), "r"(static_cast<int>(accumulate)))

template <typename Element>
__device__ __forceinline__ void wgmma_16_bit(float (&d)[32], WgmmaDescriptor<128> a,
                                             WgmmaDescriptor<128> b, bool accumulate) {
  if constexpr (std::is_same_v<Element, __half>) {
    DSA_WGMMA_64_64("f16");
  } else {
    DSA_WGMMA_64_64("bf16");
  }
}

#undef DSA_WGMMA_64_64

// d (+)= A B^T of f16 or bf16, B [N, 16] K-major in shared memory: 8, 16 or 32 columns. A [64, 16]
// K-major there too, or [16, 64] by rows.
#define DSA_WGMMA_SHARED(TYPE, N, D, A, B, ACCUMULATE, TRANSPOSED, ...)                    \
  asm volatile(                                                                            \
      "{\n"                                                                                \
      ".reg .pred accumulate;\n"                                                           \
      "setp.ne.b32 accumulate, " ACCUMULATE                                                \
      ", 0;\n"                                                                             \
      "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" D "}, " A ", " B \
      ", accumulate, 1, 1, " TRANSPOSED                                                    \
      ", 0;\n"                                                                             \
      "}"                                                                                  \
      : __VA_ARGS__                                                                        \
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(static_cast<int>(kTransposed)))

template <typename Element, bool kTransposed>
__device__ __forceinline__ void wgmma_shared(float (&d)[4], std::uint64_t a, std::uint64_t b,
                                             bool accumulate) {
  if constexpr (std::is_same_v<Element, __half>) {
    DSA_WGMMA_SHARED("f16", "8", "%0, %1, %2, %3", "%4", "%5", "%6", "%7", "+f"(d[0]), "+f"(d[1]),
                     "+f"(d[2]), "+f"(d[3]));
  } else {
    DSA_WGMMA_SHARED("bf16", "8", "%0, %1, %2, %3", "%4", "%5", "%6", "%7", "+f"(d[0]), "+f"(d[1]),
                     "+f"(d[2]), "+f"(d[3]));
  }
}

template <typename Element, bool kTransposed>
__device__ __forceinline__ void wgmma_shared(float (&d)[8], std::uint64_t a, std::uint64_t b,
                                             bool accumulate) {
  if constexpr (std::is_same_v<Element, __half>) {
    DSA_WGMMA_SHARED("f16", "16", "%0, %1, %2, %3, %4, %5, %6, %7", "%8", "%9", "%10", "%11",
                     "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]),
                     "+f"(d[6]), "+f"(d[7]));
  } else {
    DSA_WGMMA_SHARED("bf16", "16", "%0, %1, %2, %3, %4, %5, %6, %7", "%8", "%9", "%10", "%11",
                     "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]),
                     "+f"(d[6]), "+f"(d[7]));
  }
}

template <typename Element, bool kTransposed>
__device__ __forceinline__ void wgmma_shared(float (&d)[16], std::uint64_t a, std::uint64_t b,
                                             bool accumulate) {
  if constexpr (std::is_same_v<Element, __half>) {
    DSA_WGMMA_SHARED("f16", "32",
                     "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15", "%16",
                     "%17", "%18", "%19", "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]),
                     "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]),
                     "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]));
  } else {
    DSA_WGMMA_SHARED("bf16", "32",
                     "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15", "%16",
                     "%17", "%18", "%19", "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]),
                     "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]),
                     "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]));
  }
}

#undef DSA_WGMMA_SHARED

template <typename Element, int kRegisters>
__device__ __forceinline__ void wgmma_few(float (&d)[kRegisters], WgmmaDescriptor<128> a,
                                          WgmmaDescriptor<128> b, bool accumulate) {
  wgmma_shared<Element, false>(d, a.bits(), b.bits(), accumulate);
}
template <typename Element, int kRegisters>
__device__ __forceinline__ void wgmma_few(float (&d)[kRegisters], WgmmaRowsDescriptor a,
                                          WgmmaDescriptor<128> b, bool accumulate) {
  wgmma_shared<Element, true>(d, a.bits(), b.bits(), accumulate);
}

// d += A B of f16 or bf16, B [16, 128] by rows in shared memory; A [64, 16] K-major in shared
// memory, or from registers as above.
#define DSA_WGMMA_64_128(TYPE, A, B, ...)                                                          \
  asm volatile(                                                                                    \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE                                 \
      " {"                                                                                         \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "      \
      "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "      \
      "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, "      \
      "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"                                      \
      "}, " A ", " B ";"                                                                           \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),        \
        "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),    \
        "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), \
        "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), \
        "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), \
        "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), \
        "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), \
        "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), \
        "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), \
        "+f"(d[63])                                                                                \
      : __VA_ARGS__)

template <typename Element>
__device__ __forceinline__ void wgmma_rows(float (&d)[64], WgmmaDescriptor<128> a,
                                           WgmmaRowsDescriptor b) {
  if constexpr (std::is_same_v<Element, __half>) {
    DSA_WGMMA_64_128("f16", "%64", "%65, 1, 1, 1, 0, 1", "l"(a.bits()), "l"(b.bits()));
  } else {
    DSA_WGMMA_64_128("bf16", "%64", "%65, 1, 1, 1, 0, 1", "l"(a.bits()), "l"(b.bits()));
  }
}

template <typename Element>
__device__ __forceinline__ void wgmma_rows(float (&d)[64], const std::uint32_t (&a)[4],
                                           WgmmaRowsDescriptor b) {
  if constexpr (std::is_same_v<Element, __half>) {
    DSA_WGMMA_64_128("f16", "{%64, %65, %66, %67}", "%68, 1, 1, 1, 1", "r"(a[0]), "r"(a[1]),
                     "r"(a[2]), "r"(a[3]), "l"(b.bits()));
  } else {
    DSA_WGMMA_64_128("bf16", "{%64, %65, %66, %67}", "%68, 1, 1, 1, 1", "r"(a[0]), "r"(a[1]),
                     "r"(a[2]), "r"(a[3]), "l"(b.bits()));
  }
}

#undef DSA_WGMMA_64_128

}  // namespace dsa::cuda::ptx

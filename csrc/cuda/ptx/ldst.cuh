// SPDX-License-Identifier: Apache-2.0
// Shared-memory addresses and ldmatrix (SM75). PTX ISA, "Warp Level Matrix Multiply-Accumulate
// Instructions: ldmatrix".
#pragma once

#include <cstdint>

namespace dsa::cuda::ptx {

__device__ __forceinline__ std::uint32_t shared_address(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

// The address as a value to the compiler. From the start of a CTA's shared memory it would find
// every address anew, in loops too.
__device__ __forceinline__ std::uint32_t pinned_shared_address(const void* pointer) {
  std::uint32_t address = shared_address(pointer);
  asm volatile("" : "+r"(address));
  return address;
}

// The same place, at such an address.
template <typename T>
__device__ __forceinline__ T& pinned_in_shared(void* pointer) {
  return *static_cast<T*>(__cvta_shared_to_generic(pinned_shared_address(pointer)));
}

// Four 8 x 8 matrices of 16-bit elements: lanes 8i..8i+7 give the addresses of matrix i's rows (16
// bytes each, 16-byte aligned); r[i] of lane l holds elements 2*(l%4), 2*(l%4)+1 of row l/4.
__device__ __forceinline__ void ldmatrix_x4(std::uint32_t (&r)[4], std::uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// The same with each matrix transposed: r[i] holds rows 2*(l%4), 2*(l%4)+1 of column l/4.
__device__ __forceinline__ void ldmatrix_x4_trans(std::uint32_t (&r)[4], std::uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// The reverse of ldmatrix_x4 (SM90).
__device__ __forceinline__ void stmatrix_x4(std::uint32_t address, const std::uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

// The reverse of ldmatrix_x4_trans (SM90): matrix i, whose elements are in word i, is stored
// transposed.
__device__ __forceinline__ void stmatrix_x4_trans(std::uint32_t address, std::uint32_t r0,
                                                  std::uint32_t r1, std::uint32_t r2,
                                                  std::uint32_t r3) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
      "r"(r0), "r"(r1), "r"(r2), "r"(r3)
      : "memory");
}
// Two matrices, of lanes 0 to 15.
__device__ __forceinline__ void stmatrix_x2_trans(std::uint32_t address, std::uint32_t r0,
                                                  std::uint32_t r1) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(address),
               "r"(r0), "r"(r1)
               : "memory");
}

// Orders this thread's accesses to shared memory before those of the copy engine and of wgmma that
// a barrier lets follow (SM90).
__device__ __forceinline__ void fence_async_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// If `bit` is not 0, stores two words to shared memory and moves the address on past them. Without
// a branch, and in place.
__device__ __forceinline__ void append_if(std::uint32_t bit, std::uint32_t& address,
                                          std::uint32_t x, std::uint32_t y) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.u32 p, %1, 0;\n"
      "@p st.shared.u32 [%0], %2;\n"
      "@p st.shared.u32 [%0 + 4], %3;\n"
      "@p add.u32 %0, %0, 8;\n"
      "}"
      : "+r"(address)
      : "r"(bit), "r"(x), "r"(y)
      : "memory");
}

__device__ __forceinline__ void prefetch_l2(const void* global) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(global)));
}

}  // namespace dsa::cuda::ptx

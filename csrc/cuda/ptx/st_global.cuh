// SPDX-License-Identifier: Apache-2.0
// st.global. PTX ISA, "Data Movement and Conversion Instructions: st".
#pragma once

#include <cstdint>

namespace dsa::cuda::ptx {

// 16 bytes in one store, 16-byte aligned: the compiler may take an assignment of a uint4 apart, and
// store its parts one by one.
__device__ __forceinline__ void st_global_16(uint4* global, uint4 x) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(global)),
               "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
               : "memory");
}

}  // namespace dsa::cuda::ptx

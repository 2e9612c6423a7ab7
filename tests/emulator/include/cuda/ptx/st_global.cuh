// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace dsa::cuda::ptx {

inline void st_global_16(uint4* global, uint4 x) { *global = x; }

}  // namespace dsa::cuda::ptx

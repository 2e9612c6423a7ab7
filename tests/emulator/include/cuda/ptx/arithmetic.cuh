// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace dsa::cuda::ptx {

inline float exp2_approx(float x) { return std::exp2(x); }
inline float relu(float x) { return x < 0.0f ? 0.0f : x; }
inline void multiply_in_place(float& x, float y) { x *= y; }

}  // namespace dsa::cuda::ptx

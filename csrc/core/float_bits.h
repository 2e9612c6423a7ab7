// SPDX-License-Identifier: Apache-2.0
// fp32 <-> its bits, host and device.
#pragma once

#include <cstdint>

#include "dsa/host_device.h"

namespace dsa {

// The builtin rather than std::bit_cast, which device code may not call.
DSA_HOST_DEVICE constexpr std::uint32_t float_to_bits(float x) {
  return __builtin_bit_cast(std::uint32_t, x);
}
DSA_HOST_DEVICE constexpr float float_from_bits(std::uint32_t bits) {
  return __builtin_bit_cast(float, bits);
}

inline constexpr std::uint32_t kF32SignBit = 0x8000'0000u;
inline constexpr std::uint32_t kF32AbsMask = 0x7FFF'FFFFu;
inline constexpr std::uint32_t kF32InfBits = 0x7F80'0000u;

// min(x, bound) for x, bound >= 0. In arithmetic, since compilers turn a comparison with a
// constant into a branch around all that depends on it, and then do not vectorise the loop.
DSA_HOST_DEVICE constexpr std::int32_t branchless_min(std::int32_t x, std::int32_t bound) {
  const std::int32_t excess = x - bound;
  return x - (excess & ~(excess >> 31));
}

}  // namespace dsa

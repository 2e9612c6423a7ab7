// SPDX-License-Identifier: Apache-2.0
// fp32 -> uint32 that sorts as selection ranks scores: NaN (all of them alike) < -inf < ... < -0.0
// = +0.0 < ... < +inf. Host and device.
#pragma once

#include <cstdint>

#include "core/float_bits.h"

namespace dsa {

DSA_HOST_DEVICE constexpr std::uint32_t ordered_key(float score) {
  const std::uint32_t bits = float_to_bits(score);
  // Negative values: flip all bits, since a larger magnitude is lower. Others: set the top bit.
  // Without a branch, which the signs of scores would make unpredictable.
  const std::uint32_t all_if_negative = 0u - (bits >> 31);
  const std::uint32_t key = bits ^ (all_if_negative | kF32SignBit);
  const std::uint32_t zero_merged = key + (bits == kF32SignBit ? 1u : 0u);
  return (bits & kF32AbsMask) > kF32InfBits ? 0u : zero_merged;
}

}  // namespace dsa

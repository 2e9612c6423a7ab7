// SPDX-License-Identifier: Apache-2.0
// fp32 -> uint32 that sorts as selection ranks scores: NaN (all of them alike) < -inf < ... < -0.0
// = +0.0 < ... < +inf. Host and device.
#pragma once

#include <cstdint>

#include "core/float_bits.h"

namespace dsa {

// Of the bits of a score that is not NaN, nor -0.0.
DSA_HOST_DEVICE constexpr std::uint32_t ordered_key_of_bits(std::uint32_t bits) {
  // Negative values: flip all bits, since a larger magnitude is lower. Others: set the top bit.
  // Without a branch, which the signs of scores would make unpredictable.
  const std::uint32_t all_if_negative = 0u - (bits >> 31);
  return bits ^ (all_if_negative | kF32SignBit);
}

DSA_HOST_DEVICE constexpr std::uint32_t ordered_key(float score) {
  const std::uint32_t bits = float_to_bits(score + 0.0f);  // -0.0 becomes +0.0
  const std::uint32_t key = ordered_key_of_bits(bits);
  return (bits & kF32AbsMask) > kF32InfBits ? 0u : key;
}

// Of a key other than NaN's. Keys between two scores' give scores between them, or NaN past +inf.
DSA_HOST_DEVICE constexpr float float_of_ordered_key(std::uint32_t key) {
  return float_from_bits(key >= kF32SignBit ? key ^ kF32SignBit : ~key);
}

}  // namespace dsa

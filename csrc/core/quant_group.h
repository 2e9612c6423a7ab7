// SPDX-License-Identifier: Apache-2.0
// Quantises one group of values to e4m3 under one scale, as every op of this library that writes
// FP8 does. Host and device.
#pragma once

#include <cstdint>

#include "core/fp8.h"

namespace dsa {

// max(max |x|, 1e-4) / 448. A NaN in x does not enter it (the maximum is IEEE maxNum, as a GPU's):
// it stays NaN and leaves the rest of its group alone.
DSA_HOST_DEVICE inline float group_scale(const float* x, std::int64_t n) {
  // Among the bits of non-negative floats the integer order is the float order.
  auto amax = static_cast<std::int32_t>(float_to_bits(1e-4f));
  for (std::int64_t i = 0; i < n; ++i) {
    const auto abs = static_cast<std::int32_t>(float_to_bits(x[i]) & kF32AbsMask);
    const std::int32_t all_if_nan = (static_cast<std::int32_t>(kF32InfBits) - abs) >> 31;
    const std::int32_t number = abs & ~all_if_nan;
    amax = number > amax ? number : amax;
  }
  return float_from_bits(static_cast<std::uint32_t>(amax)) / kE4m3Max;
}

DSA_HOST_DEVICE inline void quantise_with_scale(const float* x, std::int64_t n, float scale,
                                                std::uint8_t* codes) {
  for (std::int64_t i = 0; i < n; ++i) codes[i] = e4m3_encode(x[i] / scale);
}

// Returns the scale.
DSA_HOST_DEVICE inline float quantise_group(const float* x, std::int64_t n, std::uint8_t* codes) {
  const float scale = group_scale(x, n);
  quantise_with_scale(x, n, scale, codes);
  return scale;
}

// The same with the scale rounded up to a power of two; returns its ue8m0 byte.
DSA_HOST_DEVICE inline std::uint8_t quantise_group_ue8m0(const float* x, std::int64_t n,
                                                         std::uint8_t* codes) {
  const std::uint8_t scale = ue8m0_encode(group_scale(x, n));
  quantise_with_scale(x, n, ue8m0_decode(scale), codes);
  return scale;
}

}  // namespace dsa

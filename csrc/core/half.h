// SPDX-License-Identifier: Apache-2.0
// bf16 and f16 <-> fp32 on their bits, round to nearest even, host and device.
#pragma once

#include <cstdint>

#include "core/float_bits.h"

namespace dsa {

DSA_HOST_DEVICE constexpr float bf16_to_float(std::uint16_t code) {
  return float_from_bits(static_cast<std::uint32_t>(code) << 16);
}

// Overflow rounds to inf; a NaN becomes quiet, with its sign and the payload that fits.
DSA_HOST_DEVICE constexpr std::uint16_t bf16_from_float(float x) {
  const std::uint32_t bits = float_to_bits(x);
  const std::uint32_t nearest_even = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const std::uint32_t quiet_nan = bits >> 16 | 0x0040u;
  return static_cast<std::uint16_t>((bits & kF32AbsMask) > kF32InfBits ? quiet_nan : nearest_even);
}

// The leading one of a subnormal is not stored: it is added as 2^-14, and taken off again. Its
// flags are numbers, not conditions, so that loops vectorise.
DSA_HOST_DEVICE constexpr float f16_to_float(std::uint16_t code) {
  constexpr std::uint32_t kRebias = (127u - 15u) << 23;
  const std::uint32_t abs = code & 0x7FFFu;
  const std::uint32_t is_subnormal = (abs - 0x0400u) >> 31;
  const std::uint32_t is_inf_or_nan = (abs + 0x0400u) >> 15;
  const std::uint32_t bits = (abs << 13) + kRebias + (is_subnormal << 23) + is_inf_or_nan * kRebias;
  const std::uint32_t leading_one = (0u - is_subnormal) & float_to_bits(0x1p-14f);
  const float magnitude = float_from_bits(bits) - float_from_bits(leading_one);
  return float_from_bits((code & 0x8000u) << 16 | float_to_bits(magnitude));
}

// Overflow rounds to inf; a NaN becomes quiet, with its sign and the payload that fits. Rounds in
// the adder, as e4m3_encode does.
DSA_HOST_DEVICE constexpr std::uint16_t f16_from_float(float x) {
  constexpr auto kInf = static_cast<std::int32_t>(float_to_bits(65536.0f));  // as inf is encoded
  constexpr auto kMinNormal = static_cast<std::int32_t>(float_to_bits(0x1p-14f));
  constexpr std::int32_t kUlpExponent = (23 - 10) << 23;  // from the power of two down to its ulp

  const std::uint32_t bits = float_to_bits(x);
  const auto abs = static_cast<std::int32_t>(bits & kF32AbsMask);
  const std::int32_t bounded = branchless_min(abs, kInf);
  const auto power = static_cast<std::int32_t>(bounded & kF32InfBits);
  const std::int32_t exponent = power > kMinNormal ? power : kMinNormal;
  const std::int32_t rounder = exponent + kUlpExponent;
  const float sum = float_from_bits(static_cast<std::uint32_t>(bounded)) +
                    float_from_bits(static_cast<std::uint32_t>(rounder));
  const std::int32_t steps = static_cast<std::int32_t>(float_to_bits(sum)) - rounder;
  const std::int32_t code = ((exponent - kMinNormal) >> 13) + steps;
  const std::int32_t is_nan = static_cast<std::int32_t>((kF32InfBits - (bits & kF32AbsMask)) >> 31);
  const std::int32_t nan_payload = -is_nan & (0x200 | (abs >> 13 & 0x3FF));  // on top of inf
  return static_cast<std::uint16_t>((bits >> 16 & 0x8000u) |
                                    static_cast<std::uint32_t>(code | nan_payload));
}

}  // namespace dsa

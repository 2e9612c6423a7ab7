// SPDX-License-Identifier: Apache-2.0
// The 8-bit formats of the caches, host and device.
//   e4m3 (torch.float8_e4m3fn): 1 sign, 4 exponent (bias 7), 3 mantissa bits; no inf, 0x7F and
//     0xFF are NaN; largest 448, smallest normal 2^-6, smallest subnormal 2^-9.
//   ue8m0: an unsigned power of two, 2^(byte - 127); 255 is NaN.
#pragma once

#include <array>
#include <cstdint>

#include "core/float_bits.h"

namespace dsa {

inline constexpr float kE4m3Max = 448.0f;

// Rounds to nearest even; what is beyond 448, inf too, saturates. The adder rounds: it adds a
// power of two whose ulp is the step of e4m3 about x, and what then stands above that power is x
// in steps. Free of branches, so that loops vectorise.
DSA_HOST_DEVICE constexpr std::uint8_t e4m3_encode(float x) {
  constexpr auto kMax = static_cast<std::int32_t>(float_to_bits(kE4m3Max));
  constexpr auto kMinNormal = static_cast<std::int32_t>(float_to_bits(0x1p-6f));
  constexpr std::int32_t kUlpExponent = (23 - 3) << 23;  // from the power of two down to its ulp

  const std::uint32_t bits = float_to_bits(x);
  const auto abs = static_cast<std::int32_t>(bits & kF32AbsMask);
  const std::int32_t finite = branchless_min(abs, kMax);
  const auto power = static_cast<std::int32_t>(finite & kF32InfBits);
  const std::int32_t exponent = power > kMinNormal ? power : kMinNormal;
  const std::int32_t rounder = exponent + kUlpExponent;
  const float sum = float_from_bits(static_cast<std::uint32_t>(finite)) +
                    float_from_bits(static_cast<std::uint32_t>(rounder));
  const std::int32_t steps = static_cast<std::int32_t>(float_to_bits(sum)) - rounder;
  const std::int32_t code = ((exponent - kMinNormal) >> 20) + steps;
  const std::uint32_t is_nan = (kF32InfBits - (bits & kF32AbsMask)) >> 31;  // turns 0x7E into 0x7F
  return static_cast<std::uint8_t>((bits >> 24 & 0x80u) |
                                   (static_cast<std::uint32_t>(code) + is_nan));
}

DSA_HOST_DEVICE constexpr float e4m3_decode(std::uint8_t code) {
  const std::uint32_t sign = (code & 0x80u) << 24;
  const std::uint32_t exponent = code >> 3 & 0xFu;
  const std::uint32_t mantissa = code & 0x7u;
  if ((code & 0x7Fu) == 0x7Fu) return float_from_bits(sign | 0x7FC0'0000u);
  if (exponent == 0) {
    return float_from_bits(sign | float_to_bits(static_cast<float>(mantissa) * 0x1p-9f));
  }
  return float_from_bits(sign | (exponent + 120u) << 23 | mantissa << 20);
}

// e4m3_decode of every code, for host loops.
inline constexpr std::array<float, 256> kE4m3Values = [] {
  std::array<float, 256> values{};
  for (std::size_t code = 0; code < values.size(); ++code) {
    values[code] = e4m3_decode(static_cast<std::uint8_t>(code));
  }
  return values;
}();

// The exponent byte of the power of two at or above `scale` (> 0), clamped to 1..254; NaN gives
// 255.
DSA_HOST_DEVICE constexpr std::uint8_t ue8m0_encode(float scale) {
  const std::uint32_t bits = float_to_bits(scale) & kF32AbsMask;
  if (bits > kF32InfBits) return 255;
  const std::uint32_t exponent = (bits >> 23) + ((bits & 0x7F'FFFFu) != 0 ? 1u : 0u);
  return static_cast<std::uint8_t>(exponent < 1u ? 1u : (exponent > 254u ? 254u : exponent));
}

DSA_HOST_DEVICE constexpr float ue8m0_decode(std::uint8_t byte) {
  constexpr std::uint32_t kTwoToMinus127 = 0x0040'0000u;  // an fp32 subnormal
  if (byte == 0) return float_from_bits(kTwoToMinus127);
  if (byte == 255) return float_from_bits(0x7FC0'0000u);
  return float_from_bits(static_cast<std::uint32_t>(byte) << 23);
}

}  // namespace dsa

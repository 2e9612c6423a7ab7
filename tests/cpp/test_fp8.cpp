// SPDX-License-Identifier: Apache-2.0
#include "core/fp8.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

namespace dsa {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

static_assert(e4m3_encode(1.0f) == 0x38 && e4m3_decode(0x38) == 1.0f);
static_assert(e4m3_encode(448.0f) == 0x7E && e4m3_encode(-448.0f) == 0xFE);
static_assert(ue8m0_encode(1.0f) == 127 && ue8m0_decode(127) == 1.0f);

// The format's definition, in double.
double e4m3_value(int code) {
  const int exponent = code >> 3 & 15;
  const int mantissa = code & 7;
  const double magnitude =
      exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
  return code & 0x80 ? -magnitude : magnitude;
}

// The nearest non-negative code by definition; of two, the even one.
int nearest_code(double magnitude) {
  int below = 0;
  while (below < 0x7E && e4m3_value(below + 1) <= magnitude) ++below;
  if (below == 0x7E) return below;  // saturates
  const double to_below = magnitude - e4m3_value(below);
  const double to_above = e4m3_value(below + 1) - magnitude;
  if (to_below != to_above) return to_below < to_above ? below : below + 1;
  return below % 2 == 0 ? below : below + 1;
}

void expect_nearest(float magnitude) {
  const int expected = nearest_code(magnitude);
  ASSERT_EQ(e4m3_encode(magnitude), expected) << magnitude;
  ASSERT_EQ(e4m3_encode(-magnitude), expected | 0x80) << -magnitude;
}

TEST(E4m3, DecodesEveryCode) {
  for (int code = 0; code < 256; ++code) {
    const float value = e4m3_decode(static_cast<std::uint8_t>(code));
    if ((code & 0x7F) == 0x7F) {
      EXPECT_TRUE(std::isnan(value)) << code;
      EXPECT_TRUE(std::isnan(kE4m3Values[static_cast<std::size_t>(code)])) << code;
    } else {
      EXPECT_EQ(value, e4m3_value(code)) << code;
      EXPECT_EQ(kE4m3Values[static_cast<std::size_t>(code)], value) << code;
    }
    EXPECT_EQ(std::signbit(value), code >= 128) << code;
  }
}

TEST(E4m3, EncodesEveryCodeToItself) {
  for (int code = 0; code < 256; ++code) {
    EXPECT_EQ(e4m3_encode(e4m3_decode(static_cast<std::uint8_t>(code))), code);
  }
}

TEST(E4m3, RoundsTiesToEvenAndTheirNeighboursToNearest) {
  for (int code = 0; code < 0x7E; ++code) {
    const auto tie = static_cast<float>((e4m3_value(code) + e4m3_value(code + 1)) / 2);
    expect_nearest(tie);
    expect_nearest(std::nextafter(tie, 0.0f));
    expect_nearest(std::nextafter(tie, kInf));
  }
}

TEST(E4m3, RoundsToNearestAllOverTheFp32Range) {
  // Every sign, exponent and high mantissa, with the low bits where rounding decides.
  for (std::uint32_t high = 0; high < 0x7F80; ++high) {
    for (const std::uint32_t low : {0x0000u, 0x0001u, 0x7FFFu, 0x8000u, 0xFFFFu}) {
      expect_nearest(std::bit_cast<float>(high << 16 | low));
    }
  }
}

TEST(E4m3, SaturatesAndKeepsNan) {
  for (const float x : {448.0f, 449.0f, 464.0f, 480.0f, 1e30f, kInf}) {
    EXPECT_EQ(e4m3_encode(x), 0x7E) << x;
    EXPECT_EQ(e4m3_encode(-x), 0xFE) << -x;
  }
  EXPECT_EQ(e4m3_encode(kNan), 0x7F);
  EXPECT_EQ(e4m3_encode(-kNan), 0xFF);
  EXPECT_EQ(e4m3_encode(std::bit_cast<float>(0x7F800001u)), 0x7F);  // signalling
  EXPECT_EQ(e4m3_encode(0.0f), 0x00);
  EXPECT_EQ(e4m3_encode(-0.0f), 0x80);
}

TEST(Ue8m0, DecodesEveryByte) {
  for (int byte = 0; byte < 255; ++byte) {
    EXPECT_EQ(ue8m0_decode(static_cast<std::uint8_t>(byte)), std::ldexp(1.0f, byte - 127)) << byte;
  }
  EXPECT_TRUE(std::isnan(ue8m0_decode(255)));
}

TEST(Ue8m0, RoundsUpToAPowerOfTwo) {
  for (int byte = 1; byte < 254; ++byte) {
    const float power = std::ldexp(1.0f, byte - 127);
    EXPECT_EQ(ue8m0_encode(power), byte);
    EXPECT_EQ(ue8m0_encode(std::nextafter(power, kInf)), byte + 1);
    EXPECT_EQ(ue8m0_encode(power * 1.5f), byte + 1);
    EXPECT_EQ(ue8m0_encode(std::nextafter(2 * power, 0.0f)), byte + 1);
  }
}

TEST(Ue8m0, ClampsToFinitePowersAndKeepsNan) {
  EXPECT_EQ(ue8m0_encode(0.0f), 1);
  EXPECT_EQ(ue8m0_encode(std::numeric_limits<float>::denorm_min()), 1);
  EXPECT_EQ(ue8m0_encode(std::ldexp(1.0f, 127)), 254);
  EXPECT_EQ(ue8m0_encode(std::numeric_limits<float>::max()), 254);
  EXPECT_EQ(ue8m0_encode(kInf), 254);
  EXPECT_EQ(ue8m0_encode(kNan), 255);
}

}  // namespace
}  // namespace dsa

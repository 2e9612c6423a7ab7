// SPDX-License-Identifier: Apache-2.0
#include "core/half.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

namespace dsa {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

static_assert(bf16_from_float(1.0f) == 0x3F80 && bf16_to_float(0x3F80) == 1.0f);
static_assert(f16_from_float(1.0f) == 0x3C00 && f16_to_float(0x3C00) == 1.0f);

std::uint16_t code_of(int code) { return static_cast<std::uint16_t>(code); }

// The formats by definition, in double; inf and NaN apart.
double f16_value(int code) {
  const int exponent = code >> 10 & 31;
  const int mantissa = code & 0x3FF;
  const double magnitude =
      exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
  return code & 0x8000 ? -magnitude : magnitude;
}
double bf16_value(int code) {
  const int exponent = code >> 7 & 255;
  const int mantissa = code & 0x7F;
  const double magnitude =
      exponent == 0 ? std::ldexp(mantissa, -133) : std::ldexp(128 + mantissa, exponent - 134);
  return code & 0x8000 ? -magnitude : magnitude;
}

struct Format {
  std::uint16_t (*encode)(float);
  float (*decode)(std::uint16_t);
  double (*value)(int);
  int inf;
};
constexpr Format kF16{f16_from_float, f16_to_float, f16_value, 0x7C00};
constexpr Format kBf16{bf16_from_float, bf16_to_float, bf16_value, 0x7F80};

void expect_every_code_survives(const Format& format) {
  for (int code = 0; code < 65536; ++code) {
    const float value = format.decode(code_of(code));
    const int magnitude = code & 0x7FFF;
    ASSERT_EQ(std::signbit(value), code >= 0x8000) << code;
    if (magnitude > format.inf) {
      ASSERT_TRUE(std::isnan(value)) << code;
      const int again = format.encode(value);
      ASSERT_GT(again & 0x7FFF, format.inf) << code;
      ASSERT_EQ(again & 0x8000, code & 0x8000) << code;
    } else {
      if (magnitude == format.inf) {
        ASSERT_TRUE(std::isinf(value)) << code;
      } else {
        ASSERT_EQ(value, format.value(code)) << code;
      }
      ASSERT_EQ(format.encode(value), code);
    }
  }
}

// Between neighbours: below the middle, the middle itself (to even) and above it. The last
// neighbour of the largest finite value is where the next one would stand, which rounds to inf.
void expect_nearest_even(const Format& format) {
  for (int code = 0; code < format.inf; ++code) {
    const double above = code + 1 == format.inf ? 2 * format.value(code) - format.value(code - 1)
                                                : format.value(code + 1);
    const auto middle = static_cast<float>((format.value(code) + above) / 2);
    const int even = code % 2 == 0 ? code : code + 1;
    ASSERT_EQ(format.encode(std::nextafter(middle, 0.0f)), code);
    ASSERT_EQ(format.encode(middle), even) << code;
    ASSERT_EQ(format.encode(std::nextafter(middle, kInf)), code + 1);
    ASSERT_EQ(format.encode(-middle), even | 0x8000) << code;
  }
}

TEST(F16, EveryCodeSurvives) { expect_every_code_survives(kF16); }
TEST(F16, RoundsToNearestEven) { expect_nearest_even(kF16); }
TEST(Bf16, EveryCodeSurvives) { expect_every_code_survives(kBf16); }
TEST(Bf16, RoundsToNearestEven) { expect_nearest_even(kBf16); }

TEST(F16, OverflowsToInf) {
  EXPECT_EQ(f16_from_float(65504.0f), 0x7BFF);
  EXPECT_EQ(f16_from_float(std::nextafter(65520.0f, 0.0f)), 0x7BFF);
  EXPECT_EQ(f16_from_float(65520.0f), 0x7C00);
  EXPECT_EQ(f16_from_float(-1e30f), 0xFC00);
  EXPECT_EQ(f16_from_float(kInf), 0x7C00);
}

TEST(F16, SmallValuesRoundToZeroOrTheLeastSubnormal) {
  EXPECT_EQ(f16_from_float(0x1p-25f), 0x0000);  // a tie
  EXPECT_EQ(f16_from_float(std::nextafter(0x1p-25f, 1.0f)), 0x0001);
  EXPECT_EQ(f16_from_float(-std::numeric_limits<float>::denorm_min()), 0x8000);
}

TEST(Half, NanStaysNanWhateverItsPayload) {
  for (const std::uint32_t bits : {0x7F800001u, 0x7FC00000u, 0x7FFFFFFFu, 0x7F80FFFFu}) {
    for (const std::uint32_t sign : {0u, 0x80000000u}) {
      const float nan = std::bit_cast<float>(bits | sign);
      EXPECT_TRUE(std::isnan(bf16_to_float(bf16_from_float(nan)))) << bits;
      EXPECT_TRUE(std::isnan(f16_to_float(f16_from_float(nan)))) << bits;
    }
  }
}

}  // namespace
}  // namespace dsa

// SPDX-License-Identifier: Apache-2.0
#include "core/float_order.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

namespace dsa {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kMinNormal = std::numeric_limits<float>::min();
constexpr float kMax = std::numeric_limits<float>::max();
constexpr float kLeast = std::numeric_limits<float>::denorm_min();

static_assert(ordered_key(1.0f) < ordered_key(2.0f));

TEST(FloatOrder, FollowsTheRankOfScores) {
  const float ascending[] = {-kInf,  -kMax,      -2.0f, -1.0f, -kMinNormal, -kLeast, 0.0f,
                             kLeast, kMinNormal, 1.0f,  2.0f,  kMax,        kInf};
  for (std::size_t i = 1; i < std::size(ascending); ++i) {
    EXPECT_LT(ordered_key(ascending[i - 1]), ordered_key(ascending[i])) << ascending[i];
  }
}

TEST(FloatOrder, ZerosAreEqual) { EXPECT_EQ(ordered_key(-0.0f), ordered_key(0.0f)); }

TEST(FloatOrder, EveryNanIsEqualAndLowest) {
  for (const std::uint32_t bits :
       {0x7F800001u, 0x7FC00000u, 0x7FFFFFFFu, 0xFF800001u, 0xFFC00000u, 0xFFFFFFFFu}) {
    EXPECT_EQ(ordered_key(std::bit_cast<float>(bits)), 0u) << bits;
  }
  EXPECT_GT(ordered_key(-kInf), 0u);
}

// Every sign, exponent and 15 mantissa bits: each value against the next one up.
TEST(FloatOrder, AscendsOverTheWholeRange) {
  for (std::uint32_t high = 0; high < 0x7F80; ++high) {
    for (const std::uint32_t low : {0x0000u, 0x0001u, 0xFFFFu}) {
      const float x = std::bit_cast<float>(high << 16 | low);
      const float next = std::nextafter(x, kInf);
      ASSERT_LT(ordered_key(x), ordered_key(next)) << x;
      ASSERT_GT(ordered_key(-x), ordered_key(-next)) << -x;
    }
  }
}

TEST(FloatOrder, KeysGiveTheirFloats) {
  for (const float x :
       {-kInf, -kMax, -1.0f, -kMinNormal, -kLeast, 0.0f, kLeast, 1.0f, kMax, kInf}) {
    EXPECT_EQ(float_of_ordered_key(ordered_key(x)), x);
    // One key further is past it, and not past the next float.
    const float past = float_of_ordered_key(ordered_key(x) + 1);
    if (x < kInf) {
      EXPECT_GT(past, x);
      EXPECT_LE(past, std::nextafter(x, kInf));
    } else {
      EXPECT_TRUE(std::isnan(past));
    }
  }
}

}  // namespace
}  // namespace dsa

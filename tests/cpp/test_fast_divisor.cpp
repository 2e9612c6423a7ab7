// SPDX-License-Identifier: Apache-2.0
#include "cuda/common/fast_divisor.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <random>
#include <vector>

namespace dsa::cuda {
namespace {

// Numbers around each power of two up to 2^bits, and random ones of every size.
std::vector<std::int64_t> numbers(int bits) {
  std::vector<std::int64_t> found;
  std::mt19937_64 random(0);
  for (int i = 0; i <= bits; ++i) {
    const std::int64_t power = std::int64_t{1} << i;
    for (const std::int64_t n : {power - 1, power, power + 1}) found.push_back(n);
    for (int j = 0; j < 8; ++j) found.push_back(static_cast<std::int64_t>(random() % (2 * power)));
  }
  return found;
}

TEST(FastDivisorTest, QuotientsAreExact) {
  for (const std::int64_t d : numbers(61)) {
    const FastDivisor divisor(d);
    const std::int64_t by = d > 0 ? d : 1;
    ASSERT_EQ(divisor.divisor(), by);
    for (const std::int64_t n : numbers(61)) {
      for (const std::int64_t near : {n, n / by * by, n / by * by + by - 1}) {
        ASSERT_EQ(divisor.quotient(near), near / by) << near << " / " << by;
      }
    }
  }
}

TEST(FastDivisorTest, QuotientsOf31BitsAreExact) {
  constexpr std::int64_t kEnd = std::int64_t{1} << 31;
  for (const std::int64_t d : numbers(31)) {
    if (d > kEnd) continue;
    const FastDivisor31 divisor(d);
    const std::int64_t by = d > 0 ? d : 1;
    ASSERT_EQ(divisor.divisor(), by);
    for (const std::int64_t n : numbers(31)) {
      for (const std::int64_t near : {n, n / by * by, n / by * by + by - 1, kEnd - 1}) {
        if (near >= kEnd) continue;
        ASSERT_EQ(divisor.quotient(static_cast<std::uint32_t>(near)), near / by)
            << near << " / " << by;
      }
    }
  }
}

}  // namespace
}  // namespace dsa::cuda

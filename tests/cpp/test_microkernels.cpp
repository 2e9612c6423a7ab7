// SPDX-License-Identifier: Apache-2.0
// Each instruction set of this build that the CPU runs, against double loops. Buffers are as long
// as their matrices, so that a sanitizer sees any read or write beside them.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "core/fp8.h"
#include "core/half.h"
#include "cpu/simd/microkernels.h"

namespace dsa::cpu {

extern const MicroKernels kMicroKernels_baseline;
#if defined(__x86_64__)
extern const MicroKernels kMicroKernels_avx2;
extern const MicroKernels kMicroKernels_avx512;
#endif

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

std::vector<const MicroKernels*> supported() {
  std::vector<const MicroKernels*> kernels = {&kMicroKernels_baseline};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    kernels.push_back(&kMicroKernels_avx2);
  }
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl")) {
    kernels.push_back(&kMicroKernels_avx512);
  }
#endif
  return kernels;
}

class MicroKernelsTest : public testing::TestWithParam<const MicroKernels*> {
 protected:
  const MicroKernels& kernels() const { return *GetParam(); }
};
INSTANTIATE_TEST_SUITE_P(Isa, MicroKernelsTest, testing::ValuesIn(supported()),
                         [](const auto& isa) { return std::string(isa.param->isa); });

// A row-major matrix whose last row ends with its last element.
struct Matrix {
  Matrix(int rows, int cols, int stride, std::uint32_t seed)
      : ld(stride), data(rows > 0 && cols > 0 ? std::size_t((rows - 1) * stride + cols) : 0) {
    std::mt19937 rng(seed);
    std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
    for (float& x : data) x = uniform(rng);
  }
  float& operator()(int i, int j) { return data[std::size_t(i * ld + j)]; }

  int ld;
  std::vector<float> data;
};

// Around the register tiles of every instruction set, and around a block of k.
constexpr int kRows[] = {0, 1, 2, 4, 5, 6, 7, 11, 12, 13, 25};
constexpr int kCols[] = {0, 1, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 50};
constexpr int kDepths[] = {0, 1, 3, 128, 191, 192, 193, 400};

TEST_P(MicroKernelsTest, Gemm) {
  for (const int m : kRows) {
    for (const int n : kCols) {
      for (const int k : kDepths) {
        Matrix a(m, k, k + 3, 1), b(k, n, n + 5, 2);
        for (const bool accumulate : {false, true}) {
          Matrix c(m, n, n + 1, 3);
          Matrix before = c;
          kernels().gemm(m, n, k, a.data.data(), a.ld, b.data.data(), b.ld, c.data.data(), c.ld,
                         accumulate);
          for (int i = 0; i < m; ++i) {
            for (int j = 0; j < n; ++j) {
              double expected = accumulate ? before(i, j) : 0.0;
              for (int p = 0; p < k; ++p) expected += double(a(i, p)) * b(p, j);
              ASSERT_NEAR(c(i, j), expected, 1e-4) << m << ' ' << n << ' ' << k;
            }
          }
          // What lies between the rows stays.
          for (int i = 0; i + 1 < m && n > 0; ++i) ASSERT_EQ(c(i, n), before(i, n));
        }
      }
    }
  }
}

TEST_P(MicroKernelsTest, ReluWeightedSum) {
  for (const int m : kRows) {
    for (const int n : kCols) {
      for (const int k : kDepths) {
        Matrix a(m, k, k + 3, 1), b(k, n, n + 5, 2), w(1, m, m, 3), out(1, n, n, 4);
        kernels().relu_weighted_sum(m, n, k, a.data.data(), a.ld, b.data.data(), b.ld,
                                    w.data.data(), out.data.data());
        for (int j = 0; j < n; ++j) {
          double expected = 0.0;
          for (int i = 0; i < m; ++i) {
            double dot = 0.0;
            for (int p = 0; p < k; ++p) dot += double(a(i, p)) * b(p, j);
            expected += w(0, i) * std::max(dot, 0.0);
          }
          ASSERT_NEAR(out(0, j), expected, 1e-4) << m << ' ' << n << ' ' << k;
        }
      }
    }
  }
}

// An element's bits depend neither on the size of the call nor on its place in it.
TEST_P(MicroKernelsTest, BitsDependOnTheOperandsAlone) {
  constexpr int kM = 25, kN = 50, kK = 200;
  Matrix a(kM, kK, kK, 1), b(kK, kN, kN, 2), w(1, kM, kM, 3);
  Matrix c(kM, kN, kN, 4), sums(1, kN, kN, 5);
  kernels().gemm(kM, kN, kK, a.data.data(), kK, b.data.data(), kN, c.data.data(), kN, false);
  kernels().relu_weighted_sum(kM, kN, kK, a.data.data(), kK, b.data.data(), kN, w.data.data(),
                              sums.data.data());
  for (int j = 0; j < kN; ++j) {
    float sum = 0.0f;
    kernels().relu_weighted_sum(kM, 1, kK, a.data.data(), kK, b.data.data() + j, kN, w.data.data(),
                                &sum);
    ASSERT_EQ(sum, sums(0, j)) << j;
    for (int i = 0; i < kM; ++i) {
      float element = 0.0f;
      kernels().gemm(1, 1, kK, a.data.data() + i * kK, kK, b.data.data() + j, kN, &element, 1,
                     false);
      ASSERT_EQ(element, c(i, j)) << i << ' ' << j;
    }
  }
}

TEST_P(MicroKernelsTest, NanStaysInItsRowOrColumn) {
  constexpr int kM = 13, kN = 37, kK = 20, kBadRow = 5, kBadCol = 33;
  Matrix a(kM, kK, kK, 1), b(kK, kN, kN, 2), w(1, kM, kM, 3), c(kM, kN, kN, 4), sums(1, kN, kN, 5);
  b(7, kBadCol) = kNaN;
  kernels().relu_weighted_sum(kM, kN, kK, a.data.data(), kK, b.data.data(), kN, w.data.data(),
                              sums.data.data());
  for (int j = 0; j < kN; ++j) ASSERT_EQ(std::isnan(sums(0, j)), j == kBadCol) << j;

  a(kBadRow, 3) = kNaN;
  kernels().gemm(kM, kN, kK, a.data.data(), kK, b.data.data(), kN, c.data.data(), kN, false);
  for (int i = 0; i < kM; ++i) {
    for (int j = 0; j < kN; ++j) {
      ASSERT_EQ(std::isnan(c(i, j)), i == kBadRow || j == kBadCol) << i << ' ' << j;
    }
  }
}

TEST_P(MicroKernelsTest, Exp2MinusMax) {
  for (const int n : {0, 1, 7, 16, 33, 1000}) {
    for (const float max : {0.0f, 3.25f, -100.0f, 2000.0f}) {
      std::vector<float> x(std::size_t(n), 0.0f);
      for (int j = 0; j < n; ++j) x[std::size_t(j)] = max - 130.0f * float(j) / float(n);
      std::vector<float> y = x;
      const float sum = kernels().exp2_minus_max(n, max, y.data());
      double expected_sum = 0.0;
      for (int j = 0; j < n; ++j) {
        const double t = double(x[std::size_t(j)] - max);
        const double expected = t < -126.0 ? 0.0 : std::exp2(t);
        expected_sum += expected;
        ASSERT_NEAR(y[std::size_t(j)], expected, 2e-7 * expected) << t;
      }
      ASSERT_NEAR(sum, expected_sum, 1e-6 * expected_sum);
    }
  }
}

TEST_P(MicroKernelsTest, Exp2OfWhatIsNotFinite) {
  for (const std::size_t n : {std::size_t(3), std::size_t(35)}) {
    std::vector<float> x(n, -kInf);
    x[0] = 1.0f;
    x[n - 1] = 0.0f;
    std::vector<float> y = x;
    EXPECT_EQ(kernels().exp2_minus_max(int(n), 1.0f, y.data()), 1.5f);
    EXPECT_EQ(y[0], 1.0f);
    EXPECT_EQ(y[n - 1], 0.5f);
    for (std::size_t j = 1; j + 1 < n; ++j) EXPECT_EQ(std::bit_cast<std::uint32_t>(y[j]), 0u);

    y = x;
    y[1] = kNaN;
    EXPECT_TRUE(std::isnan(kernels().exp2_minus_max(int(n), 1.0f, y.data())));
    for (std::size_t j = 0; j < n; ++j) EXPECT_EQ(std::isnan(y[j]), j == 1);

    // Above the maximum, which callers do not ask for, it still is 2^t.
    y = {3.0f, 127.75f, 128.0f, 200.0f, kInf};
    kernels().exp2_minus_max(5, 0.0f, y.data());
    EXPECT_EQ(y[0], 8.0f);
    EXPECT_NEAR(y[1], std::exp2(127.75), std::exp2(127.75) * 2e-7);
    for (std::size_t j = 2; j < 5; ++j) EXPECT_EQ(y[j], kInf);
  }
}

TEST_P(MicroKernelsTest, Scale) {
  for (const std::size_t n : {0, 1, 15, 16, 17, 70}) {
    std::vector<float> y(n);
    for (std::size_t j = 0; j < n; ++j) y[j] = float(j) - 3.0f;
    kernels().scale(std::int64_t(n), -0.5f, y.data());
    for (std::size_t j = 0; j < n; ++j) ASSERT_EQ(y[j], (float(j) - 3.0f) * -0.5f);
  }
}

void expect_same(float got, float expected, std::size_t code) {
  if (std::isnan(expected)) {
    ASSERT_TRUE(std::isnan(got)) << code;
  } else {
    ASSERT_EQ(std::bit_cast<std::uint32_t>(got), std::bit_cast<std::uint32_t>(expected)) << code;
  }
}

TEST_P(MicroKernelsTest, EveryE4m3Code) {
  for (const float factor : {1.0f, 0.37f}) {
    for (const std::size_t n : {std::size_t(256), std::size_t(251), std::size_t(5)}) {
      std::vector<std::uint8_t> codes(n);
      for (std::size_t j = 0; j < n; ++j) codes[j] = std::uint8_t(255 - j);
      std::vector<float> values(n);
      kernels().e4m3_to_f32(std::int64_t(n), codes.data(), factor, values.data());
      for (std::size_t j = 0; j < n; ++j) {
        expect_same(values[j], e4m3_decode(codes[j]) * factor, codes[j]);
      }
    }
  }
}

TEST_P(MicroKernelsTest, EveryHalfCode) {
  for (const std::size_t n : {std::size_t(65536), std::size_t(65531), std::size_t(3)}) {
    std::vector<std::uint16_t> codes(n);
    for (std::size_t j = 0; j < n; ++j) codes[j] = std::uint16_t(65535 - j);
    std::vector<float> bf16(n), f16(n);
    kernels().bf16_to_f32(std::int64_t(n), codes.data(), bf16.data());
    kernels().f16_to_f32(std::int64_t(n), codes.data(), f16.data());
    for (std::size_t j = 0; j < n; ++j) {
      expect_same(bf16[j], bf16_to_float(codes[j]), codes[j]);
      expect_same(f16[j], f16_to_float(codes[j]), codes[j]);
    }
  }
}

// ---- selection ----------------------------------------------------------------------------------

// The choice is made once a process: each of these runs in a process of its own.
[[noreturn]] void report_isa(const char* forced) {
  setenv("DSA_CPU_ISA", forced, 1);
  std::fprintf(stderr, "isa=%s", microkernels().isa);
  std::exit(0);
}

TEST(SelectDeathTest, TheEnvironmentForcesAnIsa) {
  testing::GTEST_FLAG(death_test_style) = "threadsafe";
  const testing::ExitedWithCode exits(0);
  for (const MicroKernels* kernels : supported()) {
    EXPECT_EXIT(report_isa(kernels->isa), exits, std::string("isa=") + kernels->isa + "$");
  }
  const std::string best = supported().back()->isa;
  EXPECT_EXIT(report_isa(""), exits, "isa=" + best + "$");
  EXPECT_EXIT(report_isa("mmx"), exits,
              "isa=" + best + " .DSA_CPU_ISA=mmx: not an instruction set of this build.$");
}

}  // namespace
}  // namespace dsa::cpu

// SPDX-License-Identifier: Apache-2.0
// per_token_cast_to_fp8, hadamard_transform and merge_attn_states.
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <random>
#include <vector>

#include "core/fp8.h"
#include "core/half.h"
#include "cpu/cpu_kernels.h"
#include "view.h"

namespace dsa {
namespace {

using test::strided_view;
using test::view;
using Bytes = std::vector<std::uint8_t>;
using Floats = std::vector<float>;
using Halves = std::vector<std::uint16_t>;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

Floats random_floats(std::size_t n, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  Floats values(n);
  for (float& value : values) value = normal(random);
  return values;
}

// ---- per_token_cast_to_fp8 ----------------------------------------------------------------------

struct Cast {
  Bytes codes;
  Floats scales;
  Cast(TensorView x, bool use_ue8m0) {
    const std::int64_t rows = x.size(0);
    const std::int64_t n = x.size(1);
    const std::int64_t groups = (n + 127) / 128;
    codes.assign(static_cast<std::size_t>(rows * n), 0xAA);
    scales.assign(static_cast<std::size_t>(rows * groups), -7.0f);
    PerTokenCastParams params;
    params.x = x;
    params.use_ue8m0 = use_ue8m0;
    params.out = view(codes, {rows, n}, DType::kFloat8E4M3);
    params.scale = view(scales, {rows, groups});
    EXPECT_TRUE(cpu::per_token_cast_to_fp8(params).ok());
  }
};

TEST(PerTokenCast, ScalesOfShortAndFullGroups) {
  constexpr std::int64_t kRows = 3;
  constexpr std::int64_t kN = 300;  // groups of 128, 128, 44
  Floats x = random_floats(kRows * kN, 1);
  const Cast cast(view(x, {kRows, kN}), false);
  for (std::int64_t row = 0; row < kRows; ++row) {
    for (std::int64_t group = 0; group < 3; ++group) {
      const std::int64_t end = std::min<std::int64_t>(kN, (group + 1) * 128);
      float amax = 1e-4f;
      for (std::int64_t i = group * 128; i < end; ++i) {
        amax = std::max(amax, std::abs(x[static_cast<std::size_t>(row * kN + i)]));
      }
      const float scale = amax / 448.0f;
      ASSERT_EQ(cast.scales[static_cast<std::size_t>(row * 3 + group)], scale);
      for (std::int64_t i = group * 128; i < end; ++i) {
        const auto at = static_cast<std::size_t>(row * kN + i);
        ASSERT_EQ(cast.codes[at], e4m3_encode(x[at] / scale));
      }
    }
  }
}

TEST(PerTokenCast, Ue8m0RoundsScalesUp) {
  Floats x(256, 0.0f);
  x[3] = 448.0f;            // scale 1 is a power of two already
  x[130] = -448.0f * 1.5f;  // 1.5 -> 2
  const Cast cast(view(x, {1, 256}), true);
  EXPECT_EQ(cast.scales, (Floats{1.0f, 2.0f}));
  EXPECT_EQ(cast.codes[3], 0x7E);
  EXPECT_EQ(cast.codes[130], e4m3_encode(-336.0f));
}

TEST(PerTokenCast, ZerosHitTheFloor) {
  Floats x(128, -0.0f);
  const Cast plain(view(x, {1, 128}), false);
  EXPECT_EQ(plain.scales[0], 1e-4f / 448.0f);
  EXPECT_EQ(plain.codes, Bytes(128, 0x80));
  const Cast rounded(view(x, {1, 128}), true);
  EXPECT_EQ(rounded.scales[0], 0x1p-22f);
}

TEST(PerTokenCast, NanStaysNanAndEntersNoScale) {
  Floats x(128, 1.0f);
  x[20] = kNan;
  x[21] = -kNan;
  for (const bool use_ue8m0 : {false, true}) {
    const Cast cast(view(x, {1, 128}), use_ue8m0);
    const float scale = use_ue8m0 ? 0x1p-8f : 1.0f / 448.0f;
    EXPECT_EQ(cast.scales[0], scale);
    Bytes expected(128, e4m3_encode(1.0f / scale));
    expected[20] = 0x7F;
    expected[21] = 0xFF;
    EXPECT_EQ(cast.codes, expected);
  }
  Floats all(3, kNan);
  const Cast cast(view(all, {1, 3}), false);
  EXPECT_EQ(cast.scales[0], 1e-4f / 448.0f);
  EXPECT_EQ(cast.codes, Bytes(3, 0x7F));
}

TEST(PerTokenCast, InfinitySetsTheScale) {
  Floats x{1.0f, -kInf};
  const Cast plain(view(x, {1, 2}), false);
  EXPECT_EQ(plain.scales[0], kInf);
  EXPECT_EQ(plain.codes[0], 0x00);
  EXPECT_EQ(plain.codes[1] & 0x7F, 0x7F);  // inf / inf
  const Cast rounded(view(x, {1, 2}), true);
  EXPECT_EQ(rounded.scales[0], 0x1p127f);
  EXPECT_EQ(rounded.codes, (Bytes{0x00, 0xFE}));
}

TEST(PerTokenCast, HalfRowsApartInMemory) {
  constexpr std::int64_t kN = 130;
  const Floats values = random_floats(2 * 200, 2);
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    Halves x(200 + kN);
    Floats widened(2 * kN);
    for (std::size_t i = 0; i < x.size(); ++i) {
      x[i] = dtype == DType::kBFloat16 ? bf16_from_float(values[i]) : f16_from_float(values[i]);
    }
    for (std::size_t i = 0; i < widened.size(); ++i) {
      const std::uint16_t code = x[i / kN * 200 + i % kN];
      widened[i] = dtype == DType::kBFloat16 ? bf16_to_float(code) : f16_to_float(code);
    }
    const Cast halves(strided_view(x.data(), {2, kN}, {200, 1}, dtype), false);
    const Cast floats(view(widened, {2, kN}), false);
    EXPECT_EQ(halves.codes, floats.codes);
    EXPECT_EQ(halves.scales, floats.scales);
  }
}

TEST(PerTokenCast, ManyDimensionsInAnyOrder) {
  // [2, 3, 128] whose leading dimensions are transposed in memory.
  Floats x = random_floats(2 * 3 * 128, 3);
  Bytes codes(x.size());
  Floats scales(6);
  PerTokenCastParams params;
  params.x = strided_view(x.data(), {2, 3, 128}, {128, 256, 1});
  params.out = view(codes, {2, 3, 128}, DType::kFloat8E4M3);
  params.scale = view(scales, {2, 3, 1});
  ASSERT_TRUE(cpu::per_token_cast_to_fp8(params).ok());
  const Cast rows(view(x, {6, 128}), false);
  for (std::size_t a = 0; a < 2; ++a) {
    for (std::size_t b = 0; b < 3; ++b) {
      EXPECT_EQ(scales[a * 3 + b], rows.scales[b * 2 + a]);
      for (std::size_t i = 0; i < 128; ++i) {
        EXPECT_EQ(codes[(a * 3 + b) * 128 + i], rows.codes[(b * 2 + a) * 128 + i]);
      }
    }
  }
}

// ---- hadamard_transform -------------------------------------------------------------------------

Floats hadamard(Floats x, std::int64_t rows, std::int64_t n, std::optional<double> scale = {}) {
  Floats out(x.size(), kNan);
  HadamardParams params;
  params.scale = scale;
  params.x = view(x, {rows, n});
  params.out = view(out, {rows, n});
  EXPECT_TRUE(cpu::hadamard_transform(params).ok());
  return out;
}

TEST(Hadamard, MatchesTheSylvesterMatrix) {
  for (const std::int64_t n : {1, 2, 4, 8, 16, 64, 128, 512}) {
    const Floats x = random_floats(static_cast<std::size_t>(3 * n), static_cast<unsigned>(n));
    const Floats out = hadamard(x, 3, n);
    for (std::int64_t row = 0; row < 3; ++row) {
      for (std::int64_t i = 0; i < n; ++i) {
        double sum = 0.0;
        for (std::int64_t j = 0; j < n; ++j) {
          const bool negative = std::popcount(static_cast<std::uint64_t>(i & j)) % 2 == 1;
          const double value = x[static_cast<std::size_t>(row * n + j)];
          sum += negative ? -value : value;
        }
        ASSERT_NEAR(out[static_cast<std::size_t>(row * n + i)],
                    sum / std::sqrt(static_cast<double>(n)), 1e-5)
            << n;
      }
    }
  }
}

TEST(Hadamard, ScalesByWhatIsGiven) {
  const Floats x = random_floats(64, 7);
  const Floats sums = hadamard(x, 1, 64, 1.0);
  const Floats orthonormal = hadamard(x, 1, 64);
  for (std::size_t i = 0; i < x.size(); ++i) EXPECT_EQ(sums[i], 8.0f * orthonormal[i]);
}

TEST(Hadamard, IsItsOwnInverse) {
  constexpr std::int64_t kN = 32768;
  const Floats x = random_floats(kN, 5);
  const Floats again = hadamard(hadamard(x, 1, kN), 1, kN);
  for (std::size_t i = 0; i < x.size(); ++i) ASSERT_NEAR(again[i], x[i], 1e-5);
}

TEST(Hadamard, HalfInPlaceRoundsOnce) {
  Halves x(8);
  Floats widened(8);
  for (std::size_t i = 0; i < 8; ++i) {
    x[i] = f16_from_float(0.1f * static_cast<float>(i) - 0.3f);
    widened[i] = f16_to_float(x[i]);
  }
  const Floats expected = hadamard(widened, 1, 8);
  HadamardParams params;
  params.x = view(x, {8}, DType::kFloat16);
  params.out = params.x;
  ASSERT_TRUE(cpu::hadamard_transform(params).ok());
  for (std::size_t i = 0; i < 8; ++i) EXPECT_EQ(x[i], f16_from_float(expected[i]));
}

// ---- merge_attn_states --------------------------------------------------------------------------

struct Merge {
  Floats out;
  Floats lse;
  Merge(Floats& outs, Floats& lses, std::int64_t splits, std::int64_t rows, std::int64_t heads,
        std::int64_t d) {
    out.assign(static_cast<std::size_t>(rows * heads * d), kNan);
    lse.assign(static_cast<std::size_t>(rows * heads), kNan);
    MergeAttnStatesParams params;
    params.outs = view(outs, {splits, rows, heads, d});
    params.lses = view(lses, {splits, rows, heads});
    params.out = view(out, {rows, heads, d});
    params.lse = view(lse, {rows, heads});
    EXPECT_TRUE(cpu::merge_attn_states(params).ok());
  }
};

TEST(MergeAttnStates, WeighsByExpOfLse) {
  constexpr std::int64_t kSplits = 4;
  constexpr std::int64_t kRows = 3;
  constexpr std::int64_t kHeads = 2;
  constexpr std::int64_t kD = 17;
  Floats outs = random_floats(kSplits * kRows * kHeads * kD, 6);
  Floats lses = random_floats(kSplits * kRows * kHeads, 7);
  const Merge merged(outs, lses, kSplits, kRows, kHeads, kD);
  for (std::int64_t i = 0; i < kRows * kHeads; ++i) {
    double sum = 0.0;
    std::vector<double> expected(kD, 0.0);
    for (std::int64_t split = 0; split < kSplits; ++split) {
      const std::int64_t at = split * kRows * kHeads + i;
      const double weight = std::exp(double{lses[static_cast<std::size_t>(at)]});
      sum += weight;
      for (std::int64_t j = 0; j < kD; ++j) {
        expected[static_cast<std::size_t>(j)] +=
            weight * outs[static_cast<std::size_t>(at * kD + j)];
      }
    }
    EXPECT_NEAR(merged.lse[static_cast<std::size_t>(i)], std::log(sum), 1e-6);
    for (std::int64_t j = 0; j < kD; ++j) {
      EXPECT_NEAR(merged.out[static_cast<std::size_t>(i * kD + j)],
                  expected[static_cast<std::size_t>(j)] / sum, 1e-6);
    }
  }
}

TEST(MergeAttnStates, EmptySplitsAreNotRead) {
  Floats outs{kNan, kNan, 1.0f, 2.0f, kInf, kNan};
  Floats lses{kInf, -3.5f, -kInf};
  const Merge merged(outs, lses, 3, 1, 1, 2);
  EXPECT_EQ(merged.out, (Floats{1.0f, 2.0f}));  // the one split, to the bit
  EXPECT_EQ(merged.lse, Floats{-3.5f});
}

TEST(MergeAttnStates, AllEmpty) {
  Floats outs{kNan, kNan, kNan, kNan};
  Floats lses{kInf, -kInf};
  const Merge merged(outs, lses, 2, 1, 1, 2);
  EXPECT_EQ(merged.out, (Floats{0.0f, 0.0f}));
  EXPECT_EQ(merged.lse, Floats{kInf});
  Floats none;
  const Merge no_splits(none, none, 0, 1, 1, 2);
  EXPECT_EQ(no_splits.out, (Floats{0.0f, 0.0f}));
  EXPECT_EQ(no_splits.lse, Floats{kInf});
}

TEST(MergeAttnStates, HugeLsesDoNotOverflow) {
  Floats outs{1.0f, 3.0f};
  Floats lses{1e6f, 1e6f};
  const Merge merged(outs, lses, 2, 1, 1, 1);
  EXPECT_EQ(merged.out, Floats{2.0f});
  EXPECT_EQ(merged.lse, Floats{1e6f + std::log(2.0f)});
}

TEST(MergeAttnStates, NanLseShows) {
  Floats outs{1.0f, 3.0f};
  Floats lses{kNan, 1.0f};
  const Merge merged(outs, lses, 2, 1, 1, 1);
  EXPECT_TRUE(std::isnan(merged.out[0]));
  EXPECT_TRUE(std::isnan(merged.lse[0]));
}

TEST(MergeAttnStates, TransposedLse) {
  // out and lse as slices of larger tensors, heads first in the lse.
  Floats outs = random_floats(2 * 3 * 2 * 4, 8);
  Floats lses = random_floats(2 * 3 * 2, 9);
  const Merge expected(outs, lses, 2, 3, 2, 4);
  Floats out(3 * 2 * 5, -7.0f);
  Floats lse(6, -7.0f);
  MergeAttnStatesParams params;
  params.outs = view(outs, {2, 3, 2, 4});
  params.lses = view(lses, {2, 3, 2});
  params.out = strided_view(out.data(), {3, 2, 4}, {10, 5, 1});
  params.lse = strided_view(lse.data(), {3, 2}, {1, 3});
  ASSERT_TRUE(cpu::merge_attn_states(params).ok());
  for (std::size_t row = 0; row < 3; ++row) {
    for (std::size_t head = 0; head < 2; ++head) {
      EXPECT_EQ(lse[head * 3 + row], expected.lse[row * 2 + head]);
      for (std::size_t j = 0; j < 4; ++j) {
        EXPECT_EQ(out[row * 10 + head * 5 + j], expected.out[(row * 2 + head) * 4 + j]);
      }
      EXPECT_EQ(out[row * 10 + head * 5 + 4], -7.0f);
    }
  }
}

}  // namespace
}  // namespace dsa

// SPDX-License-Identifier: Apache-2.0
// select_topk, topk_select, map_to_slots and merge_topk against a stable sort.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "core/half.h"
#include "core/page_table.h"
#include "cpu/cpu_kernels.h"
#include "cpu/topk_row.h"
#include "view.h"

namespace dsa {
namespace {

using test::strided_view;
using test::view;
using Ints = std::vector<std::int32_t>;
using Floats = std::vector<float>;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr std::int32_t kIntMin = std::numeric_limits<std::int32_t>::min();
constexpr std::int32_t kIntMax = std::numeric_limits<std::int32_t>::max();

bool ranks_above(float a, float b) {
  if (std::isnan(a) || std::isnan(b)) return !std::isnan(a) && std::isnan(b);
  return a > b;
}

Ints expected_columns(const Floats& scores, std::int64_t k) {
  Ints columns(scores.size());
  std::iota(columns.begin(), columns.end(), 0);
  std::stable_sort(columns.begin(), columns.end(), [&](std::int32_t a, std::int32_t b) {
    return ranks_above(scores[static_cast<std::size_t>(a)], scores[static_cast<std::size_t>(b)]);
  });
  columns.resize(std::min(columns.size(), static_cast<std::size_t>(k)));
  std::sort(columns.begin(), columns.end());
  return columns;
}

Ints selected_columns(const Floats& scores, std::int64_t k) {
  const auto n = static_cast<std::int64_t>(scores.size());
  Ints columns(static_cast<std::size_t>(std::min(n, k)), -7);
  EXPECT_EQ(cpu::select_topk(scores.data(), n, k, columns.data()), std::min(n, k));
  return columns;
}

void expect_exact(const Floats& scores, std::int64_t k) {
  ASSERT_EQ(selected_columns(scores, k), expected_columns(scores, k))
      << "n = " << scores.size() << ", k = " << k;
}

struct Kind {
  const char* name;
  std::function<float(std::mt19937&, std::int64_t column, std::int64_t n)> score;
};

float uniform(std::mt19937& random) {
  return std::uniform_real_distribution<float>(-1.0f, 1.0f)(random);
}

const std::vector<Kind>& kinds() {
  static const std::vector<Kind> all{
      {"random", [](std::mt19937& r, std::int64_t, std::int64_t) { return uniform(r); }},
      {"negative", [](std::mt19937& r, std::int64_t, std::int64_t) { return uniform(r) - 2.0f; }},
      {"few values",
       [](std::mt19937& r, std::int64_t, std::int64_t) { return static_cast<float>(r() % 5) - 2; }},
      {"all equal", [](std::mt19937&, std::int64_t, std::int64_t) { return 0.25f; }},
      {"all NaN", [](std::mt19937&, std::int64_t, std::int64_t) { return kNan; }},
      {"all -inf", [](std::mt19937&, std::int64_t, std::int64_t) { return -kInf; }},
      {"all +inf", [](std::mt19937&, std::int64_t, std::int64_t) { return kInf; }},
      {"zeros of both signs",
       [](std::mt19937& r, std::int64_t, std::int64_t) { return r() % 2 ? 0.0f : -0.0f; }},
      {"zeros over negatives",
       [](std::mt19937& r, std::int64_t, std::int64_t) {
         return r() % 3 == 0 ? -0.0f : (r() % 2 ? 0.0f : -uniform(r) * uniform(r));
       }},
      {"narrow range",
       [](std::mt19937& r, std::int64_t, std::int64_t) {
         return 1.0f + static_cast<float>(r() % (1 << 20)) * 0x1p-23f;
       }},
      {"adjacent values that slowly rise",
       [](std::mt19937& r, std::int64_t i, std::int64_t n) {
         return 1.0f +
                static_cast<float>(static_cast<std::int64_t>(r() % 3) + i * 12 / n) * 0x1p-23f;
       }},
      {"subnormals",
       [](std::mt19937& r, std::int64_t, std::int64_t) {
         return static_cast<float>(static_cast<int>(r() % 2001) - 1000) *
                std::numeric_limits<float>::denorm_min();
       }},
      {"ascending",
       [](std::mt19937&, std::int64_t i, std::int64_t) { return static_cast<float>(i); }},
      {"descending",
       [](std::mt19937&, std::int64_t i, std::int64_t) { return -static_cast<float>(i); }},
      {"best ones last, out of step with any even sample",
       [](std::mt19937& r, std::int64_t i, std::int64_t n) {
         return i > n - n / 8 ? uniform(r) + 9.0f : uniform(r);
       }},
      {"mostly NaN and infinities",
       [](std::mt19937& r, std::int64_t, std::int64_t) {
         switch (r() % 8) {
           case 0: return kInf;
           case 1: return -kInf;
           case 2: return uniform(r);
           case 3: return -kNan;
           default: return kNan;
         }
       }},
  };
  return all;
}

Floats make_scores(const Kind& kind, std::int64_t n, unsigned seed) {
  std::mt19937 random(seed);
  Floats scores(static_cast<std::size_t>(n));
  for (std::int64_t i = 0; i < n; ++i) {
    scores[static_cast<std::size_t>(i)] = kind.score(random, i, n);
  }
  return scores;
}

TEST(SelectTopk, EveryKindOfRow) {
  for (const Kind& kind : kinds()) {
    SCOPED_TRACE(kind.name);
    for (const std::int64_t n : {1, 2, 15, 16, 17, 100, 2049, 8192, 8193, 20011}) {
      const Floats scores = make_scores(kind, n, static_cast<unsigned>(n));
      for (const std::int64_t k : {std::int64_t{1}, std::int64_t{2}, std::int64_t{64}, n / 2, n - 1,
                                   n, n + 1, std::int64_t{2048}}) {
        if (k >= 1) expect_exact(scores, k);
      }
    }
  }
}

TEST(SelectTopk, LongRows) {
  for (const Kind& kind : kinds()) {
    SCOPED_TRACE(kind.name);
    const Floats scores = make_scores(kind, 200003, 7);
    for (const std::int64_t k : {1, 2048, 4096, 4097, 100000}) expect_exact(scores, k);
  }
}

TEST(SelectTopk, AMillionColumns) {
  expect_exact(make_scores(kinds()[0], 1 << 20, 1), 2048);
  expect_exact(make_scores(kinds()[9], 1 << 20, 2), 2048);  // narrow range
}

// Every sampled column beats the rest, so that the estimate of the threshold is far too high.
TEST(SelectTopk, AMisleadingSampleCostsNoCorrectness) {
  constexpr std::int64_t kN = 1 << 17;
  constexpr std::int64_t kStep = kN / 2048;
  Floats scores(kN);
  std::mt19937 random(3);
  for (std::int64_t i = 0; i < kN; ++i) {
    scores[static_cast<std::size_t>(i)] = uniform(random) + (i % kStep == 0 ? 10.0f : 0.0f);
  }
  for (const std::int64_t k : {1, 64, 2048, 4096}) expect_exact(scores, k);
  for (float& score : scores) score = -score;  // and far too low
  for (const std::int64_t k : {1, 64, 2048, 4096}) expect_exact(scores, k);
}

TEST(SelectTopk, NothingToSelect) {
  std::int32_t untouched = -7;
  const float score = 1.0f;
  EXPECT_EQ(cpu::select_topk(&score, 0, 4, &untouched), 0);
  EXPECT_EQ(cpu::select_topk(&score, -3, 4, &untouched), 0);
  EXPECT_EQ(cpu::select_topk(&score, 1, 0, &untouched), 0);
  EXPECT_EQ(untouched, -7);
}

TEST(SelectTopk, HalfAndStridedRowsAgreeWithFloatOnes) {
  constexpr std::int64_t kN = 20000;
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    std::mt19937 random(5);
    std::vector<std::uint16_t> codes(kN * 3);
    for (std::uint16_t& code : codes) code = static_cast<std::uint16_t>(random());
    for (const std::int64_t stride : {1, 3}) {
      Floats values(kN);
      for (std::int64_t i = 0; i < kN; ++i) {
        const std::uint16_t code = codes[static_cast<std::size_t>(i * stride)];
        values[static_cast<std::size_t>(i)] =
            dtype == DType::kBFloat16 ? bf16_to_float(code) : f16_to_float(code);
      }
      for (const std::int64_t k : {1, 2048, 10000}) {
        Ints columns(static_cast<std::size_t>(k));
        cpu::select_topk(cpu::ScoreRow{codes.data(), dtype, stride}, kN, k, columns.data());
        EXPECT_EQ(columns, expected_columns(values, k)) << stride << ", " << k;
      }
    }
  }
}

// ---- topk_select --------------------------------------------------------------------------------

struct TopkSelect {
  TopkSelectParams params;
  Ints indices;
  Floats out_scores;

  TopkSelect(TensorView scores, std::int64_t k) {
    const std::int64_t rows = scores.size(0);
    indices.assign(static_cast<std::size_t>(rows * k), -77);
    out_scores.assign(static_cast<std::size_t>(rows * k), 77.0f);
    params.scores = scores;
    params.topk = k;
    params.indices = view(indices, {rows, k});
    params.out_scores = view(out_scores, {rows, k});
  }
  const Ints& run() {
    EXPECT_TRUE(cpu::topk_select(params).ok());
    return indices;
  }
};

TEST(TopkSelect, PadsOnTheRight) {
  Floats scores{3, 1, 2};
  TopkSelect op(view(scores, {1, 3}), 5);
  EXPECT_EQ(op.run(), (Ints{0, 1, 2, -1, -1}));
  EXPECT_EQ(op.out_scores, (Floats{3, 1, 2, -kInf, -kInf}));
}

TEST(TopkSelect, ClampsHostileWindows) {
  const std::size_t rows = 8;
  Floats scores;
  for (std::size_t row = 0; row < rows; ++row) scores.insert(scores.end(), {1, 5, 2, 4});
  Ints starts{0, -9, kIntMin, 2, 3, 4, kIntMax, 1};
  Ints ends{4, 2, kIntMax, kIntMax, 3, 9, kIntMin, -1};
  TopkSelect op(view(scores, {8, 4}), 2);
  op.params.row_starts = view(starts, {8});
  op.params.row_ends = view(ends, {8});
  EXPECT_EQ(op.run(), (Ints{1, 3, 0, 1, 1, 3, 2, 3, -1, -1, -1, -1, -1, -1, -1, -1}));
}

TEST(TopkSelect, IndexBaseIsAddedToColumns) {
  Floats scores{1, 5, 2, 4, 7, 7, 0, 0};
  Ints bases{100, kIntMax - 1};
  Ints starts{1, 0};
  TopkSelect op(view(scores, {2, 4}), 2);
  op.params.row_starts = view(starts, {2});
  op.params.index_base_scalar = 10;
  EXPECT_EQ(op.run(), (Ints{11, 13, 10, 11}));
  op.params.index_base = view(bases, {2});
  EXPECT_EQ(op.run(), (Ints{101, 103, kIntMax - 1, kIntMax}));
  bases[1] = kIntMax;  // the second column does not fit
  EXPECT_EQ(op.run(), (Ints{101, 103, kIntMax, -1}));
}

TEST(TopkSelect, SlotsThroughAHostileTable) {
  // Two requests of two rows each; pages of 2 tokens.
  Floats scores(4 * 8, 1.0f);
  Ints table{7, -1, 3, 0, kIntMax, kIntMin};
  TopkSelect op(view(scores, {4, 8}), 8);
  op.params.block_table = view(table, {2, 3});
  op.params.page_size = 2;
  const Ints first{14, 15, -1, -1, 6, 7, -1, -1};
  const Ints second{0, 1, -1, -1, -1, -1, -1, -1};
  Ints expected;
  for (const Ints& row : {first, first, second, second}) {
    expected.insert(expected.end(), row.begin(), row.end());
  }
  EXPECT_EQ(op.run(), expected);

  Ints requests{1, 2, -1, 0};
  op.params.row_to_request = view(requests, {4});
  const Ints none(8, -1);
  expected.clear();
  for (const Ints& row : {second, none, none, first}) {
    expected.insert(expected.end(), row.begin(), row.end());
  }
  EXPECT_EQ(op.run(), expected);
}

TEST(TopkSelect, SlotsOfTokensBeforeTheTable) {
  Floats scores{1, 1, 1, 1};
  Ints table{5};
  TopkSelect op(view(scores, {1, 4}), 4);
  op.params.block_table = view(table, {1, 1});
  op.params.page_size = 64;
  op.params.index_base_scalar = -2;
  EXPECT_EQ(op.run(), (Ints{-1, -1, 320, 321}));
}

TEST(TopkSelect, AnyStridesOfScoresAndBounds) {
  constexpr std::int64_t kRows = 3;
  constexpr std::int64_t kColumns = 500;
  Floats data(kRows * kColumns);
  std::mt19937 random(11);
  for (float& score : data) score = uniform(random);
  // Column-major, and one pair of bounds for all rows (stride 0).
  Ints starts{10};
  Ints ends{490};
  TopkSelect op(strided_view(data.data(), {kRows, kColumns}, {1, kRows}), 20);
  op.params.row_starts = strided_view(starts.data(), {kRows}, {0});
  op.params.row_ends = strided_view(ends.data(), {kRows}, {0});
  op.run();
  for (std::int64_t row = 0; row < kRows; ++row) {
    Floats window;
    for (std::int64_t c = 10; c < 490; ++c) {
      window.push_back(data[static_cast<std::size_t>(c * kRows + row)]);
    }
    const Ints columns = expected_columns(window, 20);
    for (std::int64_t i = 0; i < 20; ++i) {
      const auto at = static_cast<std::size_t>(row * 20 + i);
      const std::int32_t column = columns[static_cast<std::size_t>(i)];
      EXPECT_EQ(op.indices[at], column + 10);
      EXPECT_EQ(op.out_scores[at], window[static_cast<std::size_t>(column)]);
    }
  }
}

TEST(TopkSelect, NoRowsAndNoColumns) {
  Floats none;
  EXPECT_EQ(TopkSelect(view(none, {0, 7}), 3).run(), Ints{});
  // An empty tensor has strides and no address.
  TopkSelect op(strided_view(none.data(), {2, 0}, {1, 1}), 2);
  EXPECT_EQ(op.run(), (Ints{-1, -1, -1, -1}));
  Ints no_table;
  Floats scores{1, 2};
  TopkSelect unmapped(view(scores, {2, 1}), 1);
  unmapped.params.block_table = strided_view(no_table.data(), {2, 0}, {1, 1});
  unmapped.params.page_size = 64;
  EXPECT_EQ(unmapped.run(), (Ints{-1, -1}));
}

// ---- map_to_slots -------------------------------------------------------------------------------

TEST(MapToSlots, RowsOfRequestsInOrder) {
  Ints indices{0, 3, -1, 4, 0, 5, 6, 7};  // [2, 2, 2]
  Ints table{4, 1, 2, kIntMax / 4};       // [2, 2]
  Ints out(8, -77);
  MapToSlotsParams params;
  params.indices = view(indices, {2, 2, 2});
  params.block_table = view(table, {2, 2});
  params.page_size = 4;
  params.out = view(out, {2, 2, 2});
  ASSERT_TRUE(cpu::map_to_slots(params).ok());
  const std::int32_t last_page = kIntMax / 4 * 4;
  EXPECT_EQ(out, (Ints{16, 19, -1, 4, 8, last_page + 1, last_page + 2, last_page + 3}));
}

TEST(MapToSlots, WhatIsNotMappedOrDoesNotFitIsInvalid) {
  Ints indices{kIntMin, -1, kIntMax, 9, 4, 8};
  Ints table{0, kIntMax, -5};
  Ints out(6, -77);
  MapToSlotsParams params;
  params.indices = view(indices, {1, 6});
  params.block_table = view(table, {1, 3});
  params.page_size = 4;
  params.out = view(out, {1, 6});
  ASSERT_TRUE(cpu::map_to_slots(params).ok());
  EXPECT_EQ(out, Ints(6, -1));
}

TEST(MapToSlots, RequestsOutsideTheTable) {
  Ints indices{0, 0, 0, 0};
  Ints table{9};
  Ints requests{0, 1, -1, kIntMin};
  Ints out(4, -77);
  MapToSlotsParams params;
  params.indices = view(indices, {4, 1});
  params.block_table = view(table, {1, 1});
  params.page_size = 1;
  params.row_to_request = view(requests, {4});
  params.out = view(out, {4, 1});
  ASSERT_TRUE(cpu::map_to_slots(params).ok());
  EXPECT_EQ(out, (Ints{9, -1, -1, -1}));
}

TEST(PageTableRow, EntriesPastTheCacheAreInvalid) {
  const Ints entries{2, 3};
  const PageTableRow row{entries.data(), 2, 64, 3};
  EXPECT_EQ(row.page(0), 2);
  EXPECT_EQ(row.page(1), -1);
  EXPECT_EQ(row.page(-1), -1);
  EXPECT_EQ(row.page(2), -1);
  EXPECT_EQ(row.slot(63), 2 * 64 + 63);
  EXPECT_EQ(row.slot(64), -1);
}

// ---- merge_topk ---------------------------------------------------------------------------------

struct MergeTopk {
  MergeTopkParams params;
  Ints out;
  Floats out_scores;

  MergeTopk(TensorView scores, TensorView indices, std::int64_t k) {
    const std::int64_t rows = scores.size(0);
    out.assign(static_cast<std::size_t>(rows * k), -77);
    out_scores.assign(static_cast<std::size_t>(rows * k), 77.0f);
    params.scores = scores;
    params.indices = indices;
    params.topk = k;
    params.out_indices = view(out, {rows, k});
    params.out_scores = view(out_scores, {rows, k});
  }
  const Ints& run() {
    EXPECT_TRUE(cpu::merge_topk(params).ok());
    return out;
  }
};

TEST(MergeTopk, KeepsTheBestInIndexOrder) {
  Floats scores{5, 1, 4, 9, 3, 2};
  Ints indices{30, 20, 10, -1, kIntMin, 40};
  MergeTopk op(view(scores, {1, 6}), view(indices, {1, 6}), 3);
  EXPECT_EQ(op.run(), (Ints{10, 30, 40}));
  EXPECT_EQ(op.out_scores, (Floats{4, 5, 2}));
}

TEST(MergeTopk, TiesGoToTheLowerIndexThenPosition) {
  Floats scores{1, 1, 1, 1, 0.0f, -0.0f};
  Ints indices{9, 7, 8, 7, 3, 2};
  MergeTopk op(view(scores, {1, 6}), view(indices, {1, 6}), 2);
  EXPECT_EQ(op.run(), (Ints{7, 7}));
  MergeTopk five(view(scores, {1, 6}), view(indices, {1, 6}), 5);
  EXPECT_EQ(five.run(), (Ints{2, 7, 7, 8, 9}));
  EXPECT_TRUE(std::signbit(five.out_scores[0]));
}

TEST(MergeTopk, PadsAndRanksNanLowest) {
  Floats scores{kNan, -kInf, 1, 2};
  Ints indices{0, 1, 2, -1};
  MergeTopk op(view(scores, {1, 4}), view(indices, {1, 4}), 2);
  EXPECT_EQ(op.run(), (Ints{1, 2}));
  MergeTopk five(view(scores, {1, 4}), view(indices, {1, 4}), 5);
  EXPECT_EQ(five.run(), (Ints{0, 1, 2, -1, -1}));
  EXPECT_TRUE(std::isnan(five.out_scores[0]));
  EXPECT_EQ(five.out_scores[3], -kInf);
}

TEST(MergeTopk, MergedPartsAreTheWhole) {
  // Selecting from the parts of a row and merging is selecting from the row.
  constexpr std::int64_t kN = 40000;
  constexpr std::int64_t kParts = 5;
  for (const std::size_t kind : {0u, 2u, 3u, 9u, 15u}) {
    SCOPED_TRACE(kinds()[kind].name);
    const Floats row = make_scores(kinds()[kind], kN, 4);
    for (const std::int64_t k : {1, 100, 2048}) {
      Floats scores;
      Ints indices;
      for (std::int64_t part = kParts; part-- > 0;) {
        const std::int64_t begin = part * kN / kParts;
        const Floats piece(row.begin() + begin, row.begin() + (part + 1) * kN / kParts);
        for (const std::int32_t column : selected_columns(piece, k)) {
          scores.push_back(piece[static_cast<std::size_t>(column)]);
          indices.push_back(column + static_cast<std::int32_t>(begin));
        }
      }
      const auto n = static_cast<std::int64_t>(scores.size());
      EXPECT_EQ(MergeTopk(view(scores, {1, n}), view(indices, {1, n}), k).run(),
                expected_columns(row, k));
    }
  }
}

TEST(MergeTopk, AnyStridesAndTypes) {
  std::vector<std::uint16_t> scores{bf16_from_float(1), 0, bf16_from_float(3), 0,
                                    bf16_from_float(2), 0};
  Ints indices{5, 6, 4};
  MergeTopk op(strided_view(scores.data(), {1, 3}, {6, 2}), view(indices, {1, 3}), 2);
  EXPECT_EQ(op.run(), (Ints{4, 6}));
  EXPECT_EQ(op.out_scores, (Floats{2, 3}));
}

TEST(MergeTopk, NoRowsAndNoCandidates) {
  Floats no_scores;
  Ints no_indices;
  EXPECT_EQ(MergeTopk(view(no_scores, {0, 4}), view(no_indices, {0, 4}), 2).run(), Ints{});
  MergeTopk op(strided_view(no_scores.data(), {2, 0}, {1, 1}),
               strided_view(no_indices.data(), {2, 0}, {1, 1}), 1);
  EXPECT_EQ(op.run(), (Ints{-1, -1}));
}

}  // namespace
}  // namespace dsa

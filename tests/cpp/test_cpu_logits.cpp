// SPDX-License-Identifier: Apache-2.0
// The CPU indexer, logits and fused top-k, against double loops. Tensors are exactly as long as
// their shape says, so that a sanitizer sees what hostile metadata would make them read.
#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>

#include "cpu/cpu_kernels.h"
#include "cpu_test_data.h"
#include "view.h"

namespace dsa::cpu {
namespace {

using namespace dsa::test;

constexpr float kGarbage = 12345.0f;

struct Range {
  std::int64_t begin, end;
  bool holds(std::int64_t key) const { return key >= begin && key < end; }
};

double dot(const std::uint8_t* q, const std::uint8_t* k, std::int64_t d) {
  double sum = 0.0;
  for (std::int64_t i = 0; i < d; ++i) sum += double(kE4m3Values[q[i]]) * kE4m3Values[k[i]];
  return sum;
}

// The scores [heads, D] x [D] -> one logit.
double score(const std::uint8_t* q, const float* w, std::int64_t heads, std::int64_t d,
             const std::uint8_t* k, float scale) {
  double sum = 0.0;
  for (std::int64_t h = 0; h < heads; ++h) {
    const double x = dot(q + h * d, k, d);
    sum += w[h] * (x < 0.0 ? 0.0 : x);
  }
  return sum * scale;
}

// ---- flat ---------------------------------------------------------------------------------------

struct Flat {
  Flat(std::int64_t rows, std::int64_t keys, std::int64_t heads_, std::int64_t d_)
      : S(rows), L(keys), H(heads_), D(d_) {
    Random random(static_cast<std::uint32_t>(S * 131 + L * 17 + H));
    q = random.e4m3(S * H * D);
    k = random.e4m3(L * D);
    k_scale = random.floats(L, 0.1f, 1.3f);
    weights = random.floats(S * H);
    start.assign(std::size_t(S), 0);
    end.assign(std::size_t(S), std::int32_t(L));
  }

  template <typename Params>
  void fill(Params& p) {
    p.q = view(q, {S, H, D}, DType::kFloat8E4M3);
    p.k = view(k, {L, D}, DType::kFloat8E4M3);
    p.k_scale = view(k_scale, {L});
    p.weights = view(weights, {S, H});
    p.k_start = view(start, {S});
    p.k_end = view(end, {S});
  }

  Range window(std::int64_t row) const {
    return {std::max(start[std::size_t(row)], 0), std::min<std::int64_t>(end[std::size_t(row)], L)};
  }
  double expected(std::int64_t row, std::int64_t key) const {
    return score(q.data() + row * H * D, weights.data() + row * H, H, D, k.data() + key * D,
                 k_scale[std::size_t(key)]);
  }

  std::vector<float> run(bool clean = true, std::int64_t max_seqlen_k = 0) {
    MqaLogitsParams p;
    fill(p);
    const std::int64_t columns = max_seqlen_k > 0 ? max_seqlen_k : L;
    std::vector<float> out(std::size_t(S * columns), kGarbage);
    p.out = view(out, {S, columns});
    p.clean_logits = clean;
    p.max_seqlen_k = max_seqlen_k;
    EXPECT_TRUE(mqa_logits(p).ok());
    return out;
  }

  struct Topk {
    std::vector<std::int32_t> indices;
    std::vector<float> scores;
  };
  Topk run_topk(std::int64_t k_, bool with_scores) {
    MqaTopkParams p;
    fill(p);
    Topk out{std::vector<std::int32_t>(std::size_t(S * k_), 777), {}};
    p.topk = k_;
    p.indices = view(out.indices, {S, k_});
    if (with_scores) {
      out.scores.assign(std::size_t(S * k_), kGarbage);
      p.scores = view(out.scores, {S, k_});
    }
    EXPECT_TRUE(mqa_topk(p).ok());
    return out;
  }

  std::int64_t S, L, H, D;
  std::vector<std::uint8_t> q, k;
  std::vector<float> k_scale, weights;
  std::vector<std::int32_t> start, end;
};

void check_flat(Flat& flat, const std::vector<float>& out) {
  Difference difference;
  for (std::int64_t i = 0; i < flat.S; ++i) {
    for (std::int64_t s = 0; s < flat.L; ++s) {
      const double expected = flat.window(i).holds(s) ? flat.expected(i, s) : -kInf;
      ASSERT_TRUE(difference.add(out[std::size_t(i * flat.L + s)], expected)) << i << ' ' << s;
    }
  }
  EXPECT_LT(difference.value(), 1e-12);
}

TEST(CpuMqaLogits, ManyShapes) {
  for (const std::int64_t d : {32, 64, 128}) {
    for (const std::int64_t heads : {1, 5, 12, 32, 64}) {
      Flat flat(3, 131, heads, d);
      check_flat(flat, flat.run());
    }
  }
  // More rows than a block, several spans of keys.
  Flat flat(37, 1200, 3, 32);
  check_flat(flat, flat.run());
}

// Windows that a row may be given, whatever the number of keys.
const std::vector<Range> kHostileWindows = {
    {0, 300},           {kIntMin, kIntMax},
    {kIntMax, kIntMin}, {-5, 7},
    {299, kIntMax},     {300, 301},
    {17, 17},           {200, 100},
    {250, 260},         {kIntMin, kIntMin},
    {kIntMax, kIntMax}, {0, -1},
    {128, 256},         {1, 2},
    {127, 129},
};

void set_windows(Flat& flat) {
  for (std::size_t i = 0; i < kHostileWindows.size(); ++i) {
    flat.start[i] = std::int32_t(kHostileWindows[i].begin);
    flat.end[i] = std::int32_t(kHostileWindows[i].end);
  }
}

TEST(CpuMqaLogits, HostileWindows) {
  Flat flat(std::int64_t(kHostileWindows.size()), 300, 4, 64);
  set_windows(flat);
  check_flat(flat, flat.run());

  // Not cleaned: what lies outside is left alone.
  const std::vector<float> out = flat.run(false);
  for (std::int64_t i = 0; i < flat.S; ++i) {
    for (std::int64_t s = 0; s < flat.L; ++s) {
      const float got = out[std::size_t(i * flat.L + s)];
      ASSERT_EQ(got == kGarbage, !flat.window(i).holds(s)) << i << ' ' << s;
    }
  }
}

TEST(CpuMqaLogits, CompressedColumns) {
  Flat flat(std::int64_t(kHostileWindows.size()), 300, 4, 64);
  set_windows(flat);
  const std::vector<float> whole = flat.run();
  for (const std::int64_t columns : {1, 40, 299, 1500}) {
    for (const bool clean : {true, false}) {
      const std::vector<float> out = flat.run(clean, columns);
      for (std::int64_t i = 0; i < flat.S; ++i) {
        const Range window = flat.window(i);
        for (std::int64_t c = 0; c < columns; ++c) {
          const float got = out[std::size_t(i * columns + c)];
          const std::int64_t key = window.begin + c;
          if (window.holds(key)) {
            ASSERT_EQ(got, whole[std::size_t(i * flat.L + key)]) << i << ' ' << c;
          } else {
            ASSERT_EQ(got, clean ? -kInf : kGarbage) << i << ' ' << c;
          }
        }
      }
    }
  }
}

TEST(CpuMqaLogits, Bf16RoundsToNearestEven) {
  Flat flat(5, 150, 8, 128);
  flat.end[2] = 33;
  const std::vector<float> exact = flat.run();
  MqaLogitsParams p;
  flat.fill(p);
  std::vector<std::uint16_t> out(exact.size());
  p.out = view(out, {flat.S, flat.L}, DType::kBFloat16);
  ASSERT_TRUE(mqa_logits(p).ok());
  for (std::size_t i = 0; i < out.size(); ++i) ASSERT_EQ(out[i], bf16_from_float(exact[i])) << i;
}

TEST(CpuMqaLogits, NanKeyOrScaleStaysInItsColumn) {
  Flat flat(3, 90, 5, 32);
  const std::vector<float> before = flat.run();
  flat.k[40 * 32 + 7] = 0xFF;
  flat.k_scale[60] = kNaN;
  const std::vector<float> out = flat.run();
  for (std::int64_t i = 0; i < flat.S; ++i) {
    for (std::int64_t s = 0; s < flat.L; ++s) {
      const std::size_t at = std::size_t(i * flat.L + s);
      if (s == 40 || s == 60) {
        ASSERT_TRUE(std::isnan(out[at])) << s;
      } else {
        ASSERT_EQ(out[at], before[at]) << s;
      }
    }
  }
}

TEST(CpuMqaLogits, PaddingHeadsChangesNoBit) {
  Flat flat(2, 70, 5, 64), padded(2, 70, 9, 64);
  padded.k = flat.k;
  padded.k_scale = flat.k_scale;
  std::fill(padded.q.begin(), padded.q.end(), std::uint8_t{0});
  std::fill(padded.weights.begin(), padded.weights.end(), 0.0f);
  for (std::int64_t i = 0; i < 2; ++i) {
    std::copy_n(flat.q.data() + i * 5 * 64, 5 * 64, padded.q.data() + i * 9 * 64);
    std::copy_n(flat.weights.data() + i * 5, 5, padded.weights.data() + i * 9);
  }
  EXPECT_EQ(flat.run(), padded.run());
}

TEST(CpuMqaLogits, StridedOperands) {
  Flat flat(4, 60, 3, 32);
  const std::vector<float> expected = flat.run();
  // Every leading dimension with a gap, filled with NaN.
  std::vector<std::uint8_t> q(std::size_t(4 * 300), 0x7F), k(std::size_t(60 * 41), 0x7F);
  std::vector<float> scales(180, kNaN), weights(4 * 5, kNaN), out(4 * 77, kGarbage);
  std::vector<std::int32_t> start(12, kIntMax), end(8, kIntMin);
  for (int i = 0; i < 4; ++i) {
    for (int h = 0; h < 3; ++h) {
      std::copy_n(flat.q.data() + (i * 3 + h) * 32, 32, q.data() + i * 300 + h * 50);
    }
    std::copy_n(flat.weights.data() + i * 3, 3, weights.data() + i * 5);
    start[std::size_t(3 * i)] = flat.start[std::size_t(i)];
    end[std::size_t(2 * i)] = flat.end[std::size_t(i)];
  }
  for (int s = 0; s < 60; ++s) {
    std::copy_n(flat.k.data() + s * 32, 32, k.data() + s * 41);
    scales[std::size_t(3 * s)] = flat.k_scale[std::size_t(s)];
  }
  MqaLogitsParams p;
  p.q = strided_view(q.data(), {4, 3, 32}, {300, 50, 1}, DType::kFloat8E4M3);
  p.k = strided_view(k.data(), {60, 32}, {41, 1}, DType::kFloat8E4M3);
  p.k_scale = strided_view(scales.data(), {60}, {3});
  p.weights = strided_view(weights.data(), {4, 3}, {5, 1});
  p.k_start = strided_view(start.data(), {4}, {3});
  p.k_end = strided_view(end.data(), {4}, {2});
  p.out = strided_view(out.data(), {4, 60}, {77, 1});
  ASSERT_TRUE(mqa_logits(p).ok());
  for (int i = 0; i < 4; ++i) {
    for (int s = 0; s < 77; ++s) {
      ASSERT_EQ(out[std::size_t(i * 77 + s)],
                s < 60 ? expected[std::size_t(i * 60 + s)] : kGarbage);
    }
  }
}

TEST(CpuMqaLogits, ABitDependsOnItsRowAlone) {
  Flat flat(21, 2100, 6, 64);
  for (std::int64_t i = 0; i < flat.S; ++i) {
    flat.start[std::size_t(i)] = std::int32_t(i * 31);
    flat.end[std::size_t(i)] = std::int32_t(1400 + i * 33);
  }
  std::vector<float> serial, parallel;
  {
    const Serially guard;
    serial = flat.run();
  }
  {
    const AllAtOnce guard;
    parallel = flat.run();
  }
  EXPECT_EQ(serial, parallel);

  constexpr std::int64_t kRow = 9;
  Flat alone(1, 2100, 6, 64);
  alone.k = flat.k;
  alone.k_scale = flat.k_scale;
  alone.q.assign(flat.q.begin() + kRow * 6 * 64, flat.q.begin() + (kRow + 1) * 6 * 64);
  alone.weights.assign(flat.weights.begin() + kRow * 6, flat.weights.begin() + (kRow + 1) * 6);
  alone.start = {flat.start[kRow]};
  alone.end = {flat.end[kRow]};
  EXPECT_EQ(alone.run(),
            std::vector<float>(serial.begin() + kRow * 2100, serial.begin() + (kRow + 1) * 2100));
}

TEST(CpuMqaLogits, EmptyProblems) {
  EXPECT_TRUE(Flat(0, 5, 2, 32).run().empty());
  EXPECT_TRUE(Flat(3, 0, 2, 32).run().empty());
  EXPECT_EQ(Flat(2, 0, 2, 32).run(true, 3), std::vector<float>(6, -kInf));
}

// ---- flat top-k ---------------------------------------------------------------------------------

// Ascending columns of the k largest of scores[window]: NaN lowest, ties to the lower column.
std::vector<std::int32_t> best(const float* scores, Range window, std::int64_t k) {
  std::vector<std::int32_t> order(
      std::size_t(std::max<std::int64_t>(window.end - window.begin, 0)));
  std::iota(order.begin(), order.end(), std::int32_t(window.begin));
  std::stable_sort(order.begin(), order.end(), [&](std::int32_t a, std::int32_t b) {
    return scores[a] > scores[b] || (!std::isnan(scores[a]) && std::isnan(scores[b]));
  });
  if (std::int64_t(order.size()) > k) order.resize(std::size_t(k));
  std::sort(order.begin(), order.end());
  return order;
}

void check_topk(Flat& flat, std::int64_t k) {
  const std::vector<float> logits = flat.run();
  const Flat::Topk with_scores = flat.run_topk(k, true);
  ASSERT_EQ(flat.run_topk(k, false).indices, with_scores.indices);
  for (std::int64_t i = 0; i < flat.S; ++i) {
    const float* row = logits.data() + i * flat.L;
    std::vector<std::int32_t> expected = best(row, flat.window(i), k);
    expected.resize(std::size_t(k), -1);
    for (std::int64_t c = 0; c < k; ++c) {
      const std::size_t at = std::size_t(i * k + c);
      const std::int32_t key = expected[std::size_t(c)];
      ASSERT_EQ(with_scores.indices[at], key) << i << ' ' << c;
      const float expected_score = key >= 0 ? row[key] : -kInf;
      if (std::isnan(expected_score)) {
        ASSERT_TRUE(std::isnan(with_scores.scores[at]));
      } else {
        ASSERT_EQ(with_scores.scores[at], expected_score) << i << ' ' << c;
      }
    }
  }
}

TEST(CpuMqaTopk, ManyShapes) {
  for (const std::int64_t k : {1, 7, 128, 299, 300, 400}) {
    Flat flat(std::int64_t(kHostileWindows.size()), 300, 4, 64);
    set_windows(flat);
    flat.k_scale[5] = kNaN;
    check_topk(flat, k);
  }
}

TEST(CpuMqaTopk, LongRowsAreCutAndMerged) {
  // One row: ranges of keys. Many rows: chunks of scores.
  for (const std::int64_t rows : {1, 3, 40}) {
    for (const std::int64_t k : {5, 1000, 9000}) {
      Flat flat(rows, 20000, 1, 32);
      flat.start[0] = 123;
      flat.end[0] = 19876;
      flat.k_scale[777] = kNaN;
      check_topk(flat, k);
    }
  }
}

TEST(CpuMqaTopk, TiesGoToTheLowerKey) {
  Flat flat(1, 12000, 1, 32);
  for (std::int64_t s = 1; s < flat.L; ++s) {
    std::copy_n(flat.k.data(), 32, flat.k.data() + s * 32);
  }
  std::fill(flat.k_scale.begin(), flat.k_scale.end(), 1.0f);
  check_topk(flat, 2500);
}

TEST(CpuMqaTopk, EmptyProblems) {
  EXPECT_TRUE(Flat(0, 5, 2, 32).run_topk(4, true).indices.empty());
  EXPECT_EQ(Flat(2, 0, 2, 32).run_topk(3, false).indices, std::vector<std::int32_t>(6, -1));
}

// ---- paged --------------------------------------------------------------------------------------

struct Paged {
  Paged(std::int64_t batch, std::int64_t next, std::int64_t page, std::int64_t width,
        std::int64_t num_pages)
      : B(batch), N(next), page_size(page), P(width), pages(num_pages) {
    Random random(static_cast<std::uint32_t>(B * 7 + N * 3 + page_size));
    q = random.e4m3(B * N * H * D);
    weights = random.floats(B * N * H);
    // The last page ends with its last byte; the others have a gap of NaN behind them.
    stride = page_size * (D + 4) + 8;
    cache.assign(std::size_t(pages > 0 ? (pages - 1) * stride + page_size * (D + 4) : 0), 0x7F);
    for (std::int64_t s = 0; s < pages * page_size; ++s) {
      const std::vector<std::uint8_t> key = random.e4m3(D);
      std::copy(key.begin(), key.end(), cache.begin() + values(s));
      write_bytes(cache, scale(s), random.uniform(0.2f, 1.5f));
    }
    table.resize(std::size_t(B * P));
    for (std::int32_t& entry : table) entry = random.integer(0, std::int32_t(pages) - 1);
    lens.assign(std::size_t(B), std::int32_t(P * page_size));
  }

  std::int64_t values(std::int64_t slot) const {
    return slot / page_size * stride + slot % page_size * D;
  }
  std::int64_t scale(std::int64_t slot) const {
    return slot / page_size * stride + page_size * D + slot % page_size * 4;
  }
  std::int64_t slot(std::int64_t row, std::int64_t key) const {
    const std::int64_t entry = table[std::size_t(row / N * P + key / page_size)];
    return entry >= 0 && entry < pages ? entry * page_size + key % page_size : -1;
  }
  std::int64_t length(std::int64_t row) const {
    const std::int64_t n = lens_2d ? lens[std::size_t(row)]
                                   : std::int64_t{lens[std::size_t(row / N)]} - N + 1 + row % N;
    return std::clamp<std::int64_t>(n, 0, std::min(max_len, P * page_size));
  }
  double expected(std::int64_t row, std::int64_t key) const {
    const std::int64_t at = slot(row, key);
    if (at < 0) return -kInf;
    float k_scale;
    std::memcpy(&k_scale, cache.data() + scale(at), sizeof(k_scale));
    return score(q.data() + row * H * D, weights.data() + row * H, H, D, cache.data() + values(at),
                 k_scale);
  }

  template <typename Params>
  void fill(Params& p) {
    p.q = view(q, {B, N, H, D}, DType::kFloat8E4M3);
    p.kv_cache =
        strided_view(cache.data(), {pages, page_size, 1, D + 4}, {stride, D + 4, D + 4, 1});
    p.weights = view(weights, {B * N, H});
    p.context_lens = lens_2d ? view(lens, {B, N}) : view(lens, {B});
    p.block_table = view(table, {B, P});
    p.max_context_len = max_len;
  }

  std::vector<float> run(bool clean) {
    PagedMqaLogitsParams p;
    fill(p);
    std::vector<float> out(std::size_t(B * N * max_len), kGarbage);
    p.out = view(out, {B * N, max_len});
    p.clean_logits = clean;
    EXPECT_TRUE(paged_mqa_logits(p).ok());
    return out;
  }

  static constexpr std::int64_t H = 3, D = 32;
  std::int64_t B, N, page_size, P, pages, stride;
  std::int64_t max_len = 100;
  bool lens_2d = false;
  std::vector<std::uint8_t> q, cache;
  std::vector<float> weights;
  std::vector<std::int32_t> table, lens;
};

void check_paged(Paged& paged) {
  for (const bool clean : {true, false}) {
    const std::vector<float> out = paged.run(clean);
    Difference difference;
    for (std::int64_t row = 0; row < paged.B * paged.N; ++row) {
      for (std::int64_t c = 0; c < paged.max_len; ++c) {
        const float got = out[std::size_t(row * paged.max_len + c)];
        if (c < paged.length(row)) {
          ASSERT_TRUE(difference.add(got, paged.expected(row, c))) << row << ' ' << c;
        } else {
          ASSERT_EQ(got, clean ? -kInf : kGarbage) << row << ' ' << c;
        }
      }
    }
    EXPECT_LT(difference.value(), 1e-12);
  }
}

TEST(CpuPagedMqaLogits, PageSizesAndLengths) {
  for (const std::int64_t page_size : {1, 7, 64, 300}) {
    for (const std::int64_t next_n : {1, 2, 19}) {
      Paged paged(5, next_n, page_size, 300 / page_size + 1, 9);
      paged.max_len = 310;
      paged.lens = {0, 1, 63, 255, 299};
      check_paged(paged);
    }
  }
}

TEST(CpuPagedMqaLogits, HostileMetadata) {
  Paged paged(9, 2, 7, 12, 4);
  paged.lens = {kIntMin, kIntMax, -1, 0, 1, 84, 85, 40, 2};
  constexpr std::int32_t kEntries[] = {-1, 4, kIntMin, kIntMax, 0, 3};
  for (std::size_t i = 0; i < paged.table.size(); ++i) {
    if (i % 3 != 0) paged.table[i] = kEntries[i % 6];
  }
  for (const std::int64_t max_len : {1, 40, 84, 200}) {
    paged.max_len = max_len;
    check_paged(paged);
  }
  paged.lens_2d = true;
  paged.lens.resize(18, 33);
  check_paged(paged);
}

TEST(CpuPagedMqaLogits, NoPagesAtAll) {
  Paged paged(2, 1, 4, 3, 1);
  paged.pages = 0;
  paged.cache.clear();
  check_paged(paged);
  Paged no_rows(0, 2, 4, 3, 1);
  EXPECT_TRUE(no_rows.run(true).empty());
}

// NaN bytes in every page that no request holds, and past every request's length.
TEST(CpuPagedMqaLogits, WhatIsNotSelectedIsNotSeen) {
  Paged paged(1, 1, 8, 4, 10);
  paged.table = {2, 5, 2, 9};
  paged.lens = {27};
  for (std::int64_t slot = 0; slot < 80; ++slot) {
    const std::int64_t page = slot / 8;
    if (page == 2 || page == 5 || (page == 9 && slot % 8 < 3)) continue;
    std::fill_n(paged.cache.data() + paged.values(slot), Paged::D, std::uint8_t{0xFF});
    write_bytes(paged.cache, paged.scale(slot), kNaN);
  }
  check_paged(paged);
}

struct PagedTopk {
  std::vector<std::int32_t> indices;
  std::vector<float> scores;
};

PagedTopk run_paged_topk(Paged& paged, std::int64_t k, bool slots) {
  PagedMqaTopkParams p;
  paged.fill(p);
  const std::int64_t rows = paged.B * paged.N;
  PagedTopk out{std::vector<std::int32_t>(std::size_t(rows * k), 777),
                std::vector<float>(std::size_t(rows * k), kGarbage)};
  p.topk = k;
  p.return_slots = slots;
  p.indices = view(out.indices, {rows, k});
  p.scores = view(out.scores, {rows, k});
  EXPECT_TRUE(paged_mqa_topk(p).ok());
  return out;
}

void check_paged_topk(Paged& paged, std::int64_t k) {
  const std::vector<float> logits = paged.run(true);
  const PagedTopk tokens = run_paged_topk(paged, k, false);
  const PagedTopk slots = run_paged_topk(paged, k, true);
  EXPECT_EQ(tokens.scores, slots.scores);
  for (std::int64_t row = 0; row < paged.B * paged.N; ++row) {
    const float* scores = logits.data() + row * paged.max_len;
    std::vector<std::int32_t> expected = best(scores, {0, paged.length(row)}, k);
    expected.resize(std::size_t(k), -1);
    for (std::int64_t c = 0; c < k; ++c) {
      const std::size_t at = std::size_t(row * k + c);
      const std::int32_t token = expected[std::size_t(c)];
      ASSERT_EQ(tokens.indices[at], token) << row << ' ' << c;
      ASSERT_EQ(slots.indices[at], token < 0 ? -1 : paged.slot(row, token)) << row << ' ' << c;
      ASSERT_EQ(tokens.scores[at], token < 0 ? -kInf : scores[token]) << row << ' ' << c;
    }
  }
}

TEST(CpuPagedMqaTopk, TokensAndSlots) {
  Paged paged(5, 2, 7, 60, 9);
  paged.max_len = 410;
  paged.lens = {0, 1, 63, kIntMax, 300};
  paged.table[4 * 60 + 3] = -1;
  paged.table[3 * 60] = 9;
  for (const std::int64_t k : {1, 20, 405, 500}) check_paged_topk(paged, k);
}

TEST(CpuPagedMqaTopk, OneLongRequest) {
  Paged paged(1, 1, 64, 200, 50);
  paged.max_len = 12800;
  paged.lens = {12345};
  check_paged_topk(paged, 64);
  check_paged_topk(paged, 2048);
}

}  // namespace
}  // namespace dsa::cpu

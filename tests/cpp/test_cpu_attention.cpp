// SPDX-License-Identifier: Apache-2.0
// CPU attention, sparse prefill and cached decoding, against double loops over the dequantised
// rows. Caches are exactly as long as their shape says and rows nobody selected are NaN, so that
// both a sanitizer and the result show a stray read.
#include <gtest/gtest.h>

#include <algorithm>
#include <set>
#include <string>

#include "cpu/cpu_kernels.h"
#include "cpu_test_data.h"
#include "dsa/kv_layout.h"
#include "view.h"

namespace dsa::cpu {
namespace {

using namespace dsa::test;

constexpr float kGarbage = 12345.0f;
constexpr double kMaxDifference = 5e-6;

// ---- the oracle ---------------------------------------------------------------------------------

using Row = std::vector<float>;

struct Expected {
  std::vector<double> out;
  double max = -kInf;
  double lse = kInf;
};

Expected attend(const Row& q, const std::vector<Row>& rows, double scale, std::int64_t d_v,
                const float* sink) {
  Expected e;
  e.out.assign(std::size_t(d_v), 0.0);
  std::vector<double> scores;
  for (const Row& row : rows) {
    double dot = 0.0;
    for (std::size_t d = 0; d < q.size(); ++d) dot += double(q[d]) * row[d];
    scores.push_back(dot * scale);
    if (!(scores.back() <= e.max)) e.max = std::isnan(e.max) ? e.max : scores.back();
  }
  if (e.max == -kInf) return e;
  double sum = 0.0;
  for (std::size_t t = 0; t < rows.size(); ++t) {
    const double p = std::exp(scores[t] - e.max);
    sum += p;
    for (std::size_t d = 0; d < e.out.size(); ++d) e.out[d] += p * rows[t][d];
  }
  e.lse = e.max + std::log(sum);
  const double share = sink == nullptr ? 1.0 : 1.0 / (1.0 + std::exp(double(*sink) - e.lse));
  for (double& x : e.out) x *= share / sum;
  return e;
}

bool close(float got, double expected) {
  if (std::isnan(expected)) return std::isnan(got);
  if (std::isinf(expected)) return double(got) == expected;
  return std::abs(got - expected) <= std::max(1e-6, 1e-5 * std::abs(expected));
}

// ---- sparse prefill -----------------------------------------------------------------------------

struct Sparse {
  Sparse(std::int64_t s_q, std::int64_t h_q, std::int64_t s_kv, std::int64_t topk_,
         std::int64_t d_qk_, std::int64_t d_v_, DType dtype_ = DType::kBFloat16)
      : S(s_q), H(h_q), L(s_kv), topk(topk_), d_qk(d_qk_), d_v(d_v_), dtype(dtype_) {
    Random random(static_cast<std::uint32_t>(S + 3 * H + 5 * L + 7 * topk + d_qk));
    q = random.half(S * H * d_qk, dtype);
    kv = random.half(L * d_qk, dtype);
    indices.resize(std::size_t(S * topk));
    for (std::int32_t& i : indices) i = random.integer(0, std::int32_t(L) - 1);
  }

  struct Result {
    std::vector<std::uint16_t> out;
    std::vector<float> max, lse;
    friend bool operator==(const Result&, const Result&) = default;
  };

  Result run() {
    SparseFwdParams p;
    Result r{std::vector<std::uint16_t>(std::size_t(S * H * d_v), 0x7FFF),
             std::vector<float>(std::size_t(S * H), kGarbage),
             std::vector<float>(std::size_t(S * H), kGarbage)};
    p.q = view(q, {S, H, d_qk}, dtype);
    p.kv = view(kv, {L, 1, d_qk}, dtype);
    p.indices = view(indices, {S, 1, topk});
    p.sm_scale = scale;
    p.d_v = d_v;
    if (!sink.empty()) p.attn_sink = view(sink, {H});
    if (!length.empty()) p.topk_length = view(length, {S});
    p.out = view(r.out, {S, H, d_v}, dtype);
    p.max_logits = view(r.max, {S, H});
    p.lse = view(r.lse, {S, H});
    EXPECT_TRUE(sparse_fwd(p).ok());
    return r;
  }

  std::vector<Row> rows(std::int64_t token) const {
    std::int64_t count = topk;
    if (!length.empty()) count = std::clamp<std::int64_t>(length[std::size_t(token)], 0, topk);
    std::vector<Row> rows;
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t slot = indices[std::size_t(token * topk + i)];
      if (slot >= 0 && slot < L) rows.push_back(row(kv, slot));
    }
    return rows;
  }
  Row row(const std::vector<std::uint16_t>& from, std::int64_t index) const {
    Row row;
    for (std::int64_t d = 0; d < d_qk; ++d) {
      row.push_back(half_to_float(from[std::size_t(index * d_qk + d)], dtype));
    }
    return row;
  }

  std::int64_t S, H, L, topk, d_qk, d_v;
  DType dtype;
  double scale = 0.11;
  std::vector<std::uint16_t> q, kv;
  std::vector<std::int32_t> indices, length;
  std::vector<float> sink;
};

void check(Sparse& s) {
  const Sparse::Result got = s.run();
  Difference difference;
  for (std::int64_t i = 0; i < s.S; ++i) {
    const std::vector<Row> rows = s.rows(i);
    for (std::int64_t h = 0; h < s.H; ++h) {
      const std::size_t at = std::size_t(i * s.H + h);
      const Expected e = attend(s.row(s.q, i * s.H + h), rows, s.scale, s.d_v,
                                s.sink.empty() ? nullptr : &s.sink[std::size_t(h)]);
      ASSERT_TRUE(close(got.max[at], e.max)) << got.max[at] << " for " << e.max;
      ASSERT_TRUE(close(got.lse[at], e.lse)) << got.lse[at] << " for " << e.lse;
      for (std::int64_t d = 0; d < s.d_v; ++d) {
        const float out = half_to_float(got.out[at * std::size_t(s.d_v) + std::size_t(d)], s.dtype);
        ASSERT_TRUE(difference.add(out, e.out[std::size_t(d)])) << i << ' ' << h << ' ' << d;
      }
    }
  }
  EXPECT_LT(difference.value(), kMaxDifference);
}

TEST(CpuSparseFwd, HeadsAndWidths) {
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    for (const std::int64_t heads : {1, 3, 16, 17, 128}) {
      Sparse s(2, heads, 90, 70, 96, 64, dtype);
      check(s);
    }
  }
  constexpr std::int64_t kWidths[][2] = {{64, 64}, {192, 128}, {576, 512}, {512, 512}, {544, 512}};
  for (const auto& [d_qk, d_v] : kWidths) {
    Sparse s(3, 5, 200, 130, d_qk, d_v);
    check(s);
  }
}

TEST(CpuSparseFwd, AnyTopk) {
  for (const std::int64_t topk : {0, 1, 2, 63, 64, 65, 191, 1000}) {
    Sparse s(2, 4, 50, topk, 64, 64);
    check(s);
  }
}

TEST(CpuSparseFwd, InvalidSlotsAreNeverRead) {
  Sparse s(4, 6, 40, 150, 96, 64);
  constexpr std::int32_t kBad[] = {-1, 40, kIntMin, kIntMax, -40, 41};
  for (std::size_t i = 0; i < s.indices.size(); ++i) {
    if (i % 3 != 1) s.indices[i] = kBad[i % 6];
  }
  // A token with nothing valid, and one whose only valid slot is its last.
  std::fill_n(s.indices.begin() + 150, 150, -1);
  std::fill_n(s.indices.begin() + 300, 150, 40);
  s.indices[449] = 39;
  // Rows nobody selected.
  const std::set<std::int32_t> selected(s.indices.begin(), s.indices.end());
  for (std::int32_t slot = 0; slot < 40; ++slot) {
    if (!selected.count(slot)) {
      std::fill_n(s.kv.begin() + slot * s.d_qk, s.d_qk, std::uint16_t{0x7FC0});
    }
  }
  check(s);

  s.length = {kIntMin, 0, kIntMax, 77};
  check(s);
}

TEST(CpuSparseFwd, NoKeysAtAll) {
  Sparse s(2, 3, 1, 4, 64, 64);
  s.L = 0;
  s.kv.clear();
  check(s);
  EXPECT_TRUE(Sparse(0, 3, 4, 4, 64, 64).run().out.empty());
}

TEST(CpuSparseFwd, RepeatsCountEachTime) {
  Sparse s(1, 2, 2, 5, 64, 64);
  s.indices = {1, 0, 1, 1, 1};
  check(s);
}

TEST(CpuSparseFwd, AttentionSink) {
  Sparse s(2, 6, 40, 80, 64, 64);
  s.sink = {0.0f, 5.0f, -3.0f, kInf, -kInf, 200.0f};
  check(s);
  std::fill_n(s.indices.begin(), 80, -1);  // and on a row with nothing valid
  check(s);
}

TEST(CpuSparseFwd, AnyScale) {
  for (const double scale : {0.0, -0.3, 1e-30, 20.0, -20.0}) {
    Sparse s(2, 3, 60, 100, 96, 64);
    s.scale = scale;
    check(s);
  }
}

// Tiles whose maximum rises and falls.
TEST(CpuSparseFwd, MaximumAnywhere) {
  Sparse s(6, 2, 400, 400, 64, 64);
  s.scale = 3.0;
  for (std::int64_t i = 0; i < s.S; ++i) {
    for (std::int64_t t = 0; t < 400; ++t) {
      s.indices[std::size_t(i * 400 + t)] = std::int32_t(t);
    }
  }
  for (std::int64_t t = 0; t < 400; ++t) {
    const float size = 0.02f * float((t * 7) % 400);
    for (std::int64_t d = 0; d < 64; ++d) {
      s.kv[std::size_t(t * 64 + d)] = bf16_from_float(size * (d % 2 == 0 ? 1.0f : 0.5f));
    }
  }
  check(s);
}

constexpr std::uint16_t kBf16Inf = 0x7F80;
constexpr std::uint16_t kBf16NaN = 0x7FC0;

// d_qk - d_v = 32 values that take part in the score alone.
struct SpecialScores : Sparse {
  SpecialScores() : Sparse(1, 3, 150, 150, 96, 64) {
    for (std::int32_t t = 0; t < 150; ++t) indices[std::size_t(t)] = t;
    for (std::int64_t h = 0; h < H; ++h) q[std::size_t(h * d_qk + 80)] = bf16_from_float(1.0f);
  }
  void set(std::int64_t t, std::uint16_t code) { kv[std::size_t(t * d_qk + 80)] = code; }
};

TEST(CpuSparseFwd, MinusInfinityIsProbabilityZero) {
  for (const std::int64_t count : {1, 63, 64, 70, 149, 150}) {  // from the front
    SpecialScores s;
    for (std::int64_t t = 0; t < count; ++t) s.set(t, kBf16Inf | 0x8000);
    check(s);
  }
  for (const std::int64_t first : {1, 64, 100}) {  // to the end
    SpecialScores s;
    for (std::int64_t t = first; t < 150; ++t) s.set(t, kBf16Inf | 0x8000);
    check(s);
  }
}

TEST(CpuSparseFwd, NanAndInfinityStayInTheirHead) {
  for (const std::uint16_t code : {kBf16NaN, kBf16Inf}) {
    for (const std::int64_t t : {0, 70, 149}) {
      for (const bool only_minus_inf : {false, true}) {
        SpecialScores s;
        if (only_minus_inf) {
          for (std::int64_t i = 0; i < 150; ++i) s.set(i, kBf16Inf | 0x8000);
        }
        s.set(t, code);
        const Sparse::Result got = s.run();
        for (std::size_t h = 0; h < 3; ++h) {
          EXPECT_TRUE(std::isnan(got.lse[h]));
          EXPECT_EQ(std::isnan(got.max[h]), code == kBf16NaN);
          for (std::size_t d = 0; d < 64; ++d) {
            ASSERT_TRUE(std::isnan(bf16_to_float(got.out[h * 64 + d])));
          }
        }
      }
    }
  }
  // A NaN query spoils its own head.
  Sparse s(2, 20, 50, 80, 64, 64);
  const Sparse::Result before = s.run();
  s.q[std::size_t(7 * 64 + 5)] = kBf16NaN;
  const Sparse::Result after = s.run();
  for (std::size_t i = 0; i < 40; ++i) {
    if (i == 7) {
      EXPECT_TRUE(std::isnan(after.lse[i]) && std::isnan(after.max[i]));
    } else {
      EXPECT_EQ(after.lse[i], before.lse[i]);
      EXPECT_TRUE(std::equal(after.out.begin() + i * 64, after.out.begin() + (i + 1) * 64,
                             before.out.begin() + i * 64));
    }
  }
}

TEST(CpuSparseFwd, ABitDependsOnItsTokenAlone) {
  Sparse s(9, 40, 300, 333, 96, 64);
  Sparse::Result serial, parallel;
  {
    const Serially guard;
    serial = s.run();
  }
  {
    const AllAtOnce guard;
    parallel = s.run();
  }
  EXPECT_TRUE(serial == parallel);

  constexpr std::int64_t kToken = 4;
  Sparse alone(1, 40, 300, 333, 96, 64);
  alone.kv = s.kv;
  alone.q.assign(s.q.begin() + kToken * 40 * 96, s.q.begin() + (kToken + 1) * 40 * 96);
  alone.indices.assign(s.indices.begin() + kToken * 333, s.indices.begin() + (kToken + 1) * 333);
  const Sparse::Result one = alone.run();
  EXPECT_TRUE(std::equal(one.out.begin(), one.out.end(), serial.out.begin() + kToken * 40 * 64));
  EXPECT_TRUE(std::equal(one.lse.begin(), one.lse.end(), serial.lse.begin() + kToken * 40));
}

TEST(CpuSparseFwd, StridedOperands) {
  Sparse s(2, 3, 20, 30, 64, 64);
  const Sparse::Result expected = s.run();
  std::vector<std::uint16_t> q(2 * 300, kBf16NaN), kv(20 * 71, kBf16NaN), out(2 * 400, 1);
  std::vector<std::int32_t> indices(2 * 37, kIntMax);
  std::vector<float> max(20, kGarbage), lse(30, kGarbage);
  for (int i = 0; i < 2; ++i) {
    for (int h = 0; h < 3; ++h) {
      std::copy_n(s.q.data() + (i * 3 + h) * 64, 64, q.data() + i * 300 + h * 80);
    }
    std::copy_n(s.indices.data() + i * 30, 30, indices.data() + i * 37);
  }
  for (int t = 0; t < 20; ++t) std::copy_n(s.kv.data() + t * 64, 64, kv.data() + t * 71);
  SparseFwdParams p;
  p.q = strided_view(q.data(), {2, 3, 64}, {300, 80, 1}, DType::kBFloat16);
  p.kv = strided_view(kv.data(), {20, 1, 64}, {71, 64, 1}, DType::kBFloat16);
  p.indices = strided_view(indices.data(), {2, 1, 30}, {37, 30, 1});
  p.sm_scale = s.scale;
  p.d_v = 64;
  p.out = strided_view(out.data(), {2, 3, 64}, {400, 100, 1}, DType::kBFloat16);
  p.max_logits = strided_view(max.data(), {2, 3}, {10, 2});
  p.lse = strided_view(lse.data(), {2, 3}, {1, 10});
  ASSERT_TRUE(sparse_fwd(p).ok());
  for (int i = 0; i < 2; ++i) {
    for (int h = 0; h < 3; ++h) {
      const std::size_t at = std::size_t(i * 3 + h);
      EXPECT_EQ(lse[std::size_t(i + 10 * h)], expected.lse[at]);
      EXPECT_EQ(max[std::size_t(10 * i + 2 * h)], expected.max[at]);
      EXPECT_TRUE(std::equal(out.begin() + i * 400 + h * 100, out.begin() + i * 400 + h * 100 + 64,
                             expected.out.begin() + std::int64_t(at) * 64));
    }
  }
  EXPECT_EQ(std::count(out.begin(), out.end(), 1), 2 * 400 - 6 * 64);
}

// ---- caches -------------------------------------------------------------------------------------

enum class Format { kBf16, kF16, kV32, kV4 };

// A paged cache with gaps between its pages, and what its rows hold.
struct Cache {
  Cache(Format format_, std::int64_t pages_, std::int64_t page_size_, std::uint32_t seed)
      : format(format_), pages(pages_), page_size(page_size_) {
    Random random(seed);
    const bool half = format == Format::kBf16 || format == Format::kF16;
    d_qk = format == Format::kV4 ? 512 : 576;
    token_bytes = half ? d_qk * 2 : format == Format::kV32 ? 656 : 584;
    stride = page_size * token_bytes + 16;
    bytes.assign(std::size_t(pages > 0 ? (pages - 1) * stride + page_size * token_bytes : 0), 0xFF);
    for (std::int64_t page = 0; page < pages; ++page) {
      for (std::int64_t token = 0; token < page_size; ++token) {
        rows.push_back(half                     ? half_row(random, page, token)
                       : format == Format::kV32 ? v32_row(random, page, token)
                                                : v4_row(random, page, token));
      }
    }
  }

  DType q_dtype() const { return format == Format::kF16 ? DType::kFloat16 : DType::kBFloat16; }
  bool fp8() const { return format == Format::kV32 || format == Format::kV4; }
  std::int64_t num_slots() const { return pages * page_size; }

  TensorView tensor() {
    const std::int64_t size = fp8() ? 1 : 2;
    const std::int64_t width = token_bytes / size;
    return strided_view(bytes.data(), {pages, page_size, 1, width},
                        {stride / size, width, width, 1}, fp8() ? DType::kUInt8 : q_dtype());
  }

  // NaN over a row, wherever its parts stand.
  void poison(std::int64_t slot) {
    const std::int64_t page = slot / page_size * stride, token = slot % page_size;
    if (format == Format::kV4) {
      const MlaV4Layout layout{page_size};
      std::fill_n(bytes.begin() + page + layout.values(token), layout.kDataBytes, 0xFF);
      std::fill_n(bytes.begin() + page + layout.scales(token), layout.kScaleBytes, 0xFF);
    } else {
      std::fill_n(bytes.begin() + page + token * token_bytes, token_bytes, 0xFF);
    }
  }

  Format format;
  std::int64_t pages, page_size, d_qk, token_bytes, stride;
  std::vector<std::uint8_t> bytes;
  std::vector<Row> rows;

 private:
  void rope(Random& random, std::int64_t at, Row& row) {
    for (std::int64_t i = 0; i < 64; ++i) {
      const std::uint16_t code = bf16_from_float(random.uniform(-1.0f, 1.0f));
      write_bytes(bytes, at + 2 * i, code);
      row.push_back(bf16_to_float(code));
    }
  }
  Row half_row(Random& random, std::int64_t page, std::int64_t token) {
    Row row;
    for (const std::uint16_t code : random.half(d_qk, q_dtype())) {
      write_bytes(bytes, page * stride + token * token_bytes + 2 * std::int64_t(row.size()), code);
      row.push_back(half_to_float(code, q_dtype()));
    }
    return row;
  }
  Row v32_row(Random& random, std::int64_t page, std::int64_t token) {
    const std::int64_t base = page * stride;
    Row row;
    for (std::int64_t g = 0; g < 4; ++g) {
      const float scale = random.uniform(0.1f, 0.35f);  // no power of two
      write_bytes(bytes, base + MlaV32Layout::scales(token) + 4 * g, scale);
      for (const std::uint8_t code : random.e4m3(128)) {
        write_bytes(bytes, base + MlaV32Layout::values(token) + std::int64_t(row.size()), code);
        row.push_back(e4m3_decode(code) * scale);
      }
    }
    rope(random, base + MlaV32Layout::rope(token), row);
    return row;
  }
  Row v4_row(Random& random, std::int64_t page, std::int64_t token) {
    const MlaV4Layout layout{page_size};
    const std::int64_t base = page * stride;
    Row row;
    for (std::int64_t g = 0; g < 7; ++g) {
      const auto scale = std::uint8_t(random.integer(122, 126));
      write_bytes(bytes, base + layout.scales(token) + g, scale);
      for (const std::uint8_t code : random.e4m3(64)) {
        write_bytes(bytes, base + layout.values(token) + std::int64_t(row.size()), code);
        row.push_back(e4m3_decode(code) * ue8m0_decode(scale));
      }
    }
    rope(random, base + layout.rope(token), row);
    return row;
  }
};

struct Decode {
  Decode(Cache& cache_, std::int64_t batch, std::int64_t queries, std::int64_t heads)
      : cache(cache_), B(batch), S(queries), H(heads) {
    q = Random(77).half(B * S * H * cache.d_qk, cache.q_dtype());
  }

  struct Result {
    std::vector<std::uint16_t> out;
    std::vector<float> lse;
    friend bool operator==(const Result&, const Result&) = default;
  };

  Result run() {
    KvCacheFwdParams p;
    Result r{std::vector<std::uint16_t>(std::size_t(B * S * H * 512), 0x7FFF),
             std::vector<float>(std::size_t(B * S * H), kGarbage)};
    p.q = view(q, {B, S, H, cache.d_qk}, cache.q_dtype());
    p.k_cache = cache.tensor();
    p.is_fp8_kvcache = cache.fp8();
    p.head_dim_v = 512;
    p.softmax_scale = scale;
    p.causal = causal;
    if (sparse) {
      p.indices = view(indices, {B, S, topk});
      if (!length.empty()) p.topk_length = length_view(length);
    } else {
      p.block_table = view(table, {B, P});
      p.cache_seqlens = view(seqlens, {B});
    }
    if (extra != nullptr) {
      p.extra_k_cache = extra->tensor();
      p.extra_indices = view(extra_indices, {B, S, extra_topk});
      if (!extra_length.empty()) p.extra_topk_length = length_view(extra_length);
    }
    if (!sink.empty()) p.attn_sink = view(sink, {H});
    p.out = view(r.out, {B, S, H, 512}, cache.q_dtype());
    p.lse = view(r.lse, {B, H, S});
    EXPECT_TRUE(kvcache_fwd(p).ok());
    return r;
  }

  TensorView length_view(std::vector<std::int32_t>& v) {
    return std::int64_t(v.size()) == B ? view(v, {B}) : view(v, {B, S});
  }

  // Slots that query j of request b attends to, valid ones only.
  std::vector<const Row*> rows(std::int64_t b, std::int64_t j) const {
    std::vector<const Row*> rows;
    if (sparse) {
      list(cache, indices, topk, length, b, j, rows);
      if (extra != nullptr) list(*extra, extra_indices, extra_topk, extra_length, b, j, rows);
      return rows;
    }
    const std::int64_t n =
        std::clamp<std::int64_t>(seqlens[std::size_t(b)], 0, P * cache.page_size);
    for (std::int64_t t = 0; t < (causal ? n - S + 1 + j : n); ++t) {
      const std::int64_t page = table[std::size_t(b * P + t / cache.page_size)];
      if (page < 0 || page >= cache.pages) continue;
      rows.push_back(&cache.rows[std::size_t(page * cache.page_size + t % cache.page_size)]);
    }
    return rows;
  }

  void list(const Cache& from, const std::vector<std::int32_t>& slots, std::int64_t width,
            const std::vector<std::int32_t>& lengths, std::int64_t b, std::int64_t j,
            std::vector<const Row*>& rows) const {
    std::int64_t count = width;
    if (!lengths.empty()) {
      const std::int64_t at = std::int64_t(lengths.size()) == B ? b : b * S + j;
      count = std::clamp<std::int64_t>(lengths[std::size_t(at)], 0, width);
    }
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t slot = slots[std::size_t((b * S + j) * width + i)];
      if (slot >= 0 && slot < from.num_slots()) rows.push_back(&from.rows[std::size_t(slot)]);
    }
  }

  void select(std::int64_t topk_) {
    topk = topk_;
    indices = slots(cache, topk, 5);
  }
  void select_extra(Cache& from, std::int64_t topk_) {
    extra = &from;
    extra_topk = topk_;
    extra_indices = slots(from, topk_, 6);
  }
  std::vector<std::int32_t> slots(const Cache& from, std::int64_t width, std::uint32_t seed) const {
    Random random(seed);
    std::vector<std::int32_t> v(std::size_t(B * S * width));
    const auto most = std::int32_t(from.num_slots());
    for (std::int32_t& slot : v) slot = random.integer(-most / 4, most + most / 4);
    return v;
  }

  Cache& cache;
  std::int64_t B, S, H;
  double scale = 0.07;
  std::vector<std::uint16_t> q;
  bool sparse = true;
  std::int64_t topk = 0;
  std::vector<std::int32_t> indices, length;
  Cache* extra = nullptr;
  std::int64_t extra_topk = 0;
  std::vector<std::int32_t> extra_indices, extra_length;
  bool causal = false;
  std::int64_t P = 0;
  std::vector<std::int32_t> table, seqlens;
  std::vector<float> sink;
};

// NaN in every row that no query attends to; the oracle keeps the values.
void poison_unselected(const Decode& d, Cache& cache) {
  std::set<const Row*> selected;
  for (std::int64_t b = 0; b < d.B; ++b) {
    for (std::int64_t j = 0; j < d.S; ++j) {
      for (const Row* row : d.rows(b, j)) selected.insert(row);
    }
  }
  for (std::int64_t slot = 0; slot < cache.num_slots(); ++slot) {
    if (!selected.count(&cache.rows[std::size_t(slot)])) cache.poison(slot);
  }
}

void check(Decode& d) {
  poison_unselected(d, d.cache);
  if (d.extra != nullptr) poison_unselected(d, *d.extra);
  const Decode::Result got = d.run();
  Difference difference;
  for (std::int64_t b = 0; b < d.B; ++b) {
    for (std::int64_t j = 0; j < d.S; ++j) {
      std::vector<Row> rows;
      for (const Row* row : d.rows(b, j)) rows.push_back(*row);
      for (std::int64_t h = 0; h < d.H; ++h) {
        const std::int64_t at = (b * d.S + j) * d.H + h;
        Row q;
        for (std::int64_t i = 0; i < d.cache.d_qk; ++i) {
          q.push_back(half_to_float(d.q[std::size_t(at * d.cache.d_qk + i)], d.cache.q_dtype()));
        }
        const Expected e =
            attend(q, rows, d.scale, 512, d.sink.empty() ? nullptr : &d.sink[std::size_t(h)]);
        const float lse = got.lse[std::size_t((b * d.H + h) * d.S + j)];
        ASSERT_TRUE(close(lse, e.lse)) << lse << " for " << e.lse;
        for (std::int64_t i = 0; i < 512; ++i) {
          const float out = half_to_float(got.out[std::size_t(at * 512 + i)], d.cache.q_dtype());
          ASSERT_TRUE(difference.add(out, e.out[std::size_t(i)])) << b << ' ' << j << ' ' << h;
        }
      }
    }
  }
  EXPECT_LT(difference.value(), kMaxDifference);
}

std::string format_name(const testing::TestParamInfo<Format>& format) {
  switch (format.param) {
    case Format::kBf16: return "Bf16";
    case Format::kF16: return "F16";
    case Format::kV32: return "V32";
    case Format::kV4: break;
  }
  return "V4";
}

class CpuKvCacheFwd : public testing::TestWithParam<Format> {};
INSTANTIATE_TEST_SUITE_P(Format, CpuKvCacheFwd,
                         testing::Values(Format::kBf16, Format::kF16, Format::kV32, Format::kV4),
                         format_name);

TEST_P(CpuKvCacheFwd, Sparse) {
  for (const std::int64_t page_size : {1, 7, 64}) {
    Cache cache(GetParam(), 130 / page_size, page_size, 1);
    Decode d(cache, 2, 2, 5);
    d.select(90);
    check(d);
  }
}

TEST_P(CpuKvCacheFwd, SparseLengthsSinkAndExtraCache) {
  Cache cache(GetParam(), 5, 16, 1), extra(GetParam(), 9, 3, 2);
  Decode d(cache, 3, 2, 4);
  d.select(70);
  d.select_extra(extra, 33);
  d.sink = {0.5f, kInf, -kInf, 3.0f};
  check(d);
  d.length = {kIntMin, kIntMax, 65};
  check(d);
  d.extra_length = {33, 0, -7, 1, kIntMax, 20};
  check(d);
}

TEST_P(CpuKvCacheFwd, SparseNothingValid) {
  Cache cache(GetParam(), 2, 4, 1);
  Decode d(cache, 2, 1, 3);
  d.select(5);
  d.indices = {-1, kIntMin, kIntMax, 8, 9, 8, 7, -8, 100, -1};
  check(d);
  Cache none(GetParam(), 0, 4, 1);
  Decode nothing(none, 1, 1, 3);
  nothing.select(5);
  nothing.indices = {0, 1, -1, 5, kIntMax};
  check(nothing);
}

TEST_P(CpuKvCacheFwd, Dense) {
  for (const bool causal : {false, true}) {
    Cache cache(GetParam(), 12, 13, 1);
    Decode d(cache, 6, 3, 4);
    d.sparse = false;
    d.causal = causal;
    d.P = 8;
    d.seqlens = {0, 1, 2, 100, kIntMax, kIntMin};
    Random random(9);
    d.table.resize(48);
    for (std::int32_t& entry : d.table) entry = random.integer(0, 11);
    d.table[3 * 8 + 1] = -1;
    d.table[3 * 8 + 2] = 12;
    d.table[4 * 8] = kIntMin;
    d.table[4 * 8 + 7] = kIntMax;
    check(d);
    d.sink = {0.5f, kInf, -kInf, 3.0f};
    check(d);
  }
}

TEST_P(CpuKvCacheFwd, ABitDependsOnItsRequestAlone) {
  Cache cache(GetParam(), 10, 64, 1);
  Decode d(cache, 3, 1, 48);
  d.select(300);
  Decode::Result serial, parallel;
  {
    const Serially guard;
    serial = d.run();
  }
  {
    const AllAtOnce guard;
    parallel = d.run();
  }
  EXPECT_TRUE(serial == parallel);

  Decode alone(cache, 1, 1, 48);
  alone.topk = 300;
  alone.indices.assign(d.indices.begin() + 300, d.indices.begin() + 600);
  alone.q.assign(d.q.begin() + 48 * cache.d_qk, d.q.begin() + 2 * 48 * cache.d_qk);
  const Decode::Result one = alone.run();
  EXPECT_TRUE(std::equal(one.out.begin(), one.out.end(), serial.out.begin() + 48 * 512));
  EXPECT_TRUE(std::equal(one.lse.begin(), one.lse.end(), serial.lse.begin() + 48));
}

}  // namespace
}  // namespace dsa::cpu

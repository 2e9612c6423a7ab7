// SPDX-License-Identifier: Apache-2.0
// Cache writes and gathers, byte by byte. Offsets are written out here as the layout's
// documentation gives them, not taken from kv_layout.h.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
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
using Ints = std::vector<std::int32_t>;
using Longs = std::vector<std::int64_t>;

constexpr std::int32_t kIntMin = std::numeric_limits<std::int32_t>::min();
constexpr std::int32_t kIntMax = std::numeric_limits<std::int32_t>::max();
constexpr std::uint8_t kUntouched = 0xAA;

Floats random_floats(std::int64_t n, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  Floats values(static_cast<std::size_t>(n));
  for (float& value : values) value = normal(random);
  return values;
}

Halves to_halves(const Floats& values, DType dtype) {
  Halves codes;
  for (const float value : values) {
    codes.push_back(dtype == DType::kBFloat16 ? bf16_from_float(value) : f16_from_float(value));
  }
  return codes;
}

float widen(std::uint16_t code, DType dtype) {
  return dtype == DType::kBFloat16 ? bf16_to_float(code) : f16_to_float(code);
}

float plain_scale(const float* x, std::int64_t n) {
  float amax = 1e-4f;
  for (std::int64_t i = 0; i < n; ++i) amax = std::max(amax, std::abs(x[i]));
  return amax / 448.0f;
}

float power_of_two_at_or_above(float scale) {
  return std::ldexp(1.0f, static_cast<int>(std::ceil(std::log2(double{scale}))));
}

template <typename T>
T load(const std::uint8_t* bytes) {
  T value;
  std::memcpy(&value, bytes, sizeof(T));
  return value;
}

// Pages of `page_bytes` every `page_stride` bytes; the last page ends the buffer, so that a
// sanitizer sees a step past it.
struct Pages {
  std::int64_t num_pages;
  std::int64_t page_size;
  std::int64_t token_bytes;
  std::int64_t page_stride;
  Bytes bytes;

  Pages(std::int64_t pages, std::int64_t size, std::int64_t token, std::int64_t padding)
      : num_pages(pages),
        page_size(size),
        token_bytes(token),
        page_stride(size * token + padding),
        bytes(static_cast<std::size_t>((pages - 1) * page_stride + size * token), kUntouched) {}

  TensorView view() {
    return strided_view(bytes.data(), {num_pages, page_size, 1, token_bytes},
                        {page_stride, token_bytes, token_bytes, 1});
  }
  const std::uint8_t* page(std::int64_t slot) const {
    return bytes.data() + slot / page_size * page_stride;
  }
  std::int64_t token(std::int64_t slot) const { return slot % page_size; }
};

// ---- indexer key cache --------------------------------------------------------------------------

void write_indexer(TensorView k, Pages& pages, TensorView slots, bool use_ue8m0) {
  IndexerCacheWriteParams params;
  params.k = k;
  params.kv_cache = pages.view();
  params.slot_mapping = slots;
  params.use_ue8m0 = use_ue8m0;
  ASSERT_TRUE(cpu::indexer_cache_write(params).ok());
}

TEST(IndexerCacheWrite, BytesOfEveryTokenAndOfNoOther) {
  for (const std::int64_t head_dim : {32, 64, 128}) {
    for (const std::int64_t padding : {0, 64}) {
      for (const bool use_ue8m0 : {false, true}) {
        constexpr std::int64_t kPageSize = 3;
        Pages pages(2, kPageSize, head_dim + 4, padding);
        Floats k = random_floats(4 * head_dim, 1);
        Longs slots{5, 0, -1, 2};
        write_indexer(view(k, {4, head_dim}), pages, view(slots, {4}), use_ue8m0);

        Bytes expected(pages.bytes.size(), kUntouched);
        for (const std::int64_t t : {0, 1, 3}) {
          const float* key = k.data() + t * head_dim;
          const std::int64_t slot = slots[static_cast<std::size_t>(t)];
          const float plain = plain_scale(key, head_dim);
          const float scale = use_ue8m0 ? power_of_two_at_or_above(plain) : plain;
          std::uint8_t* page = expected.data() + slot / kPageSize * pages.page_stride;
          for (std::int64_t i = 0; i < head_dim; ++i) {
            page[slot % kPageSize * head_dim + i] = e4m3_encode(key[i] / scale);
          }
          std::memcpy(page + kPageSize * head_dim + slot % kPageSize * 4, &scale, 4);
        }
        EXPECT_EQ(pages.bytes, expected) << head_dim << ", " << padding << ", " << use_ue8m0;
      }
    }
  }
}

TEST(IndexerCacheWrite, SkipsSlotsOutsideTheCache) {
  Pages pages(2, 4, 132, 0);
  Floats k = random_floats(6 * 128, 2);
  Longs wide{-1,
             8,
             std::numeric_limits<std::int64_t>::min(),
             std::numeric_limits<std::int64_t>::max(),
             std::int64_t{1} << 32,
             -8};
  write_indexer(view(k, {6, 128}), pages, view(wide, {6}), false);
  Ints narrow{-1, 8, kIntMin, kIntMax, 9, -8};
  write_indexer(view(k, {6, 128}), pages, view(narrow, {6}), false);
  EXPECT_EQ(pages.bytes, Bytes(pages.bytes.size(), kUntouched));

  Pages none(1, 4, 132, 0);
  IndexerCacheWriteParams params;
  params.k = view(k, {6, 128});
  params.kv_cache = none.view();
  params.kv_cache.sizes[0] = 0;
  params.slot_mapping = view(narrow, {6});
  ASSERT_TRUE(cpu::indexer_cache_write(params).ok());
}

TEST(IndexerCacheWrite, OfTokensWithOneSlotTheLastWins) {
  constexpr std::int64_t kTokens = 4096;  // enough for several threads
  constexpr std::int64_t kSlots = 48;
  Floats k = random_floats(kTokens * 128, 3);
  Ints slots(kTokens);
  for (std::int64_t t = 0; t < kTokens; ++t) {
    slots[static_cast<std::size_t>(t)] = static_cast<std::int32_t>(t * 7 % kSlots);
  }
  Pages all(3, 16, 132, 0);
  write_indexer(view(k, {kTokens, 128}), all, view(slots, {kTokens}), false);
  Pages last(3, 16, 132, 0);
  write_indexer(strided_view(k.data() + (kTokens - kSlots) * 128, {kSlots, 128}, {128, 1}), last,
                strided_view(slots.data() + kTokens - kSlots, {kSlots}, {1}), false);
  EXPECT_EQ(all.bytes, last.bytes);
}

TEST(IndexerCacheWrite, HalfKeysInStridedRowsAndSlots) {
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    Halves k = to_halves(random_floats(2 * 100, 4), dtype);
    Ints slots{1, -1, 0};
    Floats widened;
    for (std::size_t i = 0; i < 64; ++i) widened.push_back(widen(k[i], dtype));
    for (std::size_t i = 0; i < 64; ++i) widened.push_back(widen(k[100 + i], dtype));
    Pages halves(1, 2, 68, 0);
    write_indexer(strided_view(k.data(), {2, 64}, {100, 1}, dtype), halves,
                  strided_view(slots.data(), {2}, {2}), false);
    Pages floats(1, 2, 68, 0);
    Ints packed{1, 0};
    write_indexer(view(widened, {2, 64}), floats, view(packed, {2}), false);
    EXPECT_EQ(halves.bytes, floats.bytes);
  }
}

struct IndexerGather {
  Bytes k;
  Floats scale;
  IndexerGather(Pages& pages, TensorView table, TensorView cu_seqlens, std::int64_t num_tokens) {
    const std::int64_t head_dim = pages.token_bytes - 4;
    k.assign(static_cast<std::size_t>(num_tokens * head_dim), kUntouched);
    scale.assign(static_cast<std::size_t>(num_tokens), -7.0f);
    IndexerCacheGatherParams params;
    params.kv_cache = pages.view();
    params.block_table = table;
    params.cu_seqlens = cu_seqlens;
    params.k = view(k, {num_tokens, head_dim}, DType::kFloat8E4M3);
    params.k_scale = view(scale, {num_tokens});
    EXPECT_TRUE(cpu::indexer_cache_gather(params).ok());
  }
};

// A cache of 4 pages of 2 tokens, each slot's bytes and scale telling the slot.
Pages numbered_indexer_pages() {
  Pages pages(4, 2, 36, 12);
  for (std::int64_t slot = 0; slot < 8; ++slot) {
    std::uint8_t* page = pages.bytes.data() + slot / 2 * pages.page_stride;
    std::memset(page + slot % 2 * 32, static_cast<int>(slot + 1), 32);
    const auto scale = static_cast<float>(slot + 1);
    std::memcpy(page + 64 + slot % 2 * 4, &scale, 4);
  }
  return pages;
}

// Rows are expected to hold slot + 1, or 0.
void expect_slots(const IndexerGather& gathered, const Floats& expected) {
  EXPECT_EQ(gathered.scale, expected);
  for (std::size_t i = 0; i < gathered.k.size(); ++i) {
    ASSERT_EQ(gathered.k[i], static_cast<std::uint8_t>(expected[i / 32])) << i;
  }
}

TEST(IndexerCacheGather, PacksRequests) {
  Pages pages = numbered_indexer_pages();
  Ints table{3, 1, 0, 2};  // [2, 2]
  Ints cu_seqlens{0, 3, 4};
  // A sixth row is beyond every request.
  expect_slots(IndexerGather(pages, view(table, {2, 2}), view(cu_seqlens, {3}), 6),
               {7, 8, 3, 1, 0, 0});
}

TEST(IndexerCacheGather, HostileTables) {
  Pages pages = numbered_indexer_pages();
  Ints table{-1, 3, kIntMax, kIntMin, 4};
  Ints cu_seqlens{0, 12};  // more tokens than the table has
  expect_slots(IndexerGather(pages, view(table, {1, 5}), view(cu_seqlens, {2}), 13),
               {0, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0});
}

TEST(IndexerCacheGather, HostileCuSeqlens) {
  Pages pages = numbered_indexer_pages();
  Ints table{0, 1, 2, 3};  // [2, 2]
  const auto gather = [&](Ints cu_seqlens) {
    return IndexerGather(pages, view(table, {2, 2}), view(cu_seqlens, {3}), 4);
  };
  expect_slots(gather({2, 3, 4}), {0, 0, 1, 5});   // begins late
  expect_slots(gather({-2, 1, 2}), {3, 5, 0, 0});  // began before row 0
  expect_slots(gather({0, 3, 1}), {1, 2, 3, 0});   // row 3: the last request ends before it
  expect_slots(gather({2, 0, 4}), {5, 6, 7, 8});   // request 1 is the last to begin
  expect_slots(gather({kIntMin, kIntMin, kIntMax}), {0, 0, 0, 0});
  expect_slots(gather({kIntMax, kIntMin, kIntMax}), {0, 0, 0, 0});
  expect_slots(gather({0, 0, 0}), {0, 0, 0, 0});
}

TEST(IndexerCacheGather, AnyCuSeqlensAgainstTheDefinition) {
  constexpr std::int32_t kRequests = 6;
  constexpr std::int32_t kRows = 8;
  Pages pages = numbered_indexer_pages();
  std::mt19937 random(6);
  for (int repeat = 0; repeat < 200; ++repeat) {
    Ints cu_seqlens(kRequests + 1);
    for (std::int32_t& begin : cu_seqlens) begin = static_cast<std::int32_t>(random() % 12) - 2;
    Ints table(kRequests * 4);
    for (std::int32_t& entry : table) entry = static_cast<std::int32_t>(random() % 6) - 1;
    Floats expected(kRows, 0.0f);
    for (std::int32_t row = 0; row < kRows; ++row) {
      std::size_t request = kRequests;
      while (request-- > 0) {
        if (cu_seqlens[request] <= row) break;
      }
      if (request >= kRequests || row >= cu_seqlens[request + 1]) continue;
      const std::int32_t token = row - cu_seqlens[request];
      if (token >= 8) continue;
      const std::int32_t page = table[request * 4 + static_cast<std::size_t>(token / 2)];
      if (page < 0 || page >= 4) continue;
      expected[static_cast<std::size_t>(row)] = static_cast<float>(page * 2 + token % 2 + 1);
    }
    expect_slots(
        IndexerGather(pages, view(table, {kRequests, 4}), view(cu_seqlens, {kRequests + 1}), kRows),
        expected);
  }
}

TEST(IndexerCacheGather, NoRequestsNoTokensNoPages) {
  Pages pages = numbered_indexer_pages();
  Ints none;
  Ints zero{0};
  expect_slots(IndexerGather(pages, view(none, {0, 2}), view(zero, {1}), 2), {0, 0});
  expect_slots(IndexerGather(pages, view(none, {0, 2}), view(zero, {1}), 0), {});
}

TEST(IndexerCache, WhatIsWrittenComesBack) {
  constexpr std::int64_t kTokens = 700;  // enough for several threads
  Pages pages(11, 64, 132, 128);
  Floats k = random_floats(kTokens * 128, 5);
  Longs slots(kTokens);
  Ints table(11);
  for (std::int64_t p = 0; p < 11; ++p)
    table[static_cast<std::size_t>(p)] = static_cast<std::int32_t>(10 - p);
  for (std::int64_t t = 0; t < kTokens; ++t) {
    slots[static_cast<std::size_t>(t)] = (10 - t / 64) * 64 + t % 64;
  }
  write_indexer(view(k, {kTokens, 128}), pages, view(slots, {kTokens}), false);
  Ints cu_seqlens{0, kTokens};
  const IndexerGather gathered(pages, view(table, {1, 11}), view(cu_seqlens, {2}), kTokens);
  for (std::int64_t t = 0; t < kTokens; ++t) {
    const float scale = plain_scale(k.data() + t * 128, 128);
    ASSERT_EQ(gathered.scale[static_cast<std::size_t>(t)], scale);
    for (std::int64_t i = 0; i < 128; ++i) {
      const auto at = static_cast<std::size_t>(t * 128 + i);
      ASSERT_EQ(gathered.k[at], e4m3_encode(k[at] / scale));
    }
  }
}

// ---- MLA cache ----------------------------------------------------------------------------------

struct MlaInput {
  DType dtype;
  std::int64_t d_nope;
  Halves kv_c;
  Halves k_pe;
  Longs slots;

  MlaInput(DType type, std::int64_t nope, Longs slot_mapping, unsigned seed)
      : dtype(type), d_nope(nope), slots(std::move(slot_mapping)) {
    const auto tokens = static_cast<std::int64_t>(slots.size());
    kv_c = to_halves(random_floats(tokens * d_nope, seed), dtype);
    k_pe = to_halves(random_floats(tokens * 64, seed + 1), dtype);
  }
  void write(TensorView kv_cache) {
    const auto tokens = static_cast<std::int64_t>(slots.size());
    MlaCacheWriteParams params;
    params.kv_c = view(kv_c, {tokens, d_nope}, dtype);
    params.k_pe = view(k_pe, {tokens, 64}, dtype);
    params.kv_cache = kv_cache;
    params.slot_mapping = view(slots, {tokens});
    ASSERT_TRUE(cpu::mla_cache_write(params).ok());
  }
  float value(std::int64_t token, std::int64_t i) const {
    return widen(kv_c[static_cast<std::size_t>(token * d_nope + i)], dtype);
  }
  Floats group(std::int64_t token, std::int64_t begin, std::int64_t size) const {
    Floats values;
    for (std::int64_t i = begin; i < begin + size; ++i) values.push_back(value(token, i));
    return values;
  }
  std::uint16_t rope(std::int64_t token, std::int64_t i) const {
    return bf16_from_float(widen(k_pe[static_cast<std::size_t>(token * 64 + i)], dtype));
  }
};

Halves gather_mla(TensorView kv_cache, TensorView table, TensorView cu_seqlens,
                  std::int64_t num_tokens, std::int64_t d, DType dtype = DType::kBFloat16) {
  Halves out(static_cast<std::size_t>(num_tokens * d), 0x7FC1);
  MlaCacheGatherParams params;
  params.kv_cache = kv_cache;
  params.block_table = table;
  params.cu_seqlens = cu_seqlens;
  params.out = view(out, {num_tokens, d}, dtype);
  EXPECT_TRUE(cpu::mla_cache_gather(params).ok());
  return out;
}

TEST(MlaCache, V32Bytes) {
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    for (const std::int64_t padding : {0, 32}) {
      Pages pages(2, 3, 656, padding);
      MlaInput input(dtype, 512, {4, -1, 0, 6, std::int64_t{1} << 40}, 10);
      input.write(pages.view());

      Bytes expected(pages.bytes.size(), kUntouched);
      Halves dequantised;
      for (const std::int64_t t : {2, 0}) {
        const std::int64_t slot = input.slots[static_cast<std::size_t>(t)];
        std::uint8_t* row = expected.data() + slot / 3 * pages.page_stride + slot % 3 * 656;
        for (std::int64_t g = 0; g < 4; ++g) {
          const Floats x = input.group(t, g * 128, 128);
          const float scale = plain_scale(x.data(), 128);
          std::memcpy(row + 512 + g * 4, &scale, 4);
          for (std::int64_t i = 0; i < 128; ++i) {
            row[g * 128 + i] = e4m3_encode(x[static_cast<std::size_t>(i)] / scale);
            dequantised.push_back(bf16_from_float(e4m3_decode(row[g * 128 + i]) * scale));
          }
        }
        for (std::int64_t i = 0; i < 64; ++i) {
          const std::uint16_t code = input.rope(t, i);
          std::memcpy(row + 528 + i * 2, &code, 2);
          dequantised.push_back(code);
        }
      }
      EXPECT_EQ(pages.bytes, expected);

      // Slot 0, then slot 4, each as the first tokens of a request.
      Ints table{0, 1};
      Ints cu_seqlens{0, 1, 3};
      Halves out = gather_mla(pages.view(), view(table, {2, 1}), view(cu_seqlens, {3}), 3, 576);
      out.erase(out.begin() + 576, out.begin() + 2 * 576);  // slot 3 was not written
      EXPECT_EQ(out, dequantised);
    }
  }
}

TEST(MlaCache, V4Bytes) {
  // Three tokens of 584 bytes, padded to the multiple of 576 that writers use.
  constexpr std::int64_t kPadding = 4 * 576 - 3 * 584;
  Pages pages(2, 3, 584, kPadding);
  MlaInput input(DType::kBFloat16, 448, {2, 3, -7, 6}, 20);
  input.write(pages.view());

  Bytes expected(pages.bytes.size(), kUntouched);
  Halves dequantised;
  for (const std::int64_t t : {0, 1}) {
    const std::int64_t slot = input.slots[static_cast<std::size_t>(t)];
    std::uint8_t* page = expected.data() + slot / 3 * pages.page_stride;
    std::uint8_t* row = page + slot % 3 * 576;
    std::uint8_t* scales = page + 3 * 576 + slot % 3 * 8;
    for (std::int64_t g = 0; g < 7; ++g) {
      const Floats x = input.group(t, g * 64, 64);
      const float scale = power_of_two_at_or_above(plain_scale(x.data(), 64));
      scales[g] = static_cast<std::uint8_t>(std::ilogb(scale) + 127);
      for (std::int64_t i = 0; i < 64; ++i) {
        row[g * 64 + i] = e4m3_encode(x[static_cast<std::size_t>(i)] / scale);
        dequantised.push_back(bf16_from_float(e4m3_decode(row[g * 64 + i]) * scale));
      }
    }
    scales[7] = 0;
    for (std::int64_t i = 0; i < 64; ++i) {
      const std::uint16_t code = input.rope(t, i);
      std::memcpy(row + 448 + i * 2, &code, 2);
      dequantised.push_back(code);
    }
  }
  EXPECT_EQ(pages.bytes, expected);

  // Token 2 of a request whose first page is page 0, then token 0 of one whose first is page 1.
  Ints table{0, 1};
  Ints cu_seqlens{-2, 1, 2};
  EXPECT_EQ(gather_mla(pages.view(), view(table, {2, 1}), view(cu_seqlens, {3}), 2, 512),
            dequantised);
}

TEST(MlaCache, SixteenBitIsCopied) {
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    constexpr std::int64_t kStride = 600;  // tokens apart in memory, too
    Halves cache(2 * 2 * kStride, 0x1234);
    const TensorView kv_cache =
        strided_view(cache.data(), {2, 2, 1, 576}, {2 * kStride, kStride, 576, 1}, dtype);
    MlaInput input(dtype, 512, {3, 0, -1, 4}, 30);
    input.kv_c[5] = 0x7FFF;  // a NaN keeps its bits
    input.write(kv_cache);

    Halves expected(cache.size(), 0x1234);
    for (const std::size_t t : {0u, 1u}) {
      const auto row = expected.begin() + input.slots[t] * kStride;
      std::copy_n(input.kv_c.begin() + static_cast<std::int64_t>(t) * 512, 512, row);
      std::copy_n(input.k_pe.begin() + static_cast<std::int64_t>(t) * 64, 64, row + 512);
    }
    EXPECT_EQ(cache, expected);

    Ints table{1, -1};
    Ints cu_seqlens{0, 3};
    const Halves out =
        gather_mla(kv_cache, view(table, {1, 2}), view(cu_seqlens, {2}), 4, 576, dtype);
    Halves rows(4 * 576, 0);
    std::copy_n(expected.begin() + 2 * kStride, 576, rows.begin());
    std::copy_n(expected.begin() + 3 * kStride, 576, rows.begin() + 576);
    EXPECT_EQ(out, rows);
  }
}

TEST(MlaCache, UnmappedRowsAreZero) {
  Pages pages(1, 2, 656, 0);
  Ints table{0, 1, -1, kIntMax};
  Ints cu_seqlens{1, 9};
  const Halves out = gather_mla(pages.view(), view(table, {1, 4}), view(cu_seqlens, {2}), 12, 576);
  for (std::size_t row = 0; row < 12; ++row) {
    const bool mapped = row == 1 || row == 2;  // 0xAA bytes are not zero
    for (std::size_t i = 0; i < 576; ++i) ASSERT_EQ(out[row * 576 + i] != 0, mapped) << row;
  }
}

TEST(MlaCache, NanStaysNanAndSpoilsNoOther) {
  Pages pages(1, 1, 656, 0);
  MlaInput input(DType::kBFloat16, 512, {0}, 40);
  input.kv_c[130] = 0x7FC0;
  input.write(pages.view());
  Ints table{0};
  Ints cu_seqlens{0, 1};
  const Halves out = gather_mla(pages.view(), view(table, {1, 1}), view(cu_seqlens, {2}), 1, 576);
  for (std::size_t i = 0; i < 512; ++i) {
    ASSERT_EQ(std::isnan(bf16_to_float(out[i])), i == 130) << i;
  }
}

}  // namespace
}  // namespace dsa

// SPDX-License-Identifier: Apache-2.0
// The attention kernels of Hopper on the emulator, against the CPU backend.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <numbers>
#include <string>

#include "arena.h"
#include "cuda/cuda_kernels.h"
#include "dsa/api.h"
#include "emulated.h"

namespace dsa::test {
namespace {

constexpr DType kF32 = DType::kFloat32;
constexpr DType kBF16 = DType::kBFloat16;
constexpr std::int64_t kDimV = 512;

struct Format {
  const char* name;
  DType dtype;  // of the cache
  std::int64_t width, d_qk;
  DType query;
};
const Format kV32{"v32", DType::kUInt8, 656, 576, kBF16}, kV4{"v4", DType::kUInt8, 584, 512, kBF16};
const Format kBf16{"bf16", kBF16, 576, 576, kBF16},
    kF16{"f16, no RoPE", DType::kFloat16, 512, 512, DType::kFloat16};

// ---- decode -------------------------------------------------------------------------------------

struct DecodeShape {
  std::int64_t batch, s_q, heads, pages, page_size;
};

KvCacheFwdParams decode(Arena& arena, const Format& f, const DecodeShape& s) {
  KvCacheFwdParams p;
  p.q = arena.floats(f.query, {s.batch, s.s_q, s.heads, f.d_qk}, -0.5f, 0.5f);
  p.k_cache = arena.empty_cache(f.dtype, s.pages, s.page_size, f.width, 64);
  arena.fill_latents(p.k_cache);
  p.head_dim_v = kDimV;
  p.softmax_scale = 1.0 / std::sqrt(static_cast<double>(f.d_qk));
  p.is_fp8_kvcache = f.dtype == DType::kUInt8;
  p.out = arena.empty(f.query, {s.batch, s.s_q, s.heads, kDimV});
  p.lse = arena.empty(kF32, {s.batch, s.heads, s.s_q});
  return p;
}

struct DecodeKernel {
  Support (*takes)(const KvCacheFwdParams&);
  std::int64_t (*workspace_bytes)(const KvCacheFwdParams&);
  Status (*run)(const KvCacheFwdParams&);
};
DecodeKernel kernel_of(const KvCacheFwdParams& p) {
  using namespace cuda;
  return p.is_fp8_kvcache
             ? DecodeKernel{sm90a_kvcache_fwd_takes, sm90a_kvcache_fwd_workspace_bytes,
                            sm90a_kvcache_fwd}
             : DecodeKernel{sm90a_latent_kvcache_fwd_takes,
                            sm90a_latent_kvcache_fwd_workspace_bytes, sm90a_latent_kvcache_fwd};
}

void expect_like_cpu(Arena& arena, const KvCacheFwdParams& p, std::uint64_t seed) {
  SCOPED_TRACE("seed " + std::to_string(seed));
  KvCacheFwdParams emulated = p;
  const std::int64_t batch = p.q.size(0), s_q = p.q.size(1), heads = p.q.size(2);
  emulated.out = arena.empty(p.out.dtype, {batch, s_q, heads, kDimV});
  emulated.lse = arena.empty(kF32, {batch, heads, s_q});
  const DecodeKernel kernel = kernel_of(p);
  ASSERT_TRUE(kernel.takes(emulated).ok());
  emulated.workspace = arena.empty(kF32, {kernel.workspace_bytes(emulated) / 4});
  expect_ok(flash_mla_with_kvcache(p));
  emulator::set_seed(seed);
  expect_ok(kernel.run(emulated));
  expect_same(emulated.out, p.out, Rule::kDecode, "out");
  expect_same(emulated.lse, p.lse, Rule::kLse, "lse");
}

TEST(EmulatedAttention, SparseDecode) {
  for (const Format& f : {kV32, kV4, kBf16, kF16}) {
    for (const std::int64_t heads : {5, 16, 30, 70}) {
      for (const std::uint64_t seed : {1, 2}) {
        SCOPED_TRACE(std::string(f.name) + ", heads " + std::to_string(heads));
        Arena arena(static_cast<std::uint32_t>(seed));
        KvCacheFwdParams p = decode(arena, f, {2, 2, heads, 7, 38});
        p.indices = arena.hostile({2, 2, 330}, 7 * 38, 10);
        p.attn_sink = arena.floats(kF32, {heads}, -2.0f, 2.0f);
        if (seed == 2) {
          p.topk_length = arena.hostile({2}, 330, 20);
          p.extra_k_cache = arena.empty_cache(f.dtype, 5, 6, f.width, 64);
          arena.fill_latents(p.extra_k_cache);
          p.extra_indices = arena.hostile({2, 2, 19}, 30, 10);
          p.batch_invariant = true;
        }
        expect_like_cpu(arena, p, seed);
      }
    }
  }
}

// One request's splits are a cluster, some or all of which have no keys.
TEST(EmulatedAttention, SparseDecodeInClusters) {
  struct Shape {
    std::int64_t heads, topk;
    std::int32_t length;
    unsigned cluster;
  };
  for (const Format& f : {kV32, kV4}) {
    for (const Shape& s : {Shape{8, 2048, 2048, 16}, Shape{16, 700, 130, 6}, Shape{20, 300, 300, 5},
                           Shape{64, 130, 130, 3}, Shape{64, 450, 0, 8}, Shape{100, 300, 300, 5}}) {
      SCOPED_TRACE(std::string(f.name) + ", heads " + std::to_string(s.heads));
      Arena arena(static_cast<std::uint32_t>(s.heads));
      KvCacheFwdParams p = decode(arena, f, {1, 1, s.heads, 7, 38});
      p.indices = arena.hostile({1, 1, s.topk}, 7 * 38, 10);
      p.topk_length = arena.ints({1}, s.length, s.length);
      p.attn_sink = arena.floats(kF32, {s.heads}, -2.0f, 2.0f);
      expect_like_cpu(arena, p, static_cast<std::uint64_t>(s.topk));
      EXPECT_EQ(emulator::last_cluster(), s.cluster);
    }
  }
}

TEST(EmulatedAttention, DenseDecode) {
  for (const Format& f : {kV32, kV4, kBf16, kF16}) {
    for (const std::int64_t heads : {8, 64, 70}) {
      for (const std::int64_t page_size : {6, 64}) {  // 64: 16-bit pages are copied as blocks
        SCOPED_TRACE(std::string(f.name) + ", heads " + std::to_string(heads) + ", pages of " +
                     std::to_string(page_size));
        Arena arena(3);
        const std::int64_t pages = 600 / page_size;
        KvCacheFwdParams p = decode(arena, f, {3, heads == 70 ? 2 : 1, heads, pages, page_size});
        p.block_table = arena.hostile({3, pages}, static_cast<std::int32_t>(pages) - 1, 5);
        p.cache_seqlens = arena.ints({3}, 1, static_cast<std::int32_t>(pages * page_size));
        p.causal = true;
        expect_like_cpu(arena, p, static_cast<std::uint64_t>(page_size));
      }
    }
  }
}

// A row's bits are the same alone and beside others, with a block table of any width.
void expect_batch_invariance(const Format& f, std::int64_t heads, std::int64_t page_size) {
  constexpr std::int64_t kTokens = 1500, kMostTokens = 4480;
  const std::int64_t pages = 1600 / page_size, most_pages = kMostTokens / page_size;
  SCOPED_TRACE(std::string(f.name) + ", heads " + std::to_string(heads) + ", pages of " +
               std::to_string(page_size));
  Arena arena(9);
  KvCacheFwdParams p = decode(arena, f, {2, 1, heads, pages, page_size});
  p.attn_sink = arena.floats(kF32, {heads}, -2.0f, 2.0f);
  p.block_table = arena.ints({2, most_pages}, 0, static_cast<std::int32_t>(pages) - 1);
  p.cache_seqlens = arena.ints({2}, kTokens, kTokens);
  p.cache_seqlens.ptr<std::int32_t>()[1] = kMostTokens;
  p.batch_invariant = true;
  expect_like_cpu(arena, p, 3);
  const auto run = [&](KvCacheFwdParams call) {
    emulator::set_seed(4);
    call.workspace = arena.empty(kF32, {kernel_of(call).workspace_bytes(call) / 4});
    expect_ok(kernel_of(call).run(call));
  };
  run(p);
  for (const std::int64_t width : {kTokens / page_size + 1, 2 * pages}) {
    KvCacheFwdParams alone = p;
    for (TensorView KvCacheFwdParams::* member :
         {&KvCacheFwdParams::q, &KvCacheFwdParams::block_table, &KvCacheFwdParams::cache_seqlens,
          &KvCacheFwdParams::out, &KvCacheFwdParams::lse}) {
      (alone.*member).sizes[0] = 1;
    }
    alone.block_table.sizes[1] = width;
    alone.out = arena.empty(p.out.dtype, {1, 1, heads, kDimV});
    alone.lse = arena.empty(kF32, {1, heads, 1});
    run(alone);
    EXPECT_EQ(std::memcmp(alone.out.data, p.out.data, extent_bytes(alone.out)), 0);
    EXPECT_EQ(std::memcmp(alone.lse.data, p.lse.data, extent_bytes(alone.lse)), 0);
  }
}

TEST(EmulatedAttention, BatchInvariance) {
  expect_batch_invariance(kV32, 16, 32);
  expect_batch_invariance(kBf16, 16, 32);
  expect_batch_invariance(kBf16, 64, 32);
  expect_batch_invariance(kBf16, 64, 64);
}

// ---- prefill ------------------------------------------------------------------------------------

void expect_prefill_like_cpu(Arena& arena, SparseFwdParams p) {
  const std::int64_t tokens = p.q.size(0), heads = p.q.size(1);
  SparseFwdParams emulated = p;
  for (SparseFwdParams* each : {&p, &emulated}) {
    each->out = arena.empty(p.q.dtype, {tokens, heads, kDimV});
    each->max_logits = arena.empty(kF32, {tokens, heads});
    each->lse = arena.empty(kF32, {tokens, heads});
  }
  expect_ok(flash_mla_sparse_fwd(p));
  for (const std::uint64_t seed : {1, 2}) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    emulator::set_seed(seed);
    expect_ok(p.is_fp8() ? cuda::sm90a_fp8_sparse_fwd(emulated) : cuda::sm90a_sparse_fwd(emulated));
    expect_same(emulated.out, p.out, Rule::kPrefill, "out");
    expect_same(emulated.lse, p.lse, Rule::kLse, "lse");
    expect_same(emulated.max_logits, p.max_logits, Rule::kLse, "max_logits");
  }
}

TEST(EmulatedAttention, SparsePrefill) {
  for (const Format& f : {kV32, kV4, kBf16, kF16}) {
    for (const std::int64_t heads : {3, 16, 32, 64}) {
      SCOPED_TRACE(std::string(f.name) + ", heads " + std::to_string(heads));
      constexpr std::int64_t kTokens = 7, kTopk = 200;  // more tokens than SMs
      Arena arena(5);
      SparseFwdParams p;
      p.q = arena.floats(f.query, {kTokens, heads, f.d_qk}, -1.0f, 1.0f);
      p.kv = arena.empty_cache(f.dtype, 4, 64, f.width, 0);
      arena.fill_latents(p.kv);
      p.indices = arena.hostile({kTokens, 1, kTopk}, 4 * 64, 10);
      p.topk_length = arena.hostile({kTokens}, kTopk, 20);
      p.sm_scale = 1.0 / std::sqrt(static_cast<double>(f.d_qk));
      p.d_v = kDimV;
      expect_prefill_like_cpu(arena, p);
    }
  }
}

// Four of five of a token's slots are those of the token before. Some are no slots; in the third
// group of four tokens one is there twice, the fourth has little in common, the last is incomplete.
TensorView drifting(Arena& arena, std::int64_t tokens, std::int64_t topk, std::int32_t slots) {
  const auto step = static_cast<std::int32_t>(slots / topk);
  const TensorView indices = arena.hostile({tokens, 1, topk}, step - 1, 10);
  const TensorView draws = arena.ints({tokens, topk}, 0, 99);
  for (std::int64_t token = 0; token < tokens; ++token) {
    auto* row = indices.ptr<std::int32_t>() + token * topk;
    const auto* draw = draws.ptr<std::int32_t>() + token * topk;
    for (std::int64_t i = 0; i < topk; ++i) {
      if (row[i] >= 0 && row[i] < step) row[i] += static_cast<std::int32_t>(i) * step;
      if (token > 0 && token / 4 != 3 && draw[i] < 80) row[i] = row[i - topk];
    }
    if (token == 9) row[0] = row[topk - 1] = 5;
  }
  return indices;
}

struct SharedRows {
  static constexpr std::int64_t kTokens = 26, kTopk = 300;
  SparseFwdParams p;

  SharedRows(Arena& arena, const Format& f, std::int64_t heads) {
    p.q = arena.floats(f.query, {kTokens, heads, f.d_qk}, -1.0f, 1.0f);
    p.kv = arena.empty_cache(f.dtype, 40, 64, f.width, 0);
    arena.fill_latents(p.kv);
    p.indices = drifting(arena, kTokens, kTopk, 40 * 64);
    p.attn_sink = arena.floats(kF32, {heads}, -2.0f, 2.0f);
    p.sm_scale = 1.0 / std::sqrt(static_cast<double>(f.d_qk));
    p.d_v = kDimV;
    p.workspace = arena.empty(DType::kUInt8, {cuda::sm90a_sparse_fwd_workspace_bytes(p)});
  }
  std::int32_t groups() const { return p.workspace.ptr<std::int32_t>()[0]; }
  // Of groups, and by themselves.
  std::int64_t tokens() const {
    return groups() * (p.q.size(1) > 16 ? 2 : 4) + p.workspace.ptr<std::int32_t>()[1];
  }
};

TEST(EmulatedAttention, SparsePrefillOfSharedRows) {
  for (const Format& f : {kBf16, kF16}) {
    for (const std::int64_t heads : {3, 16, 30}) {
      SCOPED_TRACE(std::string(f.name) + ", heads " + std::to_string(heads));
      Arena arena(6);
      SharedRows shared(arena, f, heads);
      SparseFwdParams& p = shared.p;
      if (heads == 16) p.topk_length = arena.ints({shared.kTokens}, 250, shared.kTopk);
      expect_prefill_like_cpu(arena, p);
      EXPECT_EQ(shared.tokens(), shared.kTokens);
      EXPECT_GE(shared.groups(), 4);
      EXPECT_LE(shared.groups() * (heads > 16 ? 2 : 4), shared.kTokens - 4);
      p.batch_invariant = true;
      EXPECT_EQ(cuda::sm90a_sparse_fwd_workspace_bytes(p), 0);
    }
  }
}

// A row that is no number is only of tokens that have it: others of their group are attended to
// again.
TEST(EmulatedAttention, SparsePrefillOfSharedRowsThatAreNoNumbers) {
  for (const std::int64_t heads : {16, 30}) {
    SCOPED_TRACE("heads " + std::to_string(heads));
    Arena arena(8);
    const Format& f = heads == 16 ? kBf16 : kF16;
    SharedRows shared(arena, f, heads);
    const SparseFwdParams& p = shared.p;
    const auto* indices = p.indices.ptr<std::int32_t>() + 5 * shared.kTopk;  // of token 5
    std::int64_t i = 0;
    while (indices[i] < 0 || indices[i] >= 40 * 64 || indices[i] == indices[i - shared.kTopk]) ++i;
    p.kv.ptr<std::uint16_t>()[indices[i] * f.width + 300] = 0x7FFF;  // NaN of both formats
    expect_prefill_like_cpu(arena, p);
    EXPECT_GT(shared.tokens(), shared.kTokens);
  }
}

// Scores of 2^27 in base 2, whose neighbours are 16 apart: the second one is above the slack of the
// first one's base, though the sum of the two rounds to it.
TEST(EmulatedAttention, BaseMovesByOneUlp) {
  for (const std::int64_t heads : {16, 64}) {
    Arena arena(7);
    SparseFwdParams p;
    p.q = arena.floats(DType::kFloat16, {1, heads, kDimV}, 0.0f, 0.0f);
    p.kv = arena.floats(DType::kFloat16, {2, 1, kDimV}, 0.0f, 0.0f);
    const auto set = [](const TensorView& t, std::int64_t row, float first, float second) {
      auto* at = t.ptr<std::uint16_t>() + row * kDimV;
      at[0] = f16_from_float(first);
      at[1] = f16_from_float(second);
    };
    for (std::int64_t head = 0; head < heads; ++head) set(p.q, head, 4096.0f, 16.0f);
    set(p.kv, 0, 32768.0f, 1.0f);
    set(p.kv, 1, 32768.0f, 2.0f);
    p.indices = arena.ints({1, 1, 130}, -1, -1);
    p.indices.ptr<std::int32_t>()[0] = 0;
    p.indices.ptr<std::int32_t>()[129] = 1;
    p.sm_scale = std::numbers::ln2;  // scores in base 2 are the products
    p.d_v = kDimV;
    expect_prefill_like_cpu(arena, p);
  }
}

}  // namespace
}  // namespace dsa::test

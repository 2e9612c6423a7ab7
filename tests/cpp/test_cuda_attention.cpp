// SPDX-License-Identifier: Apache-2.0
// Sparse prefill, decode over every cache format and the merge of states: the CUDA backend against
// the CPU one.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>

#include "arena.h"
#include "cuda_compare.h"
#include "cuda_device.h"

namespace dsa::test {
namespace {

constexpr DType kF32 = DType::kFloat32;
constexpr DType kBF16 = DType::kBFloat16;
constexpr DType kF16 = DType::kFloat16;

class CudaAttention : public CudaTest {};

TensorView sinks(Arena& arena, std::int64_t heads) {
  TensorView t = arena.floats(kF32, {heads}, -2.0f, 2.0f);
  if (heads >= 3) {
    t.ptr<float>()[0] = kInf;
    t.ptr<float>()[heads / 2] = -kInf;
  }
  return t;
}

// ---- prefill ------------------------------------------------------------------------------------

struct SparseShape {
  std::int64_t s_q, h_q, d_qk, d_v, s_kv, topk, pad;
  DType dtype;
};

const SparseShape kSparseShapes[] = {
    {4, 1, 576, 512, 200, 64, 0, kBF16},    {3, 3, 576, 512, 100, 33, 16, kF16},
    {5, 8, 512, 512, 300, 128, 3, kBF16},   {2, 64, 576, 512, 500, 257, 0, kBF16},
    {1, 128, 576, 512, 700, 512, 0, kF16},  {2, 65, 512, 512, 90, 1, 0, kBF16},
    {6, 17, 64, 64, 90, 40, 1, kBF16},      {6, 5, 96, 64, 90, 40, 0, kF16},
    {3, 33, 384, 320, 70, 48, 8, kBF16},    {3, 2, 480, 448, 70, 48, 0, kF16},
    {2, 16, 576, 512, 3000, 2048, 0, kF16}, {0, 4, 576, 512, 9, 5, 0, kBF16},
    {3, 4, 576, 512, 0, 5, 0, kBF16},       {3, 4, 576, 512, 9, 0, 0, kBF16}};

TEST_F(CudaAttention, SparseFwd) {
  for (const SparseShape& s : kSparseShapes) {
    for (const bool more : {false, true}) {  // with a sink and lengths
      Arena arena(3);
      SparseFwdParams p;
      p.q = arena.floats(s.dtype, {s.s_q, s.h_q, s.d_qk}, -1.0f, 1.0f, s.pad);
      p.kv = arena.floats(s.dtype, {s.s_kv, 1, s.d_qk}, -1.0f, 1.0f, s.pad);
      p.indices = arena.hostile({s.s_q, 1, s.topk}, static_cast<std::int32_t>(s.s_kv), 10, s.pad);
      p.sm_scale = 1.0 / std::sqrt(static_cast<double>(s.d_qk));
      p.d_v = s.d_v;
      if (more) p.attn_sink = sinks(arena, s.h_q);
      if (more) p.topk_length = arena.hostile({s.s_q}, static_cast<std::int32_t>(s.topk), 20);
      p.out = arena.empty(s.dtype, {s.s_q, s.h_q, s.d_v}, s.pad);
      p.max_logits = arena.empty(kF32, {s.s_q, s.h_q}, s.pad);
      p.lse = arena.empty(kF32, {s.s_q, s.h_q}, s.pad);
      expect_like_cpu<SparseFwdParams>(flash_mla_sparse_fwd, p,
                                       {{&SparseFwdParams::out, Rule::kPrefill},
                                        {&SparseFwdParams::max_logits, Rule::kLse},
                                        {&SparseFwdParams::lse, Rule::kLse}});
    }
  }
}

// ---- decode -------------------------------------------------------------------------------------

struct Format {
  DType dtype;  // of the cache
  std::int64_t width, d_qk, d_v;
  DType query;
};

const Format kFormats[] = {{DType::kUInt8, 656, 576, 512, kBF16},
                           {DType::kUInt8, 584, 512, 512, kBF16},
                           {kBF16, 576, 576, 512, kBF16},
                           {kF16, 576, 576, 512, kF16},
                           {kBF16, 192, 192, 128, kBF16}};

struct DecodeShape {
  std::int64_t batch, s_q, h_q, pages, page_size, pad;
};

const DecodeShape kDecodeShapes[] = {
    {3, 2, 8, 4, 64, 64},   {1, 1, 128, 7, 37, 4}, {2, 1, 1, 100, 1, 0}, {5, 3, 17, 3, 100, 576},
    {2, 1, 64, 30, 64, 16}, {0, 1, 4, 2, 8, 0},    {2, 1, 3, 0, 8, 0}};

TensorView latent_cache(Arena& arena, const Format& f, std::int64_t pages, std::int64_t page_size,
                        std::int64_t pad) {
  TensorView cache = arena.empty_cache(f.dtype, pages, page_size, f.width, pad);
  arena.fill_latents(cache);
  return cache;
}

KvCacheFwdParams decode(Arena& arena, const Format& f, const DecodeShape& s) {
  KvCacheFwdParams p;
  p.q = arena.floats(f.query, {s.batch, s.s_q, s.h_q, f.d_qk}, -0.5f, 0.5f, s.pad);
  p.k_cache = latent_cache(arena, f, s.pages, s.page_size, s.pad);
  p.head_dim_v = f.d_v;
  p.softmax_scale = 1.0 / std::sqrt(static_cast<double>(f.d_qk));
  p.is_fp8_kvcache = f.dtype == DType::kUInt8;
  p.out = arena.empty(f.query, {s.batch, s.s_q, s.h_q, f.d_v}, s.pad);
  p.lse = arena.empty(kF32, {s.batch, s.h_q, s.s_q}, 1);
  return p;
}

void expect_decode_like_cpu(const KvCacheFwdParams& p) {
  expect_like_cpu<KvCacheFwdParams>(
      flash_mla_with_kvcache, p,
      {{&KvCacheFwdParams::out, Rule::kDecode}, {&KvCacheFwdParams::lse, Rule::kLse}});
}

TEST_F(CudaAttention, SparseDecode) {
  for (const Format& f : kFormats) {
    for (const DecodeShape& s : kDecodeShapes) {
      for (const std::int64_t topk : {0, 1, 70, 700}) {
        for (const bool more : {false, true}) {  // a second cache, a sink and lengths
          Arena arena(5);
          KvCacheFwdParams p = decode(arena, f, s);
          const auto slots = static_cast<std::int32_t>(s.pages * s.page_size);
          p.indices = arena.hostile({s.batch, s.s_q, topk}, slots, 10, 3);
          if (more) {
            p.attn_sink = sinks(arena, s.h_q);
            p.topk_length = arena.hostile({s.batch}, static_cast<std::int32_t>(topk), 20);
            p.extra_k_cache = latent_cache(arena, f, 5, 6, 64);
            p.extra_indices = arena.hostile({s.batch, s.s_q, 19}, 30, 10);
            p.extra_topk_length = arena.hostile({s.batch, s.s_q}, 19, 20, 1);
            p.batch_invariant = true;
          }
          expect_decode_like_cpu(p);
        }
      }
    }
  }
}

TEST_F(CudaAttention, SparseFwdOverCaches) {
  for (const Format& f : kFormats) {
    for (const DecodeShape& s : kDecodeShapes) {
      for (const std::int64_t topk : {0, 1, 70, 700}) {
        Arena arena(11);
        SparseFwdParams p;
        p.q = arena.floats(f.query, {s.batch, s.h_q, f.d_qk}, -0.5f, 0.5f, s.pad);
        p.kv = latent_cache(arena, f, s.pages, s.page_size, s.pad);
        const auto slots = static_cast<std::int32_t>(s.pages * s.page_size);
        p.indices = arena.hostile({s.batch, 1, topk}, slots, 10, 3);
        p.sm_scale = 1.0 / std::sqrt(static_cast<double>(f.d_qk));
        p.d_v = f.d_v;
        if (topk % 2 == 0) p.attn_sink = sinks(arena, s.h_q);
        p.out = arena.empty(f.query, {s.batch, s.h_q, f.d_v}, s.pad);
        p.max_logits = arena.empty(kF32, {s.batch, s.h_q}, 1);
        p.lse = arena.empty(kF32, {s.batch, s.h_q}, 1);
        expect_like_cpu<SparseFwdParams>(flash_mla_sparse_fwd, p,
                                         {{&SparseFwdParams::out, Rule::kPrefill},
                                          {&SparseFwdParams::max_logits, Rule::kLse},
                                          {&SparseFwdParams::lse, Rule::kLse}});
      }
    }
  }
}

TEST_F(CudaAttention, DenseDecode) {
  for (const Format& f : kFormats) {
    for (const DecodeShape& s : kDecodeShapes) {
      for (const bool causal : {false, true}) {
        Arena arena(7);
        KvCacheFwdParams p = decode(arena, f, s);
        const std::int64_t width = s.pages + 2;
        p.block_table = arena.hostile({s.batch, width}, static_cast<std::int32_t>(s.pages), 10, 2);
        p.cache_seqlens =
            arena.hostile({s.batch}, static_cast<std::int32_t>(width * s.page_size), 15);
        p.causal = causal;
        if (causal) p.attn_sink = sinks(arena, s.h_q);
        expect_decode_like_cpu(p);
      }
    }
  }
}

// ---- merge --------------------------------------------------------------------------------------

TEST_F(CudaAttention, MergeStates) {
  for (const DType dtype : {kF32, kBF16, kF16}) {
    for (const std::int64_t states : {0, 1, 2, 9}) {
      for (const std::int64_t width : {1, 40, 512}) {
        for (const std::int64_t rows : {0, 1, 37}) {
          Arena arena(9);
          MergeAttnStatesParams p;
          p.outs = arena.floats(dtype, {states, rows, 5, width}, -1.0f, 1.0f, 3);
          p.lses = arena.floats(kF32, {states, rows, 5}, -9.0f, 9.0f, 1);
          for_each_element(p.lses, [&](std::size_t at) {
            if (arena.random.integer(0, 3) != 0) return;
            const float empty = arena.random.integer(0, 1) == 0 ? kInf : -kInf;
            std::memcpy(p.lses.ptr<std::uint8_t>() + at, &empty, sizeof(empty));
          });
          p.out = arena.empty(dtype, {rows, 5, width}, 3);
          p.lse = arena.empty(kF32, {rows, 5}, 1);
          expect_like_cpu<MergeAttnStatesParams>(merge_attn_states, p,
                                                 {{&MergeAttnStatesParams::out, Rule::kDecode},
                                                  {&MergeAttnStatesParams::lse, Rule::kLse}});
        }
      }
    }
  }
}

}  // namespace
}  // namespace dsa::test

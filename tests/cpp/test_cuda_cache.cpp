// SPDX-License-Identifier: Apache-2.0
// Quantisation, the Hadamard rotation, cache writes and gathers: the CUDA backend against the CPU
// one, byte for byte.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>

#include "arena.h"
#include "cuda_compare.h"
#include "cuda_device.h"

namespace dsa::test {
namespace {

constexpr DType kF32 = DType::kFloat32;
constexpr DType kBF16 = DType::kBFloat16;
constexpr DType kF16 = DType::kFloat16;
constexpr DType kU8 = DType::kUInt8;

class CudaCache : public CudaTest {};

// Ranges on both sides of e4m3's: all values below the amax floor, ordinary ones, large ones.
constexpr float kRanges[] = {2e-5f, 1.0f, 3e4f};

// ---- quantisation -------------------------------------------------------------------------------

TEST_F(CudaCache, Hadamard) {
  for (const DType dtype : {kF32, kBF16, kF16}) {
    for (std::int64_t n = 1; n <= 32768; n *= 2) {
      for (const std::int64_t pad : {0, 3}) {
        Arena arena(3);
        HadamardParams p;
        const std::int64_t rows = n > 1024 ? 3 : 37;
        p.x = arena.floats(dtype, {2, rows, n}, -1.0f, 1.0f, pad);
        p.out = arena.empty(dtype, {2, rows, n}, pad);
        expect_like_cpu<HadamardParams>(hadamard_transform, p,
                                        {{&HadamardParams::out, Rule::kLogits}});
      }
    }
  }
}

TEST_F(CudaCache, PerTokenCast) {
  for (const DType dtype : {kF32, kBF16, kF16}) {
    for (const std::int64_t n : {1, 40, 128, 129, 512, 1000, 7168}) {
      for (const float range : kRanges) {
        for (const bool ue8m0 : {false, true}) {
          Arena arena(5);
          PerTokenCastParams p;
          p.x = arena.floats(dtype, {3, 7, n}, -range, range, n % 2 == 0 ? 0 : 5);
          p.use_ue8m0 = ue8m0;
          p.out = arena.empty(DType::kFloat8E4M3, {3, 7, n}, n % 2 == 0 ? 0 : 3);
          p.scale = arena.empty(kF32, {3, 7, (n + 127) / 128}, 1);
          expect_like_cpu<PerTokenCastParams>(per_token_cast_to_fp8, p);
        }
      }
    }
  }
}

// The sign of a NaN that a division makes is the processor's own.
TEST_F(CudaCache, PerTokenCastOfSpecialValues) {
  for (const float special : {kInf, -kInf, kNaN, -kNaN, -0.0f, 448.0f, 3.4e38f, 1e-45f}) {
    Arena arena(7);
    PerTokenCastParams p;
    p.x = arena.floats(kF32, {4, 256}, -1.0f, 1.0f);
    p.x.ptr<float>()[256 + 5] = special;
    p.out = arena.empty(DType::kFloat8E4M3, {4, 256});
    p.scale = arena.empty(kF32, {4, 2});
    expect_like_cpu<PerTokenCastParams>(per_token_cast_to_fp8, p,
                                        {{&PerTokenCastParams::out, Rule::kEqual}});
  }
}

// ---- caches -------------------------------------------------------------------------------------

struct CacheShape {
  std::int64_t tokens, pages, page_size, pad;
};

const CacheShape kCacheShapes[] = {{50, 3, 64, 0}, {9, 20, 1, 4},     {30, 5, 7, 576},
                                   {0, 2, 8, 0},   {500, 6, 100, 60}, {5, 0, 4, 0}};

// Requests of any order and overlap: cu_seqlens is not trusted.
template <typename Params>
void requests(Arena& arena, Params& p, std::int64_t rows, bool monotone) {
  const auto pages = static_cast<std::int32_t>(p.kv_cache.size(0));
  p.block_table = arena.hostile({4, 6}, pages, 10, 1);
  p.cu_seqlens = arena.hostile({5}, static_cast<std::int32_t>(rows), monotone ? 0 : 25);
  auto* bounds = p.cu_seqlens.template ptr<std::int32_t>();
  if (monotone) std::sort(bounds, bounds + 5);
}

TEST_F(CudaCache, IndexerWrite) {
  for (const CacheShape& s : kCacheShapes) {
    for (const DType dtype : {kF32, kBF16, kF16}) {
      for (const std::int64_t head_dim : {128, 64, 100, 4}) {
        for (const bool ue8m0 : {false, true}) {
          Arena arena(11);
          IndexerCacheWriteParams p;
          p.k = arena.floats(dtype, {s.tokens, head_dim}, -2.0f, 2.0f, s.pad % 7);
          p.kv_cache = arena.empty_cache(kU8, s.pages, s.page_size, head_dim + 4, s.pad);
          p.slot_mapping = arena.slots(s.tokens, s.pages * s.page_size);
          p.use_ue8m0 = ue8m0;
          expect_like_cpu<IndexerCacheWriteParams>(indexer_k_quant_and_cache, p);
        }
      }
    }
  }
}

TEST_F(CudaCache, IndexerGather) {
  for (const CacheShape& s : kCacheShapes) {
    for (const std::int64_t head_dim : {128, 64, 100, 4}) {
      for (const bool monotone : {true, false}) {
        Arena arena(13);
        IndexerCacheGatherParams p;
        p.kv_cache = arena.empty_cache(kU8, s.pages, s.page_size, head_dim + 4, s.pad);
        arena.fill_indexer_keys(p.kv_cache, false);
        requests(arena, p, s.tokens, monotone);
        p.k = arena.empty(DType::kFloat8E4M3, {s.tokens, head_dim}, s.pad % 7);
        p.k_scale = arena.empty(kF32, {s.tokens});
        expect_like_cpu<IndexerCacheGatherParams>(gather_indexer_k_cache, p);
      }
    }
  }
}

struct LatentFormat {
  DType cache, latent;
  std::int64_t width, d_nope, d_rope;
};

const LatentFormat kLatentFormats[] = {{kU8, kBF16, 656, 512, 64},   {kU8, kF16, 656, 512, 64},
                                       {kU8, kBF16, 584, 448, 64},   {kU8, kF16, 584, 448, 64},
                                       {kBF16, kBF16, 576, 512, 64}, {kF16, kF16, 576, 512, 64},
                                       {kBF16, kBF16, 100, 67, 33}};

TEST_F(CudaCache, MlaWrite) {
  for (const CacheShape& s : kCacheShapes) {
    for (const LatentFormat& f : kLatentFormats) {
      for (const float range : kRanges) {
        Arena arena(17);
        MlaCacheWriteParams p;
        p.kv_c = arena.floats(f.latent, {s.tokens, f.d_nope}, -range, range, s.pad % 7);
        p.k_pe = arena.floats(f.latent, {s.tokens, f.d_rope}, -1.0f, 1.0f, s.pad % 3);
        p.kv_cache = arena.empty_cache(f.cache, s.pages, s.page_size, f.width, s.pad);
        p.slot_mapping = arena.slots(s.tokens, s.pages * s.page_size);
        expect_like_cpu<MlaCacheWriteParams>(mla_kv_quant_and_cache, p);
      }
    }
  }
}

TEST_F(CudaCache, MlaGather) {
  for (const CacheShape& s : kCacheShapes) {
    for (const LatentFormat& f : kLatentFormats) {
      for (const bool monotone : {true, false}) {
        Arena arena(19);
        MlaCacheGatherParams p;
        p.kv_cache = arena.empty_cache(f.cache, s.pages, s.page_size, f.width, s.pad);
        arena.fill_latents(p.kv_cache);
        requests(arena, p, s.tokens, monotone);
        const DType out = f.cache == kU8 ? kBF16 : f.cache;
        p.out = arena.empty(out, {s.tokens, f.d_nope + f.d_rope}, s.pad % 7);
        expect_like_cpu<MlaCacheGatherParams>(gather_mla_kv_cache, p);
      }
    }
  }
}

}  // namespace
}  // namespace dsa::test

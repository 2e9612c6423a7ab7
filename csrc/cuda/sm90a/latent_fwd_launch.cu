// SPDX-License-Identifier: Apache-2.0
// flash_mla_sparse_fwd, and flash_mla_with_kvcache over 16-bit caches, on Hopper.
#include <cstdint>

#include "cuda/common/attention_splits.h"
#include "cuda/common/launch.h"
#include "cuda/common/make_attention_args.h"
#include "cuda/common/query_map.h"
#include "cuda/cuda_kernels.h"
#include "cuda/sm90a/latent_fwd_kernel.cuh"

namespace dsa::cuda {

namespace {

constexpr int kHeads = 64, kTileTokens = 128, kDimV = 512, kRope = 64;

struct Maps {
  CUtensorMap q, pages;
  bool by_pages = false;  // `pages` is a dense cache's; else rows are copied
};

template <typename Config>
Status launch_rows(const AttentionArgs& args, const Maps& maps, std::int64_t rows,
                   const Launch& where) {
  static_assert(Config::kHeads == kHeads && 2 * Config::kTokens == kTileTokens);
  const std::int64_t head_tiles = ceil_div(args.num_heads, Config::kHeads);
  const dim3 grid(static_cast<unsigned>(rows * head_tiles), static_cast<unsigned>(args.num_splits));
  return launch<sm90a::sm90a_latent_fwd_kernel<Config>>(
      "sm90a_latent_fwd_kernel", where, grid, Config::kThreads,
      sizeof(typename Config::SharedStorage), args, maps.q, maps.by_pages ? maps.pages : maps.q,
      maps.by_pages);
}

constexpr int kBlockTokens = kTileTokens / 2;

// Whether a dense cache's pages are whole blocks that the copy engine takes.
bool make_page_map(const TensorView& cache, CUtensorMap& map) {
  const LatentRows rows = paged_rows(cache);
  const std::int64_t page_stride = cache.size(0) > 1 ? rows.page_stride : 2 * cache.size(3);
  return cache.size(0) > 0 && cache.size(1) % kBlockTokens == 0 &&
         tensor_map_takes(cache.data, rows.token_stride) &&
         tensor_map_takes(cache.data, page_stride) &&
         make_tensor_map({cache.data,
                          3,
                          {2 * cache.size(3), cache.size(1), cache.size(0)},
                          {rows.token_stride, page_stride},
                          {128, kBlockTokens, 1}},
                         map)
             .ok();
}

// use(Config{}) of q's dtype and dimension.
template <typename Use>
auto with_config(const TensorView& q, Use&& use) {
  const bool has_rope = q.size(-1) == kDimV + kRope;
  if (q.dtype == DType::kFloat16) {
    return has_rope ? use(sm90a::LatentFwdConfig<__half, kRope>{})
                    : use(sm90a::LatentFwdConfig<__half, 0>{});
  }
  return has_rope ? use(sm90a::LatentFwdConfig<__nv_bfloat16, kRope>{})
                  : use(sm90a::LatentFwdConfig<__nv_bfloat16, 0>{});
}

Support takes(const TensorView& q, std::int64_t d_v, std::int64_t rows, std::int64_t keys) {
  if (d_v != kDimV || (q.size(-1) != kDimV && q.size(-1) != kDimV + kRope)) {
    return {"d_v 512 of d_qk 512 or 576"};
  }
  if (!query_map_takes(q)) return {"q on 16 bytes"};
  return attention_sizes(rows, q.size(-2), keys, kHeads);
}

SplitPlan plan_of(const KvCacheFwdParams& p) { return plan_splits(p, {kHeads, kTileTokens, 1}); }

}  // namespace

// ---- flash_mla_sparse_fwd -----------------------------------------------------------------------

Support sm90a_sparse_fwd_takes(const SparseFwdParams& p) {
  if (!flat_rows(p.kv).aligned) return {"kv on 16 bytes"};
  return takes(p.q, p.d_v, p.q.size(0), p.indices.size(2));
}

Status sm90a_sparse_fwd(const SparseFwdParams& p) {
  if (p.q.size(0) == 0) return {};
  Maps maps;
  if (Status status = make_query_map(p.q, kHeads, maps.q); !status.ok()) return status;
  const AttentionArgs args = make_attention_args(p);
  return with_config(p.q, [&](auto config) {
    return launch_rows<decltype(config)>(args, maps, p.q.size(0), p.launch);
  });
}

// ---- flash_mla_with_kvcache ---------------------------------------------------------------------

Support sm90a_latent_kvcache_fwd_takes(const KvCacheFwdParams& p) {
  if (p.is_fp8_kvcache) return {"a 16-bit cache"};
  const auto is_copied = [](const TensorView& cache) {
    return !cache.defined() || paged_rows(cache).aligned;
  };
  if (!is_copied(p.k_cache) || !is_copied(p.extra_k_cache)) return {"pages on 16 bytes"};
  return takes(p.q, p.head_dim_v, p.q.size(0) * p.q.size(1), keys_of(p));
}

std::int64_t sm90a_latent_kvcache_fwd_workspace_bytes(const KvCacheFwdParams& p) {
  return plan_of(p).workspace_bytes(p);
}

Status sm90a_latent_kvcache_fwd(const KvCacheFwdParams& p) {
  if (p.q.size(0) == 0 || p.q.size(1) == 0) return {};
  Maps maps;
  if (Status status = make_query_map(p.q, kHeads, maps.q); !status.ok()) return status;
  maps.by_pages = !p.indices.defined() && make_page_map(p.k_cache, maps.pages);
  return with_config(p.q, [&](auto config) {
    return run_splits(p, plan_of(p),
                      [&](const AttentionArgs& args, std::int64_t rows, const Launch& where) {
                        return launch_rows<decltype(config)>(args, maps, rows, where);
                      });
  });
}

}  // namespace dsa::cuda

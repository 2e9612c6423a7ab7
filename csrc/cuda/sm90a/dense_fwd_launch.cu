// SPDX-License-Identifier: Apache-2.0
// flash_mla_with_kvcache, dense over 16-bit caches, on Hopper.
#include <algorithm>
#include <cstdint>

#include "cuda/common/attention_splits.h"
#include "cuda/common/launch.h"
#include "cuda/common/make_attention_args.h"
#include "cuda/common/page_map.h"
#include "cuda/common/query_map.h"
#include "cuda/cuda_kernels.h"
#include "cuda/sm90a/dense_fwd_kernel.cuh"

namespace dsa::cuda {

namespace {

constexpr int kHeads = 64, kBlockTokens = 64, kDimV = 512, kRope = 64;

template <typename Config>
Status launch_rows(const AttentionArgs& args, const CUtensorMap& q_map, const CUtensorMap& pages,
                   std::int64_t rows, const Launch& where) {
  static_assert(Config::kHeads == kHeads && Config::kTokens == kBlockTokens);
  static_assert(Config::kDimV == kDimV);
  const std::int64_t tiles = rows * ceil_div(args.num_heads, Config::kHeads);
  const std::int64_t works = tiles * args.num_splits;
  const std::int64_t num_sms = std::max(device_limits(where.device).num_sms, 1);
  const auto grid = static_cast<unsigned>(std::min(works, num_sms));
  return launch<sm90a::sm90a_dense_fwd_kernel<Config>>(
      "sm90a_dense_fwd_kernel", where, dim3(grid), Config::kThreads,
      sizeof(typename Config::SharedStorage), args, q_map, pages,
      sm90a::LatentFwdGrid{static_cast<unsigned>(tiles), static_cast<unsigned>(works)});
}

// use(Config{}) of q's dtype and dimension.
template <typename Use>
auto with_config(const TensorView& q, Use&& use) {
  const bool has_rope = q.size(-1) == kDimV + kRope;
  if (q.dtype == DType::kFloat16) {
    return has_rope ? use(sm90a::DenseFwdConfig<__half, kRope>{})
                    : use(sm90a::DenseFwdConfig<__half, 0>{});
  }
  return has_rope ? use(sm90a::DenseFwdConfig<__nv_bfloat16, kRope>{})
                  : use(sm90a::DenseFwdConfig<__nv_bfloat16, 0>{});
}

// In tiles of two blocks, which take half of the time of what a CTA has beside.
SplitPlan plan_of(const KvCacheFwdParams& p) {
  return plan_splits(p, {kHeads, 2 * kBlockTokens, 1});
}

}  // namespace

Support sm90a_dense_kvcache_fwd_takes(const KvCacheFwdParams& p) {
  constexpr int kLeastHeads = 17;  // sm90a_latent_kvcache_fwd has fewer in less time
  const TensorView& q = p.q;
  const TensorView& cache = p.k_cache;
  if (p.is_fp8_kvcache || p.indices.defined()) return {"dense, a 16-bit cache"};
  if (p.head_dim_v != kDimV || (q.size(-1) != kDimV && q.size(-1) != kDimV + kRope)) {
    return {"d_v 512 of d_qk 512 or 576"};
  }
  if (q.size(2) < kLeastHeads) return {"more than 16 heads"};
  const AttentionArgs args = make_attention_args(p);
  if (!(args.scale_log2 > 0.0f)) return {"a scale above 0"};
  if (!query_map_takes(q)) return {"q on 16 bytes"};
  if (!args.out_aligned) return {"out on 16 bytes"};
  if (!page_map_takes(cache, kBlockTokens)) {
    return {"pages of a multiple of 64 tokens, on 16 bytes"};
  }
  return attention_sizes(q.size(0) * q.size(1), q.size(2), keys_of(p), kHeads);
}

std::int64_t sm90a_dense_kvcache_fwd_workspace_bytes(const KvCacheFwdParams& p) {
  return plan_of(p).workspace_bytes(p);
}

Status sm90a_dense_kvcache_fwd(const KvCacheFwdParams& p) {
  if (p.q.size(0) == 0 || p.q.size(1) == 0) return {};
  CUtensorMap q_map, pages;
  if (Status status = make_query_map(p.q, kHeads, q_map); !status.ok()) return status;
  if (Status status = make_page_map(p.k_cache, kBlockTokens, pages); !status.ok()) return status;
  return with_config(p.q, [&](auto config) {
    return run_splits(p, plan_of(p),
                      [&](const AttentionArgs& args, std::int64_t rows, const Launch& where) {
                        return launch_rows<decltype(config)>(args, q_map, pages, rows, where);
                      });
  });
}

}  // namespace dsa::cuda

// SPDX-License-Identifier: Apache-2.0
// flash_mla_sparse_fwd, and flash_mla_with_kvcache over 16-bit caches, on Hopper.
#include <algorithm>
#include <cstdint>

#include "cuda/common/attention_splits.h"
#include "cuda/common/launch.h"
#include "cuda/common/make_attention_args.h"
#include "cuda/common/page_map.h"
#include "cuda/cuda_kernels.h"
#include "cuda/sm90a/latent_fwd_kernel.cuh"

namespace dsa::cuda {

namespace {

constexpr int kMostHeads = 64, kFewestHeads = 8, kBlockTokens = 64, kDimV = 512, kRope = 64;

template <typename Config>
Status launch_rows(const AttentionArgs& args, const sm90a::LatentFwdPages& pages, std::int64_t rows,
                   const Launch& where) {
  static_assert(Config::kTokens == kBlockTokens);
  const std::int64_t tiles = rows * ceil_div(args.num_heads, Config::kHeads);
  const std::int64_t works = tiles * args.num_splits;
  const std::int64_t num_sms = std::max(device_limits(where.device).num_sms, 1);
  const auto grid = static_cast<unsigned>(std::min(works, num_sms));
  return launch<sm90a::sm90a_latent_fwd_kernel<Config>>(
      "sm90a_latent_fwd_kernel", where, dim3(grid), Config::kThreads,
      sizeof(typename Config::SharedStorage), args, pages,
      sm90a::LatentFwdGrid{static_cast<unsigned>(tiles), static_cast<unsigned>(works)});
}

// Up to so many heads are the product's columns. Decode has few query tokens, mostly, and with 32
// heads gains less by two workers an SM than it pays for more splits.
constexpr int kFewOfPrefill = 32, kFewOfDecode = 16;

// use(Config{}) of the fewest heads that have all in one tile, if they are few, or of 64.
template <int kFew, typename Element, int kRope, typename Use>
auto with_heads(std::int64_t heads, Use&& use) {
  if (heads <= kFewestHeads) return use(sm90a::LatentFwdConfig<Element, kRope, kFewestHeads>{});
  if (heads <= 16) return use(sm90a::LatentFwdConfig<Element, kRope, 16>{});
  if constexpr (kFew >= 32) {
    if (heads <= 32) return use(sm90a::LatentFwdConfig<Element, kRope, 32>{});
  }
  return use(sm90a::LatentFwdConfig<Element, kRope, kMostHeads>{});
}

// Also of q's dtype and dimension.
template <int kFew, typename Use>
auto with_config(const TensorView& q, Use&& use) {
  const std::int64_t heads = q.size(-2);
  const bool has_rope = q.size(-1) == kDimV + kRope;
  if (q.dtype == DType::kFloat16) {
    return has_rope ? with_heads<kFew, __half, kRope>(heads, use)
                    : with_heads<kFew, __half, 0>(heads, use);
  }
  return has_rope ? with_heads<kFew, __nv_bfloat16, kRope>(heads, use)
                  : with_heads<kFew, __nv_bfloat16, 0>(heads, use);
}

// keys: of a row, at most.
template <typename Params>
Support takes(const Params& p, std::int64_t d_v, std::int64_t rows, std::int64_t keys) {
  const TensorView& q = p.q;
  if (d_v != kDimV || (q.size(-1) != kDimV && q.size(-1) != kDimV + kRope)) {
    return {"d_v 512 of d_qk 512 or 576"};
  }
  const AttentionArgs args = make_attention_args(p);
  if (!(args.scale_log2 > 0.0f)) return {"a scale above 0"};
  if (!args.q_aligned) return {"q on 16 bytes"};
  if (!args.out_aligned) return {"out on 16 bytes"};
  for (const SlotList& list : args.lists) {
    if (!list.rows.aligned) return {"latents on 16 bytes"};
  }
  return attention_sizes(rows, q.size(-2), keys, kFewestHeads);
}

// A work's tile is a block for each of its producers.
template <typename Config>
SplitPlan plan_of(const KvCacheFwdParams& p) {
  constexpr int kWorkers = Config::kWorkers;
  return plan_splits(p, {Config::kHeads, 2 / kWorkers * kBlockTokens, kWorkers});
}

}  // namespace

// ---- flash_mla_sparse_fwd -----------------------------------------------------------------------

Support sm90a_sparse_fwd_takes(const SparseFwdParams& p) {
  if (p.is_fp8()) return {"16-bit latents"};
  return takes(p, p.d_v, p.q.size(0), p.indices.size(2));
}

Status sm90a_sparse_fwd(const SparseFwdParams& p) {
  if (p.q.size(0) == 0) return {};
  const AttentionArgs args = make_attention_args(p);
  return with_config<kFewOfPrefill>(p.q, [&](auto config) {
    return launch_rows<decltype(config)>(args, {}, p.q.size(0), p.launch);
  });
}

// ---- flash_mla_with_kvcache ---------------------------------------------------------------------

Support sm90a_latent_kvcache_fwd_takes(const KvCacheFwdParams& p) {
  if (p.is_fp8_kvcache) return {"a 16-bit cache"};
  return takes(p, p.head_dim_v, p.q.size(0) * p.q.size(1), keys_of(p));
}

std::int64_t sm90a_latent_kvcache_fwd_workspace_bytes(const KvCacheFwdParams& p) {
  return with_config<kFewOfDecode>(
      p.q, [&](auto config) { return plan_of<decltype(config)>(p).workspace_bytes(p); });
}

Status sm90a_latent_kvcache_fwd(const KvCacheFwdParams& p) {
  if (p.q.size(0) == 0 || p.q.size(1) == 0) return {};
  sm90a::LatentFwdPages pages{};
  pages.are_blocks = !p.indices.defined() && page_map_takes(p.k_cache, kBlockTokens) &&
                     make_page_map(p.k_cache, kBlockTokens, pages.map).ok();
  return with_config<kFewOfDecode>(p.q, [&](auto config) {
    return run_splits(p, plan_of<decltype(config)>(p),
                      [&](const AttentionArgs& args, std::int64_t rows, const Launch& where) {
                        return launch_rows<decltype(config)>(args, pages, rows, where);
                      });
  });
}

}  // namespace dsa::cuda

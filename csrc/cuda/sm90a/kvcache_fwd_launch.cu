// SPDX-License-Identifier: Apache-2.0
// flash_mla_with_kvcache and flash_mla_sparse_fwd on Hopper, over FP8 caches.
#include <cstdint>

#include "cuda/common/attention_splits.h"
#include "cuda/common/launch.h"
#include "cuda/common/make_attention_args.h"
#include "cuda/common/query_map.h"
#include "cuda/cuda_kernels.h"
#include "cuda/sm90a/kvcache_fwd_kernel.cuh"

namespace dsa::cuda {

namespace {

constexpr const char* kName = "sm90a_kvcache_fwd_kernel";

// A launch whose splits are clusters.
template <typename Config>
ClusterLaunch clusters_of(const dim3& grid, int splits) {
  return {grid, dim3(1, static_cast<unsigned>(splits)), Config::kThreads,
          sizeof(typename Config::SharedStorage)};
}

template <typename Config>
Status launch_rows(const AttentionArgs& args, const CUtensorMap& q_map, std::int64_t rows,
                   bool in_clusters, const Launch& where) {
  const std::int64_t head_tiles = ceil_div(args.num_heads, Config::kHeads);
  const dim3 grid(static_cast<unsigned>(rows * head_tiles), static_cast<unsigned>(args.num_splits));
  if constexpr (!Config::kHasMaxima) {
    using InClusters = typename Config::InClusters;
    if (in_clusters) {
      return launch_clusters<sm90a::sm90a_kvcache_fwd_kernel<InClusters>>(
          kName, where, clusters_of<InClusters>(grid, args.num_splits), args, q_map);
    }
  }
  return launch<sm90a::sm90a_kvcache_fwd_kernel<Config>>(
      kName, where, grid, Config::kThreads, sizeof(typename Config::SharedStorage), args, q_map);
}

constexpr int kFewestHeads = 8, kMostHeads = 64;  // of a tile

// The fewest that have all heads in one tile, or the most.
int heads_of_tile(std::int64_t heads) {
  int tile = kFewestHeads;
  while (tile < heads && tile < kMostHeads) tile *= 2;
  return tile;
}

// use(Config{}) for the cache's rows.
template <bool kHasMaxima, typename Layout, typename Use>
auto with_heads(int tile, Use&& use) {
  if (tile == 8) return use(sm90a::KvCacheFwdConfig<Layout, 8, kHasMaxima>{});
  if (tile == 16) return use(sm90a::KvCacheFwdConfig<Layout, 16, kHasMaxima>{});
  if (tile == 32) return use(sm90a::KvCacheFwdConfig<Layout, 32, kHasMaxima>{});
  return use(sm90a::KvCacheFwdConfig<Layout, 64, kHasMaxima>{});
}
template <bool kHasMaxima, typename Use>
auto with_config(const TensorView& cache, int tile, Use&& use) {
  return format_of(cache) == LatentFormat::kMlaV32 ? with_heads<kHasMaxima, MlaV32Layout>(tile, use)
                                                   : with_heads<kHasMaxima, MlaV4Layout>(tile, use);
}

// Times are microseconds of an H200, fitted to decode of 1 to 64 requests, 2048 slots each.
AttentionCta cta_of(int heads, int tokens) {
  const float of_all = static_cast<float>(heads) / kMostHeads;
  return {.heads = heads,
          .tokens = tokens,
          .per_sm = 1,
          .tile_time = 1.6f + 0.8f * of_all,
          .other_time = 4.2f,
          .exchange_time = 8.5f * of_all,
          .cluster_time = 0.33f,
          .combination_time = 9.0f,
          .partial_time = 0.055f * of_all};
}

// Of tiles of all heads, or of 64; of fewer where that gives work to more SMs.
SplitPlan plan_of(const KvCacheFwdParams& p) {
  const bool combines = make_attention_args(p).out_aligned;
  const auto plan_of_tile = [&](int heads) {
    return with_config<false>(p.k_cache, heads, [&](auto config) {
      using Config = decltype(config);
      return plan_splits(p, cta_of(heads, Config::kTokens), [&](int ctas) {
        if (!combines) return 0;
        using InClusters = typename Config::InClusters;
        return clusters_at_once<sm90a::sm90a_kvcache_fwd_kernel<InClusters>>(
            kName, p.launch, clusters_of<InClusters>(dim3(1, static_cast<unsigned>(ctas)), ctas));
      });
    });
  };
  const std::int64_t rows = p.q.size(0) * p.q.size(1);
  int heads = heads_of_tile(p.q.size(2));
  SplitPlan best = plan_of_tile(heads);
  if (p.batch_invariant) return best;
  for (heads /= 2; heads >= kFewestHeads; heads /= 2) {
    if (rows * ceil_div<std::int64_t>(p.q.size(2), heads) > device_limits(p.launch.device).num_sms)
      break;
    const SplitPlan plan = plan_of_tile(heads);
    if (plan.in_clusters && plan.time < best.time) best = plan;
  }
  return best;
}

bool is_copied(const TensorView& cache) { return !cache.defined() || paged_rows(cache).aligned; }

}  // namespace

// ---- flash_mla_sparse_fwd -----------------------------------------------------------------------

Support sm90a_fp8_sparse_fwd_takes(const SparseFwdParams& p) {
  if (!p.is_fp8()) return {"an 8-bit kv"};
  if (p.q.dtype != DType::kBFloat16) return {"a bfloat16 q"};
  if (!query_map_takes(p.q)) return {"q on 16 bytes"};
  if (!is_copied(p.kv)) return {"pages on 16 bytes"};
  return attention_sizes(p.q.size(0), p.q.size(1), p.indices.size(2), kFewestHeads);
}

Status sm90a_fp8_sparse_fwd(const SparseFwdParams& p) {
  if (p.q.size(0) == 0) return {};
  return with_config<true>(p.kv, heads_of_tile(p.q.size(1)), [&](auto config) -> Status {
    using Config = decltype(config);
    CUtensorMap q_map;
    if (Status status = make_query_map(p.q, Config::kHeads, q_map); !status.ok()) return status;
    return launch_rows<Config>(make_attention_args(p), q_map, p.q.size(0), false, p.launch);
  });
}

// ---- flash_mla_with_kvcache ---------------------------------------------------------------------

Support sm90a_kvcache_fwd_takes(const KvCacheFwdParams& p) {
  if (!p.is_fp8_kvcache) return {"an FP8 cache"};
  if (p.q.dtype != DType::kBFloat16) return {"a bfloat16 q"};
  if (!query_map_takes(p.q)) return {"q on 16 bytes"};
  if (!is_copied(p.k_cache) || !is_copied(p.extra_k_cache)) return {"pages on 16 bytes"};
  return attention_sizes(p.q.size(0) * p.q.size(1), p.q.size(2), keys_of(p), kFewestHeads);
}

std::int64_t sm90a_kvcache_fwd_workspace_bytes(const KvCacheFwdParams& p) {
  return plan_of(p).workspace_bytes(p);
}

Status sm90a_kvcache_fwd(const KvCacheFwdParams& p) {
  if (p.q.size(0) == 0 || p.q.size(1) == 0) return {};
  const SplitPlan plan = plan_of(p);
  return with_config<false>(p.k_cache, plan.heads_of_tile, [&](auto config) -> Status {
    using Config = decltype(config);
    CUtensorMap q_map;
    if (Status status = make_query_map(p.q, Config::kHeads, q_map); !status.ok()) return status;
    return run_splits(p, plan,
                      [&](const AttentionArgs& args, std::int64_t rows, const Launch& where) {
                        return launch_rows<Config>(args, q_map, rows, plan.in_clusters, where);
                      });
  });
}

}  // namespace dsa::cuda

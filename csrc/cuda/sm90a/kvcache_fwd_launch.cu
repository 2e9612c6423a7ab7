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

template <typename Config>
SplitPlan plan_of(const KvCacheFwdParams& p) {
  return plan_splits(p, {Config::kHeads, Config::kTokens, 1});
}

template <typename Config>
Status launch_rows(const AttentionArgs& args, const CUtensorMap& q_map, std::int64_t rows,
                   const Launch& where) {
  const std::int64_t head_tiles = ceil_div(args.num_heads, Config::kHeads);
  const dim3 grid(static_cast<unsigned>(rows * head_tiles), static_cast<unsigned>(args.num_splits));
  return launch<sm90a::sm90a_kvcache_fwd_kernel<Config>>(
      "sm90a_kvcache_fwd_kernel", where, grid, Config::kThreads,
      sizeof(typename Config::SharedStorage), args, q_map);
}

// use(Config{}) of the fewest heads that have all in one tile, or of 64.
template <bool kHasMaxima, typename Layout, typename Use>
auto with_heads(std::int64_t heads, Use&& use) {
  if (heads <= 8) return use(sm90a::KvCacheFwdConfig<Layout, 8, kHasMaxima>{});
  if (heads <= 16) return use(sm90a::KvCacheFwdConfig<Layout, 16, kHasMaxima>{});
  if (heads <= 32) return use(sm90a::KvCacheFwdConfig<Layout, 32, kHasMaxima>{});
  return use(sm90a::KvCacheFwdConfig<Layout, 64, kHasMaxima>{});
}

template <bool kHasMaxima, typename Use>
auto with_config(const TensorView& q, const TensorView& cache, Use&& use) {
  const std::int64_t heads = q.size(-2);
  return format_of(cache) == LatentFormat::kMlaV32
             ? with_heads<kHasMaxima, MlaV32Layout>(heads, use)
             : with_heads<kHasMaxima, MlaV4Layout>(heads, use);
}

template <typename Use>
auto with_config(const KvCacheFwdParams& p, Use&& use) {
  return with_config<false>(p.q, p.k_cache, use);
}

constexpr std::int64_t kFewestHeads = 8;  // a tile

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
  return with_config<true>(p.q, p.kv, [&](auto config) -> Status {
    using Config = decltype(config);
    CUtensorMap q_map;
    if (Status status = make_query_map(p.q, Config::kHeads, q_map); !status.ok()) return status;
    return launch_rows<Config>(make_attention_args(p), q_map, p.q.size(0), p.launch);
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
  return with_config(p,
                     [&](auto config) { return plan_of<decltype(config)>(p).workspace_bytes(p); });
}

Status sm90a_kvcache_fwd(const KvCacheFwdParams& p) {
  if (p.q.size(0) == 0 || p.q.size(1) == 0) return {};
  return with_config(p, [&](auto config) -> Status {
    using Config = decltype(config);
    CUtensorMap q_map;
    if (Status status = make_query_map(p.q, Config::kHeads, q_map); !status.ok()) return status;
    return run_splits(p, plan_of<Config>(p),
                      [&](const AttentionArgs& args, std::int64_t rows, const Launch& where) {
                        return launch_rows<Config>(args, q_map, rows, where);
                      });
  });
}

}  // namespace dsa::cuda

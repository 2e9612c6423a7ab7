// SPDX-License-Identifier: Apache-2.0
// flash_mla_sparse_fwd, and flash_mla_with_kvcache over 16-bit caches, on Hopper.
#include <algorithm>
#include <cstdint>

#include "cuda/common/attention_splits.h"
#include "cuda/common/launch.h"
#include "cuda/common/make_attention_args.h"
#include "cuda/common/page_map.h"
#include "cuda/common/query_map.h"
#include "cuda/cuda_kernels.h"
#include "cuda/sm90a/latent_few_kernel.cuh"
#include "cuda/sm90a/latent_fwd_kernel.cuh"
#include "cuda/sm90a/row_unions_kernel.cuh"

namespace dsa::cuda {

namespace {

using sm90a::LatentSource;

constexpr int kHeads = 64, kFewestHeads = 8, kBlockTokens = 64, kDimV = 512, kRope = 64;

// Up to so many heads are the product's columns. Decode has few query tokens, mostly, and with 32
// heads gains less by two workers an SM than it pays for more splits.
constexpr int kFewOfPrefill = 32, kFewOfDecode = 16;

int num_sms(const Launch& where) { return std::max(device_limits(where.device).num_sms, 1); }

// The works of `rows` query tokens.
template <typename Config>
sm90a::LatentFwdGrid all_of(const AttentionArgs& args, std::int64_t rows) {
  const std::int64_t tiles = rows * ceil_div(args.num_heads, Config::kHeads);
  return {static_cast<unsigned>(tiles), static_cast<unsigned>(tiles * args.num_splits)};
}

// As many CTAs as SMs, of a kernel with that Config.
template <auto kKernel, typename Config, typename Maps>
Status launch_works(const char* name, const AttentionArgs& args, const Maps& maps,
                    const sm90a::LatentFwdGrid& grid, const Launch& where) {
  static_assert(Config::kTokens == kBlockTokens && Config::kDimV == kDimV);
  const unsigned ctas = std::min(grid.works, static_cast<unsigned>(num_sms(where)));
  return launch<kKernel>(name, where, dim3(ctas), Config::kThreads,
                         sizeof(typename Config::SharedStorage), args, maps, grid);
}

template <typename Config>
Status launch_few(const AttentionArgs& args, const sm90a::LatentFewPages& pages,
                  const sm90a::LatentFwdGrid& grid, const Launch& where) {
  return launch_works<sm90a::sm90a_latent_few_fwd_kernel<Config>, Config>(
      "sm90a_latent_few_fwd_kernel", args, pages, grid, where);
}

template <typename Config>
Status launch_many(const AttentionArgs& args, const sm90a::LatentFwdMaps& maps,
                   const sm90a::LatentFwdGrid& grid, const Launch& where) {
  static_assert(Config::kHeads == kHeads);
  return launch_works<sm90a::sm90a_latent_fwd_kernel<Config>, Config>("sm90a_latent_fwd_kernel",
                                                                      args, maps, grid, where);
}

template <typename Element, int kRope>
struct Latents {
  template <int kHeads>
  using Few = sm90a::LatentFewConfig<Element, kRope, kHeads>;
  template <LatentSource kSource, int kQueries = 1>
  using Many = sm90a::LatentFwdConfig<Element, kRope, kSource, kQueries>;
};

// use(Latents{}) of q's dtype and dimension.
template <typename Use>
auto with_latents(const TensorView& q, Use&& use) {
  const bool has_rope = q.size(-1) == kDimV + kRope;
  if (q.dtype == DType::kFloat16) {
    return has_rope ? use(Latents<__half, kRope>{}) : use(Latents<__half, 0>{});
  }
  return has_rope ? use(Latents<__nv_bfloat16, kRope>{}) : use(Latents<__nv_bfloat16, 0>{});
}

// use(Config{}) of the fewest heads that have all of up to kFew in one tile.
template <int kFew, typename Latents, typename Use>
auto with_few(std::int64_t heads, Use&& use) {
  if (heads <= kFewestHeads) return use(typename Latents::template Few<kFewestHeads>{});
  if constexpr (kFew > 16) {
    if (heads > 16) return use(typename Latents::template Few<32>{});
  }
  return use(typename Latents::template Few<16>{});
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

}  // namespace

// ---- flash_mla_sparse_fwd -----------------------------------------------------------------------

Support sm90a_sparse_fwd_takes(const SparseFwdParams& p) {
  if (p.is_fp8()) return {"16-bit latents"};
  return takes(p, p.d_v, p.q.size(0), p.indices.size(2));
}

namespace {

// Unions of the rows of neighbouring query tokens, whose heads are 64 rows together.
struct UnionPlan {
  std::int64_t queries = 1;   // of a group; 1: no unions
  std::int64_t capacity = 0;  // rows of a union
  std::int64_t groups_per_launch = 0;

  static constexpr std::int64_t kCountBytes = 16;
  std::int64_t bytes_of_group() const { return (capacity + 2 + queries) * 4; }
  std::int64_t workspace_bytes() const {
    return queries == 1 ? 0 : kCountBytes + groups_per_launch * bytes_of_group();
  }

  sm90a::RowUnions in(const TensorView& workspace) const {
    sm90a::RowUnions unions;
    unions.counts = workspace.ptr<unsigned>();
    unions.groups = unions.counts + kCountBytes / 4;
    unions.tokens = unions.groups + groups_per_launch;
    unions.sizes = reinterpret_cast<std::int32_t*>(unions.tokens + groups_per_launch * queries);
    unions.rows = reinterpret_cast<std::uint32_t*>(unions.sizes + groups_per_launch);
    unions.capacity = static_cast<int>(capacity);
    return unions;
  }
};

template <int kQueries>
UnionPlan plan_unions_of(const SparseFwdParams& p) {
  using Config = sm90a::RowUnionsConfig<kQueries>;
  constexpr std::int64_t kFewestRows = 256;  // of a token: below, too few to pay for unions
  const std::int64_t tokens = p.q.size(0), topk = p.indices.size(2);
  const std::int64_t groups = tokens / kQueries;
  const bool are_worth_it =
      topk >= kFewestRows && topk <= Config::kRows && groups >= num_sms(p.launch);
  const std::int64_t slots = make_attention_args(p).lists[0].rows.num_slots;
  if (p.batch_invariant || !are_worth_it || slots > sm90a::RowUnions::kMostSlots) return {};
  UnionPlan plan{kQueries, Config::capacity(topk)};
  plan.groups_per_launch =
      std::min(ceil_div<std::int64_t>(tokens, kQueries),
               (kMaxWorkspaceBytes - UnionPlan::kCountBytes) / plan.bytes_of_group());
  return plan;
}

UnionPlan plan_unions(const SparseFwdParams& p) {
  const std::int64_t heads = p.q.size(1);
  if (heads > kFewOfPrefill) return {};
  return heads > kHeads / 4 ? plan_unions_of<2>(p) : plan_unions_of<4>(p);
}

// Groups of kQueries tokens that have unions as tiles of 64 heads, the others' tokens as few heads.
template <int kQueries, typename Latents>
Status launch_unions(const SparseFwdParams& p, const UnionPlan& plan) {
  using Config = sm90a::RowUnionsConfig<kQueries>;
  const sm90a::RowUnions unions = plan.in(p.workspace);
  AttentionArgs args = make_attention_args(p);
  for (const std::int64_t step = plan.groups_per_launch * kQueries; args.first_row < p.q.size(0);
       args.first_row += step) {
    const std::int64_t tokens = std::min(step, p.q.size(0) - args.first_row);
    const auto groups = static_cast<unsigned>(ceil_div<std::int64_t>(tokens, kQueries));
    if (Status status = clear_async(p.launch, unions.counts, UnionPlan::kCountBytes);
        !status.ok()) {
      return status;
    }
    if (Status status = launch<sm90a::sm90a_row_unions_kernel<Config>>(
            "sm90a_row_unions_kernel", p.launch, dim3(groups), Config::kThreads,
            sizeof(typename Config::SharedStorage), args, unions, static_cast<int>(tokens));
        !status.ok()) {
      return status;
    }
    using Many = typename Latents::template Many<LatentSource::kRows, kQueries>;
    if (Status status = launch_many<Many>(
            args, {}, {groups, groups, unions.groups, unions.counts, unions}, p.launch);
        !status.ok()) {
      return status;
    }
    const Status status = with_few<kFewOfPrefill, Latents>(p.q.size(1), [&](auto config) {
      sm90a::LatentFwdGrid grid = all_of<decltype(config)>(args, tokens);
      grid.some_tiles = unions.tokens;
      grid.num_some = unions.counts + 1;
      return launch_few<decltype(config)>(args, {}, grid, p.launch);
    });
    if (!status.ok()) return status;
  }
  return {};
}

}  // namespace

std::int64_t sm90a_sparse_fwd_workspace_bytes(const SparseFwdParams& p) {
  return plan_unions(p).workspace_bytes();
}

Status sm90a_sparse_fwd(const SparseFwdParams& p) {
  const std::int64_t rows = p.q.size(0), heads = p.q.size(1);
  if (rows == 0) return {};
  const AttentionArgs args = make_attention_args(p);
  const UnionPlan unions = plan_unions(p);
  return with_latents(p.q, [&](auto latents) {
    using Latents = decltype(latents);
    if (unions.queries == 2) return launch_unions<2, Latents>(p, unions);
    if (unions.queries == 4) return launch_unions<4, Latents>(p, unions);
    if (heads > kFewOfPrefill) {
      using Config = typename Latents::template Many<LatentSource::kRows>;
      return launch_many<Config>(args, {}, all_of<Config>(args, rows), p.launch);
    }
    return with_few<kFewOfPrefill, Latents>(heads, [&](auto config) {
      return launch_few<decltype(config)>(args, {}, all_of<decltype(config)>(args, rows), p.launch);
    });
  });
}

// ---- flash_mla_with_kvcache ---------------------------------------------------------------------

namespace {

// A tile of few heads is a block for each of two workers; of 64 it is two blocks, which take half
// of the time of what a CTA has beside.
SplitPlan plan_of(const KvCacheFwdParams& p) {
  const std::int64_t heads = p.q.size(2);
  if (heads > kFewOfDecode) return plan_splits(p, {kHeads, 2 * kBlockTokens, 1});
  return plan_splits(p, {heads > kFewestHeads ? 16 : kFewestHeads, kBlockTokens, 2});
}

// Dense, of pages that the copy engine takes.
bool are_pages_blocks(const KvCacheFwdParams& p) {
  return !p.indices.defined() && page_map_takes(p.k_cache, kBlockTokens);
}

}  // namespace

Support sm90a_latent_kvcache_fwd_takes(const KvCacheFwdParams& p) {
  if (p.is_fp8_kvcache) return {"a 16-bit cache"};
  return takes(p, p.head_dim_v, p.q.size(0) * p.q.size(1), keys_of(p));
}

std::int64_t sm90a_latent_kvcache_fwd_workspace_bytes(const KvCacheFwdParams& p) {
  return plan_of(p).workspace_bytes(p);
}

Status sm90a_latent_kvcache_fwd(const KvCacheFwdParams& p) {
  if (p.q.size(0) == 0 || p.q.size(1) == 0) return {};
  const bool are_few = p.q.size(2) <= kFewOfDecode;
  const bool are_blocks = are_pages_blocks(p) && (are_few || query_map_takes(p.q));
  sm90a::LatentFwdMaps maps{};
  if (are_blocks) {
    const Status status = make_page_map(p.k_cache, kBlockTokens, maps.pages);
    if (!status.ok()) return status;
  }
  if (are_blocks && !are_few) {
    if (Status status = make_query_map(p.q, kHeads, maps.q); !status.ok()) return status;
  }
  return with_latents(p.q, [&](auto latents) {
    using Latents = decltype(latents);
    return run_splits(
        p, plan_of(p), [&](const AttentionArgs& args, std::int64_t rows, const Launch& where) {
          if (are_few) {
            return with_few<kFewOfDecode, Latents>(p.q.size(2), [&](auto config) {
              return launch_few<decltype(config)>(args, {maps.pages, are_blocks},
                                                  all_of<decltype(config)>(args, rows), where);
            });
          }
          if (are_blocks) {
            using Config = typename Latents::template Many<LatentSource::kPages>;
            return launch_many<Config>(args, maps, all_of<Config>(args, rows), where);
          }
          using Config = typename Latents::template Many<LatentSource::kRows>;
          return launch_many<Config>(args, maps, all_of<Config>(args, rows), where);
        });
  });
}

}  // namespace dsa::cuda

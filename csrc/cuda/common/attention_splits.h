// SPDX-License-Identifier: Apache-2.0
// Decode's keys in splits: into how many a row's are cut, the launches, and what combines them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/common/attention_args.h"
#include "cuda/common/launch.h"
#include "cuda/common/make_attention_args.h"
#include "dsa/params.h"

namespace dsa::cuda {

// portable/attention_combine_launch.cu: the partial results of a launch's rows -> out and lse.
Status attention_combine(const AttentionArgs& args, std::int64_t rows, DType out,
                         const Launch& launch);

// What a CTA of an attention kernel has, and the time it takes, in any unit.
struct AttentionCta {
  int heads;   // of a tile
  int tokens;  // of a tile
  int per_sm;  // how many an SM has at a time

  float tile_time = 1.0f, other_time = 2.0f;
  // Of the combination of splits in a cluster: in proportion to what a CTA reads of others, and for
  // each CTA of the cluster.
  float exchange_time = 0.0f, cluster_time = 0.0f;
  // Of that of partial results in memory: of the launch, and for each CTA of the grid.
  float combination_time = 0.0f, partial_time = 0.0f;
};

struct SplitPlan {
  std::int64_t rows;             // query tokens
  std::int64_t rows_per_launch;  // so that the partial results fit the workspace
  int num_splits;
  int heads_of_tile;
  bool in_clusters = false;  // the splits of a row, which combine their results
  float time = 0.0f;

  bool has_partials() const { return num_splits > 1 && !in_clusters; }
  std::int64_t partial_heads(std::int64_t num_heads) const {
    return has_partials() ? rows_per_launch * num_splits * num_heads : 0;
  }
  std::int64_t workspace_bytes(const KvCacheFwdParams& p) const {
    return partial_heads(p.q.size(2)) * (p.head_dim_v + 1) * 4;
  }
};

inline constexpr std::int64_t kMostSplits = 64;
// With batch_invariant: of each split of a row but the last, or more where there are kMostSplits.
inline constexpr int kInvariantSplitTokens = 1024;

// clusters_at_once(n): how many clusters of n CTAs run at a time, 0 if the kernel cannot combine
// them.
template <typename ClustersAtOnce>
SplitPlan plan_splits(const KvCacheFwdParams& p, const AttentionCta& cta,
                      ClustersAtOnce&& clusters_at_once) {
  const std::int64_t heads = p.q.size(2);
  const std::int64_t rows = p.q.size(0) * p.q.size(1);
  const std::int64_t tiles = ceil_div<std::int64_t>(keys_of(p), cta.tokens);
  const std::int64_t most_splits = std::clamp<std::int64_t>(tiles, 1, kMostSplits);
  const std::int64_t bytes_per_split = heads * (p.head_dim_v + 1) * 4;  // of a row
  const auto affordable_rows = [&](std::int64_t splits) {
    return splits == 1 ? rows : std::min(rows, kMaxWorkspaceBytes / (splits * bytes_per_split));
  };

  if (p.batch_invariant) {
    // For each row as many as it needs of its own length. Two at least of a dense row, which are
    // combined, since the width of the table says nothing about it.
    const std::int64_t least = p.indices.defined() ? 1 : 2;
    const std::int64_t most =
        std::clamp<std::int64_t>(kMaxWorkspaceBytes / bytes_per_split, 1, kMostSplits);
    const std::int64_t splits = std::clamp(
        ceil_div<std::int64_t>(keys_of(p), kInvariantSplitTokens), std::min(least, most), most);
    return {rows, affordable_rows(splits), static_cast<int>(splits), cta.heads};
  }
  const std::int64_t ctas =
      std::max<std::int64_t>(rows, 1) * ceil_div<std::int64_t>(heads, cta.heads);
  const std::int64_t places = std::int64_t{device_limits(p.launch.device).num_sms} * cta.per_sm;
  const auto time_of = [&](std::int64_t turns, std::int64_t splits) {
    const auto tiles_of_cta = static_cast<float>(ceil_div(tiles, splits));
    return static_cast<float>(turns) * (tiles_of_cta * cta.tile_time + cta.other_time);
  };
  SplitPlan best{rows, rows, 1, cta.heads, false, time_of(ceil_div(ctas, places), 1)};
  const auto consider = [&](std::int64_t splits, bool in_clusters, float time) {
    if (time < best.time) {
      best = {rows, rows, static_cast<int>(splits), cta.heads, in_clusters, time};
    }
  };
  // No more splits than a number of tiles for each takes.
  const auto is_worth_it = [&](std::int64_t splits) {
    return ceil_div(tiles, splits) < ceil_div(tiles, splits - 1);
  };
  for (int splits = 2; splits <= std::min<std::int64_t>(most_splits, kMaxCluster); ++splits) {
    if (!is_worth_it(splits)) continue;
    const std::int64_t clusters = clusters_at_once(splits);
    if (clusters == 0) continue;
    const auto n = static_cast<float>(splits);
    consider(splits, true,
             time_of(ceil_div(ctas, clusters), splits) + cta.exchange_time * (n - 1.0f) / n +
                 cta.cluster_time * n);
  }
  for (std::int64_t splits = 2; splits <= most_splits; ++splits) {
    if (affordable_rows(splits) < rows) break;
    if (!is_worth_it(splits)) continue;
    consider(splits, false,
             time_of(ceil_div(ctas * splits, places), splits) + cta.combination_time +
                 cta.partial_time * static_cast<float>(ctas * splits));
  }
  return best;
}
inline SplitPlan plan_splits(const KvCacheFwdParams& p, const AttentionCta& cta) {
  return plan_splits(p, cta, [](int) { return 0; });
}

// launch_rows(args, rows, launch) for the rows of each launch.
template <typename LaunchRows>
Status run_splits(const KvCacheFwdParams& p, const SplitPlan& plan, LaunchRows&& launch_rows) {
  AttentionArgs args = make_attention_args(p);
  args.num_splits = plan.num_splits;
  args.least_split_tokens = p.batch_invariant ? kInvariantSplitTokens : 0;
  if (plan.has_partials()) {
    args.partial_out = p.workspace.ptr<float>();
    args.partial_lse = args.partial_out + plan.partial_heads(args.num_heads) * args.d_v;
  }
  for (std::int64_t row = 0; row < plan.rows; row += plan.rows_per_launch) {
    const std::int64_t rows = std::min(plan.rows_per_launch, plan.rows - row);
    args.first_row = row;
    if (Status status = launch_rows(args, rows, p.launch); !status.ok()) return status;
    if (!plan.has_partials()) continue;
    const Status status = attention_combine(args, rows, p.q.dtype, p.launch);
    if (!status.ok()) return status;
  }
  return {};
}

}  // namespace dsa::cuda

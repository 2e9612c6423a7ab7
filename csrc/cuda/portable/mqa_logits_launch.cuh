// SPDX-License-Identifier: Apache-2.0
// Host side of the portable indexer logits: task -> launch, for either kind of products.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#include "cuda/common/launch.h"
#include "cuda/common/make_mqa_task.h"
#include "cuda/cuda_kernels.h"
#include "cuda/portable/mqa_logits_direct_kernel.cuh"
#include "cuda/portable/mqa_logits_kernel.cuh"

namespace dsa::cuda {

// Keys of a CTA that shares them: long against what a CTA costs to start, short enough to fill the
// GPU evenly.
inline std::int64_t choose_shared_chunk(std::int64_t extent, std::int64_t row_ctas, int num_sms) {
  constexpr std::int64_t kFewest = 256;
  constexpr std::int64_t kMost = 4096;
  constexpr std::int64_t kCtasPerSm = 8;
  const std::int64_t wanted = ceil_div(kCtasPerSm * num_sms, row_ctas);
  return std::clamp(ceil_div(extent, wanted), kFewest, kMost);
}

// Keys of a CTA whose warps work by themselves: of some numbers of CTAs, one an SM at a time, that
// which ends first if all rows are long. Rows of unlike lengths need CTAs that are not too long.
inline std::int64_t choose_direct_chunk(std::int64_t extent, std::int64_t row_ctas, int num_sms) {
  constexpr std::int64_t kFewest = 4 * MqaTile::kBlockKeys;  // a warp for each scheduler
  constexpr std::int64_t kMost = 8192;
  constexpr std::int64_t kStart = 512;  // keys in the time that a CTA takes to start
  constexpr std::int64_t kMostWaves = 16;
  std::int64_t best = kMost, best_time = std::numeric_limits<std::int64_t>::max();
  for (std::int64_t waves = 1; waves <= kMostWaves; ++waves) {
    const std::int64_t chunks = std::max<std::int64_t>(waves * num_sms / row_ctas, 1);
    const std::int64_t chunk = round_up(std::clamp(ceil_div(extent, chunks), kFewest, kMost),
                                        std::int64_t{MqaTile::kBlockKeys});
    const std::int64_t ctas = row_ctas * ceil_div(extent, chunk);
    const std::int64_t time = ceil_div<std::int64_t>(ctas, num_sms) * (chunk + kStart);
    if (time < best_time) {
      best = chunk;
      best_time = time;
    }
  }
  return best;
}

template <template <int> typename ProductsOf, int kHeadDim, int kHeads, typename Keys>
Status launch_mqa_logits(MqaTask<Keys> task, const char* name, const Launch& where) {
  using Shared = MqaLogits<ProductsOf, kHeadDim, kHeads, Keys>;
  using Direct = MqaLogitsDirect<ProductsOf, kHeadDim, kHeads, Keys>;
  using Scores = typename Shared::Scores;
  const std::int64_t extent = std::max<std::int64_t>(task.columns, task.keys.num_keys);
  if (task.num_groups == 0 || task.rows_per_group == 0 || extent == 0) return {};

  const std::int64_t sets = ceil_div<std::int64_t>(task.rows_per_group, Scores::kQueries);
  // Keys made into fragments by up to two warps, each for itself, cost less than a barrier.
  const bool direct = Scores::kWarpsPerQuery == 1 && sets <= 2;
  const std::int64_t warps_q = direct ? sets : MqaTile::kWarps;
  const std::int64_t cta_rows = warps_q / Scores::kWarpsPerQuery * Scores::kQueries;
  task.warps_q_log2 = std::countr_zero(static_cast<std::uint64_t>(warps_q));
  task.cta_rows = static_cast<std::int32_t>(cta_rows);
  task.ctas_per_group = static_cast<std::uint32_t>(ceil_div(task.rows_per_group, cta_rows));
  const std::int64_t row_ctas = task.num_groups * task.ctas_per_group;
  const int num_sms = std::max(device_limits(where.device).num_sms, 1);
  const std::int64_t wanted = direct ? choose_direct_chunk(extent, row_ctas, num_sms)
                                     : choose_shared_chunk(extent, row_ctas, num_sms);
  const std::int64_t chunk =
      round_up(std::max(wanted, ceil_div(extent, kMaxGridYZ)), std::int64_t{MqaTile::kBlockKeys});
  task.chunk_keys = static_cast<std::uint32_t>(chunk);

  const dim3 grid(static_cast<unsigned>(row_ctas), static_cast<unsigned>(ceil_div(extent, chunk)));
  if constexpr (Scores::kWarpsPerQuery == 1) {
    if (direct) {
      return launch<portable_mqa_logits_direct_kernel<ProductsOf, kHeadDim, kHeads, Keys>>(
          name, where, grid, MqaTile::kThreads, sizeof(typename Direct::SharedStorage), task);
    }
  }
  return launch<portable_mqa_logits_kernel<ProductsOf, kHeadDim, kHeads, Keys>>(
      name, where, grid, MqaTile::kThreads, sizeof(typename Shared::SharedStorage), task);
}

template <template <int> typename ProductsOf, int kHeadDim, typename Keys>
Status launch_mqa_logits(const MqaTask<Keys>& task, const char* name, const Launch& where) {
  if (task.num_heads <= 16) return launch_mqa_logits<ProductsOf, kHeadDim, 16>(task, name, where);
  if (task.num_heads <= 32) return launch_mqa_logits<ProductsOf, kHeadDim, 32>(task, name, where);
  if (task.num_heads <= 64) return launch_mqa_logits<ProductsOf, kHeadDim, 64>(task, name, where);
  return launch_mqa_logits<ProductsOf, kHeadDim, 128>(task, name, where);
}

// Params: MqaLogitsParams or PagedMqaLogitsParams.
template <template <int> typename ProductsOf, typename Params>
Status run_mqa_logits(const Params& p, const char* name) {
  const auto task = make_task(p);
  switch (p.q.size(-1)) {
    case 32: return launch_mqa_logits<ProductsOf, 32>(task, name, p.launch);
    case 64: return launch_mqa_logits<ProductsOf, 64>(task, name, p.launch);
    default: return launch_mqa_logits<ProductsOf, 128>(task, name, p.launch);
  }
}

}  // namespace dsa::cuda

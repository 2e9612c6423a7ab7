// SPDX-License-Identifier: Apache-2.0
// Host side of the indexer logits: params -> task -> launch, for either kind of products.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <string>

#include "cuda/common/launch.h"
#include "cuda/cuda_kernels.h"
#include "cuda/portable/mqa_logits_direct_kernel.cuh"
#include "cuda/portable/mqa_logits_kernel.cuh"

namespace dsa::cuda {

// The largest power of two up to 16 that divides an address and the strides (bytes) from it.
inline std::int32_t alignment_of(const void* base, std::initializer_list<std::int64_t> strides) {
  std::uint64_t bits = reinterpret_cast<std::uintptr_t>(base) | 16;
  for (std::int64_t stride : strides) bits |= static_cast<std::uint64_t>(stride);
  return std::int32_t{1} << std::countr_zero(bits);
}

template <typename Keys>
void set_queries_and_output(MqaTask<Keys>& task, const TensorView& q, const TensorView& weights,
                            const TensorView& out, bool clean) {
  const bool grouped = q.ndim == 4;
  task.q = q.ptr<const std::uint8_t>();
  task.q_strides[0] = grouped ? q.stride(0) : 0;
  task.q_strides[1] = q.stride(-3);
  task.q_strides[2] = q.stride(-2);
  task.q_alignment = alignment_of(q.data, {task.q_strides[0], q.stride(-3), q.stride(-2)});
  task.num_groups = grouped ? q.size(0) : 1;
  task.rows_per_group = q.size(-3);
  task.num_heads = static_cast<std::int32_t>(q.size(-2));
  task.weights = weights.ptr<const float>();
  task.weights_stride = weights.stride(0);
  task.out = out.data;
  task.out_stride = out.stride(0);
  task.out_is_bf16 = out.dtype == DType::kBFloat16;
  task.columns = out.size(1);
  task.clean = clean;
}

inline MqaTask<FlatKeys> make_task(const MqaLogitsParams& p) {
  MqaTask<FlatKeys> task{};
  set_queries_and_output(task, p.q, p.weights, p.out, p.clean_logits);
  task.columns_are_relative = p.max_seqlen_k > 0;
  task.key_alignment = alignment_of(p.k.data, {p.k.stride(0)});
  FlatKeys& keys = task.keys;
  keys.k = p.k.ptr<const std::uint8_t>();
  keys.k_stride = p.k.stride(0);
  keys.scale = p.k_scale.ptr<const std::uint8_t>();
  keys.scale_stride = p.k_scale.stride(0) * std::int64_t{sizeof(float)};
  keys.starts = p.k_start.ptr<const std::int32_t>();
  keys.start_stride = p.k_start.stride(0);
  keys.ends = p.k_end.ptr<const std::int32_t>();
  keys.end_stride = p.k_end.stride(0);
  keys.num_keys = p.k.size(0);
  keys.max_window = task.columns_are_relative ? p.max_seqlen_k : keys.num_keys;
  return task;
}

inline MqaTask<PagedKeys> make_task(const PagedMqaLogitsParams& p) {
  MqaTask<PagedKeys> task{};
  set_queries_and_output(task, p.q, p.weights, p.out, p.clean_logits);
  task.key_alignment = alignment_of(p.kv_cache.data, {p.kv_cache.stride(0)});
  PagedKeys& keys = task.keys;
  keys.cache = p.kv_cache.ptr<const std::uint8_t>();
  keys.page_stride = p.kv_cache.stride(0);
  keys.num_pages = p.kv_cache.size(0);
  keys.layout = {p.q.size(-1), p.kv_cache.size(1)};
  constexpr std::int64_t kMostKeys = std::numeric_limits<std::int32_t>::max();
  keys.page_size = FastDivisor(std::min(keys.layout.page_size, kMostKeys));
  keys.table = p.block_table.ptr<const std::int32_t>();
  keys.table_stride = p.block_table.stride(0);
  keys.lens = p.context_lens.ptr<const std::int32_t>();
  keys.lens_of_rows = p.context_lens.ndim == 2;
  keys.lens_strides[0] = p.context_lens.stride(0);
  keys.lens_strides[1] = keys.lens_of_rows ? p.context_lens.stride(1) : 0;
  keys.next_n = task.rows_per_group;
  keys.num_keys = std::min(p.max_context_len, p.block_table.size(1) * keys.layout.page_size);
  return task;
}

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
  const std::int64_t extent = std::max(task.columns, task.keys.num_keys);
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

// What all indexer kernels here ask of their arguments.
template <typename Params>
Support mqa_shapes(const Params& p) {
  const std::int64_t head_dim = p.q.size(-1);
  if (head_dim != 32 && head_dim != 64 && head_dim != 128) {
    return {"index_head_dim 32, 64 or 128, not " + std::to_string(head_dim)};
  }
  if (p.q.size(-2) > MqaTile::kMaxHeads) {
    return {"1 to 128 index heads, not " + std::to_string(p.q.size(-2))};
  }
  const std::int64_t rows = p.q.numel() / (p.q.size(-2) * head_dim);
  if (rows > kMaxGridX) return {"up to 2147483647 queries, not " + std::to_string(rows)};
  return {};
}

}  // namespace dsa::cuda

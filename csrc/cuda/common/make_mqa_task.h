// SPDX-License-Identifier: Apache-2.0
// Params of the indexer -> task.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <string>

#include "cuda/common/launch.h"
#include "cuda/common/mqa_task.h"
#include "dispatch/registry.h"

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
  keys.num_keys = static_cast<std::int32_t>(p.k.size(0));
  keys.max_window =
      task.columns_are_relative ? static_cast<std::int32_t>(p.max_seqlen_k) : keys.num_keys;
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
  keys.page_size = FastDivisor31(std::min(keys.layout.page_size, kMostKeys));
  keys.table = p.block_table.ptr<const std::int32_t>();
  keys.table_stride = p.block_table.stride(0);
  keys.lens = p.context_lens.ptr<const std::int32_t>();
  keys.lens_of_rows = p.context_lens.ndim == 2;
  keys.lens_strides[0] = p.context_lens.stride(0);
  keys.lens_strides[1] = keys.lens_of_rows ? p.context_lens.stride(1) : 0;
  keys.next_n = static_cast<std::int32_t>(task.rows_per_group);
  keys.num_keys = static_cast<std::int32_t>(
      std::min(p.max_context_len, p.block_table.size(1) * keys.layout.page_size));
  return task;
}

// What all indexer kernels ask of their arguments.
template <typename Params>
Support mqa_shapes(const Params& p) {
  const std::int64_t head_dim = p.q.size(-1);
  if (head_dim != 32 && head_dim != 64 && head_dim != 128) {
    return {"index_head_dim 32, 64 or 128, not " + std::to_string(head_dim)};
  }
  if (p.q.size(-2) > kMaxIndexHeads) {
    return {"1 to 128 index heads, not " + std::to_string(p.q.size(-2))};
  }
  const std::int64_t rows = p.q.numel() / (p.q.size(-2) * head_dim);
  if (rows > kMaxGridX) return {"up to 2147483647 queries, not " + std::to_string(rows)};
  return {};
}

}  // namespace dsa::cuda

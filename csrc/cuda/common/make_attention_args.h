// SPDX-License-Identifier: Apache-2.0
// Params of attention -> arguments of its kernels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <numbers>
#include <string>

#include "cuda/common/attention_args.h"
#include "cuda/common/launch.h"
#include "dispatch/registry.h"
#include "dsa/kv_layout.h"
#include "dsa/params.h"

namespace dsa::cuda {

inline LatentFormat format_of(const TensorView& cache) {
  if (cache.dtype == DType::kBFloat16) return LatentFormat::kBf16;
  if (cache.dtype == DType::kFloat16) return LatentFormat::kF16;
  return cache.size(-1) == MlaV32Layout::kTokenBytes ? LatentFormat::kMlaV32 : LatentFormat::kMlaV4;
}

inline bool is_aligned(const void* data, std::initializer_list<std::int64_t> strides_in_bytes) {
  constexpr std::uintptr_t kAlignment = 16;
  std::uintptr_t bits = reinterpret_cast<std::uintptr_t>(data);
  for (const std::int64_t stride : strides_in_bytes) bits |= static_cast<std::uintptr_t>(stride);
  return bits % kAlignment == 0;
}

inline LatentRows latent_rows(const TensorView& data, std::int64_t pages, std::int64_t page_size,
                              std::int64_t page_stride, std::int64_t token_stride) {
  constexpr std::int64_t kMost = std::int64_t{1} << 31;  // slots are int32
  LatentRows rows;
  rows.data = data.ptr<const std::uint8_t>();
  rows.num_pages = std::min(pages, kMost);
  rows.page_size = FastDivisor31(std::min(page_size, kMost));
  rows.num_slots = rows.num_pages * std::min(page_size, kMost);
  rows.page_stride = page_stride;
  rows.token_stride = token_stride;
  rows.aligned = is_aligned(data.data, {page_stride, token_stride});
  return rows;
}

inline LatentRows flat_rows(const TensorView& kv) {
  return latent_rows(kv, 1, kv.size(0), 0, kv.stride(0) * 2);
}

inline LatentRows paged_rows(const TensorView& cache) {
  const LatentFormat format = format_of(cache);
  const std::int64_t pages = cache.size(0), page_size = cache.size(1);
  if (format == LatentFormat::kBf16 || format == LatentFormat::kF16) {
    return latent_rows(cache, pages, page_size, cache.stride(0) * 2, cache.stride(1) * 2);
  }
  if (format == LatentFormat::kMlaV32) {
    LatentRows rows =
        latent_rows(cache, pages, page_size, cache.stride(0), MlaV32Layout::kTokenBytes);
    rows.scales_offset = MlaV32Layout::scales(0);
    rows.scales_stride = MlaV32Layout::kTokenBytes;
    return rows;
  }
  LatentRows rows = latent_rows(cache, pages, page_size, cache.stride(0), MlaV4Layout::kDataBytes);
  rows.scales_offset = MlaV4Layout{page_size}.scales(0);
  rows.scales_stride = MlaV4Layout::kScaleBytes;
  return rows;
}

inline SlotList slot_list(const LatentRows& rows, const TensorView& indices,
                          const TensorView& length) {
  SlotList list;
  list.rows = rows;
  list.slots = indices.ptr<const std::int32_t>();
  list.stride_b = indices.stride(0);
  list.stride_j = indices.stride(1);
  list.count = static_cast<int>(indices.size(2));
  if (length.defined()) {
    list.length = length.ptr<const std::int32_t>();
    list.length_stride_b = length.stride(0);
    list.length_stride_j = length.ndim == 2 ? length.stride(1) : 0;
  }
  return list;
}

// What the two ops have in common. q and out: [.., heads, dim], their last three strides.
inline AttentionArgs common_args(const TensorView& q, const TensorView& out, const TensorView& sink,
                                 double scale, std::int64_t d_v) {
  AttentionArgs a;
  a.q = q.ptr<const std::uint16_t>();
  a.q_stride_h = q.stride(-2);
  a.q_stride_b = q.stride(0);
  a.out = out.ptr<std::uint16_t>();
  a.out_stride_h = out.stride(-2);
  a.out_stride_b = out.stride(0);
  if (q.ndim == 4) {
    a.q_stride_j = q.stride(1);
    a.out_stride_j = out.stride(1);
    a.tokens_per_request = static_cast<int>(std::max<std::int64_t>(q.size(1), 1));
  }
  a.q_aligned = is_aligned(q.data, {a.q_stride_b * 2, a.q_stride_j * 2, a.q_stride_h * 2});
  a.out_aligned =
      is_aligned(out.data, {a.out_stride_b * 2, a.out_stride_j * 2, a.out_stride_h * 2});
  if (sink.defined()) {
    a.sink = sink.ptr<const float>();
    a.sink_stride = sink.stride(0);
  }
  a.scale_log2 = static_cast<float>(scale * std::numbers::log2e);
  a.num_heads = static_cast<int>(q.size(-2));
  a.d_qk = static_cast<int>(q.size(-1));
  a.d_v = static_cast<int>(d_v);
  return a;
}

inline AttentionArgs make_attention_args(const SparseFwdParams& p) {
  AttentionArgs a = common_args(p.q, p.out, p.attn_sink, p.sm_scale, p.d_v);
  a.lse = p.lse.ptr<float>();
  a.lse_stride_b = p.lse.stride(0);
  a.lse_stride_h = p.lse.stride(1);
  a.max_logits = p.max_logits.ptr<float>();
  a.max_stride_b = p.max_logits.stride(0);
  a.max_stride_h = p.max_logits.stride(1);
  const LatentRows rows = p.kv.ndim == 4 ? paged_rows(p.kv) : flat_rows(p.kv);
  a.lists[0] = slot_list(rows, p.indices, p.topk_length);
  return a;
}

inline AttentionArgs make_attention_args(const KvCacheFwdParams& p) {
  AttentionArgs a = common_args(p.q, p.out, p.attn_sink, p.softmax_scale, p.head_dim_v);
  a.lse = p.lse.ptr<float>();
  a.lse_stride_b = p.lse.stride(0);
  a.lse_stride_h = p.lse.stride(1);
  a.lse_stride_j = p.lse.stride(2);
  if (p.indices.defined()) {
    a.lists[0] = slot_list(paged_rows(p.k_cache), p.indices, p.topk_length);
    if (p.extra_k_cache.defined()) {
      a.lists[1] = slot_list(paged_rows(p.extra_k_cache), p.extra_indices, p.extra_topk_length);
    }
  } else {
    a.lists[0].rows = paged_rows(p.k_cache);
    a.block_table = p.block_table.ptr<const std::int32_t>();
    a.table_stride = p.block_table.stride(0);
    a.table_width = p.block_table.size(1);
    a.seqlens = p.cache_seqlens.ptr<const std::int32_t>();
    a.seqlens_stride = p.cache_seqlens.stride(0);
    a.causal = p.causal;
  }
  return a;
}

// What the kernels' launches can count; `heads_of_tile`: the fewest that a CTA has.
inline Support attention_sizes(std::int64_t rows, std::int64_t heads, std::int64_t keys,
                               std::int64_t heads_of_tile) {
  constexpr std::int64_t kMaxKeys = std::int64_t{1} << 30;
  if (heads > kMaxGridX || rows > kMaxGridX / ceil_div(heads, heads_of_tile)) {
    return {"fewer query tokens times heads"};
  }
  if (keys > kMaxKeys) return {"at most 2^30 keys a row, not " + std::to_string(keys)};
  return {};
}

// Keys of a row, at most.
inline std::int64_t keys_of(const KvCacheFwdParams& p) {
  if (!p.indices.defined()) return p.block_table.size(1) * p.k_cache.size(1);
  return p.indices.size(2) + (p.extra_indices.defined() ? p.extra_indices.size(2) : 0);
}

}  // namespace dsa::cuda

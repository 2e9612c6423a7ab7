// SPDX-License-Identifier: Apache-2.0
// Decode attention over a paged latent cache, sparse (slots) or dense (block table). A work item is
// one query token and a group of heads; the tile loop stands in attention_row.h.
// Memory: the output and an AttentionRow a worker.
#include <algorithm>

#include "cpu/attention_row.h"
#include "cpu/cpu_kernels.h"

namespace dsa::cpu {

namespace {

// Query token j of request b.
struct Token {
  std::int64_t b, j;
};

HeadGroup head_group(const KvCacheFwdParams& p, Token t, std::int64_t first, int heads) {
  HeadGroup g;
  g.dtype = p.q.dtype;
  g.heads = heads;
  g.d_qk = static_cast<int>(p.q.size(3));
  g.d_v = static_cast<int>(p.head_dim_v);
  g.scale_log2 = static_cast<float>(p.softmax_scale * kLog2E);
  g.q = p.q.ptr<const std::uint16_t>() + t.b * p.q.stride(0) + t.j * p.q.stride(1) +
        first * p.q.stride(2);
  g.q_stride = p.q.stride(2);
  if (p.attn_sink.defined()) {
    g.sink = p.attn_sink.ptr<const float>() + first * p.attn_sink.stride(0);
    g.sink_stride = p.attn_sink.stride(0);
  }
  g.out = p.out.ptr<std::uint16_t>() + t.b * p.out.stride(0) + t.j * p.out.stride(1) +
          first * p.out.stride(2);
  g.out_stride = p.out.stride(2);
  g.lse =
      p.lse.ptr<float>() + t.b * p.lse.stride(0) + first * p.lse.stride(1) + t.j * p.lse.stride(2);
  g.lse_stride = p.lse.stride(1);
  return g;
}

// The slots of one cache for a token; none when the op got no such cache.
SparseCursor::List slots(const LatentRows& rows, const TensorView& indices,
                         const TensorView& length, Token t) {
  if (!indices.defined()) return {};
  std::int64_t count = indices.size(2);
  if (length.defined()) {
    const std::int64_t at =
        t.b * length.stride(0) + (length.ndim == 2 ? t.j * length.stride(1) : 0);
    count = std::clamp<std::int64_t>(length.ptr<const std::int32_t>()[at], 0, count);
  }
  const auto* first = indices.ptr<const std::int32_t>() + t.b * indices.stride(0);
  return {&rows, first + t.j * indices.stride(1), count};
}

// How many tokens of the request the query sees.
std::int64_t dense_length(const KvCacheFwdParams& p, Token t) {
  const std::int64_t most = p.block_table.size(1) * p.k_cache.size(1);
  const std::int64_t length = std::clamp<std::int64_t>(
      p.cache_seqlens.ptr<const std::int32_t>()[t.b * p.cache_seqlens.stride(0)], 0, most);
  return p.causal ? length - p.q.size(1) + 1 + t.j : length;
}

}  // namespace

Status kvcache_fwd(const KvCacheFwdParams& p) {
  const std::int64_t queries = p.q.size(1);
  const std::int64_t tokens = p.q.size(0) * queries;
  const int num_heads = static_cast<int>(p.q.size(2));
  const int d_qk = static_cast<int>(p.q.size(3));
  const int d_v = static_cast<int>(p.head_dim_v);
  const int group_heads = std::min(heads_per_group(num_heads, tokens), num_heads);
  const std::int64_t groups = (num_heads + group_heads - 1) / group_heads;

  const bool sparse = p.indices.defined();
  const LatentRows rows = LatentRows::paged(p.k_cache);
  const LatentRows extra_rows =
      p.extra_k_cache.defined() ? LatentRows::paged(p.extra_k_cache) : LatentRows();
  const PageTable table{p.block_table, rows.page_size(), rows.num_pages()};

  const std::int64_t keys = !sparse ? p.block_table.size(1) * rows.page_size()
                            : p.extra_indices.defined()
                                ? p.indices.size(2) + p.extra_indices.size(2)
                                : p.indices.size(2);
  const double flops =
      2.0 * (d_qk + d_v) * num_heads * static_cast<double>(tokens) * static_cast<double>(keys);
  for_each_item(
      {tokens * groups, flops, AttentionRow::bytes(group_heads, d_qk, d_v)},
      [&] { return AttentionRow(group_heads, d_qk, d_v); },
      [&](AttentionRow& row, std::int64_t item) {
        const Token t = {item / groups / queries, item / groups % queries};
        const std::int64_t first = item % groups * group_heads;
        const int heads = static_cast<int>(std::min<std::int64_t>(group_heads, num_heads - first));
        const HeadGroup group = head_group(p, t, first, heads);
        if (sparse) {
          SparseCursor cursor(slots(rows, p.indices, p.topk_length, t),
                              slots(extra_rows, p.extra_indices, p.extra_topk_length, t));
          row.attend(group, cursor);
        } else {
          DenseCursor cursor(&rows, table.row(t.b), dense_length(p, t));
          row.attend(group, cursor);
        }
      });
  return {};
}

}  // namespace dsa::cpu

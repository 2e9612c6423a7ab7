// SPDX-License-Identifier: Apache-2.0
// Sparse prefill attention over a flat latent or a paged cache. A work item is one query token and
// a group of heads, all of them unless there are fewer tokens than threads; the tile loop stands in
// attention_row.h.
// Memory: the output and an AttentionRow a worker.
#include <algorithm>

#include "cpu/attention_row.h"
#include "cpu/cpu_kernels.h"

namespace dsa::cpu {

namespace {

HeadGroup head_group(const SparseFwdParams& p, std::int64_t token, std::int64_t first, int heads) {
  HeadGroup g;
  g.dtype = p.q.dtype;
  g.heads = heads;
  g.d_qk = static_cast<int>(p.q.size(2));
  g.d_v = static_cast<int>(p.d_v);
  g.scale_log2 = static_cast<float>(p.sm_scale * kLog2E);
  g.q = p.q.ptr<const std::uint16_t>() + token * p.q.stride(0) + first * p.q.stride(1);
  g.q_stride = p.q.stride(1);
  if (p.attn_sink.defined()) {
    g.sink = p.attn_sink.ptr<const float>() + first * p.attn_sink.stride(0);
    g.sink_stride = p.attn_sink.stride(0);
  }
  g.out = p.out.ptr<std::uint16_t>() + token * p.out.stride(0) + first * p.out.stride(1);
  g.out_stride = p.out.stride(1);
  g.lse = p.lse.ptr<float>() + token * p.lse.stride(0) + first * p.lse.stride(1);
  g.lse_stride = p.lse.stride(1);
  g.max_logits =
      p.max_logits.ptr<float>() + token * p.max_logits.stride(0) + first * p.max_logits.stride(1);
  g.max_logits_stride = p.max_logits.stride(1);
  return g;
}

SparseCursor::List slots(const SparseFwdParams& p, const LatentRows& rows, std::int64_t token) {
  std::int64_t count = p.indices.size(2);
  if (p.topk_length.defined()) {
    const std::int64_t length =
        p.topk_length.ptr<const std::int32_t>()[token * p.topk_length.stride(0)];
    count = std::clamp<std::int64_t>(length, 0, count);
  }
  return {&rows, p.indices.ptr<const std::int32_t>() + token * p.indices.stride(0), count};
}

}  // namespace

Status sparse_fwd(const SparseFwdParams& p) {
  const std::int64_t tokens = p.q.size(0);
  const int num_heads = static_cast<int>(p.q.size(1));
  const int d_qk = static_cast<int>(p.q.size(2));
  const int d_v = static_cast<int>(p.d_v);
  const int group_heads = std::min(heads_per_group(num_heads, tokens), num_heads);
  const std::int64_t groups = (num_heads + group_heads - 1) / group_heads;
  const LatentRows rows = p.kv.ndim == 4 ? LatentRows::paged(p.kv) : LatentRows::flat(p.kv);

  const double flops = 2.0 * (d_qk + d_v) * num_heads * static_cast<double>(tokens) *
                       static_cast<double>(p.indices.size(2));
  for_each_item(
      {tokens * groups, flops, AttentionRow::bytes(group_heads, d_qk, d_v)},
      [&] { return AttentionRow(group_heads, d_qk, d_v); },
      [&](AttentionRow& row, std::int64_t item) {
        const std::int64_t token = item / groups;
        const std::int64_t first = item % groups * group_heads;
        const int heads = static_cast<int>(std::min<std::int64_t>(group_heads, num_heads - first));
        SparseCursor cursor(slots(p, rows, token));
        row.attend(head_group(p, token, first, heads), cursor);
      });
  return {};
}

}  // namespace dsa::cpu

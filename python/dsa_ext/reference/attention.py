# SPDX-License-Identifier: Apache-2.0
"""Sparse and dense MLA attention in fp32 or fp64: K is the latent, V its first d_v values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._arguments import as_int64, expect_d_v, expect_one_head
from ._chunks import compute_dtype, map_rows
from .cache import latent_rows


def softmax_terms(logits: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unnormalised masked softmax over the last dimension.

    logits [..., n], valid bool broadcastable to it. Returns (terms [..., n], their sum with 1 for
    an empty row, the largest logit (-inf if empty, +inf also beside NaN), log-sum-exp (finite,
    meaningless if empty)). A row is empty if its terms are all 0.
    """
    logits = logits.masked_fill(~valid, float("-inf"))
    if logits.shape[-1]:
        peak = logits.detach().amax(dim=-1)
        peak = peak.masked_fill(torch.isposinf(logits.detach()).any(dim=-1), float("inf"))
    else:
        peak = logits.new_full(logits.shape[:-1], float("-inf"))
    shift = torch.where(torch.isneginf(peak), 0.0, peak)
    terms = torch.exp(logits - shift.unsqueeze(-1))
    total = terms.sum(dim=-1)
    total = torch.where(total == 0, 1.0, total)
    return terms, total, peak, shift + torch.log(total)


def _attend(
    q: Tensor, kv: Tensor, valid: Tensor, scale: float, d_v: int, sink: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of q [C,H,d] over its own rows kv [C,T,d], valid bool [C,T], sink [H]."""
    kv = torch.where(valid.unsqueeze(-1), kv, 0.0)
    logits = torch.matmul(q, kv.transpose(-1, -2)) * scale
    terms, total, peak, lse = softmax_terms(logits, valid.unsqueeze(1))
    out = torch.matmul(terms, kv[..., :d_v]) / total.unsqueeze(-1)
    empty = torch.isneginf(peak)
    if sink is not None:
        out = out * torch.sigmoid(lse - sink).unsqueeze(-1)
    out = out.masked_fill(empty.unsqueeze(-1), 0.0)  # whatever the sink and the values, NaN too
    return out, peak, lse.masked_fill(empty, float("inf"))


def flash_mla_sparse_fwd(
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    sm_scale: float,
    d_v: int = 512,
    attn_sink: Tensor | None = None,
    topk_length: Tensor | None = None,
    *,
    batch_invariant: bool = False,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sparse prefill attention (FlashMLA's flash_mla_sparse_fwd).

    q: [s_q, h_q, d_qk], 16-bit, fp32 or fp64. kv: float [s_kv, 1, d_qk]; or a paged cache, float
    [pages, page_size, 1, d_qk] or bytes [..., 656] (d_qk 576) or [..., 584] (d_qk 512), used as
    e4m3 * scale without further rounding. indices: int32 [s_q, 1, topk], rows of kv or slots of the
    cache; one outside is ignored and its row never read, repeats count each time. attn_sink: fp32
    [h_q], out *= e^lse / (e^lse + e^sink). topk_length: int32 [s_q], entries from there on are
    ignored. batch_invariant changes nothing. Returns (out [s_q, h_q, d_v] in out_dtype or q's
    dtype, max_logits, lse), the latter fp32 [s_q, h_q] (fp64 if an input is), natural log, scale
    applied, without the sink. Nothing valid: out 0, max_logits -inf, lse +inf. Differentiable in q,
    float kv and attn_sink; max_logits is detached.
    """
    del batch_invariant
    expect_one_head("flash_mla_sparse_fwd: kv", kv)
    expect_d_v("flash_mla_sparse_fwd: d_v", d_v, q.shape[-1])
    if kv.dim() == 3 and kv.element_size() == 1:
        raise ValueError(
            "flash_mla_sparse_fwd: kv: expected bytes [pages, page_size, 1, 656 | 584], got "
            f"{list(kv.shape)}"
        )
    cache = kv.unsqueeze(0) if kv.dim() == 3 else kv
    source = (cache, as_int64("indices", indices.squeeze(1)), _per_query(topk_length, indices))
    return _attend_slots(q.unsqueeze(1), [source], d_v, sm_scale, attn_sink, out_dtype or q.dtype)


def _dense_slots(
    block_table: Tensor,
    cache_seqlens: Tensor,
    queries: int,
    page_size: int,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """Slots [B,T] of each request's tokens (-1 if none) and how many each query sees, [B,s_q]."""
    batch, width = block_table.shape
    lens = as_int64("cache_seqlens", cache_seqlens).clamp(0, width * page_size).unsqueeze(-1)
    longest = int(lens.max()) if batch else 0
    position = torch.arange(longest, device=block_table.device)
    entry = as_int64("block_table", block_table)[:, position // page_size]
    slots = torch.where(entry < 0, -1, entry * page_size + position % page_size)
    lane = torch.arange(queries, device=block_table.device)
    seen = lens - queries + 1 + lane if causal else lens.expand(batch, queries)
    return slots, seen


def _per_query(length: Tensor | None, indices: Tensor) -> Tensor:
    """A top-k length, int32 [b] or [b,s_q], as int64 rows [b*s_q, 1]; None means all of indices."""
    batch, queries, width = indices.shape
    if length is None:
        length = torch.full((batch,), width, dtype=torch.int64, device=indices.device)
    length = as_int64("topk_length", length)
    if length.dim() == 1:
        length = length.unsqueeze(-1).expand(batch, queries)
    return length.reshape(batch * queries, 1)


def flash_mla_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor | None,
    cache_seqlens: Tensor | None,
    head_dim_v: int,
    tile_scheduler_metadata: object = None,
    num_splits: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: Tensor | None = None,
    attn_sink: Tensor | None = None,
    extra_k_cache: Tensor | None = None,
    extra_indices_in_kvcache: Tensor | None = None,
    topk_length: Tensor | None = None,
    extra_topk_length: Tensor | None = None,
    enable_batch_invariant: bool = False,
    *,
    batch_invariant: bool = False,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Decode attention over a paged cache (FlashMLA's flash_mla_with_kvcache).

    q: [b, s_q, h_q, d_qk]. k_cache: float [pages, page_size, 1, d_qk], or bytes [..., 656] (d_qk
    576) or [..., 584] (d_qk 512), used as e4m3 * scale without further rounding; is_fp8_kvcache
    demands bytes.
    Sparse: indices int32 [b, s_q, topk] are slots, those outside the cache are ignored; topk_length
    int32 [b] or [b, s_q]; extra_k_cache, extra_indices_in_kvcache and extra_topk_length are a
    second cache of the same format in the same softmax. Dense (indices None): block_table int32
    [b,P] and cache_seqlens int32 [b]; tokens in invalid pages are ignored; causal: query j sees the
    first cache_seqlen - s_q + 1 + j keys. softmax_scale defaults to d_qk^-0.5; attn_sink: fp32
    [h_q]. tile_scheduler_metadata, num_splits, batch_invariant and enable_batch_invariant change
    nothing.
    Returns (out [b, s_q, h_q, head_dim_v] in out_dtype or q's dtype, lse fp32 (fp64 if an input is)
    [b, h_q, s_q], natural log, without the sink). Nothing valid: out 0, lse +inf. Differentiable in
    q, attn_sink and float caches.
    """
    del tile_scheduler_metadata, num_splits, batch_invariant, enable_batch_invariant
    batch, queries, heads, dim = q.shape
    if is_fp8_kvcache and k_cache.element_size() != 1:
        raise ValueError(
            "flash_mla_with_kvcache: k_cache: expected bytes for is_fp8_kvcache=True, "
            f"got {k_cache.dtype}"
        )
    if (extra_k_cache is None) != (extra_indices_in_kvcache is None):
        raise ValueError(
            "flash_mla_with_kvcache: extra_k_cache, extra_indices_in_kvcache: expected both or "
            "neither, got one"
        )
    expect_one_head("flash_mla_with_kvcache: k_cache", k_cache)
    expect_d_v("flash_mla_with_kvcache: head_dim_v", head_dim_v, dim)
    sources: list[tuple[Tensor, Tensor, Tensor]] = []
    if indices is None:
        if block_table is None or cache_seqlens is None:
            raise ValueError(
                "flash_mla_with_kvcache: block_table, cache_seqlens: expected tensors when indices "
                "is None, got None"
            )
        if extra_k_cache is not None or topk_length is not None or extra_topk_length is not None:
            raise ValueError(
                "flash_mla_with_kvcache: extra_k_cache, topk_length, extra_topk_length: expected "
                "None when indices is None, got tensors"
            )
        slots, seen = _dense_slots(block_table, cache_seqlens, queries, k_cache.shape[1], causal)
        sources.append((k_cache, slots, seen.reshape(batch * queries, 1)))
    else:
        if causal:
            raise ValueError(
                "flash_mla_with_kvcache: causal: expected False when indices is given, got True"
            )
        pairs = [(k_cache, indices, topk_length)]
        if extra_k_cache is not None and extra_indices_in_kvcache is not None:
            expect_one_head("flash_mla_with_kvcache: extra_k_cache", extra_k_cache)
            pairs.append((extra_k_cache, extra_indices_in_kvcache, extra_topk_length))
        for cache, index, length in pairs:
            slots = as_int64("indices", index.reshape(batch * queries, index.shape[-1]))
            sources.append((cache, slots, _per_query(length, index)))
    scale = dim**-0.5 if softmax_scale is None else softmax_scale
    out, _, lse = _attend_slots(q, sources, head_dim_v, scale, attn_sink, out_dtype or q.dtype)
    out = out.reshape(batch, queries, heads, head_dim_v)
    return out, lse.reshape(batch, queries, heads).transpose(1, 2).contiguous()


def _attend_slots(
    q: Tensor,
    sources: Sequence[tuple[Tensor, Tensor, Tensor]],
    d_v: int,
    scale: float,
    attn_sink: Tensor | None,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of q [b,s_q,h,d] over sources: (cache, slots [b or b*s_q, T], seen [b*s_q, 1]).

    Returns out [b*s_q,h,d_v], the largest logits and lse [b*s_q,h].
    """
    batch, queries, heads, dim = q.shape
    caches = [cache for cache, _, _ in sources]
    dtype = compute_dtype(q, attn_sink, *caches)
    sink = None if attn_sink is None else attn_sink.to(dtype)
    rows = batch * queries
    flat_q = q.reshape(rows, heads, dim)

    def gather(source: tuple[Tensor, Tensor, Tensor], row: Tensor) -> tuple[Tensor, Tensor]:
        cache, slots, seen = source
        pages, page_size = cache.shape[:2]
        slot = slots[row if slots.shape[0] == rows else row // queries]
        lane = torch.arange(slot.shape[-1], device=q.device)
        valid = (slot >= 0) & (slot < pages * page_size) & (lane < seen[row])
        if pages * page_size == 0:
            return torch.zeros((*slot.shape, dim), dtype=dtype, device=q.device), valid
        slot = slot.masked_fill(~valid, 0)
        latent = latent_rows(cache, slot // page_size, slot % page_size)
        return latent.to(dtype), valid

    def attend(begin: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
        row = torch.arange(begin, end, device=q.device)
        gathered = [gather(source, row) for source in sources]
        kv = torch.cat([latent for latent, _ in gathered], dim=1)
        valid = torch.cat([mask for _, mask in gathered], dim=1)
        out, peak, lse = _attend(flat_q[begin:end].to(dtype), kv, valid, scale, d_v, sink)
        return out.to(out_dtype), peak, lse

    width = sum(slots.shape[-1] for _, slots, _ in sources)
    per_row = (3 * dim + 3 * heads) * width * dtype.itemsize
    out, peak, lse = map_rows(attend, rows, per_row, (q, attn_sink, *caches))
    return out, peak, lse


def merge_attn_states(
    outs: Tensor | Sequence[Tensor],
    lses: Tensor | Sequence[Tensor],
    *,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Merge attention over disjoint key sets (the merge step of split decoding).

    outs: [n, ..., h, d], a tensor or a list of n; lses: fp32 [n, ..., h], natural log. A part with
    |lse| = inf is empty and its out is not used. Returns (out [..., h, d] in out_dtype or outs'
    dtype, lse fp32 [..., h], fp64 if an input is); all empty: out 0, lse +inf. Differentiable in
    both.
    """
    stacked = outs if isinstance(outs, Tensor) else torch.stack(tuple(outs))
    lse = lses if isinstance(lses, Tensor) else torch.stack(tuple(lses))
    dtype = compute_dtype(stacked, lse)
    parts = torch.movedim(lse.to(dtype), 0, -1)
    used = ~torch.isinf(parts)
    terms, total, peak, merged = softmax_terms(parts, used)
    share = torch.movedim(terms / total.unsqueeze(-1), -1, 0).unsqueeze(-1)
    present = torch.movedim(used, -1, 0).unsqueeze(-1)
    out = (torch.where(present, stacked.to(dtype), 0.0) * share).sum(dim=0)
    merged = merged.masked_fill(torch.isneginf(peak), float("inf"))
    return out.to(out_dtype or stacked.dtype), merged

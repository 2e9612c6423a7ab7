# SPDX-License-Identifier: Apache-2.0
"""DeepSeek-V3.2's lightning indexer: I[t,s] = scale[s] * sum_h w[t,h] * relu(q[t,h] . k[s])."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from ._arguments import as_int64
from ._chunks import compute_dtype, map_rows
from .cache import indexer_cache_keys
from .topk import topk_select

_SEGMENT = 256  # keys of one unit of scheduled work

PagedKeys = Tensor | tuple[Tensor, Tensor]
"""uint8 [pages, page_size, 1, D+4], or (values [pages, page_size, D], scales [pages, page_size])"""


def _scores(q: Tensor, key: Tensor, scale: Tensor, weights: Tensor, visible: Tensor) -> Tensor:
    """Indexer scores [C,N,L] of q [C,N,H,D], key [C,L,D] (C may broadcast), scale [C,L].

    weights [C,N,H]; visible bool [C,N,L]. Invisible entries are -inf. A key with a NaN makes its
    own visible entries NaN; it takes no part in products, so that no gradient meets it.
    """
    broken = torch.isnan(key).any(dim=-1) | torch.isnan(scale)
    key = torch.where(broken.unsqueeze(-1), 0.0, key)
    scale = torch.where(broken, 0.0, scale)
    rows, tokens, heads, dim = q.shape
    dots = torch.matmul(q.reshape(rows, tokens * heads, dim), key.transpose(-1, -2))
    dots = torch.relu(dots).reshape(rows, tokens, heads, dots.shape[-1])
    scores = torch.matmul(weights.unsqueeze(-2), dots).squeeze(-2) * scale.unsqueeze(-2)
    scores = scores.masked_fill(broken.unsqueeze(-2), float("nan"))
    return scores.masked_fill(~visible, float("-inf"))


def fp8_mqa_logits(
    q: Tensor,
    kv: tuple[Tensor, Tensor],
    weights: Tensor,
    cu_seq_len_k_start: Tensor,
    cu_seq_len_k_end: Tensor,
    clean_logits: bool = True,
    max_seqlen_k: int = 0,
    logits_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Indexer scores of a prefill (DeepGEMM's fp8_mqa_logits).

    q: e4m3 [S,H,D]; kv: (keys e4m3 [L,D], scales fp32 [L]); weights: fp32 [S,H]; windows
    [start, end): int32 [S], clamped to [0,L]. Returns logits_dtype [S,L], or [S,max_seqlen_k] if
    max_seqlen_k > 0, column c then being key start + c. Columns outside the window are -inf
    whatever clean_logits says. fp32 accumulation (fp64 if an input is). q, keys and scales may also
    be floats; differentiable in them and in weights.
    """
    del clean_logits  # What it leaves unspecified is -inf here.
    k, k_scale = kv
    dtype = compute_dtype(q, k, k_scale, weights)
    key, scale = k.to(dtype), k_scale.to(dtype)
    (rows, heads, _), length = q.shape, k.shape[0]
    start = as_int64("cu_seq_len_k_start", cu_seq_len_k_start).clamp(min=0).unsqueeze(-1)
    end = as_int64("cu_seq_len_k_end", cu_seq_len_k_end).clamp(max=length).unsqueeze(-1)
    column = torch.arange(length, device=q.device)

    def score(begin: int, stop: int) -> tuple[Tensor]:
        first, last = start[begin:stop], end[begin:stop]
        visible = (column >= first) & (column < last)
        logits = _scores(
            q[None, begin:stop].to(dtype),
            key[None],
            scale[None],
            weights[None, begin:stop].to(dtype),
            visible[None],
        )[0]
        if max_seqlen_k > 0:
            lane = torch.arange(max_seqlen_k, device=q.device)
            source = first + lane
            if length:
                logits = logits.gather(1, source.clamp(max=length - 1))
            else:
                logits = logits.new_zeros(source.shape)
            logits = logits.masked_fill(source >= last, float("-inf"))
        return (logits.to(logits_dtype),)

    per_row = 2 * heads * length * dtype.itemsize
    return map_rows(score, rows, per_row, (q, k, k_scale, weights))[0]


def get_paged_mqa_logits_metadata(
    context_lens: Tensor, block_kv: int, num_sms: int, indices: Tensor | None = None
) -> Tensor:
    """Even partition of the paged keys over SMs (DeepGEMM's get_paged_mqa_logits_metadata).

    context_lens: int32 [B] or [B,next_n] (the longest of a row counts). Work comes in segments of
    256 keys. Returns int32 [num_sms+1, 2]: row i = (request, segment) where SM i begins, flat
    segment floor(i * total / num_sms); the end is (B, 0). `indices` (int32 [B], request ids)
    changes nothing.
    """
    del indices
    if block_kv < 1 or num_sms < 1:
        raise ValueError(
            f"get_paged_mqa_logits_metadata: block_kv, num_sms: expected ints >= 1, "
            f"got {block_kv}, {num_sms}"
        )
    lens = as_int64("context_lens", context_lens)
    batch = lens.shape[0]
    if lens.dim() == 2:
        lens = lens.amax(dim=1) if lens.shape[1] else lens.new_zeros(batch)
    segments = (lens.clamp(min=0) + _SEGMENT - 1) // _SEGMENT
    after = segments.cumsum(0)
    total = after[-1:] if batch else lens.new_zeros(1)
    flat = torch.arange(num_sms + 1, device=lens.device) * total // num_sms
    request = torch.searchsorted(after, flat, right=True)
    before = torch.cat((after - segments, total))
    return torch.stack((request, flat - before[request]), dim=-1).to(torch.int32)


def _cache_shape(kv_cache: PagedKeys) -> tuple[int, int]:
    pages, page_size = (kv_cache if isinstance(kv_cache, Tensor) else kv_cache[0]).shape[:2]
    return pages, page_size


def _row_lengths(context_lens: Tensor, next_n: int, limit: int) -> Tensor:
    """Keys visible to each query, int64 [B,next_n], clamped to [0, limit]."""
    lens = as_int64("context_lens", context_lens)
    if lens.dim() == 1:
        lens = lens[:, None] - next_n + 1 + torch.arange(next_n, device=lens.device)
    return lens.clamp(0, limit)


def fp8_paged_mqa_logits(
    q: Tensor,
    kv_cache: PagedKeys,
    weights: Tensor,
    context_lens: Tensor,
    block_table: Tensor,
    schedule_meta: Tensor | None,
    max_context_len: int,
    clean_logits: bool = False,
    indices: Tensor | None = None,
    *,
    logits_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Indexer scores of a decode step over the paged cache (DeepGEMM's fp8_paged_mqa_logits).

    q: e4m3 [B,next_n,H,D]; kv_cache: uint8 [pages, page_size, 1, D+4]; weights: fp32 [B*next_n,H];
    context_lens: int32 [B] (row j sees len - next_n + 1 + j keys) or [B,next_n]; block_table: int32
    [B,P]. Returns logits_dtype [B*next_n, max_context_len]; columns past a row's length or in an
    invalid page are -inf, whatever clean_logits says. schedule_meta and indices are not used. For
    gradients, q may be float and kv_cache a pair of floats (values [pages, page_size, D], scales
    [pages, page_size]); differentiable in them and in weights.
    """
    del clean_logits, schedule_meta, indices  # What clean_logits leaves unspecified is -inf here.
    parts = (kv_cache,) if isinstance(kv_cache, Tensor) else kv_cache
    dtype = compute_dtype(q, weights, *parts)
    batch, next_n, heads, dim = q.shape
    pages, page_size = _cache_shape(kv_cache)
    table = as_int64("block_table", block_table)
    limit = min(max_context_len, table.shape[1] * page_size)
    lens = _row_lengths(context_lens, next_n, limit)
    length = int(lens.max()) if lens.numel() and pages else 0
    if length == 0:
        empty = (batch * next_n, max_context_len)
        return torch.full(empty, float("-inf"), dtype=logits_dtype, device=q.device)
    position = torch.arange(length, device=q.device)
    table_column = position // page_size
    offset = (position % page_size).unsqueeze(0)
    weights = weights.reshape(batch, next_n, heads)

    def score(begin: int, stop: int) -> tuple[Tensor]:
        page = table[begin:stop, table_column]
        present = (page >= 0) & (page < pages)
        page = page.clamp(0, pages - 1)
        if isinstance(kv_cache, Tensor):
            key, scale = indexer_cache_keys(kv_cache, page, offset.expand_as(page))
        else:
            key, scale = kv_cache[0][page, offset], kv_cache[1][page, offset]
        visible = (position < lens[begin:stop, :, None]) & present.unsqueeze(1)
        logits = _scores(
            q[begin:stop].to(dtype),
            key.to(dtype),
            scale.to(dtype),
            weights[begin:stop].to(dtype),
            visible,
        )
        logits = logits.to(logits_dtype)
        pad = (0, max_context_len - length)
        return (torch.nn.functional.pad(logits, pad, value=float("-inf")).flatten(0, 1),)

    per_request = 2 * (next_n * heads + dim) * length * dtype.itemsize
    return map_rows(score, batch, per_request, (q, weights, *parts))[0]


@overload
def fp8_mqa_topk(
    q: Tensor,
    kv: tuple[Tensor, Tensor],
    weights: Tensor,
    cu_seq_len_k_start: Tensor,
    cu_seq_len_k_end: Tensor,
    k: int,
    *,
    return_scores: Literal[False] = False,
) -> Tensor: ...


@overload
def fp8_mqa_topk(
    q: Tensor,
    kv: tuple[Tensor, Tensor],
    weights: Tensor,
    cu_seq_len_k_start: Tensor,
    cu_seq_len_k_end: Tensor,
    k: int,
    *,
    return_scores: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def fp8_mqa_topk(
    q: Tensor,
    kv: tuple[Tensor, Tensor],
    weights: Tensor,
    cu_seq_len_k_start: Tensor,
    cu_seq_len_k_end: Tensor,
    k: int,
    *,
    return_scores: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The k best keys of each query: `topk_select` of `fp8_mqa_logits` over the row's window.

    Returns int32 [S,k] key rows (0..L), ascending, padded with -1; return_scores adds fp32 [S,k].
    """
    heads, length = q.shape[1], kv[0].shape[0]

    def select(begin: int, end: int) -> tuple[Tensor, ...]:
        start, stop = cu_seq_len_k_start[begin:end], cu_seq_len_k_end[begin:end]
        logits = fp8_mqa_logits(q[begin:end], kv, weights[begin:end], start, stop)
        return topk_select(logits, k, start, stop, return_scores=True)

    with torch.no_grad():
        indices, scores = map_rows(select, q.shape[0], 8 * (heads + 1) * length)
    return (indices, scores) if return_scores else indices


@overload
def fp8_paged_mqa_topk(
    q: Tensor,
    kv_cache: PagedKeys,
    weights: Tensor,
    context_lens: Tensor,
    block_table: Tensor,
    schedule_meta: Tensor | None,
    max_context_len: int,
    k: int,
    *,
    return_slots: bool = False,
    return_scores: Literal[False] = False,
) -> Tensor: ...


@overload
def fp8_paged_mqa_topk(
    q: Tensor,
    kv_cache: PagedKeys,
    weights: Tensor,
    context_lens: Tensor,
    block_table: Tensor,
    schedule_meta: Tensor | None,
    max_context_len: int,
    k: int,
    *,
    return_slots: bool = False,
    return_scores: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def fp8_paged_mqa_topk(
    q: Tensor,
    kv_cache: PagedKeys,
    weights: Tensor,
    context_lens: Tensor,
    block_table: Tensor,
    schedule_meta: Tensor | None,
    max_context_len: int,
    k: int,
    *,
    return_slots: bool = False,
    return_scores: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The k best cached keys of each query: `topk_select` of `fp8_paged_mqa_logits`.

    Returns int32 [B*next_n,k] token positions, ascending, padded with -1; with return_slots cache
    slots in the same order, -1 in place for an invalid page (whose score is -inf). return_scores
    adds fp32 [B*next_n,k].
    """
    pages, page_size = _cache_shape(kv_cache)
    next_n = q.shape[1]
    limit = min(max_context_len, block_table.shape[1] * page_size)
    with torch.no_grad():
        logits = fp8_paged_mqa_logits(
            q, kv_cache, weights, context_lens, block_table, schedule_meta, max_context_len
        )
        lens = _row_lengths(context_lens, next_n, limit).reshape(-1)
        table = block_table.masked_fill(block_table >= pages, -1) if return_slots else None
        request = torch.arange(lens.numel(), device=q.device) // max(next_n, 1)
        indices, scores = topk_select(
            logits,
            k,
            None,
            lens,
            block_table=table,
            page_size=page_size,
            row_to_request=request,
            return_scores=True,
        )
    return (indices, scores) if return_scores else indices

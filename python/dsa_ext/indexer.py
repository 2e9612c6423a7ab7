# SPDX-License-Identifier: Apache-2.0
"""The lightning indexer: FP8 multi-query logits, over contiguous keys or a paged cache.

For query token t and key s, with H index heads of dimension D::

    I[t, s] = k_scale[s] * sum_h weights[t, h] * relu(q[t, h, :] . k[s, :])

accumulated in fp32. ``weights`` already holds ``softmax_scale * H**-0.5 * q_scale`` and may be
negative. D is 32, 64 or 128; on a GPU H is at most 128. Every function raises ValueError for a
wrong argument (one line: argument, expected, got) and RuntimeError when no kernel of this build
takes the arguments.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from dsa_ext._ops import ops


def fp8_mqa_logits(
    q: Tensor,
    kv: tuple[Tensor, Tensor],
    weights: Tensor,
    cu_seq_len_k_start: Tensor,
    cu_seq_len_k_end: Tensor,
    clean_logits: bool = True,
    max_seqlen_k: int = 0,
    logits_dtype: torch.dtype = torch.float32,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Indexer logits of S query tokens against L contiguous keys (prefill).

    Args:
        q: float8_e4m3fn [S, H, D].
        kv: keys float8_e4m3fn [L, D] and their scales float32 [L].
        weights: float32 [S, H].
        cu_seq_len_k_start: int32 [S]; row i sees keys start[i] <= s < end[i], clamped to [0, L].
        cu_seq_len_k_end: int32 [S].
        clean_logits: write -inf outside the window; False leaves those columns untouched.
        max_seqlen_k: 0, or the width of a compressed result whose column c of row i is key
            start[i] + c.
        logits_dtype: float32 or bfloat16.
        out: where to write, [S, L] or [S, max_seqlen_k].

    Returns:
        Logits [S, L], or [S, max_seqlen_k] if that is positive.

    Signature: DeepGEMM's ``fp8_mqa_logits``.
    """
    k, k_scale = kv
    if out is None:
        columns = (max_seqlen_k,) if max_seqlen_k > 0 else k.shape[:1]
        out = q.new_empty((*q.shape[:1], *columns), dtype=logits_dtype)
    ops.fp8_mqa_logits(
        q,
        k,
        k_scale,
        weights,
        cu_seq_len_k_start,
        cu_seq_len_k_end,
        clean_logits,
        max_seqlen_k,
        out,
    )
    return out


def get_paged_mqa_logits_metadata(
    context_lens: Tensor, block_kv: int, num_sms: int, indices: Tensor | None = None
) -> Tensor:
    """Split a paged batch evenly over SMs, by segments of 256 keys.

    Args:
        context_lens: int32 [B] or [B, next_n], tokens of each request.
        block_kv: page size of the cache, in tokens.
        num_sms: number of SMs (thread blocks) to split over.
        indices: int32 [B], accepted for DeepGEMM's variable-length callers; rows are scheduled one
            by one.

    Returns:
        int32 [num_sms + 1, 2]: the (request, segment) at which each SM begins, and (B, 0)
        in the last row.
        A hint that no kernel here needs: each finds its share from the lengths, so that a stale
        schedule is harmless.

    Signature: DeepGEMM's ``get_paged_mqa_logits_metadata``.
    """
    out = context_lens.new_empty((max(num_sms, 0) + 1, 2), dtype=torch.int32)
    ops.get_paged_mqa_logits_metadata(context_lens, block_kv, num_sms, indices, out)
    return out


def fp8_paged_mqa_logits(
    q: Tensor,
    kv_cache: Tensor,
    weights: Tensor,
    context_lens: Tensor,
    block_table: Tensor,
    schedule_meta: Tensor | None,
    max_context_len: int,
    clean_logits: bool = False,
    logits_dtype: torch.dtype = torch.float32,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Indexer logits of next_n query tokens a request against the paged key cache (decode).

    Args:
        q: float8_e4m3fn [B, next_n, H, D].
        kv_cache: uint8 [pages, page_size, 1, D + 4] (docs/kv_cache_layout.md); any page stride that
            is a multiple of 4 bytes.
        weights: float32 [B * next_n, H].
        context_lens: int32 [B]: row j of a request sees context_len - next_n + 1 + j keys; or
            [B, next_n]: row j sees its own length.
        block_table: int32 [B, P], the page of each page_size tokens. An entry outside [0, pages) is
            never read: its keys score -inf.
        schedule_meta: from :func:`get_paged_mqa_logits_metadata`, or None, which does as well.
        max_context_len: width of the result; longer contexts are cut.
        clean_logits: write -inf past each row's length; False leaves those columns untouched.
        logits_dtype: float32 or bfloat16.
        out: where to write, [B * next_n, max_context_len].

    Returns:
        Logits [B * next_n, max_context_len].

    Signature: DeepGEMM's ``fp8_paged_mqa_logits``.
    """
    if out is None:
        rows = q.shape[:1].numel() * q.shape[1:2].numel()
        out = q.new_empty((rows, max(max_context_len, 0)), dtype=logits_dtype)
    ops.fp8_paged_mqa_logits(
        q,
        kv_cache,
        weights,
        context_lens,
        block_table,
        schedule_meta,
        max_context_len,
        clean_logits,
        out,
    )
    return out


@overload
def fp8_mqa_topk(
    q: Tensor,
    kv: tuple[Tensor, Tensor],
    weights: Tensor,
    cu_seq_len_k_start: Tensor,
    cu_seq_len_k_end: Tensor,
    k: int,
    *,
    return_scores: Literal[False] = ...,
    out: Tensor | None = ...,
    workspace: Tensor | None = ...,
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
    out: tuple[Tensor, Tensor] | None = ...,
    workspace: Tensor | None = ...,
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
    out: Tensor | tuple[Tensor, Tensor] | None = None,
    workspace: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`fp8_mqa_logits` straight to the k best keys of each row; no logits in memory.

    Args:
        q, kv, weights, cu_seq_len_k_start, cu_seq_len_k_end: as in :func:`fp8_mqa_logits`.
        k: how many keys to keep, >= 1.
        return_scores: also return the fp32 logits of the kept keys.
        out: int32 [S, k], or with return_scores the pair (indices, float32 [S, k]).
        workspace: uint8 scratch memory of the call, 16-byte aligned, so that nothing is allocated;
            ``dsa_ext.MAX_WORKSPACE_BYTES`` always suffice. Calls on one stream may share it.

    Returns:
        int32 [S, k] rows of kv, by the contract of :func:`dsa_ext.topk_select`; with return_scores
        (indices, scores), scores -inf where padded. On a GPU: L <= 2**24.
    """
    keys, k_scale = kv
    indices, scores = topk_outputs("fp8_mqa_topk", q, q.shape[:1], k, return_scores, out)
    ops.fp8_mqa_topk(
        q,
        keys,
        k_scale,
        weights,
        cu_seq_len_k_start,
        cu_seq_len_k_end,
        k,
        indices,
        scores,
        workspace,
    )
    return indices if scores is None else (indices, scores)


@overload
def fp8_paged_mqa_topk(
    q: Tensor,
    kv_cache: Tensor,
    weights: Tensor,
    context_lens: Tensor,
    block_table: Tensor,
    schedule_meta: Tensor | None,
    max_context_len: int,
    k: int,
    *,
    return_slots: bool = ...,
    return_scores: Literal[False] = ...,
    out: Tensor | None = ...,
    workspace: Tensor | None = ...,
) -> Tensor: ...
@overload
def fp8_paged_mqa_topk(
    q: Tensor,
    kv_cache: Tensor,
    weights: Tensor,
    context_lens: Tensor,
    block_table: Tensor,
    schedule_meta: Tensor | None,
    max_context_len: int,
    k: int,
    *,
    return_slots: bool = ...,
    return_scores: Literal[True],
    out: tuple[Tensor, Tensor] | None = ...,
    workspace: Tensor | None = ...,
) -> tuple[Tensor, Tensor]: ...
def fp8_paged_mqa_topk(
    q: Tensor,
    kv_cache: Tensor,
    weights: Tensor,
    context_lens: Tensor,
    block_table: Tensor,
    schedule_meta: Tensor | None,
    max_context_len: int,
    k: int,
    *,
    return_slots: bool = False,
    return_scores: bool = False,
    out: Tensor | tuple[Tensor, Tensor] | None = None,
    workspace: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`fp8_paged_mqa_logits` straight to the k best tokens of each row; no logits in memory.

    Args:
        q, kv_cache, weights, context_lens, block_table, schedule_meta, max_context_len: as in
            :func:`fp8_paged_mqa_logits`.
        k: how many tokens to keep, >= 1.
        return_slots: return slots of kv_cache (page * page_size + offset) instead of token
            positions; a token without a page is -1, in place.
        return_scores: also return the fp32 logits of the kept tokens.
        out: int32 [B * next_n, k], or with return_scores the pair (indices, scores
            float32 of that shape).
        workspace: as in :func:`fp8_mqa_topk`.

    Returns:
        int32 [B * next_n, k], by the contract of :func:`dsa_ext.topk_select`; with return_scores
        (indices, scores), scores -inf where padded. On a GPU: next_n * (keys + 4) <= 2**24,
        keys being min(max_context_len, P * page_size).
    """
    rows = (q.shape[:1].numel() * q.shape[1:2].numel(),)
    indices, scores = topk_outputs("fp8_paged_mqa_topk", q, rows, k, return_scores, out)
    ops.fp8_paged_mqa_topk(
        q,
        kv_cache,
        weights,
        context_lens,
        block_table,
        schedule_meta,
        max_context_len,
        k,
        return_slots,
        indices,
        scores,
        workspace,
    )
    return indices if scores is None else (indices, scores)


def topk_outputs(
    op: str,
    like: Tensor,
    rows: tuple[int, ...],
    k: int,
    return_scores: bool,
    out: Tensor | tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor | None]:
    """Allocate (or unpack from ``out``) the int32 indices and optional float32 scores [rows, k]."""
    if out is None:
        shape = (*rows, max(k, 0))
        indices = like.new_empty(shape, dtype=torch.int32)
        return indices, like.new_empty(shape, dtype=torch.float32) if return_scores else None
    if isinstance(out, Tensor):
        if return_scores:
            raise ValueError(
                f"{op}: out: expected the pair (indices, scores) with return_scores=True, "
                "got a tensor"
            )
        return out, None
    if not return_scores or len(out) != 2:
        expected = "the pair (indices, scores)" if return_scores else "a tensor"
        raise ValueError(
            f"{op}: out: expected {expected} with return_scores={return_scores}, "
            f"got a {type(out).__name__} of {len(out)}"
        )
    return out[0], out[1]

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

from dsa_ext._arguments import check_tensor, describe, dtype_name, unpack_pair
from dsa_ext._ops import ops

_num_sms = 0  # set_num_sms()'s


def get_num_sms() -> int:
    """Return the number of SMs to split work over, for :func:`get_paged_mqa_logits_metadata`.

    That of :func:`set_num_sms`, else all of the current CUDA device; 1 without CUDA. DeepGEMM's
    function.
    """
    if _num_sms:
        return _num_sms
    if not torch.cuda.is_available():
        return 1
    return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count


def set_num_sms(num_sms: int) -> None:
    """Set what :func:`get_num_sms` returns; 0 for the device's own. No kernel here looks at it.

    ValueError if ``num_sms`` is negative. DeepGEMM's function.
    """
    global _num_sms
    if not isinstance(num_sms, int) or num_sms < 0:
        raise ValueError(f"set_num_sms: num_sms: expected an int >= 0, got {num_sms}")
    _num_sms = num_sms


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
    op = "fp8_mqa_logits"
    check_tensor(op, "q", q)
    k, k_scale = _keys_and_scales(op, kv)
    _check_logits_dtype(op, logits_dtype)
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


def fp8_fp4_mqa_logits(
    q: tuple[Tensor, Tensor | None],
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
    """:func:`fp8_mqa_logits` under DeepGEMM's current name (2.6), for FP8 alone.

    Args:
        q: the pair (queries float8_e4m3fn [S, H, D], None); a scale, which FP4 has, is a
            ValueError.
        kv, weights, cu_seq_len_k_start, cu_seq_len_k_end, clean_logits, max_seqlen_k, logits_dtype,
            out: as in :func:`fp8_mqa_logits`.

    Returns:
        Logits, as :func:`fp8_mqa_logits`.

    Signature: DeepGEMM's ``fp8_fp4_mqa_logits``.
    """
    return fp8_mqa_logits(
        _fp8_query("fp8_fp4_mqa_logits", q),
        kv,
        weights,
        cu_seq_len_k_start,
        cu_seq_len_k_end,
        clean_logits,
        max_seqlen_k,
        logits_dtype,
        out=out,
    )


def get_paged_mqa_logits_metadata(
    context_lens: Tensor, block_kv: int, num_sms: int, indices: Tensor | None = None
) -> Tensor:
    """Split a paged batch evenly over SMs, by segments of 256 keys.

    Args:
        context_lens: int32 [B] or [B, next_n], tokens of each request.
        block_kv: page size of the cache, in tokens.
        num_sms: number of SMs (thread blocks) to split over, such as :func:`get_num_sms`'s.
        indices: int32 [B], accepted for DeepGEMM's variable-length callers; rows are scheduled one
            by one.

    Returns:
        int32 [num_sms + 1, 2]: the (request, segment) at which each SM begins, and (B, 0)
        in the last row.
        A hint that no kernel here needs: each finds its share from the lengths, so that a stale
        schedule is harmless.

    Signature: DeepGEMM's ``get_paged_mqa_logits_metadata``.
    """
    check_tensor("get_paged_mqa_logits_metadata", "context_lens", context_lens)
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
    indices: Tensor | None = None,
    *,
    logits_dtype: torch.dtype = torch.float32,
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
        indices: int32 [B], accepted for DeepGEMM's variable-length callers, whose context_lens and
            block_table have a row for each query as it is; never changes a result.
        logits_dtype: float32 or bfloat16.
        out: where to write, [B * next_n, max_context_len].

    Returns:
        Logits [B * next_n, max_context_len].

    Signature: DeepGEMM's ``fp8_paged_mqa_logits``.
    """
    op = "fp8_paged_mqa_logits"
    check_tensor(op, "q", q)
    if indices is not None:
        check_tensor(op, "indices", indices)
    _check_logits_dtype(op, logits_dtype)
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
        indices,
        out,
    )
    return out


def fp8_fp4_paged_mqa_logits(
    q: tuple[Tensor, Tensor | None],
    kv_cache: Tensor,
    weights: Tensor,
    context_lens: Tensor,
    block_table: Tensor,
    schedule_meta: Tensor | None,
    max_context_len: int,
    clean_logits: bool = False,
    logits_dtype: torch.dtype = torch.float32,
    indices: Tensor | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """:func:`fp8_paged_mqa_logits` under DeepGEMM's current name (2.6), for FP8 alone.

    Args:
        q: the pair (queries float8_e4m3fn [B, next_n, H, D], None); a scale, which FP4 has, is a
            ValueError.
        kv_cache, weights, context_lens, block_table, schedule_meta, max_context_len, clean_logits,
            logits_dtype, indices, out: as in :func:`fp8_paged_mqa_logits`.

    Returns:
        Logits [B * next_n, max_context_len].

    Signature: DeepGEMM's ``fp8_fp4_paged_mqa_logits``.
    """
    return fp8_paged_mqa_logits(
        _fp8_query("fp8_fp4_paged_mqa_logits", q),
        kv_cache,
        weights,
        context_lens,
        block_table,
        schedule_meta,
        max_context_len,
        clean_logits,
        indices,
        logits_dtype=logits_dtype,
        out=out,
    )


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
    check_tensor("fp8_mqa_topk", "q", q)
    keys, k_scale = _keys_and_scales("fp8_mqa_topk", kv)
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
    check_tensor("fp8_paged_mqa_topk", "q", q)
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
    if not return_scores or not isinstance(out, tuple | list) or len(out) != 2:
        expected = "the pair (indices, scores)" if return_scores else "a tensor"
        raise ValueError(
            f"{op}: out: expected {expected} with return_scores={return_scores}, "
            f"got {describe(out)}"
        )
    return out[0], out[1]


def _keys_and_scales(op: str, kv: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    keys, scales = unpack_pair(op, "kv", kv, "(keys, scales)")
    check_tensor(op, "kv[0]", keys)
    return keys, scales


def _fp8_query(op: str, q: tuple[Tensor, Tensor | None]) -> Tensor:
    queries, scale = unpack_pair(op, "q", q, "(queries, None)")
    if scale is not None:
        raise ValueError(f"{op}: q[1]: expected None (FP8 alone), got {describe(scale)}")
    check_tensor(op, "q[0]", queries)
    return queries  # type: ignore[no-any-return]


def _check_logits_dtype(op: str, logits_dtype: torch.dtype) -> None:
    if logits_dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(
            f"{op}: logits_dtype: expected float32 or bfloat16, got {dtype_name(logits_dtype)}"
        )

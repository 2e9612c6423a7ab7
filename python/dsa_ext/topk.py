# SPDX-License-Identifier: Apache-2.0
"""Exact, deterministic selection of the best-scored tokens, and their map to cache slots.

Every function raises ValueError for a wrong argument (one line: argument, expected, got).
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from dsa_ext._arguments import check_tensor
from dsa_ext._ops import ops
from dsa_ext.indexer import topk_outputs


@overload
def topk_select(
    scores: Tensor,
    k: int,
    row_starts: Tensor | None = ...,
    row_ends: Tensor | None = ...,
    *,
    index_base: int | Tensor | None = ...,
    block_table: Tensor | None = ...,
    page_size: int | None = ...,
    row_to_request: Tensor | None = ...,
    return_scores: Literal[False] = ...,
    out: Tensor | None = ...,
    workspace: Tensor | None = ...,
) -> Tensor: ...
@overload
def topk_select(
    scores: Tensor,
    k: int,
    row_starts: Tensor | None = ...,
    row_ends: Tensor | None = ...,
    *,
    index_base: int | Tensor | None = ...,
    block_table: Tensor | None = ...,
    page_size: int | None = ...,
    row_to_request: Tensor | None = ...,
    return_scores: Literal[True],
    out: tuple[Tensor, Tensor] | None = ...,
    workspace: Tensor | None = ...,
) -> tuple[Tensor, Tensor]: ...
def topk_select(
    scores: Tensor,
    k: int,
    row_starts: Tensor | None = None,
    row_ends: Tensor | None = None,
    *,
    index_base: int | Tensor | None = None,
    block_table: Tensor | None = None,
    page_size: int | None = None,
    row_to_request: Tensor | None = None,
    return_scores: bool = False,
    out: Tensor | tuple[Tensor, Tensor] | None = None,
    workspace: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Pick exactly the k largest scores of each row's window.

    NaN ranks lowest (below -inf), -0.0 equals +0.0, ties go to the lower column. The result is
    ascending by column, padded with -1 on the right; a window of at most k columns is returned
    whole. Deterministic, and a row's result does not depend on the other rows.

    Args:
        scores: float32, bfloat16 or float16 [R, N], any strides.
        k: how many to keep, >= 1.
        row_starts: int32 [R], first column of each window, clamped to [0, N]; default 0.
        row_ends: int32 [R], end (exclusive) of each window, clamped to [0, N]; default N.
        index_base: int, or int32 [R]: added to every column returned (a shard's or window's
            offset).
        block_table: int32 [B, P]: return cache slots instead. Token t becomes
            block_table[request, t // page_size] * page_size + t % page_size, or -1 where the table
            has no page (in place, not moved to the right).
        page_size: tokens a page, with block_table.
        row_to_request: int32 [R], request of each row; default: row r is of request r // (R / B).
        return_scores: also return the fp32 scores, -inf where padded.
        out: int32 [R, k], or with return_scores the pair (indices, float32 [R, k]).
        workspace: as in :func:`dsa_ext.fp8_mqa_topk`; a GPU wants one for few very long rows.

    Returns:
        int32 [R, k]; with return_scores the pair (indices, scores).
    """
    check_tensor("topk_select", "scores", scores)
    if (block_table is None) != (page_size is None):
        expected = "None without" if block_table is None else "an int with"
        raise ValueError(
            f"topk_select: page_size: expected {expected} block_table, got {page_size}"
        )
    base_tensor, base_scalar = None, 0
    if isinstance(index_base, Tensor):
        base_tensor = index_base
    elif index_base is not None:
        base_scalar = index_base
    rows = scores.shape[:1]
    indices, kept = topk_outputs("topk_select", scores, rows, k, return_scores, out)
    ops.topk_select(
        scores,
        k,
        row_starts,
        row_ends,
        base_tensor,
        base_scalar,
        block_table,
        0 if page_size is None else page_size,
        row_to_request,
        indices,
        kept,
        workspace,
    )
    return indices if kept is None else (indices, kept)


def map_to_slots(
    indices: Tensor,
    block_table: Tensor,
    page_size: int,
    row_to_request: Tensor | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Map token positions of requests to slots (page * page_size + offset) of a paged cache.

    Args:
        indices: int32 [R, k] or [B, s, k], token positions; a negative one stays -1.
        block_table: int32 [B, P]. A position past P pages or in a page whose entry is negative is
            -1.
        page_size: tokens a page, >= 1.
        row_to_request: int32 [R], request of each row (of k positions); default: row r is of
            request r // (R / B). A request outside [0, B) gives -1.
        out: int32, shaped like indices.

    Returns:
        int32 slots, shaped like indices.
    """
    check_tensor("map_to_slots", "indices", indices)
    if out is None:
        out = torch.empty_like(indices, memory_format=torch.contiguous_format)
    ops.map_to_slots(indices, block_table, page_size, row_to_request, out)
    return out


@overload
def merge_topk(
    scores: Tensor,
    indices: Tensor,
    k: int,
    *,
    return_scores: Literal[False] = ...,
    out: Tensor | None = ...,
) -> Tensor: ...
@overload
def merge_topk(
    scores: Tensor,
    indices: Tensor,
    k: int,
    *,
    return_scores: Literal[True],
    out: tuple[Tensor, Tensor] | None = ...,
) -> tuple[Tensor, Tensor]: ...
def merge_topk(
    scores: Tensor,
    indices: Tensor,
    k: int,
    *,
    return_scores: bool = False,
    out: Tensor | tuple[Tensor, Tensor] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Merge candidates of key splits or shards, laid side by side, into the k best of each row.

    Args:
        scores: float32, bfloat16 or float16 [R, N].
        indices: int32 [R, N], the index each score belongs to; a negative one is no candidate.
        k: how many to keep, >= 1.
        return_scores: also return the fp32 scores, -inf where padded.
        out: int32 [R, k], or with return_scores the pair (indices, float32 [R, k]).

    Returns:
        int32 [R, k] by the order of :func:`topk_select` (ties go to the lower index), ascending by
        index, padded with -1; with return_scores the pair (indices, scores). On a GPU the smaller
        of k and N is at most 8192.
    """
    check_tensor("merge_topk", "scores", scores)
    merged, kept = topk_outputs("merge_topk", scores, scores.shape[:1], k, return_scores, out)
    ops.merge_topk(scores, indices, k, merged, kept)
    return merged if kept is None else (merged, kept)

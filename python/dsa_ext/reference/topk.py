# SPDX-License-Identifier: Apache-2.0
"""Exact selection by stable sorting, and index -> slot mapping."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from ._arguments import as_int64
from ._chunks import map_rows

_INT32_MAX = 2**31 - 1


def _descending_order(values: Tensor) -> Tensor:
    """Stable order of the last dim, largest first, NaN last (below -inf), -0.0 equal to +0.0."""
    # 0 - v turns both zeros into +0; a float sort puts NaN last, and one bit pattern ties them.
    key = (0.0 - values.to(torch.float32)).masked_fill(torch.isnan(values), float("nan"))
    return torch.sort(key, dim=-1, stable=True).indices


def _rows_to_requests(rows: int, table: Tensor, row_to_request: Tensor | None) -> Tensor:
    """Request of each row, int64 [rows]; the default gives each request the same number of rows."""
    if row_to_request is not None:
        return as_int64("row_to_request", row_to_request.reshape(-1))
    batch = table.shape[0]
    if rows == 0:
        return torch.zeros(0, dtype=torch.int64, device=table.device)
    if batch == 0 or rows % batch:
        raise ValueError(
            f"row_to_request: expected int32 [{rows}], or rows a multiple of block_table's "
            f"{batch} requests, got None"
        )
    return torch.arange(rows, device=table.device) // (rows // batch)


def _slots(token: Tensor, valid: Tensor, table: Tensor, page_size: int, request: Tensor) -> Tensor:
    """Slot of int64 token positions [R,k] through rows `request` [R] of the table; -1 if none."""
    batch, width = table.shape
    if batch == 0 or width == 0:
        return torch.full_like(token, -1)
    page = token.div(page_size, rounding_mode="floor")
    known = ((request >= 0) & (request < batch)).unsqueeze(-1)
    valid = valid & known & (token >= 0) & (page < width)
    flat = request.clamp(0, batch - 1).unsqueeze(-1) * width + page.clamp(0, width - 1)
    entry = as_int64("block_table", table.reshape(-1))[flat]
    slot = entry * page_size + token.remainder(page_size)
    return slot.masked_fill(~valid | (entry < 0) | (slot > _INT32_MAX), -1)


@overload
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
    return_scores: Literal[False] = False,
) -> Tensor: ...


@overload
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
    return_scores: Literal[True],
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
) -> Tensor | tuple[Tensor, Tensor]:
    """The exact k largest scores of each row's window (the top-k of DeepSeek-V3.2's indexer).

    scores: fp32/bf16/fp16 [R,N], any strides. row_starts/row_ends: int32 [R], the half-open window,
    clamped to [0,N]; default the whole row. Returns int32 [R,k] columns, ascending, padded with -1;
    a window of at most k columns comes back whole. NaN ranks below -inf, -0.0 = +0.0, ties go to
    the lower column.

    index_base (int or int32 [R]) is added to each column. With block_table (int32 [B,P]) and
    page_size, a column + base becomes a slot (page * page_size + offset) of the row's request, or
    -1 in place; request = row_to_request[r] (int32 [R]), by default r // (R/B).
    return_scores adds fp32 [R,k], -inf where padded.
    """
    if k < 1:
        raise ValueError(f"topk_select: k: expected an int >= 1, got {k}")
    scores = scores.detach()
    rows, columns = scores.shape
    device = scores.device
    zeros = torch.zeros(rows, dtype=torch.int64, device=device)
    starts = zeros if row_starts is None else as_int64("row_starts", row_starts).clamp(0, columns)
    ends = zeros + columns if row_ends is None else as_int64("row_ends", row_ends).clamp(0, columns)
    lengths = (ends - starts).clamp(min=0)
    width = int(lengths.max()) if rows else 0
    kept = min(k, width)
    lane = torch.arange(kept, device=device)

    def select(begin: int, end: int) -> tuple[Tensor, Tensor]:
        # Windows are shifted to column 0, so what lies past a window sorts behind its own NaNs.
        length = lengths[begin:end, None]
        column = torch.arange(width, device=device)
        if row_starts is None:
            window = scores[begin:end, :width]
        else:
            source = starts[begin:end, None] + column
            window = scores[begin:end].gather(1, source.clamp(max=columns - 1))
        window = window.to(torch.float32).masked_fill(column >= length, float("nan"))
        chosen = lane < length.clamp(max=k)
        place = _descending_order(window)[:, :kept].masked_fill(~chosen, width).sort(dim=-1).values
        best = window.gather(1, place.clamp(max=width - 1)).masked_fill(~chosen, float("-inf"))
        return (place + starts[begin:end, None]).masked_fill(~chosen, -1), best

    picked = torch.full((rows, k), -1, dtype=torch.int64, device=device)
    values = torch.full((rows, k), float("-inf"), dtype=torch.float32, device=device)
    if kept:
        picked[:, :kept], values[:, :kept] = map_rows(select, rows, width * 28)
    chosen = picked >= 0
    if isinstance(index_base, Tensor):
        picked = picked + as_int64("index_base", index_base).unsqueeze(-1)
    elif index_base is not None:
        picked = picked + index_base
    if block_table is None:
        picked = picked.masked_fill(~chosen | (picked > _INT32_MAX), -1)
    else:
        if page_size is None or page_size < 1:
            raise ValueError(f"topk_select: page_size: expected an int >= 1, got {page_size}")
        request = _rows_to_requests(rows, block_table, row_to_request)
        picked = _slots(picked, chosen, block_table, page_size, request)
    indices = picked.to(torch.int32)
    return (indices, values) if return_scores else indices


def map_to_slots(
    indices: Tensor,
    block_table: Tensor,
    page_size: int,
    row_to_request: Tensor | None = None,
) -> Tensor:
    """Token positions -> cache slots, page * page_size + offset.

    indices: int32 [R,k] or [B,s,k], negative = none. block_table: int32 [B,P]. row_to_request:
    int32, one for each row of k, by default row // (rows/B). Returns int32 of indices' shape; -1
    for a negative index, a position past the table, a negative table entry, an unknown request, or
    a slot beyond int32.
    """
    if page_size < 1:
        raise ValueError(f"map_to_slots: page_size: expected an int >= 1, got {page_size}")
    rows = indices.shape[:-1].numel()
    token = as_int64("indices", indices.reshape(rows, indices.shape[-1]))
    request = _rows_to_requests(rows, block_table, row_to_request)
    slot = _slots(token, token >= 0, block_table, page_size, request)
    return slot.to(torch.int32).reshape(indices.shape)


@overload
def merge_topk(
    scores: Tensor, indices: Tensor, k: int, *, return_scores: Literal[False] = False
) -> Tensor: ...


@overload
def merge_topk(
    scores: Tensor, indices: Tensor, k: int, *, return_scores: Literal[True]
) -> tuple[Tensor, Tensor]: ...


def merge_topk(
    scores: Tensor, indices: Tensor, k: int, *, return_scores: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """The k best of candidate lists, e.g. the concatenated top-k of several shards.

    scores: fp32/bf16/fp16 [R,n]; indices: int32 [R,n], entries < 0 are ignored. Returns int32 [R,k]
    indices, ascending, padded with -1. Scores order as in `topk_select`; ties go to the lower
    index, then to the lower position; equal indices each count and keep their order of position.
    return_scores adds fp32 [R,k], -inf where padded.
    """
    if k < 1:
        raise ValueError(f"merge_topk: k: expected an int >= 1, got {k}")
    scores = scores.detach().to(torch.float32)
    rows, count = scores.shape
    ignored = indices < 0
    # Candidates by (index, position), the ignored ones last; from here on as in topk_select.
    key = as_int64("indices", indices).masked_fill(ignored, _INT32_MAX + 1)
    by_index = torch.sort(key, dim=-1, stable=True)
    ordered = scores.masked_fill(ignored, float("nan")).gather(1, by_index.indices)
    length = (~ignored).sum(dim=-1, keepdim=True)
    kept = min(k, count)
    chosen = torch.arange(kept, device=scores.device) < length
    place = _descending_order(ordered)[:, :kept].masked_fill(~chosen, count).sort(dim=-1).values
    place = place.clamp(max=max(count - 1, 0))
    merged = torch.full((rows, k), -1, dtype=torch.int32, device=scores.device)
    values = torch.full((rows, k), float("-inf"), dtype=torch.float32, device=scores.device)
    picked = by_index.values.gather(1, place).masked_fill(~chosen, -1)
    merged[:, :kept] = picked.to(torch.int32)
    values[:, :kept] = ordered.gather(1, place).masked_fill(~chosen, float("-inf"))
    return (merged, values) if return_scores else merged

# SPDX-License-Identifier: Apache-2.0
"""Attention over the MLA latent: sparse prefill, decode over the paged cache, merge of splits.

One latent row is both key (all of it) and value (its first d_v numbers), shared by all heads. Every
function raises ValueError for a wrong argument (one line: argument, expected, got) and RuntimeError
when no kernel of this build takes the arguments. The ops are not differentiable: see
``dsa_ext.reference`` for that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsa_ext._ops import ops


@dataclass
class FlashMLASchedMeta:
    """Decode scheduling state of FlashMLA's interface; here every call plans for itself.

    Kept so that callers of FlashMLA run unchanged: reusing one, or passing a stale one, never
    changes a result.
    """


def get_mla_metadata(*args: Any, **kwargs: Any) -> tuple[FlashMLASchedMeta, None]:
    """Return ``(FlashMLASchedMeta(), None)``, whatever the arguments (FlashMLA's signature)."""
    return FlashMLASchedMeta(), None


def flash_mla_sparse_fwd(
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    sm_scale: float,
    d_v: int = 512,
    attn_sink: Tensor | None = None,
    topk_length: Tensor | None = None,
    *,
    out: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sparse attention of each query token over its own selected rows of ``kv`` (prefill).

    Args:
        q: bfloat16 or float16 [s_q, h_q, d_qk].
        kv: like q [s_kv, 1, d_qk]. Or a paged cache, of any page size and page stride: like q
            [pages, page_size, 1, d_qk]; 8-bit [pages, page_size, 1, 656] (d_qk 576) or
            [pages, page_size, 1, 584] (d_qk 512), see docs/kv_cache_layout.md. With an 8-bit one q
            is bfloat16 (on the CPU also float16) and d_v 512; it saves the workspace of
            ``gather_mla_kv_cache``, but on an H200 takes 1.1 to 1.4 times as long.
        indices: int32 [s_q, 1, topk], rows of kv, or slots (page * page_size + offset) of the
            cache. One outside is invalid, wherever it stands: never read. Repeated ones count each
            time.
        sm_scale: factor on q . k before the softmax.
        d_v: leading numbers of a row that are its value; a multiple of 64 up to 512, and d_qk - d_v
            is 0, 32 or 64.
        attn_sink: float32 [h_q]: out is scaled by e^lse / (e^lse + e^sink); lse and max_logits are
            not.
        topk_length: int32 [s_q]: slots from there on are ignored, unread.
        out: the triple to write into.

    Returns:
        out like q [s_q, h_q, d_v]; max_logits float32 [s_q, h_q] (scale applied, natural units);
        lse float32 [s_q, h_q] (natural log). A row with nothing valid: 0, -inf, +inf.

    Signature: FlashMLA's ``flash_mla_sparse_fwd``, which takes no cache.
    """
    if out is None:
        rows = q.shape[:2]
        out = (
            q.new_empty((*rows, max(d_v, 0))),
            q.new_empty(rows, dtype=torch.float32),
            q.new_empty(rows, dtype=torch.float32),
        )
    ops.flash_mla_sparse_fwd(q, kv, indices, sm_scale, d_v, attn_sink, topk_length, *out)
    return out


def flash_mla_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor | None,
    cache_seqlens: Tensor | None,
    head_dim_v: int,
    tile_scheduler_metadata: object = None,
    num_splits: object = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: Tensor | None = None,
    attn_sink: Tensor | None = None,
    extra_k_cache: Tensor | None = None,
    extra_indices_in_kvcache: Tensor | None = None,
    topk_length: Tensor | None = None,
    extra_topk_length: Tensor | None = None,
    *,
    out: tuple[Tensor, Tensor] | None = None,
    batch_invariant: bool = False,
    workspace: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of s_q query tokens a request over the paged latent cache (decode).

    Sparse with ``indices``, dense with ``block_table`` and ``cache_seqlens``.

    Args:
        q: bfloat16 or float16 [b, s_q, h_q, d_qk]; with an 8-bit cache float16 on the CPU only.
        k_cache: like q [pages, page_size, 1, d_qk]; or, with is_fp8_kvcache, 8-bit
            [pages, page_size, 1, 656] (d_qk 576) or [pages, page_size, 1, 584] (d_qk 512), see
            docs/kv_cache_layout.md. Any page size, any page stride.
        block_table: int32 [b, P] (dense). Tokens in a page outside [0, pages) are skipped, unread.
        cache_seqlens: int32 [b] (dense), clamped to [0, P * page_size].
        head_dim_v: leading numbers of a row that are its value (512 with is_fp8_kvcache).
        tile_scheduler_metadata: accepted for FlashMLA's callers; never changes a result.
        num_splits: likewise.
        softmax_scale: factor on q . k; default d_qk ** -0.5.
        causal: dense only: row j sees the first cache_seqlen - s_q + 1 + j tokens.
        is_fp8_kvcache: the cache holds FP8 values with scales.
        indices: int32 [b, s_q, topk], slots (page * page_size + offset). One outside the cache is
            invalid, wherever it stands: never read. Repeated ones count each time.
        attn_sink: float32 [h_q]: out is scaled by e^lse / (e^lse + e^sink); lse is not.
        extra_k_cache: a second cache of the same format with its own page size (sparse).
        extra_indices_in_kvcache: int32 [b, s_q, extra_topk], slots of it; one softmax over both.
        topk_length: int32 [b] or [b, s_q]: slots from there on are ignored, unread.
        extra_topk_length: the same for extra_indices_in_kvcache.
        out: the pair to write into.
        batch_invariant: a row's bits do not depend on the rest of the batch (always so on the CPU);
            on a GPU they then depend on the width of indices or block_table alone.
        workspace: uint8 scratch memory of the call, 16-byte aligned, so that nothing is allocated;
            ``dsa_ext.MAX_WORKSPACE_BYTES`` always suffice. Calls on one stream may share it.

    Returns:
        out like q [b, s_q, h_q, head_dim_v]; lse float32 [b, h_q, s_q] (natural log, without the
        sink).
        A row with nothing valid: 0 and +inf.

    Signature: FlashMLA's ``flash_mla_with_kvcache``.
    """
    if softmax_scale is None:
        softmax_scale = float(max(q.shape[-1:].numel(), 1)) ** -0.5
    if out is None:
        rows = q.shape[:3]
        out = (
            q.new_empty((*rows, max(head_dim_v, 0))),
            q.new_empty((*rows[:1], *rows[2:3], *rows[1:2]), dtype=torch.float32),
        )
    ops.flash_mla_with_kvcache(
        q,
        k_cache,
        block_table,
        cache_seqlens,
        head_dim_v,
        softmax_scale,
        causal,
        is_fp8_kvcache,
        indices,
        attn_sink,
        extra_k_cache,
        extra_indices_in_kvcache,
        topk_length,
        extra_topk_length,
        batch_invariant,
        *out,
        workspace,
    )
    return out


def merge_attn_states(
    outs: Tensor | Sequence[Tensor],
    lses: Tensor | Sequence[Tensor],
    *,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Merge attention results over disjoint sets of keys into the result over their union.

    Args:
        outs: float32, bfloat16 or float16 [n, ..., h, d], stacked or as a sequence of n.
        lses: float32 [n, ..., h] (natural log). |lse| = inf marks an empty result, whose out is
            unread. Decode's lse is [b, h, s_q]: transpose it.
        out: the pair to write into.

    Returns:
        out like one of outs, and lse float32. Where all are empty: 0 and +inf.
    """
    outs = outs if isinstance(outs, Tensor) else torch.stack(tuple(outs))
    lses = lses if isinstance(lses, Tensor) else torch.stack(tuple(lses))
    if out is None:
        out = (outs.new_empty(outs.shape[1:]), lses.new_empty(lses.shape[1:]))
    merged, lse = out
    # The op takes one dimension of rows; outputs are viewed (never copied), inputs may be copied.
    ops.merge_attn_states(
        outs.reshape(_rows_merged(outs.shape, 1, 2)),
        lses.reshape(_rows_merged(lses.shape, 1, 1)),
        merged.view(_rows_merged(merged.shape, 0, 2)),
        lse.view(_rows_merged(lse.shape, 0, 1)),
    )
    return out


def _rows_merged(shape: torch.Size, lead: int, tail: int) -> tuple[int, ...]:
    """Make one dimension of those between the first `lead` and the last `tail`."""
    if len(shape) < lead + tail:
        return tuple(shape)
    last = len(shape) - tail
    return (*shape[:lead], shape[lead:last].numel(), *shape[last:])

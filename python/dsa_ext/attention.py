# SPDX-License-Identifier: Apache-2.0
"""Attention over the MLA latent: sparse prefill, decode over the paged cache, merge of splits.

One latent row is both key (all of it) and value (its first d_v numbers), shared by all heads. Every
function raises ValueError for a wrong argument (one line: argument, expected, got) and RuntimeError
when no kernel of this build takes the arguments. The ops are not differentiable,
``dsa_ext.reference`` is: where an input requires grad, backward() through a result raises
RuntimeError. Through one that was given as ``out``, or of a compiled graph, no gradient flows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsa_ext._arguments import check_tensor, describe, dtype_name, unpack_out
from dsa_ext._ops import ops


class _NotDifferentiable(torch.autograd.Function):
    """Makes backward() through results raise: without it their gradients would be missing."""

    @staticmethod
    def forward(ctx: Any, op: str, results: tuple[Tensor, ...], *inputs: Tensor | None) -> Any:
        # Torch does not look into a tuple: the results are no inputs, and are returned as they are.
        ctx.op = op
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            f"{ctx.op}: not differentiable; use the function of this name in dsa_ext.reference"
        )


def _raise_in_backward(
    op: str, results: tuple[Tensor, ...], out: object, *inputs: Tensor | None
) -> None:
    """Mark results of inputs that require grad, unless they are given: ``out`` stays as it is."""
    if out is not None or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return
    if any(t is not None and t.requires_grad for t in inputs):
        _NotDifferentiable.apply(op, results, *inputs)  # type: ignore[no-untyped-call]


@dataclass
class FlashMLASchedMeta:
    """Decode scheduling state of FlashMLA's interface (of April 2026); here calls plan themselves.

    Kept, with FlashMLA's fields, so that its callers run unchanged: nothing here reads or writes
    the fields, and reusing one, or passing a stale one, never changes a result.
    """

    have_initialized: bool = False
    config: object = None
    tile_scheduler_metadata: Tensor | None = None
    num_splits: Tensor | None = None


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
    out: Tensor | tuple[Tensor, Tensor, Tensor] | None = None,
    batch_invariant: bool = False,
    workspace: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sparse attention of each query token over its own selected rows of ``kv`` (prefill).

    Args:
        q: bfloat16 or float16 [s_q, h_q, d_qk].
        kv: like q [s_kv, 1, d_qk]. Or a paged cache, of any page size and page stride: like q
            [pages, page_size, 1, d_qk]; 8-bit [pages, page_size, 1, 656] (d_qk 576) or
            [pages, page_size, 1, 584] (d_qk 512), see docs/kv_cache_layout.md. With an 8-bit one q
            is bfloat16 (on the CPU also float16) and d_v 512; it saves the workspace of
            ``gather_mla_kv_cache``, but on an H200 takes 1.1 to 1.5 times as long, and up to 1.8
            where few heads of neighbouring tokens share their rows.
        indices: int32 [s_q, 1, topk], rows of kv, or slots (page * page_size + offset) of the
            cache. One outside is invalid, wherever it stands: never read. Repeated ones count each
            time.
        sm_scale: factor on q . k before the softmax.
        d_v: leading numbers of a row that are its value; a multiple of 64 up to 512, and d_qk - d_v
            is 0, 32 or 64.
        attn_sink: float32 [h_q]: out is scaled by e^lse / (e^lse + e^sink); lse and max_logits are
            not.
        topk_length: int32 [s_q]: slots from there on are ignored, unread. What a query sees, of a
            row from :func:`dsa_ext.topk_select`, spares the time that its padding would take.
        out: the triple to write into, or its first tensor alone.
        batch_invariant: a row's bits do not depend on the rest of the batch. They may otherwise for
            up to 32 heads on an SM90 GPU, where neighbouring tokens that have half of their rows in
            common, or more, read those once.
        workspace: as in :func:`flash_mla_with_kvcache`.

    Returns:
        out like q [s_q, h_q, d_v]; max_logits float32 [s_q, h_q] (scale applied, natural units);
        lse float32 [s_q, h_q] (natural log). A row with nothing valid: 0, -inf, +inf.

    Signature: FlashMLA's ``flash_mla_sparse_fwd``, which takes no cache. Its max_logits and lse are
    natural since January 2026; before, they were of base 2.
    """
    op = "flash_mla_sparse_fwd"
    check_tensor(op, "q", q)
    result, max_logits, lse = unpack_out(op, ("out", "max_logits", "lse"), out)
    rows = q.shape[:2]
    if result is None:
        result = q.new_empty((*rows, max(d_v, 0)))
    if max_logits is None:
        max_logits = q.new_empty(rows, dtype=torch.float32)
    if lse is None:
        lse = q.new_empty(rows, dtype=torch.float32)
    ops.flash_mla_sparse_fwd(
        q,
        kv,
        indices,
        sm_scale,
        d_v,
        attn_sink,
        topk_length,
        batch_invariant,
        result,
        max_logits,
        lse,
        workspace,
    )
    _raise_in_backward(op, (result, max_logits, lse), out, q, kv, attn_sink)
    return result, max_logits, lse


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
    enable_batch_invariant: bool = False,
    *,
    out: Tensor | tuple[Tensor, Tensor] | None = None,
    batch_invariant: bool = False,
    workspace: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of s_q query tokens a request over the paged latent cache (decode).

    Sparse with ``indices``, dense with ``block_table`` and ``cache_seqlens``.

    Args:
        q: bfloat16 or float16 [b, s_q, h_q, d_qk]; with an 8-bit cache float16 on the CPU only.
        k_cache: like q [pages, page_size, 1, d_qk]; or FP8 with scales: 8-bit
            [pages, page_size, 1, 656] (d_qk 576) or [pages, page_size, 1, 584] (d_qk 512), see
            docs/kv_cache_layout.md. Any page size, any page stride.
        block_table: int32 [b, P] (dense). Tokens in a page outside [0, pages) are skipped, unread.
        cache_seqlens: int32 [b] (dense), clamped to [0, P * page_size].
        head_dim_v: leading numbers of a row that are its value (512 with an 8-bit cache).
        tile_scheduler_metadata: accepted for FlashMLA's callers; never changes a result.
        num_splits: likewise.
        softmax_scale: factor on q . k; default d_qk ** -0.5.
        causal: dense only: row j sees the first cache_seqlen - s_q + 1 + j tokens.
        is_fp8_kvcache: True demands an 8-bit cache; one is FP8 under False too, since FlashMLA's
            default has been either.
        indices: int32 [b, s_q, topk], slots (page * page_size + offset). One outside the cache is
            invalid, wherever it stands: never read. Repeated ones count each time.
        attn_sink: float32 [h_q]: out is scaled by e^lse / (e^lse + e^sink); lse is not.
        extra_k_cache: a second cache of the same format with its own page size (sparse).
        extra_indices_in_kvcache: int32 [b, s_q, extra_topk], slots of it; one softmax over both.
        topk_length: int32 [b] or [b, s_q]: slots from there on are ignored, unread.
        extra_topk_length: the same for extra_indices_in_kvcache.
        enable_batch_invariant: the same as batch_invariant, in FlashMLA's place.
        out: the pair to write into, or its first tensor alone.
        batch_invariant: a row's bits do not depend on the rest of the batch (always so on the CPU),
            nor on the width of block_table; sparse, on a GPU, on whether indices are wider than
            1024.
        workspace: uint8 scratch memory of the call, 16-byte aligned, so that nothing is allocated;
            ``dsa_ext.MAX_WORKSPACE_BYTES`` always suffice. Calls on one stream may share it.

    Returns:
        out like q [b, s_q, h_q, head_dim_v]; lse float32 [b, h_q, s_q] (natural log, without the
        sink).
        A row with nothing valid: 0 and +inf.

    Signature: FlashMLA's ``flash_mla_with_kvcache``.
    """
    op = "flash_mla_with_kvcache"
    check_tensor(op, "q", q)
    if softmax_scale is None:
        softmax_scale = float(max(q.shape[-1:].numel(), 1)) ** -0.5
    result, lse = unpack_out(op, ("out", "lse"), out)
    rows = q.shape[:3]
    if result is None:
        result = q.new_empty((*rows, max(head_dim_v, 0)))
    if lse is None:
        lse = q.new_empty((*rows[:1], *rows[2:3], *rows[1:2]), dtype=torch.float32)
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
        batch_invariant or enable_batch_invariant,
        result,
        lse,
        workspace,
    )
    _raise_in_backward(op, (result, lse), out, q, k_cache, extra_k_cache, attn_sink)
    return result, lse


def merge_attn_states(
    outs: Tensor | Sequence[Tensor],
    lses: Tensor | Sequence[Tensor],
    *,
    out: Tensor | tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Merge attention results over disjoint sets of keys into the result over their union.

    Args:
        outs: float32, bfloat16 or float16 [n, ..., h, d], stacked or as a sequence of n.
        lses: float32 [n, ..., h] (natural log). |lse| = inf marks an empty result, whose out is
            unread. Decode's lse is [b, h, s_q]: transpose it.
        out: the pair to write into, or its first tensor alone; dimensions before h must be such
            that ``view`` merges them.

    Returns:
        out like one of outs, and lse float32. Where all are empty: 0 and +inf.
    """
    op = "merge_attn_states"
    outs, lses = _stacked("outs", outs), _stacked("lses", lses)
    merged, lse = unpack_out(op, ("out", "lse"), out)
    if outs.dtype not in _MERGED_DTYPES or outs.dim() < 3:
        raise ValueError(
            f"{op}: outs: expected float32 or bfloat16 or float16 [n, ..., h, d], "
            f"got {describe(outs)}"
        )
    if merged is None:
        merged = outs.new_empty(outs.shape[1:])
    if lse is None:
        lse = lses.new_empty(lses.shape[1:])
    for name, t, dtype, shape in (
        ("lses", lses, torch.float32, outs.shape[:-1]),
        ("out", merged, outs.dtype, outs.shape[1:]),
        ("out lse", lse, torch.float32, outs.shape[1:-1]),
    ):
        if t.dtype != dtype or t.shape != shape:
            raise ValueError(
                f"{op}: {name}: expected {dtype_name(dtype)} {list(shape)}, got {describe(t)}"
            )
    # The op takes one dimension of rows; outputs are viewed (never copied), inputs may be copied.
    ops.merge_attn_states(
        outs.reshape(_rows_merged(outs.shape, 1, 2)),
        lses.reshape(_rows_merged(lses.shape, 1, 1)),
        _view_of_rows("out", merged, 2),
        _view_of_rows("out lse", lse, 1),
    )
    _raise_in_backward(op, (merged, lse), out, outs, lses)
    return merged, lse


_MERGED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _stacked(name: str, parts: Tensor | Sequence[Tensor]) -> Tensor:
    op = "merge_attn_states"
    if not isinstance(parts, Sequence):
        check_tensor(op, name, parts)
        return parts
    for t in parts:
        check_tensor(op, name, t)
    if len({t.shape for t in parts}) != 1:
        got = ", ".join(map(describe, parts)) or "none"
        raise ValueError(f"{op}: {name}: expected tensors of one shape, got {got}")
    return torch.stack(tuple(parts))


def _rows_merged(shape: torch.Size, lead: int, tail: int) -> tuple[int, ...]:
    """Make one dimension of those between the first `lead` and the last `tail`."""
    last = len(shape) - tail
    return (*shape[:lead], shape[lead:last].numel(), *shape[last:])


def _view_of_rows(name: str, t: Tensor, tail: int) -> Tensor:
    try:
        return t.view(_rows_merged(t.shape, 0, tail))
    except RuntimeError:
        raise ValueError(
            f"merge_attn_states: {name}: expected leading dimensions that view() merges into one, "
            f"got {list(t.shape)} with strides {list(t.stride())}"
        ) from None

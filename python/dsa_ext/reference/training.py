# SPDX-License-Identifier: Apache-2.0
"""Differentiable sparse attention and the indexer's training loss (DeepSeek-V3.2, section 2.1)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ._arguments import as_int64
from ._chunks import compute_dtype, map_rows
from .attention import flash_mla_sparse_fwd, softmax_terms


def sparse_mla_attention(
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    sm_scale: float,
    d_v: int = 512,
    attn_sink: Tensor | None = None,
    topk_length: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sparse MLA attention with gradients for q, kv and attn_sink.

    Arguments as in `flash_mla_sparse_fwd`. Returns (out [s_q, h_q, d_v] in q's dtype, lse [s_q,
    h_q], natural log, without the sink, fp32 or fp64); both are differentiable. Rows of kv that are
    not selected get a zero gradient, even if they hold NaN.
    """
    out, _, lse = flash_mla_sparse_fwd(q, kv, indices, sm_scale, d_v, attn_sink, topk_length)
    return out, lse


def attention_target(
    q: Tensor,
    kv: Tensor,
    sm_scale: float,
    indices: Tensor | None = None,
    *,
    topk_length: Tensor | None = None,
    row_starts: Tensor | None = None,
    row_ends: Tensor | None = None,
    attn_sink: Tensor | None = None,
) -> Tensor:
    """The indexer's target: attention probabilities summed over heads and L1-normalised. Detached.

    q: [s_q, h_q, d_qk]; kv: [s_kv, 1, d_qk]; sm_scale as in the attention.
    Sparse stage: indices int32 [s_q, 1, topk] (with topk_length int32 [s_q]) -> [s_q, topk].
    Dense warm-up: indices None; query t sees [row_starts[t], row_ends[t]), int32 [s_q], by default
    the causal [0, s_kv - s_q + 1 + t) -> [s_q, s_kv]. attn_sink fp32 [h_q] weighs the heads as it
    does their outputs. Returns fp32 (fp64 if an input is); invalid entries are 0, rows with none
    valid all 0.
    """
    dtype = compute_dtype(q, kv, attn_sink)
    (rows, heads, dim), s_kv, device = q.shape, kv.shape[0], q.device
    latent = kv.detach().reshape(s_kv, dim).to(dtype)
    queries = q.detach()
    sink = None if attn_sink is None else attn_sink.detach().to(dtype)
    width = s_kv if indices is None else indices.shape[-1]
    if s_kv == 0:
        return torch.zeros((rows, width), dtype=dtype, device=device)
    column = torch.arange(width, device=device)
    if indices is None:
        default_ends = torch.arange(rows, device=device) + (s_kv - rows + 1)
        ends = default_ends if row_ends is None else as_int64("row_ends", row_ends)
        valid = column < ends.unsqueeze(-1)
        if row_starts is not None:
            valid &= column >= as_int64("row_starts", row_starts).unsqueeze(-1)
        picked = None
    else:
        picked = as_int64("indices", indices.reshape(rows, width))
        valid = (picked >= 0) & (picked < s_kv)
        if topk_length is not None:
            valid &= column < as_int64("topk_length", topk_length).unsqueeze(-1)
        picked = picked.masked_fill(~valid, 0)

    def target(begin: int, end: int) -> tuple[Tensor]:
        keys = latent if picked is None else latent[picked[begin:end]]
        logits = torch.matmul(queries[begin:end].to(dtype), keys.transpose(-1, -2)) * sm_scale
        terms, total, _, lse = softmax_terms(logits, valid[begin:end, None])
        probs = terms / total.unsqueeze(-1)
        if sink is not None:
            probs = probs * torch.sigmoid(lse - sink).unsqueeze(-1)
        return (_l1_normalise(probs.sum(dim=1)),)

    per_row = (3 * heads + (0 if picked is None else dim)) * width * dtype.itemsize
    with torch.no_grad():
        return map_rows(target, rows, per_row)[0]


def _l1_normalise(p: Tensor) -> Tensor:
    """Non-negative rows scaled to sum 1; a row of zeros stays."""
    norm = p.sum(dim=-1, keepdim=True)
    return torch.div(p, torch.where(norm == 0, 1.0, norm))


def indexer_kl_loss(
    index_scores: Tensor,
    attn_probs: Tensor,
    mask: Tensor | None = None,
    *,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Tensor:
    """KL(target || softmax(index_scores)), the indexer's loss of the DeepSeek-V3.2 paper.

    index_scores: [S,N], over all causal tokens (dense warm-up) or over the selected ones (sparse
    stage). attn_probs: over the same tokens, [S,H,N] probabilities of each head, or [S,N] already
    summed over heads (`attention_target`); summed and L1-normalised over the valid tokens here, and
    detached. mask: bool [S,N], True = valid; default: every token whose score is not -inf. Values
    at invalid tokens are not used and may be NaN. Rows with no valid token, or no target mass on
    the valid ones, give 0. reduction: "sum" over rows (the paper), "mean" over the rows with a
    valid token, "none" -> [S]. fp32 (fp64 if an input is). Differentiable in index_scores, the
    gradient being softmax - target.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(
            f"indexer_kl_loss: reduction: expected 'mean', 'sum' or 'none', got {reduction!r}"
        )
    dtype = compute_dtype(index_scores, attn_probs)
    scores, target = index_scores.to(dtype), attn_probs.detach().to(dtype)
    valid = ~torch.isneginf(scores) if mask is None else mask.to(torch.bool)
    if target.dim() == scores.dim() + 1:
        target = target.sum(dim=-2)
    target = _l1_normalise(target.masked_fill(~valid, 0.0))
    scores = scores.masked_fill(~valid, 0.0)
    _, _, _, lse = softmax_terms(scores, valid)
    # 0 log 0 = 0: tokens without target mass enter through the log-sum-exp alone.
    cross = (scores - lse.unsqueeze(-1)).masked_fill(target == 0, 0.0)
    loss: Tensor = (torch.xlogy(target, target) - target * cross).sum(dim=-1)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    mean: Tensor = loss.sum() / valid.any(dim=-1).sum().clamp(min=1)
    return mean

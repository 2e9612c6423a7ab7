# SPDX-License-Identifier: Apache-2.0
"""The lightning indexer: which earlier tokens deserve a query's attention."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dsa_ext.cache import indexer_k_quant_and_cache
from dsa_ext.indexer import fp8_paged_mqa_logits
from dsa_ext.nn.config import DSAConfig
from dsa_ext.nn.paged_cache import CacheStep, LayerPages
from dsa_ext.nn.rope import apply_rope
from dsa_ext.quant import hadamard_transform, per_token_cast_to_fp8
from dsa_ext.topk import topk_select


class IndexerInputs(NamedTuple):
    """What the score needs: I[t, s] = sum_h weights[t, h] * relu(q[t, h] . k[s])."""

    q: Tensor  # [B, S, index_n_heads, index_head_dim], rotated
    k: Tensor  # [B, S, index_head_dim], rotated
    weights: Tensor  # fp32 [B, S, index_n_heads], holds (n_heads * head_dim)^-0.5


class Indexer(nn.Module):
    """Scores each earlier token with a few cheap heads that share one key.

    Training runs in the parameters' precision. Serving multiplies q and k by the same orthonormal
    Hadamard matrix, which leaves their products as they were and spreads outliers over the head,
    and casts both to FP8.
    """

    def __init__(self, config: DSAConfig) -> None:
        super().__init__()
        self.config = config
        heads, width = config.index_n_heads, config.index_head_dim
        self.wq_b = nn.Linear(config.q_lora_rank, heads * width, bias=False)
        self.wk = nn.Linear(config.dim, width, bias=False)
        self.k_norm = nn.LayerNorm(width, eps=1e-6)
        self.weights_proj = nn.Linear(config.dim, heads, bias=False)

    def project(self, x: Tensor, q_latent: Tensor, angles: Tensor) -> IndexerInputs:
        """Project x [B, S, dim] and MLA's q_latent [B, S, q_lora_rank]; angles [B, S, rope / 2]."""
        cfg = self.config
        rotate = partial(
            apply_rope, interleaved=cfg.index_rope_interleaved, offset=cfg.index_rope_start
        )
        q = self.wq_b(q_latent).view(*x.shape[:2], cfg.index_n_heads, cfg.index_head_dim)
        q, k = rotate(q, angles.unsqueeze(-2)), rotate(self.k_norm(self.wk(x)), angles)
        weights = self.weights_proj(x).float() * (cfg.index_n_heads * cfg.index_head_dim) ** -0.5
        return IndexerInputs(q, k, weights)

    def forward(self, x: Tensor, q_latent: Tensor, angles: Tensor) -> Tensor:
        """Score all pairs, differentiably, fp32 [B, S (query), S (key)], not masked."""
        q, k, weights = self.project(x, q_latent, angles)
        per_head = torch.einsum("bqhd,bkd->bhqk", q.float(), k.float()).relu()
        return torch.einsum("bqh,bhqk->bqk", weights, per_head)

    @torch.no_grad()
    def select_cached(
        self, x: Tensor, q_latent: Tensor, angles: Tensor, pages: LayerPages, step: CacheStep
    ) -> Tensor:
        """Write the keys of the new tokens, then pick each query's rows: slots int32 [B, S, k].

        A chunk of S new tokens is S query rows of its request with a length each
        (``step.visible_lens``), so prefill and decode take the same path. Rows that see fewer than
        k tokens are padded with -1.
        """
        cfg = self.config
        batch, new = x.shape[:2]
        ue8m0 = cfg.scale_fmt == "ue8m0"
        q, k, weights = self.project(x, q_latent, angles)

        k = hadamard_transform(k).flatten(0, 1)
        indexer_k_quant_and_cache(k, pages.index_keys, step.slot_mapping, cfg.scale_fmt)
        q8, q_scale = per_token_cast_to_fp8(hadamard_transform(q), ue8m0)  # one scale a head
        logits = fp8_paged_mqa_logits(
            q8,
            pages.index_keys,
            (weights * q_scale.squeeze(-1)).flatten(0, 1),
            step.visible_lens,
            step.block_table,
            step.schedule,
            step.max_context_len,
        )
        slots = topk_select(
            logits,
            cfg.index_topk,
            row_ends=step.visible_lens.flatten(),
            block_table=step.block_table,
            page_size=pages.page_size,
        )
        return slots.view(batch, new, cfg.index_topk)

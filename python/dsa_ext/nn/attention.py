# SPDX-License-Identifier: Apache-2.0
"""Multi-head latent attention over the tokens that the lightning indexer picks."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsa_ext.attention import flash_mla_with_kvcache
from dsa_ext.cache import mla_kv_quant_and_cache
from dsa_ext.nn.config import DSAConfig
from dsa_ext.nn.indexer import Indexer
from dsa_ext.nn.paged_cache import CacheStep, LayerPages
from dsa_ext.nn.rope import apply_rope, rope_angles
from dsa_ext.reference import indexer_kl_loss


class AttentionOutput(NamedTuple):
    """What ``DSAttention.forward`` returns."""

    out: Tensor  # [B, S, dim]
    index_loss: Tensor | None  # scalar, where asked for
    selected: Tensor | None  # bool [B, S (query), S (key)], sparse mode


class DSAttention(nn.Module):
    """A DeepSeek Sparse Attention layer: MLA, and an indexer that chooses its keys.

    ``forward`` is the differentiable path in plain PyTorch: whole sequences, expanded K and V.
    The paper's two stages are

    - warm-up, ``sparse=False, index_loss=True``: dense attention; train ``indexer`` alone to
      match the head-summed, L1-normalised attention;
    - sparse training, ``sparse=True, index_loss=True``: attention and the indexer's KL over the
      selected tokens.

    The indexer reads detached inputs and its choice has no derivative, so the model learns from
    its own loss only and the indexer from ``index_loss`` only.

    ``forward_cached`` is the serving path: quantised pages, absorbed weights, compiled ops.
    Parameter names follow DeepSeek-V3.2's.
    """

    def __init__(self, config: DSAConfig) -> None:
        super().__init__()
        self.config = cfg = config
        self.wq_a = nn.Linear(cfg.dim, cfg.q_lora_rank, bias=False)
        self.q_norm = nn.RMSNorm(cfg.q_lora_rank, eps=1e-6)
        self.wq_b = nn.Linear(cfg.q_lora_rank, cfg.n_heads * cfg.qk_head_dim, bias=False)
        self.wkv_a = nn.Linear(cfg.dim, cfg.latent_dim, bias=False)
        self.kv_norm = nn.RMSNorm(cfg.kv_lora_rank, eps=1e-6)
        self.wkv_b = nn.Linear(
            cfg.kv_lora_rank, cfg.n_heads * (cfg.qk_nope_head_dim + cfg.v_head_dim), bias=False
        )
        self.wo = nn.Linear(cfg.n_heads * cfg.v_head_dim, cfg.dim, bias=False)
        self.indexer = Indexer(cfg)

    def forward(
        self,
        x: Tensor,
        *,
        sparse: bool = True,
        index_loss: bool = False,
        mask: Tensor | None = None,
    ) -> AttentionOutput:
        """Attend within whole sequences: x [B, S, dim], from position 0.

        ``mask`` (bool, broadcastable to [B, S, S]) narrows what a query sees, on top of causality;
        in sparse mode the indexer chooses among what is left. A query that sees nothing gets zeros
        from every head.
        """
        cfg = self.config
        seq = x.shape[1]
        angles = rope_angles(cfg, torch.arange(seq, device=x.device)).unsqueeze(0)
        q, latent, k_rope, q_latent = self._project(x, angles)
        kv = self.wkv_b(latent).view(*x.shape[:2], cfg.n_heads, -1)
        k_nope, v = torch.split(kv, [cfg.qk_nope_head_dim, cfg.v_head_dim], dim=-1)
        k = torch.cat((k_nope, k_rope.unsqueeze(2).expand(-1, -1, cfg.n_heads, -1)), dim=-1)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [B, n_heads, S, head]

        seen = torch.ones(seq, seq, dtype=torch.bool, device=x.device).tril().unsqueeze(0)
        if mask is not None:
            seen = seen & mask
        scores = selected = None
        if sparse or index_loss:
            scores = self.indexer(x.detach(), q_latent.detach(), angles)
            scores = scores.masked_fill(~seen, -torch.inf)
        if sparse:
            assert scores is not None
            seen = selected = top_k_mask(scores.detach(), cfg.index_topk) & seen

        loss = None
        if index_loss:
            assert scores is not None
            logits = (q @ k.transpose(-1, -2)).float() * cfg.softmax_scale
            unseen = ~seen.unsqueeze(1)
            # Not -inf: a row of nothing else would be NaN, and so its derivative. Here it is zero.
            probs = logits.masked_fill(unseen, torch.finfo(logits.dtype).min).softmax(-1)
            probs = probs.masked_fill(unseen, 0.0)
            heads = probs.to(v.dtype) @ v
            loss = indexer_kl_loss(
                scores.flatten(0, 1),
                probs.detach().sum(1).flatten(0, 1),
                seen.expand_as(scores).flatten(0, 1),
            )
        else:
            heads = F.scaled_dot_product_attention(
                q, k, v, attn_mask=seen.unsqueeze(1), scale=cfg.softmax_scale
            )
        out = self.wo(heads.transpose(1, 2).flatten(2))
        return AttentionOutput(out, loss, selected)

    @torch.no_grad()
    def forward_cached(
        self, x: Tensor, pages: LayerPages, step: CacheStep, *, sparse: bool = True
    ) -> Tensor:
        """Cache S new tokens of B requests and attend from them: x and result [B, S, dim].

        Absorption moves wkv_b from the keys to the query and the output, so that attention reads
        the latent rows as they are cached: q_nope W_uk . c = q_nope . (W_uk c).
        """
        cfg = self.config
        angles = rope_angles(cfg, step.positions)
        q, latent, k_rope, q_latent = self._project(x, angles)
        mla_kv_quant_and_cache(
            latent.flatten(0, 1).bfloat16(),
            k_rope.flatten(0, 1).bfloat16(),
            pages.latent,
            step.slot_mapping,
        )
        wkv_b = self.wkv_b.weight.view(cfg.n_heads, -1, cfg.kv_lora_rank)
        w_uk, w_uv = torch.split(wkv_b, [cfg.qk_nope_head_dim, cfg.v_head_dim], dim=1)
        q_nope, q_rope = torch.split(q, [cfg.qk_nope_head_dim, cfg.qk_rope_head_dim], dim=-1)
        absorbed = torch.cat((torch.einsum("bshn,hnc->bshc", q_nope, w_uk), q_rope), dim=-1)

        slots = None
        if sparse:
            slots = self.indexer.select_cached(x, q_latent, angles, pages, step)
        out, _ = flash_mla_with_kvcache(
            absorbed.bfloat16(),
            pages.latent,
            None if sparse else step.block_table,
            None if sparse else step.context_lens,
            512 if pages.is_fp8 else cfg.kv_lora_rank,
            None,
            softmax_scale=cfg.softmax_scale,
            causal=not sparse,
            is_fp8_kvcache=pages.is_fp8,
            indices=slots,
            topk_length=step.visible_lens if sparse else None,  # the rest of a row is padding
        )
        # The V4 layout's values are the whole row; the latent is its head.
        heads = torch.einsum("bshc,hvc->bshv", out[..., : cfg.kv_lora_rank].to(x.dtype), w_uv)
        result: Tensor = self.wo(heads.flatten(2))
        return result

    def _project(self, x: Tensor, angles: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Project x [B, S, dim]; everything that has a position comes back rotated.

        Returns q [B, S, n_heads, qk_head_dim], the latent [B, S, kv_lora_rank], the heads' shared
        RoPE key [B, S, qk_rope_head_dim], and q's latent [B, S, q_lora_rank].
        """
        cfg = self.config
        q_latent = self.q_norm(self.wq_a(x))
        q = self.wq_b(q_latent).view(*x.shape[:2], cfg.n_heads, cfg.qk_head_dim)
        q = apply_rope(
            q,
            angles.unsqueeze(-2),
            interleaved=cfg.rope_interleaved,
            offset=cfg.qk_nope_head_dim,
        )
        latent, k_rope = torch.split(
            self.wkv_a(x), [cfg.kv_lora_rank, cfg.qk_rope_head_dim], dim=-1
        )
        k_rope = apply_rope(k_rope, angles, interleaved=cfg.rope_interleaved)
        return q, self.kv_norm(latent), k_rope, q_latent


def top_k_mask(scores: Tensor, k: int) -> Tensor:
    """True at the k largest of each row of scores [..., S]."""
    top = scores.topk(min(k, scores.shape[-1]), dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, top, True)

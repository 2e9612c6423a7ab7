# SPDX-License-Identifier: Apache-2.0
"""A byte-level language model with a DSA layer in every block."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsa_ext.nn import AttentionOutput, CacheStep, DSAConfig, DSAttention, PagedCache

VOCAB = 256


class ModelOutput(NamedTuple):
    logits: Tensor  # [B, S, VOCAB]
    index_loss: Tensor | None  # summed over the layers
    selected: list[Tensor]  # for each layer bool [B, S, S], if sparse


class SwiGLU(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.w2(F.silu(self.w1(x)) * self.w3(x)))


class Block(nn.Module):
    def __init__(self, config: DSAConfig, hidden: int) -> None:
        super().__init__()
        self.attn_norm = nn.RMSNorm(config.dim, eps=1e-6)
        self.attn = DSAttention(config)
        self.ffn_norm = nn.RMSNorm(config.dim, eps=1e-6)
        self.ffn = SwiGLU(config.dim, hidden)

    def forward(self, x: Tensor, attended: Tensor) -> Tensor:
        """The residual stream x [B, S, dim] and the attention's result -> the next stream."""
        x = x + attended
        return x + cast(Tensor, self.ffn(self.ffn_norm(x)))


class ByteLM(nn.Module):
    def __init__(self, config: DSAConfig, n_layers: int, hidden: int) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(VOCAB, config.dim)
        self.layers = nn.ModuleList(Block(config, hidden) for _ in range(n_layers))
        self.norm = nn.RMSNorm(config.dim, eps=1e-6)
        self.head = nn.Linear(config.dim, VOCAB, bias=False)
        for name, weight in self.named_parameters():
            if name.endswith(("wo.weight", "w2.weight")):  # each block begins as the identity
                nn.init.zeros_(weight)
            elif weight.dim() == 2:
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        nn.init.normal_(self.embed.weight, std=0.5)
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(
        self,
        tokens: Tensor,
        *,
        sparse: bool,
        index_loss: bool = False,
        mask: Tensor | None = None,
    ) -> ModelOutput:
        """Training path: tokens int64 [B, S]; the arguments are those of ``DSAttention``."""
        x: Tensor = self.embed(tokens)
        losses, selected = [], []
        for block in self.blocks:
            attended: AttentionOutput = block.attn(
                block.attn_norm(x), sparse=sparse, index_loss=index_loss, mask=mask
            )
            x = block(x, attended.out)
            if attended.index_loss is not None:
                losses.append(attended.index_loss)
            if attended.selected is not None:
                selected.append(attended.selected)
        total = torch.stack(losses).sum() if losses else None
        return ModelOutput(self.head(self.norm(x)), total, selected)

    @torch.no_grad()
    def forward_cached(self, tokens: Tensor, cache: PagedCache, step: CacheStep) -> Tensor:
        """Serving path: the next S tokens of each request, int64 [B, S] -> [B, S, VOCAB]."""
        x: Tensor = self.embed(tokens)
        for block, pages in zip(self.blocks, cache.layers, strict=True):
            x = block(x, block.attn.forward_cached(block.attn_norm(x), pages, step))
        return cast(Tensor, self.head(self.norm(x)))

    @property
    def blocks(self) -> list[Block]:
        return cast(list[Block], list(self.layers))

    def indexer_parameters(self) -> list[nn.Parameter]:
        return [p for block in self.blocks for p in block.attn.indexer.parameters()]

    def main_parameters(self) -> list[nn.Parameter]:
        indexers = set(map(id, self.indexer_parameters()))
        return [p for p in self.parameters() if id(p) not in indexers]

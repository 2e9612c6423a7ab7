# SPDX-License-Identifier: Apache-2.0
"""Training stages and held-out evaluation, for four ways to choose what a query reads."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer
from tqdm import tqdm

from demo.data import Corpus
from demo.model import ByteLM
from dsa_ext.nn import top_k_mask

Attention = Literal["dense", "dsa", "window", "random"]
MUON_LR, ADAM_LR, INDEXER_LR = 0.01, 0.01, 3e-3


def reading(kind: Attention, k: int, tokens: Tensor, generator: torch.Generator) -> dict[str, Any]:
    """What ``ByteLM.forward`` needs so that a query reads all tokens, or k with itself."""
    if kind == "dense":
        return {"sparse": False}
    if kind == "dsa":
        return {"sparse": True}
    batch, length = tokens.shape
    position = torch.arange(length)
    distance = position.unsqueeze(1) - position  # [query, key]
    if kind == "window":
        mask = (distance < k).unsqueeze(0)
    else:
        lots = torch.rand(batch, length, length, generator=generator)
        mask = top_k_mask(lots.masked_fill(distance == 0, 2.0).masked_fill(distance < 0, -1.0), k)
    return {"sparse": False, "mask": mask.to(tokens.device)}


def optimizers_of(model: ByteLM, *, main: bool, indexer: bool) -> list[Optimizer]:
    """Muon for the blocks' matrices, Adam for the rest and for the indexers."""
    optimizers: list[Optimizer] = []
    if main:
        ends = {id(model.embed.weight), id(model.head.weight)}
        matrices: list[Tensor] = []
        others: list[Tensor] = []
        for p in model.main_parameters():
            (matrices if p.dim() == 2 and id(p) not in ends else others).append(p)
        optimizers.append(torch.optim.Muon(matrices, lr=MUON_LR, weight_decay=0.01))
        optimizers.append(torch.optim.Adam(others, lr=ADAM_LR, betas=(0.9, 0.95)))
    if indexer:
        parameters = model.indexer_parameters()
        optimizers.append(torch.optim.Adam(parameters, lr=INDEXER_LR, betas=(0.9, 0.95)))
    return optimizers


@dataclass(frozen=True)
class Trainer:
    """The corpus and shape that all stages share."""

    corpus: Corpus
    batch: int
    length: int
    k: int
    device: torch.device

    def run(
        self,
        title: str,
        model: ByteLM,
        kind: Attention,
        steps: int,
        rate: Callable[[float], float],
        *,
        main: bool = True,
        indexer: bool = False,
        seed: int = 0,
    ) -> float:
        """Train what is named for a number of steps; returns tokens/s.

        ``rate`` maps the stage's progress in [0, 1) to a factor on the learning rates. Stages with
        the same seed see the same batches.
        """
        generator = torch.Generator().manual_seed(seed)
        optimizers = optimizers_of(model, main=main, indexer=indexer)
        schedules = [
            torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step / steps))
            for optimizer in optimizers
        ]
        for p in model.main_parameters():
            p.requires_grad_(main)
        start = time.perf_counter()
        progress = tqdm(range(steps), desc=f"{title:<24}", unit="step", ncols=96)
        for _ in progress:
            window = self.corpus.batch(self.batch, self.length, generator).to(self.device)
            tokens, targets = window[:, :-1], window[:, 1:]
            output = model(tokens, index_loss=indexer, **reading(kind, self.k, tokens, generator))
            loss = F.cross_entropy(output.logits.flatten(0, 1), targets.flatten())
            shown = {"bits/byte": f"{loss.item() / math.log(2):.2f}"}
            if not main:
                loss = torch.zeros_like(loss)
            if output.index_loss is not None:
                shown["KL"] = f"{output.index_loss.item():.3f}"
                loss = loss + output.index_loss
            loss.backward()  # type: ignore[no-untyped-call]
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
            progress.set_postfix(shown, refresh=False)
        return steps * self.batch * self.length / (time.perf_counter() - start)

    @torch.no_grad()
    def evaluate(self, model: ByteLM, kind: Attention, windows: Tensor) -> float:
        """Bits/byte over held-out windows [N, length + 1]."""
        generator = torch.Generator().manual_seed(1)
        total = 0.0
        for window in torch.split(windows, self.batch):
            tokens, targets = window[:, :-1].to(self.device), window[:, 1:].to(self.device)
            logits = model(tokens, **reading(kind, self.k, tokens, generator)).logits
            total += bits(logits, targets).sum().item()
        return total / windows[:, 1:].numel()


def bits(logits: Tensor, targets: Tensor) -> Tensor:
    """-log2 p(target): logits [B, S, V], targets [B, S] -> [B, S]."""
    return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none") / math.log(2)

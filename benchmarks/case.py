# SPDX-License-Identifier: Apache-2.0
"""What a benchmark case is: our call, its check, how much work it is, and the peers' calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch

Call = Callable[[], object]
Product = Literal["bf16", "fp8"]


@dataclass(frozen=True)
class Bar:
    """A target: at least `least` of the binding roof, or of a peer's speed (1 = as fast)."""

    against: str
    least: float


@dataclass
class Work:
    """One case with its inputs in memory.

    `bytes` counts each input byte that the op needs once and each output byte once; `flop` the
    multiply-adds of unmasked products, twice. A peer is a function that prepares its call, run
    outside of the timing. `reference` is timed on the CPU only, `stages` are timed on their own.
    """

    run: Call
    check: Call
    flop: float = 0.0
    bytes: float = 0.0
    product: Product = "bf16"
    peers: dict[str, Callable[[], Call]] = field(default_factory=dict)
    reference: Call | None = None
    stages: dict[str, Call] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """A named shape of an op; `make` allocates its inputs on a device."""

    op: str
    name: str
    make: Callable[[torch.device], Work]
    bars: tuple[Bar, ...] = ()
    quick: bool = False

    def __str__(self) -> str:
        return f"{self.op} {self.name}"

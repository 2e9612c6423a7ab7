# SPDX-License-Identifier: Apache-2.0
"""Sizes and conventions of a DeepSeek Sparse Attention layer."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal


@dataclass(frozen=True)
class DSAConfig:
    """One DSA layer. The defaults are DeepSeek-V3.2's.

    ``rope_interleaved`` and ``index_rope_interleaved`` choose the pairing of RoPE in MLA (its rope
    part stands after the nope part) and in the indexer, whose rotated values start at
    ``index_rope_offset`` of each head. Past ``original_seq_len`` YaRN stretches the frequencies by
    ``rope_factor`` and sharpens the softmax.
    """

    dim: int = 7168
    n_heads: int = 128
    q_lora_rank: int = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128

    index_n_heads: int = 64
    index_head_dim: int = 128
    index_topk: int = 2048

    rope_theta: float = 10000.0
    rope_interleaved: bool = True
    index_rope_interleaved: bool = False
    index_rope_offset: int | Literal["first", "last"] = "first"

    max_seq_len: int = 163840
    original_seq_len: int = 4096
    rope_factor: float = 40.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0

    scale_fmt: Literal["fp32", "ue8m0"] = "ue8m0"
    """Scales of the indexer's FP8 q and k: fp32, or rounded up to a power of two."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.type == "int":
                self._expect(field.name, "at least 1", getattr(self, field.name) >= 1)
        rope, width = self.qk_rope_head_dim, self.index_head_dim
        self._expect("qk_rope_head_dim", "an even number", rope % 2 == 0)
        self._expect("index_head_dim", "32, 64 or 128", width in (32, 64, 128))
        self._expect("qk_rope_head_dim", f"at most index_head_dim={width}", rope <= width)
        starts = ("first", "last", *range(width - rope + 1))
        wanted = f"'first', 'last' or 0..{width - rope}"
        self._expect("index_rope_offset", wanted, self.index_rope_offset in starts)
        self._expect("scale_fmt", "'fp32' or 'ue8m0'", self.scale_fmt in ("fp32", "ue8m0"))

    def _expect(self, field: str, wanted: str, holds: bool) -> None:
        if not holds:
            got = getattr(self, field)
            raise ValueError(f"DSAConfig: {field}: expected {wanted}, got {got!r}")

    @property
    def qk_head_dim(self) -> int:
        """Width of a query or key head before absorption."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Width of a cached row: the latent, then the shared RoPE key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def index_rope_start(self) -> int:
        """First rotated element of an indexer head."""
        if self.index_rope_offset == "first":
            return 0
        if self.index_rope_offset == "last":
            return self.index_head_dim - self.qk_rope_head_dim
        return self.index_rope_offset

    @property
    def uses_yarn(self) -> bool:
        """Whether the context is longer than the one the frequencies were made for."""
        return self.max_seq_len > self.original_seq_len

    @property
    def softmax_scale(self) -> float:
        """qk_head_dim^-0.5, times YaRN's temperature (0.1 * mscale * ln(factor) + 1)^2."""
        scale: float = self.qk_head_dim**-0.5
        if self.uses_yarn:
            scale *= (0.1 * self.mscale * math.log(self.rope_factor) + 1.0) ** 2
        return scale

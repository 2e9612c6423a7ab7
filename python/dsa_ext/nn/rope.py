# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding: two pairing styles, a free offset, and YaRN's context extension."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from dsa_ext.nn.config import DSAConfig


@lru_cache(maxsize=64)
def rope_frequencies(config: DSAConfig, device: torch.device) -> Tensor:
    """Angular frequency of each rotated pair, fp32 [qk_rope_head_dim / 2].

    Kept out of the modules' buffers so that ``module.bfloat16()`` cannot round it. Beyond
    ``original_seq_len`` YaRN applies: a pair that turns more than ``beta_fast`` times over the
    original context keeps its frequency, one that turns less than ``beta_slow`` times is slowed
    by ``rope_factor``, and those between are blended linearly in the pair's number.
    """
    dim, theta = config.qk_rope_head_dim, config.rope_theta
    pair = torch.arange(dim // 2, dtype=torch.float32)
    freqs = theta ** (-2.0 * pair / dim)
    if config.uses_yarn:

        def pair_turning(turns: float) -> float:
            """The (fractional) pair that makes this many turns over the original context."""
            return dim / 2 * math.log(config.original_seq_len / (2 * math.pi * turns), theta)

        low = max(math.floor(pair_turning(config.beta_fast)), 0)
        high = min(math.ceil(pair_turning(config.beta_slow)), dim - 1)
        slowed = ((pair - low) / max(high - low, 1e-3)).clamp(0, 1)
        freqs = freqs * (1 - slowed) + freqs / config.rope_factor * slowed
    return freqs.to(device)


def rope_angles(config: DSAConfig, positions: Tensor) -> Tensor:
    """Angles for integer ``positions`` of any shape [...], fp32 [..., qk_rope_head_dim / 2]."""
    return positions.unsqueeze(-1).float() * rope_frequencies(config, positions.device)


def apply_rope(x: Tensor, angles: Tensor, *, interleaved: bool, offset: int = 0) -> Tensor:
    """Rotate ``x[..., offset : offset + 2 * n]`` by ``angles[..., n]``; the rest passes through.

    ``interleaved`` pairs neighbours (2i, 2i + 1); otherwise element i is paired with i + n
    (half-split). ``angles`` broadcasts against the leading dimensions of ``x``. The result has
    the dtype of ``x``; the rotation itself is fp32.
    """
    width = 2 * angles.shape[-1]
    if not 0 <= offset <= x.shape[-1] - width:
        raise ValueError(
            f"apply_rope: offset: expected 0 <= offset <= {x.shape[-1] - width} for {width} "
            f"rotated values of {x.shape[-1]}, got {offset}"
        )
    rotated = x[..., offset : offset + width].float()
    cos, sin = angles.cos(), angles.sin()
    if interleaved:
        a, b = rotated[..., 0::2], rotated[..., 1::2]
        rotated = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
    else:
        a, b = rotated.chunk(2, dim=-1)
        rotated = torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)
    if width == x.shape[-1]:
        return rotated.to(x.dtype)
    return torch.cat((x[..., :offset], rotated.to(x.dtype), x[..., offset + width :]), dim=-1)

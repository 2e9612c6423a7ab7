# SPDX-License-Identifier: Apache-2.0
"""Hadamard rotation and FP8 quantisation of indexer queries and keys.

Every function raises ValueError for a wrong argument (one line: argument, expected, got).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsa_ext._ops import ops


def hadamard_transform(x: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Multiply the last dimension by the orthonormal Hadamard matrix (Sylvester order).

    Args:
        x: float32, bfloat16 or float16 [..., n], n a power of two from 1 to 32768.
        out: like x.

    Returns:
        H_n x / sqrt(n), like x; fp32 accumulation. Its own inverse.
    """
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    ops.hadamard_transform(x, out)
    return out


def per_token_cast_to_fp8(
    x: Tensor, use_ue8m0: bool, *, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Quantise groups of 128 consecutive values to float8_e4m3fn with one scale each.

    scale = max(amax, 1e-4) / 448, with use_ue8m0 rounded up to a power of two; value = x / scale,
    rounded to nearest even, saturated at 448.

    Args:
        x: float32, bfloat16 or float16 [..., n]; a last group of fewer than 128 has its own scale.
        use_ue8m0: power-of-two scales (still stored as float32).
        out: the pair to write into.

    Returns:
        values float8_e4m3fn [..., n], scales float32 [..., ceil(n / 128)].

    Signature: DeepGEMM's ``per_token_cast_to_fp8``.
    """
    if out is None:
        groups = tuple(-(-n // 128) for n in x.shape[-1:])
        out = (
            torch.empty_like(x, dtype=torch.float8_e4m3fn, memory_format=torch.contiguous_format),
            x.new_empty((*x.shape[:-1], *groups), dtype=torch.float32),
        )
    ops.per_token_cast_to_fp8(x, use_ue8m0, *out)
    return out

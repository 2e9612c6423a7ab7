# SPDX-License-Identifier: Apache-2.0
"""Hadamard rotation and FP8 quantisation of indexer queries and keys.

Every function raises ValueError for a wrong argument (one line: argument, expected, got).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsa_ext._arguments import check_tensor, unpack_out
from dsa_ext._ops import ops


def hadamard_transform(
    x: Tensor, scale: float | None = None, *, out: Tensor | None = None
) -> Tensor:
    """Multiply the last dimension by the Hadamard matrix H_n (Sylvester order) and a factor.

    Args:
        x: float32, bfloat16 or float16 [..., n], n a power of two from 1 to 32768.
        scale: the factor; None is n ** -0.5, which makes the transform orthonormal, its own
            inverse.
        out: like x.

    Returns:
        scale * H_n x, like x; fp32 accumulation, one rounding.

    Signature: that of ``fast_hadamard_transform``, whose default scale is 1.
    """
    check_tensor("hadamard_transform", "x", x)
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    ops.hadamard_transform(x, scale, out)
    return out


def per_token_cast_to_fp8(
    x: Tensor,
    use_ue8m0: bool,
    gran_k: int = 128,
    use_packed_ue8m0: bool = False,
    *,
    out: Tensor | tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantise groups of 128 consecutive values to float8_e4m3fn with one scale each.

    scale = max(amax, 1e-4) / 448, with use_ue8m0 rounded up to a power of two; value = x / scale,
    rounded to nearest even, saturated at 448.

    Args:
        x: float32, bfloat16 or float16 [..., n]; a last group of fewer than 128 has its own scale.
        use_ue8m0: power-of-two scales (still stored as float32).
        gran_k: 128; DeepGEMM's other group sizes are a ValueError.
        use_packed_ue8m0: False; DeepGEMM's scales in bytes are a ValueError.
        out: the pair to write into, or its first tensor alone.

    Returns:
        values float8_e4m3fn [..., n], scales float32 [..., ceil(n / 128)].

    Signature: DeepGEMM's ``per_token_cast_to_fp8``.
    """
    op = "per_token_cast_to_fp8"
    check_tensor(op, "x", x)
    if gran_k != 128:
        raise ValueError(f"{op}: gran_k: expected 128, got {gran_k}")
    if use_packed_ue8m0:
        raise ValueError(f"{op}: use_packed_ue8m0: expected False, got {use_packed_ue8m0}")
    values, scales = unpack_out(op, ("values", "scales"), out)
    if values is None:
        values = torch.empty_like(
            x, dtype=torch.float8_e4m3fn, memory_format=torch.contiguous_format
        )
    if scales is None:
        groups = tuple(-(-n // gran_k) for n in x.shape[-1:])
        scales = x.new_empty((*x.shape[:-1], *groups), dtype=torch.float32)
    ops.per_token_cast_to_fp8(x, use_ue8m0, values, scales)
    return values, scales

# SPDX-License-Identifier: Apache-2.0
"""Checks of what would otherwise give a plausible result: nothing judges the oracle."""

from __future__ import annotations

import torch
from torch import Tensor


def as_int64(name: str, x: Tensor) -> Tensor:
    """Indices, lengths or table entries as int64; what is no integer is not rounded to one."""
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise ValueError(f"{name}: expected integers, got {x.dtype}")
    return x.to(torch.int64)


def expect_one_head(name: str, latents: Tensor) -> None:
    """MLA's latents [..., 1, d] have one head."""
    if latents.shape[-2] != 1:
        raise ValueError(f"{name}: expected [..., 1, d], got {list(latents.shape)}")


def expect_d_v(name: str, d_v: int, d_qk: int) -> None:
    """V is the first d_v values of K."""
    if not 1 <= d_v <= d_qk:
        raise ValueError(f"{name}: expected 1 to d_qk={d_qk}, got {d_v}")

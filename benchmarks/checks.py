# SPDX-License-Identifier: Apache-2.0
"""Comparisons with the reference, at the tolerances of the test suite."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsa_ext import reference

LOGITS = 5e-6
DECODE = 5e-6
PREFILL = 7e-6
ROUNDED = 5e-6
"""Largest difference d of logits, of attention outputs, and of other ops with 16-bit outputs."""


class WrongResult(Exception):
    """Our result differs from the reference's."""


def require(holds: bool, what: str) -> None:
    if not holds:
        raise WrongResult(what)


def some(count: int, device: torch.device, most: int = 4) -> Tensor:
    """A few row numbers of `count`, first and last among them."""
    return torch.linspace(0, count - 1, min(most, count), device=device).round().long()


def take(x: Tensor, rows: Tensor) -> Tensor:
    """x[rows], for FP8 too."""
    if x.element_size() > 1:
        return x[rows]
    return x.view(torch.uint8)[rows].view(x.dtype)


def exact(what: str, ours: Tensor, theirs: Tensor) -> None:
    """Bit-equal values."""
    if ours.element_size() == 1:
        ours, theirs = ours.view(torch.uint8), theirs.view(torch.uint8)
    wrong = int((ours != theirs).sum())
    require(wrong == 0, f"{what}: {wrong} of {ours.numel()} values differ")


def close(what: str, ours: Tensor, theirs: Tensor, limit: float) -> None:
    """d = 1 - 2<x, y> / (<x, x> + <y, y>) below `limit`; non-finite values in the same places."""
    x, y = ours.double(), theirs.double()
    finite = y.isfinite()
    require(torch.equal(x.isfinite(), finite), f"{what}: other values are finite")
    require(torch.equal(x[~finite].isnan(), y[~finite].isnan()), f"{what}: inf for NaN")
    x, y = x[finite], y[finite]
    norms = float((x * x).sum() + (y * y).sum())
    d = 1 - 2 * float((x * y).sum()) / norms if norms else 0.0
    require(d < limit, f"{what}: d = {d:.1e}, limit {limit:.0e}")


def close_lse(ours: Tensor, theirs: Tensor) -> None:
    """Within 1e-6 absolute or 1e-4 relative."""
    same = torch.isclose(ours.double(), theirs.double(), rtol=1e-4, atol=1e-6)
    require(bool(same.all()), f"lse: {int((~same).sum())} of {same.numel()} values differ")


def sparse_decode(
    out: Tensor, lse: Tensor, some: Tensor, q: Tensor, cache: Tensor, indices: Tensor, **more: Any
) -> None:
    """Requests `some` of a decode over an FP8 cache; `more`: further arguments, of theirs alone."""
    expected, expected_lse = reference.flash_mla_with_kvcache(
        q[some],
        cache,
        None,
        None,
        out.shape[-1],
        None,
        is_fp8_kvcache=True,
        indices=indices[some],
        out_dtype=torch.float32,
        **more,
    )
    close("out", out[some], expected, DECODE)
    close_lse(lse[some], expected_lse)


def selection(indices: Tensor, scores: Tensor, k: int) -> None:
    """Whether indices [R, k] are the k best of the reference's scores [R, N] (-inf: not there).

    Our scores differ from the reference's in the last bits, so what was left out may beat what was
    kept by as much.
    """
    for row, score in zip(indices.long(), scores.double(), strict=True):
        kept = row[row >= 0]
        window = score[score > -torch.inf]
        require(len(kept) == min(k, len(window)), f"{len(kept)} indices of {len(window)} scores")
        require(bool((kept.diff() > 0).all()), "indices do not ascend")
        cut = window.topk(len(kept)).values[-1]
        slack = 1e-4 * window.abs().max()
        require(bool((score[kept] >= cut - slack).all()), "a kept score is below the cut")

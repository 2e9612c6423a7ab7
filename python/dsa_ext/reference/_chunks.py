# SPDX-License-Identifier: Apache-2.0
"""Row-chunked evaluation, so that no intermediate of the oracle grows with the number of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_BYTES = 64 << 20
"""Budget, in bytes, of the intermediates of one chunk (a single row may exceed it)."""


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """fp64 if any input is fp64, else fp32."""
    wide = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32


def map_rows(
    fn: Callable[[int, int], tuple[Tensor, ...]],
    rows: int,
    bytes_per_row: int,
    differentiable: Iterable[Tensor | None] = (),
) -> tuple[Tensor, ...]:
    """Concatenate `fn(begin, end)` over spans of `rows`, each within `CHUNK_BYTES`.

    When a tensor in `differentiable` requires grad, several spans are checkpointed: the backward
    pass recomputes one span at a time instead of keeping the intermediates of all of them.
    """
    step = max(1, CHUNK_BYTES // max(1, bytes_per_row))
    if rows <= step:
        return fn(0, rows)
    tracked = any(t is not None and t.requires_grad for t in differentiable)
    grad = torch.is_grad_enabled() and tracked
    parts: list[Sequence[Tensor]] = []
    for begin in range(0, rows, step):
        end = min(rows, begin + step)
        if grad:
            part = checkpoint(fn, begin, end, use_reentrant=False, preserve_rng_state=False)
        else:
            part = fn(begin, end)
        parts.append(part)
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))

# SPDX-License-Identifier: Apache-2.0
"""Exact top-k of prefill logits (causal windows), of paged logits and of plain random rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import dsa_ext
from benchmarks import checks, peers
from benchmarks.case import Call, Case, Work
from benchmarks.cases.logits import PAGED_SHAPES, PREFILL_SHAPES, Paged, Prefill
from dsa_ext import reference

K = 2048


def _select(scores: Tensor, lens: Tensor | None, k: int) -> Work:
    """Select from scores[r, :lens[r]]; past that the scores are -inf."""
    rows, n = scores.shape
    device = scores.device
    out = torch.empty(rows, k, dtype=torch.int32, device=device)
    every = lens if lens is not None else torch.full_like(out[:, 0], n)
    candidates = int(every.sum(dtype=torch.int64))

    def check() -> None:
        some = checks.some(rows, device, most=8)
        ends = None if lens is None else lens[some]
        theirs = reference.topk_select(scores[some], k, None, ends)
        checks.exact("indices", out[some], theirs)

    others: dict[str, Callable[[], Call]] = {
        "FlashInfer": lambda: peers.flashinfer().topk(scores, k, lens),
        "torch.topk": lambda: lambda: torch.topk(scores, min(k, n)),
    }
    if k == peers.SglKernel.K:
        others = {"sgl_kernel": lambda: peers.sgl_kernel().topk(scores, every), **others}
    return Work(
        run=lambda: dsa_ext.topk_select(scores, k, None, lens, out=out),
        check=check,
        bytes=4.0 * candidates + 4.0 * rows * k,
        peers=others,
        reference=lambda: reference.topk_select(scores, k, None, lens),
    )


def prefill(s: int, n: int, quick: bool = False) -> Case:
    def make(device: torch.device) -> Work:
        x = Prefill.make(s, n, 64, device)
        return _select(dsa_ext.fp8_mqa_logits(*x.args), x.ends, K)

    return Case("topk_select", f"s{s} n{n}", make, quick=quick)


def decode(batch: int, next_n: int, n: int, quick: bool = False) -> Case:
    def make(device: torch.device) -> Work:
        x = Paged.make(batch, next_n, n, 64, device)
        scores = dsa_ext.fp8_paged_mqa_logits(
            x.q, x.cache, x.weights, x.lens, x.table, x.schedule(), n, clean_logits=True
        )
        return _select(scores, x.row_lens.flatten(), K)

    return Case("topk_select", f"decode b{batch} nn{next_n} n{n}", make, quick=quick)


def rows(count: int, n: int, k: int = K, quick: bool = False) -> Case:
    def make(device: torch.device) -> Work:
        return _select(torch.randn(count, n, device=device), None, k)

    return Case(
        "topk_select", f"rows{count} n{n}" + ("" if k == K else f" k{k}"), make, quick=quick
    )


def merge(count: int, shards: int, k: int = K) -> Case:
    """Merge the k best of `shards` key shards."""

    def make(device: torch.device) -> Work:
        scores = torch.randn(count, shards * k, device=device)
        indices = torch.arange(shards * k, dtype=torch.int32, device=device).repeat(count, 1)
        out = torch.empty(count, k, dtype=torch.int32, device=device)

        def check() -> None:
            some = checks.some(count, device)
            theirs = reference.merge_topk(scores[some], indices[some], k)
            checks.exact("indices", out[some], theirs)

        return Work(
            run=lambda: dsa_ext.merge_topk(scores, indices, k, out=out),
            check=check,
            bytes=8.0 * scores.numel() + 4.0 * out.numel(),
            reference=lambda: reference.merge_topk(scores, indices, k),
        )

    return Case("merge_topk", f"rows{count} shards{shards} k{k}", make)


_ROW_SHAPES = (
    (4096, 8192),
    (4096, 32768),
    (4096, 131072),
    (1024, 131072),
    (1, 8192),
    (1, 131072),
    (8, 32768),
    (32, 32768),
    (128, 32768),
    (32, 131072),
    (256, 32768),
)


def cuda_cases() -> Iterator[Case]:
    for s, n in PREFILL_SHAPES:
        yield prefill(s, n, quick=n == 32768)
    for batch, next_n, n in PAGED_SHAPES:
        yield decode(batch, next_n, n, quick=batch == 128 and next_n == 1)
    for count, n in _ROW_SHAPES:
        yield rows(count, n)
    yield rows(1, 1 << 20)
    yield merge(1024, 8)


def cpu_cases() -> Iterator[Case]:
    yield rows(64, 131072, quick=True)
    yield merge(64, 4, k=512)

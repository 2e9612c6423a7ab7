# SPDX-License-Identifier: Apache-2.0
"""Exact top-k of prefill logits (causal windows), of paged logits and of plain rows.

Rows are random but where the name says otherwise: `equal` (one score everywhere), `narrow` (eight
neighbouring scores), `zeros` (nine of ten are 0, the rest random). Such rows are measured beside
random ones, results as slots beside results as columns, and other k beside k = 2048.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import dsa_ext
from benchmarks import checks, inputs, peers
from benchmarks.case import Bar, Call, Case, Work
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


def _times_sgl(least: float | None) -> tuple[Bar, ...]:
    return () if least is None else (Bar("sgl_kernel", least),)


def prefill(s: int, n: int, least: float | None = None, quick: bool = False) -> Case:
    def make(device: torch.device) -> Work:
        x = Prefill.make(s, n, 64, device)
        return _select(dsa_ext.fp8_mqa_logits(*x.args), x.ends, K)

    return Case("topk_select", f"s{s} n{n}", make, _times_sgl(least), quick)


def decode(
    batch: int, next_n: int, n: int, least: float | None = None, quick: bool = False
) -> Case:
    def make(device: torch.device) -> Work:
        x = Paged.make(batch, next_n, n, 64, device)
        scores = dsa_ext.fp8_paged_mqa_logits(
            x.q, x.cache, x.weights, x.lens, x.table, x.schedule(), n, clean_logits=True
        )
        return _select(scores, x.row_lens.flatten(), K)

    name = f"decode b{batch} nn{next_n} n{n}"
    return Case("topk_select", name, make, _times_sgl(least), quick)


def rows(count: int, n: int, k: int = K, bars: tuple[Bar, ...] = (), quick: bool = False) -> Case:
    def make(device: torch.device) -> Work:
        scores = torch.randn(count, n, device=device)
        work = _select(scores, None, k)
        if k != K:
            work.peers[f"k{K}"] = lambda: lambda: dsa_ext.topk_select(scores, K)
        return work

    name = f"rows{count} n{n}" + ("" if k == K else f" k{k}")
    return Case("topk_select", name, make, bars, quick)


def _equal(scores: Tensor) -> Tensor:
    return torch.full_like(scores, 0.25)


def _narrow(scores: Tensor) -> Tensor:
    return 1.0 + scores.abs().mul(3).floor().clamp(max=7) * 2.0**-23


def _mostly_zeros(scores: Tensor) -> Tensor:
    return torch.where(torch.rand_like(scores) < 0.9, 0.0, scores)


HOSTILE: dict[str, Callable[[Tensor], Tensor]] = {
    "equal": _equal,
    "narrow": _narrow,
    "zeros": _mostly_zeros,
}


def hostile(kind: str, count: int, n: int) -> Case:
    """Rows that many selections are slow on, beside random ones."""

    def make(device: torch.device) -> Work:
        random = torch.randn(count, n, device=device)
        work = _select(HOSTILE[kind](random), None, K)
        work.peers["random rows"] = lambda: lambda: dsa_ext.topk_select(random, K)
        return work

    return Case("topk_select", f"rows{count} n{n} {kind}", make, (Bar("random rows", 0.5),))


def slots(count: int, n: int, least: float) -> Case:
    """Results as slots of a cache with pages of 64 tokens, beside columns."""

    def make(device: torch.device) -> Work:
        scores = torch.randn(count, n, device=device)
        page = inputs.PAGE
        table = torch.randperm(n // page, dtype=torch.int32, device=device).repeat(count, 1)
        out = torch.empty(count, K, dtype=torch.int32, device=device)

        def check() -> None:
            some = checks.some(count, device, most=8)
            theirs = reference.topk_select(scores[some], K, block_table=table[some], page_size=page)
            checks.exact("slots", out[some], theirs)

        return Work(
            run=lambda: dsa_ext.topk_select(scores, K, block_table=table, page_size=page, out=out),
            check=check,
            bytes=4.0 * scores.numel() + 4.0 * out.numel(),
            peers={"columns": lambda: lambda: dsa_ext.topk_select(scores, K)},
        )

    return Case("topk_select", f"rows{count} n{n} slots", make, (Bar("columns", least),))


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


_PREFILL_BARS = {
    (4096, 8192): 1.2,
    (4096, 32768): 1.3,
    (4096, 131072): 1.8,
    (1024, 131072): 1.7,
}
_DECODE_BARS = {(1, 8192): 1.2, (1, 131072): 2.5}
_ROW_BARS = {
    (4096, 8192): 1.2,
    (4096, 32768): 1.3,
    (4096, 131072): 1.8,
    (1024, 131072): 1.7,
    (1, 8192): 1.2,
    (1, 131072): 2.5,
    (8, 32768): None,
    (32, 32768): None,
    (128, 32768): 1.2,
    (32, 131072): 1.8,
    (256, 32768): None,
}


def cuda_cases() -> Iterator[Case]:
    for s, n in PREFILL_SHAPES:
        yield prefill(s, n, _PREFILL_BARS.get((s, n)), quick=n == 32768)
    for batch, next_n, n in PAGED_SHAPES:
        least = _DECODE_BARS.get((batch, n)) if next_n == 1 else None
        yield decode(batch, next_n, n, least, quick=batch == 128 and next_n == 1)
    for (count, n), least in _ROW_BARS.items():
        yield rows(count, n, bars=_times_sgl(least))
    yield rows(1, 1 << 20)
    for count, n in ((4096, 8192), (4096, 32768), (32, 131072)):
        for k in (512, 1024):
            yield rows(count, n, k, (Bar(f"k{K}", 1.0),))
    for kind in HOSTILE:
        for count, n in ((4096, 8192), (4096, 32768), (1, 131072)):
            yield hostile(kind, count, n)
    yield slots(4096, 8192, 0.95)
    yield slots(4096, 32768, 0.95)
    yield slots(1, 131072, 0.91)  # 1 us more
    yield merge(1024, 8)


def cpu_cases() -> Iterator[Case]:
    yield rows(64, 131072, quick=True)
    yield merge(64, 4, k=512)

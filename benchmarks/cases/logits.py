# SPDX-License-Identifier: Apache-2.0
"""The indexer: prefill and paged logits, and the same straight to the top-k.

Prefill queries are the last `s` rows of a causal sequence of `n` keys, or, packed, of as many equal
sequences as the name says, one after another; a paged request has `n` keys and `nn` query tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import dsa_ext
from benchmarks import checks, inputs, peers
from benchmarks.case import Bar, Call, Case, Work
from dsa_ext import _C, reference

D = inputs.INDEX_DIM
_KEY_BYTES = D + _C.INDEXER_SCALE_BYTES
_LOGIT_BYTES = 4


@dataclass
class Prefill:
    """Arguments of fp8_mqa_logits."""

    q: Tensor
    kv: tuple[Tensor, Tensor]
    weights: Tensor
    starts: Tensor
    ends: Tensor

    @staticmethod
    def make(s: int, n: int, heads: int, device: torch.device, requests: int = 1) -> Prefill:
        row = torch.arange(s, dtype=torch.int32, device=device)
        own_s, own_n = s // requests, n // requests
        starts = row // own_s * own_n
        return Prefill(
            q=inputs.fp8(s, heads, D, device=device),
            kv=(inputs.fp8(n, D, device=device), inputs.scales(n, device=device)),
            weights=torch.randn(s, heads, device=device),
            starts=starts,
            ends=starts + own_n - own_s + 1 + row % own_s,
        )

    @property
    def args(self) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor, Tensor, Tensor]:
        return self.q, self.kv, self.weights, self.starts, self.ends

    @property
    def pairs(self) -> int:
        return int((self.ends - self.starts).sum(dtype=torch.int64))

    @property
    def flop(self) -> float:
        return 2.0 * self.pairs * self.q.shape[1] * D

    @property
    def input_bytes(self) -> float:
        return self.q.numel() + 4.0 * self.weights.numel() + _KEY_BYTES * self.kv[0].shape[0]

    def expected(self, rows: Tensor) -> Tensor:
        """The reference's logits of some rows."""
        return reference.fp8_mqa_logits(
            checks.take(self.q, rows),
            self.kv,
            self.weights[rows],
            self.starts[rows],
            self.ends[rows],
        )


@dataclass
class Paged:
    """Arguments of fp8_paged_mqa_logits."""

    q: Tensor
    cache: Tensor
    weights: Tensor
    lens: Tensor
    table: Tensor
    n: int

    @staticmethod
    def make(batch: int, next_n: int, n: int, heads: int, device: torch.device) -> Paged:
        table = inputs.page_table(batch, n, device)
        return Paged(
            q=inputs.fp8(batch, next_n, heads, D, device=device),
            cache=inputs.indexer_cache(table.numel(), device),
            weights=torch.randn(batch * next_n, heads, device=device),
            lens=torch.full((batch,), n, dtype=torch.int32, device=device),
            table=table,
            n=n,
        )

    def schedule(self) -> Tensor:
        sms = dsa_ext.get_num_sms() if self.q.is_cuda else 8
        return dsa_ext.get_paged_mqa_logits_metadata(self.lens, inputs.PAGE, sms)

    @property
    def row_lens(self) -> Tensor:
        """int32 [batch, next_n]: what each query token sees."""
        next_n = self.q.shape[1]
        lane = torch.arange(next_n, dtype=torch.int32, device=self.q.device)
        return self.lens.unsqueeze(-1) - next_n + 1 + lane

    @property
    def pairs(self) -> int:
        return int(self.row_lens.sum(dtype=torch.int64))

    @property
    def flop(self) -> float:
        return 2.0 * self.pairs * self.q.shape[2] * D

    @property
    def input_bytes(self) -> float:
        keys = self.lens.shape[0] * self.n
        return self.q.numel() + 4.0 * self.weights.numel() + _KEY_BYTES * keys

    def expected(self, requests: Tensor) -> tuple[Tensor, Tensor]:
        """Row numbers of some requests, and the reference's logits of them."""
        next_n = self.q.shape[1]
        lane = torch.arange(next_n, device=self.q.device)
        rows = (requests.unsqueeze(-1) * next_n + lane).flatten()
        logits = reference.fp8_paged_mqa_logits(
            checks.take(self.q, requests),
            self.cache,
            self.weights[rows],
            self.lens[requests],
            self.table[requests],
            None,
            self.n,
        )
        return rows, logits


def prefill_logits(
    s: int,
    n: int,
    heads: int,
    clean: bool = False,
    bars: tuple[Bar, ...] = (),
    quick: bool = False,
    requests: int = 1,
) -> Case:
    def make(device: torch.device) -> Work:
        x = Prefill.make(s, n, heads, device, requests)
        out = torch.empty(s, n, device=device)

        def check() -> None:
            rows = checks.some(s, device)
            theirs = x.expected(rows)
            ours = out[rows]
            if not clean:
                column = torch.arange(n, device=device)
                first, last = x.starts[rows].unsqueeze(-1), x.ends[rows].unsqueeze(-1)
                ours = ours.masked_fill((column < first) | (column >= last), -torch.inf)
            checks.close("logits", ours, theirs, checks.LOGITS)

        return Work(
            run=lambda: dsa_ext.fp8_mqa_logits(*x.args, clean, out=out),
            check=check,
            flop=x.flop,
            bytes=x.input_bytes + _LOGIT_BYTES * (s * n if clean else x.pairs),
            product="fp8",
            peers={"DeepGEMM": lambda: peers.deep_gemm().mqa_logits(*x.args, clean)},
            reference=lambda: reference.fp8_mqa_logits(*x.args),
        )

    name = f"h{heads} s{s} n{n}" + (f" packed{requests}" if requests > 1 else "")
    name += " clean" if clean else ""
    return Case("fp8_mqa_logits", name, make, bars, quick)


def paged_logits(
    batch: int,
    next_n: int,
    n: int,
    heads: int,
    bars: tuple[Bar, ...] = (),
    quick: bool = False,
) -> Case:
    def make(device: torch.device) -> Work:
        x = Paged.make(batch, next_n, n, heads, device)
        out = torch.empty(batch * next_n, n, device=device)
        schedule = x.schedule()

        def check() -> None:
            rows, theirs = x.expected(checks.some(batch, device, most=2))
            column = torch.arange(n, device=device)
            hidden = column >= x.row_lens.flatten()[rows].unsqueeze(-1)
            checks.close("logits", out[rows].masked_fill(hidden, -torch.inf), theirs, checks.LOGITS)

        return Work(
            run=lambda: dsa_ext.fp8_paged_mqa_logits(
                x.q, x.cache, x.weights, x.lens, x.table, schedule, n, out=out
            ),
            check=check,
            flop=x.flop,
            bytes=x.input_bytes + _LOGIT_BYTES * x.pairs,
            product="fp8",
            peers={
                "DeepGEMM": lambda: peers.deep_gemm().paged_mqa_logits(
                    x.q, x.cache, x.weights, x.row_lens, x.table, n
                )
            },
            reference=lambda: reference.fp8_paged_mqa_logits(
                x.q, x.cache, x.weights, x.lens, x.table, None, n
            ),
        )

    return Case("fp8_paged_mqa_logits", f"h{heads} b{batch} nn{next_n} n{n}", make, bars, quick)


def _logits_then_topk(
    prepare: Callable[[], Callable[[], Tensor]], lens: Tensor
) -> Callable[[], Call]:
    """DeepGEMM's logits, then sgl_kernel's top-k of them."""

    def prepared() -> Call:
        logits, select = prepare(), peers.sgl_kernel()
        return lambda: select.topk(logits(), lens)()

    return prepared


def prefill_topk(s: int, n: int, heads: int, k: int = 2048) -> Case:
    def make(device: torch.device) -> Work:
        x = Prefill.make(s, n, heads, device)
        out = torch.empty(s, k, dtype=torch.int32, device=device)

        def check() -> None:
            rows = checks.some(s, device)
            checks.selection(out[rows], x.expected(rows), k)

        return Work(
            run=lambda: dsa_ext.fp8_mqa_topk(*x.args, k, out=out),
            check=check,
            flop=x.flop,
            bytes=x.input_bytes + 4.0 * out.numel(),
            product="fp8",
            peers={
                "DeepGEMM + sgl_kernel": _logits_then_topk(
                    lambda: peers.deep_gemm().mqa_logits(*x.args, False), x.ends
                )
            },
            reference=lambda: reference.fp8_mqa_topk(*x.args, k),
        )

    return Case("fp8_mqa_topk", f"h{heads} s{s} n{n} k{k}", make)


def paged_topk(batch: int, next_n: int, n: int, heads: int, k: int = 2048) -> Case:
    def make(device: torch.device) -> Work:
        x = Paged.make(batch, next_n, n, heads, device)
        out = torch.empty(batch * next_n, k, dtype=torch.int32, device=device)
        schedule = x.schedule()

        def check() -> None:
            rows, theirs = x.expected(checks.some(batch, device, most=2))
            checks.selection(out[rows], theirs, k)

        return Work(
            run=lambda: dsa_ext.fp8_paged_mqa_topk(
                x.q, x.cache, x.weights, x.lens, x.table, schedule, n, k, out=out
            ),
            check=check,
            flop=x.flop,
            bytes=x.input_bytes + 4.0 * out.numel(),
            product="fp8",
            peers={
                "DeepGEMM + sgl_kernel": _logits_then_topk(
                    lambda: peers.deep_gemm().paged_mqa_logits(
                        x.q, x.cache, x.weights, x.row_lens, x.table, n
                    ),
                    x.row_lens.flatten(),
                )
            },
            reference=lambda: reference.fp8_paged_mqa_topk(
                x.q, x.cache, x.weights, x.lens, x.table, None, n, k
            ),
        )

    return Case("fp8_paged_mqa_topk", f"h{heads} b{batch} nn{next_n} n{n} k{k}", make)


PREFILL_SHAPES = ((4096, 8192), (4096, 32768), (4096, 131072), (1024, 131072))
PREFILL_BARS = {64: 1.1, 32: 1.15}
PAGED_BARS = {  # (batch, next_n, n): how many times as fast as DeepGEMM
    (1, 1, 8192): 1.2,
    (1, 1, 131072): 1.2,
    (8, 1, 32768): 1.0,
    (32, 1, 32768): 1.0,
    (128, 1, 32768): 1.05,
    (32, 1, 131072): 1.05,
    (32, 2, 32768): 1.05,
    (128, 2, 32768): 1.05,
}
PAGED_SHAPES = tuple(PAGED_BARS)


def _times_deep_gemm(least: float) -> tuple[Bar, ...]:
    return (Bar("DeepGEMM", least),)


def cuda_cases() -> Iterator[Case]:
    for heads, least in PREFILL_BARS.items():
        for s, n in PREFILL_SHAPES:
            for clean in (False, True):
                quick = n == 32768 and heads == 64 and not clean
                yield prefill_logits(s, n, heads, clean, _times_deep_gemm(least), quick)
    yield prefill_logits(16, 131072, 64, bars=_times_deep_gemm(3.0))
    for (batch, next_n, n), least in PAGED_BARS.items():
        quick = batch == 128 and next_n == 1
        yield paged_logits(batch, next_n, n, 64, _times_deep_gemm(least), quick)
    yield paged_logits(128, 4, 32768, 64)
    yield paged_logits(128, 1, 32768, 32, _times_deep_gemm(1.0))
    yield prefill_topk(4096, 32768, 64)
    yield prefill_topk(4096, 131072, 64)
    yield paged_topk(1, 1, 131072, 64)
    yield paged_topk(128, 1, 32768, 64)


def cpu_cases() -> Iterator[Case]:
    yield prefill_logits(256, 4096, 64, clean=True, quick=True)
    yield paged_logits(4, 2, 2048, 64)
    yield prefill_topk(64, 4096, 64, k=512)
    yield paged_topk(4, 1, 2048, 64, k=512)

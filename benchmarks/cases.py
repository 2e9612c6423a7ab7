# SPDX-License-Identifier: Apache-2.0
"""The measured cases: inputs, our op, the peer, what is compared and how much work it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import dsa_ext
from dsa_ext import reference

E4M3 = torch.float8_e4m3fn


@dataclass
class Case:
    """One shape of one op. `ours` and `peer` return the tensor that is compared."""

    op: str
    shape: str
    flop: float
    ours: Callable[[], Tensor]
    peer: Callable[[], Tensor]
    exact: bool = False


def mqa_logits(s: int = 256, n: int = 4096, heads: int = 64, dim: int = 128) -> Case:
    q = torch.randn(s, heads, dim).to(E4M3)
    kv = (torch.randn(n, dim).to(E4M3), torch.rand(n) + 0.5)
    weights = torch.randn(s, heads)
    starts = torch.zeros(s, dtype=torch.int32)
    ends = torch.full((s,), n, dtype=torch.int32)
    args = (q, kv, weights, starts, ends)
    return Case(
        "fp8_mqa_logits",
        f"S={s} L={n} H={heads} D={dim}",
        2.0 * s * n * heads * dim,
        lambda: dsa_ext.fp8_mqa_logits(*args),
        lambda: reference.fp8_mqa_logits(*args),
    )


def topk_select(rows: int = 64, n: int = 131072, k: int = 2048) -> Case:
    scores = torch.randn(rows, n)
    return Case(
        "topk_select",
        f"rows={rows} N={n} k={k}",
        0.0,
        lambda: dsa_ext.topk_select(scores, k),
        lambda: reference.topk_select(scores, k),
        exact=True,
    )


def sparse_fwd(s_q: int = 64, heads: int = 128, k: int = 2048, s_kv: int = 32768) -> Case:
    d_qk, d_v = 576, 512
    q = torch.randn(s_q, heads, d_qk, dtype=torch.bfloat16)
    kv = torch.randn(s_kv, 1, d_qk, dtype=torch.bfloat16)
    indices = torch.stack([torch.randperm(s_kv)[:k] for _ in range(s_q)]).int()[:, None]
    args = (q, kv, indices, d_qk**-0.5)
    return Case(
        "flash_mla_sparse_fwd",
        f"s_q={s_q} h={heads} topk={k} d={d_qk} s_kv={s_kv}",
        2.0 * s_q * heads * k * (d_qk + d_v),
        lambda: dsa_ext.flash_mla_sparse_fwd(*args)[0],
        lambda: reference.flash_mla_sparse_fwd(*args)[0],
    )


def all_cases() -> Iterator[Case]:
    """Yield the cases one by one, so that only one's inputs are alive."""
    for make in (mqa_logits, topk_select, sparse_fwd):
        torch.manual_seed(0)
        yield make()

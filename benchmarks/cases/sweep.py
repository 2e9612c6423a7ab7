# SPDX-License-Identifier: Apache-2.0
"""A grid of the indexer logits' shapes that DeepGEMM takes too; none is to be slower than there."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from benchmarks.case import Bar, Case
from benchmarks.cases.logits import paged_logits, prefill_logits

PEER = "DeepGEMM"
_BARS = (Bar(PEER, 1.0),)
_HEADS = (32, 64)

_QUERIES = (1, 7, 64, 256, 1024, 4096)
_KEYS = (1024, 4096, 16384, 65536)
_CLEAN = ((64, 4096), (1024, 16384), (4096, 65536))
_PACKED = ((256, 16384, 8), (4096, 16384, 4), (4096, 65536, 16))

_BATCHES = (1, 4, 16, 64, 256)
_NEXT_N = (1, 2)
_CONTEXTS = (1024, 8192, 65536)


def _prefill(heads: int) -> Iterator[Case]:
    for n, s in product(_KEYS, _QUERIES):
        if s <= n:
            yield prefill_logits(s, n, heads, bars=_BARS)
    for s, n in _CLEAN:
        yield prefill_logits(s, n, heads, clean=True, bars=_BARS)
    for s, n, requests in _PACKED:
        yield prefill_logits(s, n, heads, bars=_BARS, requests=requests)


def cuda_cases() -> Iterator[Case]:
    for heads in _HEADS:
        yield from _prefill(heads)
    for heads, next_n, batch, n in product(_HEADS, _NEXT_N, _BATCHES, _CONTEXTS):
        yield paged_logits(batch, next_n, n, heads, _BARS)

# SPDX-License-Identifier: Apache-2.0
"""Times of one call with cold caches.

On a GPU a buffer of many times the L2 cache is read before each call: what the call needs is gone
from L2, and what stands there instead is clean, so that the call does not pay for writing back
lines that are not its own. The read also keeps the GPU busy for longer than the host needs to
enqueue the call, so that two CUDA events around the call hold kernels only, without launch latency:
what a CUDA-graph replay would show, for peers that cannot be captured too.
"""

from __future__ import annotations

import functools
import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.case import Call

_FLUSH_BYTES = 2 << 30
_FLUSH_S = 1e-3
_BUDGET_S = 0.15
_LONG_S = 0.5
_REPEATS = (7, 40)


@dataclass(frozen=True)
class Timing:
    """Median, and the distance from the 10th to the 90th percentile."""

    us: float
    spread_us: float

    @staticmethod
    def of(samples_us: list[float]) -> Timing:
        ordered = sorted(samples_us)
        last = len(ordered) - 1
        spread = ordered[round(0.9 * last)] - ordered[round(0.1 * last)]
        return Timing(statistics.median(ordered), spread)


@functools.cache
def _flush_buffers() -> tuple[Tensor, Tensor]:
    """What a flush reads, and where it puts the sum."""
    free, _ = torch.cuda.mem_get_info()
    count = min(_FLUSH_BYTES, free // 8) // 4
    return torch.zeros(count, device="cuda"), torch.empty((), device="cuda")


def _flush() -> None:
    source, total = _flush_buffers()
    torch.sum(source, dim=0, out=total)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _cuda_samples(call: Call, repeats: int) -> list[float]:
    events = []
    for _ in range(repeats):
        begin, end = _event(), _event()
        _flush()
        begin.record()
        call()
        end.record()
        events.append((begin, end))
    torch.cuda.synchronize()
    return [1e3 * begin.elapsed_time(end) for begin, end in events]


def _cpu_samples(call: Call, repeats: int) -> list[float]:
    samples = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        samples.append(1e6 * (time.perf_counter() - begin))
    return samples


def measure(call: Call, device: torch.device) -> Timing:
    """Time `call` after a warm-up, as often as the budget of a case allows."""
    samples = _cuda_samples if device.type == "cuda" else _cpu_samples
    samples(call, 1)
    probe = samples(call, 1)
    estimate = 1e-6 * probe[0]
    if estimate > _LONG_S:
        return Timing.of(probe)
    fewest, most = _REPEATS
    repeats = int(_BUDGET_S / (estimate + _FLUSH_S))
    return Timing.of(samples(call, min(most, max(fewest, repeats))))

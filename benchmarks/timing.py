# SPDX-License-Identifier: Apache-2.0
"""Times of calls with cold caches.

The calls of a case take turns on a GPU: ours, its stages, each peer, and again from the start. Near
its power limit a GPU lowers its clock after about 100 ms of load, so that of calls measured one
after another the later ones would look slower; in turns all meet the same clocks. On the CPU calls
are measured one after another, with the caches as the call itself leaves them.

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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.case import Call

_FLUSH_BYTES = 2 << 30
_FLUSH_S = 1e-3
_BUDGET_S = 0.15  # of one call; the calls of a case share theirs
_LONG_S = 0.5
_REPEATS = (7, 40)

_Read = Callable[[], float]
"""Waits for a sample; its microseconds."""


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


def _cuda_sample(call: Call) -> _Read:
    """Enqueue a flush and a timed call; nothing waits for them before the time is read."""
    begin, end = _event(), _event()
    _flush()
    begin.record()
    call()
    end.record()

    def read() -> float:
        end.synchronize()
        return 1e3 * float(begin.elapsed_time(end))

    return read


def _cpu_sample(call: Call) -> _Read:
    begin = time.perf_counter()
    call()
    us = 1e6 * (time.perf_counter() - begin)
    return lambda: us


@dataclass
class _Player:
    """A call, the samples of its turns, and what ended them."""

    call: Call
    sample: Callable[[Call], _Read]
    probe_us: float = 0.0
    reads: list[_Read] = field(default_factory=list)
    error: Exception | None = None

    def warm_up(self) -> None:
        try:
            self.sample(self.call)()
            self.probe_us = self.sample(self.call)()
        except Exception as error:
            self.error = error.with_traceback(None)  # a traceback keeps tensors alive

    def turn(self) -> None:
        try:
            self.reads.append(self.sample(self.call))
        except Exception as error:
            self.error = error.with_traceback(None)

    @property
    def plays(self) -> bool:
        return self.error is None and self.probe_us <= 1e6 * _LONG_S

    @property
    def outcome(self) -> Timing | Exception:
        return self.error or Timing.of([read() for read in self.reads] or [self.probe_us])


def _turns(players: Sequence[_Player]) -> int:
    """As many as the budgets of all players allow together."""
    seconds = sum(1e-6 * player.probe_us + _FLUSH_S for player in players)
    fewest, most = _REPEATS
    return min(most, max(fewest, int(len(players) * _BUDGET_S / seconds))) if players else 0


def _play(players: Sequence[_Player]) -> None:
    for player in players:
        player.warm_up()
    for _ in range(_turns([player for player in players if player.plays])):
        for player in players:
            if player.plays:
                player.turn()


def measure_all(calls: Sequence[Call], device: torch.device) -> list[Timing | Exception]:
    """Time `calls`, each after a warm-up, or say what one of them raised; the others go on."""
    if device.type == "cuda":
        players = [_Player(call, _cuda_sample) for call in calls]
        _play(players)
    else:
        players = [_Player(call, _cpu_sample) for call in calls]
        for player in players:
            _play([player])
    return [player.outcome for player in players]


def timing_of(outcome: Timing | Exception) -> Timing:
    """The timing, or raise what stands in its place."""
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def measure(call: Call, device: torch.device) -> Timing:
    """Time one call alone."""
    return timing_of(measure_all([call], device)[0])

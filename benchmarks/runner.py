# SPDX-License-Identifier: Apache-2.0
"""Runs one case: our call, its check, then its time and its peers'."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from benchmarks.case import Call, Case, Work
from benchmarks.checks import WrongResult
from benchmarks.peers import Unavailable, one_line
from benchmarks.roofs import Roofs
from benchmarks.timing import Timing, measure_all, timing_of

_KERNEL_LINE = re.compile(r"^dsa_ext: \S+ -> (\S+)$", re.MULTILINE)


@dataclass
class PeerRow:
    """A peer's time and how much longer it takes than we do, or why there is none."""

    us: float | None = None
    spread_us: float | None = None
    ratio: float | None = None
    note: str | None = None


@dataclass
class BarRow:
    """A target and what was reached of it (None: not measured)."""

    against: str
    least: float
    reached: float | None

    @property
    def met(self) -> bool | None:
        return None if self.reached is None else self.reached >= self.least


@dataclass
class Row:
    """One line of the table. status: "ok", "FAILED: ..." or "skipped: ..."."""

    op: str
    case: str
    status: str = "ok"
    kernel: str = ""
    us: float | None = None
    spread_us: float | None = None
    tflops: float | None = None
    gbps: float | None = None
    roof_share: float | None = None
    peers: dict[str, PeerRow] = field(default_factory=dict)
    stages_us: dict[str, float] = field(default_factory=dict)
    bars: list[BarRow] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        return self.status.startswith("FAILED")


def kernels_used(call: Call) -> str:
    """Run `call` once and return the ids of the kernels that it dispatched to (DSA_LOG)."""
    before = os.environ.get("DSA_LOG")
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), 2)
        os.environ["DSA_LOG"] = "1"
        try:
            call()
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            if before is None:
                del os.environ["DSA_LOG"]
            else:
                os.environ["DSA_LOG"] = before
        log.seek(0)
        ids = _KERNEL_LINE.findall(log.read().decode(errors="replace"))
    return " + ".join(dict.fromkeys(ids))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _prepared(prepare: Callable[[], Call]) -> Call | Exception:
    try:
        return prepare()
    except Exception as error:
        return error.with_traceback(None)


def _prepare_peers(work: Work, device: torch.device) -> dict[str, Call | Exception]:
    """Each peer's call, or why there is none."""
    if device.type == "cuda":
        return {name: _prepared(prepare) for name, prepare in work.peers.items()}
    return {} if work.reference is None else {"reference": work.reference}


def _note(error: Exception) -> str:
    if isinstance(error, Unavailable):
        return str(error)
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of memory"
    return f"error: {one_line(error)}"


def _peer_row(outcome: Timing | Exception, ours_us: float) -> PeerRow:
    if isinstance(outcome, Exception):
        return PeerRow(note=_note(outcome))
    return PeerRow(outcome.us, outcome.spread_us, outcome.us / ours_us)


def _time_into(row: Row, work: Work, device: torch.device) -> Timing:
    """Time our call, its stages and its peers; return ours."""
    peers = _prepare_peers(work, device)
    ready = [peer for peer in peers.values() if not isinstance(peer, Exception)]
    outcomes = iter(measure_all([work.run, *work.stages.values(), *ready], device))
    ours = timing_of(next(outcomes))
    row.us, row.spread_us = ours.us, ours.spread_us
    row.stages_us = {name: timing_of(next(outcomes)).us for name in work.stages}
    for name, peer in peers.items():
        row.peers[name] = _peer_row(
            peer if isinstance(peer, Exception) else next(outcomes), ours.us
        )
    return ours


def _measure_into(row: Row, case: Case, device: torch.device, roofs: Roofs | None) -> None:
    torch.manual_seed(0)
    work = case.make(device)
    row.kernel = kernels_used(work.run)
    _synchronize(device)
    work.check()
    timing = _time_into(row, work, device)
    if work.flop:
        row.tflops = work.flop / timing.us / 1e6
    if work.bytes:
        row.gbps = work.bytes / timing.us / 1e3
    if roofs and work.bytes:
        row.roof_share = roofs.share(work.flop, work.bytes, work.product, timing.us)
    for bar in case.bars if device.type == "cuda" else ():
        peer = row.peers.get(bar.against)
        reached = row.roof_share if bar.against == "roof" else peer.ratio if peer else None
        row.bars.append(BarRow(bar.against, bar.least, reached))


def run_case(case: Case, device: torch.device, roofs: Roofs | None) -> Row:
    """Run `case`; whatever goes wrong becomes the row's status."""
    row = Row(case.op, case.name)
    try:
        _measure_into(row, case, device, roofs)
    except torch.cuda.OutOfMemoryError:
        row.status = "skipped: out of memory"
    except WrongResult as error:
        row.status = f"FAILED: wrong result, {error}"
    except Exception as error:
        row.status = f"FAILED: {one_line(error)}"
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return row

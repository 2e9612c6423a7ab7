# SPDX-License-Identifier: Apache-2.0
"""Runs one case: our call, its check, its time, then each peer's."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from dataclasses import dataclass, field

import torch

from benchmarks.case import Call, Case, Work
from benchmarks.checks import WrongResult
from benchmarks.peers import Unavailable, one_line
from benchmarks.roofs import Roofs
from benchmarks.timing import Timing, measure

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


def _peer_row(prepared: Timing | str, ours_us: float) -> PeerRow:
    if isinstance(prepared, str):
        return PeerRow(note=prepared)
    return PeerRow(prepared.us, prepared.spread_us, prepared.us / ours_us)


def _time_peers(work: Work, device: torch.device, ours_us: float) -> dict[str, PeerRow]:
    calls = dict(work.peers) if device.type == "cuda" else {}
    if device.type == "cpu" and work.reference is not None:
        reference = work.reference
        calls["reference"] = lambda: reference
    rows = {}
    for name, prepare in calls.items():
        result: Timing | str
        try:
            result = measure(prepare(), device)
        except Unavailable as reason:
            result = str(reason)
        except torch.cuda.OutOfMemoryError:
            result = "out of memory"
        except Exception as error:
            result = f"error: {one_line(error)}"
        rows[name] = _peer_row(result, ours_us)
    return rows


def _measure_into(row: Row, case: Case, device: torch.device, roofs: Roofs | None) -> None:
    torch.manual_seed(0)
    work = case.make(device)
    row.kernel = kernels_used(work.run)
    _synchronize(device)
    work.check()
    timing = measure(work.run, device)
    row.us, row.spread_us = timing.us, timing.spread_us
    if work.flop:
        row.tflops = work.flop / timing.us / 1e6
    if work.bytes:
        row.gbps = work.bytes / timing.us / 1e3
    if roofs and work.bytes:
        row.roof_share = roofs.share(work.flop, work.bytes, work.product, timing.us)
    row.stages_us = {name: measure(stage, device).us for name, stage in work.stages.items()}
    row.peers = _time_peers(work, device, timing.us)
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

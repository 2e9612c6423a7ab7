# SPDX-License-Identifier: Apache-2.0
"""The printed table and the summaries below it."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.cases import endtoend
from benchmarks.runner import PeerRow, Row

_WORST = 10

HEADER = (
    f"{'op':26} {'case':36} {'kernel':32} {'us':>10} {'+-':>7} {'TFLOP/s':>8} {'GB/s':>7} "
    f"{'%roof':>6}  peers: us, and their time over ours"
)


def _number(value: float | None, width: int, digits: int = 0) -> str:
    return " " * width if value is None else f"{value:{width}.{digits}f}"


def _peer(name: str, peer: PeerRow) -> str:
    if peer.us is None:
        return f"{name}: {peer.note}"
    return f"{name} {peer.us:.1f} {peer.ratio:.2f}x"


def line(row: Row) -> str:
    """One row of the table."""
    head = f"{row.op:26} {row.case:36} "
    if row.us is None:
        return head + row.status
    share = None if row.roof_share is None else 100 * row.roof_share
    kernel = row.kernel if row.op != endtoend.OP else "all of the layer"
    notes = [_peer(name, peer) for name, peer in row.peers.items()]
    notes += [f"({name} {us:.1f})" for name, us in row.stages_us.items()]
    if row.failed:
        notes.append(row.status)
    return (
        f"{head}{kernel:32} {row.us:10.1f} {_number(row.spread_us, 7, 1)} "
        f"{_number(row.tflops, 8, 1)} {_number(row.gbps, 7)} {_number(share, 6, 1)}  "
        + "; ".join(notes)
    )


def bars(rows: Sequence[Row]) -> list[str]:
    """Every target with what was reached."""
    words = {True: "met", False: "MISSED", None: "not measured"}
    lines = []
    for row in rows:
        for bar in row.bars:
            reached = "" if bar.reached is None else f", reached {100 * bar.reached:.0f}%"
            lines.append(
                f"{words[bar.met]:12} {row.op} {row.case}: "
                f"{100 * bar.least:.0f}% of {bar.against}{reached}"
            )
    return lines


def against_peer(rows: Sequence[Row], name: str) -> list[str]:
    """How many shapes are slower than a peer, then the worst ratios."""
    measured = [
        (peer.ratio, row, peer)
        for row in rows
        if (peer := row.peers.get(name)) and peer.ratio is not None
    ]
    measured.sort(key=lambda entry: entry[0])
    below = sum(ratio < 1 for ratio, _, _ in measured)
    head = (
        f"{below} of {len(measured)} measured shapes below 1.0x {name}, "
        f"{len(rows) - len(measured)} not measured; the worst:"
    )
    return [head] + [
        f"{ratio:.3f}x  {row.op} {row.case}: {row.us:.1f} us, {name} {peer.us:.1f} us"
        for ratio, row, peer in measured[:_WORST]
    ]


def sparse_against_dense(rows: Sequence[Row]) -> list[str]:
    """For each end-to-end row, whether the layer beats the best dense attention measured."""
    lines = []
    for row in rows:
        dense = [(peer.us, name) for name, peer in row.peers.items() if peer.us is not None]
        if row.op != endtoend.OP or row.us is None or not dense:
            continue
        us, name = min(dense)
        verdict = "sparse beats dense" if us > row.us else "dense beats sparse"
        lines.append(f"{row.case:36} {verdict}: {row.us:.0f} us, {name} {us:.0f} us")
    return lines

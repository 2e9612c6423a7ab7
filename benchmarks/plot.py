# SPDX-License-Identifier: Apache-2.0
"""A bar for each peer of each case: the peer's time over ours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.runner import Row

_ROW_INCHES = 0.2


def save(rows: Sequence[Row], title: str, path: Path) -> None:
    """Draw the measured ratios; needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars = [
        (f"{row.op} {row.case}", name, peer.ratio)
        for row in rows
        for name, peer in row.peers.items()
        if peer.ratio is not None
    ]
    if not bars:
        print(f"{path}: not drawn, no peer was measured")
        return
    figure, axes = pyplot.subplots(
        figsize=(12, 1.5 + _ROW_INCHES * len(bars)), layout="constrained"
    )
    positions = range(len(bars))
    for name in dict.fromkeys(name for _, name, _ in bars):
        own = [
            (y, ratio) for y, (_, peer, ratio) in zip(positions, bars, strict=True) if peer == name
        ]
        axes.barh([y for y, _ in own], [ratio for _, ratio in own], label=name)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_yticks(list(positions), [case for case, _, _ in bars], fontsize=7)
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.set_xlabel("peer's time over ours (right of 1: dsa_ext is faster)")
    axes.set_title(title)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)

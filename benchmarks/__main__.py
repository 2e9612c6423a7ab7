# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks``: each op on the CPU beside the plain-PyTorch reference, in one run.

Every case is checked for correctness before it is timed. `--json FILE` also writes the rows.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import dsa_ext
from benchmarks.cases import Case, all_cases


def timed_ms(fn: Callable[[], Tensor], repeats: int) -> tuple[float, float]:
    """Median and spread (max - min) of `repeats` calls after one warm-up, in ms."""
    fn()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        fn()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times), max(times) - min(times)


def difference(case: Case) -> float:
    """1 - 2<x, y> / (<x, x> + <y, y>) of ours and the reference; must be tiny (0 if exact)."""
    x, y = case.ours().double(), case.peer().double()
    if case.exact:
        return 0.0 if torch.equal(x, y) else 1.0
    return float(1 - 2 * (x * y).sum() / ((x * x).sum() + (y * y).sum()))


def run(case: Case, repeats: int) -> dict[str, object]:
    diff = difference(case)
    if not diff < 7e-6:
        raise SystemExit(f"{case.op} {case.shape}: wrong result, d = {diff:.1e}")
    ours, spread = timed_ms(case.ours, repeats)
    peer, peer_spread = timed_ms(case.peer, repeats)
    return {
        "op": case.op,
        "shape": case.shape,
        "ms": ours,
        "spread_ms": spread,
        "gflops": case.flop / ours / 1e6,
        "reference_ms": peer,
        "reference_spread_ms": peer_spread,
        "speedup": peer / ours,
        "d": diff,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args()

    info = dsa_ext.build_info()
    print(
        f"dsa_ext {dsa_ext.__version__}, torch {torch.__version__}, {platform.machine()} "
        f"{info['cpu_isa']} kernels, {torch.get_num_threads()} threads; median of {args.repeats}"
    )
    print(f"{'op':22} {'shape':46} {'ms':>9} {'+-':>6} {'GFLOP/s':>8} {'reference':>10} ratio")
    rows = []
    for case in all_cases():
        row = run(case, args.repeats)
        rows.append(row)
        gflops = f"{row['gflops']:8.0f}" if case.flop else f"{'':8}"
        print(
            f"{case.op:22} {case.shape:46} {row['ms']:9.1f} {row['spread_ms']:6.1f} {gflops} "
            f"{row['reference_ms']:7.1f} ms {row['speedup']:5.1f}x"
        )
    if args.json:
        args.json.write_text(json.dumps({"build": info, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of dsa_ext, each case checked against the reference in the same run.

    python -m benchmarks                      every case on this machine's device
    python -m benchmarks --list               their names
    python -m benchmarks --filter 'paged.*b128'  cases whose "op case" matches
    python -m benchmarks --quick              a few of each family
    python -m benchmarks --sweep              instead, a grid of shapes against DeepGEMM
    python -m benchmarks --json out.json --plot out.png

On a GPU, a row holds the median time of a call with a cold L2 cache and its spread (10th to 90th
percentile), FLOP and bytes a second, the share of the binding roof (matrix-product peak or copy
bandwidth, both measured at the start), and the time of each installed peer over ours. Bytes count
each needed input byte and each output byte once. Peers, all optional: FlashMLA, DeepGEMM,
sgl_kernel, FlashInfer and PyTorch; the head of the output says which are here and why the others
are not. sgl_kernel's library may also be named by DSA_BENCH_SGL_KERNEL=<path of common_ops.*.so>.
Without a GPU, the CPU backend is compared with the plain-PyTorch reference.

The exit code is 1 if a result is wrong or a case fails; a peer's error is only shown.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import re
import sys
from dataclasses import asdict
from pathlib import Path

import torch

import dsa_ext
from benchmarks import peers, plot, table
from benchmarks.cases import all_cases, sweep
from benchmarks.roofs import Roofs, measure_roofs
from benchmarks.runner import Row, run_case
from dsa_ext import _C


def default_device() -> str:
    """Return "cuda" where a GPU is and this build has kernels for it."""
    built = any(kernel["device"] == "cuda" for kernel in _C.kernels())
    return "cuda" if built and torch.cuda.is_available() else "cpu"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--filter", default="", metavar="REGEX", help='cases by their "op case"')
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--quick", action="store_true", help="a few cases of each family")
    choice.add_argument(
        "--sweep", action="store_true", help="the indexer's logits over a grid of shapes (GPU)"
    )
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default_device())
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw the ratios there")
    args = parser.parse_args()
    if args.sweep and args.device == "cpu" and not args.list:
        parser.error("--sweep compares with DeepGEMM: it needs a GPU")
    return args


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    isa = dsa_ext.build_info()["cpu_isa"]
    return f"{platform.machine()} {isa}, {torch.get_num_threads()} threads"


def versions(device: torch.device) -> dict[str, str | None]:
    here: dict[str, str | None] = {
        "dsa_ext": dsa_ext.__version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }
    return here | (peers.versions() if device.type == "cuda" else {})


def document(
    name: str, packages: dict[str, str | None], roofs: Roofs | None, rows: list[Row]
) -> str:
    content = {
        "date": datetime.date.today().isoformat(),
        "gpu" if roofs else "cpu": name,
        "versions": packages,
        "roofs": asdict(roofs) if roofs else None,
        "rows": [asdict(row) for row in rows],
    }
    return json.dumps(content, indent=1) + "\n"


def section(title: str, lines: list[str]) -> None:
    if lines:
        print("", title, *(f"  {line}" for line in lines), sep="\n")


def main() -> int:
    args = arguments()
    device = torch.device(args.device)
    wanted = re.compile(args.filter)
    cases = [
        case
        for case in (sweep.cuda_cases() if args.sweep else all_cases(device))
        if wanted.search(str(case)) and (case.quick or not args.quick)
    ]
    if args.list:
        print(*cases, sep="\n")
        return 0

    name, packages = machine(device), versions(device)
    print(name)
    print(*(f"{package}: {version}" for package, version in packages.items()), sep="\n")
    roofs = measure_roofs(device) if device.type == "cuda" else None
    if roofs:
        torch.cuda.empty_cache()
        print(f"roofs: {roofs}")
    print("", table.HEADER, sep="\n", flush=True)
    rows: list[Row] = []
    try:
        for case in cases:
            rows.append(run_case(case, device, roofs))
            print(table.line(rows[-1]), flush=True)
    finally:
        if args.json:
            args.json.write_text(document(name, packages, roofs, rows))
    if args.sweep:
        section("sweep", table.against_peer(rows, sweep.PEER))
    else:
        section("targets", table.bars(rows))
    section("end to end", table.sparse_against_dense(rows))
    if args.plot:
        plot.save(rows, f"dsa_ext {dsa_ext.__version__} on {name}", args.plot)
    failed = [row for row in rows if row.failed]
    section("failed", [f"{row.op} {row.case}: {row.status}" for row in failed])
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

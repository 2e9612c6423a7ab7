# SPDX-License-Identifier: Apache-2.0
"""README.md says what ``python -m dsa_ext --matrix`` prints and what the last full run measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dsa_ext import _C

README = Path(__file__).parents[2] / "README.md"
MARKER = "<!-- kernels -->"
RESULTS = README.parent / "benchmarks" / "results"


def readme_part(marker: str) -> list[str]:
    parts = README.read_text(encoding="utf-8").split(marker)
    assert len(parts) == 3, f"README.md: expected two {marker}, got {len(parts) - 1}"
    return parts[1].strip().splitlines()


def readme_table() -> list[str]:
    return readme_part(MARKER)


def printed_table() -> list[str]:
    command = [sys.executable, "-m", "dsa_ext", "--matrix"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return result.stdout.splitlines()


def test_every_row_of_this_build_is_in_the_readme():
    """In order too: a build without CUDA has the CPU rows alone."""
    of_this_build = set(printed_table())
    assert [row for row in readme_table() if row in of_this_build] == printed_table()


def test_the_readme_has_no_other_rows():
    if all(kernel["device"] == "cpu" for kernel in _C.kernels()):
        pytest.skip("needs a build with CUDA kernels: the README lists them too")
    assert readme_table() == printed_table()


@pytest.mark.parametrize("machine", ["h200", "cpu"])
def test_figures_are_of_the_committed_run(machine):
    """Each row is one case of the results file, by its name, beside one peer."""
    results = json.loads((RESULTS / f"{machine}.json").read_text(encoding="utf-8"))
    measured = {
        f"| `{row['op']}` | {row['case']} | {row['us']:.0f} | {name} {peer['us']:.0f} "
        f"| {peer['ratio']:.2f} |"
        for row in results["rows"]
        for name, peer in row["peers"].items()
        if peer["ratio"] is not None
    }
    lines = readme_part(f"<!-- {machine} figures -->")
    rows = [line for line in lines if line.startswith("|")][2:]
    assert rows and [row for row in rows if row not in measured] == []
    assert len(set(rows)) == len(rows)
    assert results["date"] in lines[0]
    if machine == "h200":
        assert f"{results['roofs']['copy_gbps']:.0f} GB/s" in lines[-1]

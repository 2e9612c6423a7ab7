# SPDX-License-Identifier: Apache-2.0
"""README.md's table of kernels is what ``python -m dsa_ext --matrix`` prints."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dsa_ext import _C

README = Path(__file__).parents[2] / "README.md"
MARKER = "<!-- kernels -->"


def readme_table() -> list[str]:
    parts = README.read_text(encoding="utf-8").split(MARKER)
    assert len(parts) == 3, f"README.md: expected two {MARKER}, got {len(parts) - 1}"
    return parts[1].strip().splitlines()


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

# SPDX-License-Identifier: Apache-2.0
"""Tiny calls of every op, to be run under compute-sanitizer's memcheck.

Each tensor is an allocation of its own and exactly as large as its shape, so that any access beside
it shows. Results are compared with the reference too. Arguments: calls of each kind (4), first seed
(0).
"""

from __future__ import annotations

import os
import sys

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # read by torch when it is imported

import torch

from helpers import threads
from tiny_cases import KINDS, make, run


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("memcheck.py needs a CUDA device")
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 4
    first = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    with threads(1):
        for kind in KINDS:
            for seed in range(first, first + count):
                run(make(kind, seed), "cuda", guarded=False, give_workspace=seed % 2 == 1)
            # Larger, so that tiles are full and rows are split.
            run(make(kind, first + count, factor=12), "cuda", guarded=False)
            print(f"{kind}: {count + 1} calls")


if __name__ == "__main__":
    main()

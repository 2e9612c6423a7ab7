# SPDX-License-Identifier: Apache-2.0
"""The corpus: source files of the running interpreter's standard library, as bytes."""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_SKIPPED_FOLDERS = {
    *("site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib"),
    *("encodings", "pydoc_data"),  # tables, not prose or code
}
_HELD_OUT_SHARE = 1 / 16


@dataclass(frozen=True)
class Corpus:
    train: Tensor  # uint8 [bytes], files one after another
    held_out: Tensor  # uint8 [bytes]
    held_out_files: list[Path]  # the files of ``held_out``, in order
    train_files: int

    def batch(self, size: int, length: int, generator: torch.Generator) -> Tensor:
        """Random training windows, int64 [size, length + 1]."""
        starts = torch.randint(len(self.train) - length, (size,), generator=generator)
        return self.train[starts[:, None] + torch.arange(length + 1)].long()

    def held_out_windows(self, count: int, length: int) -> Tensor:
        """Evenly spaced windows of the held-out text, int64 [count, length + 1]."""
        starts = torch.linspace(0, len(self.held_out) - length - 1, count).long()
        return self.held_out[starts[:, None] + torch.arange(length + 1)].long()


def load_corpus() -> Corpus:
    """Splits by a hash of each file's path, so that no file is on both sides."""
    root = Path(sysconfig.get_path("stdlib"))
    train, held_out, held_out_files = [], [], []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIPPED_FOLDERS.intersection(relative.parts):
            continue
        digest = hashlib.sha256(relative.as_posix().encode()).digest()
        if int.from_bytes(digest[:8], "big") < _HELD_OUT_SHARE * 2**64:
            held_out.append(path.read_bytes())
            held_out_files.append(path)
        else:
            train.append(path.read_bytes())
    return Corpus(_as_tensor(train), _as_tensor(held_out), held_out_files, len(train))


def _as_tensor(texts: list[bytes]) -> Tensor:
    return torch.frombuffer(bytearray(b"".join(texts)), dtype=torch.uint8)

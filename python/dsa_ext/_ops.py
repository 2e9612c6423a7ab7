# SPDX-License-Identifier: Apache-2.0
"""Loads the torch ops (``torch.ops.dsa_ext``) and registers their fake kernels.

Every op writes into tensors it is given and returns nothing, so its fake kernel does nothing:
shapes are decided by whoever allocates the outputs, the front-end functions of this package.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dsa_ext import _C

_LIBRARY = Path(_C.__file__).with_name("libdsa_torch_ops.so")
torch.ops.load_library(str(_LIBRARY))  # type: ignore[no-untyped-call]


def _fake(*args: Any, **kwargs: Any) -> None:
    return None


for _name in sorted({kernel["op"] for kernel in _C.kernels()}):
    torch.library.register_fake(f"dsa_ext::{_name}", _fake)

ops = torch.ops.dsa_ext

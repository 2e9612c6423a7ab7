# SPDX-License-Identifier: Apache-2.0
"""Loads the torch ops (``torch.ops.dsa_ext``) and registers their fake kernels.

Every op writes into tensors it is given and returns nothing, so its fake kernel only checks that
they are all on one device: shapes are decided by whoever allocates the outputs, the front-end
functions of this package.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dsa_ext import _C

_LIBRARY = Path(_C.__file__).with_name("libdsa_torch_ops.so")
torch.ops.load_library(str(_LIBRARY))  # type: ignore[no-untyped-call]


ops = torch.ops.dsa_ext


def _fake_kernel(op: str) -> Callable[..., None]:
    """Make the kernel of fake tensors, which torch also calls where one of the tensors is meta."""
    names = [argument.name for argument in getattr(ops, op).default._schema.arguments]

    def fake(*args: Any, **kwargs: Any) -> None:
        given = dict(zip(names, args, strict=False)) | kwargs
        tensors = {name: t for name, t in given.items() if isinstance(t, torch.Tensor)}
        device = next(iter(tensors.values())).device
        for name, t in tensors.items():
            if t.device != device:
                raise ValueError(
                    f"{op}: {name}: expected a tensor on {device}, got one on {t.device}"
                )

    return fake


for _name in sorted({kernel["op"] for kernel in _C.kernels()}):
    torch.library.register_fake(f"dsa_ext::{_name}", _fake_kernel(_name))

# SPDX-License-Identifier: Apache-2.0
"""Arguments that the front end looks into before the ops do: what is no tensor, no tuple.

Dtypes, shapes and devices are validated by the ops (csrc/dispatch/validate.cpp).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def check_tensor(op: str, name: str, value: object) -> None:
    """Raise ValueError unless `value` is a tensor."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{op}: {name}: expected a tensor, got {describe(value)}")


def unpack_pair(op: str, name: str, value: object, expected: str) -> tuple[Any, Any]:
    """Return the two of a tuple or list; ValueError "expected the pair `expected`"."""
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise ValueError(f"{op}: {name}: expected the pair {expected}, got {describe(value)}")
    return value[0], value[1]


def unpack_out(op: str, names: tuple[str, ...], out: object) -> tuple[Tensor | None, ...]:
    """Return the results to write into, by `names`; None where one is to be allocated.

    ``out`` is None, a tensor for the first result alone, or a tuple or list of all of them;
    ValueError otherwise.
    """
    if out is None:
        return (None,) * len(names)
    if isinstance(out, Tensor):
        return (out,) + (None,) * (len(names) - 1)
    if (
        not isinstance(out, tuple | list)
        or len(out) != len(names)
        or not all(isinstance(t, Tensor) for t in out)
    ):
        raise ValueError(
            f"{op}: out: expected a tensor or the tuple ({', '.join(names)}), got {describe(out)}"
        )
    return tuple(out)


def describe(value: object) -> str:
    """Describe an argument in a message: "None", "float32 [4, 32]", "a tuple of 3", "str"."""
    if value is None:
        return "None"
    if isinstance(value, Tensor):
        return f"{dtype_name(value.dtype)} {list(value.shape)}"
    kind = type(value).__name__
    return f"a {kind} of {len(value)}" if isinstance(value, tuple | list) else kind


def dtype_name(dtype: torch.dtype) -> str:
    """Return the dtype's name without "torch."."""
    return str(dtype).removeprefix("torch.")

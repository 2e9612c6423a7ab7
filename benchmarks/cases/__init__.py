# SPDX-License-Identifier: Apache-2.0
"""The measured cases, a module a family of ops."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.case import Case
from benchmarks.cases import attention, endtoend, logits, memory, topk


def all_cases(device: torch.device) -> Iterator[Case]:
    """Every case of a device; the CPU's are small, its peer is the reference."""
    for family in (logits, topk, attention, memory):
        yield from family.cuda_cases() if device.type == "cuda" else family.cpu_cases()
    if device.type == "cuda":
        yield from endtoend.cuda_cases()

# SPDX-License-Identifier: Apache-2.0
"""What this GPU allows, measured in the run: copy bandwidth and matrix-product peaks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.case import Product
from benchmarks.timing import measure

_COPY_BYTES = 4 << 30
_SIZE = 8192


@dataclass(frozen=True)
class Roofs:
    """Ceilings. Where the GPU has no FP8 product, bf16's peak stands for it."""

    copy_gbps: float
    bf16_tflops: float
    fp8_tflops: float
    fp8_is_measured: bool

    def share(self, flop: float, count: float, product: Product, us: float) -> float:
        """The binding roof's time over the measured one."""
        peak = self.fp8_tflops if product == "fp8" else self.bf16_tflops
        return max(flop / (1e6 * peak), count / (1e3 * self.copy_gbps)) / us

    def __str__(self) -> str:
        fp8 = f"{self.fp8_tflops:.0f}" if self.fp8_is_measured else "none, bf16's stands"
        return (
            f"copy {self.copy_gbps:.0f} GB/s, bf16 {self.bf16_tflops:.0f} TFLOP/s, "
            f"fp8 {fp8} TFLOP/s"
        )


def _copy_gbps(device: torch.device) -> float:
    size = min(_COPY_BYTES, torch.cuda.mem_get_info()[0] // 4)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / measure(lambda: target.copy_(source), device).us / 1e3


def measure_roofs(device: torch.device) -> Roofs:
    """Measure the ceilings of the current GPU (a few hundred milliseconds)."""
    copy = _copy_gbps(device)
    flop = 2.0 * _SIZE**3
    a = torch.randn(_SIZE, _SIZE, dtype=torch.bfloat16, device=device)
    b = torch.randn(_SIZE, _SIZE, dtype=torch.bfloat16, device=device)
    bf16 = flop / measure(lambda: a @ b.t(), device).us / 1e6
    a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
    one = torch.ones((), device=device)

    def fp8_product() -> object:
        return torch._scaled_mm(a8, b8.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)

    try:
        fp8 = flop / measure(fp8_product, device).us / 1e6
    except RuntimeError:  # a GPU before SM89
        return Roofs(copy, bf16, bf16, fp8_is_measured=False)
    return Roofs(copy, bf16, fp8, fp8_is_measured=True)

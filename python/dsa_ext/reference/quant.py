# SPDX-License-Identifier: Apache-2.0
"""FP8 quantisation and the Hadamard rotation, by explicit arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor

from ._chunks import compute_dtype

E4M3_MAX = 448.0
AMAX_FLOOR = 1e-4
GROUP_SIZE = 128

_MANTISSA_MASK = 0x7FFFFF  # low 23 bits of an fp32


def e4m3_decode(codes: Tensor) -> Tensor:
    """Decode e4m3 (OCP FP8 E4M3, the "fn" variant) by bit arithmetic.

    codes: uint8, any shape. Returns fp32 of that shape. 0x7F and 0xFF are NaN; there is no
    infinity.
    """
    bits = codes.to(torch.int32)
    negative = (bits & 0x80) != 0
    exponent = (bits >> 3) & 0xF
    mantissa = bits & 0x7
    # A subnormal has no implicit one and the exponent of the smallest normal.
    significand = torch.where(exponent == 0, mantissa, mantissa + 8).to(torch.float32)
    power = _exact_power_of_two(exponent.clamp(min=1) - 7 - 3)
    magnitude = significand * power
    magnitude = magnitude.masked_fill((bits & 0x7F) == 0x7F, float("nan"))
    return torch.where(negative, -magnitude, magnitude)


def e4m3_encode(x: Tensor) -> Tensor:
    """Encode to e4m3 by bit arithmetic: round to nearest even, saturate at 448.

    x: fp32, any shape. Returns uint8 of that shape. NaN becomes 0x7F with x's sign bit; the bytes
    are those of `x.clamp(-448, 448).to(torch.float8_e4m3fn)`.
    """
    x = x.to(torch.float32)
    sign = torch.signbit(x).to(torch.int32) << 7
    nan = torch.isnan(x)
    magnitude = x.abs().clamp(max=E4M3_MAX).masked_fill(nan, 0.0).contiguous()
    exponent = ((magnitude.view(torch.int32) >> 23) - 127).clamp(min=-6)
    # In steps of the exponent's ulp, 2^(exponent - 3), both the scaling and the rounding are exact.
    # A round up to 16 steps carries into the exponent field by itself.
    steps = torch.round(magnitude * _exact_power_of_two(3 - exponent)).to(torch.int32)
    code = ((exponent + 7) << 3) + steps - 8
    return (torch.where(nan, 0x7F, code) | sign).to(torch.uint8)


def _exact_power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent in fp32, for integer exponents in [-126, 127]."""
    return ((exponent.to(torch.int32) + 127) << 23).view(torch.float32)


def ue8m0_decode(codes: Tensor) -> Tensor:
    """Decode ue8m0 bytes (OCP E8M0): 2^(code - 127), 255 is NaN. uint8 -> fp32, same shape."""
    bits = codes.to(torch.int32)
    value = (bits << 23).view(torch.float32)
    value = value.masked_fill(bits == 0, 2.0**-127)
    return value.masked_fill(bits == 255, float("nan"))


def round_up_to_power_of_two(scale: Tensor) -> Tensor:
    """The smallest power of two >= scale, at most 2^127. fp32, positive, normal (or inf)."""
    bits = scale.contiguous().view(torch.int32)
    power = (bits + _MANTISSA_MASK) & ~_MANTISSA_MASK
    return power.clamp(max=254 << 23).view(torch.float32)


def quantize_last_dim(x: Tensor, ue8m0: bool) -> tuple[Tensor, Tensor]:
    """Quantise vectors with one scale each. x fp32 [..., n] -> (e4m3 [..., n], fp32 [...]).

    NaNs do not enter the maximum: a NaN stays NaN and leaves its neighbours alone.
    """
    amax = x.abs().masked_fill(torch.isnan(x), 0.0).amax(dim=-1).clamp(min=AMAX_FLOOR)
    # A tensor divisor: for a Python scalar the CUDA kernel multiplies by the reciprocal instead.
    scale = amax / torch.full_like(amax, E4M3_MAX)
    if ue8m0:
        scale = round_up_to_power_of_two(scale)
    values = (x / scale.unsqueeze(-1)).clamp(-E4M3_MAX, E4M3_MAX)
    return values.to(torch.float8_e4m3fn), scale


def per_token_cast_to_fp8(
    x: Tensor, use_ue8m0: bool, gran_k: int = GROUP_SIZE, use_packed_ue8m0: bool = False
) -> tuple[Tensor, Tensor]:
    """Quantise to e4m3 with one fp32 scale for each 128 consecutive values (DeepGEMM's function).

    x: fp32/bf16/fp16 [..., n]. Returns (e4m3 [..., n], fp32 scale [..., ceil(n/128)]) with
    value * scale ~ x. scale = max(amax, 1e-4) / 448, with `use_ue8m0` rounded up to a power of two;
    the last group may be short. NaN stays NaN and does not enter amax. Of DeepGEMM's variants only
    gran_k 128, use_packed_ue8m0 False.
    """
    if gran_k != GROUP_SIZE or use_packed_ue8m0:
        raise ValueError(
            "per_token_cast_to_fp8: gran_k, use_packed_ue8m0: expected 128, False, "
            f"got {gran_k}, {use_packed_ue8m0}"
        )
    n = x.shape[-1]
    groups = -(-n // GROUP_SIZE)
    padded = torch.nn.functional.pad(x.detach().to(torch.float32), (0, groups * GROUP_SIZE - n))
    values, scale = quantize_last_dim(
        padded.reshape(*x.shape[:-1], groups, GROUP_SIZE), bool(use_ue8m0)
    )
    flat = values.view(torch.uint8).reshape(*x.shape[:-1], groups * GROUP_SIZE)[..., :n]
    return flat.contiguous().view(torch.float8_e4m3fn), scale


def hadamard_transform(x: Tensor, scale: float | None = None) -> Tensor:
    """Walsh-Hadamard transform of the last dimension, times scale; n^-0.5 makes it its own inverse.

    x: fp32/bf16/fp16/fp64 [..., n], n = 2^m. Returns x.dtype, same shape; computed in fp32 (fp64
    for fp64), Sylvester order: out[i] = scale * sum_j (-1)^popcount(i & j) x[j]. Differentiable.
    """
    n = x.shape[-1]
    if n < 1 or n & (n - 1):
        raise ValueError(f"hadamard_transform: x: expected a last dimension 2^m, got {n}")
    lead = x.shape[:-1]
    y = x.to(compute_dtype(x))
    half = 1
    while half < n:
        pairs = y.reshape(*lead, n // (2 * half), 2, half)
        a, b = pairs.unbind(dim=-2)
        y = torch.stack((a + b, a - b), dim=-2)
        half *= 2
    scaled: Tensor = y.reshape(x.shape) * (n**-0.5 if scale is None else scale)
    return scaled.to(x.dtype)

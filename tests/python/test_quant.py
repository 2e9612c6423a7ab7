# SPDX-License-Identifier: Apache-2.0
"""Hadamard rotation and FP8 quantisation: exact where arithmetic is, byte for byte."""

from __future__ import annotations

import pytest
import torch

import dsa_ext
from dsa_ext import reference
from helpers import (
    E4M3,
    Guarded,
    assert_close,
    assert_deterministic,
    assert_same_bits,
    bits,
    spread,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def sylvester(n: int) -> torch.Tensor:
    h = torch.ones(1, 1, dtype=torch.float64)
    while h.shape[0] < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    return h


# ---- hadamard_transform --------------------------------------------------------------------------


@pytest.mark.ops("hadamard_transform")
@pytest.mark.parametrize("n", [1, 2, 4, 8, 64, 128, 256, 512])
def test_hadamard_matrix(device, n):
    """Of the identity, the matrix itself: Sylvester order, scaled by n^-0.5."""
    got = dsa_ext.hadamard_transform(torch.eye(n, device=device))
    expected = sylvester(n) * n**-0.5
    torch.testing.assert_close(got.cpu().double(), expected, rtol=1e-7, atol=0)


@pytest.mark.ops("hadamard_transform")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, -0.37, 0.0])
def test_hadamard_scale(device, scale, dtype):
    """Any factor in place of n^-0.5, applied before the one rounding."""
    x = torch.randn(5, 128).to(device, dtype)
    got = dsa_ext.hadamard_transform(x, scale)
    expected = reference.hadamard_transform(x.double(), scale).to(dtype)
    steps = 2.0 ** {torch.float32: -22, torch.bfloat16: -7, torch.float16: -10}[dtype]
    torch.testing.assert_close(got, expected, rtol=steps, atol=1e-5)
    assert_same_bits(dsa_ext.hadamard_transform(x, 128**-0.5), dsa_ext.hadamard_transform(x))


@pytest.mark.ops("hadamard_transform")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(128,), (3, 128), (2, 5, 64), (7, 1), (1, 32768), (4, 2048)])
def test_hadamard(device, shape, dtype):
    x = torch.randn(shape).to(device, dtype)
    out = Guarded(shape, dtype, device)
    if len(shape) == 1:  # A lone vector is its own innermost dimension.
        out = Guarded((1, *shape), dtype, device)
    dsa_ext.hadamard_transform(spread(x[None])[0], out=out.out.view(shape))
    expected = reference.hadamard_transform(x.double())
    assert_close(out.check().view(shape), expected, {4: 1e-12, 2: 2e-6}[dtype.itemsize])


@pytest.mark.ops("hadamard_transform")
def test_hadamard_of_integers_is_exact(device):
    """n = 4^m, small integers: no rounding anywhere in fp32."""
    x = torch.randint(-8, 9, (5, 256)).float()
    expected = (x.double() @ sylvester(256)) / 16
    assert torch.equal(dsa_ext.hadamard_transform(x.to(device)).cpu().double(), expected)


@pytest.mark.ops("hadamard_transform")
def test_hadamard_is_its_own_inverse(device):
    x = torch.randn(6, 128, device=device)
    twice = dsa_ext.hadamard_transform(dsa_ext.hadamard_transform(x))
    torch.testing.assert_close(twice, x, rtol=1e-5, atol=1e-6)


@pytest.mark.ops("hadamard_transform")
def test_hadamard_in_place(device):
    x = torch.randn(6, 128, device=device)
    expected = dsa_ext.hadamard_transform(x)
    assert dsa_ext.hadamard_transform(x, out=x) is x
    assert_same_bits(x, expected)


@pytest.mark.ops("hadamard_transform")
def test_hadamard_is_deterministic_and_independent_of_the_batch(device):
    x = torch.randn(300, 128, device=device).to(torch.bfloat16)
    assert_deterministic(lambda: dsa_ext.hadamard_transform(x))
    order = torch.randperm(300, device=device)
    expected = dsa_ext.hadamard_transform(x)[order]
    assert_same_bits(dsa_ext.hadamard_transform(x[order]), expected)


@pytest.mark.ops("hadamard_transform")
@pytest.mark.parametrize("shape", [(0, 64), (3, 0, 16)])
def test_hadamard_of_nothing(device, shape):
    assert dsa_ext.hadamard_transform(torch.ones(shape, device=device)).shape == shape


# ---- per_token_cast_to_fp8 -----------------------------------------------------------------------


@pytest.mark.ops("per_token_cast_to_fp8")
@pytest.mark.parametrize("use_ue8m0", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [(1,), (4, 127), (3, 128), (3, 129), (2, 3, 512), (5, 1), (3, 1000), (2, 7168)],
    ids=str,
)
def test_cast(device, shape, dtype, use_ue8m0):
    """Byte for byte the reference's, over magnitudes of 1e-9 to 1e9 and zeros."""
    x = (torch.randn(shape) * 10.0 ** torch.randint(-9, 10, (*shape[:-1], 1))).to(device, dtype)
    x[..., ::7] = 0
    x = x.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max)
    groups = -(-shape[-1] // 128)
    values = Guarded((1, *shape), E4M3, device)
    scale = Guarded((1, *shape[:-1], groups), torch.float32, device)
    out = (values.out[0], scale.out[0])
    got = dsa_ext.per_token_cast_to_fp8(spread(x[None])[0], use_ue8m0, out=out)
    expected = reference.per_token_cast_to_fp8(x, use_ue8m0)
    assert all(a is b for a, b in zip(got, out, strict=True))
    assert_same_bits(values.check()[0], expected[0])
    assert_same_bits(scale.check()[0], expected[1])


@pytest.mark.ops("per_token_cast_to_fp8")
@pytest.mark.parametrize("use_ue8m0", [False, True])
def test_cast_keeps_every_e4m3_code(device, use_ue8m0):
    """Values of all finite codes, amax 448 (scale 1): the codes come back, -0.0 as -0.0."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F].view(2, 127)
    x = reference.e4m3_decode(codes).to(device)
    values, scale = dsa_ext.per_token_cast_to_fp8(x, use_ue8m0)
    assert torch.equal(scale, torch.ones(2, 1, device=device))
    assert torch.equal(bits(values).cpu(), codes)


@pytest.mark.ops("per_token_cast_to_fp8")
def test_cast_rounds_to_nearest_even(device):
    """Halfway between neighbours: the even code; a hair past it: the nearer one."""
    codes = torch.arange(0x7E, dtype=torch.uint8)
    low, high = reference.e4m3_decode(codes), reference.e4m3_decode(codes + 1)
    middle = (low.double() + high.double()).div(2).float()
    even = torch.where(codes % 2 == 0, codes, codes + 1)
    hair = middle * 2.0**-20
    for x, expected in ((middle, even), (middle - hair, codes), (middle + hair, codes + 1)):
        for sign, bit in ((1.0, 0), (-1.0, 0x80)):
            row = torch.cat([torch.tensor([448.0]), x * sign])[None].to(device)
            values, scale = dsa_ext.per_token_cast_to_fp8(row, False)
            assert scale.item() == 1.0
            assert torch.equal(bits(values)[0, 1:].cpu(), expected | bit)


@pytest.mark.ops("per_token_cast_to_fp8")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cast_of_zeros_uses_the_floor(device, dtype):
    x = torch.zeros(2, 128, dtype=dtype, device=device)
    values, scale = dsa_ext.per_token_cast_to_fp8(x, False)
    floor = torch.tensor(1e-4) / torch.tensor(448.0)
    assert torch.equal(scale.cpu(), floor.expand(2, 1))
    assert (bits(values) == 0).all()
    _, scale = dsa_ext.per_token_cast_to_fp8(x, True)
    assert torch.equal(scale.cpu(), torch.full((2, 1), 2.0**-22))


@pytest.mark.ops("per_token_cast_to_fp8")
def test_ue8m0_scales_are_rounded_up(device):
    """The smallest power of two >= amax / 448, exactly also next to powers of two."""
    amax = torch.tensor([448.0, 896.0, 7.0, 1.0, 500.0])
    amax = torch.cat([amax, amax.nextafter(amax * 2), amax.nextafter(amax * 0)])
    _, scale = dsa_ext.per_token_cast_to_fp8(amax[:, None].to(device), True)
    plain = amax / torch.tensor(448.0)
    mantissa, exponent = torch.frexp(plain)
    expected = torch.where(mantissa == 0.5, plain, torch.ldexp(torch.ones_like(plain), exponent))
    assert torch.equal(scale[:, 0].cpu(), expected)


@pytest.mark.ops("per_token_cast_to_fp8")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cast_keeps_nan_where_it_is(device, dtype):
    x = torch.randn(3, 300).to(device, dtype)
    clean = dsa_ext.per_token_cast_to_fp8(x, False)
    x[1, 130] = float("nan")
    values, scale = dsa_ext.per_token_cast_to_fp8(x, False)
    nan = torch.isnan(values.float())
    assert nan.nonzero().tolist() == [[1, 130]]
    expected = reference.per_token_cast_to_fp8(x, False)
    assert torch.equal(scale, expected[1])
    assert torch.equal(bits(values)[~nan], bits(expected[0])[~nan])
    elsewhere = torch.ones_like(nan)
    elsewhere[1, 128:256] = False
    assert torch.equal(bits(values)[elsewhere], bits(clean[0])[elsewhere])


@pytest.mark.ops("per_token_cast_to_fp8")
def test_cast_round_trip_error(device):
    x = torch.randn(64, 512, device=device)
    values, scale = dsa_ext.per_token_cast_to_fp8(x, False)
    back = values.float() * scale.repeat_interleave(128, dim=1)
    assert ((back - x).abs() <= x.abs() / 16 + scale.repeat_interleave(128, dim=1) / 512).all()


@pytest.mark.ops("per_token_cast_to_fp8")
def test_cast_is_deterministic_and_independent_of_the_batch(device):
    x = torch.randn(300, 384, device=device).to(torch.bfloat16)
    assert_deterministic(lambda: dsa_ext.per_token_cast_to_fp8(x, False))
    values, scale = dsa_ext.per_token_cast_to_fp8(x, False)
    order = torch.randperm(300, device=device)
    got = dsa_ext.per_token_cast_to_fp8(x[order], False)
    assert torch.equal(bits(got[0]), bits(values)[order])
    assert_same_bits(got[1], scale[order])


@pytest.mark.ops("per_token_cast_to_fp8")
@pytest.mark.parametrize("shape", [(0, 128), (3, 0)])
def test_cast_of_nothing(device, shape):
    values, scale = dsa_ext.per_token_cast_to_fp8(torch.ones(shape, device=device), False)
    assert values.shape == shape
    assert scale.shape == (shape[0], -(-shape[1] // 128))

# SPDX-License-Identifier: Apache-2.0
"""Cache writes and gathers, compared over every byte of memory, the gaps between pages included."""

from __future__ import annotations

import pytest
import torch

import dsa_ext
from dsa_ext import reference
from helpers import (
    E4M3,
    FORMATS,
    INT_MAX,
    INT_MIN,
    Guarded,
    any_e4m3,
    assert_same_bits,
    assert_same_codes,
    bits,
    hostile,
    int32,
    latent_cache,
    odd_scales,
    paged,
    permuted_table,
    put_indexer_keys,
    put_v4_rows,
    put_v32_rows,
    random_e4m3,
    slots_of,
    spread,
    storage_bytes,
    threads,
)

BF16 = torch.bfloat16


def some_slots(tokens: int, total: int, dtype: torch.dtype) -> torch.Tensor:
    """Distinct slots in any order, with skipped ones of every kind among them."""
    slots = torch.randperm(total)[:tokens].to(dtype)
    values = [-1, total, INT_MIN, INT_MAX]
    if dtype == torch.int64:
        values += [-(2**63), 2**63 - 1, 2**32, total + 2**32, -(2**32)]
    bad = torch.tensor(values, dtype=dtype)[torch.randint(0, len(values), (tokens,))]
    return torch.where(torch.rand(tokens) < 0.2, bad, slots)


# ---- indexer cache -------------------------------------------------------------------------------


@pytest.mark.ops("indexer_k_quant_and_cache")
@pytest.mark.parametrize("scale_fmt", [None, "fp32", "ue8m0"])
@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("dim", "page_size", "extra"),
    [(128, 64, 0), (128, 7, 36), (64, 16, 0), (32, 1, 4), (33, 4, 0), (1, 5, 16)],
)
def test_indexer_write(device, dim, page_size, extra, dtype, scale_fmt):
    pages = -(-60 // page_size)
    k = (torch.randn(50, dim) * 10.0 ** torch.randint(-6, 5, (50, 1))).to(device, dtype)
    k[7] = 0
    slots = some_slots(50, pages * page_size, torch.int64).to(device)
    # Bytes of a page must be a multiple of 4 for an odd head dimension too.
    extra += -(page_size * (dim + 4)) % 4
    cache = paged(pages, page_size, dim + 4, extra_stride=extra, device=device)
    twin = paged(pages, page_size, dim + 4, extra_stride=extra, device=device)
    assert dsa_ext.indexer_k_quant_and_cache(spread(k), cache, spread(slots), scale_fmt) is None
    reference.indexer_k_quant_and_cache(k, twin, slots, scale_fmt)
    assert_same_bits(storage_bytes(cache), storage_bytes(twin))
    again = paged(pages, page_size, dim + 4, extra_stride=extra, device=device)
    narrow = torch.where((slots >= 0) & (slots < pages * page_size), slots, -1).int()
    dsa_ext.indexer_k_quant_and_cache(k, again, narrow, scale_fmt)
    assert_same_bits(storage_bytes(again), storage_bytes(twin))


@pytest.mark.ops("indexer_k_quant_and_cache")
def test_indexer_write_to_a_cache_of_three_dimensions(device):
    """As vLLM declares it."""
    k, slots = torch.randn(6, 128, device=device), torch.tensor([0, 9, 4, -1, 11, 7], device=device)
    cache, twin = (paged(3, 4, 132, extra_stride=12, device=device) for _ in range(2))
    dsa_ext.indexer_k_quant_and_cache(k, cache.squeeze(2), slots, "ue8m0")
    dsa_ext.indexer_k_quant_and_cache(k, twin, slots, "ue8m0")
    assert_same_bits(storage_bytes(cache), storage_bytes(twin))


@pytest.mark.ops("indexer_k_quant_and_cache")
def test_indexer_write_layout(device):
    """Against the documented bytes, packed by hand: scales behind all the values of a page."""
    codes = any_e4m3(6, 128)
    codes.view(torch.uint8)[:, 0] = 0x7E  # 448, so that the scale is what is multiplied with.
    scale = 2.0 ** torch.arange(-3, 3).float()
    k = codes.float() * scale[:, None]
    slots = torch.tensor([0, 9, 4, 2, 11, 7])
    cache = paged(3, 4, 132, extra_stride=12, device=device)
    expected = paged(3, 4, 132, extra_stride=12)
    dsa_ext.indexer_k_quant_and_cache(k.to(device), cache, slots.to(device))
    put_indexer_keys(expected, slots, codes, scale)
    assert_same_bits(storage_bytes(cache).cpu(), storage_bytes(expected))


@pytest.mark.ops("gather_indexer_k_cache")
@pytest.mark.parametrize(("dim", "page_size"), [(128, 64), (64, 7), (32, 1), (5, 4)])
def test_indexer_gather(device, dim, page_size):
    """Every code and scale as it is; rows of no request, or in an invalid page, are zero."""
    lens = [100, 0, 17, 64]
    pages = sum(-(-n // page_size) for n in lens) + 1
    table = permuted_table(lens, page_size, pages, device=device)
    extra = 8 + -(page_size * (dim + 4)) % 4
    cache = paged(pages, page_size, dim + 4, extra_stride=extra, device=device)
    cu_seqlens = torch.tensor([0, *lens]).cumsum(0)
    keys = torch.randint(0, 256, (sum(lens), dim), dtype=torch.uint8).view(E4M3).to(device)
    scales = odd_scales(sum(lens), device=device)
    for b, n in enumerate(lens):
        rows = slice(int(cu_seqlens[b]), int(cu_seqlens[b + 1]))
        slots = slots_of(table, b, torch.arange(n, device=device), page_size)
        put_indexer_keys(cache, slots, keys[rows], scales[rows])
    total = sum(lens) + 9
    out = (Guarded((total, dim), E4M3, device), Guarded((total,), torch.float32, device))
    seqlens = spread(int32(cu_seqlens, device))
    dsa_ext.gather_indexer_k_cache(
        cache, spread(table), seqlens, total, out=(out[0].out, out[1].out)
    )
    k, k_scale = out[0].check(), out[1].check()
    assert torch.equal(bits(k)[:-9], bits(keys))
    assert torch.equal(k_scale[:-9], scales)
    assert (bits(k)[-9:] == 0).all()
    assert (k_scale[-9:] == 0).all()
    table[0, 0], table[3, 0] = -1, pages
    k, k_scale = dsa_ext.gather_indexer_k_cache(cache, table, seqlens, total)
    expected = reference.gather_indexer_k_cache(cache, table, seqlens, total)
    assert_same_bits(k, expected[0])
    assert_same_bits(k_scale, expected[1])
    assert (bits(k)[: min(page_size, 100)] == 0).all()


@pytest.mark.ops("indexer_k_quant_and_cache", "gather_indexer_k_cache", "per_token_cast_to_fp8")
@pytest.mark.parametrize("use_ue8m0", [False, True])
def test_indexer_write_then_gather_is_the_cast(device, use_ue8m0):
    k = torch.randn(40, 128, device=device).to(BF16)
    cache = paged(6, 8, 132, extra_stride=20, device=device)
    table = int32(torch.randperm(6)[None], device)
    slots = slots_of(table, 0, torch.arange(40, device=device), 8)
    dsa_ext.indexer_k_quant_and_cache(k, cache, slots, "ue8m0" if use_ue8m0 else "fp32")
    values, scale = dsa_ext.gather_indexer_k_cache(cache, table, int32([0, 40], device), 40)
    expected = dsa_ext.per_token_cast_to_fp8(k, use_ue8m0)
    assert_same_bits(values, expected[0])
    assert_same_bits(scale[:, None], expected[1])


# ---- MLA caches ----------------------------------------------------------------------------------


def latents(tokens, fmt, dtype, device):
    nope = fmt.d_qk - 64
    kv_c = (torch.randn(tokens, nope) * 10.0 ** torch.randint(-4, 4, (tokens, 1))).to(dtype)
    kv_c[3] = 0
    return kv_c.to(device), torch.randn(tokens, 64).to(device, dtype)


@pytest.mark.ops("mla_kv_quant_and_cache")
@pytest.mark.parametrize("page_size", [1, 13, 64])
@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["same", "v32", "v4"])
def test_mla_write(device, name, dtype, page_size):
    if name == "same":
        name = "bf16" if dtype == BF16 else "fp16"
    fmt = FORMATS[name]
    pages = -(-60 // page_size)
    kv_c, k_pe = latents(50, fmt, dtype, device)
    slots = some_slots(50, pages * page_size, torch.int64).to(device)
    stride = 576 if name == "v4" else 32
    shape = (pages, page_size, fmt.width)
    cache = paged(*shape, dtype=fmt.dtype, extra_stride=stride, device=device)
    twin = paged(*shape, dtype=fmt.dtype, extra_stride=stride, device=device)
    assert dsa_ext.mla_kv_quant_and_cache(spread(kv_c), spread(k_pe), cache, slots) is None
    reference.mla_kv_quant_and_cache(kv_c, k_pe, twin, slots)
    assert_same_bits(storage_bytes(cache), storage_bytes(twin))
    again = paged(*shape, dtype=fmt.dtype, extra_stride=stride, device=device)
    narrow = torch.where((slots >= 0) & (slots < pages * page_size), slots, -1).int()
    dsa_ext.mla_kv_quant_and_cache(kv_c, k_pe, again, spread(narrow))
    assert_same_bits(storage_bytes(again), storage_bytes(twin))


@pytest.mark.ops("mla_kv_quant_and_cache")
def test_v32_write_layout(device):
    codes = random_e4m3(5, 512, std=50.0)
    codes.view(torch.uint8)[:, ::128] = 0xFE  # -448 in each group: the scale is 2^n exactly.
    scales = 2.0 ** torch.randint(-5, 3, (5, 4)).float()
    kv_c = (codes.float().view(5, 4, 128) * scales[..., None]).flatten(1).to(BF16)
    rope = torch.randn(5, 64).to(BF16)
    slots = torch.tensor([8, 0, 5, 3, 2])
    cache = paged(3, 3, 656, extra_stride=48, device=device)
    expected = paged(3, 3, 656, extra_stride=48)
    dsa_ext.mla_kv_quant_and_cache(kv_c.to(device), rope.to(device), cache, slots.to(device))
    put_v32_rows(expected, slots, codes, scales, rope)
    assert_same_bits(storage_bytes(cache).cpu(), storage_bytes(expected))


@pytest.mark.ops("mla_kv_quant_and_cache")
def test_v4_write_layout(device):
    """Two planes a page; the pad byte of the scales is written 0."""
    codes = random_e4m3(5, 448, std=50.0)
    codes.view(torch.uint8)[:, ::64] = 0x7E
    exponents = torch.randint(120, 130, (5, 7), dtype=torch.uint8)
    scales = 2.0 ** (exponents.float() - 127)
    kv_c = (codes.float().view(5, 7, 64) * scales[..., None]).flatten(1).to(BF16)
    rope = torch.randn(5, 64).to(BF16)
    slots = torch.tensor([8, 0, 5, 3, 2])
    cache = paged(3, 3, 584, extra_stride=552, device=device)
    expected = paged(3, 3, 584, extra_stride=552)
    dsa_ext.mla_kv_quant_and_cache(kv_c.to(device), rope.to(device), cache, slots.to(device))
    put_v4_rows(expected, slots, codes, exponents, rope)
    assert_same_bits(storage_bytes(cache).cpu(), storage_bytes(expected))


@pytest.mark.ops("mla_kv_quant_and_cache")
def test_v32_scales_are_not_rounded(device):
    kv_c, k_pe = latents(20, FORMATS["v32"], BF16, device)
    cache = paged(1, 20, 656, device=device)
    dsa_ext.mla_kv_quant_and_cache(kv_c, k_pe, cache, torch.arange(20, device=device))
    scales = cache[0, :, 0, 512:528].clone().view(torch.float32).cpu()
    amax = kv_c.cpu().float().view(20, 4, 128).abs().amax(-1).clamp(min=1e-4)
    assert torch.equal(scales, amax / torch.full_like(amax, 448.0))
    assert (torch.frexp(scales)[0] != 0.5).any()


@pytest.mark.ops("mla_kv_quant_and_cache", "indexer_k_quant_and_cache")
@pytest.mark.parametrize("name", FORMATS)
def test_writes_of_nan_infinity_and_the_largest_numbers(device, name):
    """NaN stays where it is, infinities saturate as the reference says, nothing overflows."""
    fmt = FORMATS[name]
    dtype = BF16 if fmt.fp8 else fmt.dtype
    kv_c, k_pe = latents(6, fmt, dtype, device)
    kv_c[0, 3], kv_c[1, 130], kv_c[2, 200] = float("nan"), float("inf"), -float("inf")
    kv_c[4] = torch.finfo(dtype).max
    kv_c[5] = torch.finfo(dtype).smallest_normal
    k_pe[0, 1], k_pe[1, 2] = float("nan"), float("inf")
    slots = torch.arange(6, device=device)
    cache, twin = (paged(1, 8, fmt.width, dtype=fmt.dtype, device=device) for _ in range(2))
    dsa_ext.mla_kv_quant_and_cache(kv_c, k_pe, cache, slots)
    reference.mla_kv_quant_and_cache(kv_c, k_pe, twin, slots)
    assert_same_codes(cache, twin)
    for scale_fmt in (None, "ue8m0"):
        cache, twin = (paged(1, 8, 132, device=device) for _ in range(2))
        dsa_ext.indexer_k_quant_and_cache(kv_c[:, :128], cache, slots, scale_fmt)
        reference.indexer_k_quant_and_cache(kv_c[:, :128], twin, slots, scale_fmt)
        assert_same_codes(cache, twin)


@pytest.mark.ops("gather_mla_kv_cache")
@pytest.mark.parametrize("page_size", [1, 13, 64])
@pytest.mark.parametrize("name", FORMATS)
def test_mla_gather(device, name, page_size):
    """Bit for bit: fp32 product, one rounding to bf16; a 16-bit cache as it is."""
    fmt = FORMATS[name]
    lens = [100, 0, 17, 64]
    pages = sum(-(-n // page_size) for n in lens) + 1
    table = permuted_table(lens, page_size, pages)
    slots = [slots_of(table, b, torch.arange(n), page_size) for b, n in enumerate(lens)]
    stride = 576 if name == "v4" else 32
    cache = latent_cache(
        fmt, pages, page_size, torch.cat(slots), extra_stride=stride, device=device
    )
    table = spread(table.to(device))
    cu_seqlens = int32(torch.tensor([0, *lens]).cumsum(0), device)
    total = sum(lens) + 9
    dtype = BF16 if fmt.fp8 else fmt.dtype
    out = Guarded((total, fmt.d_qk), dtype, device)
    dsa_ext.gather_mla_kv_cache(cache, table, cu_seqlens, total, out=out.out)
    expected = reference.gather_mla_kv_cache(cache, table, cu_seqlens, total)
    got = out.check()
    assert_same_bits(got, expected)
    assert torch.isfinite(got).all()
    assert (got[-9:] == 0).all()
    table[0, 0], table[2, 0] = INT_MIN, INT_MAX
    got = dsa_ext.gather_mla_kv_cache(cache, table, cu_seqlens, total)
    assert_same_bits(got, reference.gather_mla_kv_cache(cache, table, cu_seqlens, total))
    assert (got[: min(page_size, 100)] == 0).all()


@pytest.mark.ops("gather_mla_kv_cache")
@pytest.mark.parametrize("name", ["v32", "v4"])
def test_mla_gather_of_every_code(device, name):
    """All 256 codes under fp32 scales that are no power of two (V4: powers of two)."""
    fmt = FORMATS[name]
    nope = fmt.d_qk - 64
    codes = torch.arange(256, dtype=torch.uint8).repeat(2)[None, :nope]
    codes = torch.cat([codes, codes.flip(1)]).view(E4M3)
    rope = torch.randn(2, 64).to(BF16)
    cache = paged(1, 2, fmt.width)
    if name == "v32":
        scales = odd_scales(2, 4)
        put_v32_rows(cache, torch.arange(2), codes, scales, rope)
    else:
        exponents = torch.tensor([[0, 1, 100, 127, 130, 200, 245]] * 2, dtype=torch.uint8)
        scales = torch.ldexp(torch.ones(2, 7), exponents.int() - 127)
        put_v4_rows(cache, torch.arange(2), codes, exponents, rope)
    values = reference.e4m3_decode(codes.view(torch.uint8)).unflatten(1, (*scales.shape[1:], -1))
    expected = torch.cat([(values * scales[..., None]).flatten(1).to(BF16), rope], 1)
    got = dsa_ext.gather_mla_kv_cache(
        cache.to(device), int32([[0]], device), int32([0, 2], device), 2
    )
    torch.testing.assert_close(got.cpu(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.ops("mla_kv_quant_and_cache", "gather_mla_kv_cache")
@pytest.mark.parametrize("name", FORMATS)
def test_mla_write_then_gather(device, name):
    """A round trip: exact in a 16-bit cache, within an FP8 step otherwise; RoPE always exact."""
    fmt = FORMATS[name]
    dtype = BF16 if fmt.fp8 else fmt.dtype
    kv_c, k_pe = latents(40, fmt, dtype, device)
    cache = paged(6, 8, fmt.width, dtype=fmt.dtype, device=device)
    table = int32(torch.randperm(6)[None], device)
    slots = slots_of(table, 0, torch.arange(40, device=device), 8)
    dsa_ext.mla_kv_quant_and_cache(kv_c, k_pe, cache, slots)
    got = dsa_ext.gather_mla_kv_cache(cache, table, int32([0, 40], device), 40)
    nope = fmt.d_qk - 64
    assert_same_bits(got[:, nope:], k_pe)
    if not fmt.fp8:
        return assert_same_bits(got[:, :nope], kv_c)
    error = (got[:, :nope].double() - kv_c.double()).abs()
    amax = kv_c.double().abs().amax(1, keepdim=True).clamp(min=1e-4)
    assert (error <= kv_c.double().abs() / 14 + amax / 448 / 256).all()


@pytest.mark.ops("mla_kv_quant_and_cache")
def test_16_bit_cache_of_other_dimensions(device):
    kv_c = torch.randn(7, 20, device=device).to(BF16)
    k_pe = torch.randn(7, 12, device=device).to(BF16)
    cache = paged(2, 5, 32, dtype=BF16, extra_stride=8, device=device)
    slots = torch.tensor([0, 9, 3, -1, 4, 5, 10], device=device)
    dsa_ext.mla_kv_quant_and_cache(kv_c, k_pe, cache, slots)
    rows = cache.reshape(10, 32)
    kept = [0, 1, 2, 4, 5]
    assert_same_bits(rows[slots[kept]], torch.cat([kv_c, k_pe], 1)[kept])
    assert torch.isnan(rows).all(dim=1).sum() == 5


@pytest.mark.ops("mla_kv_quant_and_cache", "gather_mla_kv_cache")
def test_16_bit_cache_whose_tokens_lie_apart(device):
    """A 16-bit cache may be every other token of a larger one."""
    base = paged(3, 8, 576, dtype=BF16, device=device)
    cache = base[:, ::2]
    kv_c, k_pe = latents(12, FORMATS["bf16"], BF16, device)
    dsa_ext.mla_kv_quant_and_cache(kv_c, k_pe, cache, torch.arange(12, device=device))
    assert torch.isnan(base[:, 1::2]).all()
    table = int32([[0, 1, 2]], device)
    got = dsa_ext.gather_mla_kv_cache(cache, table, int32([0, 12], device), 12)
    assert_same_bits(got, torch.cat([kv_c, k_pe], 1))


# ---- both ----------------------------------------------------------------------------------------


@pytest.mark.ops("indexer_k_quant_and_cache", "mla_kv_quant_and_cache")
@pytest.mark.parametrize(("tokens", "pages"), [(0, 3), (4, 0)])
def test_writes_of_nothing(device, tokens, pages):
    slots = torch.zeros(tokens, dtype=torch.int64, device=device)
    cache = paged(pages, 4, 132, device=device)
    dsa_ext.indexer_k_quant_and_cache(torch.ones(tokens, 128, device=device), cache, slots)
    assert (storage_bytes(cache) == 0xFF).all()
    for name in FORMATS:
        fmt = FORMATS[name]
        kv_c = torch.ones(tokens, fmt.d_qk - 64, device=device).to(BF16)
        k_pe = torch.ones(tokens, 64, device=device).to(BF16)
        if name == "fp16":
            kv_c, k_pe = kv_c.half(), k_pe.half()
        cache = paged(pages, 4, fmt.width, dtype=fmt.dtype, device=device)
        dsa_ext.mla_kv_quant_and_cache(kv_c, k_pe, cache, slots)
        assert (storage_bytes(cache) == 0xFF).all()


@pytest.mark.ops("gather_indexer_k_cache", "gather_mla_kv_cache")
@pytest.mark.parametrize(("batch", "width", "pages"), [(0, 2, 3), (2, 0, 3), (2, 2, 0)])
def test_gathers_of_nothing(device, batch, width, pages):
    table = int32(torch.zeros(batch, width), device)
    cu_seqlens = int32(torch.arange(batch + 1) * 3, device)
    k, scale = dsa_ext.gather_indexer_k_cache(
        paged(pages, 4, 132, device=device), table, cu_seqlens, 7
    )
    assert (bits(k) == 0).all()
    assert (scale == 0).all()
    for fmt in FORMATS.values():
        cache = paged(pages, 4, fmt.width, dtype=fmt.dtype, device=device)
        rows = dsa_ext.gather_mla_kv_cache(cache, table, cu_seqlens, 7)
        assert rows.shape == (7, fmt.d_qk)
        assert (rows == 0).all()
        assert dsa_ext.gather_mla_kv_cache(cache, table, cu_seqlens, 0).shape == (0, fmt.d_qk)


@pytest.mark.ops("gather_indexer_k_cache", "gather_mla_kv_cache")
def test_gathers_with_disordered_cu_seqlens(device):
    """Row t is of the last request that begins at or before t, if it has not ended by then."""
    lens = [20, 20, 20]
    table = permuted_table(lens, 4, 15, width=5, device=device)
    cache = paged(15, 4, 132, device=device)
    put_indexer_keys(
        cache,
        torch.arange(60, device=device),
        random_e4m3(60, 128, device=device),
        odd_scales(60, device=device),
    )
    mla = latent_cache(FORMATS["v32"], 15, 4, torch.arange(60), device=device)
    cases = [
        [0, 10, 5, 15],
        [5, 3, 8, 2],
        [-4, 6, 6, 30],
        [30, 20, 10, 0],
        [INT_MIN, INT_MAX, 0, 12],
        [INT_MIN, INT_MIN, -1, INT_MAX],
        [0, 0, 0, 0],
    ]
    for values in cases:
        cu_seqlens = int32(values, device)
        got = dsa_ext.gather_indexer_k_cache(cache, table, cu_seqlens, 33)
        expected = reference.gather_indexer_k_cache(cache, table, cu_seqlens, 33)
        assert_same_bits(got[0], expected[0])
        assert_same_bits(got[1], expected[1])
        rows = dsa_ext.gather_mla_kv_cache(mla, table, cu_seqlens, 33)
        assert_same_bits(rows, reference.gather_mla_kv_cache(mla, table, cu_seqlens, 33))


@pytest.mark.ops("indexer_k_quant_and_cache", "mla_kv_quant_and_cache")
def test_writes_do_not_depend_on_threads_or_order(device):
    """One and two threads, tokens in another order: the same memory."""
    tokens = 300
    k = torch.randn(tokens, 128, device=device).to(BF16)
    kv_c, k_pe = latents(tokens, FORMATS["v4"], BF16, device)
    slots = some_slots(tokens, 320, torch.int64).to(device)
    order = torch.randperm(tokens, device=device)
    twin, mla_twin = paged(5, 64, 132, device=device), paged(5, 64, 584, device=device)
    reference.indexer_k_quant_and_cache(k, twin, slots)
    reference.mla_kv_quant_and_cache(kv_c, k_pe, mla_twin, slots)
    for count, rows in ((1, slice(None)), (2, slice(None)), (2, order)):
        cache, mla = paged(5, 64, 132, device=device), paged(5, 64, 584, device=device)
        with threads(count):
            dsa_ext.indexer_k_quant_and_cache(k[rows], cache, slots[rows])
            dsa_ext.mla_kv_quant_and_cache(kv_c[rows], k_pe[rows], mla, slots[rows])
        assert_same_bits(cache, twin)
        assert_same_bits(mla, mla_twin)


def test_the_last_of_equal_slots_is_kept():
    """Two tokens for one slot, on the CPU: the later token's row, whole. On CUDA it is either."""
    tokens = 400
    k = torch.randn(tokens, 128).to(BF16)
    kv_c, k_pe = latents(tokens, FORMATS["v32"], BF16, "cpu")
    slots = hostile(int32(torch.arange(tokens) % 40), 0.1, (-1,))
    cache, mla = paged(5, 8, 132), paged(5, 8, 656)
    dsa_ext.indexer_k_quant_and_cache(k, cache, slots)
    dsa_ext.mla_kv_quant_and_cache(kv_c, k_pe, mla, slots)
    twin, mla_twin = paged(5, 8, 132), paged(5, 8, 656)
    reference.indexer_k_quant_and_cache(k, twin, slots)
    reference.mla_kv_quant_and_cache(kv_c, k_pe, mla_twin, slots)
    assert_same_bits(cache, twin)
    assert_same_bits(mla, mla_twin)

# SPDX-License-Identifier: Apache-2.0
"""Sparse prefill, decode over every cache format, and the merge of attention states."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

import dsa_ext
from dsa_ext import reference
from helpers import (
    DECODE_TOLERANCE,
    E4M3,
    FORMATS,
    INT_MAX,
    INT_MIN,
    PREFILL_TOLERANCE,
    Guarded,
    assert_close,
    assert_deterministic,
    assert_lse_close,
    assert_same_bits,
    hostile,
    int32,
    latent_cache,
    paged,
    permuted_table,
    poison,
    slots_of,
    spread,
)

INF = float("inf")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# s_q, h_q, d_qk, d_v, s_kv, topk, dtype
SPARSE_SHAPES = [
    (4, 1, 576, 512, 200, 64, BF16),
    (3, 3, 576, 512, 100, 33, FP16),
    (5, 8, 512, 512, 300, 128, BF16),
    (2, 64, 576, 512, 500, 257, BF16),
    (1, 128, 576, 512, 700, 512, FP16),
    (2, 128, 512, 512, 90, 1, BF16),
    (6, 16, 64, 64, 90, 40, BF16),
    (6, 5, 96, 64, 90, 40, FP16),
    (6, 5, 128, 64, 90, 40, BF16),
    (3, 4, 288, 256, 70, 99, BF16),
    (3, 7, 384, 320, 70, 48, BF16),
    (3, 2, 480, 448, 70, 48, FP16),
    (3, 2, 512, 448, 70, 48, BF16),
]


def random_sink(heads: int, device: str) -> torch.Tensor:
    """Sinks around the lse, with both infinities among several heads."""
    sink = torch.randn(heads) * 2
    if heads >= 3:
        sink[0], sink[heads // 2] = INF, -INF
    return sink.to(device)


# ---- flash_mla_sparse_fwd ------------------------------------------------------------------------


def sparse_case(s_q, h_q, d_qk, d_v, s_kv, topk, dtype, device, *, sink=False, lengths=False):
    """Invalid and repeated indices, a row with nothing valid; rows of kv never selected are NaN."""
    q = torch.randn(s_q, h_q, d_qk).to(dtype)
    kv = torch.randn(s_kv, 1, d_qk).to(dtype)
    indices = int32(torch.randint(0, s_kv, (s_q, 1, topk)))
    indices[torch.rand(indices.shape) < 0.1] = 7 % s_kv
    if s_q > 1:
        indices = hostile(indices, 0.15, (INT_MIN, -1, s_kv, s_kv + 1, INT_MAX))
        indices[1] = -1
    length = None
    if lengths:
        length = int32([topk, topk // 2, 1, 0, INT_MAX, INT_MIN])[: s_q + 1].roll(-1)[:s_q]
    valid = (indices >= 0) & (indices < s_kv)
    if length is not None:
        valid &= torch.arange(topk) < length[:, None, None]
    seen = torch.zeros(s_kv, dtype=torch.bool)
    seen[indices[valid].long()] = True
    kv[~seen] = float("nan")
    return {
        "q": spread(q.to(device)),
        "kv": spread(kv.to(device)),
        "indices": spread(indices.to(device)),
        "sm_scale": d_qk**-0.5,
        "d_v": d_v,
        "attn_sink": random_sink(h_q, device) if sink else None,
        "topk_length": None if length is None else spread(length.to(device)),
    }


def check_sparse(case, tolerance=PREFILL_TOLERANCE):
    s_q, h_q, _ = case["q"].shape
    device = case["q"].device
    guards = (
        Guarded((s_q, h_q, case["d_v"]), case["q"].dtype, device),
        Guarded((s_q, h_q), FP32, device),
        Guarded((s_q, h_q), FP32, device),
    )
    got = dsa_ext.flash_mla_sparse_fwd(**case, out=tuple(g.out for g in guards))
    expected = reference.flash_mla_sparse_fwd(**case, out_dtype=FP32)
    out, max_logits, lse = (guard.check() for guard in guards)
    assert got[0] is guards[0].out
    assert_close(out, expected[0], tolerance)
    assert_lse_close(max_logits, expected[1])
    assert_lse_close(lse, expected[2])
    return out, max_logits, lse


@pytest.mark.ops("flash_mla_sparse_fwd")
@pytest.mark.parametrize("lengths", [False, True], ids=["all", "topk_length"])
@pytest.mark.parametrize("sink", [False, True], ids=["plain", "sink"])
@pytest.mark.parametrize("shape", SPARSE_SHAPES, ids=str)
def test_sparse_fwd(device, shape, sink, lengths):
    check_sparse(sparse_case(*shape, device, sink=sink, lengths=lengths))


@pytest.mark.ops("flash_mla_sparse_fwd")
def test_sparse_fwd_of_rows_with_nothing_valid(device):
    case = sparse_case(4, 3, 576, 512, 50, 20, BF16, device, sink=True)
    poison(case["kv"])
    for invalid in (-1, INT_MIN, 50, INT_MAX):
        case["indices"].fill_(invalid)
        out, max_logits, lse = dsa_ext.flash_mla_sparse_fwd(**case)
        assert (out == 0).all()
        assert torch.isneginf(max_logits).all()
        assert torch.isposinf(lse).all()
    case["indices"].fill_(3)
    case["topk_length"] = int32([0, -1, INT_MIN, 0], device)
    out, max_logits, lse = dsa_ext.flash_mla_sparse_fwd(**case)
    assert (out == 0).all()
    assert torch.isneginf(max_logits).all()
    assert torch.isposinf(lse).all()


@pytest.mark.ops("flash_mla_sparse_fwd")
def test_sparse_fwd_of_rows_with_nothing_above_minus_infinity(device):
    """Valid keys with scores of -inf are no keys, though their infinite values were weighed."""
    case = sparse_case(3, 5, 576, 512, 50, 40, BF16, device, sink=True)
    case["q"][1, :, 7] = -1.0
    case["kv"][:, :, 7] = INF
    case["q"][0, :, 7] = case["q"][2, :, 7] = 1.0
    out, max_logits, lse = check_sparse(case)
    assert (out[1] == 0).all()
    assert torch.isneginf(max_logits[1]).all()
    assert torch.isposinf(lse[1]).all()


@pytest.mark.ops("flash_mla_sparse_fwd")
@pytest.mark.parametrize(("s_q", "h_q", "s_kv"), [(0, 4, 9), (3, 4, 0), (0, 4, 0)])
def test_sparse_fwd_of_nothing(device, s_q, h_q, s_kv):
    q = torch.randn(s_q, h_q, 576, device=device).to(BF16)
    kv = torch.randn(s_kv, 1, 576, device=device).to(BF16)
    indices = int32(torch.zeros(s_q, 1, 5), device)
    out, max_logits, lse = dsa_ext.flash_mla_sparse_fwd(q, kv, indices, 0.1)
    assert out.shape == (s_q, h_q, 512)
    assert max_logits.shape == lse.shape == (s_q, h_q)
    assert (out == 0).all()
    assert torch.isposinf(lse).all()


@pytest.mark.ops("flash_mla_sparse_fwd")
def test_sparse_fwd_of_no_candidates(device):
    q, kv = torch.ones(2, 3, 576, device=device).to(BF16), torch.ones(4, 1, 576, device=device)
    out, _, lse = dsa_ext.flash_mla_sparse_fwd(
        q, kv.to(BF16), int32(torch.zeros(2, 1, 0), device), 0.1
    )
    assert (out == 0).all()
    assert torch.isposinf(lse).all()


@pytest.mark.ops("flash_mla_sparse_fwd")
def test_repeated_indices_count_each_time(device):
    """Three times one row and once another: weights 3 e^a and e^b."""
    case = sparse_case(1, 8, 576, 512, 20, 4, BF16, device)
    case["kv"].copy_(torch.randn(20, 1, 576).to(BF16))
    case["indices"].copy_(int32([[[5, 9, 5, 5]]]))
    got = check_sparse(case)
    logits = (case["q"][0].double() @ case["kv"][[5, 9], 0].double().t()) * case["sm_scale"]
    terms = logits.exp() * torch.tensor([3.0, 1.0], device=device)
    assert_lse_close(got[2][0], terms.sum(-1).log())
    value = (terms / terms.sum(-1, keepdim=True)) @ case["kv"][[5, 9], 0, :512].double()
    assert_close(got[0][0], value, PREFILL_TOLERANCE)


@pytest.mark.ops("flash_mla_sparse_fwd")
def test_equal_scores_average(device):
    """q = 0: the mean of the values; lse = log n, max_logits = 0."""
    n = 100
    kv = torch.randn(n, 1, 576, device=device).to(BF16)
    q = torch.zeros(2, 5, 576, dtype=BF16, device=device)
    indices = int32(torch.arange(n), device).expand(2, 1, n).contiguous()
    out, max_logits, lse = dsa_ext.flash_mla_sparse_fwd(q, kv, indices, 0.3)
    mean = kv[:, 0, :512].double().mean(0).expand(2, 5, 512)
    assert_close(out, mean, PREFILL_TOLERANCE)
    assert (max_logits == 0).all()
    assert_lse_close(lse, torch.full((2, 5), math.log(n), device=device))


@pytest.mark.ops("flash_mla_sparse_fwd")
@pytest.mark.parametrize("scale", [-0.05, 0.0, 30.0, 1e-30])
def test_extreme_softmax_scales(device, scale):
    """Logits of thousands neither overflow nor lose the largest; a negative scale is one too."""
    case = sparse_case(4, 8, 576, 512, 60, 32, BF16, device, sink=True)
    case["sm_scale"] = scale
    check_sparse(case)


@pytest.mark.ops("flash_mla_sparse_fwd")
@pytest.mark.parametrize("where", ["q", "latent", "rope"])
@pytest.mark.parametrize("value", [float("nan"), INF, -INF])
def test_values_that_are_not_finite(device, where, value):
    """What is selected counts, NaN and infinities too; heads and tokens without it stay clean."""
    case = sparse_case(4, 5, 96, 64, 60, 32, BF16, device, sink=True)
    if where == "q":
        case["q"][2, 3, 5] = value
    else:
        case["indices"][2, 0, 4] = 11
        case["kv"][11] = 1.0
        case["kv"][11, 0, 7 if where == "latent" else 80] = value
    out, _, lse = check_sparse(case)
    assert torch.isposinf(lse[1]).all()
    assert (out[1] == 0).all()


@pytest.mark.ops("flash_mla_sparse_fwd")
@pytest.mark.parametrize(("d_qk", "d_v"), [(96, 64), (576, 512)])
def test_nan_beside_infinity(device, d_qk, d_v):
    """The largest logit is the infinite one."""
    case = sparse_case(2, 5, d_qk, d_v, 60, 32, BF16, device)
    case["indices"][0, 0, 4:6] = torch.tensor([11, 12], device=device)
    case["kv"][11:13] = 1.0
    case["kv"][11, 0, 7] = INF
    case["kv"][12, 0, 8] = float("nan")
    case["q"][0, :, 7] = 1.0
    _, max_logits, lse = check_sparse(case)
    assert torch.isposinf(max_logits[0]).all()
    assert torch.isnan(lse[0]).all()


@pytest.mark.ops("flash_mla_sparse_fwd")
def test_an_empty_head_beside_infinite_values(device):
    """A head all of whose scores are -inf has zeros, whatever the values."""
    case = sparse_case(3, 5, 96, 64, 60, 32, BF16, device, sink=True)
    case["kv"][..., 7] = -INF
    case["q"][..., 7] = 0
    case["q"][:, 2, 7] = 1
    out, max_logits, lse = check_sparse(case)
    assert (out[:, 2] == 0).all()
    assert (max_logits[:, 2] == -INF).all()
    assert (lse[:, 2] == INF).all()


@pytest.mark.ops("flash_mla_sparse_fwd")
def test_infinite_sinks(device):
    case = sparse_case(3, 4, 576, 512, 60, 32, BF16, device)
    plain = dsa_ext.flash_mla_sparse_fwd(**case)
    case["attn_sink"] = torch.full((4,), -INF, device=device)
    for got, expected in zip(dsa_ext.flash_mla_sparse_fwd(**case), plain, strict=True):
        assert_same_bits(got, expected)
    case["attn_sink"].fill_(INF)
    out, max_logits, lse = dsa_ext.flash_mla_sparse_fwd(**case)
    assert (out == 0).all()
    assert_same_bits(max_logits, plain[1])
    assert_same_bits(lse, plain[2])


@pytest.mark.ops("flash_mla_sparse_fwd")
def test_sparse_fwd_against_dense_softmax(device):
    """Every row selected once: plain softmax attention in fp64."""
    q = torch.randn(3, 4, 576, device=device).to(BF16)
    kv = torch.randn(40, 1, 576, device=device).to(BF16)
    indices = int32(torch.stack([torch.randperm(40) for _ in range(3)])[:, None], device)
    out, max_logits, lse = dsa_ext.flash_mla_sparse_fwd(q, kv, indices, 0.05)
    logits = torch.einsum("shd,kd->shk", q.double(), kv[:, 0].double()) * 0.05
    assert_close(out, logits.softmax(-1) @ kv[:, 0, :512].double(), PREFILL_TOLERANCE)
    assert_lse_close(max_logits, logits.amax(-1))
    assert_lse_close(lse, logits.logsumexp(-1))


@pytest.mark.ops("flash_mla_sparse_fwd")
def test_sparse_fwd_is_deterministic_and_independent_of_the_batch(device):
    case = sparse_case(9, 16, 576, 512, 300, 200, BF16, device, sink=True)
    assert_deterministic(lambda: dsa_ext.flash_mla_sparse_fwd(**case))
    expected = dsa_ext.flash_mla_sparse_fwd(**case)
    order = torch.randperm(9, device=device)
    for rows in (order, order[:1]):
        mixed = case | {"q": case["q"][rows], "indices": case["indices"][rows]}
        for got, whole in zip(dsa_ext.flash_mla_sparse_fwd(**mixed), expected, strict=True):
            assert_same_bits(got, whole[rows])


# ---- flash_mla_with_kvcache, sparse --------------------------------------------------------------


def select_slots(batch, s_q, topk, total, lengths):
    """Slots with repeats and hostile ones; the mask of those that count."""
    indices = int32(torch.randint(0, total, (batch, s_q, topk)))
    indices[torch.rand(indices.shape) < 0.1] = 3 % total
    indices = hostile(indices, 0.15, (INT_MIN, -1, total, total + 1, INT_MAX))
    length = None
    valid = (indices >= 0) & (indices < total)
    if lengths == "b":
        length = int32([topk // 2, 0, INT_MAX, 1, INT_MIN])[:batch]
        valid &= torch.arange(topk) < length[:, None, None]
    elif lengths == "b,s_q":
        length = int32(torch.randint(-1, topk + 3, (batch, s_q)))
        valid &= torch.arange(topk) < length[:, :, None]
    return indices, length, valid


def cache_case(
    name, device, *, batch=3, s_q=2, h_q=8, page_size=64, topk=70, lengths=None, extra=None,
    sink=False, dtype=BF16,
):  # fmt: skip
    """Decode over `name`'s cache; slots nobody selects are NaN. `extra`: the second page size."""
    fmt = FORMATS[name]
    if not fmt.fp8:
        dtype = fmt.dtype

    def side(page_size, topk):
        pages = -(-200 // page_size) + 1
        total = pages * page_size
        indices, length, valid = select_slots(batch, s_q, topk, total, lengths)
        stride = 576 if fmt.name == "v4" else 32
        cache = latent_cache(
            fmt,
            pages,
            page_size,
            indices[valid].long(),
            extra_stride=stride,
            device=device,
        )
        length = None if length is None else length.to(device)
        return cache, spread(indices.to(device)), length

    cache, indices, length = side(page_size, topk)
    case = {
        "q": spread(torch.randn(batch, s_q, h_q, fmt.d_qk).to(device, dtype)),
        "k_cache": cache,
        "block_table": None,
        "cache_seqlens": None,
        "head_dim_v": 512,
        "tile_scheduler_metadata": None,
        "is_fp8_kvcache": fmt.fp8,
        "indices": indices,
        "topk_length": length,
        "attn_sink": random_sink(h_q, device) if sink else None,
    }
    if extra:
        cache, indices, length = side(extra, topk // 2 + 1)
        case |= {
            "extra_k_cache": cache,
            "extra_indices_in_kvcache": indices,
            "extra_topk_length": length,
        }
    return case


def check_cache(case):
    batch, s_q, h_q, _ = case["q"].shape
    device = case["q"].device
    guards = (
        Guarded((batch, s_q, h_q, case["head_dim_v"]), case["q"].dtype, device),
        Guarded((batch, h_q, s_q), FP32, device),
    )
    got = dsa_ext.flash_mla_with_kvcache(**case, out=tuple(g.out for g in guards))
    expected = reference.flash_mla_with_kvcache(**case, out_dtype=FP32)
    out, lse = (guard.check() for guard in guards)
    assert got[0] is guards[0].out
    assert_close(out, expected[0], DECODE_TOLERANCE)
    assert_lse_close(lse, expected[1])
    return out, lse


@pytest.mark.ops("flash_mla_with_kvcache")
@pytest.mark.parametrize("page_size", [1, 2, 37, 64])
@pytest.mark.parametrize("lengths", [None, "b", "b,s_q"], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_sparse_decode(device, name, lengths, page_size):
    check_cache(cache_case(name, device, page_size=page_size, lengths=lengths))


@pytest.mark.ops("flash_mla_with_kvcache")
@pytest.mark.parametrize("lengths", [None, "b", "b,s_q"], ids=str)
@pytest.mark.parametrize("extra", [2, 64, 77])
@pytest.mark.parametrize("name", FORMATS)
def test_sparse_decode_over_two_caches(device, name, extra, lengths):
    """One softmax over both, each with its own page size and lengths; with a sink."""
    check_cache(cache_case(name, device, extra=extra, lengths=lengths, sink=True))


@pytest.mark.ops("flash_mla_with_kvcache")
@pytest.mark.parametrize("h_q", [1, 3, 64, 128])
@pytest.mark.parametrize("name", FORMATS)
def test_sparse_decode_head_counts(device, name, h_q):
    check_cache(cache_case(name, device, h_q=h_q, s_q=1, topk=257, sink=True))


def as_prefill(case):
    """A case of decode without a second cache, as prefill over the same cache."""
    length = case["topk_length"]
    if length is not None:
        length = length.repeat_interleave(case["q"].shape[1]) if length.dim() == 1 else length
        length = length.flatten()
    return {
        "q": case["q"].flatten(0, 1),
        "kv": case["k_cache"],
        "indices": case["indices"].flatten(0, 1).unsqueeze(1),
        "sm_scale": case["q"].shape[-1] ** -0.5,
        "d_v": case["head_dim_v"],
        "attn_sink": case["attn_sink"],
        "topk_length": length,
    }


@pytest.mark.ops("flash_mla_sparse_fwd")
@pytest.mark.parametrize("page_size", [1, 37, 64])
@pytest.mark.parametrize("h_q", [1, 8, 13, 20, 64, 130])
@pytest.mark.parametrize("name", FORMATS)
def test_sparse_fwd_over_caches(device, name, h_q, page_size):
    """Prefill straight from a paged cache is decode, with the largest logits too."""
    case = cache_case(
        name, device, s_q=1, h_q=h_q, page_size=page_size, topk=257, lengths="b", sink=True
    )
    out, _, lse = check_sparse(as_prefill(case), DECODE_TOLERANCE)
    decoded, decoded_lse = check_cache(case)
    assert_close(out, decoded.squeeze(1), DECODE_TOLERANCE)
    assert_lse_close(lse, decoded_lse.squeeze(2))


@pytest.mark.ops("flash_mla_sparse_fwd")
@pytest.mark.parametrize("h_q", [8, 64])
@pytest.mark.parametrize("scale", [-0.05, 0.0, 30.0])
@pytest.mark.parametrize("name", FORMATS)
def test_sparse_fwd_over_caches_of_any_scale(device, name, scale, h_q):
    """The largest logit is below the base of the softmax where scales are far apart."""
    case = as_prefill(cache_case(name, device, h_q=h_q, topk=150))
    check_sparse(case | {"sm_scale": scale}, DECODE_TOLERANCE)


@pytest.mark.ops("flash_mla_sparse_fwd")
@pytest.mark.parametrize("name", FORMATS)
def test_sparse_fwd_over_an_empty_cache(device, name):
    case = as_prefill(cache_case(name, device, s_q=1))
    case["kv"] = case["kv"][:0]
    out, max_logits, lse = dsa_ext.flash_mla_sparse_fwd(**case)
    assert (out == 0).all()
    assert torch.isneginf(max_logits).all()
    assert torch.isposinf(lse).all()


@pytest.mark.parametrize("name", ["v32", "v4"])
def test_fp16_queries_over_fp8_caches(name):
    """On the CPU only: the CUDA kernels keep bf16 RoPE and say so."""
    check_cache(cache_case(name, "cpu", dtype=FP16, sink=True))
    check_sparse(as_prefill(cache_case(name, "cpu", s_q=1, dtype=FP16, sink=True)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_fp16_queries_over_fp8_caches_are_refused_on_cuda():
    with pytest.raises(RuntimeError, match="a bfloat16 q with an 8-bit cache"):
        check_cache(cache_case("v32", "cuda", dtype=FP16, sink=True))
    with pytest.raises(RuntimeError, match="a bfloat16 q with an 8-bit kv"):
        check_sparse(as_prefill(cache_case("v32", "cuda", s_q=1, dtype=FP16, sink=True)))


@pytest.mark.ops("flash_mla_with_kvcache")
@pytest.mark.parametrize("dtype", [torch.int8, E4M3], ids=str)
@pytest.mark.parametrize("name", ["v32", "v4"])
def test_fp8_caches_may_be_declared_otherwise(device, name, dtype):
    case = cache_case(name, device, extra=16)
    expected = dsa_ext.flash_mla_with_kvcache(**case)
    case["k_cache"] = case["k_cache"].view(dtype)
    case["extra_k_cache"] = case["extra_k_cache"].view(dtype)
    for got, same in zip(dsa_ext.flash_mla_with_kvcache(**case), expected, strict=True):
        assert_same_bits(got, same)
    check_sparse(as_prefill(case | {"q": case["q"][:, :1], "indices": case["indices"][:, :1]}))


@pytest.mark.ops("flash_mla_with_kvcache")
@pytest.mark.parametrize("name", ["v32", "v4"])
def test_an_8_bit_cache_is_fp8_whatever_the_flag_says(device, name):
    case = cache_case(name, device, s_q=2, extra=7)
    expected = dsa_ext.flash_mla_with_kvcache(**case)
    assert case.pop("is_fp8_kvcache")
    for flag in ({}, {"is_fp8_kvcache": False}):
        got = dsa_ext.flash_mla_with_kvcache(**case, **flag)
        for result, right in zip(got, expected, strict=True):
            assert_same_bits(result, right)


@pytest.mark.ops("flash_mla_with_kvcache", "flash_mla_sparse_fwd", "merge_attn_states")
def test_out_may_be_the_first_result_alone(device):
    """The others are allocated; and a list does as well as a tuple."""
    calls = [
        (dsa_ext.flash_mla_with_kvcache, cache_case("v32", device)),
        (dsa_ext.flash_mla_sparse_fwd, sparse_case(3, 4, 576, 512, 20, 9, BF16, device)),
        (
            dsa_ext.merge_attn_states,
            {
                "outs": torch.randn(2, 3, 4, 8, device=device),
                "lses": torch.randn(2, 3, 4, device=device),
            },
        ),
    ]
    for function, case in calls:
        expected = function(**case)
        alone = torch.empty_like(expected[0])
        all_of_them = [torch.empty_like(result) for result in expected]
        for out, got in (
            ([alone], function(**case, out=alone)),
            (all_of_them, function(**case, out=all_of_them)),
        ):
            assert isinstance(got, tuple)
            assert all(result is given for result, given in zip(got, out, strict=False))
            for result, right in zip(got, expected, strict=True):
                assert_same_bits(result, right)


@pytest.mark.parametrize("name", ["batch_invariant", "enable_batch_invariant"])
def test_both_names_of_batch_invariance_reach_the_op(monkeypatch, name):
    seen = []
    monkeypatch.setattr(
        "dsa_ext.attention.ops",
        SimpleNamespace(flash_mla_with_kvcache=lambda *arguments: seen.append(arguments[14])),
    )
    case = cache_case("v32", "cpu")
    dsa_ext.flash_mla_with_kvcache(**case)
    dsa_ext.flash_mla_with_kvcache(**case, **{name: True})
    assert seen == [False, True]


def test_scheduling_metadata_has_the_fields_of_flash_mla():
    metadata, num_splits = dsa_ext.get_mla_metadata(torch.zeros(3), 128, num_heads_k=1)
    assert num_splits is None
    assert metadata == dsa_ext.FlashMLASchedMeta(
        have_initialized=False, config=None, tile_scheduler_metadata=None, num_splits=None
    )


@pytest.mark.ops("flash_mla_with_kvcache")
@pytest.mark.parametrize("page_size", [5, 64])
@pytest.mark.parametrize(
    ("d_qk", "d_v"), [(64, 64), (96, 64), (192, 128), (512, 512), (544, 512), (512, 448)]
)
def test_sparse_decode_dimensions(device, d_qk, d_v, page_size):
    indices, _, valid = select_slots(3, 2, 40, 4 * page_size, None)
    case = {
        "q": spread(torch.randn(3, 2, 5, d_qk).to(device, BF16)),
        "k_cache": latent_cache(
            FORMATS["bf16"], 4, page_size, indices[valid].long(), width=d_qk, device=device
        ),
        "block_table": None,
        "cache_seqlens": None,
        "head_dim_v": d_v,
        "tile_scheduler_metadata": None,
        "indices": indices.to(device),
        "softmax_scale": 0.1,
    }
    check_cache(case)


@pytest.mark.ops("flash_mla_with_kvcache")
@pytest.mark.parametrize("name", FORMATS)
def test_sparse_decode_of_rows_with_nothing_valid(device, name):
    case = cache_case(name, device, extra=7, sink=True)
    case["indices"].fill_(-1)
    case["extra_indices_in_kvcache"].fill_(INT_MAX)
    out, lse = dsa_ext.flash_mla_with_kvcache(**case)
    assert (out == 0).all()
    assert torch.isposinf(lse).all()


@pytest.mark.ops("flash_mla_with_kvcache")
@pytest.mark.parametrize("name", FORMATS)
def test_sparse_decode_with_one_cache_empty(device, name):
    """Nothing valid in the first cache, or in the second, leaves the other's result."""
    case = cache_case(name, device, extra=7)
    empty = torch.full_like(case["indices"], -1)
    check_cache(case | {"indices": empty})
    alone = check_cache(
        case | {"extra_indices_in_kvcache": torch.full_like(case["extra_indices_in_kvcache"], -1)}
    )
    without = {k: v for k, v in case.items() if not k.startswith("extra")}
    for got, expected in zip(alone, dsa_ext.flash_mla_with_kvcache(**without), strict=True):
        assert_close(got, expected, DECODE_TOLERANCE)


@pytest.mark.ops("flash_mla_with_kvcache")
@pytest.mark.parametrize("name", FORMATS)
def test_stale_metadata_changes_nothing(device, name):
    case = cache_case(name, device)
    meta, splits = dsa_ext.get_mla_metadata(int32([4, 5], device), 128, 1, num_heads_q=3)
    assert splits is None
    fresh = dsa_ext.flash_mla_with_kvcache(**case)
    stale = [
        (meta, splits),
        (dsa_ext.FlashMLASchedMeta(), int32([INT_MAX, -1], device)),
        (int32(torch.full((9, 8), INT_MAX), device), int32([INT_MIN] * 4, device)),
    ]
    for metadata, num_splits in stale:
        again = case | {"tile_scheduler_metadata": metadata, "num_splits": num_splits}
        for got, expected in zip(dsa_ext.flash_mla_with_kvcache(**again), fresh, strict=True):
            assert_same_bits(got, expected)


@pytest.mark.ops("flash_mla_with_kvcache")
@pytest.mark.parametrize("name", FORMATS)
def test_sparse_decode_is_deterministic_and_batch_invariant(device, name):
    case = cache_case(name, device, batch=5, lengths="b,s_q", extra=9) | {"batch_invariant": True}
    assert_deterministic(lambda: dsa_ext.flash_mla_with_kvcache(**case))
    expected = dsa_ext.flash_mla_with_kvcache(**case)
    order = torch.randperm(5, device=device)
    batched = ("q", "indices", "topk_length", "extra_indices_in_kvcache", "extra_topk_length")
    for rows in (order, order[:1]):
        mixed = case | {key: case[key][rows] for key in batched}
        for got, whole in zip(dsa_ext.flash_mla_with_kvcache(**mixed), expected, strict=True):
            assert_same_bits(got, whole[rows])


@pytest.mark.ops("flash_mla_with_kvcache")
@pytest.mark.parametrize(("batch", "s_q", "pages"), [(0, 1, 2), (2, 0, 2), (2, 1, 0)])
def test_sparse_decode_of_nothing(device, batch, s_q, pages):
    q = torch.randn(batch, s_q, 4, 576, device=device).to(BF16)
    cache = paged(pages, 8, 656, device=device)
    indices = int32(torch.zeros(batch, s_q, 6), device)
    if pages:
        cache.zero_()
    out, lse = dsa_ext.flash_mla_with_kvcache(
        q, cache, None, None, 512, None, is_fp8_kvcache=True, indices=indices
    )
    assert out.shape == (batch, s_q, 4, 512)
    assert lse.shape == (batch, 4, s_q)
    assert (out == 0).all()
    if pages == 0:
        assert torch.isposinf(lse).all()


@pytest.mark.ops("flash_mla_with_kvcache", "flash_mla_sparse_fwd")
def test_decode_equals_prefill_over_the_same_rows(device):
    """One page holding all of kv: slots are rows, so both functions compute the same attention."""
    kv = torch.randn(90, 1, 576, device=device).to(BF16)
    q = torch.randn(4, 16, 576, device=device).to(BF16)
    indices = int32(torch.randint(0, 90, (4, 1, 50)), device)
    prefill = dsa_ext.flash_mla_sparse_fwd(q, kv, indices, 576**-0.5)
    out, lse = dsa_ext.flash_mla_with_kvcache(
        q[:, None], kv[None], None, None, 512, None, indices=indices
    )
    assert_close(out[:, 0], prefill[0], DECODE_TOLERANCE)
    assert_lse_close(lse[:, :, 0], prefill[2])


# ---- flash_mla_with_kvcache, dense ---------------------------------------------------------------


def dense_case(name, device, *, lens=(130, 1, 77, 0, -4), s_q=1, page_size=64, causal=False):
    """Pages shuffled; tokens past a request's length are NaN."""
    fmt = FORMATS[name]
    lens = list(lens)
    pages = sum(max(0, -(-n // page_size)) for n in lens) + 2
    table = permuted_table(lens, page_size, pages)
    slots = [slots_of(table, b, torch.arange(n), page_size) for b, n in enumerate(lens) if n > 0]
    stride = 576 if fmt.name == "v4" else 32
    cache = latent_cache(
        fmt, pages, page_size, torch.cat(slots), extra_stride=stride, device=device
    )
    dtype = BF16 if fmt.fp8 else fmt.dtype
    return {
        "q": spread(torch.randn(len(lens), s_q, 8, fmt.d_qk).to(device, dtype)),
        "k_cache": cache,
        "block_table": spread(table.to(device)),
        "cache_seqlens": spread(int32(lens, device)),
        "head_dim_v": 512,
        "tile_scheduler_metadata": None,
        "is_fp8_kvcache": fmt.fp8,
        "causal": causal,
    }


@pytest.mark.ops("flash_mla_with_kvcache")
@pytest.mark.parametrize(("s_q", "causal"), [(1, False), (1, True), (4, False), (4, True)])
@pytest.mark.parametrize("page_size", [1, 29, 64])
@pytest.mark.parametrize("name", FORMATS)
def test_dense_decode(device, name, page_size, s_q, causal):
    """Causal over several queries leaves the first rows of short requests with no key at all."""
    case = dense_case(name, device, s_q=s_q, page_size=page_size, causal=causal)
    out, lse = check_cache(case)
    assert (out[3:] == 0).all()
    assert torch.isposinf(lse[3:]).all()
    if causal and s_q == 4:  # One token, seen by the last query alone.
        assert torch.isposinf(lse[1, :, :3]).all()
        assert torch.isfinite(lse[1, :, 3]).all()


@pytest.mark.ops("flash_mla_with_kvcache")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_dense_decode_with_sink_and_pages_that_are_gone(device, name, causal):
    case = dense_case(name, device, s_q=3, page_size=16, causal=causal)
    lost = torch.rand(case["block_table"].shape) < 0.3
    pages = case["k_cache"].shape[0]
    gone = hostile(case["block_table"].cpu(), 1.0, (-1, INT_MIN, pages, INT_MAX))
    case["block_table"].copy_(torch.where(lost, gone, case["block_table"].cpu()))
    case["attn_sink"] = random_sink(8, device)
    case["softmax_scale"] = 0.07
    check_cache(case)


@pytest.mark.ops("flash_mla_with_kvcache")
def test_dense_decode_lengths_are_clamped_to_the_table(device):
    case = dense_case("v32", device, lens=(64, 64), page_size=64)
    expected = dsa_ext.flash_mla_with_kvcache(**case)
    case["cache_seqlens"] = int32([INT_MAX, 65], device)
    for got, same in zip(dsa_ext.flash_mla_with_kvcache(**case), expected, strict=True):
        assert_same_bits(got, same)


@pytest.mark.ops("flash_mla_with_kvcache")
@pytest.mark.parametrize("name", FORMATS)
def test_dense_decode_is_the_sparse_one_over_all_tokens(device, name):
    case = dense_case(name, device, lens=(130, 130), page_size=16)
    token = torch.arange(130, device=device)
    slots = torch.stack([slots_of(case["block_table"], b, token, 16) for b in range(2)])
    sparse = case | {"block_table": None, "cache_seqlens": None}
    sparse["indices"] = int32(slots[:, None], device)
    out, lse = dsa_ext.flash_mla_with_kvcache(**case)
    again, same = dsa_ext.flash_mla_with_kvcache(**sparse)
    assert_close(again, out, DECODE_TOLERANCE)
    assert_lse_close(same, lse)


@pytest.mark.ops("flash_mla_with_kvcache")
def test_dense_decode_is_deterministic_and_batch_invariant(device):
    case = dense_case("v4", device, s_q=2, causal=True, page_size=8) | {"batch_invariant": True}
    assert_deterministic(lambda: dsa_ext.flash_mla_with_kvcache(**case))
    expected = dsa_ext.flash_mla_with_kvcache(**case)
    order = torch.randperm(5, device=device)
    for rows in (order, order[:1]):
        mixed = case | {key: case[key][rows] for key in ("q", "block_table", "cache_seqlens")}
        for got, whole in zip(dsa_ext.flash_mla_with_kvcache(**mixed), expected, strict=True):
            assert_same_bits(got, whole[rows])


@pytest.mark.ops("flash_mla_with_kvcache")
def test_dense_decode_by_position(device):
    """All positional, in FlashMLA's order, with its scheduling calls."""
    case = dense_case("bf16", device, s_q=2, causal=True)
    meta, num_splits = dsa_ext.get_mla_metadata(case["cache_seqlens"], 2 * 8 // 1, 1)
    out, lse = dsa_ext.flash_mla_with_kvcache(
        case["q"],
        case["k_cache"],
        case["block_table"],
        case["cache_seqlens"],
        512,
        meta,
        num_splits,
        0.05,
        True,
        False,
    )
    expected = reference.flash_mla_with_kvcache(**case, softmax_scale=0.05, out_dtype=FP32)
    assert_close(out, expected[0], DECODE_TOLERANCE)
    assert_lse_close(lse, expected[1])


# ---- merge_attn_states ---------------------------------------------------------------------------


def states(n, lead, h, d, dtype, device):
    """Parts of which some are empty: lse +inf or -inf, out NaN."""
    outs = torch.randn(n, *lead, h, d).to(dtype)
    lses = torch.randn(n, *lead, h) * 4
    empty = torch.rand(lses.shape) < 0.25
    lses[empty] = torch.where(torch.rand(int(empty.sum())) < 0.5, INF, -INF)
    outs[empty] = float("nan")
    return outs.to(device), lses.to(device)


@pytest.mark.ops("merge_attn_states")
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("lead", [(), (5,), (3, 4)], ids=str)
@pytest.mark.parametrize(("n", "h", "d"), [(1, 1, 64), (2, 3, 512), (9, 16, 40)])
def test_merge(device, n, h, d, lead, dtype):
    outs, lses = states(n, lead, h, d, dtype, device)
    out = Guarded((*lead, h, d), dtype, device)
    lse = Guarded((*lead, h), FP32, device)
    dsa_ext.merge_attn_states(spread(outs), spread(lses), out=(out.out, lse.out))
    expected = reference.merge_attn_states(outs, lses, out_dtype=FP32)
    assert_close(out.check(), expected[0], DECODE_TOLERANCE)
    assert_lse_close(lse.check(), expected[1])


@pytest.mark.ops("merge_attn_states")
def test_merge_of_lists(device):
    outs, lses = states(3, (4,), 2, 64, BF16, device)
    got = dsa_ext.merge_attn_states(list(outs), list(lses))
    for a, b in zip(got, dsa_ext.merge_attn_states(outs, lses), strict=True):
        assert_same_bits(a, b)


@pytest.mark.ops("merge_attn_states")
@pytest.mark.parametrize("n", [0, 1, 4])
def test_merge_of_empty_parts(device, n):
    outs = torch.full((n, 3, 2, 64), float("nan"), device=device)
    lses = torch.full((n, 3, 2), INF, device=device)
    lses[::2] = -INF
    out, lse = dsa_ext.merge_attn_states(outs, lses)
    assert torch.equal(out, torch.zeros(3, 2, 64, device=device))
    assert torch.equal(lse, torch.full((3, 2), INF, device=device))


@pytest.mark.ops("merge_attn_states")
def test_merge_with_an_empty_part_or_alone_keeps_the_result(device):
    outs = torch.randn(1, 6, 2, 64, device=device)
    lses = torch.randn(1, 6, 2, device=device) * 300
    nothing = torch.full_like(lses, INF)
    with_empty = torch.cat([torch.full_like(outs, float("nan")), outs])
    for args in ((outs, lses), (with_empty, torch.cat([nothing, lses]))):
        out, lse = dsa_ext.merge_attn_states(*args)
        torch.testing.assert_close(out, outs[0], rtol=1e-6, atol=0)
        assert_lse_close(lse, lses[0])


@pytest.mark.ops("merge_attn_states", "flash_mla_sparse_fwd")
def test_merge_of_splits_is_attention_over_all(device):
    case = sparse_case(5, 4, 576, 512, 200, 120, BF16, device)
    whole = dsa_ext.flash_mla_sparse_fwd(**case)
    parts = [
        dsa_ext.flash_mla_sparse_fwd(**case | {"indices": part})
        for part in case["indices"].split(50, dim=-1)
    ]
    out, lse = dsa_ext.merge_attn_states([p[0].float() for p in parts], [p[2] for p in parts])
    assert_close(out, whole[0], PREFILL_TOLERANCE)
    assert_lse_close(lse, whole[2])


@pytest.mark.ops("merge_attn_states")
def test_merge_is_deterministic_and_independent_of_the_batch(device):
    outs, lses = states(7, (50,), 4, 128, BF16, device)
    assert_deterministic(lambda: dsa_ext.merge_attn_states(outs, lses))
    expected = dsa_ext.merge_attn_states(outs, lses)
    order = torch.randperm(50, device=device)
    got = dsa_ext.merge_attn_states(outs[:, order], lses[:, order])
    for a, b in zip(got, expected, strict=True):
        assert_same_bits(a, b[order])

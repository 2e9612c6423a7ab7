# SPDX-License-Identifier: Apache-2.0
"""Arbitrary metadata and shapes, zero sizes included: never a crash, always the reference's result.

Tensors are exactly as large as their shapes, so that under AddressSanitizer (make asan) any access
beside them shows.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dsa_ext
from dsa_ext import reference
from helpers import (
    DECODE_TOLERANCE,
    FORMATS,
    HOSTILE_INTS,
    LOGITS_TOLERANCE,
    PREFILL_TOLERANCE,
    assert_close,
    assert_lse_close,
    assert_same_bits,
    exact_e4m3,
    latent_cache,
    odd_scales,
    paged,
    put_indexer_keys,
    random_e4m3,
)

BF16 = torch.bfloat16
HOSTILE_INT64S = (*HOSTILE_INTS, -(2**63), 2**63 - 1, 2**32, 2**32 + 1, -(2**32))


def ints(shape, bound: int, values=HOSTILE_INTS, dtype=torch.int32) -> st.SearchStrategy:
    """An int tensor: entries around [0, bound], or hostile."""
    count = torch.Size(shape).numel()
    entry = st.one_of(st.integers(-2, bound + 2), st.sampled_from(values))
    entries = st.lists(entry, min_size=count, max_size=count)
    return entries.map(lambda values: torch.tensor(values, dtype=dtype).reshape(shape))


def slot_mappings(tokens: int, slots: int) -> st.SearchStrategy:
    """int32 or int64; no slot twice."""

    def distinct(slot: torch.Tensor) -> torch.Tensor:
        first = {}
        for i, value in enumerate(slot.tolist()):
            first.setdefault(value, i)
        kept = [i == first[value] for i, value in enumerate(slot.tolist())]
        return torch.where(torch.tensor(kept, dtype=torch.bool), slot, -1)

    narrow = ints((tokens,), slots)
    wide = ints((tokens,), slots, HOSTILE_INT64S, torch.int64)
    return st.one_of(narrow, wide).map(distinct)


def sizes(most: int, least: int = 0) -> st.SearchStrategy:
    return st.integers(least, most)


# ---- indexer -------------------------------------------------------------------------------------


@pytest.mark.ops("fp8_mqa_logits", "fp8_mqa_topk")
@given(data=st.data(), S=sizes(5), L=sizes(40), H=sizes(5, 1), k=sizes(50, 1), width=sizes(50))
def test_prefill_windows(device, data, S, L, H, k, width):
    q, key = exact_e4m3(S, H, 32, device=device), exact_e4m3(L, 32, device=device)
    kv, weights = (key, odd_scales(L, device=device)), torch.randn(S, H, device=device).round()
    window = data.draw(ints((2, S), L)).to(device)
    start, end = window.unbind()
    logits = dsa_ext.fp8_mqa_logits(q, kv, weights, start, end, True, width)
    assert_close(
        logits,
        reference.fp8_mqa_logits(q, kv, weights, start, end, True, width),
        LOGITS_TOLERANCE,
    )
    full = dsa_ext.fp8_mqa_logits(q, kv, weights, start, end)
    assert_close(full, reference.fp8_mqa_logits(q, kv, weights, start, end), LOGITS_TOLERANCE)
    # Exact dot products and one scale: the fused top-k must agree to the bit, ties and all.
    kv = (key, torch.ones(L, device=device))
    got = dsa_ext.fp8_mqa_topk(q, kv, weights, start, end, k)
    assert_same_bits(got, reference.fp8_mqa_topk(q, kv, weights, start, end, k))


@pytest.mark.ops("fp8_paged_mqa_logits", "fp8_paged_mqa_topk")
@given(
    data=st.data(),
    B=sizes(3),
    next_n=sizes(3),
    P=sizes(4),
    pages=sizes(4),
    page_size=sizes(5, 1),
    max_context_len=sizes(25),
    two_d=st.booleans(),
    slots=st.booleans(),
    k=sizes(12, 1),
)
def test_paged_logits(
    device, data, B, next_n, P, pages, page_size, max_context_len, two_d, slots, k
):
    q = exact_e4m3(B, next_n, 2, 32, device=device)
    cache = paged(pages, page_size, 36, device=device)
    every = torch.arange(pages * page_size, device=device)
    keys = exact_e4m3(len(every), 32, device=device)
    put_indexer_keys(cache, every, keys, torch.full((len(every),), 0.5, device=device))
    weights = torch.randn(B * next_n, 2, device=device).round()
    lens = data.draw(ints((B, next_n) if two_d else (B,), P * page_size)).to(device)
    table = data.draw(ints((B, P), pages)).to(device)
    schedule = data.draw(st.none() | ints((3, 2), 4))
    schedule = None if schedule is None else schedule.to(device)
    args = (q, cache, weights, lens, table, schedule, max_context_len)
    logits = dsa_ext.fp8_paged_mqa_logits(*args, clean_logits=True)
    assert_close(logits, reference.fp8_paged_mqa_logits(*args), LOGITS_TOLERANCE)
    got = dsa_ext.fp8_paged_mqa_topk(*args, k, return_slots=slots, return_scores=True)
    expected = reference.fp8_paged_mqa_topk(*args, k, return_slots=slots, return_scores=True)
    assert_same_bits(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


@pytest.mark.ops("get_paged_mqa_logits_metadata")
@given(data=st.data(), B=sizes(6), next_n=sizes(3), num_sms=sizes(20, 1), two_d=st.booleans())
def test_schedules(device, data, B, next_n, num_sms, two_d):
    lens = data.draw(ints((B, next_n) if two_d else (B,), 2000)).to(device)
    ids = data.draw(st.none() | ints((B,), 3))
    ids = None if ids is None else ids.to(device)
    got = dsa_ext.get_paged_mqa_logits_metadata(lens, 64, num_sms, ids)
    assert_same_bits(got, reference.get_paged_mqa_logits_metadata(lens, 64, num_sms, ids))


# ---- selection -----------------------------------------------------------------------------------


@pytest.mark.ops("topk_select")
@given(
    data=st.data(),
    requests=sizes(3),
    per_request=sizes(3),
    N=sizes(30),
    P=sizes(4),
    page_size=st.sampled_from([1, 2, 7, 2**31 - 1]),
    k=sizes(35, 1),
)
def test_select(device, data, requests, per_request, N, P, page_size, k):
    R = requests * per_request
    scores = torch.randn(R, N, device=device).mul(3).round()
    scores[torch.rand(R, N) < 0.1] = float("nan")
    kwargs = {}
    for name in ("row_starts", "row_ends"):
        if data.draw(st.booleans()):
            kwargs[name] = data.draw(ints((R,), N)).to(device)
    if data.draw(st.booleans()):
        kwargs["block_table"] = data.draw(ints((requests, P), 9)).to(device)
        kwargs["page_size"] = page_size
        if data.draw(st.booleans()):
            kwargs["row_to_request"] = data.draw(ints((R,), requests)).to(device)
    base = data.draw(st.none() | st.sampled_from(HOSTILE_INTS) | ints((R,), P))
    kwargs["index_base"] = base.to(device) if isinstance(base, torch.Tensor) else base
    got = dsa_ext.topk_select(scores, k, **kwargs, return_scores=True)
    expected = reference.topk_select(scores, k, **kwargs, return_scores=True)
    assert_same_bits(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1], rtol=0, atol=0, equal_nan=True)


@pytest.mark.ops("map_to_slots")
@given(
    data=st.data(),
    B=sizes(3),
    per_request=sizes(3),
    k=sizes(6),
    P=sizes(4),
    page_size=st.sampled_from([1, 2, 7, 2**31 - 1]),
    flat=st.booleans(),
)
def test_map(device, data, B, per_request, k, P, page_size, flat):
    shape = (B * per_request, k) if flat else (B, per_request, k)
    indices = data.draw(ints(shape, P * page_size)).to(device)
    table = data.draw(ints((B, P), 9)).to(device)
    request = data.draw(st.none() | ints((B * per_request,), B))
    request = None if request is None else request.to(device)
    got = dsa_ext.map_to_slots(indices, table, page_size, request)
    assert_same_bits(got, reference.map_to_slots(indices, table, page_size, request))


@pytest.mark.ops("merge_topk")
@given(data=st.data(), R=sizes(4), N=sizes(30), k=sizes(35, 1))
def test_merge(device, data, R, N, k):
    scores = torch.randn(R, N, device=device).mul(2).round()
    scores[torch.rand(R, N) < 0.1] = float("nan")
    indices = data.draw(ints((R, N), 20)).to(device)
    got = dsa_ext.merge_topk(scores, indices, k, return_scores=True)
    expected = reference.merge_topk(scores, indices, k, return_scores=True)
    assert_same_bits(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1], rtol=0, atol=0, equal_nan=True)


# ---- attention -----------------------------------------------------------------------------------


@pytest.mark.ops("flash_mla_sparse_fwd")
@given(data=st.data(), s_q=sizes(4), h_q=sizes(4, 1), s_kv=sizes(9), topk=sizes(9))
def test_sparse_fwd(device, data, s_q, h_q, s_kv, topk):
    case = {
        "q": torch.randn(s_q, h_q, 96).to(device, BF16),
        "kv": torch.randn(s_kv, 1, 96).to(device, BF16),
        "indices": data.draw(ints((s_q, 1, topk), s_kv)).to(device),
        "sm_scale": 0.2,
        "d_v": 64,
    }
    if data.draw(st.booleans()):
        case["topk_length"] = data.draw(ints((s_q,), topk)).to(device)
    if data.draw(st.booleans()):
        case["attn_sink"] = torch.randn(h_q, device=device)
    got = dsa_ext.flash_mla_sparse_fwd(**case)
    expected = reference.flash_mla_sparse_fwd(**case, out_dtype=torch.float32)
    assert_close(got[0], expected[0], PREFILL_TOLERANCE)
    assert_lse_close(got[1], expected[1])
    assert_lse_close(got[2], expected[2])


def lengths(data, batch, s_q, bound, device):
    """topk_length: none, [b] or [b, s_q]."""
    shape = data.draw(st.sampled_from([None, (batch,), (batch, s_q)]))
    return None if shape is None else data.draw(ints(shape, bound)).to(device)


@pytest.mark.ops("flash_mla_with_kvcache")
@pytest.mark.parametrize("name", FORMATS)
@given(
    data=st.data(),
    batch=sizes(3),
    s_q=sizes(2),
    h_q=sizes(3, 1),
    pages=sizes(3),
    page_size=sizes(4, 1),
    topk=sizes(6),
    extra=st.none() | sizes(5),
)
def test_sparse_decode(device, name, data, batch, s_q, h_q, pages, page_size, topk, extra):
    fmt = FORMATS[name]

    def cache(page_size):
        return latent_cache(fmt, pages, page_size, torch.arange(pages * page_size), device=device)

    case = {
        "q": torch.randn(batch, s_q, h_q, fmt.d_qk).to(device, BF16 if fmt.fp8 else fmt.dtype),
        "k_cache": cache(page_size),
        "block_table": None,
        "cache_seqlens": None,
        "head_dim_v": 512,
        "tile_scheduler_metadata": None,
        "is_fp8_kvcache": fmt.fp8,
        "indices": data.draw(ints((batch, s_q, topk), pages * page_size)).to(device),
        "topk_length": lengths(data, batch, s_q, topk, device),
    }
    if extra is not None:
        slots = data.draw(ints((batch, s_q, extra), pages * 3)).to(device)
        case |= {
            "extra_k_cache": cache(3),
            "extra_indices_in_kvcache": slots,
            "extra_topk_length": lengths(data, batch, s_q, extra, device),
        }
    out, lse = dsa_ext.flash_mla_with_kvcache(**case)
    expected = reference.flash_mla_with_kvcache(**case, out_dtype=torch.float32)
    assert_close(out, expected[0], DECODE_TOLERANCE)
    assert_lse_close(lse, expected[1])


@pytest.mark.ops("flash_mla_with_kvcache")
@pytest.mark.parametrize("name", FORMATS)
@given(
    data=st.data(),
    batch=sizes(3),
    s_q=sizes(3),
    pages=sizes(3),
    page_size=sizes(4, 1),
    P=sizes(3),
    causal=st.booleans(),
)
def test_dense_decode(device, name, data, batch, s_q, pages, page_size, P, causal):
    fmt = FORMATS[name]
    case = {
        "q": torch.randn(batch, s_q, 2, fmt.d_qk).to(device, BF16 if fmt.fp8 else fmt.dtype),
        "k_cache": latent_cache(
            fmt, pages, page_size, torch.arange(pages * page_size), device=device
        ),
        "block_table": data.draw(ints((batch, P), pages)).to(device),
        "cache_seqlens": data.draw(ints((batch,), P * page_size)).to(device),
        "head_dim_v": 512,
        "tile_scheduler_metadata": None,
        "is_fp8_kvcache": fmt.fp8,
        "causal": causal,
    }
    out, lse = dsa_ext.flash_mla_with_kvcache(**case)
    expected = reference.flash_mla_with_kvcache(**case, out_dtype=torch.float32)
    assert_close(out, expected[0], DECODE_TOLERANCE)
    assert_lse_close(lse, expected[1])


@pytest.mark.ops("merge_attn_states")
@given(data=st.data(), n=sizes(4), rows=sizes(3), h=sizes(3), d=sizes(9))
def test_merge_states(device, data, n, rows, h, d):
    count = n * rows * h
    kinds = st.sampled_from([float("inf"), -float("inf"), 0.0, -1e4, 1e4, 88.0, 3.5])
    lses = torch.tensor(data.draw(st.lists(kinds, min_size=count, max_size=count)))
    lses = lses.reshape(n, rows, h).float().to(device)
    outs = torch.randn(n, rows, h, d, device=device)
    outs[torch.isinf(lses)] = float("nan")
    out, lse = dsa_ext.merge_attn_states(outs, lses)
    expected = reference.merge_attn_states(outs, lses)
    assert_close(out, expected[0], DECODE_TOLERANCE)
    assert_lse_close(lse, expected[1])


# ---- caches --------------------------------------------------------------------------------------


@pytest.mark.ops("indexer_k_quant_and_cache", "gather_indexer_k_cache")
@given(
    data=st.data(),
    tokens=sizes(8),
    pages=sizes(3),
    page_size=sizes(4, 1),
    D=st.sampled_from([4, 32, 128]),
    B=sizes(3),
    P=sizes(3),
    num_tokens=sizes(15),
)
def test_indexer_cache(device, data, tokens, pages, page_size, D, B, P, num_tokens):
    k = torch.randn(tokens, D, device=device)
    slots = data.draw(slot_mappings(tokens, pages * page_size)).to(device)
    cache, twin = (paged(pages, page_size, D + 4, device=device) for _ in range(2))
    dsa_ext.indexer_k_quant_and_cache(k, cache, slots)
    reference.indexer_k_quant_and_cache(k, twin, slots)
    assert_same_bits(cache, twin)
    table = data.draw(ints((B, P), pages)).to(device)
    cu_seqlens = data.draw(ints((B + 1,), num_tokens)).to(device)
    got = dsa_ext.gather_indexer_k_cache(cache, table, cu_seqlens, num_tokens)
    expected = reference.gather_indexer_k_cache(cache, table, cu_seqlens, num_tokens)
    assert_same_bits(got[0], expected[0])
    assert_same_bits(got[1], expected[1])


@pytest.mark.ops("mla_kv_quant_and_cache", "gather_mla_kv_cache")
@pytest.mark.parametrize("name", FORMATS)
@given(
    data=st.data(),
    tokens=sizes(6),
    pages=sizes(3),
    page_size=sizes(4, 1),
    B=sizes(3),
    P=sizes(3),
    num_tokens=sizes(12),
)
def test_mla_cache(device, name, data, tokens, pages, page_size, B, P, num_tokens):
    fmt = FORMATS[name]
    dtype = BF16 if fmt.fp8 else fmt.dtype
    kv_c = torch.randn(tokens, fmt.d_qk - 64).to(device, dtype)
    k_pe = torch.randn(tokens, 64).to(device, dtype)
    slots = data.draw(slot_mappings(tokens, pages * page_size)).to(device)
    cache, twin = (
        paged(pages, page_size, fmt.width, dtype=fmt.dtype, device=device) for _ in range(2)
    )
    dsa_ext.mla_kv_quant_and_cache(kv_c, k_pe, cache, slots)
    reference.mla_kv_quant_and_cache(kv_c, k_pe, twin, slots)
    assert_same_bits(cache, twin)
    table = data.draw(ints((B, P), pages)).to(device)
    cu_seqlens = data.draw(ints((B + 1,), num_tokens)).to(device)
    got = dsa_ext.gather_mla_kv_cache(cache, table, cu_seqlens, num_tokens)
    expected = reference.gather_mla_kv_cache(cache, table, cu_seqlens, num_tokens)
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


# ---- shapes of the ops without metadata ----------------------------------------------------------


@pytest.mark.ops("hadamard_transform", "per_token_cast_to_fp8")
@given(lead=st.lists(sizes(3), max_size=3), log_n=sizes(8), n=sizes(300), ue8m0=st.booleans())
def test_quantisation_shapes(device, lead, log_n, n, ue8m0):
    x = torch.randn(*lead, 2**log_n, device=device)
    assert_close(dsa_ext.hadamard_transform(x), reference.hadamard_transform(x), 1e-12)
    x = random_e4m3(*lead, n, std=100.0).float().to(device)
    got = dsa_ext.per_token_cast_to_fp8(x, ue8m0)
    expected = reference.per_token_cast_to_fp8(x, ue8m0)
    assert_same_bits(got[0], expected[0])
    assert_same_bits(got[1], expected[1])

# SPDX-License-Identifier: Apache-2.0
"""Calls as users of DeepGEMM, FlashMLA and sgl_kernel make them, word for word, against the oracle.

Each case keeps its caller's positions and keywords: what is renamed, reordered or refused here
breaks an engine. The comment names the caller.
"""

from __future__ import annotations

import pytest
import torch

import dsa_ext as deep_gemm
import dsa_ext as flash_mla
from dsa_ext import reference
from helpers import (
    DECODE_TOLERANCE,
    E4M3,
    FORMATS,
    LOGITS_TOLERANCE,
    PREFILL_TOLERANCE,
    assert_close,
    assert_lse_close,
    assert_same_bits,
    int32,
    latent_cache,
    odd_scales,
    paged,
    permuted_table,
    put_indexer_keys,
    random_e4m3,
    slots_of,
)

BF16, FP32 = torch.bfloat16, torch.float32
INDEXER = ("fp8_mqa_logits", "fp8_paged_mqa_logits", "get_paged_mqa_logits_metadata")


# ---- DeepGEMM: indexer logits --------------------------------------------------------------------


class Prefill:
    """Keys of two requests side by side; each query sees its own request up to itself."""

    def __init__(self, device):
        self.q = random_e4m3(7, 64, 128, device=device)
        self.kv = (random_e4m3(90, 128, device=device), odd_scales(90, device=device))
        self.weights = torch.randn(7, 64, device=device)
        self.ks = int32([0, 0, 0, 0, 50, 50, 50], device)
        self.ke = int32([20, 30, 40, 50, 60, 77, 90], device)
        self.seen = torch.arange(90, device=device) >= self.ks[:, None]
        self.seen &= torch.arange(90, device=device) < self.ke[:, None]

    def expected(self, **options):
        return reference.fp8_mqa_logits(self.q, self.kv, self.weights, self.ks, self.ke, **options)

    def check(self, logits, **options):
        expected = self.expected(**options)
        seen = expected > -float("inf")
        assert logits.shape == expected.shape
        assert logits.dtype == expected.dtype
        assert_close(logits[seen].float(), expected[seen].float(), LOGITS_TOLERANCE)


@pytest.mark.ops(*INDEXER)
def test_prefill_logits(device):
    x = Prefill(device)
    q, kv, weights, ks, ke = x.q, x.kv, x.weights, x.ks, x.ke
    # vLLM, utils/deep_gemm.py: the current name for FP8 too.
    x.check(deep_gemm.fp8_fp4_mqa_logits((q, None), kv, weights, ks, ke, clean_logits=False))
    # SGLang
    x.check(deep_gemm.fp8_mqa_logits(q, kv, weights, ks, ke, clean_logits=False))
    # TensorRT-LLM
    logits = deep_gemm.fp8_mqa_logits(q, (kv[0], kv[1]), weights, ks, ke)
    x.check(logits)
    assert (logits[~x.seen] == -float("inf")).all()


@pytest.mark.ops(*INDEXER)
@pytest.mark.parametrize("logits_dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("compressed", [False, True])
def test_prefill_logits_of_deep_gemms_tests(device, compressed, logits_dtype):
    x = Prefill(device)
    max_seqlen_k = int((x.ke - x.ks).max()) if compressed else 0
    kernel_kwargs = {
        "q": (x.q, None),
        "kv": x.kv,
        "weights": x.weights,
        "cu_seq_len_k_start": x.ks,
        "cu_seq_len_k_end": x.ke,
        "clean_logits": not compressed,
        "max_seqlen_k": max_seqlen_k,
        "logits_dtype": logits_dtype,
    }
    logits = deep_gemm.fp8_fp4_mqa_logits(**kernel_kwargs)
    expected = x.expected(max_seqlen_k=max_seqlen_k, logits_dtype=FP32)
    seen = expected > -float("inf")
    assert logits.dtype == logits_dtype
    tolerance = LOGITS_TOLERANCE if logits_dtype == FP32 else 1e-4
    assert_close(logits[seen].float(), expected[seen], tolerance)


class Decode:
    """Three requests of `next_n` tokens, the last of them empty."""

    def __init__(self, device, next_n):
        self.lens, pages, self.page_size = [130, 70, 0], 5, 64
        self.table = permuted_table(self.lens, self.page_size, pages, device=device)
        self.cache = paged(pages, self.page_size, 132, device=device)
        for request, length in enumerate(self.lens):
            slots = slots_of(self.table, request, torch.arange(length, device=device), 64)
            keys, scales = random_e4m3(length, 128), odd_scales(length)
            put_indexer_keys(self.cache, slots, keys.to(device), scales.to(device))
        self.q = random_e4m3(3, next_n, 64, 128, device=device)
        self.weights = torch.randn(3 * next_n, 64, device=device)
        self.context_lens = int32(self.lens, device)
        lane = torch.arange(next_n, device=device)
        own = self.context_lens[:, None] - next_n + 1 + lane
        self.own_lens = own.clamp(min=0).int()
        self.width = 192

    def check(self, logits):
        expected = reference.fp8_paged_mqa_logits(
            *(self.q, self.cache, self.weights, self.context_lens, self.table, None, self.width)
        )
        seen = torch.arange(self.width, device=logits.device) < self.own_lens.reshape(-1, 1)
        assert logits.shape == expected.shape
        assert_close(logits[seen], expected[seen], LOGITS_TOLERANCE)


@pytest.mark.ops(*INDEXER)
@pytest.mark.parametrize("next_n", [1, 2])
def test_paged_logits(device, next_n):
    x = Decode(device, next_n)
    q, cache, weights, table = x.q, x.cache, x.weights, x.table
    num_sms = deep_gemm.get_num_sms()
    schedule = deep_gemm.get_paged_mqa_logits_metadata(x.own_lens, 64, num_sms)
    assert schedule.shape == (num_sms + 1, 2)
    # vLLM, utils/deep_gemm.py
    x.check(
        deep_gemm.fp8_fp4_paged_mqa_logits(
            (q, None), cache, weights, x.own_lens, table, schedule, x.width, clean_logits=False
        )
    )
    # SGLang
    x.check(
        deep_gemm.fp8_paged_mqa_logits(
            q, cache, weights, x.own_lens, table, schedule, x.width, clean_logits=False
        )
    )
    # TensorRT-LLM: one length a request.
    x.check(
        deep_gemm.fp8_paged_mqa_logits(q, cache, weights, x.context_lens, table, schedule, x.width)
    )


@pytest.mark.ops(*INDEXER)
def test_paged_logits_of_variable_length_callers(device):
    """DeepGEMM's tests: a row for each query token, `indices` its request, 9th positional."""
    x = Decode(device, 2)
    q, weights = x.q.flatten(0, 1).unsqueeze(1), x.weights
    lens, table = x.own_lens.reshape(-1, 1), x.table.repeat_interleave(2, 0)
    indices = int32([0, 0, 1, 1, 2, 2], device)
    schedule = deep_gemm.get_paged_mqa_logits_metadata(
        lens, 64, deep_gemm.get_num_sms(), indices=indices
    )
    kernel_kwargs = {
        "q": (q, None),
        "kv_cache": x.cache,
        "weights": weights,
        "context_lens": lens,
        "block_table": table,
        "schedule_meta": schedule,
        "max_context_len": x.width,
        "clean_logits": True,
        "logits_dtype": FP32,
        "indices": indices,
    }
    logits = deep_gemm.fp8_fp4_paged_mqa_logits(**kernel_kwargs)
    x.check(logits)
    legacy = deep_gemm.fp8_paged_mqa_logits(
        q, x.cache, weights, lens, table, schedule, x.width, True, indices
    )
    assert_same_bits(legacy, logits)
    current = deep_gemm.fp8_fp4_paged_mqa_logits(
        (q, None), x.cache, weights, lens, table, schedule, x.width, True, FP32, indices
    )
    assert_same_bits(current, logits)


@pytest.mark.ops("per_token_cast_to_fp8")
def test_cast_of_deep_gemms_tests(device):
    x = torch.randn(9, 512, device=device).to(BF16)
    expected = reference.per_token_cast_to_fp8(x, True)
    for got in (
        deep_gemm.per_token_cast_to_fp8(x, use_ue8m0=True),
        deep_gemm.per_token_cast_to_fp8(x, True, 128, False),
        deep_gemm.per_token_cast_to_fp8(x, use_ue8m0=True, gran_k=128, use_packed_ue8m0=False),
    ):
        for result, right in zip(got, expected, strict=True):
            assert_same_bits(result, right)


# ---- FlashMLA: attention -------------------------------------------------------------------------


def check_attention(got, expected, tolerance):
    assert_close(got[0], expected[0], tolerance)
    for result, right in zip(got[1:], expected[1:], strict=True):
        assert_lse_close(result, right)


@pytest.mark.ops("flash_mla_sparse_fwd")
def test_sparse_prefill(device):
    q = torch.randn(5, 16, 576).to(device, BF16)
    kv = torch.randn(80, 1, 576).to(device, BF16)
    indices = int32(torch.randint(-3, 90, (5, 1, 64)), device)
    sink, lengths = torch.randn(16, device=device), int32([64, 1, 0, 30, 64], device)
    scale = 576**-0.5
    expected = reference.flash_mla_sparse_fwd(q, kv, indices, scale, out_dtype=FP32)
    # vLLM, flashmla_sparse.py, and TensorRT-LLM
    out = flash_mla.flash_mla_sparse_fwd(q, kv.view(-1, 1, 576), indices.view(5, 1, -1), scale)[0]
    assert_close(out, expected[0], PREFILL_TOLERANCE)
    # vLLM's fork of FlashMLA: the output alone is given.
    out = torch.empty(5, 16, 512, dtype=BF16, device=device)
    got = flash_mla.flash_mla_sparse_fwd(q, kv, indices, scale, out=out)
    assert got[0] is out
    check_attention(got, expected, PREFILL_TOLERANCE)
    # SGLang
    got = flash_mla.flash_mla_sparse_fwd(q=q, kv=kv, indices=indices, sm_scale=scale, d_v=512)
    check_attention(got, expected, PREFILL_TOLERANCE)
    # FlashMLA, tests/lib.py
    got = flash_mla.flash_mla_sparse_fwd(
        q, kv, indices, sm_scale=scale, attn_sink=sink, topk_length=lengths
    )
    expected = reference.flash_mla_sparse_fwd(
        q, kv, indices, scale, 512, sink, lengths, out_dtype=FP32
    )
    check_attention(got, expected, PREFILL_TOLERANCE)


class Sparse:
    """Sparse decode over FP8 pages, and a second cache beside."""

    def __init__(self, name, device, page_size=64):
        fmt = FORMATS[name]
        self.q = torch.randn(3, 2, 16, fmt.d_qk).to(device, BF16)
        every = torch.arange(4 * page_size)
        self.cache = latent_cache(fmt, 4, page_size, every, device=device)
        self.extra = latent_cache(fmt, 4, 2, torch.arange(8), device=device)
        self.indices = int32(torch.randint(-3, 4 * page_size + 3, (3, 2, 64)), device)
        self.extra_indices = int32(torch.randint(-1, 9, (3, 2, 5)), device)
        self.topk_length = int32([64, 7, 0], device)
        self.extra_topk_length = int32([5, 0, 2], device)
        self.sink = torch.randn(16, device=device)
        self.scale = fmt.d_qk**-0.5

    def check(self, got, **options):
        expected = reference.flash_mla_with_kvcache(
            *(self.q, self.cache, None, None, 512, None),
            indices=self.indices,
            out_dtype=FP32,
            **options,
        )
        check_attention(got, expected, DECODE_TOLERANCE)

    def both(self):
        return {
            "attn_sink": self.sink,
            "extra_k_cache": self.extra,
            "extra_indices_in_kvcache": self.extra_indices,
            "topk_length": self.topk_length,
            "extra_topk_length": self.extra_topk_length,
        }


@pytest.mark.ops("flash_mla_with_kvcache")
def test_sparse_decode_of_v32(device):
    x = Sparse("v32", device)
    metadata, num_splits = flash_mla.get_mla_metadata()
    assert not metadata.have_initialized
    assert metadata.tile_scheduler_metadata is None
    # vLLM, flashmla_sparse.py: a block table that is not used, the cache without its heads.
    got = flash_mla.flash_mla_with_kvcache(
        q=x.q,
        k_cache=x.cache.squeeze(2).view(torch.uint8).unsqueeze(-2),
        block_table=torch.empty((3, 0), dtype=torch.int32, device=device),
        head_dim_v=512,
        cache_seqlens=int32([256, 256, 256], device),
        tile_scheduler_metadata=metadata,
        is_fp8_kvcache=True,
        indices=x.indices,
        softmax_scale=x.scale,
    )
    x.check(got)
    # vLLM's fork: the output alone is given.
    out = torch.empty(3, 2, 16, 512, dtype=BF16, device=device)
    got = flash_mla.flash_mla_with_kvcache(
        *(x.q, x.cache, None, None, 512, metadata), is_fp8_kvcache=True, indices=x.indices, out=out
    )
    assert got[0] is out
    x.check(got)
    # SGLang
    got = flash_mla.flash_mla_with_kvcache(
        q=x.q,
        k_cache=x.cache.view(-1, 64, 1, 656),
        cache_seqlens=int32([256, 256, 256], device),
        head_dim_v=512,
        tile_scheduler_metadata=metadata,
        num_splits=num_splits,
        softmax_scale=x.scale,
        indices=x.indices,
        block_table=torch.empty((3, 0), dtype=torch.int32, device=device),
        is_fp8_kvcache=True,
    )
    x.check(got)
    # The older metadata call, with arguments that no longer mean anything.
    metadata, num_splits = flash_mla.get_mla_metadata(
        cache_seqlens=int32([256, 256, 256], device),
        num_q_tokens_per_head_k=2 * 16,
        topk=64,
        num_heads_q=16,
        num_heads_k=1,
        is_fp8_kvcache=True,
    )
    # FlashMLA, tests/lib.py: all by position.
    got = flash_mla.flash_mla_with_kvcache(
        *(x.q, x.cache, None, None, 512, metadata, num_splits),
        *(x.scale, False, True, x.indices, x.sink, None, None, x.topk_length, None),
    )
    x.check(got, attn_sink=x.sink, topk_length=x.topk_length)
    # FlashMLA's newest: is_fp8_kvcache left to its default, a 17th position.
    got = flash_mla.flash_mla_with_kvcache(
        *(x.q, x.cache, None, None, 512, metadata, None, None, False),
        *(False, x.indices, None, None, None, None, None, True),
    )
    x.check(got)


@pytest.mark.ops("flash_mla_with_kvcache")
def test_sparse_decode_of_v4(device):
    """SGLang and vLLM: a window's cache and a compressed one."""
    x = Sparse("v4", device)
    got = flash_mla.flash_mla_with_kvcache(
        q=x.q,
        k_cache=x.cache.view(E4M3),
        head_dim_v=512,
        block_table=None,
        cache_seqlens=None,
        tile_scheduler_metadata=flash_mla.FlashMLASchedMeta(),
        softmax_scale=x.scale,
        is_fp8_kvcache=True,
        indices=x.indices,
        topk_length=x.topk_length,
        attn_sink=x.sink,
        extra_k_cache=x.extra.view(E4M3),
        extra_indices_in_kvcache=x.extra_indices,
        extra_topk_length=x.extra_topk_length,
    )
    x.check(got, **x.both())


@pytest.mark.ops("flash_mla_with_kvcache")
@pytest.mark.parametrize("causal", [False, True])
def test_dense_decode(device, causal):
    lens, page_size = [130, 64, 5], 64
    table = permuted_table(lens, page_size, 5, device=device)
    blocked_k = torch.randn(5, page_size, 1, 576).to(device, BF16)
    q, cache_seqlens = torch.randn(3, 2, 16, 576).to(device, BF16), int32(lens, device)
    expected = reference.flash_mla_with_kvcache(
        q, blocked_k, table, cache_seqlens, 512, None, causal=causal, out_dtype=FP32
    )
    # FlashMLA, tests/test_flash_mla_dense_decoding.py
    tile_scheduler_metadata, num_splits = flash_mla.get_mla_metadata()
    got = flash_mla.flash_mla_with_kvcache(
        q,
        blocked_k,
        table,
        cache_seqlens,
        512,
        tile_scheduler_metadata,
        num_splits,
        causal=causal,
    )
    check_attention(got, expected, DECODE_TOLERANCE)
    # vLLM and SGLang
    got = flash_mla.flash_mla_with_kvcache(
        q=q,
        k_cache=blocked_k.squeeze(2).unsqueeze(-2),
        block_table=table,
        cache_seqlens=cache_seqlens,
        head_dim_v=512,
        tile_scheduler_metadata=tile_scheduler_metadata,
        num_splits=num_splits,
        softmax_scale=576**-0.5,
        causal=causal,
        is_fp8_kvcache=False,
    )
    check_attention(got, expected, DECODE_TOLERANCE)


# ---- sgl_kernel: selection -----------------------------------------------------------------------


def window_topk(score, length, k, start):
    """Indices within [start, start + length) of a row, counted from start."""
    window = score[start : start + length].double()
    best = window.sort(descending=True, stable=True).indices[:k].sort().values.tolist()
    return best + [-1] * (k - len(best))


@pytest.mark.ops("topk_select")
def test_topk_as_sgl_kernels(device):
    """The README's lines for fast_topk_v2 and fast_topk_transform_fused."""
    score = torch.randn(6, 300, device=device)
    lengths, k = int32([300, 9, 100, 0, 40, 64], device), 32
    for starts in ([0] * 6, [0, 7, 150, 20, 260, 236]):
        row_starts = int32(starts, device)
        got = flash_mla.topk_select(
            score, k, row_starts, row_starts + lengths, index_base=-row_starts
        )
        expected = [
            window_topk(row, n, k, start)
            for row, n, start in zip(score, lengths.tolist(), starts, strict=True)
        ]
        assert got.tolist() == expected
        # Fused: rows 0 to 2 are of request 0, 3 of request 1, 4 and 5 of request 2.
        page_table_size_1 = int32(torch.randperm(3 * 300).view(3, 300), device)
        requests = int32([0, 0, 0, 1, 2, 2], device)
        got = flash_mla.topk_select(
            score,
            k,
            row_starts,
            row_starts + lengths,
            index_base=-row_starts,
            block_table=page_table_size_1,
            page_size=1,
            row_to_request=requests,
        )
        table = page_table_size_1.tolist()
        assert got.tolist() == [
            [table[request][token] if token >= 0 else -1 for token in row]
            for request, row in zip(requests.tolist(), expected, strict=True)
        ]

# SPDX-License-Identifier: Apache-2.0
"""What is CUDA's alone: graphs, streams, devices, allocation; and the shapes that kernels tile by.

The tests of every backend (test_attention.py, test_indexer.py, ...) run on CUDA too.
"""

from __future__ import annotations

import functools
import gc
import itertools
import math
import os
import random

import pytest
import torch

import dsa_ext
from dsa_ext import _C, reference
from helpers import (
    DECODE_TOLERANCE,
    FORMATS,
    INT_MAX,
    INT_MIN,
    LOGITS_TOLERANCE,
    PREFILL_TOLERANCE,
    Guarded,
    assert_close,
    assert_lse_close,
    assert_same_bits,
    int32,
    latent_cache,
    paged,
    permuted_table,
    poison,
    put_indexer_keys,
    random_e4m3,
    storage_bytes,
    threads,
)
from test_attention import (
    as_prefill,
    cache_case,
    check_cache,
    check_sparse,
    dense_case,
    sparse_case,
)
from test_indexer import paged_case, prefill
from tiny_cases import KINDS, assert_equal_values, make, run, working_cases, workspace

if not torch.cuda.is_available() or all(k["device"] != "cuda" for k in _C.kernels()):
    pytest.skip("needs a CUDA device and a build with CUDA kernels", allow_module_level=True)

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
BF16, FP16, FP32, INT32 = torch.bfloat16, torch.float16, torch.float32, torch.int32
INF = float("inf")
HEADS = [1, 2, 3, 8, 15, 16, 17, 32, 33, 64, 65, 96, 127, 128]


def assert_all_same_bits(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert_same_bits(a.contiguous(), b.contiguous())


# ---- graphs --------------------------------------------------------------------------------------


def capture(call):
    """A graph of a call, and the results it writes; run once before, so that kernels are loaded."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph, results


@pytest.mark.parametrize("given", [True, False], ids=["out-and-workspace", "allocated"])
@pytest.mark.parametrize("kind", KINDS)
def test_graph_replay_with_new_metadata(kind, given):
    """Capture once; replay with other lengths, tables and indices: what an eager call computes."""
    for case in working_cases(kind, 3, 6):
        if not given and "clean_logits" in case.kwargs:
            case.kwargs["clean_logits"] = True  # Or some of the memory is nobody's.
        arguments = case.arguments(DEVICE)
        outs = case.outputs(DEVICE) if given else []
        more = {"workspace": workspace(DEVICE)} if given and case.takes_workspace else {}
        written = [storage_bytes(arguments[case.written])] if case.written else []
        graph, results = capture(lambda: case.call(arguments, outs, **more))  # noqa: B023
        for value in (None, None, -1, 0):
            if value == 0 and written:
                continue  # Equal slots: either token may stay.
            for name, new in case.refill.items():
                arguments[name].copy_(new() if value is None else torch.full_like(new(), value))
            before = [t.clone() for t in written]
            for out in outs:
                poison(out)
            graph.replay()
            replayed = [t.clone() for t in results]
            for t, old in zip(written, before, strict=True):
                t.copy_(old)
            again = [poison(t) for t in case.outputs(DEVICE)] if given else []
            assert_all_same_bits(replayed, case.call(arguments, again, **more))


# ---- memory, synchronisation, streams, devices ---------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "metadata"])
def test_nothing_is_allocated_with_outputs_and_workspace(kind):
    for case in working_cases(kind, 3, 6):
        arguments, outs = case.arguments(DEVICE), case.outputs(DEVICE)
        more = {"workspace": workspace(DEVICE)} if case.takes_workspace else {}
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        case.call(arguments, outs, **more)
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@pytest.fixture
def no_synchronisation():
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_waits_for_the_device(kind, request):
    calls = [(case, case.arguments(DEVICE)) for case in working_cases(kind, 3, 2)]
    request.getfixturevalue("no_synchronisation")
    for case, arguments in calls:
        case.call(arguments, [])


@pytest.mark.parametrize("kind", KINDS)
def test_two_streams_at_once(kind):
    """Different inputs on each, many calls in flight: neither sees the other's."""
    cases = list(working_cases(kind, 2, 6))
    inputs = [case.arguments(DEVICE) for case in cases]

    def call(i):
        """On fresh outputs; of functions that write a cache, a copy of it."""
        case, arguments = cases[i], dict(inputs[i])
        if case.written:
            cache = arguments[case.written]
            copy = storage_bytes(cache).clone().view(cache.dtype)
            arguments[case.written] = copy.as_strided(cache.shape, cache.stride())
        return case.call(arguments, case.outputs(DEVICE))

    expected = [call(i) for i in range(2)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    results = [[], []]
    for _ in range(10):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[i].append(call(i))
    torch.cuda.synchronize()
    for i in range(2):
        for got in results[i]:
            assert_all_same_bits(got, expected[i])


@pytest.mark.parametrize("kind", KINDS)
def test_work_is_queued_on_the_current_stream(kind):
    """Inputs that arrive late on a side stream are what the call behind them reads."""
    (case,) = working_cases(kind, 1, 4)
    right = case.arguments(DEVICE)
    before = storage_bytes(right[case.written]).clone() if case.written else None
    expected = [t.clone() for t in case.call(right, case.outputs(DEVICE))]
    if case.written:
        storage_bytes(right[case.written]).copy_(before)
    late, outs = case.arguments(DEVICE), case.outputs(DEVICE)
    leaves = [torch.utils._pytree.tree_leaves(tree) for tree in (late, right)]
    pairs = [(a, b) for a, b in zip(*leaves, strict=True) if isinstance(a, torch.Tensor)]
    for tensor, _ in pairs:
        storage_bytes(tensor).zero_()
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        for tensor, value in pairs:
            storage_bytes(tensor).copy_(storage_bytes(value))
        got = case.call(late, outs)
        done = side.record_event()
    done.synchronize()
    assert_all_same_bits(got, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("kind", KINDS)
def test_tensors_on_another_device_than_the_current_one(kind):
    (case,) = working_cases(kind, 1, 4)
    results = [
        case.call(case.arguments(device), case.outputs(device)) for device in ("cuda:0", "cuda:1")
    ]
    assert torch.cuda.current_device() == 0
    assert all(t.device.index == 1 for t in results[1])
    assert_all_same_bits([t.cpu() for t in results[1]], [t.cpu() for t in results[0]])


# ---- the same bits -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_twenty_runs_give_the_same_bits(kind):
    for case in working_cases(kind, 2, 20):
        arguments = case.arguments(DEVICE)
        first = [t.clone() for t in case.call(arguments, case.outputs(DEVICE))]
        for _ in range(19):
            assert_all_same_bits(case.call(arguments, case.outputs(DEVICE)), first)


def check_batch_invariance(case, batched):
    """64 requests; some of them alone, or beside others."""
    case = case | {"batch_invariant": True}
    whole = dsa_ext.flash_mla_with_kvcache(**case)
    for _ in range(3):
        assert_all_same_bits(dsa_ext.flash_mla_with_kvcache(**case), whole)
    for few in ([0], [63], [5, 6], range(10, 17), torch.randperm(64)):
        rows = torch.as_tensor(few, device=DEVICE)
        got = dsa_ext.flash_mla_with_kvcache(**case | {key: case[key][rows] for key in batched})
        assert_all_same_bits(got, [t[rows] for t in whole])


@pytest.mark.parametrize("h_q", [1, 8, 16, 24, 64, 128])
@pytest.mark.parametrize("name", FORMATS)
def test_sparse_decode_is_batch_invariant(name, h_q):
    case = cache_case(
        name, DEVICE, batch=64, s_q=2, h_q=h_q, topk=1500, lengths="b,s_q", extra=9, sink=True
    )
    batched = ("q", "indices", "topk_length", "extra_indices_in_kvcache", "extra_topk_length")
    check_batch_invariance(case, batched)


@pytest.mark.parametrize("h_q", [1, 8, 16, 24, 64, 128])
@pytest.mark.parametrize("name", FORMATS)
def test_dense_decode_is_batch_invariant(name, h_q):
    lens = [3000, 0, 1, -5, *torch.randint(1, 1500, (60,)).tolist()]
    case = dense_case(name, DEVICE, lens=lens, s_q=2, causal=True)
    case["q"] = torch.randn(64, 2, h_q, FORMATS[name].d_qk, device=DEVICE).to(case["q"].dtype)
    check_batch_invariance(case, ("q", "block_table", "cache_seqlens"))
    whole = dsa_ext.flash_mla_with_kvcache(**case | {"batch_invariant": True})
    wider = torch.nn.functional.pad(case["block_table"], (0, 5000), value=-1)
    got = dsa_ext.flash_mla_with_kvcache(**case | {"batch_invariant": True, "block_table": wider})
    assert_all_same_bits(got, whole)


# ---- attention: shapes that kernels tile by ------------------------------------------------------

PORTABLE_ATTENTION = ("portable_sparse_fwd", "portable_kvcache_fwd")


@pytest.fixture(params=["best", "portable"])
def attention_kernel(request, monkeypatch):
    """What dispatch would choose, and where that is another kernel the portable one too."""
    if request.param == "portable":
        if _C.kernel_refusal("sm90a_sparse_fwd", torch.cuda.current_device()):
            pytest.skip("the best one is portable")
        monkeypatch.setenv("DSA_FORCE_KERNEL", ",".join(PORTABLE_ATTENTION))


def check_gentle(case):
    """check_cache with small logits: an lse near 0 (of one token, say) is judged absolutely."""
    case["q"].mul_(0.1)
    check_cache(case)


@pytest.mark.usefixtures("attention_kernel")
@pytest.mark.parametrize("h_q", HEADS)
def test_sparse_fwd_head_counts(h_q):
    check_sparse(
        sparse_case(5, h_q, 576, 512, 200, 130, BF16, DEVICE, sink=True, lengths=True),
    )
    check_sparse(sparse_case(2, h_q, 512, 512, 200, 65, FP16, DEVICE, sink=True))


@pytest.mark.usefixtures("attention_kernel")
@pytest.mark.parametrize("h_q", [1, 8, 17, 32, 64, 130])
@pytest.mark.parametrize("name", FORMATS)
def test_sparse_fwd_over_caches_head_counts(name, h_q):
    case = as_prefill(cache_case(name, DEVICE, s_q=1, h_q=h_q, topk=257, lengths="b", sink=True))
    check_sparse(case, DECODE_TOLERANCE)
    for scale in (-0.05, 30.0):
        check_sparse(case | {"sm_scale": scale}, DECODE_TOLERANCE)


@pytest.mark.usefixtures("attention_kernel")
@pytest.mark.parametrize("d_qk", [512, 576])
@pytest.mark.parametrize("h_q", [5, 8, 16, 20, 32, 64])
def test_sparse_fwd_of_more_tokens_than_sms(h_q, d_qk):
    """Of all lengths up to three tiles, many of length 0, one without a valid slot."""
    dtype = BF16 if d_qk == 576 else FP16
    case = sparse_case(700, h_q, d_qk, 512, 300, 300, dtype, DEVICE, sink=True)
    length = torch.randint(-100, 301, (700,)).clamp(min=0)
    check_sparse(case | {"topk_length": int32(length * (torch.rand(700) < 0.9), DEVICE)})


@pytest.mark.usefixtures("attention_kernel")
@pytest.mark.parametrize("h_q", [8, 16, 32, 64])
def test_sparse_fwd_of_about_as_many_tokens_as_sms(h_q):
    """Rows are worked on beside different ones, and by different warps: their bits are the same."""
    sms = torch.cuda.get_device_properties(DEVICE).multi_processor_count
    case = sparse_case(2 * sms + 1, h_q, 576, 512, 300, 200, BF16, DEVICE, sink=True)
    whole = check_sparse(case)
    for rows in (slice(sms), slice(sms + 1), slice(2 * sms), slice(sms, None), slice(7, 8)):
        some = case | {name: case[name][rows] for name in ("q", "indices")}
        assert_all_same_bits(dsa_ext.flash_mla_sparse_fwd(**some), [t[rows] for t in whole])


def sharing_case(s_q, h_q, d_qk, topk, *, page_size=None):
    """Tokens with four fifths of their rows in common with the token before.

    But for some: with other rows than it, with one row twice, with nothing valid. Slots that are
    none are everywhere; rows that no token has are NaN.
    """
    step = 5  # rows that take turns in a place
    start = torch.arange(topk) * step
    rows = torch.empty(s_q, topk, dtype=torch.int64)
    for token in range(s_q):
        fresh = start + torch.randint(step, (topk,))
        keep = (torch.rand(topk) < 0.8) & (token % 50 < 43) & (token > 0)
        rows[token] = torch.where(keep, rows[token - 1], fresh)
    rows[::50, 0] = rows[::50, -1]
    # Twice in one token and once in the next, which has another one twice that was there once.
    rows[20::60, 0] = rows[20::60, -1]
    rows[21::60, 2:] = rows[20::60, 2:][: len(rows[21::60])]
    rows[21::60, 1] = rows[21::60, 2]
    bad = torch.tensor([INT_MIN, -1, -2, topk * step, INT_MAX])
    bad = bad[torch.randint(len(bad), rows.shape)]
    rows = torch.where(torch.rand(rows.shape) < 0.01, bad, rows)
    rows[13::60] = -1
    rows[30::80] = rows[30::80, :1]  # one row, so many times
    rows[31::80] = rows[30::80][: len(rows[31::80])]
    rows[3::70, : topk // 2] = -1
    dtype = BF16 if d_qk == 576 else FP16
    kv = torch.randn(topk * step, 1, d_qk).to(dtype)
    seen = torch.zeros(topk * step, dtype=torch.bool)
    seen[rows[(rows >= 0) & (rows < topk * step)]] = True
    kv[~seen] = float("nan")
    if page_size is not None:
        kv = torch.nn.functional.pad(kv.view(-1, page_size, 1, d_qk), (0, 64))[..., :d_qk]
    case = {
        "q": torch.randn(s_q, h_q, d_qk + 16).to(dtype)[..., :d_qk],
        "kv": kv,
        "indices": int32(rows).unsqueeze(1),
        "attn_sink": torch.randn(h_q),
        "topk_length": int32(torch.randint(topk - 20, topk + 20, (s_q,))),
    }
    tensors = {name: t.to(DEVICE) for name, t in case.items()}
    return tensors | {"sm_scale": d_qk**-0.5, "d_v": 512}


@pytest.mark.parametrize(
    ("h_q", "d_qk", "topk"),
    [
        *((1, 576, 2048), (8, 512, 300), (13, 576, 700), (16, 576, 2048), (16, 512, 256)),
        *((17, 512, 2000), (24, 576, 500), (32, 576, 2048), (32, 512, 256)),
        *((16, 576, 2049), (16, 576, 255)),
    ],
)
def test_sparse_fwd_of_shared_rows(h_q, d_qk, topk):
    case = sharing_case(699, h_q, d_qk, topk)
    whole = check_sparse(case)
    for _ in range(5):
        assert_all_same_bits(dsa_ext.flash_mla_sparse_fwd(**case), whole)
    assert_all_same_bits(dsa_ext.flash_mla_sparse_fwd(**case, workspace=workspace(DEVICE)), whole)
    alone = check_sparse(case | {"batch_invariant": True})
    for rows in (slice(1), slice(7, 12), slice(40, None)):
        part = {name: case[name][rows] for name in ("q", "indices", "topk_length")}
        got = dsa_ext.flash_mla_sparse_fwd(**case | part, batch_invariant=True)
        assert_all_same_bits(got, [t[rows] for t in alone])
    are_shared = 256 <= topk <= 2048 and not _C.kernel_refusal(
        "sm90a_sparse_fwd", torch.cuda.current_device()
    )
    assert torch.equal(whole[0], alone[0]) != are_shared


@pytest.mark.parametrize("value", [float("nan"), INF, -INF])
@pytest.mark.parametrize("h_q", [16, 32])
def test_shared_rows_that_are_no_numbers(h_q, value):
    """They are seen by the tokens that have them, not by others of their group."""
    case = sharing_case(600, h_q, 576, 300)
    indices = case["indices"][:, 0]
    for token in (5, 107, 309, 402):
        fresh = indices[token][(indices[token] != indices[token - 1]) & (indices[token] >= 0)]
        case["kv"][fresh[fresh < case["kv"].shape[0]][0], 0, 300] = value
    check_sparse(case)


@pytest.mark.parametrize("h_q", [16, 32])
@pytest.mark.parametrize("page_size", [1, 5, 64])
def test_sparse_fwd_of_shared_rows_of_a_cache(h_q, page_size):
    case = sharing_case(530, h_q, 576, 1024, page_size=page_size)
    paged = check_sparse(case)
    flat = dsa_ext.flash_mla_sparse_fwd(**case | {"kv": case["kv"].flatten(0, 1)})
    assert_all_same_bits(paged, flat)


def test_sparse_fwd_of_shared_rows_of_more_tokens_than_the_workspace_has_room_for():
    case = sharing_case(699, 1, 512, 2048)
    many = {name: case[name].repeat(20, *[1] * (case[name].dim() - 1)) for name in ("q", "indices")}
    case |= many | {"topk_length": None}
    got = dsa_ext.flash_mla_sparse_fwd(**case)
    alone = dsa_ext.flash_mla_sparse_fwd(**case, batch_invariant=True)
    assert_close(got[0], alone[0].double(), PREFILL_TOLERANCE)
    assert_lse_close(got[2], alone[2].double())


def test_shared_rows_in_a_graph():
    """Which tokens share their rows is found out when the graph runs."""
    case = sharing_case(600, 16, 576, 512)
    others = sharing_case(600, 16, 576, 512)["indices"]
    first = dsa_ext.flash_mla_sparse_fwd(**case)
    expected = dsa_ext.flash_mla_sparse_fwd(**case | {"indices": others.flip(0)})
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = dsa_ext.flash_mla_sparse_fwd(**case)
    graph.replay()
    assert_all_same_bits(out, first)
    case["indices"].copy_(others.flip(0))
    graph.replay()
    assert_all_same_bits(out, expected)


@pytest.mark.usefixtures("attention_kernel")
@pytest.mark.parametrize("h_q", [5, 8, 16, 24, 32, 64])
@pytest.mark.parametrize(("d_qk", "dtype"), [(576, BF16), (512, FP16)], ids=str)
def test_scores_that_rise(h_q, d_qk, dtype):
    """From block to block by powers of two, of some heads, up to 2^40; of some in the last only."""
    case = sparse_case(3, h_q, d_qk, 512, 1000, 450, dtype, DEVICE, sink=True)
    case["kv"].copy_(torch.randn(case["kv"].shape))
    case["kv"][:, 0, 3] = torch.arange(1000, device=DEVICE) // 64
    case["kv"][:, 0, 4] = (torch.arange(1000, device=DEVICE) >= 990).float()
    rises = torch.tensor(
        [[9.5, 0.0], [-9.5, 0.0], [0.0, 30.0], [40.0, 0.0], [0.0, 0.0], [1.0, 9.0]]
    )
    by_head = rises.repeat(h_q, 1)[:h_q].to(DEVICE) / (case["sm_scale"] * math.log2(math.e))
    case["q"][..., 3:5] = by_head.to(dtype)
    case["indices"].copy_(case["indices"].sort(-1).values)
    check_sparse(case)
    case["indices"].copy_(case["indices"].flip(-1))
    check_sparse(case)
    decode = {
        "q": case["q"][:, None],
        "k_cache": case["kv"][None],
        "block_table": None,
        "cache_seqlens": None,
        "head_dim_v": 512,
        "tile_scheduler_metadata": None,
        "indices": case["indices"],
        "softmax_scale": case["sm_scale"],
    }
    check_cache(decode)


@pytest.mark.usefixtures("attention_kernel")
@pytest.mark.parametrize("h_q", [5, 16, 32, 64])
@pytest.mark.parametrize("at", [3, 130, 290])
@pytest.mark.parametrize("value", [float("nan"), INF, -INF])
def test_values_that_are_not_finite_in_some_block(h_q, at, value):
    case = sparse_case(4, h_q, 576, 512, 500, 300, BF16, DEVICE, sink=True)
    case["indices"][2, 0, at] = 11
    case["indices"][3, 0, :100] = -1
    case["kv"][11] = 1.0
    case["kv"][11, 0, 7] = value
    case["q"][2, 1, 7] = 0.0
    check_sparse(case)


@pytest.mark.usefixtures("attention_kernel")
@pytest.mark.parametrize("sm_scale", [-0.05, 0.0])
def test_sparse_fwd_of_a_scale_not_above_0(sm_scale):
    check_sparse(sparse_case(5, 64, 576, 512, 200, 130, BF16, DEVICE) | {"sm_scale": sm_scale})


@pytest.mark.usefixtures("attention_kernel")
@pytest.mark.parametrize("topk", [1, 7, 63, 64, 65, 200, 2048])
@pytest.mark.parametrize("h_q", [1, 16, 20, 32, 128])
def test_sparse_fwd_candidates(h_q, topk):
    check_sparse(sparse_case(4, h_q, 576, 512, 3000, topk, BF16, DEVICE, lengths=True))


@pytest.mark.usefixtures("attention_kernel")
@pytest.mark.parametrize("d_v", range(64, 513, 64))
@pytest.mark.parametrize("d_rope", [0, 32, 64])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_dimensions_of_16_bit_latents(d_v, d_rope, dtype):
    check_sparse(sparse_case(3, 20, d_v + d_rope, d_v, 90, 70, dtype, DEVICE, sink=True))
    slots = int32(torch.randint(0, 90, (2, 2, 70)), DEVICE)
    fmt = FORMATS["bf16" if dtype == BF16 else "fp16"]
    case = {
        "q": torch.randn(2, 2, 20, d_v + d_rope).to(DEVICE, dtype),
        "k_cache": latent_cache(fmt, 9, 10, torch.arange(90), width=d_v + d_rope, device=DEVICE),
        "block_table": None,
        "cache_seqlens": None,
        "head_dim_v": d_v,
        "tile_scheduler_metadata": None,
        "indices": slots,
    }
    check_gentle(case)


@pytest.mark.usefixtures("attention_kernel")
@pytest.mark.parametrize("s_q", [1, 2, 3])
@pytest.mark.parametrize("h_q", HEADS)
@pytest.mark.parametrize("name", FORMATS)
def test_sparse_decode_head_counts(name, h_q, s_q):
    check_gentle(
        cache_case(name, DEVICE, h_q=h_q, s_q=s_q, topk=130, lengths="b,s_q", extra=5, sink=True)
    )


@pytest.mark.usefixtures("attention_kernel")
@pytest.mark.parametrize("topk", [1, 7, 63, 64, 65, 200, 2048])
@pytest.mark.parametrize("h_q", [1, 64])
@pytest.mark.parametrize("name", FORMATS)
def test_sparse_decode_candidates(name, h_q, topk):
    check_gentle(cache_case(name, DEVICE, batch=2, s_q=1, h_q=h_q, topk=topk))
    check_gentle(cache_case(name, DEVICE, batch=1, s_q=1, h_q=h_q, topk=topk, extra=64))


FP8_FORMATS = [name for name, fmt in FORMATS.items() if fmt.fp8]


@pytest.mark.parametrize("extra", [None, 30])
@pytest.mark.parametrize("batch", [1, 2, 3, 5, 9, 17, 40])
@pytest.mark.parametrize("h_q", [1, 16, 33, 64, 128])
@pytest.mark.parametrize("name", FP8_FORMATS)
def test_fp8_decode_of_few_requests(name, h_q, batch, extra):
    """Splits in clusters of many sizes; some without keys. Alike with partial results in memory."""
    case = cache_case(name, DEVICE, batch=batch, s_q=1, h_q=h_q, topk=2048, extra=extra, sink=True)
    case["topk_length"] = torch.randint(-9, 2100, (batch,), dtype=torch.int32, device=DEVICE)
    check_gentle(case)
    got = dsa_ext.flash_mla_with_kvcache(**case)
    assert_all_same_bits(dsa_ext.flash_mla_with_kvcache(**case), got)
    out = torch.empty(batch, 1, h_q, 514, dtype=BF16, device=DEVICE)[..., 1:-1]  # not aligned
    lse = torch.empty_like(got[1])
    dsa_ext.flash_mla_with_kvcache(**case, out=(out, lse))
    torch.testing.assert_close(out.float(), got[0].float(), rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(lse, got[1], rtol=1e-5, atol=1e-5)


FP8_KERNELS = (
    ("sm90a_kvcache_fwd", "sm90a_fp8_sparse_fwd"),
    ("portable_kvcache_fwd", "portable_sparse_fwd"),
)


@pytest.fixture(params=FP8_KERNELS, ids=lambda kernels: kernels[0])
def decode_kernel(request, monkeypatch):
    """Each of the kernels that take FP8 caches, whichever dispatch would choose."""
    for kernel in request.param:
        if refusal := _C.kernel_refusal(kernel, torch.cuda.current_device()):
            pytest.skip(f"needs {refusal}")
    monkeypatch.setenv("DSA_FORCE_KERNEL", ",".join(request.param))


class Fp8Rows:
    """The parts of an FP8 cache's rows, in place: [pages, page_size, ..]."""

    def __init__(self, name: str, cache: torch.Tensor) -> None:
        pages, self.page_size, _, width = cache.shape
        self.d_nope = (_C.MLA_V32 if name == "v32" else _C.MLA_V4)["d_nope"]
        bytes_of_page = cache.as_strided(
            (pages, self.page_size * width), (cache.stride(0), 1), cache.storage_offset()
        )
        row_bytes = 656 if name == "v32" else 576
        planes = bytes_of_page.tensor_split([self.page_size * row_bytes], 1)
        rows = planes[0].unflatten(1, (self.page_size, row_bytes))
        self.codes, rest = rows.tensor_split([self.d_nope], 2)
        self.rope = rest[..., -128:].view(BF16)
        if name == "v32":
            self.scales = rest[..., :16].view(FP32)
        else:
            self.scales = planes[1].unflatten(1, (self.page_size, 8))[..., :7]

    def at(self, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Where slots are, to index any of the parts."""
        return slots // self.page_size, slots % self.page_size


def selected_slots(case, request: int | None = None) -> torch.Tensor:
    """The valid slots of a case without a second cache, or of one request, each once."""
    cache = case["k_cache"]
    indices = case["indices"] if request is None else case["indices"][request]
    slots = indices.flatten().long().unique()
    return slots[(slots >= 0) & (slots < cache.shape[0] * cache.shape[1])]


@pytest.mark.usefixtures("decode_kernel")
@pytest.mark.parametrize("h_q", [1, 8, 9, 17, 64, 100])
@pytest.mark.parametrize("topk", [1, 64, 65, 129, 300, 700])
@pytest.mark.parametrize("name", FP8_FORMATS)
def test_fp8_decode(name, h_q, topk):
    """Some tiles and none, with and without a second cache, dense and sparse."""
    for batch, extra in ((1, None), (3, 16)):
        check_gentle(
            cache_case(name, DEVICE, batch=batch, h_q=h_q, topk=topk, extra=extra, sink=True)
        )
    check_gentle(dense_case(name, DEVICE, lens=(topk, 1, 0, -4), s_q=2, causal=True))


@pytest.mark.usefixtures("decode_kernel")
@pytest.mark.parametrize("kind", ["unlike", "some zero", "all zero", "negative", "tiny", "large"])
@pytest.mark.parametrize("h_q", [8, 64])
def test_v32_decode_scales(h_q, kind):
    """Scales of a row's groups, and of different rows, that differ by powers of two and more."""
    case = cache_case("v32", DEVICE, batch=2, h_q=h_q, topk=200)
    scales = Fp8Rows("v32", case["k_cache"]).scales
    if kind == "unlike":
        scales.mul_(torch.exp2(torch.randint(-9, 4, scales.shape, device=DEVICE).float()))
    elif kind == "some zero":
        scales.mul_(torch.randint(0, 2, scales.shape, device=DEVICE))
    elif kind == "all zero":
        scales.mul_(0)
    elif kind == "negative":
        scales.mul_(-1)
    else:
        scales.mul_(2.0**-40 if kind == "tiny" else 2.0**12)
        case["q"].mul_(1.0 if kind == "tiny" else 2.0**-12)
    check_gentle(case)


@pytest.mark.usefixtures("decode_kernel")
@pytest.mark.parametrize(
    ("first", "last", "power"),
    [(0, 60, 0), (80, 90, 0), (100, 127, -4), (110, 130, -8), (127, 160, -38), (180, 182, -40)],
)
@pytest.mark.parametrize("h_q", [8, 64])
def test_v4_decode_scales(h_q, first, last, power):
    """Scales 2^(first - 127) to 2^(last - 127) beside RoPE around 1, also in groups of one row."""
    case = cache_case("v4", DEVICE, batch=2, h_q=h_q, topk=200)
    rows = Fp8Rows("v4", case["k_cache"])
    at = rows.at(selected_slots(case))
    count = len(at[0])
    rows.scales[at] = torch.randint(first, last + 1, (count, 7), device=DEVICE).byte()
    case["q"][..., : rows.d_nope].mul_(2.0**power)
    check_gentle(case)
    out, lse = dsa_ext.flash_mla_with_kvcache(**case)
    expected, expected_lse = reference.flash_mla_with_kvcache(**case, out_dtype=FP32)
    for part in range(0 if first > 60 else 448, 512, 64):  # a large one must not hide the others
        some = slice(part, part + 64)
        assert_close(out[..., some], expected[..., some], DECODE_TOLERANCE)
    assert_lse_close(lse, expected_lse)


@pytest.mark.usefixtures("decode_kernel")
@pytest.mark.parametrize("largest", [2.0**-60, 2.0**-20, 1.0])
@pytest.mark.parametrize("name", FP8_FORMATS)
def test_fp8_decode_of_unlike_heads(name, largest):
    """Heads whose queries differ by powers of two."""
    case = cache_case(name, DEVICE, batch=2, h_q=64, topk=200)
    powers = torch.randint(-12, 1, (64, 1), device=DEVICE).float()
    case["q"].mul_(torch.exp2(powers) * largest)
    check_cache(case)


@pytest.mark.usefixtures("decode_kernel")
@pytest.mark.parametrize("value", [INF, -INF, float("nan")])
@pytest.mark.parametrize("name", FP8_FORMATS)
def test_fp8_decode_of_a_head_that_is_not_finite(name, value):
    """The other heads do not notice."""
    case = cache_case(name, DEVICE, batch=2, h_q=64, topk=200)
    case["q"][:, :, 5, 7] = value
    check_gentle(case)
    check_sparse(as_prefill(case), DECODE_TOLERANCE)


@pytest.mark.usefixtures("decode_kernel")
@pytest.mark.parametrize("h_q", [16, 64])
def test_v32_decode_of_a_head_that_begins_with_minus_infinity(h_q):
    """Its first tile has no score above -inf, the other heads' has; its later ones are low."""
    case = cache_case("v32", DEVICE, batch=1, s_q=1, h_q=h_q, topk=600)
    slots = selected_slots(case)[:128]
    assert len(slots) == 128
    rows = Fp8Rows("v32", case["k_cache"])
    page, token = rows.at(slots)
    rows.rope[page[:64], token[:64], 0] = -INF
    rows.rope[page, token, 1] = 8
    case["q"][..., 512:514] = 0
    case["q"][:, :, 0, 512:514] = torch.tensor([1.0, -85.0])
    case["q"][:, :, 1, 512] = -1
    case["indices"] = int32(slots.view(1, 1, -1), DEVICE)
    check_cache(case)


@pytest.mark.usefixtures("decode_kernel")
@pytest.mark.parametrize("name", FP8_FORMATS)
def test_fp8_decode_of_an_empty_head_beside_infinite_values(name):
    """A head all of whose scores are -inf has zeros, though V4's values are infinite."""
    case = cache_case(name, DEVICE, batch=2, h_q=16, topk=100)
    rows = Fp8Rows(name, case["k_cache"])
    rows.rope[(*rows.at(selected_slots(case)), 0)] = -INF
    case["q"][..., rows.d_nope] = 0
    case["q"][:, :, 3, rows.d_nope] = 1
    out, lse = check_cache(case)
    assert (out[:, :, 3] == 0).all()
    assert (lse[:, 3] == INF).all()
    _, max_logits, _ = check_sparse(as_prefill(case), DECODE_TOLERANCE)
    assert (max_logits[:, 3] == -INF).all()


@pytest.mark.parametrize("name", FP8_FORMATS)
def test_fp8_decode_of_queries_between_others(name):
    """One head of more, and one token of one head at an odd address: kernels that copy refuse."""
    d_qk = FORMATS[name].d_qk
    case = cache_case(name, DEVICE, batch=2, h_q=1, topk=100)
    for pad in (0, 1, 8):
        wide = torch.randn(2, 2, 16, d_qk + pad, device=DEVICE).to(BF16)
        check_gentle(case | {"q": wide[:, :, 3:4, :d_qk]})
    case = cache_case(name, DEVICE, batch=1, s_q=1, h_q=1, topk=100)
    check_gentle(
        case | {"q": torch.randn(d_qk + 1, device=DEVICE).to(BF16)[1:].view(1, 1, 1, d_qk)}
    )


@pytest.mark.usefixtures("decode_kernel")
@pytest.mark.parametrize("h_q", [16, 128])
@pytest.mark.parametrize("name", FP8_FORMATS)
def test_fp8_decode_with_few_valid_slots(name, h_q):
    """Tiles of which few slots, or none, are valid, first, last and between."""
    case = cache_case(name, DEVICE, batch=4, s_q=1, h_q=h_q, topk=500)
    indices = case["indices"]
    kept = torch.zeros_like(indices, dtype=torch.bool)
    kept[0, 0, 300:310] = kept[1, 0, :1] = kept[2, 0, -1:] = True
    indices.masked_fill_(~kept, -1)
    check_gentle(case)


@pytest.mark.usefixtures("decode_kernel")
@pytest.mark.parametrize("where", ["first code", "last code", "scale", "rope"])
@pytest.mark.parametrize("name", FP8_FORMATS)
def test_fp8_decode_of_values_that_are_not_numbers(name, where):
    """NaN in a row that one of two requests selects."""
    for negative in (False, True):
        case = cache_case(name, DEVICE, batch=2, s_q=1, h_q=64, topk=200)
        of_first, of_second = selected_slots(case, 0), selected_slots(case, 1)
        slot = of_first[~torch.isin(of_first, of_second)][0]
        rows = Fp8Rows(name, case["k_cache"])
        if where == "rope":
            rows.rope[(*rows.at(slot), 5)] = float("nan")
        elif where == "scale":
            nan = float("nan") if name == "v32" else 255
            rows.scales[(*rows.at(slot), 3)] = nan
        else:
            dim = 3 if where == "first code" else rows.d_nope - 1
            rows.codes[(*rows.at(slot), dim)] = 0xFF if negative else 0x7F
        check_gentle(case)
        check_sparse(as_prefill(case), DECODE_TOLERANCE)


@pytest.mark.usefixtures("attention_kernel")
@pytest.mark.parametrize("page_size", [1, 3, 16, 64, 100, 256])
@pytest.mark.parametrize("name", FORMATS)
def test_decode_page_sizes(name, page_size):
    check_gentle(cache_case(name, DEVICE, page_size=page_size, extra=page_size + 1, topk=200))
    for s_q, causal in ((1, False), (3, True)):
        lens = (1000, 1, 77, 0, -4)
        case = dense_case(name, DEVICE, lens=lens, s_q=s_q, page_size=page_size, causal=causal)
        check_gentle(case)


@pytest.mark.usefixtures("attention_kernel")
@pytest.mark.parametrize("h_q", HEADS)
@pytest.mark.parametrize("name", FORMATS)
def test_dense_decode_head_counts(name, h_q):
    case = dense_case(name, DEVICE, lens=(700, 1, 129, 0), s_q=2, causal=True)
    case["q"] = torch.randn(4, 2, h_q, FORMATS[name].d_qk, device=DEVICE).to(case["q"].dtype)
    check_gentle(case)


@pytest.mark.usefixtures("attention_kernel")
def test_dense_decode_over_odd_caches():
    """No pages; one page, wherever another would be; one row for all tokens of a page."""
    q = torch.randn(3, 1, 16, 576, device=DEVICE).to(BF16)
    table = torch.zeros(3, 2, dtype=torch.int32, device=DEVICE)
    lens = int32([128, 100, 0], DEVICE)

    def check(cache):
        got = dsa_ext.flash_mla_with_kvcache(q, cache, table, lens, 512)
        expected = reference.flash_mla_with_kvcache(q, cache, table, lens, 512, None)
        assert_close(got[0], expected[0], DECODE_TOLERANCE)
        assert_lse_close(got[1], expected[1])

    rows = torch.randn(64, 1, 576, device=DEVICE).to(BF16)
    check(rows.new_empty(0, 64, 1, 576))
    check(rows.as_strided((1, 64, 1, 576), (1 << 42, 576, 576, 1)))
    check(rows[:1].expand(64, 1, 576)[None].expand(2, -1, -1, -1))


@pytest.mark.usefixtures("attention_kernel")
@pytest.mark.parametrize("page_size", [32, 64, 128, 256])
@pytest.mark.parametrize("h_q", [8, 16, 32, 64])
@pytest.mark.parametrize("name", FORMATS)
def test_dense_decode_with_missing_pages(name, h_q, page_size):
    """Pages that are not there before, between and after others, also many in a row."""
    case = dense_case(name, DEVICE, lens=(1500, 900, 300), s_q=2, page_size=page_size)
    case["q"] = torch.randn(3, 2, h_q, FORMATS[name].d_qk, device=DEVICE).to(case["q"].dtype)
    table = case["block_table"]
    missing = torch.rand(table.shape, device=DEVICE) < 0.4
    missing[1, : 512 // page_size] = True
    table[missing] = torch.tensor([-1, -INT_MAX, INT_MAX, case["k_cache"].shape[0]], device=DEVICE)[
        torch.randint(0, 4, (int(missing.sum()),), device=DEVICE)
    ].int()
    check_gentle(case)


@pytest.mark.usefixtures("attention_kernel")
@pytest.mark.parametrize("h_q", [8, 16, 32, 64])
@pytest.mark.parametrize("page_size", [64, 128])
def test_dense_decode_without_rope(h_q, page_size):
    """More requests than SMs; whole pages, parts of pages and missing ones one after another."""
    case = dense_case("bf16", DEVICE, lens=(700, 129, 300, 0) * 40, s_q=2, page_size=page_size)
    case["q"] = torch.randn(160, 2, h_q, 576, device=DEVICE).to(BF16)
    for name in ("q", "k_cache"):
        case[name] = case[name][..., :512].contiguous()
    table = case["block_table"]
    table[torch.rand(table.shape, device=DEVICE) < 0.2] = -1
    check_gentle(case)


@pytest.mark.usefixtures("attention_kernel")
@pytest.mark.parametrize("name", FORMATS)
def test_one_long_request(name):
    """Many splits of one row, in a dense and in a sparse call."""
    check_gentle(dense_case(name, DEVICE, lens=(20_000,)))
    case = cache_case(name, DEVICE, batch=1, s_q=1, h_q=128, topk=8192)
    check_gentle(case)


# ---- indexer: shapes that kernels tile by --------------------------------------------------------

LOGITS_KERNELS = (
    ("portable_mqa_logits", "portable_paged_mqa_logits"),
    ("portable_mqa_logits_e4m3", "portable_paged_mqa_logits_e4m3"),
    ("sm90a_mqa_logits", "sm90a_paged_mqa_logits"),
)


@pytest.fixture(params=LOGITS_KERNELS, ids=lambda kernels: kernels[0])
def logits_kernel(request, monkeypatch):
    """Each of the kernels, whichever dispatch would choose."""
    ids = request.param
    for kernel in ids:
        if refusal := _C.kernel_refusal(kernel, torch.cuda.current_device()):
            pytest.skip(f"needs {refusal}")
    monkeypatch.setenv("DSA_FORCE_KERNEL", ",".join(ids))


def filled(shape, dtype) -> Guarded:
    """-inf everywhere: what must stay untouched reads as if it were cleaned."""
    guard = Guarded(shape, dtype, DEVICE)
    guard.out.fill_(-INF)
    return guard


@pytest.mark.usefixtures("logits_kernel")
@pytest.mark.parametrize("D", [32, 64, 128])
@pytest.mark.parametrize("H", [1, 3, 8, 16, 17, 32, 48, 64, 65, 100, 128])
def test_logits(H, D):
    for S, L in ((37, 1031), (1, 300), (5, 129)):
        case = prefill(S, H, D, L, DEVICE)
        for width in (0, 100, 500, L + 70):
            expected = reference.fp8_mqa_logits(*case.args(), True, width)
            for clean, dtype in itertools.product((True, False), (FP32, BF16)):
                out = filled(expected.shape, dtype)
                dsa_ext.fp8_mqa_logits(*case.args(), clean, width, out=out.out)
                assert_close(out.check(), expected, LOGITS_TOLERANCE)


@pytest.mark.usefixtures("logits_kernel")
@pytest.mark.parametrize("H", [32, 64, 128])
def test_logits_of_packed_requests(H):
    """Windows of several requests, of none, and of no sense, over many tiles of keys."""
    S, L = 611, 9_000
    case = prefill(S, H, 128, L, DEVICE)
    request = torch.arange(S) // 100
    start = request * 1300
    end = start + 1 + torch.arange(S) % 100 * 17
    start[50], end[50] = 700, 300
    start[51:60], end[51:60] = 0, 0
    start[61], end[61] = -(2**31), 2**31 - 1
    args = list(case.args())
    args[3], args[4] = int32(start, DEVICE), int32(end, DEVICE)
    for clean, width in ((True, 0), (False, 0), (True, 2000)):
        expected = reference.fp8_mqa_logits(*args, True, width)
        out = filled(expected.shape, FP32)
        dsa_ext.fp8_mqa_logits(*args, clean, width, out=out.out)
        assert_close(out.check(), expected, LOGITS_TOLERANCE)


def check_paged(case):
    expected = reference.fp8_paged_mqa_logits(*case.args())
    for clean, dtype in itertools.product((True, False), (FP32, BF16)):
        out = filled(expected.shape, dtype)
        dsa_ext.fp8_paged_mqa_logits(*case.args(), clean, out=out.out)
        assert_close(out.check(), expected, LOGITS_TOLERANCE)


@pytest.mark.parametrize("logits_kernel", LOGITS_KERNELS[:2], indirect=True)
@pytest.mark.parametrize("page_size", [1, 64, 100])
@pytest.mark.parametrize("next_n", range(1, 9))
def test_paged_logits(next_n, page_size, logits_kernel):
    for H, D in ((64, 128), (5, 64), (128, 32)):
        for two_d in (False, True):
            case = paged_case(4, next_n, H, D, page_size, DEVICE, two_d=two_d, invalid_pages=True)
            check_paged(case)


@pytest.mark.usefixtures("logits_kernel")
@pytest.mark.parametrize("page_size", [8, 24, 64, 256])
@pytest.mark.parametrize("next_n", range(1, 9))
def test_paged_logits_of_aligned_pages(next_n, page_size):
    for H in (5, 17, 32, 64, 100, 128):
        check_paged(paged_case(4, next_n, H, 128, page_size, DEVICE, two_d=H < 64))
        check_paged(paged_case(4, next_n, H, 128, page_size, DEVICE, invalid_pages=True))


@pytest.mark.usefixtures("logits_kernel")
@pytest.mark.parametrize("next_n", [1, 2, 3, 8])
@pytest.mark.parametrize("batch", [1, 9, 700])
def test_paged_logits_of_long_requests(batch, next_n):
    """Requests that several CTAs share, and more requests than a CTA has threads."""
    longest = 70_000 // batch
    check_paged(paged_case(batch, next_n, 64, 128, 64, DEVICE, longest=longest, invalid_pages=True))


@pytest.mark.usefixtures("logits_kernel")
@pytest.mark.parametrize(("batch", "longest"), [(3, 250_000), (90, 9_000), (500, 2_000)])
def test_paged_logits_of_a_busy_gpu(batch, longest):
    """So many keys that CTAs take the last of them as they come to it: again and again, on two
    streams at once, and in graphs beside them."""
    case = paged_case(batch, 1, 64, 128, 64, DEVICE, longest=longest, invalid_pages=True)
    expected = reference.fp8_paged_mqa_logits(*case.args())
    outs = [torch.empty_like(expected) for _ in range(4)]
    calls = [
        functools.partial(dsa_ext.fp8_paged_mqa_logits, *case.args(), True, out=out) for out in outs
    ]
    calls[0]()
    assert_close(outs[0], expected, LOGITS_TOLERANCE)
    graphs = [torch.cuda.CUDAGraph() for _ in calls[2:]]
    for graph, call in zip(graphs, calls[2:], strict=True):
        with torch.cuda.graph(graph):
            call()
    runs = [*calls[:2], *(graph.replay for graph in graphs)]
    streams = [torch.cuda.Stream() for _ in runs]
    first = outs[0].clone()
    for _ in range(5):
        for out in outs:
            out.zero_()
        for stream, go in zip(streams, runs, strict=True):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                go()
                go()
        for stream in streams:
            torch.cuda.current_stream().wait_stream(stream)
        assert_all_same_bits(outs, [first] * len(outs))


@pytest.mark.usefixtures("logits_kernel")
def test_logits_of_more_keys_than_l2():
    """A launch for every so many keys, windows across their border."""
    S, L = 9, 450_000
    case = prefill(S, 32, 128, L, DEVICE)
    args = list(case.args())
    args[3] = int32([0, 100, 196_000, 196_608, 200_000, 0, 449_000, 5, 7], DEVICE)
    args[4] = int32([L, 150_000, 197_000, 196_609, 200_000, 196_608, L, 393_217, 6], DEVICE)
    for clean, width in ((True, 0), (False, 0), (True, 300_000)):
        expected = reference.fp8_mqa_logits(*args, True, width)
        out = filled(expected.shape, FP32)
        dsa_ext.fp8_mqa_logits(*args, clean, width, out=out.out)
        assert_close(out.check(), expected, LOGITS_TOLERANCE)


@pytest.mark.parametrize("H", [1, 17, 64, 100])
def test_fused_selection_from_many_rows(H):
    """More rows of logits than the workspace holds at once: the same bits as in two steps."""
    S, L, k = 700, 60_000, 300
    q, key = random_e4m3(S, H, 128, device=DEVICE), random_e4m3(L, 128, device=DEVICE)
    kv, weights = (key, torch.rand(L, device=DEVICE)), torch.randn(S, H, device=DEVICE)
    start = int32(torch.randint(0, 500, (S,)), DEVICE)
    end = int32(torch.randint(0, L + 99, (S,)), DEVICE)
    logits = dsa_ext.fp8_mqa_logits(q, kv, weights, start, end)
    expected = dsa_ext.topk_select(logits, k, start, end, return_scores=True)
    got = dsa_ext.fp8_mqa_topk(q, kv, weights, start, end, k, return_scores=True)
    assert_all_same_bits(got, expected)


# ---- selection from long rows --------------------------------------------------------------------


def ranking(scores):
    """The columns of each row, best first, by a stable sort on the CPU."""
    key = scores.cpu().double()
    key = key.masked_fill(torch.isneginf(key), -1e300).nan_to_num(-INF, INF, -INF)
    return int32(key.sort(dim=-1, descending=True, stable=True).indices)


def long_rows(kind, rows, columns):
    scores = torch.randn(rows, columns)
    if kind == "equal":
        scores.fill_(1.5)
    elif kind == "narrow":  # Two neighbours among fp32 numbers.
        scores = (torch.full_like(scores, 1.5).view(INT32) + (scores > 1.0).int()).view(FP32)
    elif kind == "zeros":
        zero = torch.where(torch.rand(rows, columns) < 0.5, 0.0, -0.0)
        scores = torch.where(torch.rand(rows, columns) < 0.9, zero, scores)
    elif kind == "odd":
        odd = torch.tensor([float("nan"), INF, -INF, 0.0])
        odd = odd[torch.randint(0, 4, (rows, columns))]
        scores = torch.where(torch.rand(rows, columns) < 0.4, odd, scores)
    elif kind == "mostly nan":
        scores = torch.where(torch.rand(rows, columns) < 0.999, float("nan"), scores)
    return scores.to(DEVICE)


@pytest.mark.parametrize("kind", ["random", "equal", "narrow", "zeros", "odd", "mostly nan"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 2**20), (64, 131072), (3, 100_003)], ids=str)
def test_selection_from_long_rows(rows, columns, kind):
    scores = long_rows(kind, rows, columns)
    order = ranking(scores)
    for k in (1, 2048, 20_000):
        indices, kept = dsa_ext.topk_select(scores, k, return_scores=True)
        assert_same_bits(indices.cpu(), order[:, :k].sort(dim=-1).values)
        assert_equal_values(kept, scores.gather(1, indices.long()))


def misleading_rows(kind, rows, columns):
    """Rows that a sample, or the order of their columns, says little about."""
    scores = torch.rand(rows, columns)
    column = torch.arange(columns)
    if kind == "rising":
        scores += column
    elif kind == "falling":
        scores -= column
    elif kind == "block":
        start = int(torch.randint(0, columns, ()))
        scores[:, start : start + columns // 8] += 10.0
    elif kind == "comb":  # Every eighth 16 or 64 bytes, as samples are spread.
        tooth = int(torch.randint(2, 5, ()))
        scores = torch.where((column >> tooth) % 8 == 0, scores + 10.0, scores)
    elif kind == "steps":
        scores = (scores * 5).floor()
    return scores.to(DEVICE)


def selected(scores, k, starts, ends):
    """What topk_select returns, by a stable sort."""
    columns = scores.shape[1]
    column = torch.arange(columns, device=DEVICE)
    begin = starts.clamp(0, columns)[:, None]
    end = ends.clamp(0, columns)[:, None]
    key = scores.double()
    key = key.masked_fill(torch.isneginf(key), -1e300).nan_to_num(-1e301, INF, -1e301)
    key = key.masked_fill((column < begin) | (column >= end), -INF)
    order = key.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    rank = torch.arange(order.shape[1], device=DEVICE)
    order = order.masked_fill(rank >= (end - begin).clamp(min=0), columns).sort(dim=-1).values
    order = order.masked_fill(order == columns, -1)
    return int32(torch.nn.functional.pad(order, (0, k - order.shape[1]), value=-1), DEVICE)


LONG_KINDS = ("random", "equal", "narrow", "zeros", "odd", "mostly nan")
MISLEADING_KINDS = ("rising", "falling", "block", "comb", "steps")


@pytest.mark.parametrize("kernel", ["", "portable_topk_select_stream", "portable_topk_select"])
@pytest.mark.parametrize("kind", [*LONG_KINDS, *MISLEADING_KINDS])
def test_selection_campaign(kind, kernel, monkeypatch):
    """Some 200 selections of each kind of rows: few and many, short and long, at any alignment."""
    monkeypatch.setenv("DSA_FORCE_KERNEL", kernel)
    pick = random.Random(kind)
    make_rows = long_rows if kind in LONG_KINDS else misleading_rows
    for _ in range(200):
        rows = pick.choice((1, 2, 5, 9, 33, 140))
        columns = int(2 ** pick.uniform(0, 17 if rows < 5 else 15))
        k = min(int(2 ** pick.uniform(0, 13.01)), 8192)
        shift = pick.randint(0, 7)
        scores = make_rows(kind, rows, columns).to(pick.choice((FP32, BF16, torch.float16)))
        memory = torch.zeros(rows * columns + shift, dtype=scores.dtype, device=DEVICE)
        scores = memory[shift:].view(rows, columns).copy_(scores)
        starts = torch.zeros(rows, dtype=INT32, device=DEVICE)
        ends = torch.full_like(starts, columns)
        if pick.random() < 0.5:
            starts = torch.randint_like(starts, -2, columns // 4 + 1)
            ends = torch.randint_like(starts, columns // 2, columns + 3)
        got = dsa_ext.topk_select(scores, k, starts, ends)
        assert_same_bits(got, selected(scores, k, starts, ends))


@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 2**20), (2, 524_289), (4, 600_001), (1, 5_000_003), (7, 530_000)]
)
@pytest.mark.parametrize("kind", ["random", "zeros", "odd", "mostly nan", "rising", "block"])
def test_selection_from_windows_of_very_long_rows(rows, columns, kind):
    pick = random.Random(f"{rows} {columns} {kind}")
    make_rows = long_rows if kind in LONG_KINDS else misleading_rows
    scores = make_rows(kind, rows, columns).to(pick.choice((FP32, BF16, torch.float16)))
    for k in (1, pick.randint(2, 2000), 2048, 8192):
        starts = torch.randint(-5, columns // 2, (rows,), dtype=INT32, device=DEVICE)
        sizes = torch.randint(0, pick.choice((1000, 9000, 100_000, columns)), (rows,))
        ends = starts + int32(sizes, DEVICE)
        got = dsa_ext.topk_select(scores, k, starts, ends)
        assert_same_bits(got, selected(scores, k, starts, ends))
    whole = torch.zeros_like(starts), torch.full_like(starts, INT_MAX)
    got, kept = dsa_ext.topk_select(scores, 2048, return_scores=True)
    assert_same_bits(got, selected(scores, 2048, *whole))
    assert_equal_values(kept, scores.gather(1, got.long()).float())


@pytest.mark.parametrize("columns", [3000, 20_000, 131072, 700_000])
def test_slots_of_long_rows(columns):
    """As map_to_slots maps them, past what the page table has and what fits 32 bits too."""
    rows, page_size = 3, 48
    scores = long_rows("random", rows, columns)
    table = torch.randint(-3, 60_000_000, (2, columns // 60), dtype=INT32, device=DEVICE)
    request = torch.tensor([1, 7, 0], dtype=INT32, device=DEVICE)
    base = torch.tensor([5, 0, -17], dtype=INT32, device=DEVICE)
    for k in (700, 2900):
        got = dsa_ext.topk_select(
            scores,
            k,
            index_base=base,
            block_table=table,
            page_size=page_size,
            row_to_request=request,
        )
        tokens = dsa_ext.topk_select(scores, k, index_base=base)
        assert_same_bits(got, dsa_ext.map_to_slots(tokens, table, page_size, request))


@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 8192), (3, 131072), (40, 70_000), (300, 20_000), (2, 2**20)]
)
def test_selection_is_the_same_in_every_run_and_batch(rows, columns):
    scores = long_rows("zeros", rows, columns)
    first = dsa_ext.topk_select(scores, 2048)
    for _ in range(20):
        assert_same_bits(dsa_ext.topk_select(scores, 2048), first)
    order = torch.randperm(rows, device=DEVICE)
    assert_same_bits(dsa_ext.topk_select(scores[order], 2048), first[order])
    assert_same_bits(dsa_ext.topk_select(scores[-1:], 2048), first[-1:])


# ---- more than 2^31 elements ---------------------------------------------------------------------


@pytest.fixture
def memory_gib():
    """Skips where there is not as much free; hands it back afterwards."""
    gc.collect()
    torch.cuda.empty_cache()

    def need(gib: int) -> None:
        if torch.cuda.mem_get_info()[0] < gib * 2**30:
            pytest.skip(f"needs {gib} GiB of free GPU memory")

    yield need
    gc.collect()
    torch.cuda.empty_cache()


PAST = 2**31
FAR_PAGES = 65_600  # times 64 tokens of 584 bytes or more: past 2^31 bytes


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_logits_past_2_31(memory_gib, dtype):
    memory_gib(20)
    S, L = 4500, 480_001
    assert S * L > PAST
    q, key = random_e4m3(S, 2, 32, device=DEVICE), random_e4m3(L, 32, device=DEVICE)
    kv, weights = (key, torch.rand(L, device=DEVICE)), torch.randn(S, 2, device=DEVICE)
    start = int32(torch.randint(0, 1000, (S,)), DEVICE)
    end = int32(torch.randint(0, L, (S,)), DEVICE)
    end[-30:] = INT_MAX
    rows = torch.tensor([0, 1, 4472, 4473, 4474, 4499], device=DEVICE)
    logits = dsa_ext.fp8_mqa_logits(q, kv, weights, start, end, logits_dtype=dtype)
    expected = reference.fp8_mqa_logits(q[rows], kv, weights[rows], start[rows], end[rows])
    assert_close(logits[rows], expected, LOGITS_TOLERANCE)


@pytest.mark.slow
def test_paged_logits_past_2_31(memory_gib):
    """Of the output, and of the cache's bytes."""
    memory_gib(24)
    B, width, pages = 4500, 480_001, 260_000
    assert B * width > PAST
    assert pages * 64 * 132 > PAST
    cache = torch.zeros(pages, 64, 1, 132, dtype=torch.uint8, device=DEVICE)
    near = torch.cat([torch.arange(500), torch.arange(pages - 500, pages)]).to(DEVICE)
    slots = (near[:, None] * 64 + torch.arange(64, device=DEVICE)).flatten()
    keys = random_e4m3(len(slots), 128, device=DEVICE)
    put_indexer_keys(cache, slots, keys, torch.rand(len(slots), device=DEVICE))
    table = int32(near[torch.randint(0, len(near), (B, -(-width // 64)), device=DEVICE)], DEVICE)
    lens = int32(torch.randint(0, 300, (B,)), DEVICE)
    rows = torch.tensor([0, 4473, 4474, 4499], device=DEVICE)
    lens[rows] = INT_MAX
    q, weights = random_e4m3(B, 1, 2, 128, device=DEVICE), torch.randn(B, 2, device=DEVICE)
    logits = dsa_ext.fp8_paged_mqa_logits(q, cache, weights, lens, table, None, width, True)
    for row in rows.split(1):
        expected = reference.fp8_paged_mqa_logits(
            q[row], cache, weights[row], lens[row], table[row], None, width
        )
        assert_close(logits[row], expected, LOGITS_TOLERANCE)


@pytest.mark.slow
def test_selection_past_2_31(memory_gib):
    memory_gib(10)
    pitch = 2**30 + 7
    scores = torch.empty(2 * pitch + 5000, device=DEVICE).as_strided((3, 5000), (pitch, 1))
    scores.copy_(torch.randn(3, 5000))
    expected = ranking(scores)[:, :100].sort(dim=-1).values
    assert_same_bits(dsa_ext.topk_select(scores, 100).cpu(), expected)


def far_slots(count):
    """The first slots and the last of a cache of FAR_PAGES pages."""
    last = FAR_PAGES * 64
    return torch.cat([torch.arange(count), torch.arange(last - count, last)])


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_decode_past_2_31(memory_gib, name):
    memory_gib(8)
    fmt = FORMATS[name]
    slots = far_slots(320)
    cache = latent_cache(fmt, FAR_PAGES, 64, slots, device=DEVICE)
    assert cache.numel() > PAST
    case = {
        "q": torch.randn(2, 1, 16, fmt.d_qk).to(DEVICE, BF16 if fmt.fp8 else fmt.dtype),
        "k_cache": cache,
        "block_table": None,
        "cache_seqlens": None,
        "head_dim_v": 512,
        "tile_scheduler_metadata": None,
        "is_fp8_kvcache": fmt.fp8,
        "indices": int32(slots[torch.randint(0, len(slots), (2, 1, 300))], DEVICE),
    }
    check_gentle(case)
    pages = [[FAR_PAGES - 1, 0, FAR_PAGES - 3], [1, FAR_PAGES - 5, FAR_PAGES]]
    dense = {"block_table": int32(pages, DEVICE), "cache_seqlens": int32([150, 192], DEVICE)}
    check_cache(case | dense | {"indices": None})


@pytest.mark.slow
def test_sparse_fwd_past_2_31(memory_gib):
    memory_gib(8)
    kv = torch.empty(FAR_PAGES * 64, 1, 576, dtype=BF16, device=DEVICE)
    assert kv.numel() > PAST
    rows = far_slots(300)
    kv[rows.to(DEVICE)] = torch.randn(len(rows), 1, 576).to(DEVICE, BF16)
    case = {
        "q": torch.randn(4, 16, 576).to(DEVICE, BF16),
        "kv": kv,
        "indices": int32(rows[torch.randint(0, len(rows), (4, 1, 200))], DEVICE),
        "sm_scale": 0.04,
        "d_v": 512,
    }
    check_sparse(case)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FORMATS, "indexer"])
def test_cache_writes_and_gathers_past_2_31(memory_gib, name):
    """The last page, written and gathered, is the same as that of a small cache."""
    memory_gib(8)
    slots = torch.randperm(64, device=DEVICE)
    lengths = int32([0, 64], DEVICE)
    if name == "indexer":
        pages, width, dtype = 260_000, 132, torch.uint8
        write, gather = dsa_ext.indexer_k_quant_and_cache, dsa_ext.gather_indexer_k_cache
        rows = (torch.randn(64, 128, device=DEVICE),)
    else:
        fmt = FORMATS[name]
        pages, width, dtype = FAR_PAGES, fmt.width, fmt.dtype
        write, gather = dsa_ext.mla_kv_quant_and_cache, dsa_ext.gather_mla_kv_cache
        of = BF16 if fmt.fp8 else fmt.dtype
        rows = (torch.randn(64, fmt.d_qk - 64).to(DEVICE, of), torch.randn(64, 64).to(DEVICE, of))
    cache, twin = (paged(n, 64, width, dtype=dtype, device=DEVICE) for n in (pages, 1))
    assert cache.numel() > PAST
    write(*rows, cache, (pages - 1) * 64 + slots)
    write(*rows, twin, slots)
    assert_same_bits(cache[-1:], twin)
    got, expected = (
        gather(c, int32([[c.shape[0] - 1]], DEVICE), lengths, 64) for c in (cache, twin)
    )
    pairs = zip(got, expected, strict=True) if name == "indexer" else [(got, expected)]
    for a, b in pairs:
        assert_same_bits(a, b)


@pytest.mark.slow
def test_row_ops_past_2_31(memory_gib):
    memory_gib(14)
    x = torch.empty(2**21 + 9, 1024, dtype=BF16, device=DEVICE).normal_()
    assert x.numel() > PAST
    rows = torch.tensor([0, 2**21 - 1, 2**21, 2**21 + 8], device=DEVICE)
    got = dsa_ext.hadamard_transform(x)[rows]
    assert_close(got, reference.hadamard_transform(x[rows].float()), LOGITS_TOLERANCE)
    values, scale = dsa_ext.per_token_cast_to_fp8(x, False)
    expected = reference.per_token_cast_to_fp8(x[rows], False)
    assert_same_bits(values.view(torch.uint8)[rows], expected[0].view(torch.uint8))
    assert_same_bits(scale[rows], expected[1])


@pytest.mark.slow
def test_map_past_2_31(memory_gib):
    memory_gib(20)
    indices = torch.empty(2**20 + 4, 2048, dtype=INT32, device=DEVICE).random_(-1, 300)
    assert indices.numel() > PAST
    table = permuted_table([300] * 4, 16, 90, device=DEVICE)
    rows = torch.tensor([0, 2**20 - 1, 2**20, 2**20 + 3], device=DEVICE)
    got = dsa_ext.map_to_slots(indices, table, 16)[rows]
    request = int32(rows // (indices.shape[0] // 4), DEVICE)
    assert_same_bits(got, reference.map_to_slots(indices[rows], table, 16, request))


@pytest.mark.slow
def test_merge_past_2_31(memory_gib):
    memory_gib(14)
    outs = torch.empty(2, 2**14 + 3, 128, 512, dtype=BF16, device=DEVICE).normal_()
    assert outs.numel() > PAST
    lses = torch.randn(outs.shape[:-1], device=DEVICE)
    out, lse = dsa_ext.merge_attn_states(outs, lses)
    expected = reference.merge_attn_states(outs[:, -4:], lses[:, -4:], out_dtype=FP32)
    assert_close(out[-4:], expected[0], LOGITS_TOLERANCE)
    assert_lse_close(lse[-4:], expected[1])


# ---- hostile -------------------------------------------------------------------------------------


def test_hostile_campaign():
    """DSA_HOSTILE_CASES random small calls of all ops, from seed DSA_HOSTILE_SEED on."""
    count = int(os.environ.get("DSA_HOSTILE_CASES", "200"))
    first = int(os.environ.get("DSA_HOSTILE_SEED", "0"))
    kinds = itertools.cycle(KINDS)
    with threads(1):
        for seed, kind in zip(range(first, first + count), kinds, strict=False):
            try:
                run(make(kind, seed), DEVICE, give_workspace=seed % 2 == 0)
            except Exception as error:
                raise AssertionError(f"{kind}, seed {seed}: {error}") from error

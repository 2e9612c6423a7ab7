# SPDX-License-Identifier: Apache-2.0
"""Indexer logits, over contiguous keys and the paged cache, and their fused top-k."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch

import dsa_ext
from dsa_ext import reference
from helpers import (
    E4M3,
    INT_MAX,
    INT_MIN,
    LOGITS_TOLERANCE,
    Guarded,
    any_e4m3,
    assert_anomalies_equal,
    assert_close,
    assert_deterministic,
    assert_same_bits,
    exact_e4m3,
    hostile,
    int32,
    odd_scales,
    paged,
    permuted_table,
    poison,
    put_indexer_keys,
    random_e4m3,
    slots_of,
    spread,
)

INF = float("inf")

# S, H, D, L
PREFILL_SHAPES = [
    (1, 1, 32, 1),
    (5, 3, 64, 77),
    (3, 8, 128, 130),
    (17, 32, 128, 300),
    (33, 64, 128, 513),
    (2, 128, 64, 1000),
]
# B, next_n, H, D, page_size
PAGED_SHAPES = [
    (1, 1, 64, 128, 64),
    (3, 2, 64, 128, 64),
    (4, 1, 3, 64, 7),
    (2, 3, 8, 32, 16),
    (5, 4, 1, 128, 1),
    (2, 1, 128, 128, 256),
]


# ---- inputs --------------------------------------------------------------------------------------


@dataclass
class Prefill:
    q: torch.Tensor
    k: torch.Tensor
    k_scale: torch.Tensor
    weights: torch.Tensor
    start: torch.Tensor
    end: torch.Tensor

    def args(self):
        return self.q, (self.k, self.k_scale), self.weights, self.start, self.end

    def rows(self, rows):
        kv = (self.k, self.k_scale)
        return self.q[rows], kv, self.weights[rows], self.start[rows], self.end[rows]

    def window(self) -> torch.Tensor:
        column = torch.arange(self.k.shape[0], device=self.k.device)
        return (column >= self.start[:, None]) & (column < self.end[:, None])


def prefill(S, H, D, L, device, *, exact=False) -> Prefill:
    """Windows of all kinds (the last rows' are hostile); keys in no window are NaN."""
    make = exact_e4m3 if exact else random_e4m3
    weights = torch.randn(S, H) * H**-0.5
    if exact:
        weights = torch.randint(-4, 5, (S, H)) / 8.0
    start = torch.randint(0, L // 3 + 1, (S,))
    end = start + torch.randint(0, L + 1, (S,))
    oddities = [(0, L), (INT_MIN, INT_MAX), (L // 2, L // 2), (L, 0), (-5, 1), (INT_MAX, INT_MIN)]
    for row, (first, last) in zip(range(S - 1, -1, -1), oddities[: S - 1], strict=False):
        start[row], end[row] = first, last
    if S > 1:  # Leave the last keys out of every window, to be poisoned.
        end = end.clamp(max=max(1, L - L // 8))
    case = Prefill(
        make(S, H, D, device=device),
        make(L, D, device=device),
        torch.ones(L, device=device) * 0.5 if exact else odd_scales(L, device=device),
        weights.to(device, torch.float32),
        int32(start, device),
        int32(end, device),
    )
    unseen = ~case.window().any(dim=0)
    case.k.view(torch.uint8)[unseen] = 0xFF
    case.k_scale[unseen] = float("nan")
    for name in ("q", "k", "k_scale", "weights", "start", "end"):
        setattr(case, name, spread(getattr(case, name)))
    return case


@dataclass
class Paged:
    q: torch.Tensor
    cache: torch.Tensor
    weights: torch.Tensor
    lens: torch.Tensor  # int32 [B] or [B, next_n]
    table: torch.Tensor
    max_context_len: int
    row_lens: torch.Tensor  # int64 [B * next_n], what each row sees

    def args(self, schedule=None):
        return (
            self.q,
            self.cache,
            self.weights,
            self.lens,
            self.table,
            schedule,
            self.max_context_len,
        )


def paged_case(
    B,
    next_n,
    H,
    D,
    page_size,
    device,
    *,
    longest=None,
    two_d=False,
    exact=False,
    invalid_pages=False,
) -> Paged:
    """Lengths with a zero and a negative one among them; only visible tokens are not NaN."""
    make = exact_e4m3 if exact else random_e4m3
    longest = longest or 3 * page_size + 45
    lens = [longest if b == 0 else int(torch.randint(1, longest, (1,))) for b in range(B)]
    if B > 2:
        lens[-1], lens[-2] = 0, -3
    pages = sum(max(0, -(-n // page_size)) for n in lens) + 3
    width = -(-longest // page_size) + 2
    table = permuted_table(lens, page_size, pages, width=width, device=device)
    cache = paged(pages, page_size, D + 4, extra_stride=64, device=device)
    for b, n in enumerate(lens):
        if n <= 0:
            continue
        slots = slots_of(table, b, torch.arange(n, device=device), page_size)
        scales = torch.full((n,), 0.25, device=device) if exact else odd_scales(n, device=device)
        put_indexer_keys(cache, slots, make(n, D, device=device), scales)
    last = int32(lens, device)
    lane = torch.arange(next_n, device=device)
    context_lens = last[:, None] - next_n + 1 + lane
    if two_d:  # Rows of a request need not be in order.
        context_lens = last[:, None] - torch.randint(0, 9, (B, next_n)).to(device)
        context_lens[:, 0] = last
    if invalid_pages:  # Pages lost after they were written.
        lost = torch.rand(table.shape) < 0.3
        table = torch.where(lost.to(device), hostile(table, 1.0, (-1, INT_MIN, pages)), table)
    weights = torch.randn(B * next_n, H) * H**-0.5
    if exact:
        weights = torch.randint(-4, 5, (B * next_n, H)) / 8.0
    row_lens = context_lens.to(torch.int64).reshape(-1).clamp(0, width * page_size)
    return Paged(
        spread(make(B, next_n, H, D, device=device)),
        cache,
        spread(weights.to(device, torch.float32)),
        spread(int32(context_lens, device)) if two_d else spread(last),
        spread(table),
        width * page_size,
        row_lens,
    )


# ---- fp8_mqa_logits ------------------------------------------------------------------------------


@pytest.mark.ops("fp8_mqa_logits")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", PREFILL_SHAPES, ids=str)
def test_logits(device, shape, dtype):
    case = prefill(*shape, device)
    out = Guarded((shape[0], shape[3]), dtype, device)
    dsa_ext.fp8_mqa_logits(*case.args(), logits_dtype=dtype, out=out.out)
    expected = reference.fp8_mqa_logits(*case.args())
    assert_close(out.check(), expected, LOGITS_TOLERANCE)


@pytest.mark.ops("fp8_mqa_logits")
@pytest.mark.parametrize("shape", PREFILL_SHAPES, ids=str)
def test_logits_without_cleaning_leave_the_rest_untouched(device, shape):
    case = prefill(*shape, device)
    out = Guarded((shape[0], shape[3]), torch.float32, device)
    dsa_ext.fp8_mqa_logits(*case.args(), clean_logits=False, out=out.out)
    window = case.window()
    out.assert_untouched(~window)
    cleaned = torch.where(window, out.check(), -INF)
    assert_close(cleaned, reference.fp8_mqa_logits(*case.args()), LOGITS_TOLERANCE)


@pytest.mark.ops("fp8_mqa_logits")
@pytest.mark.parametrize("max_seqlen_k", [1, 13, 512, 1500])
@pytest.mark.parametrize("clean", [True, False])
def test_compressed_logits(device, max_seqlen_k, clean):
    """Rows hold their own windows: narrower and wider than max_seqlen_k."""
    case = prefill(33, 64, 128, 513, device)
    out = Guarded((33, max_seqlen_k), torch.float32, device)
    dsa_ext.fp8_mqa_logits(*case.args(), clean, max_seqlen_k, out=out.out)
    got = out.check()
    start = case.start.to(torch.int64).clamp(min=0)
    length = (case.end.to(torch.int64).clamp(max=513) - start)[:, None]
    inside = torch.arange(max_seqlen_k, device=device) < length
    if not clean:
        out.assert_untouched(~inside)
        got = torch.where(inside, got, -INF)
    assert_close(got, reference.fp8_mqa_logits(*case.args(), clean, max_seqlen_k), LOGITS_TOLERANCE)


@pytest.mark.ops("fp8_mqa_logits")
def test_logits_allocated_by_the_function(device):
    case = prefill(5, 8, 64, 40, device)
    logits = dsa_ext.fp8_mqa_logits(*case.args())
    assert logits.shape == (5, 40)
    assert logits.dtype == torch.float32
    assert logits.is_contiguous()
    half = dsa_ext.fp8_mqa_logits(*case.args(), True, 24, torch.bfloat16)
    assert half.shape == (5, 24)
    assert half.dtype == torch.bfloat16
    assert_close(logits, reference.fp8_mqa_logits(*case.args()), LOGITS_TOLERANCE)
    assert_close(half, reference.fp8_mqa_logits(*case.args(), True, 24), LOGITS_TOLERANCE)


@pytest.mark.ops("fp8_mqa_logits")
def test_every_e4m3_code_of_a_key(device):
    """With q = (1, -1) and weights (1, -1) a logit is the key itself, exactly."""
    codes = torch.arange(256, dtype=torch.uint8)
    k = torch.zeros(256, 32, dtype=torch.uint8)
    k[:, 7] = codes
    q = torch.zeros(1, 2, 32)
    q[0, 0, 7], q[0, 1, 7] = 1.0, -1.0
    window = (int32([0], device), int32([256], device))
    logits = dsa_ext.fp8_mqa_logits(
        q.to(E4M3).to(device),
        (k.view(E4M3).to(device), torch.ones(256, device=device)),
        torch.tensor([[1.0, -1.0]], device=device),
        *window,
    )
    value = reference.e4m3_decode(codes)
    assert_anomalies_equal(logits[0].cpu(), value)
    assert torch.equal(logits[0].cpu().nan_to_num(0.0), value.nan_to_num(0.0))


@pytest.mark.ops("fp8_mqa_logits")
def test_every_e4m3_code_of_a_query(device):
    """All finite codes of q against keys of all magnitudes."""
    q = any_e4m3(64, 4, 128, device=device)
    k = any_e4m3(300, 128, device=device)
    scale = odd_scales(300, device=device)
    weights = torch.randn(64, 4, device=device)
    window = (int32([0] * 64, device), int32([300] * 64, device))
    logits = dsa_ext.fp8_mqa_logits(q, (k, scale), weights, *window)
    expected = reference.fp8_mqa_logits(q, (k, scale), weights, *window)
    assert_close(logits, expected, LOGITS_TOLERANCE)


@pytest.mark.ops("fp8_mqa_logits")
def test_key_scales_are_applied_as_fp32(device):
    """Exact dot products leave one rounding: that of sum * scale with an fp32 scale."""
    q, k = exact_e4m3(4, 8, 64, device=device), exact_e4m3(99, 64, device=device)
    scale = odd_scales(99, device=device)
    weights = (torch.randint(-4, 5, (4, 8)) / 8.0).to(device)
    window = (int32([0] * 4, device), int32([99] * 4, device))
    logits = dsa_ext.fp8_mqa_logits(q, (k, scale), weights, *window)
    dots = torch.relu(torch.einsum("shd,ld->shl", q.double(), k.double()))
    expected = torch.einsum("sh,shl->sl", weights.double(), dots) * scale.double()
    torch.testing.assert_close(logits.double(), expected, rtol=1.2e-7, atol=0.0)


@pytest.mark.ops("fp8_mqa_logits")
def test_nan_keys_and_scales_spoil_their_own_columns_only(device):
    case = prefill(2, 8, 64, 50, device)
    k = random_e4m3(50, 64, device=device)
    scale = odd_scales(50, device=device)
    k.view(torch.uint8)[11, 3] = 0x7F
    k.view(torch.uint8)[12, 63] = 0xFF
    scale[30] = float("nan")
    window = (int32([0, 12], device), int32([50, 40], device))
    logits = dsa_ext.fp8_mqa_logits(case.q, (k, scale), case.weights, *window)
    broken = torch.isnan(logits).nonzero().tolist()
    assert broken == [[0, 11], [0, 12], [0, 30], [1, 12], [1, 30]]
    expected = reference.fp8_mqa_logits(case.q, (k, scale), case.weights, *window)
    assert_close(logits, expected, LOGITS_TOLERANCE)


@pytest.mark.ops("fp8_mqa_logits")
@pytest.mark.parametrize(("S", "L"), [(0, 10), (3, 0), (0, 0)])
def test_no_queries_or_no_keys(device, S, L):
    q, k = random_e4m3(S, 8, 64, device=device), random_e4m3(L, 64, device=device)
    scale, weights = torch.ones(L, device=device), torch.ones(S, 8, device=device)
    window = (torch.zeros(S, dtype=torch.int32, device=device),) * 2
    assert dsa_ext.fp8_mqa_logits(q, (k, scale), weights, *window).shape == (S, L)
    compressed = dsa_ext.fp8_mqa_logits(q, (k, scale), weights, *window, True, 5)
    assert torch.equal(compressed, torch.full((S, 5), -INF, device=device))
    indices = dsa_ext.fp8_mqa_topk(q, (k, scale), weights, *window, 4)
    assert torch.equal(indices, int32(torch.full((S, 4), -1), device))


@pytest.mark.ops("fp8_mqa_logits")
@pytest.mark.parametrize("weight", [0.0, -1.0])
def test_zero_and_negative_weights(device, weight):
    """Zero weights give zeros (not -inf); negative ones rank the best match last."""
    case = prefill(4, 8, 64, 60, device)
    k, scale = random_e4m3(60, 64, device=device), odd_scales(60, device=device)
    weights = torch.full((4, 8), weight, device=device)
    window = (int32([0] * 4, device), int32([60] * 4, device))
    logits = dsa_ext.fp8_mqa_logits(case.q, (k, scale), weights, *window)
    assert (logits <= 0).all()
    expected = reference.fp8_mqa_logits(case.q, (k, scale), weights, *window)
    assert_close(logits, expected, LOGITS_TOLERANCE)


@pytest.mark.ops("fp8_mqa_logits")
def test_logits_are_deterministic_and_independent_of_the_batch(device):
    case = prefill(33, 64, 128, 513, device)
    assert_deterministic(lambda: dsa_ext.fp8_mqa_logits(*case.args()))
    logits = dsa_ext.fp8_mqa_logits(*case.args())
    order = torch.randperm(33, device=device)
    assert_same_bits(dsa_ext.fp8_mqa_logits(*case.rows(order)), logits[order])
    alone = slice(20, 21)
    assert_same_bits(dsa_ext.fp8_mqa_logits(*case.rows(alone)), logits[alone])


@pytest.mark.ops("fp8_mqa_logits")
def test_odd_row_pitch(device):
    """Rows three bytes apart from where alignment would have them."""
    case = prefill(5, 3, 64, 77, device)
    case.q, case.k = spread(case.q, 3), spread(case.k, 3)
    case.weights = spread(case.weights, 1)
    out = Guarded((5, 77), torch.float32, device, pad=3)
    dsa_ext.fp8_mqa_logits(*case.args(), out=out.out)
    assert_close(out.check(), reference.fp8_mqa_logits(*case.args()), LOGITS_TOLERANCE)


# ---- fp8_paged_mqa_logits ------------------------------------------------------------------------


@pytest.mark.ops("fp8_paged_mqa_logits")
@pytest.mark.parametrize("two_d", [False, True], ids=["lens1d", "lens2d"])
@pytest.mark.parametrize("shape", PAGED_SHAPES, ids=str)
def test_paged_logits(device, shape, two_d):
    case = paged_case(*shape, device, two_d=two_d)
    rows = shape[0] * shape[1]
    out = Guarded((rows, case.max_context_len), torch.float32, device)
    dsa_ext.fp8_paged_mqa_logits(*case.args(), clean_logits=True, out=out.out)
    expected = reference.fp8_paged_mqa_logits(*case.args(), clean_logits=True)
    assert_close(out.check(), expected, LOGITS_TOLERANCE)
    assert torch.isfinite(expected).sum() == case.row_lens.sum()


@pytest.mark.ops("fp8_paged_mqa_logits")
@pytest.mark.parametrize("shape", PAGED_SHAPES, ids=str)
def test_paged_logits_in_pages_that_are_gone(device, shape):
    """-inf where the page is invalid, cleaned or not; past the end of a row nothing is written."""
    case = paged_case(*shape, device, invalid_pages=True)
    out = Guarded((shape[0] * shape[1], case.max_context_len), torch.bfloat16, device)
    dsa_ext.fp8_paged_mqa_logits(*case.args(), logits_dtype=torch.bfloat16, out=out.out)
    got = out.check()
    inside = torch.arange(case.max_context_len, device=device) < case.row_lens[:, None]
    out.assert_untouched(~inside)
    expected = reference.fp8_paged_mqa_logits(*case.args())
    assert torch.isneginf(expected[inside]).any()
    assert_close(torch.where(inside, got, -INF), expected, LOGITS_TOLERANCE)


@pytest.mark.ops("fp8_paged_mqa_logits")
@pytest.mark.parametrize("max_context_len", [0, 1, 40, 10_000])
def test_paged_logits_are_cut_to_max_context_len(device, max_context_len):
    case = paged_case(3, 2, 64, 128, 64, device)
    case.lens = int32([INT_MAX, 30, INT_MIN], device)
    pages = case.cache.shape[0]
    case.table.clamp_(0, pages - 1)
    slots = torch.arange(pages * 64, device=device)
    keys = random_e4m3(pages * 64, 128, device=device)
    put_indexer_keys(case.cache, slots, keys, odd_scales(pages * 64, device=device))
    case.max_context_len = max_context_len
    got = dsa_ext.fp8_paged_mqa_logits(*case.args(), clean_logits=True)
    expected = reference.fp8_paged_mqa_logits(*case.args(), clean_logits=True)
    assert got.shape == (6, max_context_len)
    assert_close(got, expected, LOGITS_TOLERANCE)


@pytest.mark.ops("fp8_paged_mqa_logits", "get_paged_mqa_logits_metadata")
def test_no_schedule_a_right_one_and_wrong_ones_give_the_same_bits(device):
    case = paged_case(5, 2, 64, 128, 64, device)
    expected = dsa_ext.fp8_paged_mqa_logits(*case.args(), clean_logits=True)
    stale = torch.full_like(case.lens, 7)
    schedules = [
        dsa_ext.get_paged_mqa_logits_metadata(case.lens, 64, 132),
        dsa_ext.get_paged_mqa_logits_metadata(stale, 64, 3),
        hostile(torch.zeros(133, 2, dtype=torch.int32, device=device), 1.0),
        torch.full((2, 2), INT_MAX, dtype=torch.int32, device=device),
        torch.zeros(1, 2, dtype=torch.int32, device=device),
    ]
    for schedule in schedules:
        got = dsa_ext.fp8_paged_mqa_logits(*case.args(schedule), clean_logits=True)
        assert_same_bits(got, expected)
        picked = dsa_ext.fp8_paged_mqa_topk(*case.args(schedule), 32)
        assert_same_bits(picked, dsa_ext.fp8_paged_mqa_topk(*case.args(), 32))


@pytest.mark.ops("fp8_paged_mqa_logits")
def test_paged_logits_are_deterministic_and_independent_of_the_batch(device):
    case = paged_case(5, 2, 64, 128, 64, device)
    assert_deterministic(lambda: dsa_ext.fp8_paged_mqa_logits(*case.args(), clean_logits=True))
    logits = dsa_ext.fp8_paged_mqa_logits(*case.args(), clean_logits=True).unflatten(0, (5, 2))
    order = torch.randperm(5, device=device)
    weights = case.weights.unflatten(0, (5, 2))

    def of(requests):
        return dsa_ext.fp8_paged_mqa_logits(
            case.q[requests],
            case.cache,
            weights[requests].flatten(0, 1),
            case.lens[requests],
            case.table[requests],
            None,
            case.max_context_len,
            True,
        ).unflatten(0, (-1, 2))

    assert_same_bits(of(order), logits[order])
    assert_same_bits(of(order[:1]), logits[order[:1]])


@pytest.mark.ops("fp8_paged_mqa_logits")
def test_paged_logits_equal_those_of_the_same_keys_side_by_side(device):
    """Paging moves keys, it does not change them: exact inputs, so exactly the same logits."""
    case = paged_case(2, 1, 8, 64, 16, device, exact=True)
    cu_seqlens = int32([0, *case.row_lens.cumsum(0).tolist()], device)
    total = int(case.row_lens.sum())
    k, scale = dsa_ext.gather_indexer_k_cache(case.cache, case.table, cu_seqlens, total)
    flat = dsa_ext.fp8_mqa_logits(
        case.q[:, 0],
        (k, scale),
        case.weights,
        cu_seqlens[:-1],
        cu_seqlens[1:],
        max_seqlen_k=case.max_context_len,
    )
    got = dsa_ext.fp8_paged_mqa_logits(*case.args(), clean_logits=True)
    assert torch.equal(got, flat)


@pytest.mark.ops("fp8_paged_mqa_logits")
@pytest.mark.parametrize(("B", "next_n"), [(0, 1), (2, 0)])
def test_paged_logits_of_nothing(device, B, next_n):
    q = random_e4m3(B, next_n, 8, 64, device=device)
    cache = paged(2, 4, 68, device=device)
    lens, table = int32([4] * B, device), int32(torch.zeros(B, 1), device)
    weights = torch.ones(B * next_n, 8, device=device)
    args = (q, cache, weights, lens, table, None, 4)
    assert dsa_ext.fp8_paged_mqa_logits(*args).shape == (0, 4)
    assert dsa_ext.fp8_paged_mqa_topk(*args, 3).shape == (0, 3)


@pytest.mark.ops("fp8_paged_mqa_logits")
def test_paged_logits_without_pages(device):
    """A cache of no pages and a table of no columns: all keys are out of reach."""
    q, weights = random_e4m3(2, 1, 8, 64, device=device), torch.ones(2, 8, device=device)
    lens = int32([5, INT_MAX], device)
    cache = paged(0, 4, 68, device=device)
    table = int32(torch.zeros(2, 3), device)
    got = dsa_ext.fp8_paged_mqa_logits(q, cache, weights, lens, table, None, 8, True)
    assert torch.equal(got, torch.full((2, 8), -INF, device=device))
    cache, table = paged(2, 4, 68, device=device), torch.zeros(2, 0, device=device).int()
    got = dsa_ext.fp8_paged_mqa_logits(q, cache, weights, lens, table, None, 8, True)
    assert torch.equal(got, torch.full((2, 8), -INF, device=device))


# ---- get_paged_mqa_logits_metadata ---------------------------------------------------------------


METADATA_LENS = {
    "even": [1024] * 4,
    "ragged": [1, 255, 256, 257, 5000, 0, 3, 70000],
    "zeros": [0, 0, 0],
    "hostile": [-1, INT_MIN, INT_MAX, 0, 256, INT_MAX],
    "empty": [],
    "one": [1],
}


@pytest.mark.ops("get_paged_mqa_logits_metadata")
@pytest.mark.parametrize("num_sms", [1, 2, 7, 132])
@pytest.mark.parametrize("kind", METADATA_LENS)
def test_schedule(device, kind, num_sms):
    lens = spread(int32(METADATA_LENS[kind], device))
    got = dsa_ext.get_paged_mqa_logits_metadata(lens, 64, num_sms)
    expected = reference.get_paged_mqa_logits_metadata(lens, 64, num_sms)
    assert got.shape == (num_sms + 1, 2)
    assert_same_bits(got, expected)


@pytest.mark.ops("get_paged_mqa_logits_metadata")
def test_schedule_covers_every_segment_once(device):
    lens = METADATA_LENS["ragged"]
    schedule = dsa_ext.get_paged_mqa_logits_metadata(int32(lens, device), 64, 13).tolist()
    segments = [(b, s) for b, n in enumerate(lens) for s in range(-(-n // 256))]
    ends = [*segments, (len(lens), 0)]
    begins = [ends.index(tuple(row)) for row in schedule]
    assert begins[0] == 0
    assert begins[-1] == len(segments)
    shares = [b - a for a, b in itertools.pairwise(begins)]
    assert min(shares) >= len(segments) // 13
    assert max(shares) <= -(-len(segments) // 13)


@pytest.mark.ops("get_paged_mqa_logits_metadata")
def test_schedule_of_two_dimensional_lengths_takes_the_longest(device):
    lens = int32([[300, 299], [10, 2000], [-4, -9]], device)
    got = dsa_ext.get_paged_mqa_logits_metadata(lens, 64, 5)
    assert_same_bits(got, reference.get_paged_mqa_logits_metadata(lens, 64, 5))
    longest = lens.amax(dim=1)
    assert_same_bits(got, dsa_ext.get_paged_mqa_logits_metadata(longest, 64, 5))
    assert_same_bits(got, dsa_ext.get_paged_mqa_logits_metadata(lens.t().contiguous().t(), 64, 5))


@pytest.mark.ops("get_paged_mqa_logits_metadata")
def test_schedule_ignores_request_ids_and_page_size(device):
    lens = int32(METADATA_LENS["ragged"], device)
    expected = dsa_ext.get_paged_mqa_logits_metadata(lens, 64, 9)
    ids = int32([0, 0, 1, 1, 2, 2, 3, INT_MAX], device)
    assert_same_bits(dsa_ext.get_paged_mqa_logits_metadata(lens, 64, 9, ids), expected)
    assert_same_bits(dsa_ext.get_paged_mqa_logits_metadata(lens, 1, 9, indices=ids), expected)


# ---- fp8_mqa_topk and fp8_paged_mqa_topk ---------------------------------------------------------


@pytest.mark.ops("fp8_mqa_topk")
@pytest.mark.parametrize("k", [1, 7, 64, 2048])
@pytest.mark.parametrize("shape", PREFILL_SHAPES, ids=str)
def test_topk(device, shape, k):
    """Exact arithmetic, many ties: the same indices and scores as the reference, bit for bit."""
    case = prefill(*shape, device, exact=True)
    indices = Guarded((shape[0], k), torch.int32, device)
    scores = Guarded((shape[0], k), torch.float32, device)
    out = (indices.out, scores.out)
    dsa_ext.fp8_mqa_topk(*case.args(), k, return_scores=True, out=out)
    expected = reference.fp8_mqa_topk(*case.args(), k, return_scores=True)
    assert_same_bits(indices.check(), expected[0])
    assert torch.equal(scores.check(), expected[1])


@pytest.mark.ops("fp8_mqa_topk", "fp8_mqa_logits", "topk_select")
def test_topk_is_selection_from_the_logits(device):
    """Any inputs: fused and in two steps, the same bits, of every e4m3 code and a NaN key."""
    S, L = 19, 700
    q, k = any_e4m3(S, 64, 128, device=device), any_e4m3(L, 128, device=device)
    k.view(torch.uint8)[100, 5] = 0x7F
    scale, weights = odd_scales(L, device=device), torch.randn(S, 64, device=device)
    start = int32(torch.randint(0, 200, (S,)), device)
    end = int32(torch.randint(200, L + 50, (S,)), device)
    logits = dsa_ext.fp8_mqa_logits(q, (k, scale), weights, start, end)
    for kept in (5, 300, 1000):
        args = (q, (k, scale), weights, start, end, kept)
        got = dsa_ext.fp8_mqa_topk(*args, return_scores=True)
        expected = dsa_ext.topk_select(logits, kept, start, end, return_scores=True)
        assert_same_bits(got[0], expected[0])
        assert_same_bits(got[1], expected[1])
        assert_same_bits(dsa_ext.fp8_mqa_topk(*args), expected[0])


@pytest.mark.ops("fp8_mqa_topk")
def test_topk_is_deterministic_and_independent_of_the_batch(device):
    case = prefill(33, 64, 128, 513, device)
    assert_deterministic(lambda: dsa_ext.fp8_mqa_topk(*case.args(), 100, return_scores=True))
    indices = dsa_ext.fp8_mqa_topk(*case.args(), 100)
    order = torch.randperm(33, device=device)
    assert_same_bits(dsa_ext.fp8_mqa_topk(*case.rows(order), 100), indices[order])


@pytest.mark.ops("fp8_paged_mqa_topk")
@pytest.mark.parametrize("slots", [False, True], ids=["positions", "slots"])
@pytest.mark.parametrize("two_d", [False, True], ids=["lens1d", "lens2d"])
@pytest.mark.parametrize("shape", PAGED_SHAPES, ids=str)
def test_paged_topk(device, shape, two_d, slots):
    case = paged_case(*shape, device, two_d=two_d, exact=True)
    rows, k = shape[0] * shape[1], 24
    indices = Guarded((rows, k), torch.int32, device)
    scores = Guarded((rows, k), torch.float32, device)
    out = (indices.out, scores.out)
    dsa_ext.fp8_paged_mqa_topk(*case.args(), k, return_slots=slots, return_scores=True, out=out)
    expected = reference.fp8_paged_mqa_topk(*case.args(), k, return_slots=slots, return_scores=True)
    assert_same_bits(indices.check(), expected[0])
    assert torch.equal(scores.check(), expected[1])


@pytest.mark.ops("fp8_paged_mqa_topk")
@pytest.mark.parametrize("k", [1, 30, 1000])
@pytest.mark.parametrize("shape", PAGED_SHAPES, ids=str)
def test_paged_topk_in_pages_that_are_gone(device, shape, k):
    """Tokens there score -inf: chosen last, or with the whole window; as slots they are -1."""
    case = paged_case(*shape, device, exact=True, invalid_pages=True)
    for slots in (False, True):
        got = dsa_ext.fp8_paged_mqa_topk(*case.args(), k, return_slots=slots, return_scores=True)
        expected = reference.fp8_paged_mqa_topk(
            *case.args(), k, return_slots=slots, return_scores=True
        )
        assert_same_bits(got[0], expected[0])
        assert torch.equal(got[1], expected[1])


@pytest.mark.ops("fp8_paged_mqa_topk", "fp8_paged_mqa_logits", "topk_select")
def test_paged_topk_is_selection_from_the_logits(device):
    case = paged_case(4, 2, 64, 128, 64, device, invalid_pages=True)
    logits = dsa_ext.fp8_paged_mqa_logits(*case.args(), clean_logits=True)
    for k in (9, 600):
        got = dsa_ext.fp8_paged_mqa_topk(*case.args(), k, return_scores=True)
        lens = int32(case.row_lens, device)
        expected = dsa_ext.topk_select(logits, k, None, lens, return_scores=True)
        assert_same_bits(got[0], expected[0])
        assert_same_bits(got[1], expected[1])


@pytest.mark.ops("fp8_paged_mqa_topk")
def test_paged_topk_is_deterministic_and_independent_of_the_batch(device):
    case = paged_case(5, 2, 64, 128, 64, device)
    assert_deterministic(lambda: dsa_ext.fp8_paged_mqa_topk(*case.args(), 50))
    indices = dsa_ext.fp8_paged_mqa_topk(*case.args(), 50).unflatten(0, (5, 2))
    order = torch.randperm(5, device=device)
    got = dsa_ext.fp8_paged_mqa_topk(
        case.q[order],
        case.cache,
        case.weights.unflatten(0, (5, 2))[order].flatten(0, 1),
        case.lens[order],
        case.table[order],
        None,
        case.max_context_len,
        50,
    )
    assert_same_bits(got.unflatten(0, (5, 2)), indices[order])


@pytest.mark.ops("fp8_paged_mqa_topk")
def test_poisoned_cache_is_never_selected_from(device):
    """All tokens hold NaN: the whole window still comes back when it has at most k tokens."""
    case = paged_case(1, 1, 8, 64, 16, device)
    poison(case.cache.as_strided((case.cache.shape[0], 16 * 68), (case.cache.stride(0), 1)))
    length = int(case.row_lens[0])
    indices = dsa_ext.fp8_paged_mqa_topk(*case.args(), length + 5)
    expected = [*range(length), -1, -1, -1, -1, -1]
    assert indices[0].tolist() == expected


# ---- DeepGEMM's number of SMs --------------------------------------------------------------------


def test_number_of_sms():
    """Of the device unless set; 1 without CUDA; 0 sets it back."""
    cuda = torch.cuda.is_available()
    own = torch.cuda.get_device_properties(0).multi_processor_count if cuda else 1
    assert dsa_ext.get_num_sms() == own
    try:
        dsa_ext.set_num_sms(77)
        assert dsa_ext.get_num_sms() == 77
        for wrong in (-1, 2.5):
            with pytest.raises(ValueError, match=rf"^set_num_sms: num_sms: .* >= 0, got {wrong}$"):
                dsa_ext.set_num_sms(wrong)
        assert dsa_ext.get_num_sms() == 77
    finally:
        dsa_ext.set_num_sms(0)
    assert dsa_ext.get_num_sms() == own

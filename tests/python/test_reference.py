# SPDX-License-Identifier: Apache-2.0
"""The oracle against brute force in Python loops, gradcheck, and its own contracts."""

from __future__ import annotations

import math
import struct

import pytest
import torch

from dsa_ext import reference as ref
from dsa_ext.reference import _chunks

INF, NAN = float("inf"), float("nan")
INT_MIN, INT_MAX = -(2**31), 2**31 - 1


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=[None, 1], ids=["one-chunk", "row-chunks"])
def chunks(request, monkeypatch):
    """Run a test in one chunk and again one row at a time (checkpointed when differentiating)."""
    if request.param is not None:
        monkeypatch.setattr(_chunks, "CHUNK_BYTES", request.param)


def i32(values):
    return torch.tensor(values, dtype=torch.int32)


def f64(*shape, grad=True):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)


def same(actual, expected, **tolerance):
    torch.testing.assert_close(actual, expected, equal_nan=True, **tolerance)


# Quantisation


def decode_byte(code: int) -> float:
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = (code >> 3) & 0xF, code & 7
    if exponent == 15 and mantissa == 7:
        return NAN
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (8 + mantissa) * 2.0 ** (exponent - 10)


def test_e4m3_decode_all_codes():
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    decoded = ref.e4m3_decode(codes)
    same(decoded, torch.tensor([decode_byte(c) for c in range(256)]), rtol=0, atol=0)
    same(decoded, codes.view(torch.float8_e4m3fn).float(), rtol=0, atol=0)
    assert torch.signbit(decoded[0x80]) and not torch.signbit(decoded[0])


def test_e4m3_encode_inverts_decode_on_all_codes():
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    values = ref.e4m3_decode(codes)
    keep = ~torch.isnan(values)
    assert torch.equal(ref.e4m3_encode(values)[keep], codes[keep])
    nans = torch.tensor([0x7FC00000, 0x7F800001, -0x400000], dtype=torch.int32).view(torch.float32)
    assert ref.e4m3_encode(nans).tolist() == [0x7F, 0x7F, 0xFF]


def test_e4m3_encode_matches_saturating_cast():
    magnitudes = ref.e4m3_decode(torch.arange(0x7F, dtype=torch.uint8))
    middles = (magnitudes[1:] + magnitudes[:-1]) / 2
    edges = torch.cat((magnitudes, middles))
    around = [torch.nextafter(edges, torch.full_like(edges, to)) for to in (-INF, INF)]
    special = torch.tensor([INF, 448.0, 463.9, 464.0, 465.0, 1e38, 1e-45, 1e-38, 2.0**-10, 0.0])
    spread = torch.randn(4096) * torch.exp2(torch.randint(-14, 11, (4096,)))
    x = torch.cat((edges, *around, special, spread))
    x = torch.cat((x, -x))
    expected = x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    assert torch.equal(ref.e4m3_encode(x), expected)
    assert torch.equal(ref.e4m3_encode(x[::3]), expected[::3])


def f32(x: float) -> float:
    return struct.unpack("f", struct.pack("f", x))[0]


def naive_scale(values, ue8m0: bool) -> float:
    amax = max([f32(1e-4)] + [abs(v) for v in values if not math.isnan(v)])
    scale = f32(amax / 448.0)
    return 2.0 ** math.ceil(math.log2(scale)) if ue8m0 else scale


@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_per_token_cast_to_fp8(ue8m0, dtype):
    x = (torch.randn(3, 2, 300) * 10).to(dtype)
    x[0, 0, :128] = 0
    x[0, 1, 3] = NAN
    x[1, 0] *= 1e-6
    x[1, 1, 0] = 448 * 8  # a power-of-two scale must stay as it is
    values, scale = ref.per_token_cast_to_fp8(x, ue8m0)
    assert values.dtype == torch.float8_e4m3fn and values.shape == x.shape
    assert scale.dtype == torch.float32 and scale.shape == (3, 2, 3)
    for i in range(3):
        for j in range(2):
            for g in range(3):
                group = x[i, j, g * 128 : (g + 1) * 128].float()
                expected = naive_scale(group.tolist(), ue8m0)
                assert scale[i, j, g].item() == expected
                codes = ref.e4m3_encode(group / torch.tensor(expected))
                got = values[i, j, g * 128 : (g + 1) * 128].view(torch.uint8)
                finite = ~torch.isnan(group)
                assert torch.equal(got[finite], codes[finite])
    assert torch.equal(torch.isnan(values.float()), torch.isnan(x))


@pytest.mark.parametrize("n", [1, 2, 8, 64])
def test_hadamard_is_the_sylvester_matrix(n):
    matrix = torch.tensor(
        [[(-1.0) ** (i & j).bit_count() for j in range(n)] for i in range(n)], dtype=torch.float64
    )
    x = f64(3, 2, n, grad=False)
    expected = x @ matrix * n**-0.5
    same(ref.hadamard_transform(x), expected)
    same(ref.hadamard_transform(ref.hadamard_transform(x)), x)
    half = ref.hadamard_transform(x.to(torch.bfloat16))
    assert half.dtype == torch.bfloat16
    same(half.double(), expected, atol=0.05, rtol=0.02)


def test_hadamard_gradcheck_and_error():
    assert torch.autograd.gradcheck(ref.hadamard_transform, (f64(2, 8),))
    assert ref.hadamard_transform(torch.zeros(0, 8)).shape == (0, 8)
    with pytest.raises(ValueError, match=r"hadamard_transform: x: expected .* got 12"):
        ref.hadamard_transform(torch.zeros(2, 12))


# Indexer


def naive_score(q, key, scale, weights) -> float:
    """One score from python lists q [H][D], key [D], weights [H]."""
    total = 0.0
    for head, w in zip(q, weights, strict=True):
        dot = sum(a * b for a, b in zip(head, key, strict=True))
        total += w * (dot if math.isnan(dot) else max(dot, 0.0))
    return scale * total


def naive_mqa_logits(q, k, scale, weights, start, end):
    rows, length = q.shape[0], k.shape[0]
    out = torch.full((rows, length), -INF)
    lists = [t.tolist() for t in (q.float(), k.float(), scale, weights)]
    for i in range(rows):
        for s in range(max(start[i], 0), min(end[i], length)):
            out[i, s] = naive_score(lists[0][i], lists[1][s], lists[2][s], lists[3][i])
    return out


def indexer_inputs(rows=5, heads=3, dim=8, length=11):
    q = torch.randn(rows, heads, dim).to(torch.float8_e4m3fn)
    k = torch.randn(length, dim).to(torch.float8_e4m3fn)
    return q, k, torch.rand(length) + 0.3, torch.randn(rows, heads)


HOSTILE_START = [0, -5, 3, 7, INT_MAX]
HOSTILE_END = [11, 4, INT_MAX, 2, INT_MIN]


def test_fp8_mqa_logits(chunks):
    q, k, scale, weights = indexer_inputs()
    expected = naive_mqa_logits(q, k, scale, weights, HOSTILE_START, HOSTILE_END)
    args = (q, (k, scale), weights, i32(HOSTILE_START), i32(HOSTILE_END))
    logits = ref.fp8_mqa_logits(*args)
    same(logits, expected)
    assert ref.fp8_mqa_logits(*args, logits_dtype=torch.bfloat16).dtype == torch.bfloat16
    for width in (1, 4, 30):
        packed = torch.full((5, width), -INF)
        for i in range(5):
            window = expected[i, max(HOSTILE_START[i], 0) : max(HOSTILE_END[i], 0)][:width]
            packed[i, : len(window)] = window
        same(ref.fp8_mqa_logits(*args, max_seqlen_k=width), packed)


def test_fp8_mqa_logits_nan_stays_in_its_column(chunks):
    q, k, scale, weights = indexer_inputs()
    start, end = i32([0, 2, 4, 6, 8]), i32([11] * 5)
    clean = ref.fp8_mqa_logits(q, (k, scale), weights, start, end)
    k.view(torch.uint8)[5, 2] = 0x7F
    scale[7] = NAN
    logits = ref.fp8_mqa_logits(q, (k, scale), weights, start, end)
    expected = clean.clone()
    expected[:3, 5] = NAN
    expected[:4, 7] = NAN
    same(logits, expected)


def test_fp8_mqa_logits_empty():
    q, k, scale, weights = indexer_inputs()
    none = ref.fp8_mqa_logits(q[:0], (k, scale), weights[:0], i32([]), i32([]))
    assert none.shape == (0, 11)
    zeros, ends = i32([0] * 5), i32([3] * 5)
    assert ref.fp8_mqa_logits(q, (k[:0], scale[:0]), weights, zeros, ends).shape == (5, 0)
    packed = ref.fp8_mqa_logits(q, (k[:0], scale[:0]), weights, zeros, ends, max_seqlen_k=4)
    assert packed.shape == (5, 4) and torch.isneginf(packed).all()


def finite_sum(x):
    return torch.where(torch.isfinite(x), x, 0.0)


def test_fp8_mqa_logits_gradcheck(chunks):
    q, k, scale, weights = f64(3, 2, 4), f64(5, 4), f64(5), f64(3, 2)
    start, end = i32([0, 1, 3]), i32([2, 5, 4])

    def run(q, k, scale, weights):
        logits = ref.fp8_mqa_logits(q, (k, scale), weights, start, end, logits_dtype=torch.float64)
        return finite_sum(logits)

    assert torch.autograd.gradcheck(run, (q, k, scale, weights))


def test_fp8_mqa_logits_gradient_never_meets_poison(chunks):
    q, k, scale, weights = f64(3, 2, 4), f64(6, 4), f64(6), f64(3, 2)
    with torch.no_grad():
        k[4:] = NAN  # row 4 is in the last query's window, row 5 in none
    logits = ref.fp8_mqa_logits(q, (k, scale), weights, i32([0, 0, 0]), i32([2, 3, 5]))
    assert torch.isnan(logits).nonzero().tolist() == [[2, 4]]
    finite_sum(logits).sum().backward()
    for tensor in (q, k, scale, weights):
        assert torch.isfinite(tensor.grad).all()


def indexer_cache(pages, page_size, dim, padding=0):
    """A cache of random keys, with `padding` poisoned bytes behind each page."""
    stride = page_size * (dim + 4) + padding
    storage = torch.full((pages * stride,), 0x7F, dtype=torch.uint8)
    shape, strides = (pages, page_size, 1, dim + 4), (stride, dim + 4, dim + 4, 1)
    cache = storage.as_strided(shape, strides)
    for p in range(pages):
        keys = torch.randn(page_size, dim).to(torch.float8_e4m3fn).view(torch.uint8)
        scales = (torch.rand(page_size) + 0.3).view(torch.uint8)
        storage[p * stride : p * stride + page_size * (dim + 4)] = torch.cat(
            (keys.reshape(-1), scales)
        )
    return cache


def read_indexer_key(cache, page, offset):
    """(key, scale) by explicit byte offsets."""
    page_size, dim = cache.shape[1], cache.shape[-1] - 4
    page_bytes = cache.as_strided(
        (page_size * (dim + 4),), (1,), cache.storage_offset() + page * cache.stride(0)
    ).tolist()
    key = [decode_byte(c) for c in page_bytes[offset * dim : (offset + 1) * dim]]
    at = page_size * dim + 4 * offset
    return key, struct.unpack("<f", bytes(page_bytes[at : at + 4]))[0]


def naive_paged_logits(q, cache, weights, lens, table, max_len):
    batch, next_n = q.shape[:2]
    pages, page_size = cache.shape[:2]
    out = torch.full((batch * next_n, max_len), -INF)
    for b in range(batch):
        for j in range(next_n):
            length = lens[b][j] if isinstance(lens[b], list) else lens[b] - next_n + 1 + j
            row = b * next_n + j
            for t in range(max(0, min(length, max_len, len(table[b]) * page_size))):
                page = table[b][t // page_size]
                if 0 <= page < pages:
                    key, scale = read_indexer_key(cache, page, t % page_size)
                    q_row, w_row = q[b, j].float().tolist(), weights[row].tolist()
                    out[row, t] = naive_score(q_row, key, scale, w_row)
    return out


TABLE = [[2, 0, 4], [1, -1, 3], [4, INT_MAX, INT_MIN], [3, 2, 5]]


@pytest.mark.parametrize("page_size", [1, 3, 4])
@pytest.mark.parametrize(
    "lens", [[9, 7, 5, 12], [0, -3, INT_MAX, 1], [[3, 8], [0, INT_MIN], [12, 2], [INT_MAX, 5]]]
)
def test_fp8_paged_mqa_logits(page_size, lens, chunks):
    cache = indexer_cache(5, page_size, 8, padding=12)
    q = torch.randn(4, 2, 3, 8).to(torch.float8_e4m3fn)
    weights = torch.randn(8, 3)
    expected = naive_paged_logits(q, cache, weights, lens, TABLE, 10)
    for clean in (False, True):
        logits = ref.fp8_paged_mqa_logits(q, cache, weights, i32(lens), i32(TABLE), None, 10, clean)
        same(logits, expected)
    indices, scores = ref.fp8_paged_mqa_topk(
        q, cache, weights, i32(lens), i32(TABLE), None, 10, 4, return_scores=True
    )
    slots = ref.fp8_paged_mqa_topk(
        q, cache, weights, i32(lens), i32(TABLE), None, 10, 4, return_slots=True
    )
    for row in range(8):
        b, j = divmod(row, 2)
        length = lens[b][j] if isinstance(lens[b], list) else lens[b] - 1 + j
        length = max(0, min(length, 10, 3 * page_size))
        want = naive_topk(expected[row].tolist(), 4, 0, length)
        assert indices[row].tolist() == want
        for lane, t in enumerate(want):
            page = TABLE[b][t // page_size] if t >= 0 else -1
            ok = 0 <= page < 5
            assert slots[row, lane] == (page * page_size + t % page_size if ok else -1)
        want_scores = torch.tensor([expected[row, t] if t >= 0 else -INF for t in want])
        same(scores[row], want_scores)


def test_paged_logits_gradcheck_and_poison(chunks):
    q, values, scales, weights = f64(2, 2, 2, 4), f64(3, 2, 4), f64(3, 2), f64(4, 2)
    table, lens = i32([[1, -1], [2, 1]]), i32([4, 3])

    def run(q, values, scales, weights):
        logits = ref.fp8_paged_mqa_logits(
            q, (values, scales), weights, lens, table, None, 5, logits_dtype=torch.float64
        )
        return finite_sum(logits)

    assert torch.autograd.gradcheck(run, (q, values, scales, weights))
    with torch.no_grad():
        values[0] = NAN
        scales[0] = NAN
    loss = run(q, values, scales, weights).sum()
    assert torch.isfinite(loss)
    for grad in torch.autograd.grad(loss, (q, values, scales, weights)):
        assert torch.isfinite(grad).all()


def test_paged_logits_empty():
    cache = indexer_cache(2, 4, 8)
    q = torch.zeros(2, 1, 3, 8).to(torch.float8_e4m3fn)
    table, lens, weights = i32([[0], [1]]), i32([4, 4]), torch.ones(2, 3)
    for empty in (
        ref.fp8_paged_mqa_logits(q, cache[:0], weights, lens, table, None, 6),
        ref.fp8_paged_mqa_logits(q, cache, weights, lens, table[:, :0], None, 6),
        ref.fp8_paged_mqa_logits(q, cache, weights, lens * 0, table, None, 6),
    ):
        assert empty.shape == (2, 6) and torch.isneginf(empty).all()
    args = (q[:0], cache, weights[:0], lens[:0], table[:0], None)
    assert ref.fp8_paged_mqa_logits(*args, 6).shape == (0, 6)
    assert ref.fp8_paged_mqa_topk(*args, 6, 3, return_slots=True).shape == (0, 3)


@pytest.mark.parametrize("num_sms", [1, 3, 132])
@pytest.mark.parametrize(
    "lens", [[1, 256, 257, 5000], [0, -7, 0], [0, 700, INT_MIN, INT_MAX, 0], [[3, 600], [9, 4]], []]
)
def test_paged_metadata(lens, num_sms):
    longest = [max(x) if isinstance(x, list) else x for x in lens]
    counts = [-(-max(n, 0) // 256) for n in longest]
    total = sum(counts)
    meta = ref.get_paged_mqa_logits_metadata(i32(lens), 64, num_sms)
    assert meta.dtype == torch.int32 and meta.shape == (num_sms + 1, 2)
    for i in range(num_sms + 1):
        flat, request = i * total // num_sms, 0
        while request < len(counts) and flat >= counts[request]:
            flat -= counts[request]
            request += 1
        assert meta[i].tolist() == [request, flat]


# Selection


def order_key(score, index):
    return (1, 0.0, index) if math.isnan(score) else (0, -score + 0.0, index)


def naive_topk(row, k, start, end):
    start, end = max(start, 0), min(end, len(row))
    best = sorted(range(start, end), key=lambda c: order_key(row[c], c))[:k]
    return sorted(best) + [-1] * (k - len(best))


SPECIALS = [NAN, -NAN, INF, -INF, 0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 3.4e38]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [1, 4, 9, 30])
def test_topk_select(k, dtype, chunks):
    pick = torch.randint(0, len(SPECIALS), (12, 17))
    scores = torch.tensor(SPECIALS)[pick].to(dtype)
    scores[8:] = torch.randn(4, 17)
    scores[10] = 2.5
    starts = [0, -3, 5, 16, 17, 9, INT_MIN, 2, 0, 3, 4, 1]
    ends = [17, 9, 12, INT_MAX, 17, 3, INT_MAX, 7, 17, 13, 15, 1]
    for layout in (scores, scores.t().contiguous().t(), scores.repeat(1, 2)[:, :17]):
        rows = layout.float().tolist()
        windowed, best = ref.topk_select(layout, k, i32(starts), i32(ends), return_scores=True)
        plain = ref.topk_select(layout, k)
        ends_only = ref.topk_select(layout, k, None, i32(ends))
        assert windowed.dtype == torch.int32 and best.dtype == torch.float32
        for r in range(12):
            want = naive_topk(rows[r], k, starts[r], ends[r])
            assert windowed[r].tolist() == want
            same(best[r], torch.tensor([rows[r][c] if c >= 0 else -INF for c in want]))
            assert plain[r].tolist() == naive_topk(rows[r], k, 0, 17)
            assert ends_only[r].tolist() == naive_topk(rows[r], k, 0, ends[r])


def test_topk_select_ties_and_nan_rank():
    assert ref.topk_select(torch.full((1, 9), 7.0), 3).tolist() == [[0, 1, 2]]
    assert ref.topk_select(torch.tensor([[-0.0, 0.0, -0.0]]), 2).tolist() == [[0, 1]]
    assert ref.topk_select(torch.tensor([[NAN, -INF, NAN, -INF]]), 3).tolist() == [[0, 1, 3]]
    ends, starts = i32([5]), i32([1])
    row = torch.tensor([[9.0, NAN, -INF, NAN, NAN, 9.0]])
    assert ref.topk_select(row, 3, starts, ends).tolist() == [[1, 2, 3]]
    assert ref.topk_select(row, 6, starts, ends).tolist() == [[1, 2, 3, 4, -1, -1]]


def test_topk_select_empty():
    assert ref.topk_select(torch.zeros(0, 5), 3).shape == (0, 3)
    assert ref.topk_select(torch.zeros(2, 0), 3).tolist() == [[-1] * 3] * 2
    no_requests = i32([]).reshape(0, 1)
    none = ref.topk_select(torch.zeros(0, 5), 2, block_table=no_requests, page_size=4)
    assert none.shape == (0, 2)
    with pytest.raises(ValueError, match="topk_select: k: expected an int >= 1, got 0"):
        ref.topk_select(torch.zeros(2, 5), 0)
    with pytest.raises(ValueError, match="topk_select: page_size"):
        ref.topk_select(torch.zeros(2, 5), 1, block_table=i32([[0]]))
    with pytest.raises(ValueError, match="row_to_request"):
        ref.topk_select(torch.zeros(3, 5), 1, block_table=i32([[0], [1]]), page_size=4)


def naive_slot(token, table_row, page_size):
    if token < 0 or table_row is None or token // page_size >= len(table_row):
        return -1
    entry = table_row[token // page_size]
    slot = entry * page_size + token % page_size
    return slot if entry >= 0 and slot <= INT_MAX else -1


@pytest.mark.parametrize("base", [None, 3, -4, [0, 5, -2, 1, 7, 100]])
def test_topk_select_base_and_slots(base):
    scores = torch.randn(6, 10)
    table, ids = [[5, 0, -1, 7], [2, INT_MAX, 9, 1]], [1, 0, -1, 2, 0, INT_MAX]
    shift = base if isinstance(base, list) else [base or 0] * 6
    index_base = i32(base) if isinstance(base, list) else base
    ends = i32([10, 3, 10, 10, 0, 7])
    columns = ref.topk_select(scores, 4, None, ends)
    based = ref.topk_select(scores, 4, None, ends, index_base=index_base)
    slots = ref.topk_select(
        scores, 4, None, ends, index_base=index_base, block_table=i32(table), page_size=3
    )
    routed = ref.topk_select(
        scores,
        4,
        None,
        ends,
        index_base=index_base,
        block_table=i32(table),
        page_size=3,
        row_to_request=i32(ids),
    )
    for r in range(6):
        for lane, column in enumerate(columns[r].tolist()):
            token = column + shift[r] if column >= 0 else -1
            assert based[r, lane] == token
            assert slots[r, lane] == naive_slot(token, table[r // 3], 3)
            row = table[ids[r]] if 0 <= ids[r] < 2 else None
            assert routed[r, lane] == naive_slot(token, row, 3)


def test_map_to_slots():
    table, ids = [[5, 0, -1], [2, INT_MAX, INT_MIN]], [1, -1, 0, 2]
    tokens = [[0, 4, 11, -1], [12, INT_MAX, INT_MIN, 3], [7, 8, 5, 1], [4, 0, 9, 2]]
    flat = ref.map_to_slots(i32(tokens), i32(table), 4)
    cube = ref.map_to_slots(i32(tokens).reshape(2, 2, 4), i32(table), 4)
    routed = ref.map_to_slots(i32(tokens), i32(table), 4, i32(ids))
    assert flat.dtype == torch.int32 and cube.shape == (2, 2, 4)
    for r in range(4):
        assert flat[r].tolist() == [naive_slot(t, table[r // 2], 4) for t in tokens[r]]
        row = table[ids[r]] if 0 <= ids[r] < 2 else None
        assert routed[r].tolist() == [naive_slot(t, row, 4) for t in tokens[r]]
    assert torch.equal(cube.reshape(4, 4), flat)
    no_pages = i32([[], []])
    assert ref.map_to_slots(i32(tokens), no_pages, 4).tolist() == [[-1] * 4] * 4
    with pytest.raises(ValueError, match="map_to_slots: page_size"):
        ref.map_to_slots(i32(tokens), i32(table), 0)


@pytest.mark.parametrize("k", [1, 5, 40])
def test_merge_topk(k):
    scores = torch.tensor(SPECIALS)[torch.randint(0, len(SPECIALS), (9, 20))]
    scores[5:] = torch.randn(4, 20)
    indices = torch.randint(-3, 12, (9, 20), dtype=torch.int32)
    indices[3] = -1
    indices[4, 0], indices[4, 1] = INT_MAX, INT_MIN
    merged, best = ref.merge_topk(scores, indices, k, return_scores=True)
    assert torch.equal(merged, ref.merge_topk(scores, indices, k))
    for r in range(9):
        row, ids = scores[r].tolist(), indices[r].tolist()
        valid = [p for p in range(20) if ids[p] >= 0]
        ranked = sorted(valid, key=lambda p: (*order_key(row[p], ids[p]), p))[:k]
        ranked.sort(key=lambda p: (ids[p], p))
        pad = k - len(ranked)
        assert merged[r].tolist() == [ids[p] for p in ranked] + [-1] * pad
        same(best[r], torch.tensor([row[p] for p in ranked] + [-INF] * pad))
    assert ref.merge_topk(scores[:, :0], indices[:, :0], 2).tolist() == [[-1, -1]] * 9


def test_merge_topk_of_shards_is_topk_of_the_whole():
    scores = torch.randint(0, 6, (4, 40)).float()
    parts = []
    for begin in range(0, 40, 10):
        parts.append(
            ref.topk_select(scores[:, begin : begin + 10], 7, index_base=begin, return_scores=True)
        )
    indices, best = (torch.cat(column, dim=1) for column in zip(*parts, strict=True))
    assert torch.equal(ref.merge_topk(best, indices, 7), ref.topk_select(scores, 7))


@pytest.mark.parametrize("k", [1, 3, 20])
def test_fp8_mqa_topk(k, chunks):
    q, k_rows, scale, weights = indexer_inputs()
    start, end = i32(HOSTILE_START), i32(HOSTILE_END)
    logits = ref.fp8_mqa_logits(q, (k_rows, scale), weights, start, end)
    indices, scores = ref.fp8_mqa_topk(
        q, (k_rows, scale), weights, start, end, k, return_scores=True
    )
    for i in range(5):
        want = naive_topk(logits[i].tolist(), k, HOSTILE_START[i], HOSTILE_END[i])
        assert indices[i].tolist() == want
        same(scores[i], torch.tensor([logits[i, c] if c >= 0 else -INF for c in want]))


# Attention


def naive_attention(q, rows, scale, d_v, sink=None):
    """One head over `rows` (fp64 [n, d], valid ones only): (out, max logit, lse)."""
    if len(rows) == 0:
        return torch.zeros(d_v, dtype=torch.float64), -INF, INF
    logits = [scale * sum(a * b for a, b in zip(q, row, strict=True)) for row in rows.tolist()]
    lse = max(logits) + math.log(sum(math.exp(x - max(logits)) for x in logits))
    out = torch.zeros(d_v, dtype=torch.float64)
    for x, row in zip(logits, rows, strict=True):
        out += math.exp(x - lse) * row[:d_v]
    if sink == INF:
        out = out * 0
    elif sink is not None and sink != -INF:
        out = out / (1 + math.exp(sink - lse))
    return out, max(logits), lse


def naive_sparse(q, kv, indices, scale, d_v, sink=None, length=None):
    s_q, h_q = q.shape[:2]
    out = torch.zeros(s_q, h_q, d_v, dtype=torch.float64)
    peak, lse = torch.zeros(2, s_q, h_q, dtype=torch.float64)
    for i in range(s_q):
        picked = indices[i, 0].tolist()
        if length is not None:
            picked = picked[: max(length[i], 0)]
        rows = kv[[x for x in picked if 0 <= x < kv.shape[0]], 0].double()
        for h in range(h_q):
            s = None if sink is None else sink[h].item()
            out[i, h], peak[i, h], lse[i, h] = naive_attention(
                q[i, h].double().tolist(), rows, scale, d_v, s
            )
    return out, peak, lse


INDICES = [
    [0, 3, 3, 5, 1, 3],
    [-1, 7, INT_MAX, 2, INT_MIN, 8],
    [-1, -1, 9, -1, -1, -1],
    [6, -1, 4, 9, 2, 0],
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("with_sink", [False, True])
def test_flash_mla_sparse_fwd(dtype, with_sink, chunks):
    q, kv = torch.randn(4, 5, 12).to(dtype), torch.randn(9, 1, 12).to(dtype)
    indices = i32(INDICES).unsqueeze(1)
    sink = torch.tensor([0.3, INF, -INF, -2.0, 40.0]) if with_sink else None
    length = [6, INT_MAX, 3, 1]
    for lengths in (None, i32(length)):
        expected = naive_sparse(q, kv, indices, 0.37, 8, sink, None if lengths is None else length)
        out, peak, lse = ref.flash_mla_sparse_fwd(
            q, kv, indices, 0.37, 8, sink, lengths, out_dtype=torch.float64
        )
        wide = dtype == torch.float64
        assert peak.dtype == lse.dtype == (torch.float64 if wide else torch.float32)
        tolerance = {"rtol": 1e-10, "atol": 1e-12} if wide else {"rtol": 1e-5, "atol": 2e-6}
        for got, want in zip((out, peak, lse), expected, strict=True):
            same(got.double(), want, **tolerance)
        rounded = ref.flash_mla_sparse_fwd(q, kv, indices, 0.37, 8, sink, lengths)[0]
        same(rounded, out.to(dtype))


def test_flash_mla_sparse_fwd_lengths_at_or_below_zero():
    q, kv = torch.randn(4, 2, 12), torch.randn(9, 1, 12)
    indices = i32(INDICES).unsqueeze(1)
    out, peak, lse = ref.flash_mla_sparse_fwd(
        q, kv, indices, 1.0, 8, torch.tensor([INF, 0.0]), i32([0, -1, INT_MIN, 2])
    )
    assert (out[:3] == 0).all() and torch.isneginf(peak[:3]).all() and torch.isposinf(lse[:3]).all()
    assert torch.isfinite(lse[3]).all()


def test_flash_mla_sparse_fwd_empty():
    q, kv = torch.randn(2, 3, 12), torch.randn(5, 1, 12)
    indices = i32([[[0, 1]], [[2, 3]]])
    for args in ((q, kv[:0], indices), (q, kv, indices[..., :0])):
        out, peak, lse = ref.flash_mla_sparse_fwd(*args, 1.0, 8, torch.zeros(3))
        assert out.shape == (2, 3, 8) and (out == 0).all()
        assert torch.isneginf(peak).all() and torch.isposinf(lse).all()
    out, _, lse = ref.flash_mla_sparse_fwd(q[:0], kv, indices[:0], 1.0, 8)
    assert out.shape == (0, 3, 8) and lse.shape == (0, 3)


def test_sparse_attention_gradcheck(chunks):
    q, kv, sink = f64(4, 2, 5), f64(9, 1, 5), f64(2)
    indices, length = i32(INDICES).unsqueeze(1), i32([6, 4, 6, 5])

    def run(q, kv, sink):
        out, lse = ref.sparse_mla_attention(q, kv, indices, 0.7, 3, sink, length)
        return out, finite_sum(lse)

    assert torch.autograd.gradcheck(run, (q, kv, sink))


def test_sparse_attention_poison_reaches_nothing(chunks):
    q, kv, sink = f64(4, 2, 5), f64(9, 1, 5), f64(2)
    indices, length = i32(INDICES).unsqueeze(1), i32([6, 4, 6, 5])
    used = {x for row, n in zip(INDICES, [6, 4, 6, 5], strict=True) for x in row[:n]}
    used -= {0}  # row 0 stands in for invalid indices: drop it from every query
    indices[indices == 0] = -1
    clean = kv.detach().clone().requires_grad_()
    with torch.no_grad():
        kv[[r for r in range(9) if r not in used]] = NAN
    results = []
    for latent in (clean, kv):
        out, lse = ref.sparse_mla_attention(q, latent, indices, 0.7, 3, sink, length)
        loss = (out**2).sum() + finite_sum(lse).sum()
        results.append((out, lse, *torch.autograd.grad(loss, (q, latent, sink))))
    for with_clean, with_poison in zip(*results, strict=True):
        same(with_poison, with_clean)
        assert not torch.isnan(with_poison).any()


def test_sparse_attention_gradient_at_infinite_sinks():
    q, kv = f64(4, 2, 5), f64(9, 1, 5)
    sink = torch.tensor([INF, -INF], dtype=torch.float64, requires_grad=True)
    out, lse = ref.sparse_mla_attention(q, kv, i32(INDICES).unsqueeze(1), 0.7, 3, sink)
    for grad in torch.autograd.grad(out.sum() + finite_sum(lse).sum(), (q, kv, sink)):
        assert torch.isfinite(grad).all()


def float_cache(pages, page_size, dim, dtype):
    """A non-contiguous cache."""
    return torch.randn(pages, page_size + 1, 2, dim + 3).to(dtype)[:, :page_size, :1, :dim]


def v32_cache(pages, page_size):
    cache = torch.zeros(pages, page_size * 656 + 48, dtype=torch.uint8)
    cache = cache[:, : page_size * 656].unflatten(1, (page_size, 1, 656))
    fill_latent_cache(cache, 512)
    return cache


def v4_cache(pages, page_size):
    stride = -(-page_size * 584 // 576) * 576
    storage = torch.full((pages * stride + 64,), 0x7F, dtype=torch.uint8)
    cache = storage.as_strided((pages, page_size, 1, 584), (stride, 584, 584, 1), 64)
    fill_latent_cache(cache, 448)
    return cache


def fill_latent_cache(cache, d_nope):
    tokens = cache.shape[0] * cache.shape[1]
    kv_c = torch.randn(tokens, d_nope) * torch.exp2(torch.randint(-3, 4, (tokens, d_nope)))
    k_pe = torch.randn(tokens, 64).to(torch.bfloat16)
    ref.mla_kv_quant_and_cache(kv_c.to(torch.bfloat16), k_pe, cache, torch.arange(tokens))


def read_latent(cache, page, offset):
    """One row, fp64 [d], by explicit byte offsets."""
    if cache.element_size() > 1:
        return cache[page, offset, 0].double()
    page_size, width = cache.shape[1], cache.shape[-1]
    at = cache.storage_offset() + page * cache.stride(0)
    if width == 656:
        row = bytes(cache[page, offset, 0].view(torch.uint8).tolist())
        codes, scale_bytes, rope = row[:512], row[512:528], row[528:]
        scales = [s for s in struct.unpack("<4f", scale_bytes) for _ in range(128)]
    else:
        flat = cache.view(torch.uint8).as_strided((page_size * 584,), (1,), at).tolist()
        row = bytes(flat[offset * 576 : (offset + 1) * 576])
        codes, rope = row[:448], row[448:]
        exponents = flat[page_size * 576 + offset * 8 :][:7]
        scales = [2.0 ** (e - 127) for e in exponents for _ in range(64)]
    halves = struct.unpack("<64H", rope)
    tail = [struct.unpack("<f", struct.pack("<I", x << 16))[0] for x in halves]
    head = [f32(decode_byte(c) * s) for c, s in zip(codes, scales, strict=True)]
    return torch.tensor(head + tail, dtype=torch.float64)


CACHES = {
    "float": lambda pages, size: float_cache(pages, size, 12, torch.bfloat16),
    "v32": v32_cache,
    "v4": v4_cache,
}


def rows_at(cache, slots):
    page_size = cache.shape[1]
    valid = [s for s in slots if 0 <= s < cache.shape[0] * page_size]
    rows = [read_latent(cache, s // page_size, s % page_size) for s in valid]
    return torch.stack(rows) if rows else torch.zeros(0, 1, dtype=torch.float64)


def check_decode(q, rows, d_v, scale, sink, got):
    """Compare (out, lse) with rows[b][j], the latents query j of request b attends to."""
    out, lse = got
    for b in range(q.shape[0]):
        for j in range(q.shape[1]):
            for h in range(q.shape[2]):
                want, _, want_lse = naive_attention(
                    q[b, j, h].double().tolist(), rows[b][j], scale, d_v, sink[h].item()
                )
                same(out[b, j, h].double(), want, rtol=2e-5, atol=5e-6)
                assert lse[b, h, j].item() == pytest.approx(want_lse, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("kind", CACHES)
def test_flash_mla_with_kvcache_dense(kind, chunks):
    cache = CACHES[kind](4, 3)
    dim, d_v = {"float": (12, 8), "v32": (576, 512), "v4": (512, 512)}[kind]
    q = torch.randn(5, 2, 2, dim).to(torch.bfloat16)
    table = [[1, 3], [0, -1], [INT_MAX, 2], [2, 1], [3, 0]]
    lens, sink = [5, 6, INT_MAX, 1, -4], torch.tensor([0.5, -INF])
    for causal in (False, True):
        rows = []
        for b in range(5):
            rows.append([])
            for j in range(2):
                n = min(max(lens[b], 0), 6)
                n = n - 1 + j if causal else n
                slots = [table[b][t // 3] * 3 + t % 3 for t in range(n) if table[b][t // 3] >= 0]
                rows[b].append(rows_at(cache, slots))
        got = ref.flash_mla_with_kvcache(
            q,
            cache,
            i32(table),
            i32(lens),
            d_v,
            None,
            causal=causal,
            is_fp8_kvcache=kind != "float",
            attn_sink=sink,
            out_dtype=torch.float32,
        )
        check_decode(q, rows, d_v, dim**-0.5, sink, got)


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("per_query", [False, True])
def test_flash_mla_with_kvcache_sparse(kind, per_query, chunks):
    cache, extra = CACHES[kind](4, 3), CACHES[kind](2, 5)
    if kind == "v32":
        cache, extra = cache.view(torch.int8), extra.view(torch.float8_e4m3fn)
    dim, d_v = {"float": (12, 8), "v32": (576, 512), "v4": (512, 512)}[kind]
    q = torch.randn(2, 2, 2, dim).to(torch.bfloat16)
    slots = torch.randint(-2, 14, (2, 2, 6), dtype=torch.int32)
    slots[1, 1] = i32([INT_MAX, INT_MIN, -1, 12, -1, -1])
    more = torch.randint(-1, 11, (2, 2, 3), dtype=torch.int32)
    more[1, 1] = -1
    length = [[6, 2], [0, INT_MAX]] if per_query else [4, INT_MAX]
    more_length = [[1, 3], [2, 9]] if per_query else [2, 3]
    sink = torch.tensor([0.5, INF])
    rows = []
    for b in range(2):
        rows.append([])
        for j in range(2):
            n, m = (x[b][j] if per_query else x[b] for x in (length, more_length))
            main = rows_at(cache, slots[b, j].tolist()[:n])
            rest = rows_at(extra, more[b, j].tolist()[:m])
            rows[b].append(torch.cat([x for x in (main, rest) if len(x)] or [main]))
    got = ref.flash_mla_with_kvcache(
        q,
        cache,
        None,
        None,
        d_v,
        None,
        softmax_scale=0.11,
        is_fp8_kvcache=kind != "float",
        indices=slots,
        attn_sink=sink,
        extra_k_cache=extra,
        extra_indices_in_kvcache=more,
        topk_length=i32(length),
        extra_topk_length=i32(more_length),
        out_dtype=torch.float32,
        batch_invariant=True,
    )
    check_decode(q, rows, d_v, 0.11, sink, got)
    assert torch.isposinf(got[1][1, :, 1]).all() and (got[0][1, 1] == 0).all()


def test_flash_mla_with_kvcache_gradcheck_and_poison(chunks):
    q, cache, extra, sink = f64(2, 2, 2, 5), f64(3, 2, 1, 5), f64(2, 1, 1, 5), f64(2)
    table, lens = i32([[2, 1], [1, -1]]), i32([3, 4])
    slots = i32([[[2, 5, -1], [4, 9, 4]], [[-1] * 3, [3, 2, -1]]])
    more = i32([[[1, -1], [1, 1]], [[-1, -1], [7, 1]]])

    def dense(q, cache, sink):
        out, lse = ref.flash_mla_with_kvcache(
            q, cache, table, lens, 3, None, causal=True, attn_sink=sink
        )
        return out, finite_sum(lse)

    def sparse(q, cache, extra, sink):
        out, lse = ref.flash_mla_with_kvcache(
            q,
            cache,
            None,
            None,
            3,
            None,
            indices=slots,
            attn_sink=sink,
            extra_k_cache=extra,
            extra_indices_in_kvcache=more,
        )
        return out, finite_sum(lse)

    assert torch.autograd.gradcheck(dense, (q, cache, sink))
    assert torch.autograd.gradcheck(sparse, (q, cache, extra, sink))
    with torch.no_grad():
        cache[0] = NAN
        extra[0] = NAN
    for run, inputs in ((dense, (q, cache, sink)), (sparse, (q, cache, extra, sink))):
        out, lse = run(*inputs)
        assert torch.isfinite(out).all()
        for grad in torch.autograd.grad(out.sum() + lse.sum(), inputs):
            assert torch.isfinite(grad).all()


def test_flash_mla_with_kvcache_causal_poison_is_seen_by_later_queries_only():
    q, cache = torch.randn(1, 3, 2, 12), torch.randn(2, 4, 1, 12)
    cache[1, 1] = NAN  # token 5 of 6
    out, lse = ref.flash_mla_with_kvcache(q, cache, i32([[0, 1]]), i32([6]), 8, None, causal=True)
    assert torch.isfinite(out[:, :2]).all() and torch.isfinite(lse[..., :2]).all()
    assert torch.isnan(out[:, 2]).all() and torch.isnan(lse[..., 2]).all()


def test_flash_mla_with_kvcache_empty_and_errors():
    q, cache = torch.randn(2, 1, 3, 12), torch.randn(4, 2, 1, 12)
    table, lens = i32([[0], [1]]), i32([2, 2])
    for args in ((cache[:0], table, lens), (cache, table[:, :0], lens), (cache, table, lens * 0)):
        out, lse = ref.flash_mla_with_kvcache(q, *args, 8, None)
        assert out.shape == (2, 1, 3, 8) and (out == 0).all() and torch.isposinf(lse).all()
    out, lse = ref.flash_mla_with_kvcache(q[:0], cache, table[:0], lens[:0], 8, None)
    assert out.shape == (0, 1, 3, 8) and lse.shape == (0, 3, 1)
    slots = torch.zeros(2, 1, 4, dtype=torch.int32)
    for message, kwargs in (
        ("block_table, cache_seqlens", {}),
        ("causal", {"indices": slots, "causal": True}),
        ("extra_k_cache", {"indices": slots, "extra_k_cache": cache}),
        ("k_cache", {"indices": slots, "is_fp8_kvcache": True}),
    ):
        with pytest.raises(ValueError, match=f"flash_mla_with_kvcache: {message}.*expected"):
            ref.flash_mla_with_kvcache(q, cache, None, None, 8, None, **kwargs)
    with pytest.raises(ValueError, match="topk_length"):
        ref.flash_mla_with_kvcache(q, cache, table, lens, 8, None, topk_length=lens)


@pytest.mark.parametrize("d_v", [0, 13])
def test_attention_refuses_a_d_v_that_k_does_not_have(d_v):
    q, kv, slots = torch.randn(2, 3, 12), torch.randn(8, 1, 12), i32([[[0]], [[1]]])
    with pytest.raises(ValueError, match=f"sparse_fwd: d_v: expected 1 to d_qk=12, got {d_v}"):
        ref.flash_mla_sparse_fwd(q, kv, slots, 1.0, d_v)
    with pytest.raises(ValueError, match=f"head_dim_v: expected 1 to d_qk=12, got {d_v}"):
        ref.flash_mla_with_kvcache(q[:, None], kv[None], None, None, d_v, indices=slots)


def test_latents_have_one_head():
    q, kv, slots = torch.randn(2, 1, 3, 12), torch.randn(4, 2, 2, 12), i32([[[0]], [[1]]])
    good, table, lens = kv[:, :, :1], i32([[0]]), i32([0, 1])
    extra = {"extra_k_cache": kv, "extra_indices_in_kvcache": slots}
    calls = [
        ("kv", lambda: ref.flash_mla_sparse_fwd(q[:, 0], kv, slots, 1.0, 8)),
        ("kv", lambda: ref.flash_mla_sparse_fwd(q[:, 0], kv.flatten(0, 1), slots, 1.0, 8)),
        ("k_cache", lambda: ref.flash_mla_with_kvcache(q, kv, None, None, 8, indices=slots)),
        (
            "extra_k_cache",
            lambda: ref.flash_mla_with_kvcache(q, good, None, None, 8, indices=slots, **extra),
        ),
        ("kv_cache", lambda: ref.mla_kv_quant_and_cache(q[:, 0, 0, :8], q[:, 0, 0, 8:], kv, lens)),
        ("kv_cache", lambda: ref.gather_mla_kv_cache(kv, table, lens, 1)),
    ]
    for name, call in calls:
        with pytest.raises(ValueError, match=rf": {name}: expected \[..., 1, d\], got .*2, 12"):
            call()


def test_indices_lengths_and_tables_are_integers():
    """Floats are not truncated to some index."""
    q, kv, scores = torch.randn(2, 1, 3, 12), torch.randn(4, 2, 1, 12), torch.randn(2, 6)
    keys, cache = (torch.randn(6, 12), torch.rand(6)), indexer_cache(4, 2, 12)
    slots, table, lens, cu_seqlens = (
        i32([[[0]], [[1]]]),
        i32([[0], [1]]),
        i32([1, 2]),
        i32([0, 1, 2]),
    )

    def paged_logits(lens, table):
        ref.fp8_paged_mqa_logits(q, cache, scores[:, :3], lens, table, None, 2)

    def select(starts, ends, base, table, requests):
        kwargs = {"index_base": base, "block_table": table, "row_to_request": requests}
        ref.topk_select(scores, 2, starts, ends, page_size=2, **kwargs)

    for call, *integers in (
        (lambda i, n: ref.flash_mla_sparse_fwd(q[:, 0], kv, i, 1.0, 8, None, n), slots, lens),
        (lambda t, n: ref.flash_mla_with_kvcache(q, kv, t, n, 8), table, lens),
        (lambda i: ref.flash_mla_with_kvcache(q, kv, None, None, 8, indices=i), slots),
        (lambda i, n: ref.attention_target(q[:, 0], kv[:, 0], 1.0, i, topk_length=n), slots, lens),
        (lambda a, b: ref.fp8_mqa_logits(q[:, 0], keys, scores[:, :3], a, b), lens, lens),
        (paged_logits, lens, table),
        (lambda n: ref.get_paged_mqa_logits_metadata(n, 64, 4), lens),
        (select, lens, lens + 2, lens, table, lens - 1),
        (lambda i, t, r: ref.map_to_slots(i, t, 2, r), slots[0].expand(2, 1), table, lens - 1),
        (lambda i: ref.merge_topk(scores[:, :1], i, 1), slots[:, 0]),
        (lambda m: ref.indexer_k_quant_and_cache(q[:, 0, 0], cache, m), lens),
        (lambda t, c: ref.gather_indexer_k_cache(cache, t, c, 2), table, cu_seqlens),
    ):
        call(*integers)
        for i, wrong in enumerate(integers):
            with pytest.raises(ValueError, match=r": expected integers, got torch.float32"):
                call(*integers[:i], wrong + 0.5, *integers[i + 1 :])


def test_merge_attn_states_of_splits_is_the_whole():
    q, kv = f64(4, 2, 5, grad=False), f64(9, 1, 5, grad=False)
    indices = i32(INDICES).unsqueeze(1)
    whole = ref.flash_mla_sparse_fwd(q, kv, indices, 0.7, 3)
    parts = [
        ref.flash_mla_sparse_fwd(q, kv, indices[..., a : a + 2].contiguous(), 0.7, 3)
        for a in (0, 2, 4)
    ]
    outs, lses = [p[0] for p in parts], [p[2] for p in parts]
    for merged in (
        ref.merge_attn_states(outs, lses),
        ref.merge_attn_states(torch.stack(outs), torch.stack(lses)),
    ):
        same(merged[0], whole[0])
        same(merged[1], whole[2])


def test_merge_attn_states_ignores_empty_parts():
    outs, lses = torch.randn(3, 2, 4, 8), torch.randn(3, 2, 4)
    lses[1, 0], outs[1, 0] = INF, NAN
    lses[2, 0, :2], outs[2, 0, :2] = -INF, INF
    lses[:, 1, 3], outs[:, 1, 3] = torch.tensor([INF, -INF, INF]), NAN
    out, lse = ref.merge_attn_states(outs.to(torch.bfloat16), lses, out_dtype=torch.float32)
    same(out[0, 0], outs[0, 0, 0].bfloat16().float())
    same(lse[0, :2], lses[0, 0, :2])
    assert (out[1, 3] == 0).all() and torch.isposinf(lse[1, 3]) and torch.isfinite(out).all()
    assert ref.merge_attn_states(outs.to(torch.bfloat16), lses)[0].dtype == torch.bfloat16


def test_merge_attn_states_gradcheck():
    outs, lses = f64(3, 2, 2, 4), f64(3, 2, 2)
    empty = torch.zeros(3, 2, 2, dtype=torch.bool)
    empty[1, 0], empty[:, 1, 1] = True, True

    def run(outs, lses):
        out, lse = ref.merge_attn_states(outs, lses.masked_fill(empty, INF))
        return out, finite_sum(lse)

    assert torch.autograd.gradcheck(run, (outs, lses))
    with torch.no_grad():
        outs[empty] = NAN
    out, lse = run(outs, lses)
    for grad in torch.autograd.grad(out.sum() + lse.sum(), (outs, lses)):
        assert torch.isfinite(grad).all()


# Caches

SLOTS = [3, -1, 7, 0, 8, INT_MIN, 7]  # of 4 pages of 2: 8 is outside, 7 comes twice


@pytest.mark.parametrize("scale_fmt", [None, "fp32", "ue8m0"])
@pytest.mark.parametrize("slot_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_indexer_cache_round_trip(scale_fmt, slot_dtype, dtype):
    cache = indexer_cache(4, 2, 32, padding=20)
    before = cache.clone()
    pad_before = cache.as_strided((4, 20), (cache.stride(0), 1), 2 * 36).clone()
    k = (torch.randn(7, 32) * 3).to(dtype)
    k[3] = 0
    slots = torch.tensor(SLOTS, dtype=slot_dtype)
    assert ref.indexer_k_quant_and_cache(k, cache, slots, scale_fmt) is None
    values, scales = ref.dequantize_indexer_k_cache(cache)
    assert values.shape == (4, 2, 32) and scales.shape == (4, 2)
    written = {3: 0, 7: 6, 0: 3}
    for slot in range(8):
        key, scale = read_indexer_key(cache, slot // 2, slot % 2)
        assert values[slot // 2, slot % 2].tolist() == key
        assert scales[slot // 2, slot % 2].item() == scale
        if slot in written:
            row = k[written[slot]].float()
            assert scale == naive_scale(row.tolist(), scale_fmt == "ue8m0")
            assert torch.equal(ref.e4m3_encode(row / scale), ref.e4m3_encode(torch.tensor(key)))
        else:
            assert (key, scale) == read_indexer_key(before, slot // 2, slot % 2)
    assert torch.equal(cache.as_strided((4, 20), (cache.stride(0), 1), 2 * 36), pad_before)


def test_indexer_cache_rejects_scale_fmt():
    with pytest.raises(ValueError, match=r"cache: scale_fmt: expected .* got 'e'"):
        ref.indexer_k_quant_and_cache(torch.zeros(1, 8), indexer_cache(1, 1, 8), i32([0]), "e")


@pytest.mark.parametrize("kind", ["v32", "v4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mla_fp8_cache_round_trip(kind, dtype):
    cache = CACHES[kind](4, 2)
    d_nope, group = {"v32": (512, 128), "v4": (448, 64)}[kind]
    before = ref.dequantize_mla_kv_cache(cache)
    kv_c = (torch.randn(7, d_nope) * torch.exp2(torch.randint(-4, 5, (7, d_nope)))).to(dtype)
    kv_c[3] = 0
    k_pe = torch.randn(7, 64).to(dtype)
    storage = torch.empty(0, dtype=torch.uint8).set_(cache.untyped_storage())
    bytes_before = storage.clone()
    ref.mla_kv_quant_and_cache(kv_c, k_pe, cache, torch.tensor(SLOTS))
    after = ref.dequantize_mla_kv_cache(cache)
    assert after.dtype == torch.float32 and after.shape == (4, 2, d_nope + 64)
    written = {3: 0, 7: 6, 0: 3}
    for slot in range(8):
        row = after[slot // 2, slot % 2]
        assert torch.equal(row.double(), read_latent(cache, slot // 2, slot % 2))
        if slot not in written:
            assert torch.equal(row, before[slot // 2, slot % 2])
            continue
        token = written[slot]
        assert torch.equal(row[d_nope:], k_pe[token].to(torch.bfloat16).float())
        for g in range(d_nope // group):
            source = kv_c[token, g * group : (g + 1) * group].float()
            scale = naive_scale(source.tolist(), kind == "v4")
            codes = ref.e4m3_encode(source / scale)
            assert torch.equal(row[g * group : (g + 1) * group], ref.e4m3_decode(codes) * scale)
    changed = (storage != bytes_before).sum()
    assert 0 < changed <= 3 * (656 if kind == "v32" else 584)
    if kind == "v4":
        pads = cache.as_strided((4, 2), (cache.stride(0), 8), cache.storage_offset() + 2 * 576 + 7)
        assert (pads == 0).all()


def test_mla_float_cache_is_copied():
    cache = float_cache(4, 2, 12, torch.float16)
    expected = cache.clone()
    kv_c, k_pe = torch.randn(7, 8).half(), torch.randn(7, 4).half()
    ref.mla_kv_quant_and_cache(kv_c, k_pe, cache, i32(SLOTS))
    for slot, token in ((3, 0), (7, 6), (0, 3)):
        expected[slot // 2, slot % 2, 0] = torch.cat((kv_c[token], k_pe[token]))
    assert torch.equal(cache, expected)


def test_ue8m0_scale_codes_at_the_ends():
    cache = torch.zeros(1, 1, 1, 584, dtype=torch.uint8)
    flat = cache.view(-1)
    flat[:448] = 0x38  # 1.0
    flat[576:583] = torch.tensor([0, 1, 126, 127, 128, 254, 255], dtype=torch.uint8)
    values = ref.dequantize_mla_kv_cache(cache)[0, 0, :448:64].double()
    expected = [2.0**-127, 2.0**-126, 0.5, 1.0, 2.0, 2.0**127, NAN]
    same(values, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=0)


@pytest.mark.parametrize("cu", [[0, 3, 3, 8], [2, 5, 4, 9], [-3, 1, 2, INT_MAX], [9, 5, 1, 0]])
@pytest.mark.parametrize("kind", ["indexer", *CACHES])
def test_gathers(kind, cu):
    cache = indexer_cache(4, 2, 8, padding=4) if kind == "indexer" else CACHES[kind](4, 2)
    table = [[1, -1, 0], [3, 2, 1], [2, 4, INT_MIN]]
    rows = []
    for t in range(10):
        owners = [b for b in range(3) if cu[b] <= t]
        rows.append(None)
        if owners and t < cu[owners[-1] + 1]:
            token = t - cu[owners[-1]]
            page = table[owners[-1]][token // 2] if token // 2 < 3 else -1
            if 0 <= page < 4:
                rows[t] = (page, token % 2)
    if kind == "indexer":
        k, scale = ref.gather_indexer_k_cache(cache, i32(table), i32(cu), 10)
        assert k.dtype == torch.float8_e4m3fn and k.shape == (10, 8)
        for t, at in enumerate(rows):
            want = ([0.0] * 8, 0.0) if at is None else read_indexer_key(cache, *at)
            assert (k[t].float().tolist(), scale[t].item()) == want
        return
    latent = ref.gather_mla_kv_cache(cache, i32(table), i32(cu), 10)
    assert latent.dtype == torch.bfloat16
    for t, at in enumerate(rows):
        want = torch.zeros(latent.shape[1]) if at is None else read_latent(cache, *at).float()
        assert torch.equal(latent[t], want.to(torch.bfloat16))


def test_gathers_of_nothing():
    cache, table = indexer_cache(2, 2, 8), i32([[0], [1]])
    empty = i32([]).reshape(0, 3)
    for args in (
        (cache, table, i32([0, 2, 4]), 0),
        (cache, empty, i32([0]), 3),
        (cache, table[:, :0], i32([0, 1, 2]), 3),
        (cache[:0], table, i32([0, 1, 2]), 3),
    ):
        k, scale = ref.gather_indexer_k_cache(*args)
        assert k.shape == (args[-1], 8) and (k.float() == 0).all() and (scale == 0).all()
    ref.indexer_k_quant_and_cache(torch.zeros(0, 8), cache, i32([]))
    ref.indexer_k_quant_and_cache(torch.zeros(2, 8), cache, i32([-1, 4]))


# Training


def naive_target(q, kv, scale, rows):
    """rows[i]: token of each column, or None where invalid."""
    target = torch.zeros(len(rows), len(rows[0]), dtype=torch.float64)
    for i, tokens in enumerate(rows):
        valid = [c for c, t in enumerate(tokens) if t is not None]
        for h in range(q.shape[1]):
            logits = torch.tensor(
                [scale * (q[i, h].double() @ kv[tokens[c], 0].double()).item() for c in valid],
                dtype=torch.float64,
            )
            target[i, valid] += logits.softmax(0) if valid else 0
        target[i] /= max(target[i].sum().item(), 1e-300)
    return target


def test_attention_target(chunks):
    q, kv = f64(4, 3, 5, grad=False), f64(9, 1, 5, grad=False)
    length = [6, 4, 6, 5]
    rows = [
        [x if 0 <= x < 9 and c < n else None for c, x in enumerate(row)]
        for row, n in zip(INDICES, length, strict=True)
    ]
    indices = i32(INDICES).unsqueeze(1)
    target = ref.attention_target(q, kv, 0.7, indices, topk_length=i32(length))
    same(target, naive_target(q, kv, 0.7, rows))
    causal = [[t if t < 6 + i else None for t in range(9)] for i in range(4)]
    same(ref.attention_target(q, kv, 0.7), naive_target(q, kv, 0.7, causal))
    start, end = [0, 3, 8, 5], [4, INT_MAX, 2, 9]
    window = [[t if start[i] <= t < end[i] else None for t in range(9)] for i in range(4)]
    poisoned = torch.cat((kv, torch.full((2, 1, 5), NAN, dtype=torch.float64)))
    got = ref.attention_target(q, poisoned, 0.7, row_starts=i32(start), row_ends=i32([4, 9, 2, 9]))
    same(got[:, :9], naive_target(q, kv, 0.7, window))
    assert (got[:, 9:] == 0).all()
    quiet = torch.tensor([-INF, INF, INF])  # only head 0 is heard
    same(
        ref.attention_target(q, kv, 0.7, attn_sink=quiet),
        naive_target(q[:, :1], kv, 0.7, causal),
    )
    assert not ref.attention_target(q.requires_grad_(), kv, 0.7).requires_grad


def test_kl_loss_value_and_reductions():
    scores, probs = f64(5, 7, grad=False), torch.rand(5, 3, 7, dtype=torch.float64)
    mask = torch.rand(5, 7) < 0.7
    mask[2] = False
    probs[3, :, 1] = 0
    expected = []
    for i in range(5):
        valid = mask[i].nonzero().flatten().tolist()
        mass = [probs[i, :, c].sum().item() for c in valid]
        weights = [math.exp(scores[i, c]) for c in valid]
        kl = 0.0
        for m, w in zip(mass, weights, strict=True):
            p, q = m / sum(mass), w / sum(weights)
            kl += p * math.log(p / q) if p > 0 else 0.0
        expected.append(kl)
    want = torch.tensor(expected, dtype=torch.float64)
    same(ref.indexer_kl_loss(scores, probs, mask, reduction="none"), want)
    same(ref.indexer_kl_loss(scores, probs, mask, reduction="sum"), want.sum())
    same(ref.indexer_kl_loss(scores, probs, mask), want.sum() / 4)
    same(ref.indexer_kl_loss(scores, probs.sum(1) * 9, mask), want.sum() / 4)
    hidden = scores.masked_fill(~mask, -INF)
    same(ref.indexer_kl_loss(hidden, probs, reduction="none"), want)
    with pytest.raises(ValueError, match=r"indexer_kl_loss: reduction: expected .* got 'max'"):
        ref.indexer_kl_loss(scores, probs, reduction="max")


def test_kl_loss_properties():
    scores, mask = f64(4, 6), torch.ones(4, 6, dtype=torch.bool)
    mask[1, 3:], mask[3] = False, False
    target = torch.softmax(scores.detach().masked_fill(~mask, -1e300), dim=-1)
    zero = ref.indexer_kl_loss(scores, target, mask, reduction="none")
    same(zero, torch.zeros(4, dtype=torch.float64))
    other = torch.rand(4, 6, dtype=torch.float64).requires_grad_()
    loss = ref.indexer_kl_loss(scores, other, mask, reduction="none")
    assert (loss[:3] > 0).all() and loss[3] == 0
    same(ref.indexer_kl_loss(scores + 5, other, mask, reduction="none"), loss)
    loss.sum().backward()
    assert other.grad is None
    q = torch.softmax(scores.detach().masked_fill(~mask, -INF), dim=-1)
    p = (other * mask / (other * mask).sum(-1, keepdim=True)).detach()
    same(scores.grad[:3], (q - p)[:3])
    assert (scores.grad[3] == 0).all()
    assert torch.autograd.gradcheck(lambda s: ref.indexer_kl_loss(s, other, mask), (scores,))


def test_kl_loss_poison_and_degenerate_rows():
    scores = torch.randn(3, 5)
    probs = torch.rand(3, 5)
    mask = torch.tensor([[True, True, False, True, False]] * 2 + [[False] * 5])
    expected = ref.indexer_kl_loss(scores, probs, mask, reduction="none")
    poisoned = scores.masked_fill(~mask, NAN).requires_grad_()
    loss = ref.indexer_kl_loss(poisoned, probs.masked_fill(~mask, NAN), mask, reduction="none")
    same(loss, expected)
    loss.sum().backward()
    assert torch.isfinite(poisoned.grad).all() and (poisoned.grad[~mask] == 0).all()
    no_mass = ref.indexer_kl_loss(scores, torch.zeros(3, 5), reduction="none")
    assert no_mass.tolist() == [0.0] * 3
    assert ref.indexer_kl_loss(torch.zeros(0, 5), torch.zeros(0, 5)) == 0
    assert ref.indexer_kl_loss(torch.zeros(2, 0), torch.zeros(2, 0)) == 0
    assert ref.indexer_kl_loss(torch.full((2, 3), -INF), torch.rand(2, 3)) == 0


def test_indexer_learns_the_attention_target():
    """The whole training path: indexer logits -> KL to the attention target -> gradients."""
    parameters = torch.randn(4, 2, 8), torch.randn(6, 8), torch.rand(4, 2)
    q, keys, weights = (p.requires_grad_() for p in parameters)
    target = ref.attention_target(torch.randn(4, 3, 12), torch.randn(6, 1, 12), 0.3)
    start, end = i32([0] * 4), i32([3, 4, 5, 6])
    losses = []
    for _ in range(40):
        logits = ref.fp8_mqa_logits(q, (keys, torch.ones(6)), weights, start, end)
        loss = ref.indexer_kl_loss(logits, target)
        losses.append(loss.item())
        grads = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for tensor, grad in zip(parameters, grads, strict=True):
                tensor -= 0.1 * grad
    assert losses[-1] < 0.5 * losses[0]

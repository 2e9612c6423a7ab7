# SPDX-License-Identifier: Apache-2.0
"""Selection: exact sets, the tie rule, windows, slots, merging."""

from __future__ import annotations

import time

import pytest
import torch

import dsa_ext
from dsa_ext import reference
from helpers import (
    HOSTILE_INTS,
    INT_MAX,
    INT_MIN,
    Guarded,
    assert_deterministic,
    assert_same_bits,
    hostile,
    int32,
    permuted_table,
    slots_of,
    spread,
)

INF, NAN = float("inf"), float("nan")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def stable_sort_topk(row: torch.Tensor, k: int, start: int, end: int) -> list[int]:
    """The contract, in Python's words: a stable sort by (NaN last, larger first)."""
    values = row.double().tolist()
    start, end = max(start, 0), min(end, len(values))
    columns = sorted(
        range(start, end),
        key=lambda c: (values[c] != values[c], 0.0 if values[c] != values[c] else -values[c]),
    )
    chosen = sorted(columns[:k])
    return chosen + [-1] * (k - len(chosen))


def all_kinds_of_scores(rows: int, columns: int) -> torch.Tensor:
    """A row of each kind: wide, tied, constant, NaN and infinities, signed zeros, subnormal."""
    scores = torch.randn(rows, columns)
    kinds = [
        lambda row: row,
        lambda row: (row * 2).round(),
        lambda row: torch.full_like(row, 0.25),
        lambda row: torch.where(torch.rand(columns) < 0.3, NAN, row),
        lambda row: torch.where(torch.rand(columns) < 0.3, -INF, row),
        lambda row: torch.where(torch.rand(columns) < 0.3, INF, row),
        lambda row: torch.where(row > 0, 0.0, -0.0),
        lambda row: torch.full_like(row, NAN),
        lambda row: torch.full_like(row, -INF),
        lambda row: row * 1e-40,
        lambda row: torch.where(torch.rand(columns) < 0.9, NAN, -INF),
        lambda row: 1.0 + row.abs().mul(8).floor() * 2.0**-23,
    ]
    for r in range(rows):
        scores[r] = kinds[r % len(kinds)](scores[r])
    return scores


# ---- topk_select: which columns ------------------------------------------------------------------


@pytest.mark.ops("topk_select")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 2, 31, 64, 300])
@pytest.mark.parametrize("columns", [1, 2, 63, 64, 257])
def test_select_is_a_stable_sort(device, columns, k, dtype):
    scores = spread(all_kinds_of_scores(24, columns).to(device, dtype))
    out = Guarded((24, k), torch.int32, device)
    kept = Guarded((24, k), torch.float32, device)
    dsa_ext.topk_select(scores, k, return_scores=True, out=(out.out, kept.out))
    indices = out.check()
    expected = [stable_sort_topk(row, k, 0, columns) for row in scores.cpu()]
    assert indices.tolist() == expected
    chosen = indices >= 0
    gathered = scores.float().gather(1, indices.clamp(min=0).long()).where(chosen, -INF)
    torch.testing.assert_close(kept.check(), gathered, rtol=0, atol=0, equal_nan=True)


@pytest.mark.ops("topk_select")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [3, 100])
def test_select_in_windows(device, k, dtype):
    """Windows inside, across and outside the row, empty, reversed, shorter and longer than k."""
    bounds = [-5, 0, 1, 2, 60, 150, 199, 200, 201, INT_MIN, INT_MAX]
    windows = [(a, b) for a in bounds for b in bounds]
    scores = all_kinds_of_scores(len(windows), 200).to(device, dtype)
    starts = spread(int32([a for a, _ in windows], device))
    ends = spread(int32([b for _, b in windows], device))
    got = dsa_ext.topk_select(scores, k, starts, ends, return_scores=True)
    expected = [
        stable_sort_topk(row, k, a, b) for row, (a, b) in zip(scores.cpu(), windows, strict=True)
    ]
    assert got[0].tolist() == expected
    other = reference.topk_select(scores, k, starts, ends, return_scores=True)
    assert_same_bits(got[0], other[0])
    torch.testing.assert_close(got[1], other[1], rtol=0, atol=0, equal_nan=True)
    # One bound alone.
    for kwargs in ({"row_starts": starts}, {"row_ends": ends}):
        got = dsa_ext.topk_select(scores, k, **kwargs)
        assert_same_bits(got, reference.topk_select(scores, k, **kwargs))


@pytest.mark.ops("topk_select")
@pytest.mark.parametrize("k", [2048, 512])
@pytest.mark.parametrize("columns", [2047, 2048, 2049, 4096, 50_000])
def test_select_at_the_models_size(device, columns, k):
    scores = torch.randn(6, columns, device=device)
    scores[1] = scores[1].bfloat16().float()  # ties
    scores[2] = 1.0
    scores[3] = torch.arange(columns)
    scores[4] = -torch.arange(columns, dtype=torch.float32)
    got = dsa_ext.topk_select(scores, k)
    assert_same_bits(got, reference.topk_select(scores, k))
    kept = min(k, columns)
    assert got[3].tolist() == [*range(columns - kept, columns)] + [-1] * (k - kept)
    assert got[2, :kept].tolist() == list(range(kept))


@pytest.mark.slow
@pytest.mark.ops("topk_select")
@pytest.mark.parametrize("kind", ["normal", "narrow", "adjacent", "equal", "rising", "few"])
def test_select_from_a_million(device, kind):
    """2^20 scores: spread out, nearly equal (256 values, or each an ulp apart), all equal."""
    n, k = 2**20, 2048
    column = torch.arange(n)
    row = {
        "normal": torch.randn(n),
        "narrow": 1.0 + torch.randint(0, 256, (n,)) * 2.0**-23,
        "adjacent": 1.0 + torch.randperm(n) * 2.0**-23,
        "equal": torch.full((n,), -3.5),
        "rising": column.float(),
        "few": torch.where(column % 1000 == 999, 1.0, 0.0),
    }[kind]
    scores = row[None].to(device)
    begin = time.perf_counter()
    got = dsa_ext.topk_select(scores, k)
    seconds = time.perf_counter() - begin
    key = torch.sort(-row, stable=True).indices[:k].sort().values
    assert torch.equal(got[0].cpu().long(), key)
    assert seconds < 5.0


@pytest.mark.ops("topk_select")
def test_select_with_a_workspace(device):
    """Of one byte where nothing needs more; the result is the same with one and without."""
    size = dsa_ext.MAX_WORKSPACE_BYTES if device == "cuda" else 1
    workspace = torch.empty(size, dtype=torch.uint8, device=device)
    scores = torch.randn(1, 600_000, device=device)
    got = dsa_ext.topk_select(scores, 64, return_scores=True, workspace=workspace)
    for result, right in zip(got, dsa_ext.topk_select(scores, 64, return_scores=True), strict=True):
        assert_same_bits(result, right)


@pytest.mark.ops("topk_select")
def test_select_takes_any_strides(device):
    base = all_kinds_of_scores(40, 60).to(device)
    views = {
        "transposed": base.t().contiguous().t(),
        "every third column": torch.stack([base, base * 2, base * 3], -1).flatten(1)[:, ::3],
        "one row for all": base[:1].expand(40, 60),
        "one column for all": base[:, :1].expand(40, 60),
    }
    for name, scores in views.items():
        got = dsa_ext.topk_select(scores, 11, return_scores=True)
        expected = dsa_ext.topk_select(scores.contiguous(), 11, return_scores=True)
        assert torch.equal(got[0], expected[0]), name
        assert_same_bits(got[1], expected[1])


@pytest.mark.ops("topk_select")
@pytest.mark.parametrize(("rows", "columns"), [(0, 10), (3, 0), (0, 0)])
def test_select_from_nothing(device, rows, columns):
    got = dsa_ext.topk_select(torch.empty(rows, columns, device=device), 4, return_scores=True)
    assert torch.equal(got[0], int32(torch.full((rows, 4), -1), device))
    assert torch.equal(got[1], torch.full((rows, 4), -INF, device=device))


@pytest.mark.ops("topk_select")
def test_select_is_deterministic_and_independent_of_the_batch(device):
    scores = (torch.randn(64, 5000, device=device) * 8).round()
    assert_deterministic(lambda: dsa_ext.topk_select(scores, 500, return_scores=True), times=20)
    got = dsa_ext.topk_select(scores, 500)
    order = torch.randperm(64, device=device)
    assert_same_bits(dsa_ext.topk_select(scores[order], 500), got[order])
    for row in (0, 63):
        assert_same_bits(dsa_ext.topk_select(scores[row : row + 1], 500), got[row : row + 1])


# ---- topk_select: what is returned ---------------------------------------------------------------


@pytest.mark.ops("topk_select")
@pytest.mark.parametrize("base", [0, 5, -7, 100_000])
def test_index_base(device, base):
    scores = torch.randn(4, 50, device=device)
    plain = dsa_ext.topk_select(scores, 60)
    assert plain.tolist() == [[*range(50)] + [-1] * 10] * 4
    expected = torch.where(plain >= 0, plain + base, -1)
    assert_same_bits(dsa_ext.topk_select(scores, 60, index_base=base), expected)
    each = int32([base, 0, 3, INT_MAX - 60], device)
    expected = torch.where(plain >= 0, plain + each[:, None], -1)
    assert_same_bits(dsa_ext.topk_select(scores, 60, index_base=spread(each)), expected)


@pytest.mark.ops("topk_select")
def test_index_base_at_the_ends_of_int32(device):
    """A sum past INT_MAX is no index: -1. At INT_MIN there is room for every column."""
    scores = torch.zeros(2, 5, device=device)
    expected = [
        [INT_MAX - 2, INT_MAX - 1, INT_MAX, -1, -1, -1],
        [*range(INT_MIN, INT_MIN + 5), -1],
    ]
    got = dsa_ext.topk_select(scores, 6, index_base=int32([INT_MAX - 2, INT_MIN], device))
    assert got.tolist() == expected
    for base, row in zip((INT_MAX - 2, INT_MIN), expected, strict=True):
        assert dsa_ext.topk_select(scores, 6, index_base=base).tolist() == [row, row]


@pytest.mark.ops("topk_select")
def test_index_base_of_numpy_is_not_ignored(device):
    np = pytest.importorskip("numpy")
    scores = torch.randn(2, 10, device=device)
    got = dsa_ext.topk_select(scores, 4, index_base=np.int64(100))
    assert_same_bits(got, dsa_ext.topk_select(scores, 4, index_base=100))


@pytest.mark.ops("topk_select")
@pytest.mark.parametrize("page_size", [(1 << 30) - 1, 1 << 30, (1 << 30) + 1, INT_MAX])
def test_slots_of_vast_pages(device, page_size):
    """Past 2^31 - 1 there are none."""
    entries = int32([0, 1, 2, 3, -1, INT_MAX, -INT_MAX], device)
    for base in (0, page_size - 20, INT_MAX - 39):
        rows, columns = len(entries), 40
        table = entries[:, None].expand(rows, 3).contiguous()
        scores = torch.randn(rows, columns, device=device)
        got = dsa_ext.topk_select(
            scores, 7, index_base=base, block_table=table, page_size=page_size
        )
        expected = reference.topk_select(
            scores, 7, index_base=base, block_table=table, page_size=page_size
        )
        assert_same_bits(got, expected)


@pytest.mark.ops("topk_select")
@pytest.mark.parametrize("page_size", [1, 7, 64])
def test_select_slots(device, page_size):
    """A token without a page is -1 in its place; the rest keep the order of their positions."""
    B, per_request, columns = 3, 2, 300
    lens = [columns, 250, 40]
    pages = sum(-(-n // page_size) for n in lens) + 2
    table = permuted_table(lens, page_size, pages, device=device)
    table[0, 2], table[1, 0] = -1, INT_MIN
    scores = torch.randn(B * per_request, columns, device=device)
    ends = int32([n - j for n in lens for j in range(per_request)], device)
    args = {"block_table": spread(table), "page_size": page_size}
    out = Guarded((B * per_request, 100), torch.int32, device)
    dsa_ext.topk_select(scores, 100, None, ends, **args, out=out.out)
    slots = out.check()
    columns_of = dsa_ext.topk_select(scores, 100, None, ends)
    for row in range(B * per_request):
        token = columns_of[row].long()
        expected = slots_of(table, row // per_request, token.clamp(min=0), page_size)
        page = table[row // per_request, token.clamp(min=0) // page_size]
        expected = torch.where((token >= 0) & (page >= 0), expected, -1)
        assert torch.equal(slots[row].long(), expected)
    request = int32([0, 0, 1, 1, 2, 2], device)
    got = dsa_ext.topk_select(scores, 100, None, ends, **args, row_to_request=request)
    assert_same_bits(got, slots)


@pytest.mark.ops("topk_select", "map_to_slots")
def test_select_slots_with_bases_and_requests(device):
    """Selection and mapping in one step equal selection, then map_to_slots."""
    scores = torch.randn(7, 90, device=device)
    base = int32([0, 3, -40, 5000, 64, INT_MAX - 200, -1], device)
    table = hostile(int32(torch.randint(0, 50, (4, 20)), device), 0.3)
    request = spread(int32([0, 3, 2, -1, 4, INT_MIN, 1], device))
    columns = dsa_ext.topk_select(scores, 33, index_base=base)
    expected = dsa_ext.map_to_slots(columns, table, 9, request)
    kwargs = {"block_table": table, "page_size": 9, "row_to_request": request}
    got = dsa_ext.topk_select(scores, 33, index_base=base, **kwargs)
    assert_same_bits(got, expected)
    assert_same_bits(got, reference.topk_select(scores, 33, index_base=base, **kwargs))


# ---- map_to_slots --------------------------------------------------------------------------------


@pytest.mark.ops("map_to_slots")
@pytest.mark.parametrize("shape", [(12, 33), (4, 3, 33), (4, 1, 1), (0, 5), (4, 0, 5)], ids=str)
@pytest.mark.parametrize("page_size", [1, 64, 100])
def test_map(device, shape, page_size):
    indices = spread(hostile(int32(torch.randint(0, 500, shape), device), 0.2))
    table = hostile(int32(torch.randint(0, 1000, (4, 9)), device), 0.2)
    out = Guarded(shape, torch.int32, device)
    dsa_ext.map_to_slots(indices, spread(table), page_size, out=out.out)
    expected = reference.map_to_slots(indices, table, page_size)
    assert_same_bits(out.check(), expected)
    rows = indices.shape[:-1].numel()
    request = hostile(int32(torch.randint(0, 4, (rows,)), device), 0.3)
    got = dsa_ext.map_to_slots(indices, table, page_size, request)
    assert_same_bits(got, reference.map_to_slots(indices, table, page_size, request))


@pytest.mark.ops("map_to_slots")
def test_map_by_hand(device):
    table = int32([[5, -1, 2], [0, INT_MAX, 7]], device)
    indices = int32([[0, 3, 4, 9, 11], [8, 12, -1, 4, 3]], device)
    expected = [[20, 23, -1, 9, 11], [28, -1, -1, -1, 3]]
    assert dsa_ext.map_to_slots(indices, table, 4).tolist() == expected
    # INT_MAX is a page like any other where its slots fit.
    far = dsa_ext.map_to_slots(int32([[0, 1, 2]], device), table[1:, 1:], 1)
    assert far.tolist() == [[INT_MAX, 7, -1]]
    assert dsa_ext.map_to_slots(indices, table, INT_MAX).tolist() == [[-1] * 5, [8, 12, -1, 4, 3]]


@pytest.mark.ops("map_to_slots")
def test_map_default_requests(device):
    """R rows over B requests: R / B each, in order."""
    table = int32([[10], [20], [30]], device)
    got = dsa_ext.map_to_slots(int32(torch.zeros(6, 1), device), table, 1)
    assert got.flatten().tolist() == [10, 10, 20, 20, 30, 30]


# ---- merge_topk ----------------------------------------------------------------------------------


@pytest.mark.ops("merge_topk")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 10, 64, 100])
def test_merge(device, k, dtype):
    scores = spread(all_kinds_of_scores(24, 64).to(device, dtype))
    indices = hostile(int32(torch.stack([torch.randperm(64) for _ in range(24)]), device), 0.2)
    indices = spread(indices)
    out = Guarded((24, k), torch.int32, device)
    kept = Guarded((24, k), torch.float32, device)
    dsa_ext.merge_topk(scores, indices, k, return_scores=True, out=(out.out, kept.out))
    expected = reference.merge_topk(scores, indices, k, return_scores=True)
    assert_same_bits(out.check(), expected[0])
    torch.testing.assert_close(kept.check(), expected[1], rtol=0, atol=0, equal_nan=True)


@pytest.mark.ops("merge_topk")
def test_merge_by_hand(device):
    scores = torch.tensor([[1.0, 5.0, 5.0, NAN, 5.0, 9.0, -INF, -0.0, 0.0]], device=device)
    indices = int32([[4, 7, 3, 1, 5, -1, 0, 8, 6]], device)
    merged = [dsa_ext.merge_topk(scores, indices, k)[0].tolist() for k in (1, 2, 4, 5, 6, 7, 8, 9)]
    assert merged == [
        [3],
        [3, 5],
        [3, 4, 5, 7],
        [3, 4, 5, 6, 7],
        [3, 4, 5, 6, 7, 8],
        [0, 3, 4, 5, 6, 7, 8],
        [0, 1, 3, 4, 5, 6, 7, 8],
        [0, 1, 3, 4, 5, 6, 7, 8, -1],
    ]


@pytest.mark.ops("merge_topk", "topk_select")
@pytest.mark.parametrize("kind", ["ties", "constant", "random"])
def test_merge_of_shards_is_selection_from_the_whole(device, kind):
    scores = torch.randn(9, 4000, device=device)
    if kind != "random":
        scores = (scores * (2 if kind == "ties" else 0)).round()
    whole = dsa_ext.topk_select(scores, 256, return_scores=True)
    parts = [
        dsa_ext.topk_select(part, 256, index_base=1000 * i, return_scores=True)
        for i, part in enumerate(scores.split(1000, dim=1))
    ]
    got = dsa_ext.merge_topk(
        torch.cat([values for _, values in parts], 1),
        torch.cat([indices for indices, _ in parts], 1),
        256,
        return_scores=True,
    )
    assert_same_bits(got[0], whole[0])
    assert torch.equal(got[1], whole[1])


@pytest.mark.ops("merge_topk")
def test_merge_keeps_repeated_indices(device):
    scores = torch.tensor([[3.0, 1.0, 2.0, 3.0]], device=device)
    indices = int32([[5, 5, 2, 5]], device)
    got, kept = dsa_ext.merge_topk(scores, indices, 3, return_scores=True)
    assert got.tolist() == [[2, 5, 5]]
    assert kept.tolist() == [[2.0, 3.0, 3.0]]


@pytest.mark.ops("merge_topk")
@pytest.mark.parametrize(("rows", "columns"), [(0, 10), (3, 0), (2, 1)])
def test_merge_of_nothing(device, rows, columns):
    scores = torch.ones(rows, columns, device=device)
    indices = int32(torch.full((rows, columns), INT_MIN), device)
    got, kept = dsa_ext.merge_topk(scores, indices, 4, return_scores=True)
    assert torch.equal(got, int32(torch.full((rows, 4), -1), device))
    assert torch.equal(kept, torch.full((rows, 4), -INF, device=device))


@pytest.mark.ops("merge_topk")
def test_merge_is_deterministic_and_independent_of_the_batch(device):
    scores = (torch.randn(32, 3000, device=device) * 4).round()
    indices = hostile(int32(torch.randint(0, 2000, (32, 3000)), device), 0.1, HOSTILE_INTS)
    assert_deterministic(lambda: dsa_ext.merge_topk(scores, indices, 300, return_scores=True))
    got = dsa_ext.merge_topk(scores, indices, 300)
    order = torch.randperm(32, device=device)
    assert_same_bits(dsa_ext.merge_topk(scores[order], indices[order], 300), got[order])

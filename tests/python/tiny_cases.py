# SPDX-License-Identifier: Apache-2.0
"""Random calls of every op, with hostile metadata, zero sizes, odd strides and odd alignments.

A case is made on the CPU from its seed alone; it is run on a device and judged by the reference on
the CPU. test_cuda.py runs many (the hostile campaign), memcheck.py a few under compute-sanitizer.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

import dsa_ext
from dsa_ext import reference
from helpers import (
    DECODE_TOLERANCE,
    E4M3,
    FORMATS,
    HOSTILE_INTS,
    INT_MAX,
    LOGITS_TOLERANCE,
    PREFILL_TOLERANCE,
    Guarded,
    LatentFormat,
    assert_close,
    assert_lse_close,
    assert_same_bits,
    assert_same_codes,
    exact_e4m3,
    hostile,
    latent_cache,
    odd_scales,
    paged,
    put_indexer_keys,
    spread,
    storage_bytes,
)

BF16, FP16, FP32, INT32 = torch.bfloat16, torch.float16, torch.float32, torch.int32
HOSTILE_INT64S = (*HOSTILE_INTS, -(2**63), 2**63 - 1, 2**32, 2**32 + 1, -(2**32))


def assert_equal_values(actual: Tensor, expected: Tensor) -> None:
    """The same numbers; -0.0 is 0.0 and any NaN another."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


RULES: dict[str, Callable[[Tensor, Tensor], None]] = {
    "bits": assert_same_bits,
    "codes": assert_same_codes,
    "values": assert_equal_values,
    "lse": assert_lse_close,
    "logits": functools.partial(assert_close, tolerance=LOGITS_TOLERANCE),
    "decode": functools.partial(assert_close, tolerance=DECODE_TOLERANCE),
    "prefill": functools.partial(assert_close, tolerance=PREFILL_TOLERANCE),
}


def on(t: Tensor, device: str) -> Tensor:
    """A copy on a device of the same strides, of just the memory that t has."""
    whole = storage_bytes(t).to(device, copy=True).view(t.dtype)
    return whole.as_strided(t.shape, t.stride(), t.storage_offset())


@functools.cache
def workspace(device: str) -> Tensor:
    return torch.empty(dsa_ext.MAX_WORKSPACE_BYTES, dtype=torch.uint8, device=device)


@dataclass
class Case:
    """One call: arguments on the CPU, the outputs it fills and how each is judged."""

    op: str
    kwargs: dict
    outs: list[tuple[tuple[int, ...], torch.dtype]]  # empty: `written` or the op's own result
    rules: list[str]
    expected_kwargs: dict = field(default_factory=dict)  # replacements for the reference
    written: str | None = None  # the argument that is written in place
    refill: dict[str, Callable[[], Tensor]] = field(default_factory=dict)  # other metadata
    takes_workspace: bool = False

    def has_work(self) -> bool:
        return all(t.numel() for t in tree_leaves(self.kwargs) if isinstance(t, Tensor))

    def arguments(self, device: str) -> dict:
        return tree_map_only(Tensor, lambda t: on(t, device), self.kwargs)

    def outputs(self, device: str, *, guarded: bool = False) -> list[Tensor] | list[Guarded]:
        """Outputs full of -inf where floats are (what an op leaves untouched is -inf)."""
        if guarded:
            guards = [Guarded(shape, dtype, device) for shape, dtype in self.outs]
            for guard in guards:
                _clear(guard.out)
            return guards
        return [_clear(torch.empty(s, dtype=d, device=device)) for s, d in self.outs]

    def call(self, arguments: dict, outs: list[Tensor], **more) -> tuple[Tensor, ...]:
        if outs:
            more["out"] = outs[0] if len(outs) == 1 else tuple(outs)
        result = getattr(dsa_ext, self.op)(**arguments, **more)
        if self.written:
            result = storage_bytes(arguments[self.written])
        return (result,) if isinstance(result, Tensor) else tuple(result)

    def expected(self) -> tuple[Tensor, ...]:
        arguments = self.arguments("cpu") | self.expected_kwargs
        result = getattr(reference, self.op)(**arguments)
        if self.written:
            result = storage_bytes(arguments[self.written])
        return (result,) if isinstance(result, Tensor) else tuple(result)

    def check(self, got: tuple[Tensor, ...]) -> None:
        for actual, expected, rule in zip(got, self.expected(), self.rules, strict=True):
            RULES[rule](_dense(actual.cpu()), _dense(expected))


def _dense(t: Tensor) -> Tensor:
    """A contiguous copy; contiguous() leaves the stride of a dimension of one or none as it is."""
    return t.clone(memory_format=torch.contiguous_format)


def _clear(t: Tensor) -> Tensor:
    return t.fill_(-float("inf")) if t.dtype in (FP32, BF16, FP16) else t


def run(case: Case, device: str, *, guarded: bool = True, give_workspace: bool = False) -> None:
    """Run a case on a device and judge it."""
    arguments = case.arguments(device)
    more = {"workspace": workspace(device)} if give_workspace and case.takes_workspace else {}
    outs = case.outputs(device, guarded=guarded)
    got = case.call(arguments, [guard.out for guard in outs] if guarded else outs, **more)
    if guarded and outs:
        got = tuple(guard.check() for guard in outs)
    case.check(got)


class Sizes:
    """Sizes of a case: most of them small, `factor` times the smallest kind's."""

    def __init__(self, seed: int, factor: int):
        self._random = random.Random(seed)
        self.factor = factor

    def __call__(self, most: int, least: int = 0) -> int:
        return self._random.randint(least, max(least, most * self.factor))

    def small(self, most: int, least: int = 0) -> int:
        return self._random.randint(least, most)

    def of(self, *choices):
        return self._random.choice(choices)

    def maybe(self, share: float = 0.5) -> bool:
        return self._random.random() < share

    def ints(self, shape: tuple[int, ...], bound: int, dtype: torch.dtype = INT32) -> Tensor:
        """Entries around [0, bound], some of them hostile."""
        plain = torch.randint(-1, bound + 2, shape).clamp(max=INT_MAX).to(dtype)
        values = HOSTILE_INTS if dtype == INT32 else HOSTILE_INT64S
        return hostile(plain, self.of(0.0, 0.1, 0.5), values)

    def loose(self, t: Tensor) -> Tensor:
        """The values at other strides or another alignment."""
        kind = self.of("as it is", "wide", "odd", "shifted")
        if kind == "as it is" or t.dim() == 0:
            return t
        if kind == "shifted":
            memory = torch.zeros(t.numel() + 1, dtype=t.dtype)
            return memory[1:].view(t.shape).copy_(t)
        return spread(t, 16 if kind == "wide" else 3)


# ---- indexer -------------------------------------------------------------------------------------


def _prefill(s: Sizes, *, unit_scales: bool) -> tuple[dict, dict, int, int]:
    S, L = s(5), s.of(s(40), s.small(300))
    H, D = s.of(s.small(20, 1), 64, s.small(128, 1)), s.of(32, 64, 128)
    scales = torch.ones(L) if unit_scales else odd_scales(L)
    refill = {name: lambda: s.ints((S,), L) for name in ("cu_seq_len_k_start", "cu_seq_len_k_end")}
    kwargs = {
        "q": s.loose(exact_e4m3(S, H, D)),
        "kv": (s.loose(exact_e4m3(L, D)), s.loose(scales)),
        "weights": s.loose(torch.randint(-4, 5, (S, H)) / 4.0),
    }
    kwargs |= {name: s.loose(make()) for name, make in refill.items()}
    return kwargs, refill, S, L


def mqa_logits(s: Sizes) -> Case:
    kwargs, refill, S, L = _prefill(s, unit_scales=False)
    width, dtype = s.of(0, s(50)), s.of(FP32, BF16)
    kwargs |= {"clean_logits": s.maybe(), "max_seqlen_k": width, "logits_dtype": dtype}
    return Case(
        "fp8_mqa_logits",
        kwargs,
        [((S, width or L), dtype)],
        ["logits"],
        refill=refill,
    )


def mqa_topk(s: Sizes) -> Case:
    kwargs, refill, S, _ = _prefill(s, unit_scales=True)
    return _with_scores(s, Case("fp8_mqa_topk", kwargs, [], [], refill=refill), S)


def _with_scores(s: Sizes, case: Case, rows: int) -> Case:
    """Add k and, half of the time, the scores; for the ops that select."""
    k, scores = s(35, 1), s.maybe()
    case.kwargs |= {"k": k, "return_scores": scores}
    case.outs = [((rows, k), INT32), ((rows, k), FP32)][: 1 + scores]
    case.rules = ["bits", "values"][: 1 + scores]
    case.takes_workspace = case.op != "merge_topk"
    return case


def _paged(s: Sizes, *, unit_scales: bool) -> tuple[dict, dict, int]:
    B, next_n, P, pages = s(3), s.small(4), s(4), s(4)
    page_size, H, D = s.of(s.small(7, 1), 16, 64), s.small(20, 1), s.of(32, 64, 128)
    cache = paged(pages, page_size, D + 4, extra_stride=s.of(0, 4, 64))
    every = torch.arange(pages * page_size)
    scales = torch.ones(len(every)) if unit_scales else odd_scales(len(every))
    put_indexer_keys(cache, every, exact_e4m3(len(every), D), scales)
    lens = s.of((B,), (B, next_n))
    refill = {
        "context_lens": lambda: s.ints(lens, P * page_size),
        "block_table": lambda: s.ints((B, P), pages),
        "schedule_meta": lambda: s.ints((3, 2), 4),
    }
    if s.maybe():
        del refill["schedule_meta"]
    kwargs = {
        "q": s.loose(exact_e4m3(B, next_n, H, D)),
        "kv_cache": cache,
        "weights": s.loose(torch.randint(-4, 5, (B * next_n, H)) / 4.0),
        "schedule_meta": None,
        "max_context_len": s.of(s(25), P * page_size),
    }
    kwargs |= {name: s.loose(make()) for name, make in refill.items()}
    return kwargs, refill, B * next_n


def paged_mqa_logits(s: Sizes) -> Case:
    kwargs, refill, rows = _paged(s, unit_scales=False)
    dtype = s.of(FP32, BF16)
    kwargs |= {"clean_logits": s.maybe(), "logits_dtype": dtype}
    return Case(
        "fp8_paged_mqa_logits",
        kwargs,
        [((rows, kwargs["max_context_len"]), dtype)],
        ["logits"],
        refill=refill,
    )


def paged_mqa_topk(s: Sizes) -> Case:
    kwargs, refill, rows = _paged(s, unit_scales=True)
    kwargs["return_slots"] = s.maybe()
    return _with_scores(s, Case("fp8_paged_mqa_topk", kwargs, [], [], refill=refill), rows)


def metadata(s: Sizes) -> Case:
    shape = s.of((s(6),), (s(6), s.small(3, 1)))
    refill = {"context_lens": lambda: s.ints(shape, 5000)}
    kwargs = {"context_lens": s.loose(refill["context_lens"]()), "block_kv": 64}
    kwargs |= {"num_sms": s.of(s(20, 1), 132), "indices": None}
    if s.maybe():
        kwargs["indices"] = s.loose(s.ints(shape[:1], 4))
    return Case("get_paged_mqa_logits_metadata", kwargs, [], ["bits"], refill=refill)


# ---- selection -----------------------------------------------------------------------------------


def _scores(s: Sizes, rows: int, columns: int) -> Tensor:
    """Ties, NaN, infinities; any strides."""
    scores = torch.randn(rows, columns).mul(s.of(0.0, 1.0, 3.0, 100.0)).round()
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0])
    chance = torch.rand(rows, columns) < s.of(0.0, 0.1, 0.6)
    scores = torch.where(chance, odd[torch.randint(0, 4, (rows, columns))], scores)
    scores = scores.to(s.of(FP32, BF16, FP16))
    return scores.t().contiguous().t() if s.maybe(0.2) else s.loose(scores)


def topk_select(s: Sizes) -> Case:
    requests, per_request = s(3), s.small(3)
    R, N, P = requests * per_request, s.of(s(30), s.small(700), s.small(20_000)), s(4)
    refill = {}
    for name in ("row_starts", "row_ends"):
        if s.maybe():
            refill[name] = lambda: s.ints((R,), N)
    kwargs = {"scores": _scores(s, R, N), "index_base": s.of(None, *HOSTILE_INTS)}
    if s.maybe():
        kwargs["page_size"] = s.of(1, 2, 7, 64, INT_MAX)
        refill["block_table"] = lambda: s.ints((requests, P), 9)
        if s.maybe():
            refill["row_to_request"] = lambda: s.ints((R,), requests)
    if s.maybe(0.3):
        refill["index_base"] = lambda: s.ints((R,), P)
    kwargs |= {name: s.loose(make()) for name, make in refill.items()}
    return _with_scores(s, Case("topk_select", kwargs, [], [], refill=refill), R)


def map_to_slots(s: Sizes) -> Case:
    B, per_request, k, P = s(3), s.small(3), s(6), s(4)
    page_size = s.of(1, 2, 7, 64, INT_MAX)
    shape = s.of((B * per_request, k), (B, per_request, k))
    bound = min(P * page_size, INT_MAX)
    refill = {
        "indices": lambda: s.ints(shape, bound),
        "block_table": lambda: s.ints((B, P), 9),
        "row_to_request": lambda: s.ints((B * per_request,), B),
    }
    if s.maybe():
        del refill["row_to_request"]
    kwargs = {name: s.loose(make()) for name, make in refill.items()} | {"page_size": page_size}
    return Case("map_to_slots", kwargs, [(shape, INT32)], ["bits"], refill=refill)


def merge_topk(s: Sizes) -> Case:
    R, N = s(4), s(30)
    refill = {"indices": lambda: s.ints((R, N), 20)}
    kwargs = {"scores": _scores(s, R, N), "indices": s.loose(refill["indices"]())}
    return _with_scores(s, Case("merge_topk", kwargs, [], [], refill=refill), R)


# ---- attention -----------------------------------------------------------------------------------

LATENT_DIMS = ((64, 64), (96, 64), (192, 128), (512, 448), (512, 512), (576, 512))


def _sink(s: Sizes, heads: int) -> Tensor | None:
    if s.maybe():
        return None
    sink = torch.randn(heads) * 2
    sink[torch.rand(heads) < 0.2] = s.of(float("inf"), -float("inf"))
    return s.loose(sink)


def sparse_fwd(s: Sizes) -> Case:
    (d_qk, d_v), dtype = s.of(*LATENT_DIMS), s.of(BF16, FP16)
    s_q, h_q, s_kv, topk = s(4), s.of(s.small(8, 1), s.small(130, 1)), s(9), s.of(s(9), 70)
    refill = {"indices": lambda: s.ints((s_q, 1, topk), s_kv)}
    if s.maybe():
        refill["topk_length"] = lambda: s.ints((s_q,), topk)
    kwargs = {
        "q": s.loose(torch.randn(s_q, h_q, d_qk).to(dtype)),
        "kv": s.loose(torch.randn(s_kv, 1, d_qk).to(dtype)),
        "sm_scale": s.of(d_qk**-0.5, -0.02),
        "d_v": d_v,
        "attn_sink": _sink(s, h_q),
    }
    kwargs |= {name: s.loose(make()) for name, make in refill.items()}
    return Case(
        "flash_mla_sparse_fwd",
        kwargs,
        [((s_q, h_q, d_v), dtype), ((s_q, h_q), FP32), ((s_q, h_q), FP32)],
        ["prefill", "lse", "lse"],
        {"out_dtype": FP32},
        refill=refill,
        takes_workspace=True,
    )


def _decode(s: Sizes, fmt: LatentFormat) -> tuple[Case, Callable[[int], Tensor], int]:
    """What both kinds of decode share, and how to make a cache of a page size.

    Logits stay small: a sum of exponentials near 1 has an lse near 0, judged absolutely.
    """
    (d_qk, d_v), dtype = ((fmt.d_qk, 512), BF16) if fmt.fp8 else (s.of(*LATENT_DIMS), fmt.dtype)
    batch, s_q, h_q, pages = s(3), s.small(3), s.of(s.small(8, 1), s.small(130, 1)), s(3)
    kwargs = {
        "q": s.loose((torch.randn(batch, s_q, h_q, d_qk) * (0.1 if fmt.fp8 else 1.0)).to(dtype)),
        "block_table": None,
        "cache_seqlens": None,
        "head_dim_v": d_v,
        "tile_scheduler_metadata": None,
        "is_fp8_kvcache": fmt.fp8,
        "softmax_scale": s.of(None, -0.02),
        "attn_sink": _sink(s, h_q),
        "batch_invariant": s.maybe(),
    }

    def cache(page_size: int) -> Tensor:
        return latent_cache(
            fmt,
            pages,
            page_size,
            torch.arange(pages * page_size),
            width=None if fmt.fp8 else d_qk,
            extra_stride=s.of(0, 4, 64) if fmt.fp8 else s.of(0, 1, 32),
        )

    case = Case(
        "flash_mla_with_kvcache",
        kwargs,
        [((batch, s_q, h_q, d_v), dtype), ((batch, h_q, s_q), FP32)],
        ["decode", "lse"],
        {"out_dtype": FP32},
        takes_workspace=True,
    )
    return case, cache, pages


def sparse_decode(s: Sizes, name: str) -> Case:
    case, cache, pages = _decode(s, FORMATS[name])
    batch, s_q = case.kwargs["q"].shape[:2]

    def add(page_size: int, prefix: str, indices: str) -> None:
        topk = s.of(s(6), 70)
        case.kwargs[f"{prefix}k_cache"] = cache(page_size)
        case.refill[indices] = lambda: s.ints((batch, s_q, topk), pages * page_size)
        lengths = s.of(None, (batch,), (batch, s_q))
        if lengths is not None:
            case.refill[f"{prefix}topk_length"] = lambda: s.ints(lengths, topk)

    add(s.of(s.small(4, 1), 16), "", "indices")
    if s.maybe(0.4):
        add(3, "extra_", "extra_indices_in_kvcache")
    case.kwargs |= {name: s.loose(make()) for name, make in case.refill.items()}
    return case


def prefill_over_cache(s: Sizes, name: str) -> Case:
    case, cache, pages = _decode(s, FORMATS[name])
    q = case.kwargs["q"].flatten(0, 1)
    s_q, h_q, _ = q.shape
    d_v, topk, page_size = case.kwargs["head_dim_v"], s.of(s(6), 70), s.of(s.small(4, 1), 16)
    refill = {"indices": lambda: s.ints((s_q, 1, topk), pages * page_size)}
    if s.maybe():
        refill["topk_length"] = lambda: s.ints((s_q,), topk)
    kwargs = {
        "q": s.loose(q.contiguous()),
        "kv": cache(page_size),
        "sm_scale": s.of(0.05, -0.02),
        "d_v": d_v,
        "attn_sink": case.kwargs["attn_sink"],
    }
    kwargs |= {name: s.loose(make()) for name, make in refill.items()}
    return Case(
        "flash_mla_sparse_fwd",
        kwargs,
        [((s_q, h_q, d_v), q.dtype), ((s_q, h_q), FP32), ((s_q, h_q), FP32)],
        ["prefill", "lse", "lse"],
        {"out_dtype": FP32},
        refill=refill,
        takes_workspace=True,
    )


def dense_decode(s: Sizes, name: str) -> Case:
    case, cache, pages = _decode(s, FORMATS[name])
    batch, P, page_size = case.kwargs["q"].shape[0], s(3), s.of(s.small(4, 1), 16, 64)
    case.refill |= {
        "block_table": lambda: s.ints((batch, P), pages),
        "cache_seqlens": lambda: s.ints((batch,), P * page_size),
    }
    case.kwargs |= {"k_cache": cache(page_size), "causal": s.maybe()}
    case.kwargs |= {name: s.loose(make()) for name, make in case.refill.items()}
    return case


def merge_attn_states(s: Sizes) -> Case:
    dtype = s.of(FP32, BF16, FP16)
    d = s.of(s.small(9), 64) if dtype == FP32 else 64  # Enough for roundings to average out.
    n, rows, h = s(4), s(3), s.small(3)
    kinds = torch.tensor([float("inf"), -float("inf"), 0.0, -1e4, 1e4, 88.0, 3.5])
    lses = kinds[torch.randint(0, len(kinds), (n, rows, h))]
    outs = torch.randn(n, rows, h, d)
    outs[torch.isinf(lses)] = float("nan")
    kwargs = {"outs": s.loose(outs.to(dtype)), "lses": s.loose(lses)}
    return Case(
        "merge_attn_states",
        kwargs,
        [((rows, h, d), dtype), ((rows, h), FP32)],
        ["decode", "lse"],
        {"out_dtype": FP32},
    )


# ---- caches and quantisation ---------------------------------------------------------------------


def _slot_mapping(s: Sizes, tokens: int, slots: int) -> Tensor:
    """int32 or int64, hostile; of equal slots all but one are -1."""
    mapping = s.ints((tokens,), slots, s.of(INT32, torch.int64))
    seen: set[int] = set()
    for i, slot in enumerate(mapping.tolist()):
        if slot in seen:
            mapping[i] = -1
        seen.add(slot)
    return mapping


def indexer_write(s: Sizes) -> Case:
    tokens, pages, page_size, D = s(8), s(3), s.of(s.small(4, 1), 64), s.of(4, 32, 100, 128)
    dtype = s.of(FP32, BF16, FP16)
    mapping = _slot_mapping(s, tokens, pages * page_size)
    kwargs = {
        "k": s.loose((torch.randn(tokens, D) * s.of(1e-6, 1.0, 900.0)).to(dtype)),
        "kv_cache": paged(pages, page_size, D + 4, extra_stride=s.of(0, 4, 64)),
        "slot_mapping": s.loose(mapping),
        "scale_fmt": s.of(None, "fp32", "ue8m0"),
    }
    refill = {"slot_mapping": lambda: mapping[torch.randperm(tokens)]}
    return Case(
        "indexer_k_quant_and_cache", kwargs, [], ["bits"], written="kv_cache", refill=refill
    )


def _gather(s: Sizes, cache: Tensor) -> tuple[dict, dict, int]:
    B, P, rows = s(3), s(3), s(15)
    refill = {
        "block_table": lambda: s.ints((B, P), cache.shape[0]),
        "cu_seqlens": lambda: s.ints((B + 1,), rows),
    }
    if s.maybe():
        refill["cu_seqlens"] = lambda: s.ints((B + 1,), rows).sort().values
    kwargs = {"kv_cache": cache, "num_tokens": rows}
    return kwargs | {name: s.loose(make()) for name, make in refill.items()}, refill, rows


def indexer_gather(s: Sizes) -> Case:
    pages, page_size, D = s(3), s.of(s.small(4, 1), 64), s.of(4, 32, 100, 128)
    cache = paged(pages, page_size, D + 4, extra_stride=s.of(0, 4, 64))
    every = torch.arange(pages * page_size)
    put_indexer_keys(cache, every, exact_e4m3(len(every), D), odd_scales(len(every)))
    kwargs, refill, rows = _gather(s, cache)
    return Case(
        "gather_indexer_k_cache",
        kwargs,
        [((rows, D), E4M3), ((rows,), FP32)],
        ["bits", "bits"],
        refill=refill,
    )


def mla_write(s: Sizes, name: str) -> Case:
    fmt, tokens, pages, page_size = FORMATS[name], s(6), s(3), s.of(s.small(4, 1), 16)
    dtype = s.of(BF16, FP16) if fmt.fp8 else fmt.dtype
    d_nope = fmt.d_qk - 64 if fmt.fp8 else s.of(512, 33)
    d_rope = 64 if fmt.fp8 else s.of(64, 31)
    width = fmt.width if fmt.fp8 else d_nope + d_rope
    stride = s.of(0, 4, 64) if fmt.fp8 else s.of(0, 1, 32)
    mapping = _slot_mapping(s, tokens, pages * page_size)
    kwargs = {
        "kv_c": s.loose((torch.randn(tokens, d_nope) * s.of(1e-6, 1.0, 900.0)).to(dtype)),
        "k_pe": s.loose(torch.randn(tokens, d_rope).to(dtype)),
        "kv_cache": paged(pages, page_size, width, dtype=fmt.dtype, extra_stride=stride),
        "slot_mapping": s.loose(mapping),
    }
    refill = {"slot_mapping": lambda: mapping[torch.randperm(tokens)]}
    return Case("mla_kv_quant_and_cache", kwargs, [], ["bits"], written="kv_cache", refill=refill)


def mla_gather(s: Sizes, name: str) -> Case:
    fmt, pages, page_size = FORMATS[name], s(3), s.of(s.small(4, 1), 16)
    stride = s.of(0, 4, 64) if fmt.fp8 else s.of(0, 1, 32)
    every = torch.arange(pages * page_size)
    cache = latent_cache(fmt, pages, page_size, every, extra_stride=stride)
    kwargs, refill, rows = _gather(s, cache)
    out = ((rows, fmt.d_qk), BF16 if fmt.fp8 else fmt.dtype)
    return Case("gather_mla_kv_cache", kwargs, [out], ["values"], refill=refill)


def hadamard(s: Sizes) -> Case:
    dtype = s.of(FP32, BF16, FP16)
    n = 2 ** s.small(9, 0 if dtype == FP32 else 6)  # Enough for roundings to average out.
    shape = (*[s(3) for _ in range(s.small(2, 1))], n)
    x = torch.randn(shape).to(dtype)
    kwargs = {"x": s.loose(x)}
    return Case("hadamard_transform", kwargs, [(shape, dtype)], ["logits"], {"x": x.float()})


def cast(s: Sizes) -> Case:
    shape = (*[s(3) for _ in range(s.small(2, 1))], s.small(300))
    x = (torch.randn(shape) * s.of(1e-6, 1.0, 3e4)).to(s.of(FP32, BF16, FP16))
    kwargs = {"x": s.loose(x), "use_ue8m0": s.maybe()}
    outs = [(shape, E4M3), ((*shape[:-1], -(-shape[-1] // 128)), FP32)]
    return Case("per_token_cast_to_fp8", kwargs, outs, ["codes", "bits"])


KINDS: dict[str, Callable[[Sizes], Case]] = {
    f.__name__: f
    for f in (
        mqa_logits,
        mqa_topk,
        paged_mqa_logits,
        paged_mqa_topk,
        metadata,
        topk_select,
        map_to_slots,
        merge_topk,
        sparse_fwd,
        merge_attn_states,
        indexer_write,
        indexer_gather,
        hadamard,
        cast,
    )
}
for _f in (prefill_over_cache, sparse_decode, dense_decode, mla_write, mla_gather):
    KINDS |= {f"{_f.__name__}_{name}": functools.partial(_f, name=name) for name in FORMATS}


def working_cases(kind: str, count: int, factor: int) -> Iterator[Case]:
    """The first cases of a kind in which nothing is empty."""
    every = (make(kind, seed, factor) for seed in itertools.count())
    return itertools.islice((case for case in every if case.has_work()), count)


def make(kind: str, seed: int, factor: int = 1) -> Case:
    """The case of a kind and a seed; its sizes grow with the factor."""
    torch.manual_seed(seed)
    return KINDS[kind](Sizes(seed, factor))

# SPDX-License-Identifier: Apache-2.0
"""Sparse prefill, sparse decode over FP8 caches and dense decode over the bf16 cache.

FlashMLA takes 64 or 128 heads: what its callers with fewer heads pay is its time for 64.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import dsa_ext
from benchmarks import checks, inputs, peers
from benchmarks.case import Bar, Call, Case, Work
from dsa_ext import _C, reference

D_V = 512
D_QK = 576
_PADDED_HEADS = 64
PADDED = "FlashMLA padded to h64"


def _flash_mla_name(heads: int) -> str:
    return "FlashMLA" if heads >= _PADDED_HEADS else PADDED


def _padded(q: Tensor) -> Tensor:
    return F.pad(q, (0, 0, 0, max(0, _PADDED_HEADS - q.shape[-2])))


def sparse_prefill(
    d: int,
    heads: int,
    k: int,
    s: int,
    n: int,
    bars: tuple[Bar, ...] = (),
    quick: bool = False,
    shared: float = 0.0,
) -> Case:
    """`shared`: the share of its rows that a token has in common with the one before."""

    def make(device: torch.device) -> Work:
        q = inputs.bf16(s, heads, d, device=device)
        kv = inputs.bf16(n, 1, d, device=device)
        chosen = inputs.drifting(s, n, k, shared, device) if shared else None
        indices = (inputs.distinct(s, n, k, device) if chosen is None else chosen).unsqueeze(1)
        scale = d**-0.5
        out = torch.empty(s, heads, D_V, dtype=q.dtype, device=device)
        peak = torch.empty(s, heads, device=device)
        lse = torch.empty(s, heads, device=device)

        def check() -> None:
            rows = checks.some(s, device)
            expected, expected_peak, expected_lse = reference.flash_mla_sparse_fwd(
                q[rows], kv, indices[rows], scale, out_dtype=torch.float32
            )
            checks.close("out", out[rows], expected, checks.PREFILL)
            checks.close("max_logits", peak[rows], expected_peak, checks.LOGITS)
            checks.close_lse(lse[rows], expected_lse)

        def flash_mla() -> Call:
            return peers.flash_mla().sparse_fwd(_padded(q), kv, indices, scale)

        return Work(
            run=lambda: dsa_ext.flash_mla_sparse_fwd(q, kv, indices, scale, out=(out, peak, lse)),
            check=check,
            flop=2.0 * s * heads * k * (d + D_V),
            bytes=2.0 * (q.numel() + kv.numel() + out.numel()) + 4.0 * indices.numel(),
            peers={_flash_mla_name(heads): flash_mla},
            reference=lambda: reference.flash_mla_sparse_fwd(q, kv, indices, scale),
        )

    name = f"d{d} h{heads} k{k} s{s} n{n}" + (f" shared{shared:.0%}" if shared else "")
    return Case("flash_mla_sparse_fwd", name, make, bars, quick)


OWN_BF16, GATHERED = "bf16 rows", "gather to bf16, bf16 rows"


def sparse_prefill_of_cache(
    heads: int, k: int, s: int, n: int, bars: tuple[Bar, ...] = (), quick: bool = False
) -> Case:
    """Prefill straight from a paged FP8 cache, beside our own over bf16 rows."""

    def make(device: torch.device) -> Work:
        table = inputs.page_table(1, n, device)
        cache = inputs.v32_cache(table.numel(), device)
        ends = torch.tensor([0, n], dtype=torch.int32, device=device)
        kv = torch.empty(n, 1, D_QK, dtype=torch.bfloat16, device=device)
        tokens = inputs.distinct(s, n, k, device).unsqueeze(1)
        slots = inputs.slots(tokens.view(1, s * k), table).view(s, 1, k)
        q = inputs.bf16(s, heads, D_QK, device=device)
        scale = D_QK**-0.5
        out = torch.empty(s, heads, D_V, dtype=q.dtype, device=device)
        peak = torch.empty(s, heads, device=device)
        lse = torch.empty(s, heads, device=device)

        def over_rows() -> None:
            dsa_ext.flash_mla_sparse_fwd(q, kv, tokens, scale, out=(out, peak, lse))

        def gathered() -> None:
            dsa_ext.gather_mla_kv_cache(cache, table, ends, n, out=kv.squeeze(1))
            over_rows()

        def run() -> None:
            dsa_ext.flash_mla_sparse_fwd(q, cache, slots, scale, out=(out, peak, lse))

        def check() -> None:
            run()
            rows = checks.some(s, device)
            expected, expected_peak, expected_lse = reference.flash_mla_sparse_fwd(
                q[rows], cache, slots[rows], scale, out_dtype=torch.float32
            )
            checks.close("out", out[rows], expected, checks.PREFILL)
            checks.close("max_logits", peak[rows], expected_peak, checks.LOGITS)
            checks.close_lse(lse[rows], expected_lse)

        gathered()
        return Work(
            run=run,
            check=check,
            flop=2.0 * s * heads * k * (D_QK + D_V),
            bytes=2.0 * (q.numel() + out.numel()) + cache.numel() + 4.0 * slots.numel(),
            peers={OWN_BF16: lambda: over_rows, GATHERED: lambda: gathered},
            reference=lambda: reference.flash_mla_sparse_fwd(q, cache, slots, scale),
        )

    return Case("flash_mla_sparse_fwd", f"fp8 h{heads} k{k} s{s} n{n}", make, bars, quick)


def sparse_decode(
    heads: int,
    batch: int,
    s_q: int,
    k: int = 2048,
    n: int = 32768,
    bars: tuple[Bar, ...] = (),
    quick: bool = False,
) -> Case:
    def make(device: torch.device) -> Work:
        table = inputs.page_table(batch, n, device)
        cache = inputs.v32_cache(table.numel(), device)
        tokens = inputs.distinct(batch * s_q, n, k, device).view(batch, s_q, k)
        indices = inputs.slots(tokens, table)
        q = inputs.bf16(batch, s_q, heads, D_QK, device=device)
        out = torch.empty(batch, s_q, heads, D_V, dtype=q.dtype, device=device)
        lse = torch.empty(batch, heads, s_q, device=device)

        def check() -> None:
            checks.sparse_decode(out, lse, checks.some(batch, device), q, cache, indices)

        def flash_mla() -> Call:
            return peers.flash_mla().sparse_decode(_padded(q), cache, indices)

        return Work(
            run=lambda: dsa_ext.flash_mla_with_kvcache(
                q,
                cache,
                None,
                None,
                D_V,
                is_fp8_kvcache=True,
                indices=indices,
                out=(out, lse),
            ),
            check=check,
            flop=2.0 * batch * s_q * heads * k * (D_QK + D_V),
            bytes=(_C.MLA_V32["token_bytes"] + 4.0) * indices.numel()
            + 2.0 * (q.numel() + out.numel()),
            peers={_flash_mla_name(heads): flash_mla},
            reference=lambda: reference.flash_mla_with_kvcache(
                q, cache, None, None, D_V, None, is_fp8_kvcache=True, indices=indices
            ),
        )

    name = f"sparse fp8 h{heads} b{batch} sq{s_q} k{k} n{n}"
    return Case("flash_mla_with_kvcache", name, make, bars, quick)


def v4_decode(
    heads: int,
    batch: int,
    extra_k: int,
    window: int = 128,
    n: int = 8192,
    bars: tuple[Bar, ...] = (),
    quick: bool = False,
) -> Case:
    """V4's decode: a sliding window in one cache, `extra_k` selected rows of a second one."""
    d = _C.MLA_V4["d_nope"] + _C.MLA_V4["d_rope"]

    def make(device: torch.device) -> Work:
        window_table = inputs.page_table(batch, window, device)
        table = inputs.page_table(batch, n, device)
        cache = inputs.v4_cache(window_table.numel(), device)
        extra_cache = inputs.v4_cache(table.numel(), device)
        recent = torch.arange(window, device=device).expand(batch, 1, window)
        indices = inputs.slots(recent, window_table)
        chosen = inputs.distinct(batch, n, extra_k, device).view(batch, 1, extra_k)
        extra = inputs.slots(chosen, table)
        q = inputs.bf16(batch, 1, heads, d, device=device)
        sink = torch.randn(heads, device=device)
        out = torch.empty(batch, 1, heads, D_V, dtype=q.dtype, device=device)
        lse = torch.empty(batch, heads, 1, device=device)

        def check() -> None:
            some = checks.some(batch, device)
            checks.sparse_decode(
                out,
                lse,
                some,
                q,
                cache,
                indices,
                attn_sink=sink,
                extra_k_cache=extra_cache,
                extra_indices_in_kvcache=extra[some],
            )

        return Work(
            run=lambda: dsa_ext.flash_mla_with_kvcache(
                q,
                cache,
                None,
                None,
                D_V,
                is_fp8_kvcache=True,
                indices=indices,
                attn_sink=sink,
                extra_k_cache=extra_cache,
                extra_indices_in_kvcache=extra,
                out=(out, lse),
            ),
            check=check,
            flop=2.0 * batch * heads * (window + extra_k) * (d + D_V),
            bytes=(_C.MLA_V4["token_bytes"] + 4.0) * (indices.numel() + extra.numel())
            + 2.0 * (q.numel() + out.numel()),
            peers={
                "FlashMLA": lambda: peers.flash_mla().sparse_decode(
                    q,
                    cache,
                    indices,
                    attn_sink=sink,
                    extra_k_cache=extra_cache,
                    extra_indices_in_kvcache=extra,
                )
            },
            reference=lambda: reference.flash_mla_with_kvcache(
                q,
                cache,
                None,
                None,
                D_V,
                None,
                is_fp8_kvcache=True,
                indices=indices,
                attn_sink=sink,
                extra_k_cache=extra_cache,
                extra_indices_in_kvcache=extra,
            ),
        )

    name = f"V4 h{heads} b{batch} window{window} extra{extra_k} n{n}"
    return Case("flash_mla_with_kvcache", name, make, bars, quick)


def dense_decode(
    heads: int, batch: int, n: int, bars: tuple[Bar, ...] = (), quick: bool = False
) -> Case:
    def make(device: torch.device) -> Work:
        table = inputs.page_table(batch, n, device)
        cache = inputs.bf16(table.numel(), inputs.PAGE, 1, D_QK, device=device)
        lens = torch.full((batch,), n, dtype=torch.int32, device=device)
        q = inputs.bf16(batch, 1, heads, D_QK, device=device)
        out = torch.empty(batch, 1, heads, D_V, dtype=q.dtype, device=device)
        lse = torch.empty(batch, heads, 1, device=device)

        def expected(some: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return reference.flash_mla_with_kvcache(
                q[some], cache, table[some], lens[some], D_V, None, out_dtype=torch.float32
            )

        def check() -> None:
            some = checks.some(batch, device, most=2)
            expected_out, expected_lse = expected(some)
            checks.close("out", out[some], expected_out, checks.DECODE)
            checks.close_lse(lse[some], expected_lse)

        return Work(
            run=lambda: dsa_ext.flash_mla_with_kvcache(q, cache, table, lens, D_V, out=(out, lse)),
            check=check,
            flop=2.0 * batch * n * heads * (D_QK + D_V),
            bytes=2.0 * (batch * n * D_QK + q.numel() + out.numel()),
            peers={"FlashMLA": lambda: peers.flash_mla().dense_decode(q, cache, table, lens)},
            reference=lambda: expected(torch.arange(batch, device=device)),
        )

    name = f"dense bf16 h{heads} b{batch} n{n}"
    return Case("flash_mla_with_kvcache", name, make, bars, quick)


def merge_states(parts: int, rows: int, dtype: torch.dtype, bars: tuple[Bar, ...] = ()) -> Case:
    heads = 128

    def make(device: torch.device) -> Work:
        outs = torch.randn(parts, rows, heads, D_V, device=device).to(dtype)
        lses = torch.randn(parts, rows, heads, device=device)
        out = torch.empty(rows, heads, D_V, dtype=dtype, device=device)
        lse = torch.empty(rows, heads, device=device)

        def check() -> None:
            some = checks.some(rows, device)
            expected, expected_lse = reference.merge_attn_states(
                outs[:, some], lses[:, some], out_dtype=torch.float32
            )
            checks.close("out", out[some], expected, checks.ROUNDED)
            checks.close_lse(lse[some], expected_lse)

        return Work(
            run=lambda: dsa_ext.merge_attn_states(outs, lses, out=(out, lse)),
            check=check,
            bytes=float(outs.element_size() * (outs.numel() + out.numel()))
            + 4.0 * (lses.numel() + lse.numel()),
            reference=lambda: reference.merge_attn_states(outs, lses),
        )

    name = f"{str(dtype).removeprefix('torch.')} parts{parts} s{rows} h{heads}"
    return Case("merge_attn_states", name, make, bars)


_DECODE_SHAPES = ((1, 1), (4, 1), (16, 1), (64, 1), (128, 1), (1, 2), (64, 2), (128, 2))
_DECODE_BARS = {
    (128, 1): 1.3,
    (128, 16): 1.2,
    (128, 64): 1.2,
    (128, 128): 1.2,
    (64, 1): 1.3,
    (64, 64): 1.4,
    (64, 128): 1.4,
}
_DENSE_BARS = {1: 1.2, 16: 1.0, 64: 1.0}
_DENSE_SHAPES = ((1, 32768), (16, 32768), (64, 32768), (64, 8192), (16, 131072), (1, 131072))


def _times_flash_mla(least: float | None) -> tuple[Bar, ...]:
    return () if least is None else (Bar("FlashMLA", least),)


def cuda_cases() -> Iterator[Case]:
    for n, least in ((8192, 1.02), (32768, 1.1), (131072, 1.18)):
        bars = _times_flash_mla(least)
        yield sparse_prefill(576, 128, 2048, 4096, n, bars, quick=n == 32768)
    yield sparse_prefill(576, 64, 2048, 4096, 32768, _times_flash_mla(1.1))
    for heads in (32, 16, 8):
        yield sparse_prefill(576, heads, 2048, 4096, 32768, (Bar(PADDED, 1.3),), heads == 16)
    for heads in (32, 16):
        bars = (Bar(PADDED, 1.8),)
        yield sparse_prefill(576, heads, 2048, 4096, 32768, bars, shared=0.8)
    yield sparse_prefill(512, 64, 512, 4096, 32768, _times_flash_mla(1.12))
    yield sparse_prefill(512, 128, 1024, 4096, 32768, _times_flash_mla(1.1))
    for heads in (128, 64, 16):
        bars = (Bar(OWN_BF16, 1 / 1.05), Bar(GATHERED, 1.3))
        yield sparse_prefill_of_cache(heads, 2048, 4096, 32768, bars)
    for heads in (128, 64):
        for batch, s_q in _DECODE_SHAPES:
            target = (batch, s_q, heads) == (128, 1, 128)
            bars = _times_flash_mla(_DECODE_BARS.get((heads, batch)))
            yield sparse_decode(heads, batch, s_q, bars=bars, quick=target)
    for heads in (32, 16, 8):
        yield sparse_decode(heads, 128, 1, bars=(Bar(PADDED, 1.9),), quick=heads == 16)
    yield v4_decode(64, 128, 512, bars=_times_flash_mla(1.2))
    yield v4_decode(128, 128, 1024, bars=_times_flash_mla(1.2), quick=True)
    for batch, n in _DENSE_SHAPES:
        bars = _times_flash_mla(_DENSE_BARS.get(batch))
        yield dense_decode(128, batch, n, bars=bars, quick=(batch, n) == (16, 32768))
    for heads in (32, 16):
        yield dense_decode(heads, 16, 32768)
    memory_bar = (Bar("roof", 0.75),)
    yield merge_states(4, 512, torch.float32, memory_bar)
    yield merge_states(2, 2048, torch.bfloat16, memory_bar)


def cpu_cases() -> Iterator[Case]:
    yield sparse_prefill(576, 128, 2048, 64, 32768, quick=True)
    yield sparse_prefill_of_cache(16, 512, 16, 4096)
    yield sparse_decode(16, 4, 1, k=512, n=4096)
    yield v4_decode(16, 4, 256, n=1024)
    yield dense_decode(16, 2, 1024)
    yield merge_states(2, 64, torch.bfloat16)

# SPDX-License-Identifier: Apache-2.0
"""Ops bound by memory: rotation, quantisation, cache writes and gathers, index mapping.

Written tokens fill whole pages in the order of a shuffled page table, as a prefill does. On a GPU
sizes are well past the L2 cache, 270 MB of traffic and more, so that fixed costs of a few
microseconds do not count.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import dsa_ext
from benchmarks import checks, inputs
from benchmarks.case import Bar, Case, Work
from dsa_ext import _C, reference

_BARS = (Bar("roof", 0.75),)
_INDEX_BYTES = 8.0
_REQUESTS = 8


def hadamard(rows: int, quick: bool = False) -> Case:
    def make(device: torch.device) -> Work:
        x = inputs.bf16(rows, 128, device=device)
        out = torch.empty_like(x)

        def check() -> None:
            some = checks.some(rows, device, most=4096)
            theirs = reference.hadamard_transform(x[some].float())
            checks.close("out", out[some], theirs, checks.ROUNDED)

        return Work(
            run=lambda: dsa_ext.hadamard_transform(x, out=out),
            check=check,
            bytes=4.0 * x.numel(),
            reference=lambda: reference.hadamard_transform(x),
        )

    return Case("hadamard_transform", f"bf16 {rows}x128", make, _BARS, quick)


def per_token_cast(rows: int, width: int, quick: bool = False) -> Case:
    def make(device: torch.device) -> Work:
        x = inputs.bf16(rows, width, device=device)
        values = torch.empty(rows, width, dtype=inputs.E4M3, device=device)
        scale = torch.empty(rows, -(-width // 128), device=device)

        def check() -> None:
            some = checks.some(rows, device, most=4096)
            expected, expected_scale = reference.per_token_cast_to_fp8(x[some], False)
            checks.exact("values", checks.take(values, some), expected)
            checks.exact("scales", scale[some], expected_scale)

        return Work(
            run=lambda: dsa_ext.per_token_cast_to_fp8(x, False, out=(values, scale)),
            check=check,
            bytes=3.0 * x.numel() + 4.0 * scale.numel(),
            reference=lambda: reference.per_token_cast_to_fp8(x, False),
        )

    return Case("per_token_cast_to_fp8", f"bf16 {rows}x{width}", make, _BARS, quick)


def _requests(tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Page table and cu_seqlens of equal requests that hold `tokens` in all."""
    each = tokens // _REQUESTS
    table = inputs.page_table(_REQUESTS, each, device)
    return table, torch.arange(0, tokens + 1, each, dtype=torch.int32, device=device)


def indexer_write(tokens: int) -> Case:
    def make(device: torch.device) -> Work:
        table, _ = _requests(tokens, device)
        slot = inputs.slot_mapping(table, tokens // _REQUESTS)
        k = inputs.bf16(tokens, inputs.INDEX_DIM, device=device)
        cache = torch.zeros_like(inputs.indexer_cache(table.numel(), device))
        twin = torch.zeros_like(cache)

        def check() -> None:
            reference.indexer_k_quant_and_cache(k, twin, slot)
            checks.exact("cache", cache, twin)

        return Work(
            run=lambda: dsa_ext.indexer_k_quant_and_cache(k, cache, slot),
            check=check,
            bytes=2.0 * k.numel() + cache.numel() + _INDEX_BYTES * tokens,
            reference=lambda: reference.indexer_k_quant_and_cache(k, twin, slot),
        )

    return Case("indexer_k_quant_and_cache", f"bf16 {tokens} tokens", make, _BARS)


def indexer_gather(tokens: int) -> Case:
    def make(device: torch.device) -> Work:
        table, ends = _requests(tokens, device)
        cache = inputs.indexer_cache(table.numel(), device)
        keys = torch.empty(tokens, inputs.INDEX_DIM, dtype=inputs.E4M3, device=device)
        scale = torch.empty(tokens, device=device)

        def check() -> None:
            expected, expected_scale = reference.gather_indexer_k_cache(cache, table, ends, tokens)
            checks.exact("keys", keys, expected)
            checks.exact("scales", scale, expected_scale)

        return Work(
            run=lambda: dsa_ext.gather_indexer_k_cache(
                cache, table, ends, tokens, out=(keys, scale)
            ),
            check=check,
            bytes=2.0 * cache.numel(),
            reference=lambda: reference.gather_indexer_k_cache(cache, table, ends, tokens),
        )

    return Case("gather_indexer_k_cache", f"{tokens} tokens", make, _BARS)


def _mla_cache(layout: str, pages: int, device: torch.device) -> Tensor:
    """A random cache: "v32" (656 bytes a token), "v4" (584) or "bf16"."""
    if layout == "v32":
        return inputs.v32_cache(pages, device)
    if layout == "v4":
        return inputs.v4_cache(pages, device)
    return inputs.bf16(pages, inputs.PAGE, 1, 576, device=device)


def _empty_mla_cache(layout: str, pages: int, device: torch.device) -> Tensor:
    if layout == "v4":
        return inputs.empty_v4_cache(pages, device)
    return torch.zeros_like(_mla_cache(layout, pages, device))


def _token_bytes(cache: Tensor) -> float:
    return float(cache.shape[-1] * cache.element_size())


def mla_write(layout: str, tokens: int) -> Case:
    def make(device: torch.device) -> Work:
        table, _ = _requests(tokens, device)
        slot = inputs.slot_mapping(table, tokens // _REQUESTS)
        d_nope = _C.MLA_V4["d_nope"] if layout == "v4" else _C.MLA_V32["d_nope"]
        kv_c = inputs.bf16(tokens, d_nope, device=device)
        k_pe = inputs.bf16(tokens, 64, device=device)
        cache = _empty_mla_cache(layout, table.numel(), device)
        twin = _empty_mla_cache(layout, table.numel(), device)

        def check() -> None:
            reference.mla_kv_quant_and_cache(kv_c, k_pe, twin, slot)
            checks.exact("cache", cache, twin)

        return Work(
            run=lambda: dsa_ext.mla_kv_quant_and_cache(kv_c, k_pe, cache, slot),
            check=check,
            bytes=2.0 * (kv_c.numel() + k_pe.numel())
            + (_token_bytes(cache) + _INDEX_BYTES) * tokens,
            reference=lambda: reference.mla_kv_quant_and_cache(kv_c, k_pe, twin, slot),
        )

    return Case("mla_kv_quant_and_cache", f"{layout} {tokens} tokens", make, _BARS)


def mla_gather(layout: str, tokens: int) -> Case:
    def make(device: torch.device) -> Work:
        table, ends = _requests(tokens, device)
        cache = _mla_cache(layout, table.numel(), device)
        width = _C.MLA_V4["d_v"] if layout == "v4" else 576
        out = torch.empty(tokens, width, dtype=torch.bfloat16, device=device)

        def check() -> None:
            expected = reference.gather_mla_kv_cache(cache, table, ends, tokens)
            checks.exact("rows", out, expected)

        return Work(
            run=lambda: dsa_ext.gather_mla_kv_cache(cache, table, ends, tokens, out=out),
            check=check,
            bytes=_token_bytes(cache) * tokens + 2.0 * out.numel(),
            reference=lambda: reference.gather_mla_kv_cache(cache, table, ends, tokens),
        )

    return Case("gather_mla_kv_cache", f"{layout} {tokens} tokens", make, _BARS)


def map_to_slots(rows: int, k: int, n: int = 32768) -> Case:
    """Ascending indices, as topk_select gives them."""

    def make(device: torch.device) -> Work:
        table = inputs.page_table(_REQUESTS, n, device)
        unsorted = torch.randint(0, n, (rows, k), dtype=torch.int32, device=device)
        indices = unsorted.sort(-1).values
        out = torch.empty_like(indices)

        def check() -> None:
            theirs = reference.map_to_slots(indices, table, inputs.PAGE)
            checks.exact("slots", out, theirs)

        return Work(
            run=lambda: dsa_ext.map_to_slots(indices, table, inputs.PAGE, out=out),
            check=check,
            bytes=8.0 * indices.numel(),
            reference=lambda: reference.map_to_slots(indices, table, inputs.PAGE),
        )

    return Case("map_to_slots", f"{rows}x{k} ascending", make, _BARS)


def cuda_cases() -> Iterator[Case]:
    yield hadamard(1 << 20, quick=True)
    yield per_token_cast(1 << 20, 128, quick=True)
    yield per_token_cast(32768, 7168)
    yield indexer_write(1 << 20)
    yield indexer_gather(1 << 20)
    for layout in ("v32", "v4", "bf16"):
        yield mla_write(layout, 1 << 18)
        yield mla_gather(layout, 1 << 18)
    yield map_to_slots(16384, 2048)
    yield map_to_slots(32768, 2048)


def cpu_cases() -> Iterator[Case]:
    yield hadamard(1 << 15, quick=True)
    yield per_token_cast(1 << 15, 128, quick=True)
    yield indexer_write(1 << 14)
    yield indexer_gather(1 << 14)
    for layout in ("v32", "v4", "bf16"):
        yield mla_write(layout, 1 << 12)
        yield mla_gather(layout, 1 << 12)
    yield map_to_slots(512, 2048)

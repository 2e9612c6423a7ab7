# SPDX-License-Identifier: Apache-2.0
"""Random inputs. Caches are written here byte by byte, not with the ops under test."""

from __future__ import annotations

import torch
from torch import Tensor

from dsa_ext import _C

E4M3 = torch.float8_e4m3fn
PAGE = 64
INDEX_DIM = 128
_SORTED_AT_ONCE = 1 << 25
_DIFFERENT_ROWS = 1 << 18


def bf16(*shape: int, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device).to(torch.bfloat16)


def fp8(*shape: int, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device).to(E4M3)


def scales(*shape: int, device: torch.device) -> Tensor:
    """fp32 scales from 0.5 to 1.5, no powers of two."""
    return torch.rand(shape, device=device) + 0.5


def int32(values: list[int] | Tensor, device: torch.device) -> Tensor:
    return torch.as_tensor(values, dtype=torch.int32, device=device)


def distinct(rows: int, n: int, k: int, device: torch.device) -> Tensor:
    """int32 [rows, k]: for each row k different numbers below n, in random order."""
    step = max(1, _SORTED_AT_ONCE // n)
    parts = [
        torch.rand(min(step, rows - row), n, device=device).argsort(-1)[:, :k].int()
        for row in range(0, rows, step)
    ]
    return torch.cat(parts)


def drifting(rows: int, n: int, k: int, shared: float, device: torch.device) -> Tensor:
    """int32 [rows, k]: for each row k different numbers below n >= k, ascending, spread evenly.

    A row has the share `shared`, or more, in common with the row before.
    """
    each = n // k  # numbers that take turns in a place
    tokens = torch.arange(k, device=device) * each + torch.randint(each, (k,), device=device)
    chosen = torch.empty(rows, k, dtype=torch.int32, device=device)
    for row in range(rows):
        fresh = torch.arange(k, device=device) * each + torch.randint(each, (k,), device=device)
        tokens = torch.where(torch.rand(k, device=device) < shared, tokens, fresh)
        chosen[row] = tokens
    return chosen


def page_table(batch: int, n: int, device: torch.device) -> Tensor:
    """int32 [batch, ceil(n / PAGE)]: every page of a cache once, shuffled."""
    width = -(-n // PAGE)
    return torch.randperm(batch * width, device=device).int().view(batch, width)


def slots(tokens: Tensor, table: Tensor) -> Tensor:
    """Slots of token positions [batch, ...] by each request's page table."""
    position = tokens.long().flatten(1)
    page = table.long().gather(1, position // PAGE)
    return (page * PAGE + position % PAGE).int().view(tokens.shape)


def slot_mapping(table: Tensor, n: int) -> Tensor:
    """int64 slots of tokens 0 to n of every request, one after another."""
    tokens = torch.arange(n, device=table.device).expand(table.shape[0], n)
    return slots(tokens, table).long().flatten()


def _repeated(rows: Tensor, count: int) -> Tensor:
    """`count` rows that repeat the given ones: as good for speed, cheaper to make."""
    return rows.repeat(-(-count // rows.shape[0]), *[1] * (rows.dim() - 1))[:count]


def indexer_cache(pages: int, device: torch.device) -> Tensor:
    """uint8 [pages, PAGE, 1, 132]."""
    unique = min(pages, _DIFFERENT_ROWS // PAGE)
    keys = fp8(unique, PAGE * INDEX_DIM, device=device).view(torch.uint8)
    scale = scales(unique, PAGE, device=device).view(torch.uint8)
    page = torch.cat((keys, scale), dim=-1)
    return _repeated(page, pages).view(pages, PAGE, 1, INDEX_DIM + _C.INDEXER_SCALE_BYTES)


def v32_cache(pages: int, device: torch.device) -> Tensor:
    """uint8 [pages, PAGE, 1, 656]."""
    layout = _C.MLA_V32
    unique = min(pages * PAGE, _DIFFERENT_ROWS)
    groups = layout["d_nope"] // layout["group"]
    row = (
        fp8(unique, layout["d_nope"], device=device).view(torch.uint8),
        scales(unique, groups, device=device).view(torch.uint8),
        bf16(unique, layout["d_rope"], device=device).view(torch.uint8),
    )
    rows = _repeated(torch.cat(row, dim=-1), pages * PAGE)
    return rows.view(pages, PAGE, 1, layout["token_bytes"])


def empty_v4_cache(pages: int, device: torch.device) -> Tensor:
    """uint8 [pages, PAGE, 1, 584], zeros, with the page stride that writers use."""
    width, align = _C.MLA_V4["token_bytes"], _C.MLA_V4_PAGE_STRIDE_ALIGN
    stride = -(-PAGE * width // align) * align
    data = torch.zeros(pages, stride, dtype=torch.uint8, device=device)
    return data.as_strided((pages, PAGE, 1, width), (stride, width, width, 1))


def v4_cache(pages: int, device: torch.device) -> Tensor:
    """uint8 [pages, PAGE, 1, 584]."""
    layout = _C.MLA_V4
    unique = min(pages, _DIFFERENT_ROWS // PAGE)
    groups = layout["d_nope"] // layout["group"]
    tokens = torch.cat(
        (
            fp8(unique, PAGE, layout["d_nope"], device=device).view(torch.uint8),
            bf16(unique, PAGE, layout["d_rope"], device=device).view(torch.uint8),
        ),
        dim=-1,
    )
    exponents = torch.randint(126, 129, (unique, PAGE, groups + 1), device=device)
    page = torch.cat((tokens.flatten(1), exponents.to(torch.uint8).flatten(1)), dim=-1)
    cache = empty_v4_cache(pages, device)
    cache.as_strided((pages, page.shape[1]), (cache.stride(0), 1)).copy_(_repeated(page, pages))
    return cache

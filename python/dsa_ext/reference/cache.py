# SPDX-License-Identifier: Apache-2.0
"""Paged FP8 caches: byte planes, writers, gathers and exact dequantisation.

The layouts are those of FlashMLA (MLA latent rows of 656 or 584 bytes a token) and of DeepGEMM's
paged indexer keys (D + 4 bytes a token). A page's stride is free; a declared per-token stride is
meaningful only for the 656-byte and the 16-bit layouts, whose rows are contiguous.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._arguments import as_int64, expect_one_head
from .quant import quantize_last_dim, ue8m0_decode

V32_ROW_BYTES = 656  # 512 e4m3 | 4 fp32 scales | 64 bf16
V4_ROW_BYTES = 584  # nominal: plane of 448 e4m3 + 64 bf16, then plane of 7 ue8m0 + 1 pad

_V32_NOPE, _V32_GROUP = 512, 128
_V4_NOPE, _V4_GROUP = 448, 64
_V4_DATA_BYTES, _V4_SCALE_BYTES = 576, 8
_SCALE_BYTES = 4  # one fp32


def _bytes(cache: Tensor) -> Tensor:
    """The cache as uint8 (it may be declared int8 or e4m3)."""
    return cache if cache.dtype == torch.uint8 else cache.view(torch.uint8)


def _planes(cache: Tensor, first: int, second: int) -> tuple[Tensor, Tensor]:
    """Views [pages, page_size, first] and [pages, page_size, second] of the bytes of each page."""
    data = _bytes(cache)
    pages, page_size = data.shape[:2]
    stride, offset = data.stride(0), data.storage_offset()
    head = data.as_strided((pages, page_size, first), (stride, first, 1), offset)
    tail = data.as_strided(
        (pages, page_size, second), (stride, second, 1), offset + page_size * first
    )
    return head, tail


def _reinterpret(data: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes [..., n] read as `dtype`; a copy, so any alignment will do."""
    return data.clone(memory_format=torch.contiguous_format).view(dtype)


def is_fp8_cache(cache: Tensor) -> bool:
    """Whether a latent cache is one of the byte layouts rather than plain rows of floats."""
    return cache.element_size() == 1


def indexer_cache_keys(kv_cache: Tensor, page: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Keys of an indexer cache at int64 (page, offset): e4m3 [..., D] and fp32 scales [...]."""
    values, scales = _planes(kv_cache, kv_cache.shape[-1] - _SCALE_BYTES, _SCALE_BYTES)
    key = _reinterpret(values[page, offset], torch.float8_e4m3fn)
    return key, _reinterpret(scales[page, offset], torch.float32).squeeze(-1)


def latent_rows(kv_cache: Tensor, page: Tensor, offset: Tensor) -> Tensor:
    """Rows [..., d] of an MLA cache at int64 (page, offset): dequantised fp32, or as they are."""
    if not is_fp8_cache(kv_cache):
        return kv_cache[:, :, 0][page, offset]
    width = kv_cache.shape[-1]
    if width == V32_ROW_BYTES:
        row = _bytes(kv_cache)[:, :, 0][page, offset]
        nope, group = _V32_NOPE, _V32_GROUP
        rope_at = nope + _SCALE_BYTES * (nope // group)
        scale = _reinterpret(row[..., nope:rope_at], torch.float32)
    elif width == V4_ROW_BYTES:
        data, scales = _planes(kv_cache, _V4_DATA_BYTES, _V4_SCALE_BYTES)
        row = data[page, offset]
        nope, group = _V4_NOPE, _V4_GROUP
        rope_at = nope
        scale = ue8m0_decode(scales[page, offset][..., : nope // group])
    else:
        raise ValueError(
            f"kv_cache: expected rows of {V32_ROW_BYTES} or {V4_ROW_BYTES} bytes, got {width}"
        )
    code = _reinterpret(row[..., :nope], torch.float8_e4m3fn).to(torch.float32)
    value = code.reshape(*scale.shape, group) * scale.unsqueeze(-1)
    rope = _reinterpret(row[..., rope_at:], torch.bfloat16).to(torch.float32)
    return torch.cat((value.flatten(-2), rope), dim=-1)


def _all_positions(kv_cache: Tensor) -> tuple[Tensor, Tensor]:
    pages, page_size = kv_cache.shape[:2]
    page = torch.arange(pages, device=kv_cache.device).unsqueeze(-1)
    offset = torch.arange(page_size, device=kv_cache.device).unsqueeze(0)
    return page.expand(pages, page_size), offset.expand(pages, page_size)


def dequantize_mla_kv_cache(kv_cache: Tensor) -> Tensor:
    """Every row of an FP8 MLA cache, e4m3 value * fp32 scale, not rounded further.

    kv_cache: uint8/int8/e4m3 [pages, page_size, 1, 656 | 584]. Returns fp32
    [pages, page_size, 576 | 512], RoPE last.
    """
    return latent_rows(kv_cache, *_all_positions(kv_cache)).to(torch.float32)


def dequantize_indexer_k_cache(kv_cache: Tensor) -> tuple[Tensor, Tensor]:
    """Every key of an indexer cache, decoded but not scaled.

    kv_cache: uint8 [pages, page_size, 1, D+4]. Returns (fp32 values [pages, page_size, D], fp32
    scales [pages, page_size]); a key is value * scale.
    """
    key, scale = indexer_cache_keys(kv_cache, *_all_positions(kv_cache))
    return key.to(torch.float32), scale


def _writes(kv_cache: Tensor, slot_mapping: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(token, page, offset) of the slots to write; of tokens that share a slot only the last."""
    pages, page_size = kv_cache.shape[:2]
    slot = as_int64("slot_mapping", slot_mapping.reshape(-1))
    token = torch.nonzero((slot >= 0) & (slot < pages * page_size)).squeeze(-1)
    ordered, order = torch.sort(slot[token], stable=True)
    last = torch.ones_like(ordered, dtype=torch.bool)
    last[:-1] = ordered[1:] != ordered[:-1]
    token, slot = token[order[last]], ordered[last]
    return token, slot.div(page_size, rounding_mode="floor"), slot.remainder(page_size)


def indexer_k_quant_and_cache(
    k: Tensor, kv_cache: Tensor, slot_mapping: Tensor, scale_fmt: str | None = None
) -> None:
    """Quantise indexer keys, one scale a token, and write them to their slots (vLLM's function).

    k: fp32/16-bit [T,D]; kv_cache: uint8 [pages, page_size, 1, D+4], mutated; slot_mapping:
    int32/int64 [T], slots outside the cache are skipped, the last of equal slots wins. scale_fmt:
    None or "fp32" for amax/448, "ue8m0" to round it up to a power of two (stored as fp32).
    """
    if scale_fmt not in (None, "fp32", "ue8m0"):
        raise ValueError(
            f"indexer_k_quant_and_cache: scale_fmt: expected None, 'fp32' or 'ue8m0', "
            f"got {scale_fmt!r}"
        )
    token, page, offset = _writes(kv_cache, slot_mapping)
    key, scale = quantize_last_dim(k.detach()[token].to(torch.float32), scale_fmt == "ue8m0")
    values, scales = _planes(kv_cache, kv_cache.shape[-1] - _SCALE_BYTES, _SCALE_BYTES)
    values[page, offset] = key.view(torch.uint8)
    scales[page, offset] = scale.unsqueeze(-1).view(torch.uint8)


def mla_kv_quant_and_cache(
    kv_c: Tensor, k_pe: Tensor, kv_cache: Tensor, slot_mapping: Tensor
) -> None:
    """Write MLA latents to their slots, quantised for an FP8 cache (vLLM's concat_and_cache_mla).

    kv_c: 16-bit [T, d_nope]; k_pe: same dtype [T, d_rope]; slot_mapping: int32/int64 [T], slots
    outside the cache are skipped, the last of equal slots wins. kv_cache, mutated:
    uint8 [..., 656]: d_nope 512, d_rope 64, fp32 scales amax/448, one for 128 values;
    uint8 [..., 584]: d_nope 448, d_rope 64, ue8m0 scales, one for 64 values, pad byte 0;
    float [pages, page_size, 1, d_nope + d_rope]: a plain copy.
    """
    expect_one_head("mla_kv_quant_and_cache: kv_cache", kv_cache)
    token, page, offset = _writes(kv_cache, slot_mapping)
    nope, rope = kv_c.detach()[token], k_pe.detach()[token]
    if not is_fp8_cache(kv_cache):
        kv_cache[:, :, 0][page, offset] = torch.cat((nope, rope), dim=-1).to(kv_cache.dtype)
        return
    v32 = kv_cache.shape[-1] == V32_ROW_BYTES
    group = _V32_GROUP if v32 else _V4_GROUP
    groups = nope.to(torch.float32).reshape(len(token), nope.shape[-1] // group, group)
    quantised, scale = quantize_last_dim(groups, ue8m0=not v32)
    code = quantised.view(torch.uint8).flatten(-2)
    rope_bytes = rope.to(torch.bfloat16).contiguous().view(torch.uint8)
    if v32:
        row = torch.cat((code, scale.view(torch.uint8), rope_bytes), dim=-1)
        _bytes(kv_cache)[:, :, 0][page, offset] = row
        return
    data, scales = _planes(kv_cache, _V4_DATA_BYTES, _V4_SCALE_BYTES)
    data[page, offset] = torch.cat((code, rope_bytes), dim=-1)
    exponent = (scale.view(torch.int32) >> 23).to(torch.uint8)
    scales[page, offset] = torch.nn.functional.pad(exponent, (0, 1))


def _locate(
    kv_cache: Tensor, block_table: Tensor, cu_seqlens: Tensor, num_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(covered, page, offset) of rows 0..num_tokens of the requests packed by cu_seqlens."""
    pages, page_size = kv_cache.shape[:2]
    batch, width = block_table.shape
    row = torch.arange(num_tokens, device=kv_cache.device)
    if batch == 0 or width == 0 or pages == 0:
        return torch.zeros_like(row, dtype=torch.bool), row, row
    cu_seqlens = as_int64("cu_seqlens", cu_seqlens)
    begin = cu_seqlens[:batch]
    # The last request with begin <= row: suffix minima are sorted even where cu_seqlens is not.
    sorted_begin = begin.flip(0).cummin(0).values.flip(0)
    request = torch.searchsorted(sorted_begin, row, right=True) - 1
    covered = request >= 0
    request = request.clamp(min=0)
    covered &= row < cu_seqlens[request + 1]
    position = row - begin[request]
    table_column = position.div(page_size, rounding_mode="floor")
    covered &= table_column < width
    page = as_int64("block_table", block_table)[request, table_column.clamp(0, width - 1)]
    covered &= (page >= 0) & (page < pages)
    return covered, page.clamp(0, pages - 1), position.remainder(page_size)


def gather_indexer_k_cache(
    kv_cache: Tensor, block_table: Tensor, cu_seqlens: Tensor, num_tokens: int
) -> tuple[Tensor, Tensor]:
    """Collect paged indexer keys into rows (vLLM's cp_gather_indexer_k_quant_cache).

    kv_cache: uint8 [pages, page_size, 1, D+4]; block_table: int32 [B,P]; cu_seqlens: int32 [B+1],
    request b fills rows cu_seqlens[b] .. cu_seqlens[b+1]. Returns (e4m3 [num_tokens, D], fp32
    scales [num_tokens]); rows of no request or of an invalid page are zero. A row belongs to the
    last request b < B with cu_seqlens[b] <= row, if row < cu_seqlens[b+1].
    """
    dim = kv_cache.shape[-1] - _SCALE_BYTES
    covered, page, offset = _locate(kv_cache, block_table, cu_seqlens, num_tokens)
    key = torch.zeros((num_tokens, dim), dtype=torch.uint8, device=kv_cache.device)
    scale = torch.zeros(num_tokens, dtype=torch.float32, device=kv_cache.device)
    found_key, found_scale = indexer_cache_keys(kv_cache, page[covered], offset[covered])
    key[covered] = found_key.view(torch.uint8)
    scale[covered] = found_scale
    return key.view(torch.float8_e4m3fn), scale


def gather_mla_kv_cache(
    kv_cache: Tensor, block_table: Tensor, cu_seqlens: Tensor, num_tokens: int
) -> Tensor:
    """Collect and dequantise paged MLA latents into rows (vLLM's cp_gather_cache).

    kv_cache: an FP8 cache [..., 656 | 584] or a float one [pages, page_size, 1, d]; block_table and
    cu_seqlens as in `gather_indexer_k_cache`. Returns bf16 [num_tokens, 576 | 512], dequantised in
    fp32 and rounded once, or the float cache's dtype [num_tokens, d]; uncovered rows are zero.
    """
    expect_one_head("gather_mla_kv_cache: kv_cache", kv_cache)
    covered, page, offset = _locate(kv_cache, block_table, cu_seqlens, num_tokens)
    found = latent_rows(kv_cache, page[covered], offset[covered])
    dtype = torch.bfloat16 if is_fp8_cache(kv_cache) else kv_cache.dtype
    rows = torch.zeros((num_tokens, found.shape[-1]), dtype=dtype, device=kv_cache.device)
    return rows.masked_scatter(covered.unsqueeze(-1), found.to(dtype))

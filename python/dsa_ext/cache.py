# SPDX-License-Identifier: Apache-2.0
"""Writes to and gathers from the paged caches (byte layouts: docs/kv_cache_layout.md).

A slot is page * page_size + offset. Where two tokens of one write have the same slot, the later one
is kept on the CPU; on a GPU the row is undefined. Every function raises ValueError for a wrong
argument (one line: argument, expected, got).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsa_ext import _C
from dsa_ext._arguments import check_tensor, unpack_out
from dsa_ext._ops import ops


def indexer_k_quant_and_cache(
    k: Tensor, kv_cache: Tensor, slot_mapping: Tensor, scale_fmt: str | None = None
) -> None:
    """Quantise indexer keys (one scale a token) and write them into their slots.

    Args:
        k: float32, bfloat16 or float16 [T, D], D <= 128.
        kv_cache: uint8 [pages, page_size, 1, D + 4] or, as vLLM has it, [pages, page_size, D + 4];
            written in place.
        slot_mapping: int32 or int64 [T]; a slot outside the cache (such as -1) is skipped.
        scale_fmt: None or "fp32" for amax / 448, "ue8m0" for that rounded up to a power of two.

    Quantisation: :func:`dsa_ext.per_token_cast_to_fp8`. Origin: vLLM's op of this name, which has a
    quant_block_size before scale_fmt: leave it out where it is D.
    """
    if scale_fmt not in (None, "fp32", "ue8m0"):
        raise ValueError(
            "indexer_k_quant_and_cache: scale_fmt: expected None, 'fp32' or 'ue8m0', "
            f"got {scale_fmt!r}"
        )
    if isinstance(kv_cache, Tensor) and kv_cache.dim() == 3:
        kv_cache = kv_cache.unsqueeze(2)
    ops.indexer_k_quant_and_cache(k, kv_cache, slot_mapping, scale_fmt == "ue8m0")


def gather_indexer_k_cache(
    kv_cache: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    num_tokens: int,
    *,
    out: Tensor | tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Gather the indexer keys of whole requests, packed one after another.

    Args:
        kv_cache: uint8 [pages, page_size, 1, D + 4].
        block_table: int32 [B, P].
        cu_seqlens: int32 [B + 1]: request b fills rows cu_seqlens[b] to cu_seqlens[b + 1].
        num_tokens: rows of the result (on the host, so that nothing waits for the device).
        out: the pair to write into, or its first tensor alone.

    Returns:
        keys float8_e4m3fn [num_tokens, D] and scales float32 [num_tokens], ready for
        :func:`dsa_ext.fp8_mqa_logits`. Rows of no request, or without a page, are 0 with scale 0.
    """
    op = "gather_indexer_k_cache"
    check_tensor(op, "kv_cache", kv_cache)
    _check_num_tokens(op, num_tokens)
    keys, scales = unpack_out(op, ("keys", "scales"), out)
    if keys is None:
        head_dim = max(kv_cache.shape[-1:].numel() - _C.INDEXER_SCALE_BYTES, 0)
        keys = kv_cache.new_empty((num_tokens, head_dim), dtype=torch.float8_e4m3fn)
    if scales is None:
        scales = kv_cache.new_empty((num_tokens,), dtype=torch.float32)
    ops.gather_indexer_k_cache(kv_cache, block_table, cu_seqlens, keys, scales)
    return keys, scales


def mla_kv_quant_and_cache(
    kv_c: Tensor, k_pe: Tensor, kv_cache: Tensor, slot_mapping: Tensor
) -> None:
    """Quantise MLA latents and write them, with their RoPE part, into their slots.

    Args:
        kv_c: bfloat16 or float16 [T, d_nope], the normalised latent.
        k_pe: like kv_c [T, d_rope], the rotated shared key.
        kv_cache: written in place: uint8 [pages, page_size, 1, 656] (d_nope 512, d_rope 64, fp32
            scales for 128 values), uint8 [pages, page_size, 1, 584] (d_nope 448, d_rope 64, ue8m0
            scales for 64 values), or like kv_c [pages, page_size, 1, d_nope + d_rope] (plain copy).
        slot_mapping: int32 or int64 [T]; a slot outside the cache (such as -1) is skipped.
    """
    ops.mla_kv_quant_and_cache(kv_c, k_pe, kv_cache, slot_mapping)


def gather_mla_kv_cache(
    kv_cache: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    num_tokens: int,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Gather and dequantise the latents of whole requests, packed one after another.

    Args:
        kv_cache: as in :func:`mla_kv_quant_and_cache`.
        block_table: int32 [B, P].
        cu_seqlens: int32 [B + 1]: request b fills rows cu_seqlens[b] to cu_seqlens[b + 1].
        num_tokens: rows of the result (on the host, so that nothing waits for the device).
        out: where to write.

    Returns:
        bfloat16 [num_tokens, 576] or [num_tokens, 512] (latent, then RoPE), or rows of a 16-bit
        cache as they are. Rows of no request, or without a page, are 0.
    """
    check_tensor("gather_mla_kv_cache", "kv_cache", kv_cache)
    _check_num_tokens("gather_mla_kv_cache", num_tokens)
    if out is None:
        width = kv_cache.shape[-1:].numel()
        fp8 = {layout["token_bytes"]: layout for layout in (_C.MLA_V32, _C.MLA_V4)}
        dtype = kv_cache.dtype
        if dtype == torch.uint8:
            dtype = torch.bfloat16
            width = fp8[width]["d_nope"] + fp8[width]["d_rope"] if width in fp8 else width
        out = kv_cache.new_empty((num_tokens, width), dtype=dtype)
    ops.gather_mla_kv_cache(kv_cache, block_table, cu_seqlens, out)
    return out


def _check_num_tokens(op: str, num_tokens: int) -> None:
    if num_tokens < 0:
        raise ValueError(f"{op}: num_tokens: expected >= 0, got {num_tokens}")

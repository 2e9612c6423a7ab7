# SPDX-License-Identifier: Apache-2.0
"""One attention layer end to end: indexer logits, top-k, sparse attention against dense attention.

Dense attention runs over the same latent (K = 576, V = 512, 128 heads on one key head) in FlashMLA
and in PyTorch. It is the absorbed form; a dense prefill may also expand the latent to heads of
192 + 128, which takes 3.4 times fewer FLOP and is not measured here. Projections and cache writes,
the same for both, are left out.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

import dsa_ext
from benchmarks import checks, inputs, peers
from benchmarks.case import Call, Case, Work
from benchmarks.cases.attention import D_QK, D_V
from benchmarks.cases.logits import Paged, Prefill
from dsa_ext import reference

OP = "dsa_layer"
HEADS = 128
INDEX_HEADS = 64
K = 2048
CHUNK = 4096
_SCALE = D_QK**-0.5


def _in_order(stages: dict[str, Call]) -> None:
    for stage in stages.values():
        stage()


def prefill(n: int) -> Case:
    """The last CHUNK tokens of a prompt of n."""

    def make(device: torch.device) -> Work:
        index = Prefill.make(CHUNK, n, INDEX_HEADS, device)
        q = inputs.bf16(CHUNK, HEADS, D_QK, device=device)
        kv = inputs.bf16(n, 1, D_QK, device=device)
        logits = torch.empty(CHUNK, n, device=device)
        indices = torch.empty(CHUNK, K, dtype=torch.int32, device=device)
        out = (
            torch.empty(CHUNK, HEADS, D_V, dtype=q.dtype, device=device),
            torch.empty(CHUNK, HEADS, device=device),
            torch.empty(CHUNK, HEADS, device=device),
        )
        stages: dict[str, Call] = {
            "indexer": lambda: dsa_ext.fp8_mqa_logits(*index.args, False, out=logits),
            "topk": lambda: dsa_ext.topk_select(logits, K, None, index.ends, out=indices),
            "attention": lambda: dsa_ext.flash_mla_sparse_fwd(
                q, kv, indices.unsqueeze(1), _SCALE, topk_length=index.ends, out=out
            ),
        }

        def check() -> None:
            rows = checks.some(CHUNK, device)
            checks.selection(indices[rows], index.expected(rows), K)
            expected, _, _ = reference.flash_mla_sparse_fwd(
                q[rows], kv, indices[rows].unsqueeze(1), _SCALE, out_dtype=torch.float32
            )
            checks.close("out", out[0][rows], expected, checks.PREFILL)

        def flash_mla() -> Call:
            pages = kv.view(n // inputs.PAGE, inputs.PAGE, 1, D_QK)
            table = inputs.int32(torch.arange(pages.shape[0]), device).unsqueeze(0)
            lens = inputs.int32([n], device)
            return peers.flash_mla().dense_decode(q.unsqueeze(0), pages, table, lens, causal=True)

        def sdpa() -> Call:
            query = q.transpose(0, 1).unsqueeze(0)
            key = kv.transpose(0, 1).unsqueeze(0).expand(1, HEADS, n, D_QK)
            mask = causal_lower_right(CHUNK, n)
            return lambda: F.scaled_dot_product_attention(
                query, key, key[..., :D_V], attn_mask=mask, scale=_SCALE
            )

        return Work(
            run=lambda: _in_order(stages),
            check=check,
            peers={"FlashMLA dense": flash_mla, "PyTorch SDPA": sdpa},
            stages=stages,
        )

    return Case(OP, f"prefill chunk {CHUNK} of context {n}", make)


def decode(batch: int, n: int) -> Case:
    """One token of each of `batch` requests, each with a context of n."""

    def make(device: torch.device) -> Work:
        index = Paged.make(batch, 1, n, INDEX_HEADS, device)
        cache = inputs.v32_cache(index.table.numel(), device)
        q = inputs.bf16(batch, 1, HEADS, D_QK, device=device)
        schedule = index.schedule()
        logits = torch.empty(batch, n, device=device)
        slots = torch.empty(batch, K, dtype=torch.int32, device=device)
        out = torch.empty(batch, 1, HEADS, D_V, dtype=q.dtype, device=device)
        lse = torch.empty(batch, HEADS, 1, device=device)
        stages: dict[str, Call] = {
            "indexer": lambda: dsa_ext.fp8_paged_mqa_logits(
                index.q,
                index.cache,
                index.weights,
                index.lens,
                index.table,
                schedule,
                n,
                out=logits,
            ),
            "topk": lambda: dsa_ext.topk_select(
                logits,
                K,
                None,
                index.lens,
                block_table=index.table,
                page_size=inputs.PAGE,
                out=slots,
            ),
            "attention": lambda: dsa_ext.flash_mla_with_kvcache(
                q,
                cache,
                None,
                None,
                D_V,
                is_fp8_kvcache=True,
                indices=slots.unsqueeze(1),
                topk_length=index.lens,
                out=(out, lse),
            ),
        }

        def check() -> None:
            some = checks.some(batch, device, most=2)
            theirs = reference.topk_select(
                logits[some],
                K,
                None,
                index.lens[some],
                block_table=index.table[some],
                page_size=inputs.PAGE,
            )
            checks.exact("slots", slots[some], theirs)
            checks.sparse_decode(out, lse, some, q, cache, slots.unsqueeze(1))

        def dense_cache() -> Tensor:
            return inputs.bf16(batch, n, D_QK, device=device)

        def flash_mla() -> Call:
            pages = dense_cache().view(-1, inputs.PAGE, 1, D_QK)
            return peers.flash_mla().dense_decode(q, pages, index.table, index.lens)

        def sdpa() -> Call:
            # One key head: the heads are as good as query rows, and nothing is expanded.
            query, key = q, dense_cache().unsqueeze(1)
            return lambda: F.scaled_dot_product_attention(query, key, key[..., :D_V], scale=_SCALE)

        return Work(
            run=lambda: _in_order(stages),
            check=check,
            peers={"FlashMLA dense": flash_mla, "PyTorch SDPA": sdpa},
            stages=stages,
        )

    return Case(OP, f"decode b{batch} context {n}", make)


def cuda_cases() -> Iterator[Case]:
    for n in (4096, 8192, 32768, 131072):
        yield prefill(n)
    for batch in (1, 32):
        for n in (4096, 32768, 131072):
            yield decode(batch, n)
    yield decode(1, 1 << 20)

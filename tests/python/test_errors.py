# SPDX-License-Identifier: Apache-2.0
"""One test for each error message: every check of csrc/dispatch/validate.cpp, and of dispatch.

A case is a right call with something wrong in it, and the whole line that must come back.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import dsa_ext
from dsa_ext import _C
from helpers import E4M3

FP32, BF16, FP16, INT32 = torch.float32, torch.bfloat16, torch.float16, torch.int32
INT64, UINT8 = torch.int64, torch.uint8
MORE_THAN_INT32 = 2**31


def t(*shape: int, dtype: torch.dtype = FP32) -> torch.Tensor:
    """Zeros, of e4m3 too."""
    return torch.zeros(shape, dtype=UINT8 if dtype == E4M3 else dtype).view(dtype)


def i32(*shape: int) -> torch.Tensor:
    return t(*shape, dtype=INT32)


def across(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with a stride of 2 in the last dimension."""
    wide = torch.zeros((*tensor.shape, 2), dtype=UINT8 if tensor.dtype == E4M3 else tensor.dtype)
    return wide.view(tensor.dtype)[..., 0]


def huge(*shape: int, dtype: torch.dtype = FP32) -> torch.Tensor:
    """Many elements, one of memory."""
    return t(*(1 for _ in shape), dtype=dtype).expand(shape)


# ---- right calls ---------------------------------------------------------------------------------


def logits():
    return {
        "q": t(2, 4, 32, dtype=E4M3),
        "kv": (t(6, 32, dtype=E4M3), t(6)),
        "weights": t(2, 4),
        "cu_seq_len_k_start": i32(2),
        "cu_seq_len_k_end": i32(2),
    }


def logits_pair():
    return logits() | {"q": (t(2, 4, 32, dtype=E4M3), None)}


def topk():
    return logits() | {"k": 3}


def paged_logits():
    return {
        "q": t(2, 3, 4, 32, dtype=E4M3),
        "kv_cache": t(5, 8, 1, 36, dtype=UINT8),
        "weights": t(6, 4),
        "context_lens": i32(2),
        "block_table": i32(2, 7),
        "schedule_meta": i32(9, 2),
        "max_context_len": 50,
    }


def paged_logits_pair():
    return paged_logits() | {"q": (t(2, 3, 4, 32, dtype=E4M3), None)}


def paged_topk():
    return paged_logits() | {"k": 3}


def metadata():
    return {"context_lens": i32(2, 3), "block_kv": 64, "num_sms": 8, "indices": i32(2)}


def select():
    return {"scores": t(4, 9), "k": 3}


def select_slots():
    return select() | {"block_table": i32(2, 7), "page_size": 8}


def to_slots():
    return {"indices": i32(4, 3), "block_table": i32(2, 7), "page_size": 8}


def merge_candidates():
    return {"scores": t(4, 9), "indices": i32(4, 9), "k": 3}


def sparse():
    return {
        "q": t(2, 3, 96, dtype=BF16),
        "kv": t(9, 1, 96, dtype=BF16),
        "indices": i32(2, 1, 5),
        "sm_scale": 0.1,
        "d_v": 64,
    }


def decode():
    return {
        "q": t(2, 1, 3, 576, dtype=BF16),
        "k_cache": t(4, 8, 1, 576, dtype=BF16),
        "block_table": None,
        "cache_seqlens": None,
        "head_dim_v": 512,
        "tile_scheduler_metadata": None,
        "indices": i32(2, 1, 5),
    }


def decode_two():
    return decode() | {
        "extra_k_cache": t(3, 6, 1, 576, dtype=BF16),
        "extra_indices_in_kvcache": i32(2, 1, 4),
    }


def decode_v32():
    return decode_two() | {
        "k_cache": t(4, 8, 1, 656, dtype=UINT8),
        "extra_k_cache": t(3, 6, 1, 656, dtype=UINT8),
        "is_fp8_kvcache": True,
    }


def decode_v4():
    return decode_v32() | {
        "q": t(2, 1, 3, 512, dtype=BF16),
        "k_cache": t(4, 8, 1, 584, dtype=UINT8),
        "extra_k_cache": t(3, 6, 1, 584, dtype=UINT8),
    }


def dense():
    return decode() | {"indices": None, "block_table": i32(2, 7), "cache_seqlens": i32(2)}


def merge_states():
    return {"outs": t(2, 5, 3, 8), "lses": t(2, 5, 3)}


def hadamard():
    return {"x": t(4, 8)}


def cast():
    return {"x": t(4, 200), "use_ue8m0": False}


def indexer_write():
    return {
        "k": t(6, 32, dtype=BF16),
        "kv_cache": t(5, 8, 1, 36, dtype=UINT8),
        "slot_mapping": t(6, dtype=INT64),
    }


def indexer_gather():
    return {
        "kv_cache": t(5, 8, 1, 36, dtype=UINT8),
        "block_table": i32(2, 7),
        "cu_seqlens": i32(3),
        "num_tokens": 10,
    }


def mla_write():
    return {
        "kv_c": t(6, 512, dtype=BF16),
        "k_pe": t(6, 64, dtype=BF16),
        "kv_cache": t(5, 8, 1, 656, dtype=UINT8),
        "slot_mapping": t(6, dtype=INT64),
    }


def mla_write_v4():
    return mla_write() | {
        "kv_c": t(6, 448, dtype=BF16),
        "kv_cache": t(5, 8, 1, 584, dtype=UINT8),
    }


def mla_write_16():
    return mla_write() | {"kv_cache": t(5, 8, 1, 576, dtype=BF16)}


def mla_gather():
    return indexer_gather() | {"kv_cache": t(5, 8, 1, 656, dtype=UINT8)}


def mla_gather_16():
    return indexer_gather() | {"kv_cache": t(5, 8, 1, 576, dtype=BF16)}


FUNCTIONS = {
    logits: dsa_ext.fp8_mqa_logits,
    logits_pair: dsa_ext.fp8_fp4_mqa_logits,
    topk: dsa_ext.fp8_mqa_topk,
    paged_logits: dsa_ext.fp8_paged_mqa_logits,
    paged_logits_pair: dsa_ext.fp8_fp4_paged_mqa_logits,
    paged_topk: dsa_ext.fp8_paged_mqa_topk,
    metadata: dsa_ext.get_paged_mqa_logits_metadata,
    select: dsa_ext.topk_select,
    select_slots: dsa_ext.topk_select,
    to_slots: dsa_ext.map_to_slots,
    merge_candidates: dsa_ext.merge_topk,
    sparse: dsa_ext.flash_mla_sparse_fwd,
    decode: dsa_ext.flash_mla_with_kvcache,
    decode_two: dsa_ext.flash_mla_with_kvcache,
    decode_v32: dsa_ext.flash_mla_with_kvcache,
    decode_v4: dsa_ext.flash_mla_with_kvcache,
    dense: dsa_ext.flash_mla_with_kvcache,
    merge_states: dsa_ext.merge_attn_states,
    hadamard: dsa_ext.hadamard_transform,
    cast: dsa_ext.per_token_cast_to_fp8,
    indexer_write: dsa_ext.indexer_k_quant_and_cache,
    indexer_gather: dsa_ext.gather_indexer_k_cache,
    mla_write: dsa_ext.mla_kv_quant_and_cache,
    mla_write_v4: dsa_ext.mla_kv_quant_and_cache,
    mla_write_16: dsa_ext.mla_kv_quant_and_cache,
    mla_gather: dsa_ext.gather_mla_kv_cache,
    mla_gather_16: dsa_ext.gather_mla_kv_cache,
}


@pytest.mark.parametrize("case", FUNCTIONS, ids=lambda case: case.__name__)
def test_the_calls_below_are_right_but_for_one_thing(case):
    FUNCTIONS[case](**case())


# ---- wrong arguments -----------------------------------------------------------------------------

# (right call, what is wrong in it, "argument: expected ..., got ...")
WRONG = [
    # fp8_mqa_logits
    (
        logits,
        {"q": t(2, 4, 32)},
        "q: expected float8_e4m3fn [S, H, D], got float32 [2, 4, 32]",
    ),
    (
        logits,
        {"q": t(2, 128, dtype=E4M3)},
        "q: expected float8_e4m3fn [S, H, D], got float8_e4m3fn [2, 128]",
    ),
    (
        logits,
        {"q": across(t(2, 4, 32, dtype=E4M3))},
        "q: expected stride 1 in the last dimension, got strides [256, 64, 2]",
    ),
    (logits, {"q": t(2, 0, 32, dtype=E4M3)}, "q: expected H >= 1, got 0"),
    (
        logits,
        {"kv": (t(6, 64, dtype=E4M3), t(6))},
        "kv[0]: expected float8_e4m3fn [L, D=32], got float8_e4m3fn [6, 64]",
    ),
    (
        logits,
        {"kv": (t(6, 32, dtype=E4M3), t(7))},
        "kv[1]: expected float32 [L=6], got float32 [7]",
    ),
    (
        logits,
        {"weights": t(4, 32)},
        "weights: expected float32 [S=2, H=4], got float32 [4, 32]",
    ),
    (
        logits,
        {"weights": t(2, 4, dtype=torch.float64)},
        "weights: expected float32 [S=2, H=4], got float64 [2, 4]",
    ),
    (
        logits,
        {"cu_seq_len_k_start": t(2, dtype=INT64)},
        "cu_seq_len_k_start: expected int32 [S=2], got int64 [2]",
    ),
    (
        logits,
        {"cu_seq_len_k_end": i32(3)},
        "cu_seq_len_k_end: expected int32 [S=2], got int32 [3]",
    ),
    (
        logits,
        {
            "kv": (huge(MORE_THAN_INT32, 32, dtype=E4M3).expand(-1, 32), huge(MORE_THAN_INT32)),
            "out": t(2, 1),
        },
        "kv[0]: expected stride 1 in the last dimension, got strides [0, 0]",
    ),
    (
        logits,
        {
            "kv": (t(1, 32, dtype=E4M3).expand(MORE_THAN_INT32, 32), huge(MORE_THAN_INT32)),
            "out": t(2, 1),
        },
        "kv[0]: expected at most 2147483647 keys, got 2147483648",
    ),
    (
        logits,
        {"max_seqlen_k": -1},
        "max_seqlen_k: expected 0 to 2147483647, got -1",
    ),
    (
        logits,
        {"max_seqlen_k": MORE_THAN_INT32, "out": t(2, 1)},
        "max_seqlen_k: expected 0 to 2147483647, got 2147483648",
    ),
    (
        logits,
        {"out": t(2, 5)},
        "out: expected float32 or bfloat16 [S=2, L=6], got float32 [2, 5]",
    ),
    (
        logits,
        {"out": t(2, 6), "max_seqlen_k": 5},
        "out: expected float32 or bfloat16 [S=2, max_seqlen_k=5], got float32 [2, 6]",
    ),
    (
        logits,
        {"logits_dtype": FP16},
        "logits_dtype: expected float32 or bfloat16, got float16",
    ),
    (
        logits,
        {"out": t(2, 6, dtype=FP16)},
        "out: expected float32 or bfloat16 [S=2, L=6], got float16 [2, 6]",
    ),
    (logits, {"kv": t(2, 6, 32)}, "kv: expected the pair (keys, scales), got float32 [2, 6, 32]"),
    (logits, {"kv": (1, 2, 3)}, "kv: expected the pair (keys, scales), got a tuple of 3"),
    (logits, {"kv": (None, t(6))}, "kv[0]: expected a tensor, got None"),
    (
        logits,
        {"kv": (t(6, 32, dtype=E4M3), None)},
        "kv[1]: expected float32 [L=6], got None",
    ),
    (logits, {"q": None}, "q: expected a tensor, got None"),
    (logits, {"q": "queries"}, "q: expected a tensor, got str"),
    (logits, {"weights": None}, "weights: expected float32 [S=2, H=4], got None"),
    (
        logits,
        {"cu_seq_len_k_end": t(1, 1, 1, 1, 1, 1, 1, 1, 2, dtype=INT32)},
        "cu_seq_len_k_end: expected int32 [S=2], got int32 of 9 dimensions",
    ),
    # fp8_fp4_mqa_logits
    (
        logits_pair,
        {"q": (t(2, 4, 16, dtype=UINT8), t(2, 4))},
        "q[1]: expected None (FP8 alone), got float32 [2, 4]",
    ),
    (
        logits_pair,
        {"q": t(2, 4, 32, dtype=E4M3)},
        "q: expected the pair (queries, None), got float8_e4m3fn [2, 4, 32]",
    ),
    (logits_pair, {"q": (None, None)}, "q[0]: expected a tensor, got None"),
    (
        logits,
        {"out": t(6, 2).t()},
        "out: expected stride 1 in the last dimension, got strides [1, 2]",
    ),
    # fp8_mqa_topk
    (
        topk,
        {"out": i32(3).expand(2, 3)},
        "out: expected elements that do not overlap, to be written, got strides [0, 1]",
    ),
    (
        topk,
        {"return_scores": True, "out": (i32(2, 3), t(4).as_strided((2, 3), (1, 1)))},
        "out scores: expected elements that do not overlap, to be written, got strides [1, 1]",
    ),
    (
        topk,
        {"kv": [t(6, 32, dtype=E4M3)]},
        "kv: expected the pair (keys, scales), got a list of 1",
    ),
    (topk, {"q": None}, "q: expected a tensor, got None"),
    (topk, {"out": 3}, "out: expected a tensor with return_scores=False, got int"),
    (
        topk,
        {"weights": t(2, 4, dtype=BF16)},
        "weights: expected float32 [S=2, H=4], got bfloat16 [2, 4]",
    ),
    (topk, {"k": 0}, "k: expected 1 to 2147483647, got 0"),
    (topk, {"k": MORE_THAN_INT32, "out": i32(2, 1)}, "k: expected 1 to 2147483647, got 2147483648"),
    (
        topk,
        {"out": i32(2, 4)},
        "out: expected int32 [S=2, k=3], got int32 [2, 4]",
    ),
    (
        topk,
        {"return_scores": True, "out": (i32(2, 3), t(2, 3, dtype=BF16))},
        "out scores: expected float32 [S=2, k=3], got bfloat16 [2, 3]",
    ),
    (
        topk,
        {"return_scores": True, "out": i32(2, 3)},
        "out: expected the pair (indices, scores) with return_scores=True, got a tensor",
    ),
    (
        topk,
        {"out": (i32(2, 3), t(2, 3))},
        "out: expected a tensor with return_scores=False, got a tuple of 2",
    ),
    (
        topk,
        {"return_scores": True, "out": (i32(2, 3),)},
        "out: expected the pair (indices, scores) with return_scores=True, got a tuple of 1",
    ),
    (
        topk,
        {"workspace": t(64)},
        "workspace: expected uint8 [bytes], got float32 [64]",
    ),
    (
        topk,
        {"workspace": t(4, 16, dtype=UINT8)},
        "workspace: expected uint8 [bytes], got uint8 [4, 16]",
    ),
    (
        topk,
        {"workspace": t(64, dtype=UINT8)[1:]},
        "workspace: expected a 16-byte aligned tensor (address mod 16 = 0), got 1",
    ),
    (
        topk,
        {"workspace": t(1, dtype=UINT8).expand(64)},
        "workspace: expected contiguous bytes, got strides [0]",
    ),
    # fp8_paged_mqa_logits
    (
        paged_logits,
        {"q": t(2, 4, 32, dtype=E4M3)},
        "q: expected float8_e4m3fn [B, next_n, H, D], got float8_e4m3fn [2, 4, 32]",
    ),
    (paged_logits, {"q": t(2, 3, 0, 32, dtype=E4M3)}, "q: expected H >= 1, got 0"),
    (
        paged_logits,
        {"kv_cache": t(5, 8, 1, 132, dtype=UINT8)},
        "kv_cache: expected uint8 [pages, page_size, 1, D+4=36], got uint8 [5, 8, 1, 132]",
    ),
    (
        paged_logits,
        {"kv_cache": t(5, 8, 2, 36, dtype=UINT8)},
        "kv_cache: expected uint8 [pages, page_size, 1, D+4=36], got uint8 [5, 8, 2, 36]",
    ),
    (
        paged_logits,
        {"kv_cache": t(5, 0, 1, 36, dtype=UINT8)},
        "kv_cache: expected page_size >= 1, got 0",
    ),
    (
        paged_logits,
        {"kv_cache": t(5, 16, 1, 36, dtype=UINT8)[:, ::2]},
        "kv_cache: expected tokens of a page back to back (stride(1) equal to the last size), "
        "got stride(1) = 72",
    ),
    (
        paged_logits,
        {"kv_cache": t(5, 290, dtype=UINT8).as_strided((5, 8, 1, 36), (290, 36, 36, 1))},
        "kv_cache: expected a page stride that is a multiple of 4 bytes, got 290",
    ),
    (
        paged_logits,
        {"weights": t(2, 4)},
        "weights: expected float32 [B*next_n=6, H=4], got float32 [2, 4]",
    ),
    (
        paged_logits,
        {"context_lens": i32(3)},
        "context_lens: expected int32 [B=2] or [B=2, next_n=3], got int32 [3]",
    ),
    (
        paged_logits,
        {"context_lens": i32(2, 2)},
        "context_lens: expected int32 [B=2] or [B=2, next_n=3], got int32 [2, 2]",
    ),
    (
        paged_logits,
        {"block_table": t(2, 7, dtype=INT64)},
        "block_table: expected int32 [B=2, P], got int64 [2, 7]",
    ),
    (
        paged_logits,
        {"block_table": i32(7, 2).t()},
        "block_table: expected stride 1 in the last dimension, got strides [1, 2]",
    ),
    (
        paged_logits,
        {"schedule_meta": i32(9, 3)},
        "schedule_meta: expected int32 [num_sms+1, 2], got int32 [9, 3]",
    ),
    (
        paged_logits,
        {"max_context_len": -1},
        "max_context_len: expected 0 to 2147483647, got -1",
    ),
    (
        paged_logits,
        {"max_context_len": MORE_THAN_INT32, "out": t(6, 1)},
        "max_context_len: expected 0 to 2147483647, got 2147483648",
    ),
    (
        paged_logits,
        {"out": t(2, 50)},
        "out: expected float32 or bfloat16 [B*next_n=6, max_context_len=50], got float32 [2, 50]",
    ),
    (
        paged_logits,
        {"logits_dtype": FP16},
        "logits_dtype: expected float32 or bfloat16, got float16",
    ),
    (paged_logits, {"q": None}, "q: expected a tensor, got None"),
    (paged_logits, {"indices": i32(3)}, "indices: expected int32 [B=2], got int32 [3]"),
    (
        paged_logits,
        {"indices": t(2, dtype=INT64)},
        "indices: expected int32 [B=2], got int64 [2]",
    ),
    # fp8_fp4_paged_mqa_logits
    (
        paged_logits_pair,
        {"q": (t(2, 3, 4, 16, dtype=UINT8), t(2, 3, 4, dtype=INT32))},
        "q[1]: expected None (FP8 alone), got int32 [2, 3, 4]",
    ),
    (paged_logits_pair, {"q": None}, "q: expected the pair (queries, None), got None"),
    # fp8_paged_mqa_topk
    (paged_topk, {"q": None}, "q: expected a tensor, got None"),
    (
        paged_topk,
        {"block_table": i32(3, 7)},
        "block_table: expected int32 [B=2, P], got int32 [3, 7]",
    ),
    (paged_topk, {"k": -5}, "k: expected 1 to 2147483647, got -5"),
    (
        paged_topk,
        {"out": t(6, 3, dtype=INT64)},
        "out: expected int32 [B*next_n=6, k=3], got int64 [6, 3]",
    ),
    (
        paged_topk,
        {"return_scores": True, "out": (i32(6, 3), t(6, 4))},
        "out scores: expected float32 [B*next_n=6, k=3], got float32 [6, 4]",
    ),
    (
        paged_topk,
        {"workspace": t(64)},
        "workspace: expected uint8 [bytes], got float32 [64]",
    ),
    (
        paged_topk,
        {"workspace": t(4, 16, dtype=UINT8)},
        "workspace: expected uint8 [bytes], got uint8 [4, 16]",
    ),
    (
        paged_topk,
        {"workspace": t(64, dtype=UINT8)[1:]},
        "workspace: expected a 16-byte aligned tensor (address mod 16 = 0), got 1",
    ),
    (
        paged_topk,
        {"workspace": t(1, dtype=UINT8).expand(64)},
        "workspace: expected contiguous bytes, got strides [0]",
    ),
    # get_paged_mqa_logits_metadata
    (
        metadata,
        {"context_lens": t(2, 3, dtype=INT64)},
        "context_lens: expected int32 [B] or [B, next_n], got int64 [2, 3]",
    ),
    (metadata, {"block_kv": 0}, "block_kv: expected >= 1, got 0"),
    (metadata, {"num_sms": 0}, "num_sms: expected 1 to 2147483646, got 0"),
    (metadata, {"indices": i32(3)}, "indices: expected int32 [B=2], got int32 [3]"),
    (metadata, {"context_lens": None}, "context_lens: expected a tensor, got None"),
    # topk_select
    (select, {"scores": None}, "scores: expected a tensor, got None"),
    (
        select,
        {"workspace": t(64)},
        "workspace: expected uint8 [bytes], got float32 [64]",
    ),
    (
        select,
        {"workspace": t(64, dtype=UINT8)[1:]},
        "workspace: expected a 16-byte aligned tensor (address mod 16 = 0), got 1",
    ),
    (
        select,
        {"workspace": t(1, dtype=UINT8).expand(64)},
        "workspace: expected contiguous bytes, got strides [0]",
    ),
    (
        select,
        {"scores": i32(4, 9)},
        "scores: expected float32 or bfloat16 or float16 [R, N], got int32 [4, 9]",
    ),
    (
        select,
        {"scores": huge(1, MORE_THAN_INT32)},
        "scores: expected at most 2147483647 columns, got 2147483648",
    ),
    (select, {"row_starts": i32(3)}, "row_starts: expected int32 [R=4], got int32 [3]"),
    (select, {"row_ends": t(4)}, "row_ends: expected int32 [R=4], got float32 [4]"),
    (select, {"index_base": i32(4, 1)}, "index_base: expected int32 [R=4], got int32 [4, 1]"),
    (
        select,
        {"index_base": MORE_THAN_INT32},
        "index_base: expected an int of 32 bits, got 2147483648",
    ),
    (
        select,
        {"index_base": -MORE_THAN_INT32 - 1},
        "index_base: expected an int of 32 bits, got -2147483649",
    ),
    (
        select,
        {"row_to_request": i32(4)},
        "row_to_request: expected None without block_table, got int32 [4]",
    ),
    (select, {"page_size": 64}, "page_size: expected None without block_table, got 64"),
    (select, {"page_size": 0}, "page_size: expected None without block_table, got 0"),
    (select, {"k": 0}, "k: expected 1 to 2147483647, got 0"),
    (select, {"out": i32(4, 2)}, "out: expected int32 [R=4, k=3], got int32 [4, 2]"),
    (
        select,
        {"return_scores": True, "out": (i32(4, 3), i32(4, 3))},
        "out scores: expected float32 [R=4, k=3], got int32 [4, 3]",
    ),
    (
        select,
        {"return_scores": True, "out": i32(4, 3)},
        "out: expected the pair (indices, scores) with return_scores=True, got a tensor",
    ),
    (select_slots, {"block_table": i32(7)}, "block_table: expected int32 [B, P], got int32 [7]"),
    (select_slots, {"page_size": None}, "page_size: expected an int with block_table, got None"),
    (select_slots, {"page_size": 0}, "page_size: expected 1 to 2147483647, got 0"),
    (
        select_slots,
        {"row_to_request": i32(2)},
        "row_to_request: expected int32 [R=4], got int32 [2]",
    ),
    (
        select_slots,
        {"block_table": i32(3, 7)},
        "block_table: expected a number of rows that divides the rows of the input, or "
        "row_to_request, got 3 for 4 rows",
    ),
    (
        select_slots,
        {"block_table": i32(0, 7)},
        "block_table: expected a number of rows that divides the rows of the input, or "
        "row_to_request, got 0 for 4 rows",
    ),
    # map_to_slots
    (to_slots, {"indices": None}, "indices: expected a tensor, got None"),
    (to_slots, {"block_table": None}, "block_table: expected int32 [B, P], got None"),
    (
        to_slots,
        {"indices": t(4, 3, dtype=INT64)},
        "indices: expected int32 [rows, k] or [requests, s, k], got int64 [4, 3]",
    ),
    (
        to_slots,
        {"block_table": t(2, 7)},
        "block_table: expected int32 [B, P], got float32 [2, 7]",
    ),
    (to_slots, {"page_size": 0}, "page_size: expected 1 to 2147483647, got 0"),
    (
        to_slots,
        {"row_to_request": i32(5)},
        "row_to_request: expected int32 [R=4], got int32 [5]",
    ),
    (
        to_slots,
        {"indices": i32(5, 1, 3)},
        "block_table: expected a number of rows that divides the rows of the input, or "
        "row_to_request, got 2 for 5 rows",
    ),
    (to_slots, {"out": i32(4, 4)}, "out: expected int32 [rows=4, k=3], got int32 [4, 4]"),
    (
        to_slots,
        {"indices": i32(2, 2, 3), "out": i32(4, 3)},
        "out: expected int32 [requests=2, s=2, k=3], got int32 [4, 3]",
    ),
    # merge_topk
    (merge_candidates, {"scores": None}, "scores: expected a tensor, got None"),
    (merge_candidates, {"indices": None}, "indices: expected int32 [R=4, N=9], got None"),
    (
        merge_candidates,
        {"scores": t(4, 9, dtype=torch.float64)},
        "scores: expected float32 or bfloat16 or float16 [R, N], got float64 [4, 9]",
    ),
    (
        merge_candidates,
        {"indices": i32(4, 8)},
        "indices: expected int32 [R=4, N=9], got int32 [4, 8]",
    ),
    (
        merge_candidates,
        {"scores": huge(1, MORE_THAN_INT32), "indices": huge(1, MORE_THAN_INT32, dtype=INT32)},
        "scores: expected at most 2147483647 columns, got 2147483648",
    ),
    (merge_candidates, {"k": 0}, "k: expected 1 to 2147483647, got 0"),
    (merge_candidates, {"out": i32(3, 3)}, "out: expected int32 [R=4, k=3], got int32 [3, 3]"),
    (
        merge_candidates,
        {"return_scores": True, "out": (i32(4, 3), t(4))},
        "out scores: expected float32 [R=4, k=3], got float32 [4]",
    ),
    # flash_mla_sparse_fwd
    (sparse, {"q": None}, "q: expected a tensor, got None"),
    (
        sparse,
        {"kv": None},
        "kv: expected bfloat16 [s_kv, 1, d_qk=96] or [pages, page_size, 1, d_qk=96], got None",
    ),
    (sparse, {"indices": None}, "indices: expected int32 [s_q=2, 1, topk], got None"),
    (
        sparse,
        {"out": (t(2, 3, 64, dtype=BF16), t(2, 3))},
        "out: expected a tensor or the tuple (out, max_logits, lse), got a tuple of 2",
    ),
    (
        sparse,
        {"out": (t(2, 3, 64, dtype=BF16), t(2, 3), None)},
        "out: expected a tensor or the tuple (out, max_logits, lse), got a tuple of 3",
    ),
    (
        sparse,
        {"out": "out"},
        "out: expected a tensor or the tuple (out, max_logits, lse), got str",
    ),
    (
        sparse,
        {"out": t(2, 3, 96, dtype=BF16)},
        "out: expected bfloat16 [s_q=2, h_q=3, d_v=64], got bfloat16 [2, 3, 96]",
    ),
    (
        sparse,
        {"q": t(2, 3, 96)},
        "q: expected bfloat16 or float16 [s_q, h_q, d_qk], got float32 [2, 3, 96]",
    ),
    (sparse, {"q": t(2, 0, 96, dtype=BF16)}, "q: expected h_q >= 1, got 0"),
    (
        sparse,
        {"kv": t(9, 1, 96, dtype=FP16)},
        "kv: expected bfloat16 [s_kv, 1, d_qk=96] or [pages, page_size, 1, d_qk=96], got "
        "float16 [9, 1, 96]",
    ),
    (
        sparse,
        {"kv": t(9, 2, 96, dtype=BF16)},
        "kv: expected bfloat16 [s_kv, 1, d_qk=96] or [pages, page_size, 1, d_qk=96], got "
        "bfloat16 [9, 2, 96]",
    ),
    (
        sparse,
        {"kv": t(9, 8, 2, 96, dtype=BF16)},
        "kv: expected bfloat16 [s_kv, 1, d_qk=96] or [pages, page_size, 1, d_qk=96], got "
        "bfloat16 [9, 8, 2, 96]",
    ),
    (sparse, {"kv": t(9, 0, 1, 96, dtype=BF16)}, "kv: expected page_size >= 1, got 0"),
    (
        sparse,
        {"kv": t(9, 1, 96, dtype=UINT8)},
        "kv: expected uint8 or int8 or float8_e4m3fn [pages, page_size, 1, 584], got uint8 "
        "[9, 1, 96]",
    ),
    (
        sparse,
        {"q": t(2, 3, 576, dtype=BF16), "kv": i32(9, 8, 1, 656)},
        "kv: expected uint8 or int8 or float8_e4m3fn [pages, page_size, 1, 656], got int32 "
        "[9, 8, 1, 656]",
    ),
    (
        sparse,
        {"kv": t(9, 8, 1, 656, dtype=UINT8)},
        "q: expected d_qk 576 (656-byte rows) or 512 (584-byte rows) with an 8-bit kv, got 96",
    ),
    (
        sparse,
        {"q": t(2, 3, 576, dtype=BF16), "kv": t(9, 8, 1, 584, dtype=UINT8)},
        "kv: expected uint8 or int8 or float8_e4m3fn [pages, page_size, 1, 656], got uint8 "
        "[9, 8, 1, 584]",
    ),
    (
        sparse,
        {"q": t(2, 3, 576, dtype=BF16), "kv": t(9, 8, 1, 656, dtype=UINT8)},
        "d_v: expected 512 with an 8-bit kv, got 64",
    ),
    (
        sparse,
        {"indices": i32(2, 2, 5)},
        "indices: expected int32 [s_q=2, 1, topk], got int32 [2, 2, 5]",
    ),
    (sparse, {"sm_scale": float("inf")}, "sm_scale: expected a finite number, got inf"),
    (sparse, {"d_v": 97}, "d_v: expected 1 to d_qk, got 97"),
    (sparse, {"d_v": 0}, "d_v: expected 1 to d_qk, got 0"),
    (
        sparse,
        {"attn_sink": t(3, dtype=BF16)},
        "attn_sink: expected float32 [h_q=3], got bfloat16 [3]",
    ),
    (sparse, {"topk_length": i32(3)}, "topk_length: expected int32 [s_q=2], got int32 [3]"),
    (
        sparse,
        {"out": (t(2, 3, 64, dtype=FP16), t(2, 3), t(2, 3))},
        "out: expected bfloat16 [s_q=2, h_q=3, d_v=64], got float16 [2, 3, 64]",
    ),
    (
        sparse,
        {"out": (t(2, 3, 64, dtype=BF16), t(3, 2), t(2, 3))},
        "out max_logits: expected float32 [s_q=2, h_q=3], got float32 [3, 2]",
    ),
    (
        sparse,
        {"out": (t(2, 3, 64, dtype=BF16), t(2, 3), t(2, 3, dtype=BF16))},
        "out lse: expected float32 [s_q=2, h_q=3], got bfloat16 [2, 3]",
    ),
    (
        sparse,
        {"workspace": t(64)},
        "workspace: expected uint8 [bytes], got float32 [64]",
    ),
    (
        sparse,
        {"workspace": t(64, dtype=UINT8)[1:]},
        "workspace: expected a 16-byte aligned tensor (address mod 16 = 0), got 1",
    ),
    (
        sparse,
        {"workspace": t(1, dtype=UINT8).expand(64)},
        "workspace: expected contiguous bytes, got strides [0]",
    ),
    # flash_mla_with_kvcache
    (decode, {"q": None}, "q: expected a tensor, got None"),
    (
        decode,
        {"k_cache": None},
        "k_cache: expected bfloat16 [pages, page_size, 1, d_qk=576], got None",
    ),
    (
        decode,
        {"indices": None},
        "indices, block_table: expected one of them (sparse or dense), got None",
    ),
    (
        decode,
        {"out": [t(2, 1, 3, 512, dtype=BF16)]},
        "out: expected a tensor or the tuple (out, lse), got a list of 1",
    ),
    (
        decode,
        {"out": t(2, 1, 3, 512, dtype=FP16)},
        "out: expected bfloat16 [b=2, s_q=1, h_q=3, d_v=512], got float16 [2, 1, 3, 512]",
    ),
    (
        decode,
        {"q": t(2, 3, 576, dtype=BF16)},
        "q: expected bfloat16 or float16 [b, s_q, h_q, d_qk], got bfloat16 [2, 3, 576]",
    ),
    (decode, {"q": t(2, 1, 0, 576, dtype=BF16)}, "q: expected h_q >= 1, got 0"),
    (
        decode,
        {"k_cache": t(4, 8, 1, 512, dtype=BF16)},
        "k_cache: expected bfloat16 [pages, page_size, 1, d_qk=576], got bfloat16 [4, 8, 1, 512]",
    ),
    (
        decode,
        {"k_cache": t(4, 8, 1, 576, dtype=UINT8)},
        "k_cache: expected uint8 or int8 or float8_e4m3fn [pages, page_size, 1, 656], "
        "got uint8 [4, 8, 1, 576]",
    ),
    (
        decode,
        {"k_cache": t(4, 0, 1, 576, dtype=BF16)},
        "k_cache: expected page_size >= 1, got 0",
    ),
    (
        decode_two,
        {"extra_k_cache": t(3, 6, 1, 656, dtype=UINT8)},
        "extra_k_cache: expected bfloat16 [extra_pages, extra_page_size, 1, d_qk=576], "
        "got uint8 [3, 6, 1, 656]",
    ),
    (
        decode_two,
        {"extra_k_cache": t(3, 0, 1, 576, dtype=BF16)},
        "extra_k_cache: expected page_size >= 1, got 0",
    ),
    (
        decode_v32,
        {"q": t(2, 1, 3, 640, dtype=BF16)},
        "q: expected d_qk 576 (656-byte rows) or 512 (584-byte rows) with an FP8 k_cache, got 640",
    ),
    (
        decode_v32,
        {"k_cache": t(4, 8, 1, 584, dtype=UINT8)},
        "k_cache: expected uint8 or int8 or float8_e4m3fn [pages, page_size, 1, 656], "
        "got uint8 [4, 8, 1, 584]",
    ),
    (
        decode_v32,
        {"k_cache": t(4, 8, 1, 656, dtype=BF16)},
        "k_cache: expected uint8 or int8 or float8_e4m3fn [pages, page_size, 1, 656], "
        "got bfloat16 [4, 8, 1, 656]",
    ),
    (
        decode_v4,
        {"k_cache": t(4, 8, 1, 656, dtype=UINT8)},
        "k_cache: expected uint8 or int8 or float8_e4m3fn [pages, page_size, 1, 584], "
        "got uint8 [4, 8, 1, 656]",
    ),
    (
        decode_v32,
        {"k_cache": t(4, 0, 1, 656, dtype=UINT8)},
        "k_cache: expected page_size >= 1, got 0",
    ),
    (
        decode_v4,
        {"k_cache": t(4, 8, 1, 1168, dtype=UINT8)[..., :584]},
        "k_cache: expected tokens of a page back to back (stride(1) equal to the last size), "
        "got stride(1) = 1168",
    ),
    (
        decode_v4,
        {"k_cache": t(4, 4674, dtype=UINT8).as_strided((4, 8, 1, 584), (4674, 584, 584, 1))},
        "k_cache: expected a page stride that is a multiple of 4 bytes, got 4674",
    ),
    (
        decode_v32,
        {"extra_k_cache": t(3, 6, 1, 584, dtype=UINT8)},
        "extra_k_cache: expected uint8 or int8 or float8_e4m3fn "
        "[extra_pages, extra_page_size, 1, 656], got uint8 [3, 6, 1, 584]",
    ),
    (decode_v32, {"head_dim_v": 448}, "head_dim_v: expected 512 with an FP8 k_cache, got 448"),
    (
        decode,
        {"softmax_scale": -float("inf")},
        "softmax_scale: expected a finite number, got -inf",
    ),
    (decode, {"head_dim_v": 577}, "head_dim_v: expected 1 to d_qk, got 577"),
    (decode, {"head_dim_v": -1}, "head_dim_v: expected 1 to d_qk, got -1"),
    (decode, {"causal": True}, "causal: expected False with indices, got True"),
    (
        decode,
        {"indices": i32(2, 5)},
        "indices: expected int32 [b=2, s_q=1, topk], got int32 [2, 5]",
    ),
    (
        decode,
        {"topk_length": i32(1)},
        "topk_length: expected int32 [b=2] or [b=2, s_q=1], got int32 [1]",
    ),
    (
        decode,
        {"extra_indices_in_kvcache": i32(2, 1, 4)},
        "extra_indices_in_kvcache: expected None without extra_k_cache, got int32 [2, 1, 4]",
    ),
    (
        decode,
        {"extra_topk_length": i32(2)},
        "extra_topk_length: expected None without extra_k_cache, got int32 [2]",
    ),
    (
        decode_two,
        {"extra_indices_in_kvcache": None},
        "extra_indices_in_kvcache: expected int32 [b=2, s_q=1, extra_topk], got None",
    ),
    (
        decode_two,
        {"extra_topk_length": i32(2, 2)},
        "extra_topk_length: expected int32 [b=2] or [b=2, s_q=1], got int32 [2, 2]",
    ),
    (
        dense,
        {"extra_k_cache": t(3, 6, 1, 576, dtype=BF16)},
        "extra_k_cache: expected None in dense mode (indices=None), got bfloat16 [3, 6, 1, 576]",
    ),
    (
        dense,
        {"extra_indices_in_kvcache": i32(2, 1, 4)},
        "extra_indices_in_kvcache: expected None in dense mode (indices=None), got int32 [2, 1, 4]",
    ),
    (
        dense,
        {"topk_length": i32(2)},
        "topk_length: expected None in dense mode (indices=None), got int32 [2]",
    ),
    (
        dense,
        {"extra_topk_length": i32(2)},
        "extra_topk_length: expected None in dense mode (indices=None), got int32 [2]",
    ),
    (
        dense,
        {"block_table": None},
        "indices, block_table: expected one of them (sparse or dense), got None",
    ),
    (dense, {"block_table": i32(3, 7)}, "block_table: expected int32 [b=2, P], got int32 [3, 7]"),
    (
        dense,
        {"cache_seqlens": i32(3)},
        "cache_seqlens: expected int32 [b=2], got int32 [3]",
    ),
    (dense, {"attn_sink": t(4)}, "attn_sink: expected float32 [h_q=3], got float32 [4]"),
    (
        dense,
        {"out": (t(2, 1, 3, 576, dtype=BF16), t(2, 3, 1))},
        "out: expected bfloat16 [b=2, s_q=1, h_q=3, d_v=512], got bfloat16 [2, 1, 3, 576]",
    ),
    (
        dense,
        {"out": (t(2, 1, 3, 512, dtype=BF16), t(2, 1, 3))},
        "out lse: expected float32 [b=2, h_q=3, s_q=1], got float32 [2, 1, 3]",
    ),
    (
        decode,
        {"workspace": t(64)},
        "workspace: expected uint8 [bytes], got float32 [64]",
    ),
    (
        decode,
        {"workspace": t(4, 16, dtype=UINT8)},
        "workspace: expected uint8 [bytes], got uint8 [4, 16]",
    ),
    (
        decode,
        {"workspace": t(64, dtype=UINT8)[1:]},
        "workspace: expected a 16-byte aligned tensor (address mod 16 = 0), got 1",
    ),
    (
        decode,
        {"workspace": t(1, dtype=UINT8).expand(64)},
        "workspace: expected contiguous bytes, got strides [0]",
    ),
    # merge_attn_states
    (
        merge_states,
        {"outs": i32(2, 5, 3, 8)},
        "outs: expected float32 or bfloat16 or float16 [n, ..., h, d], got int32 [2, 5, 3, 8]",
    ),
    (
        merge_states,
        {"outs": t(2, 8)},
        "outs: expected float32 or bfloat16 or float16 [n, ..., h, d], got float32 [2, 8]",
    ),
    (merge_states, {"outs": None}, "outs: expected a tensor, got None"),
    (merge_states, {"outs": [t(5, 3, 8), None]}, "outs: expected a tensor, got None"),
    (merge_states, {"outs": []}, "outs: expected tensors of one shape, got none"),
    (
        merge_states,
        {"outs": [t(5, 3, 8), t(5, 4, 8)]},
        "outs: expected tensors of one shape, got float32 [5, 3, 8], float32 [5, 4, 8]",
    ),
    (
        merge_states,
        {"lses": t(2, 5, 4)},
        "lses: expected float32 [2, 5, 3], got float32 [2, 5, 4]",
    ),
    (
        merge_states,
        {"outs": t(2, 6, 5, 3, 8), "lses": t(2, 5, 6, 3)},
        "lses: expected float32 [2, 6, 5, 3], got float32 [2, 5, 6, 3]",
    ),
    (
        merge_states,
        {"outs": t(2, 6, 5, 3, 8), "lses": t(2, 6, 5, 3, dtype=BF16)},
        "lses: expected float32 [2, 6, 5, 3], got bfloat16 [2, 6, 5, 3]",
    ),
    (
        merge_states,
        {"out": (t(5, 3, 8, dtype=BF16), t(5, 3))},
        "out: expected float32 [5, 3, 8], got bfloat16 [5, 3, 8]",
    ),
    (
        merge_states,
        {"outs": t(2, 6, 5, 3, 8), "lses": t(2, 6, 5, 3), "out": t(5, 6, 3, 8)},
        "out: expected float32 [6, 5, 3, 8], got float32 [5, 6, 3, 8]",
    ),
    (
        merge_states,
        {"out": (t(5, 3, 8), t(5, 4))},
        "out lse: expected float32 [5, 3], got float32 [5, 4]",
    ),
    (
        merge_states,
        {"out": (t(5, 3, 8),)},
        "out: expected a tensor or the tuple (out, lse), got a tuple of 1",
    ),
    (
        merge_states,
        {
            "outs": t(2, 6, 5, 3, 8),
            "lses": t(2, 6, 5, 3),
            "out": t(5, 6, 3, 8).transpose(0, 1),
        },
        "out: expected leading dimensions that view() merges into one, "
        "got [6, 5, 3, 8] with strides [24, 144, 8, 1]",
    ),
    (
        merge_states,
        {
            "outs": t(2, 6, 5, 3, 8),
            "lses": t(2, 6, 5, 3),
            "out": (t(6, 5, 3, 8), t(5, 6, 3).transpose(0, 1)),
        },
        "out lse: expected leading dimensions that view() merges into one, "
        "got [6, 5, 3] with strides [3, 18, 1]",
    ),
    # hadamard_transform
    (
        hadamard,
        {"x": t(4, 8, dtype=torch.float64)},
        "x: expected float32, bfloat16 or float16 [..., n], got float64 [4, 8]",
    ),
    (
        hadamard,
        {"x": t()},
        "x: expected float32, bfloat16 or float16 [..., n], got float32 []",
    ),
    (
        hadamard,
        {"x": t(8, 4).t()},
        "x: expected stride 1 in the last dimension, got strides [1, 4]",
    ),
    (
        hadamard,
        {"x": t(4, 12)},
        "x: expected a last dimension that is a power of two from 1 to 32768, got 12",
    ),
    (
        hadamard,
        {"x": t(1, 65536)},
        "x: expected a last dimension that is a power of two from 1 to 32768, got 65536",
    ),
    (hadamard, {"out": t(4, 8, dtype=BF16)}, "out: expected a tensor like x, got bfloat16 [4, 8]"),
    (
        hadamard,
        {"scale": 2.0**128},  # not in fp32
        f"scale: expected a finite number, got {2**128}.000000",
    ),
    (hadamard, {"out": t(5, 8)}, "out: expected a tensor like x, got float32 [5, 8]"),
    (
        hadamard,
        {"out": t(8).expand(4, 8)},
        "out: expected elements that do not overlap, to be written, got strides [0, 1]",
    ),
    (
        hadamard,
        {"out": t(8, 4).t()},
        "out: expected stride 1 in the last dimension, got strides [1, 4]",
    ),
    (hadamard, {"x": None}, "x: expected a tensor, got None"),
    (hadamard, {"x": t(*[1] * 9)}, "x: expected at most 8 dimensions, got 9"),
    (hadamard, {"scale": float("nan")}, "scale: expected a finite number, got nan"),
    # per_token_cast_to_fp8
    (cast, {"x": None}, "x: expected a tensor, got None"),
    (cast, {"x": t(*[1] * 65)[..., None][..., 0]}, "x: expected at most 8 dimensions, got 65"),
    (cast, {"gran_k": 32}, "gran_k: expected 128, got 32"),
    (cast, {"use_packed_ue8m0": True}, "use_packed_ue8m0: expected False, got True"),
    (
        cast,
        {"out": (t(4, 200, dtype=E4M3), t(4, 2), t(4, 2))},
        "out: expected a tensor or the tuple (values, scales), got a tuple of 3",
    ),
    (
        cast,
        {"x": i32(4, 200)},
        "x: expected float32, bfloat16 or float16 [..., n], got int32 [4, 200]",
    ),
    (
        cast,
        {"x": across(t(4, 200))},
        "x: expected stride 1 in the last dimension, got strides [400, 2]",
    ),
    (
        cast,
        {"out": (t(4, 200, dtype=UINT8), t(4, 2))},
        "out values: expected float8_e4m3fn shaped like x, got uint8 [4, 200]",
    ),
    (
        cast,
        {"out": (t(4, 200, dtype=E4M3), t(4, 1))},
        "out scale: expected float32 [..., ceil(n / 128)], got float32 [4, 1]",
    ),
    # indexer_k_quant_and_cache
    (
        indexer_write,
        {"k": t(6, 32, dtype=E4M3)},
        "k: expected float32 or bfloat16 or float16 [T, D], got float8_e4m3fn [6, 32]",
    ),
    (indexer_write, {"k": t(6, 256)}, "k: expected a head dimension D from 1 to 128, got 256"),
    (
        indexer_write,
        {"kv_cache": t(5, 288, dtype=UINT8)},
        "kv_cache: expected uint8 [pages, page_size, 1, D+4=36], got uint8 [5, 288]",
    ),
    (
        indexer_write,
        {"k": None},
        "k: expected float32 or bfloat16 or float16 [T, D], got None",
    ),
    (
        indexer_write,
        {"kv_cache": None},
        "kv_cache: expected uint8 [pages, page_size, 1, D+4=36], got None",
    ),
    (
        indexer_write,
        {"kv_cache": t(1, 8, 1, 36, dtype=UINT8).expand(5, 8, 1, 36)},
        "kv_cache: expected elements that do not overlap, to be written, "
        "got strides [0, 36, 36, 1]",
    ),
    (
        indexer_write,
        {"slot_mapping": t(5, dtype=INT64)},
        "slot_mapping: expected int32 or int64 [T=6], got int64 [5]",
    ),
    (
        indexer_write,
        {"scale_fmt": "e8m0"},
        "scale_fmt: expected None, 'fp32' or 'ue8m0', got 'e8m0'",
    ),
    # gather_indexer_k_cache
    (indexer_gather, {"kv_cache": None}, "kv_cache: expected a tensor, got None"),
    (indexer_gather, {"num_tokens": -1}, "num_tokens: expected >= 0, got -1"),
    (
        indexer_gather,
        {"out": (t(10, 32, dtype=E4M3), t(10), t(10))},
        "out: expected a tensor or the tuple (keys, scales), got a tuple of 3",
    ),
    (
        indexer_gather,
        {"kv_cache": t(5, 8, 36, dtype=UINT8)},
        "kv_cache: expected uint8 [pages, page_size, 1, D+4], got uint8 [5, 8, 36]",
    ),
    (
        indexer_gather,
        {"kv_cache": t(5, 8, 1, 36, dtype=torch.int8)},
        "kv_cache: expected uint8 [pages, page_size, 1, D+4=36], got int8 [5, 8, 1, 36]",
    ),
    (
        indexer_gather,
        {"kv_cache": t(5, 8, 1, 4, dtype=UINT8)},
        "kv_cache: expected a last dimension of D + 4 bytes, D >= 1, got 4",
    ),
    (
        indexer_gather,
        {"block_table": i32(2)},
        "block_table: expected int32 [B, P], got int32 [2]",
    ),
    (
        indexer_gather,
        {"cu_seqlens": i32(2)},
        "cu_seqlens: expected int32 [B+1=3], got int32 [2]",
    ),
    (
        indexer_gather,
        {"out": (t(10, 64, dtype=E4M3), t(10))},
        "out k: expected float8_e4m3fn [num_tokens, D=32], got float8_e4m3fn [10, 64]",
    ),
    (
        indexer_gather,
        {"out": (t(10, 32, dtype=E4M3), t(9))},
        "out k_scale: expected float32 [num_tokens=10], got float32 [9]",
    ),
    # mla_kv_quant_and_cache
    (
        mla_write,
        {"kv_c": t(6, 512)},
        "kv_c: expected bfloat16 or float16 [T, d_nope], got float32 [6, 512]",
    ),
    (
        mla_write,
        {"k_pe": t(5, 64, dtype=BF16)},
        "k_pe: expected bfloat16 [T=6, d_rope], got bfloat16 [5, 64]",
    ),
    (
        mla_write,
        {"kv_c": t(6, 256, dtype=BF16)},
        "kv_c: expected d_nope 512 (656-byte rows) or 448 (584-byte rows) with a uint8 kv_cache, "
        "got 256",
    ),
    (
        mla_write,
        {"k_pe": t(6, 32, dtype=BF16)},
        "k_pe: expected d_rope 64 with a uint8 kv_cache, got 32",
    ),
    (
        mla_write,
        {"kv_cache": t(5, 8, 1, 584, dtype=UINT8)},
        "kv_cache: expected uint8 [pages, page_size, 1, 656], got uint8 [5, 8, 1, 584]",
    ),
    (
        mla_write_v4,
        {"kv_cache": t(5, 8, 1, 656, dtype=UINT8)},
        "kv_cache: expected uint8 [pages, page_size, 1, 584], got uint8 [5, 8, 1, 656]",
    ),
    (
        mla_write_16,
        {"kv_cache": t(5, 8, 1, 576, dtype=FP16)},
        "kv_cache: expected bfloat16 [pages, page_size, 1, d_nope+d_rope=576], "
        "got float16 [5, 8, 1, 576]",
    ),
    (
        mla_write,
        {"kv_cache": t(5, 8, 1, 656, dtype=torch.int8)},
        "kv_cache: expected uint8 [pages, page_size, 1, 656], got int8 [5, 8, 1, 656]",
    ),
    (mla_write, {"kv_c": None}, "kv_c: expected bfloat16 or float16 [T, d_nope], got None"),
    (
        mla_write_16,
        {"kv_cache": None},
        "kv_cache: expected bfloat16 [pages, page_size, 1, d_nope+d_rope=576], got None",
    ),
    (
        mla_write_16,
        {"kv_cache": t(5, 0, 1, 576, dtype=BF16)},
        "kv_cache: expected page_size >= 1, got 0",
    ),
    (
        mla_write_16,
        {"kv_cache": t(5 * 4608, dtype=BF16).as_strided((5, 8, 1, 576), (4032, 576, 576, 1))},
        "kv_cache: expected elements that do not overlap, to be written, "
        "got strides [4032, 576, 576, 1]",
    ),
    (
        mla_write,
        {"kv_cache": t(1, 8, 1, 656, dtype=UINT8).expand(5, 8, 1, 656)},
        "kv_cache: expected elements that do not overlap, to be written, "
        "got strides [0, 656, 656, 1]",
    ),
    (
        mla_write,
        {"slot_mapping": t(6)},
        "slot_mapping: expected int32 or int64 [T=6], got float32 [6]",
    ),
    # gather_mla_kv_cache
    (mla_gather, {"kv_cache": None}, "kv_cache: expected a tensor, got None"),
    (mla_gather_16, {"num_tokens": -1}, "num_tokens: expected >= 0, got -1"),
    (
        mla_gather,
        {"kv_cache": t(5, 8, 1, 640, dtype=UINT8)},
        "kv_cache: expected 656 or 584 bytes a token for a uint8 cache, got uint8 [5, 8, 1, 640]",
    ),
    (
        mla_gather,
        {"kv_cache": t(5, 8, 2, 656, dtype=UINT8)},
        "kv_cache: expected uint8 [pages, page_size, 1, 656], got uint8 [5, 8, 2, 656]",
    ),
    (
        mla_gather,
        {"kv_cache": t(5, 8, 2, 584, dtype=UINT8)},
        "kv_cache: expected uint8 [pages, page_size, 1, 584], got uint8 [5, 8, 2, 584]",
    ),
    (
        mla_gather_16,
        {"kv_cache": t(5, 8, 1, 576)},
        "kv_cache: expected uint8 or bfloat16 or float16 [pages, page_size, 1, d], "
        "got float32 [5, 8, 1, 576]",
    ),
    (
        mla_gather_16,
        {"kv_cache": t(5, 0, 1, 576, dtype=BF16)},
        "kv_cache: expected page_size >= 1, got 0",
    ),
    (
        mla_gather,
        {"block_table": t(2, 7)},
        "block_table: expected int32 [B, P], got float32 [2, 7]",
    ),
    (
        mla_gather,
        {"cu_seqlens": i32(4)},
        "cu_seqlens: expected int32 [B+1=3], got int32 [4]",
    ),
    (
        mla_gather,
        {"out": t(10, 576, dtype=FP16)},
        "out: expected bfloat16 [num_tokens, d=576], got float16 [10, 576]",
    ),
    (
        mla_gather_16,
        {"out": t(10, 512, dtype=BF16)},
        "out: expected bfloat16 [num_tokens, d=576], got bfloat16 [10, 512]",
    ),
]


def op_name(case) -> str:
    return FUNCTIONS[case].__name__


@pytest.mark.parametrize(
    ("case", "wrong", "message"),
    WRONG,
    ids=[f"{case.__name__}-{message}" for case, _, message in WRONG],
)
def test_wrong_argument(case, wrong, message):
    with pytest.raises(ValueError) as error:
        FUNCTIONS[case](**case() | wrong)
    assert str(error.value) == f"{op_name(case)}: {message}"


def test_wrong_schedule_output():
    """The one output that the front end always allocates itself."""
    with pytest.raises(ValueError) as error:
        torch.ops.dsa_ext.get_paged_mqa_logits_metadata(i32(2), 64, 8, None, i32(8, 2))
    assert str(error.value) == (
        "get_paged_mqa_logits_metadata: out: expected int32 [num_sms+1=9, 2], got int32 [8, 2]"
    )


OTHER_DTYPES = [
    torch.float64,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e8m0fnu,
    torch.float4_e2m1fn_x2,
    torch.int16,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.bool,
]


@pytest.mark.parametrize("dtype", OTHER_DTYPES, ids=str)
def test_dtypes_that_no_op_takes_are_named(dtype):
    q = torch.empty(2, 4, 32, dtype=dtype)
    with pytest.raises(ValueError) as error:
        dsa_ext.fp8_mqa_logits(**logits() | {"q": q, "out": t(2, 6)})
    name = str(dtype).removeprefix("torch.")
    assert str(error.value) == (
        f"fp8_mqa_logits: q: expected float8_e4m3fn [S, H, D], got {name} [2, 4, 32]"
    )


def test_none_for_every_tensor_of_an_op():
    """An undefined tensor where a tensor is required: the validator's message, from any place."""
    for name in ("q", "k", "k_scale", "weights", "k_start", "k_end", "out"):
        call = {
            **{"q": t(2, 4, 32, dtype=E4M3), "k": t(6, 32, dtype=E4M3), "k_scale": t(6)},
            **{"weights": t(2, 4), "k_start": i32(2), "k_end": i32(2), "clean_logits": True},
            **{"max_seqlen_k": 0, "out": t(2, 6)},
        }
        with pytest.raises(ValueError, match=r"^fp8_mqa_logits: [\w\[\]]+: expected .*, got None$"):
            torch.ops.dsa_ext.fp8_mqa_logits(**call | {name: None})


def test_every_argument_that_is_checked_is_in_the_table():
    """Names quoted in validate.cpp, so that a new check cannot be forgotten here."""
    source = Path(__file__).parents[2] / "csrc" / "dispatch" / "validate.cpp"
    text = re.sub(r'c\.dim\("[^"]*"\)', "", source.read_text())
    name = r'"((?:out )?[\w\[\]]+)"'
    named = set(re.findall(r"c\.(?:tensor|optional|absent)\(\s*" + name, text))
    named |= set(re.findall(r'c\.that\([^"]*?,\s*' + name + r",\s", text))
    calls = r"(?:like_rows|rows_of_values|topk_outputs|finite|fp8_mla_cache)"
    named |= set(re.findall(calls + r"\(c,\s*" + name, text))
    assert len(named) > 40
    tested = {message.split(":")[0] for _, _, message in WRONG}
    assert named - tested == set()


MIXED = ["cuda"] if torch.cuda.is_available() else []


@pytest.mark.gpu
@pytest.mark.parametrize("other", MIXED)
def test_tensors_of_two_devices(other):
    with pytest.raises(ValueError) as error:
        dsa_ext.fp8_mqa_logits(**logits() | {"weights": t(2, 4).to(other)})
    assert str(error.value) == (
        "fp8_mqa_logits: weights: expected a tensor on cpu, got one on cuda:0"
    )
    with pytest.raises(ValueError) as error:
        dsa_ext.hadamard_transform(t(4, 8), out=t(4, 8).to(other))
    assert str(error.value) == (
        "hadamard_transform: out: expected a tensor on the device of x, got cuda:0"
    )


# ---- valid arguments that no kernel takes --------------------------------------------------------


def unsupported(op: str, reason: str, note: str = "", only: str | None = None) -> str:
    """The message of a call with CPU tensors: every candidate, in order, with its reason."""
    reasons = [
        f"{k['id']}: " + (reason if k["device"] == "cpu" else "takes cuda tensors, not cpu")
        for k in _C.kernels()
        if k["op"] == op and only in (None, k["id"])
    ]
    return f"{op}: no kernel of this build takes these arguments ({note}{'; '.join(reasons)})"


D48 = "index_head_dim 32, 64 or 128, not 48"
UNSUPPORTED = [
    (logits, {"q": t(2, 4, 48, dtype=E4M3), "kv": (t(6, 48, dtype=E4M3), t(6))}, D48),
    (topk, {"q": t(2, 4, 48, dtype=E4M3), "kv": (t(6, 48, dtype=E4M3), t(6))}, D48),
    (
        paged_logits,
        {"q": t(2, 3, 4, 48, dtype=E4M3), "kv_cache": t(5, 8, 1, 52, dtype=UINT8)},
        D48,
    ),
    (
        paged_topk,
        {"q": t(2, 3, 4, 48, dtype=E4M3), "kv_cache": t(5, 8, 1, 52, dtype=UINT8)},
        D48,
    ),
    (sparse, {"d_v": 96}, "d_v a multiple of 64 up to 512, not 96"),
    (
        sparse,
        {"q": t(2, 3, 640, dtype=BF16), "kv": t(9, 1, 640, dtype=BF16), "d_v": 576},
        "d_v a multiple of 64 up to 512, not 576",
    ),
    (
        sparse,
        {"q": t(2, 3, 80, dtype=BF16), "kv": t(9, 1, 80, dtype=BF16)},
        "d_qk - d_v 0, 32 or 64, not 16",
    ),
    (decode, {"head_dim_v": 500}, "d_v a multiple of 64 up to 512, not 500"),
    (dense, {"head_dim_v": 448}, "d_qk - d_v 0, 32 or 64, not 128"),
]


@pytest.mark.parametrize(
    ("case", "wrong", "reason"),
    UNSUPPORTED,
    ids=[f"{case.__name__}-{reason}" for case, _, reason in UNSUPPORTED],
)
def test_unsupported(case, wrong, reason):
    with pytest.raises(RuntimeError) as error:
        FUNCTIONS[case](**case() | wrong)
    assert type(error.value) is RuntimeError
    assert str(error.value) == unsupported(op_name(case), reason)


# ---- DSA_FORCE_KERNEL and DSA_LOG ----------------------------------------------------------------


def test_force_a_kernel_of_this_op(monkeypatch, capfd):
    monkeypatch.setenv("DSA_LOG", "1")
    monkeypatch.setenv("DSA_FORCE_KERNEL", "cpu_mqa_logits")
    dsa_ext.fp8_mqa_logits(**logits())
    assert capfd.readouterr().err == "dsa_ext: fp8_mqa_logits -> cpu_mqa_logits\n"


def test_force_kernels_of_several_ops(monkeypatch):
    """A list; ids of other ops do not disturb this one."""
    monkeypatch.setenv("DSA_FORCE_KERNEL", "cpu_topk_select,cpu_mqa_logits,")
    dsa_ext.fp8_mqa_logits(**logits())
    dsa_ext.topk_select(**select())
    dsa_ext.hadamard_transform(**hadamard())


@pytest.mark.parametrize("ids", ["no_such_kernel", "cpu_mqa_logits,no_such_kernel"])
def test_force_an_unknown_kernel(monkeypatch, ids):
    monkeypatch.setenv("DSA_FORCE_KERNEL", ids)
    with pytest.raises(RuntimeError) as error:
        dsa_ext.fp8_mqa_logits(**logits())
    assert str(error.value) == (
        "DSA_FORCE_KERNEL: expected kernel ids of this build (python -m dsa_ext lists them), "
        "got no_such_kernel"
    )


def test_a_forced_kernel_is_not_replaced(monkeypatch):
    monkeypatch.setenv("DSA_FORCE_KERNEL", "cpu_sparse_fwd")
    with pytest.raises(RuntimeError) as error:
        dsa_ext.flash_mla_sparse_fwd(**sparse() | {"d_v": 96})
    assert str(error.value) == unsupported(
        "flash_mla_sparse_fwd",
        "d_v a multiple of 64 up to 512, not 96",
        "DSA_FORCE_KERNEL is set; ",
        only="cpu_sparse_fwd",
    )


def test_wrong_arguments_come_before_the_choice_of_a_kernel(monkeypatch):
    monkeypatch.setenv("DSA_FORCE_KERNEL", "no_such_kernel")
    with pytest.raises(ValueError, match=r"^topk_select: k: "):
        dsa_ext.topk_select(t(4, 9), 0)


@pytest.mark.parametrize("value", ["0", "", None])
def test_no_log_unless_asked_for(monkeypatch, capfd, value):
    if value is not None:
        monkeypatch.setenv("DSA_LOG", value)
    dsa_ext.fp8_mqa_logits(**logits())
    captured = capfd.readouterr()
    assert captured.err == ""
    assert captured.out == ""


@pytest.mark.parametrize("case", FUNCTIONS, ids=lambda case: case.__name__)
def test_log_names_the_kernel(monkeypatch, capfd, case):
    monkeypatch.setenv("DSA_LOG", "1")
    FUNCTIONS[case](**case())
    op = op_name(case).replace("fp8_fp4_", "fp8_")  # other names of the same ops
    cpu = [k["id"] for k in _C.kernels() if k["op"] == op and k["device"] == "cpu"]
    assert capfd.readouterr().err == f"dsa_ext: {op} -> {cpu[0]}\n"

# SPDX-License-Identifier: Apache-2.0
"""The oracle: every op of dsa_ext in plain, differentiable PyTorch, fp32 or fp64, on any device.

It shares no code with the backends and judges all of them. Functions have the names, signatures and
defaults of `dsa_ext`, without `out=`; inputs may also be fp32 or fp64, and whatever is computed is
computed in fp64 if an input is fp64, else in fp32. Nothing here avoids host synchronisation.
"""

from .attention import flash_mla_sparse_fwd, flash_mla_with_kvcache, merge_attn_states
from .cache import (
    dequantize_indexer_k_cache,
    dequantize_mla_kv_cache,
    gather_indexer_k_cache,
    gather_mla_kv_cache,
    indexer_k_quant_and_cache,
    mla_kv_quant_and_cache,
)
from .indexer import (
    fp8_mqa_logits,
    fp8_mqa_topk,
    fp8_paged_mqa_logits,
    fp8_paged_mqa_topk,
    get_paged_mqa_logits_metadata,
)
from .quant import e4m3_decode, e4m3_encode, hadamard_transform, per_token_cast_to_fp8
from .topk import map_to_slots, merge_topk, topk_select
from .training import attention_target, indexer_kl_loss, sparse_mla_attention

__all__ = [
    "attention_target",
    "dequantize_indexer_k_cache",
    "dequantize_mla_kv_cache",
    "e4m3_decode",
    "e4m3_encode",
    "flash_mla_sparse_fwd",
    "flash_mla_with_kvcache",
    "fp8_mqa_logits",
    "fp8_mqa_topk",
    "fp8_paged_mqa_logits",
    "fp8_paged_mqa_topk",
    "gather_indexer_k_cache",
    "gather_mla_kv_cache",
    "get_paged_mqa_logits_metadata",
    "hadamard_transform",
    "indexer_k_quant_and_cache",
    "indexer_kl_loss",
    "map_to_slots",
    "merge_attn_states",
    "merge_topk",
    "mla_kv_quant_and_cache",
    "per_token_cast_to_fp8",
    "sparse_mla_attention",
    "topk_select",
]

# SPDX-License-Identifier: Apache-2.0
"""DeepSeek Sparse Attention (DSA) for PyTorch.

An FP8 lightning indexer scores every earlier token for a query, an exact top-k keeps the best of
them, and sparse attention runs over just those rows of the paged MLA latent cache. The functions
carry the names and positional signatures of FlashMLA and DeepGEMM where those have one, so that
``import dsa_ext as flash_mla`` or ``import dsa_ext as deep_gemm`` works.

``dsa_ext.reference`` holds every op in plain PyTorch, ``dsa_ext.nn`` modules built on the ops.
"""

from dsa_ext import nn, reference
from dsa_ext._C import MAX_WORKSPACE_BYTES, build_info
from dsa_ext.attention import (
    FlashMLASchedMeta,
    flash_mla_sparse_fwd,
    flash_mla_with_kvcache,
    get_mla_metadata,
    merge_attn_states,
)
from dsa_ext.cache import (
    gather_indexer_k_cache,
    gather_mla_kv_cache,
    indexer_k_quant_and_cache,
    mla_kv_quant_and_cache,
)
from dsa_ext.indexer import (
    fp8_fp4_mqa_logits,
    fp8_fp4_paged_mqa_logits,
    fp8_mqa_logits,
    fp8_mqa_topk,
    fp8_paged_mqa_logits,
    fp8_paged_mqa_topk,
    get_num_sms,
    get_paged_mqa_logits_metadata,
    set_num_sms,
)
from dsa_ext.quant import hadamard_transform, per_token_cast_to_fp8
from dsa_ext.topk import map_to_slots, merge_topk, topk_select

__version__ = build_info()["version"]

__all__ = [
    "MAX_WORKSPACE_BYTES",
    "FlashMLASchedMeta",
    "__version__",
    "build_info",
    "flash_mla_sparse_fwd",
    "flash_mla_with_kvcache",
    "fp8_fp4_mqa_logits",
    "fp8_fp4_paged_mqa_logits",
    "fp8_mqa_logits",
    "fp8_mqa_topk",
    "fp8_paged_mqa_logits",
    "fp8_paged_mqa_topk",
    "gather_indexer_k_cache",
    "gather_mla_kv_cache",
    "get_mla_metadata",
    "get_num_sms",
    "get_paged_mqa_logits_metadata",
    "hadamard_transform",
    "indexer_k_quant_and_cache",
    "map_to_slots",
    "merge_attn_states",
    "merge_topk",
    "mla_kv_quant_and_cache",
    "nn",
    "per_token_cast_to_fp8",
    "reference",
    "set_num_sms",
    "topk_select",
]

# SPDX-License-Identifier: Apache-2.0
"""Modules: a DSA layer that trains in plain PyTorch and serves from a paged FP8 cache."""

from dsa_ext.nn.attention import AttentionOutput, DSAttention, top_k_mask
from dsa_ext.nn.config import DSAConfig
from dsa_ext.nn.indexer import Indexer
from dsa_ext.nn.paged_cache import CacheFullError, CacheStep, LayerPages, PagedCache
from dsa_ext.nn.rope import apply_rope, rope_angles, rope_frequencies

__all__ = [
    "AttentionOutput",
    "CacheFullError",
    "CacheStep",
    "DSAConfig",
    "DSAttention",
    "Indexer",
    "LayerPages",
    "PagedCache",
    "apply_rope",
    "rope_angles",
    "rope_frequencies",
    "top_k_mask",
]

# SPDX-License-Identifier: Apache-2.0
"""Serving through the paged FP8 cache and the compiled ops."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from demo.model import ByteLM
from dsa_ext.nn import PagedCache

PAGE_SIZE = 64


@dataclass(frozen=True)
class Served:
    logits: Tensor  # [B, S, VOCAB]
    rate: float  # tokens/s


def new_cache(model: ByteLM, requests: list[int], length: int) -> PagedCache:
    """An FP8 cache with just enough pages for the requests, all opened."""
    pages = len(requests) * -(-length // PAGE_SIZE)
    cache = PagedCache(
        model.config,
        len(model.layers),
        pages,
        page_size=PAGE_SIZE,
        layout="v32_fp8",
        device=model.embed.weight.device,
    )
    for request in requests:
        cache.allocate(request)
    return cache


def serve(model: ByteLM, tokens: Tensor, chunk: int, title: str) -> Served:
    """Feed tokens [B, S] of B requests in chunks: 1 is decode, more is chunked prefill."""
    requests = list(range(len(tokens)))
    cache = new_cache(model, requests, tokens.shape[1])
    logits = []
    start = time.perf_counter()
    for part in tqdm(torch.split(tokens, chunk, dim=1), desc=f"{title:<24}", unit="step", ncols=96):
        logits.append(model.forward_cached(part, cache, cache.append(requests, part.shape[1])))
    result = torch.cat(logits, dim=1)
    if result.is_cuda:
        torch.cuda.synchronize()
    return Served(result, tokens.numel() / (time.perf_counter() - start))


def generate(model: ByteLM, prompt: Tensor, count: int, temperature: float, seed: int) -> bytes:
    """Continue prompt [S]: one prefill, then sample and decode ``count`` bytes."""
    generator = torch.Generator().manual_seed(seed)
    cache = new_cache(model, [0], len(prompt) + count)
    fed = prompt.unsqueeze(0)
    produced = bytearray()
    for _ in range(count):
        logits = model.forward_cached(fed, cache, cache.append([0], fed.shape[1]))[0, -1].cpu()
        drawn = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        produced += bytes(drawn.tolist())
        fed = drawn.unsqueeze(0).to(prompt.device)
    return bytes(produced)

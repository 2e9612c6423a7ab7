# SPDX-License-Identifier: Apache-2.0
"""Pages of latent rows and indexer keys, shared by the requests of a server."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from dsa_ext import _C
from dsa_ext.indexer import get_paged_mqa_logits_metadata
from dsa_ext.nn.config import DSAConfig

Layout = Literal["v32_fp8", "v4_fp8", "bf16"]

_FP8_LAYOUTS = {"v32_fp8": _C.MLA_V32, "v4_fp8": _C.MLA_V4}


class CacheFullError(RuntimeError):
    """The pool has too few free pages for an append; nothing was changed."""


@dataclass(frozen=True)
class LayerPages:
    """The two caches of one layer. Both are indexed by the same block table."""

    latent: Tensor  # uint8 [pages, page_size, 1, 656 | 584] or bf16 [pages, page_size, 1, latent]
    index_keys: Tensor  # uint8 [pages, page_size, 1, index_head_dim + 4]

    @property
    def page_size(self) -> int:
        """Tokens a page."""
        return self.latent.shape[1]

    @property
    def is_fp8(self) -> bool:
        """Whether the latent rows are FP8 with scales (else bf16)."""
        return self.latent.dtype == torch.uint8


@dataclass(frozen=True)
class CacheStep:
    """Where the S new tokens of B requests go and what they may read; one for all layers."""

    slot_mapping: Tensor  # int64 [B * S]
    positions: Tensor  # int64 [B, S]
    block_table: Tensor  # int32 [B, P], padded with -1
    context_lens: Tensor  # int32 [B], the new tokens included
    visible_lens: Tensor  # int32 [B, S], tokens each new one sees, itself included
    max_context_len: int
    schedule: Tensor  # of fp8_paged_mqa_logits


class PagedCache:
    """A fixed pool of pages and, for each request, the list of pages it holds.

    ``append`` grows a request by whole pages as needed; ``free`` gives them back. Pages are handed
    out again as they are: no reader looks past a request's length.
    """

    def __init__(
        self,
        config: DSAConfig,
        n_layers: int,
        n_pages: int,
        *,
        page_size: int = 64,
        layout: Layout = "v32_fp8",
        device: torch.device | str = "cpu",
    ) -> None:
        if layout not in get_args(Layout):
            raise ValueError(
                f"PagedCache: layout: expected one of {', '.join(get_args(Layout))}, got {layout!r}"
            )
        for name, count in (("n_layers", n_layers), ("n_pages", n_pages), ("page_size", page_size)):
            if count < 1:
                raise ValueError(f"PagedCache: {name}: expected at least 1, got {count}")
        self.layout = layout
        self.page_size = page_size
        self.n_pages = n_pages
        self.device = torch.device(device)
        index_row = config.index_head_dim + _C.INDEXER_SCALE_BYTES
        self.layers = [
            LayerPages(
                latent=self._latent_pages(config),
                index_keys=torch.zeros(
                    n_pages, page_size, 1, index_row, dtype=torch.uint8, device=self.device
                ),
            )
            for _ in range(n_layers)
        ]
        first = self.layers[0].latent
        self.latent_bytes_per_token = first.shape[-1] * first.element_size()
        self.index_bytes_per_token = index_row
        self._free_pages = list(range(n_pages - 1, -1, -1))
        self._pages: dict[Hashable, list[int]] = {}
        self._lengths: dict[Hashable, int] = {}
        self._num_sms = (
            torch.cuda.get_device_properties(self.device).multi_processor_count
            if self.device.type == "cuda"
            else torch.get_num_threads()
        )

    def _latent_pages(self, config: DSAConfig) -> Tensor:
        if self.layout == "bf16":
            shape = (self.n_pages, self.page_size, 1, config.latent_dim)
            return torch.zeros(shape, dtype=torch.bfloat16, device=self.device)
        fp8 = _FP8_LAYOUTS[self.layout]
        if (config.kv_lora_rank, config.qk_rope_head_dim) != (fp8["d_nope"], fp8["d_rope"]):
            raise ValueError(
                f"PagedCache: layout: expected kv_lora_rank {fp8['d_nope']} and qk_rope_head_dim "
                f"{fp8['d_rope']} for {self.layout!r}, got {config.kv_lora_rank} and "
                f"{config.qk_rope_head_dim}"
            )
        used = page_stride = self.page_size * fp8["token_bytes"]
        if self.layout == "v4_fp8":
            align = _C.MLA_V4_PAGE_STRIDE_ALIGN
            page_stride = -(-used // align) * align
        pool = torch.zeros(self.n_pages, page_stride, dtype=torch.uint8, device=self.device)
        return pool[:, :used].view(self.n_pages, self.page_size, 1, fp8["token_bytes"])

    @property
    def free_pages(self) -> int:
        """Pages no request holds."""
        return len(self._free_pages)

    def length(self, request: Hashable) -> int:
        """Tokens cached for a request."""
        self._pages_of(request)
        return self._lengths[request]

    def allocate(self, request: Hashable) -> None:
        """Open an empty request. It holds no page until its first token comes."""
        if request in self._pages:
            raise ValueError(f"PagedCache: request {request!r} is already allocated")
        self._pages[request] = []
        self._lengths[request] = 0

    def free(self, request: Hashable) -> None:
        """Close a request and return its pages to the pool."""
        self._free_pages += reversed(self._pages_of(request))
        del self._pages[request], self._lengths[request]

    def append(self, requests: Sequence[Hashable], n_tokens: int) -> CacheStep:
        """Make room for ``n_tokens`` more tokens in each request and say where they go."""
        requests = _listed(requests)
        if n_tokens < 1 or not requests or len(set(requests)) != len(requests):
            raise ValueError(
                f"PagedCache: append: expected distinct requests and n_tokens >= 1, "
                f"got {requests!r} and {n_tokens}"
            )
        needed = {}
        for request in requests:
            length = self.length(request) + n_tokens
            needed[request] = -(-length // self.page_size) - len(self._pages[request])
        if sum(needed.values()) > len(self._free_pages):
            raise CacheFullError(
                f"PagedCache: append needs {sum(needed.values())} pages, "
                f"{len(self._free_pages)} of {self.n_pages} are free"
            )
        for request, count in needed.items():
            self._pages[request] += [self._free_pages.pop() for _ in range(count)]
            self._lengths[request] += n_tokens

        block_table = self.block_table(requests)
        context_lens = self.context_lens(requests)
        new = torch.arange(n_tokens, device=self.device)
        positions = context_lens.long().unsqueeze(1) - n_tokens + new  # [B, S]
        page = block_table.long().gather(1, positions // self.page_size)
        slots = page * self.page_size + positions % self.page_size
        visible_lens = (positions + 1).int()
        return CacheStep(
            slot_mapping=slots.flatten(),
            positions=positions,
            block_table=block_table,
            context_lens=context_lens,
            visible_lens=visible_lens,
            max_context_len=max(self._lengths[request] for request in requests),
            schedule=get_paged_mqa_logits_metadata(visible_lens, self.page_size, self._num_sms),
        )

    def block_table(self, requests: Sequence[Hashable]) -> Tensor:
        """Pages of each request, int32 [B, most pages of a request], padded with -1."""
        rows = [self._pages_of(request) for request in _listed(requests)]
        width = max(map(len, rows), default=0)
        padded = [row + [-1] * (width - len(row)) for row in rows]
        return torch.tensor(padded, dtype=torch.int32, device=self.device)

    def context_lens(self, requests: Sequence[Hashable]) -> Tensor:
        """Cached tokens of each request, int32 [B]."""
        lengths = [self.length(request) for request in _listed(requests)]
        return torch.tensor(lengths, dtype=torch.int32, device=self.device)

    def _pages_of(self, request: Hashable) -> list[int]:
        if request not in self._pages:
            raise ValueError(f"PagedCache: request {request!r} is not allocated (or was freed)")
        return self._pages[request]


def _listed(requests: Sequence[Hashable]) -> list[Hashable]:
    """Refuse one string: its characters are no requests."""
    if isinstance(requests, (str, bytes)):
        raise ValueError(f"PagedCache: requests: expected a list of them, got {requests!r}")
    return list(requests)

# SPDX-License-Identifier: Apache-2.0
"""The libraries we compare with. All optional, imported at their first use only.

A loader raises `Unavailable` with the reason; what goes wrong inside a peer is its own row's error.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from benchmarks.case import Call
from benchmarks.inputs import PAGE

T = TypeVar("T")

_DISTRIBUTIONS = {
    "FlashMLA": ("sgl-flash-mla", "flash-mla", "flash_mla"),
    "DeepGEMM": ("sgl-deep-gemm", "deep-gemm", "deep_gemm"),
    "sgl_kernel": ("sglang-kernel", "sgl-kernel"),
    "FlashInfer": ("flashinfer-python", "flashinfer"),
}


class Unavailable(Exception):
    """The peer is not here; the message says why."""


def _once(load: Callable[[], T]) -> Callable[[], T]:
    """Load once, and remember a failure too."""

    @functools.cache
    def attempt() -> T | Unavailable:
        try:
            return load()
        except Unavailable as reason:
            return reason
        except Exception as error:
            return Unavailable(f"not loaded: {one_line(error)}")

    @functools.wraps(load)
    def loaded() -> T:
        result = attempt()
        if isinstance(result, Unavailable):
            raise result
        return result

    return loaded


def one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:160]


def _import(name: str) -> Any:
    if importlib.util.find_spec(name) is None:
        raise Unavailable("not installed")
    return importlib.import_module(name)


class FlashMla:
    """FlashMLA's Hopper kernels: all of an old build, the legacy ones of a new build."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def _options(self, function: Any) -> dict[str, bool]:
        parameters = inspect.signature(function).parameters
        return {"use_legacy": True} if "use_legacy" in parameters else {}

    def sparse_fwd(self, q: Tensor, kv: Tensor, indices: Tensor, scale: float) -> Call:
        function = self._module.flash_mla_sparse_fwd
        options = self._options(function)
        return lambda: function(q, kv, indices, scale, **options)

    def _decode(self, *args: Any, **kwargs: Any) -> Call:
        """Decoding with the schedule that the first call leaves behind."""
        function = self._module.flash_mla_with_kvcache
        schedule, _ = self._module.get_mla_metadata()
        kwargs |= self._options(function)
        return lambda: function(*args, 512, schedule, **kwargs)

    def sparse_decode(self, q: Tensor, cache: Tensor, indices: Tensor, **extra: Tensor) -> Call:
        return self._decode(q, cache, None, None, is_fp8_kvcache=True, indices=indices, **extra)

    def dense_decode(
        self, q: Tensor, cache: Tensor, table: Tensor, lens: Tensor, causal: bool = False
    ) -> Call:
        return self._decode(q, cache, table, lens, causal=causal, is_fp8_kvcache=False)


class DeepGemm:
    """DeepGEMM's indexer logits."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def mqa_logits(
        self,
        q: Tensor,
        kv: tuple[Tensor, Tensor],
        weights: Tensor,
        starts: Tensor,
        ends: Tensor,
        clean: bool,
    ) -> Callable[[], Tensor]:
        function = self._module.fp8_mqa_logits
        return lambda: function(q, kv, weights, starts, ends, clean_logits=clean)  # type: ignore[no-any-return]

    def paged_mqa_logits(
        self, q: Tensor, cache: Tensor, weights: Tensor, row_lens: Tensor, table: Tensor, n: int
    ) -> Callable[[], Tensor]:
        """Logits with a ready schedule; row_lens int32 [B, next_n]."""
        module = self._module

        def prepared(lens: Tensor) -> Callable[[], Tensor]:
            schedule = module.get_paged_mqa_logits_metadata(lens, PAGE, module.get_num_sms())
            logits = module.fp8_paged_mqa_logits
            call = functools.partial(logits, q, cache, weights, lens, table, schedule, n)
            call()
            return call

        try:
            return prepared(row_lens)
        except Exception:  # a version that takes one length a request
            return prepared(row_lens[:, -1].contiguous())


class SglKernel:
    """sgl_kernel's fast_topk: k = 2048, unordered output."""

    K = 2048

    def topk(self, scores: Tensor, lens: Tensor) -> Call:
        """The indices of the 2048 largest of scores[r, :lens[r]]."""
        indices = scores.new_empty((scores.shape[0], self.K), dtype=torch.int32)
        return lambda: torch.ops.sgl_kernel.fast_topk(scores, indices, lens, None)


class FlashInfer:
    """FlashInfer's radix top-k, unordered output."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def topk(self, scores: Tensor, k: int, lens: Tensor | None) -> Call:
        if lens is None:
            whole_rows = self._module.top_k
            return lambda: whole_rows(scores, k)
        windows = self._module.top_k_ragged_transform
        offsets = torch.zeros_like(lens)
        return lambda: windows(scores, offsets, lens, k)


@_once
def flash_mla() -> FlashMla:
    return FlashMla(_import("flash_mla"))


@_once
def deep_gemm() -> DeepGemm:
    spec = importlib.util.find_spec("deep_gemm")
    if spec is None or spec.origin is None:
        raise Unavailable("not installed")
    # The build on tvm-ffi crashes the process if it meets an older libstdc++ than its own.
    on_tvm_ffi = "tvm_ffi" in Path(spec.origin).read_text()
    if on_tvm_ffi and "libstdc++" not in os.environ.get("LD_PRELOAD", ""):
        raise Unavailable(
            "not loaded: start Python with LD_PRELOAD=<path of the system's libstdc++.so.6>"
        )
    return DeepGemm(_import("deep_gemm"))


@_once
def sgl_kernel() -> SglKernel:
    """Load the op library alone: the package's own import needs more than the ops do."""
    path = os.environ.get("DSA_BENCH_SGL_KERNEL")
    if path is None:
        spec = importlib.util.find_spec("sgl_kernel")
        if spec is None or not spec.submodule_search_locations:
            raise Unavailable("not installed")
        major, _ = torch.cuda.get_device_capability()
        folder = Path(spec.submodule_search_locations[0])
        found = sorted((folder / ("sm90" if major == 9 else "sm100")).glob("common_ops.*"))
        if not found:
            raise Unavailable(f"not loaded: no common_ops library in {folder}")
        path = str(found[0])
    torch.ops.load_library(path)  # type: ignore[no-untyped-call]
    return SglKernel()


@_once
def flashinfer() -> FlashInfer:
    module = _import("flashinfer")
    if not hasattr(module, "top_k"):
        raise Unavailable("not loaded: this version has no top_k")
    return FlashInfer(module)


def _version(names: tuple[str, ...]) -> str:
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "of unknown version"


def versions() -> dict[str, str]:
    """Each peer's version, or why it is not here."""
    loaders: dict[str, Callable[[], object]] = {
        "FlashMLA": flash_mla,
        "DeepGEMM": deep_gemm,
        "sgl_kernel": sgl_kernel,
        "FlashInfer": flashinfer,
    }
    found = {}
    for name, load in loaders.items():
        try:
            load()
            found[name] = _version(_DISTRIBUTIONS[name])
        except Unavailable as reason:
            found[name] = str(reason)
    return found

# SPDX-License-Identifier: Apache-2.0
"""What the tests share: comparison, hostile inputs, guarded outputs, paged caches.

The caches are packed here byte by byte, from docs/kv_cache_layout.md and not through the package: a
third statement of the layouts beside kv_layout.h and dsa_ext.reference.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

INT_MIN, INT_MAX = -(2**31), 2**31 - 1
HOSTILE_INTS = (INT_MIN, INT_MIN + 1, -65536, -2, -1, 0, 1, 65536, INT_MAX - 1, INT_MAX)

LOGITS_TOLERANCE = 5e-6
DECODE_TOLERANCE = 5e-6
PREFILL_TOLERANCE = 7e-6

E4M3 = torch.float8_e4m3fn


# ---- comparison ----------------------------------------------------------------------------------


def difference(actual: Tensor, expected: Tensor) -> float:
    """d = 1 - 2<x,y> / (<x,x> + <y,y>) in fp64, over the positions where expected is finite."""
    x, y = actual.double().flatten(), expected.double().flatten()
    finite = torch.isfinite(y)
    x, y = x[finite], y[finite]
    norm = float((x * x + y * y).sum())
    return 0.0 if norm == 0 else 1.0 - 2.0 * float((x * y).sum()) / norm


def assert_anomalies_equal(actual: Tensor, expected: Tensor) -> None:
    x, y = actual.double(), expected.double()
    assert x.shape == y.shape, f"shape {tuple(x.shape)} instead of {tuple(y.shape)}"
    for name, probe in (("NaN", torch.isnan), ("inf", torch.isposinf), ("-inf", torch.isneginf)):
        wrong = torch.nonzero(probe(x) != probe(y))
        assert len(wrong) == 0, f"{name} differs at {len(wrong)} places, first {wrong[0].tolist()}"


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert_anomalies_equal(actual, expected)
    d = difference(actual, expected)
    assert d < tolerance, f"difference {d:.3e}, expected less than {tolerance:.0e}"


def assert_lse_close(actual: Tensor, expected: Tensor) -> None:
    """Within 1e-6 absolute or 1e-4 relative (lse and max_logits)."""
    assert_anomalies_equal(actual, expected)
    x, y = actual.double(), expected.double()
    finite = torch.isfinite(y)
    gap = (x - y).abs()[finite]
    allowed = torch.clamp(1e-4 * y[finite].abs(), min=1e-6)
    worst = float((gap / allowed).max()) if len(gap) else 0.0
    assert worst <= 1.0, f"off by {worst:.3g} times what is allowed"


def bits(t: Tensor) -> Tensor:
    """The bytes of a tensor's elements."""
    return t.detach().contiguous().view(torch.uint8)


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    wrong = torch.nonzero(bits(actual) != bits(expected))
    assert len(wrong) == 0, f"{len(wrong)} bytes differ, first at {wrong[0].tolist()}"


def assert_same_codes(actual: Tensor, expected: Tensor) -> None:
    """The same bits, but for the sign of an e4m3 NaN: that of inf / inf is the machine's."""

    def positive_nan(t: Tensor) -> Tensor:
        codes = bits(t)
        return torch.where((codes & 0x7F) == 0x7F, codes & 0x7F, codes)

    assert_same_bits(positive_nan(actual), positive_nan(expected))


def storage_bytes(t: Tensor) -> Tensor:
    """Every byte of the memory under a tensor: what lies between its elements too."""
    return torch.empty(0, dtype=torch.uint8, device=t.device).set_(t.untyped_storage())


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def assert_deterministic(run, times: int = 4) -> None:
    """The same bits in every run, and with 1 and 2 threads. run() returns a tensor or a tuple."""
    with threads(1):
        first = run()
    for count in itertools.islice(itertools.cycle((2, 1)), times):
        with threads(count):
            again = run()
        pairs = ((first, again),) if isinstance(first, Tensor) else zip(first, again, strict=True)
        for expected, actual in pairs:
            assert_same_bits(actual, expected)


# ---- inputs and outputs --------------------------------------------------------------------------


def poison(t: Tensor) -> Tensor:
    """Fill with 0xFF bytes: NaN in e4m3, bf16, fp16 and fp32, -1 in integers."""
    t.view(torch.uint8).fill_(0xFF)
    return t


def spread(t: Tensor, pad: int = 16) -> Tensor:
    """The same values, not contiguous: rows `pad` elements apart; of a vector, every second."""
    if t.dim() == 1:
        wide = poison(t.new_empty((t.shape[0], 2)))
        wide[:, 0] = t
        return wide[:, 0]
    wide = poison(t.new_empty((*t.shape[:-1], t.shape[-1] + pad)))
    inner = wide[..., : t.shape[-1]]
    inner.copy_(t)
    return inner


class Guarded:
    """An output full of garbage, with more garbage around it that no op may touch."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: str, pad: int = 16):
        if len(shape) == 1:
            self._all = torch.empty((shape[0], 2), dtype=dtype, device=device)
            self._inside = (slice(None), slice(0, 1))
            self.out = self._all[:, 0]
        else:
            wide = (*shape[:-1], shape[-1] + pad)
            self._all = torch.empty(wide, dtype=dtype, device=device)
            self._inside = (..., slice(0, shape[-1]))
            self.out = self._all[self._inside]
        # NaN in every float format here, -24673 or so in integers.
        self._all.view(torch.uint8).fill_(0x9F if not dtype.is_floating_point else 0xFF)
        self._before = self._all.clone()

    def check(self) -> Tensor:
        """Assert that nothing around the output was written; return the output."""
        after = self._all.clone()
        after[self._inside] = self._before[self._inside]
        assert_same_bits(after, self._before)
        return self.out

    def assert_untouched(self, where: Tensor) -> None:
        assert_same_bits(self.out[where], self._before[self._inside].reshape(self.out.shape)[where])


def int32(values, device: str = "cpu") -> Tensor:
    return torch.as_tensor(values, dtype=torch.int32, device=device)


def random_e4m3(*shape: int, device: str = "cpu", std: float = 1.0) -> Tensor:
    return (torch.randn(shape) * std).clamp(-448, 448).to(E4M3).to(device)


def any_e4m3(*shape: int, device: str = "cpu") -> Tensor:
    """Every finite code alike: subnormals, both zeros, up to 448."""
    codes = torch.randint(0, 256, shape, dtype=torch.uint8)
    codes = torch.where((codes & 0x7F) == 0x7F, codes - 1, codes)
    return codes.view(E4M3).to(device)


def exact_e4m3(*shape: int, device: str = "cpu", largest: int = 3) -> Tensor:
    """Small integers: dot products come out exact in fp32 in any order of summation."""
    return torch.randint(-largest, largest + 1, shape).float().to(E4M3).to(device)


def odd_scales(*shape: int, device: str = "cpu") -> Tensor:
    """Positive fp32 scales, no power of two among them."""
    return (torch.rand(shape) * 0.9 + 1.05).mul_(2.0 ** torch.randint(-6, 3, shape)).to(device)


def hostile(t: Tensor, share: float, values=HOSTILE_INTS) -> Tensor:
    """An int tensor with a share of its entries replaced by hostile ones."""
    bad = torch.tensor(values, dtype=torch.int64)[torch.randint(0, len(values), t.shape)]
    return torch.where(torch.rand(t.shape) < share, bad.to(t.dtype), t.cpu()).to(t.device)


# ---- paged caches --------------------------------------------------------------------------------


def paged(
    pages: int,
    page_size: int,
    width: int,
    *,
    dtype: torch.dtype = torch.uint8,
    extra_stride: int = 0,
    device: str = "cpu",
) -> Tensor:
    """[pages, page_size, 1, width], poisoned; pages lie extra_stride elements further apart."""
    stride = page_size * width + extra_stride
    memory = poison(torch.empty(pages * stride, dtype=dtype, device=device))
    return memory.as_strided((pages, page_size, 1, width), (stride, width, width, 1))


def permuted_table(
    lens: list[int], page_size: int, pages: int, *, width: int | None = None, device: str = "cpu"
) -> Tensor:
    """int32 [B, P]: each request's tokens in distinct pages, shuffled; unused entries hostile."""
    need = [max(0, -(-n // page_size)) for n in lens]
    width = max(1, *need) if width is None else width
    order = torch.randperm(pages).tolist()
    assert sum(need) <= pages, "not enough pages for these lengths"
    table = hostile(torch.full((len(lens), width), -1, dtype=torch.int32), 0.5)
    for b, count in enumerate(need):
        for p in range(count):
            table[b, p] = order.pop()
    return table.to(device)


def slots_of(table: Tensor, request: int, tokens: Tensor, page_size: int) -> Tensor:
    """int64 slots of a request's token positions."""
    page = table[request].to(torch.int64)[tokens // page_size]
    return page * page_size + tokens % page_size


def _put(cache: Tensor, page: Tensor, at: Tensor, data: Tensor) -> None:
    """Bytes data [T, n] to byte offsets at [T] of pages page [T]."""
    lane = torch.arange(data.shape[-1], device=cache.device)
    span = cache.shape[1] * cache.shape[3]
    flat = cache.view(torch.uint8).as_strided(
        (cache.shape[0], span), (cache.stride(0), 1), cache.storage_offset()
    )
    flat[page.unsqueeze(-1), at.unsqueeze(-1) + lane] = data


def put_indexer_keys(cache: Tensor, slots: Tensor, keys: Tensor, scales: Tensor) -> None:
    """Write e4m3 keys [T, D] and fp32 scales [T] to their slots of an indexer cache."""
    page_size, dim = cache.shape[1], cache.shape[3] - 4
    page, token = slots // page_size, slots % page_size
    _put(cache, page, token * dim, bits(keys))
    _put(cache, page, page_size * dim + token * 4, bits(scales.unsqueeze(-1)))


def put_v32_rows(cache: Tensor, slots: Tensor, codes: Tensor, scales: Tensor, rope: Tensor) -> None:
    """Write e4m3 codes [T, 512], fp32 scales [T, 4], bf16 rope [T, 64] to 656-byte rows."""
    page, token = slots // cache.shape[1], slots % cache.shape[1]
    _put(cache, page, token * 656, torch.cat([bits(codes), bits(scales), bits(rope)], -1))


def put_v4_rows(cache: Tensor, slots: Tensor, codes: Tensor, scales: Tensor, rope: Tensor) -> None:
    """Write e4m3 codes [T, 448], ue8m0 bytes [T, 7], bf16 rope [T, 64] to a two-plane page."""
    page, token = slots // cache.shape[1], slots % cache.shape[1]
    _put(cache, page, token * 576, torch.cat([bits(codes), bits(rope)], -1))
    padded = torch.nn.functional.pad(scales, (0, 1))
    _put(cache, page, cache.shape[1] * 576 + token * 8, padded)


@dataclass(frozen=True)
class LatentFormat:
    """One way of storing MLA latents."""

    name: str
    width: int  # last dimension of the cache
    d_qk: int
    dtype: torch.dtype
    fp8: bool


FORMATS = {
    f.name: f
    for f in (
        LatentFormat("bf16", 576, 576, torch.bfloat16, False),
        LatentFormat("fp16", 576, 576, torch.float16, False),
        LatentFormat("v32", 656, 576, torch.uint8, True),
        LatentFormat("v4", 584, 512, torch.uint8, True),
    )
}


def latent_cache(
    fmt: LatentFormat,
    pages: int,
    page_size: int,
    slots: Tensor,
    *,
    width: int | None = None,
    extra_stride: int = 0,
    device: str = "cpu",
) -> Tensor:
    """A poisoned cache with random rows at `slots` alone; `width`: of a 16-bit one."""
    width = width or fmt.width
    cache = paged(
        pages, page_size, width, dtype=fmt.dtype, extra_stride=extra_stride, device=device
    )
    slots = slots.to(device).unique()
    count = len(slots)
    rope = torch.randn(count, 64).to(torch.bfloat16).to(device)
    if fmt.name == "v32":
        scales = odd_scales(count, 4, device=device) * 0.02
        put_v32_rows(cache, slots, any_e4m3(count, 512, device=device), scales, rope)
    elif fmt.name == "v4":
        scales = torch.randint(118, 124, (count, 7), dtype=torch.uint8).to(device)
        put_v4_rows(cache, slots, any_e4m3(count, 448, device=device), scales, rope)
    else:
        rows = torch.randn(count, width).to(fmt.dtype).to(device)
        cache[slots // page_size, slots % page_size, 0] = rows
    return cache

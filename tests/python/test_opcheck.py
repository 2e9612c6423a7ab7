# SPDX-License-Identifier: Apache-2.0
"""The torch ops as torch sees them: schemas, autograd, fake tensors, torch.compile."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import dsa_ext
from dsa_ext import _C
from helpers import E4M3, FORMATS, assert_same_bits, bits, int32, latent_cache, paged, random_e4m3

FP32, BF16, INT32 = torch.float32, torch.bfloat16, torch.int32
WORKSPACE_BYTES = 2**20  # more than any kernel asks for at these sizes


def zeros(*shape: int, dtype: torch.dtype = FP32) -> torch.Tensor:
    """Zeros, of e4m3 too."""
    return (
        torch.zeros(shape, dtype=torch.uint8).view(E4M3)
        if dtype == E4M3
        else torch.zeros(shape, dtype=dtype)
    )


# ---- arguments: one right call for each op -------------------------------------------------------


def prefill(device):
    return (
        random_e4m3(3, 4, 32, device=device),
        (random_e4m3(9, 32, device=device), torch.rand(9, device=device)),
        torch.randn(3, 4, device=device),
        int32([0, 1, 2], device),
        int32([9, 5, 8], device),
    )


def decode(device):
    cache = paged(4, 5, 36, device=device).random_(0, 60)
    lens, table = int32([9, 4], device), int32([[3, 1], [0, -1]], device)
    q, weights = random_e4m3(2, 1, 4, 32, device=device), torch.randn(2, 4, device=device)
    return q, cache, weights, lens, table, None, 10


def sparse(device):
    q = torch.randn(3, 4, 96).to(device, BF16)
    kv = torch.randn(9, 1, 96).to(device, BF16)
    return q, kv, int32(torch.randint(0, 9, (3, 1, 6)), device), 0.1, 64


def cached(device, name="v32", *, dense=False):
    fmt = FORMATS[name]
    slots = torch.arange(20)
    return {
        "q": torch.randn(2, 1, 3, fmt.d_qk).to(device, BF16),
        "k_cache": latent_cache(fmt, 4, 5, slots, device=device),
        "block_table": int32([[3, 1], [0, -1]], device) if dense else None,
        "cache_seqlens": int32([9, 4], device) if dense else None,
        "head_dim_v": 512,
        "tile_scheduler_metadata": None,
        "is_fp8_kvcache": fmt.fp8,
        "indices": None if dense else int32(torch.randint(0, 20, (2, 1, 6)), device),
    }


def op_arguments(op: str, device: str) -> list[dict | tuple]:
    """Calls of torch.ops.dsa_ext.<op>: with the least arguments, and with all."""
    q, (k, k_scale), weights, start, end = prefill(device)
    flat = (q, k, k_scale, weights, start, end)
    pq, cache, pweights, lens, table, _, width = decode(device)
    schedule = int32(torch.zeros(3, 2), device)

    def out(*shape, dtype=FP32):
        return zeros(*shape, dtype=dtype).to(device)

    def kvcache(case, **more):
        case = {k: v for k, v in case.items() if k != "tile_scheduler_metadata"}
        case |= {
            "softmax_scale": 0.1,
            "causal": False,
            "extra_k_cache": None,
            "extra_indices": None,
            "attn_sink": None,
            "topk_length": None,
            "extra_topk_length": None,
            "batch_invariant": False,
            "out": out(2, 1, 3, 512, dtype=BF16),
            "lse": out(2, 3, 1),
            "workspace": None,
        }
        return case | more

    workspace = out(WORKSPACE_BYTES, dtype=torch.uint8)
    sparse_outs = (out(3, 4, 64, dtype=BF16), out(3, 4), out(3, 4))
    table_of_rows = int32([[3, 1], [0, 1], [2, 2]], device)
    calls = {
        "fp8_mqa_logits": [(*flat, True, 0, out(3, 9)), (*flat, False, 5, out(3, 5, dtype=BF16))],
        "fp8_mqa_topk": [
            (*flat, 4, out(3, 4, dtype=INT32), None, None),
            (*flat, 4, out(3, 4, dtype=INT32), out(3, 4), workspace),
        ],
        "fp8_paged_mqa_logits": [
            (pq, cache, pweights, lens, table, None, width, True, None, out(2, 10)),
            (pq, cache, pweights, lens[:, None], table, schedule, width, False, lens, out(2, 10)),
        ],
        "fp8_paged_mqa_topk": [
            (
                *(pq, cache, pweights, lens, table, None, width, 4, False),
                *(out(2, 4, dtype=INT32), None, None),
            ),
            (
                *(pq, cache, pweights, lens, table, schedule, width, 4, True),
                *(out(2, 4, dtype=INT32), out(2, 4), workspace),
            ),
        ],
        "get_paged_mqa_logits_metadata": [
            (lens, 64, 5, None, out(6, 2, dtype=INT32)),
            (lens, 64, 5, lens, out(6, 2, dtype=INT32)),
        ],
        "topk_select": [
            (
                *(torch.randn(3, 9, device=device), 4, None, None, None, 0, None, 0, None),
                *(out(3, 4, dtype=INT32), None, None),
            ),
            (
                *(torch.randn(3, 9, device=device), 4, start, end, start, 0, table_of_rows, 5),
                *(start, out(3, 4, dtype=INT32), out(3, 4), workspace),
            ),
        ],
        "map_to_slots": [
            (int32(torch.arange(6).view(3, 2), device), table_of_rows, 5, rows, out(3, 2).int())
            for rows in (None, start)
        ],
        "merge_topk": [
            (
                *(torch.randn(3, 9, device=device), int32(torch.arange(27).view(3, 9), device), 4),
                *(out(3, 4, dtype=INT32), kept),
            )
            for kept in (None, out(3, 4))
        ],
        "flash_mla_sparse_fwd": [
            (*sparse(device), None, None, False, *sparse_outs, None),
            (
                *sparse(device),
                torch.randn(4, device=device),
                int32([6, 2, 0], device),
                True,
                *sparse_outs,
                workspace,
            ),
            (
                torch.randn(2, 3, 576, device=device).to(BF16),
                *(cached(device)["k_cache"], cached(device)["indices"], 0.1, 512, None, None),
                *(False, out(2, 3, 512, dtype=BF16), out(2, 3), out(2, 3), None),
            ),
        ],
        "flash_mla_with_kvcache": [
            kvcache(cached(device)),
            kvcache(cached(device, "bf16", dense=True), causal=True),
            kvcache(
                cached(device, "v4"),
                attn_sink=torch.randn(3, device=device),
                extra_k_cache=cached(device, "v4")["k_cache"],
                extra_indices=int32(torch.randint(0, 20, (2, 1, 3)), device),
                topk_length=int32([3, 4], device),
                extra_topk_length=int32([[3], [1]], device),
                batch_invariant=True,
                workspace=workspace,
            ),
        ],
        "merge_attn_states": [
            (
                *(torch.randn(2, 3, 4, 8, device=device), torch.randn(2, 3, 4, device=device)),
                *(out(3, 4, 8), out(3, 4)),
            )
        ],
        "hadamard_transform": [
            (torch.randn(3, 64, device=device), scale, out(3, 64)) for scale in (None, 2.0)
        ],
        "per_token_cast_to_fp8": [
            (torch.randn(3, 200, device=device), ue8m0, out(3, 200, dtype=E4M3), out(3, 2))
            for ue8m0 in (False, True)
        ],
        "indexer_k_quant_and_cache": [
            (
                *(torch.randn(2, 32, device=device), paged(4, 5, 36, device=device).zero_()),
                *(int32([7, -1], device), True),
            )
        ],
        "gather_indexer_k_cache": [
            (cache, table, int32([0, 3, 5], device), out(6, 32, dtype=E4M3), out(6))
        ],
        "mla_kv_quant_and_cache": [
            (
                *(torch.randn(2, 512).to(device, BF16), torch.randn(2, 64).to(device, BF16)),
                *(paged(4, 5, 656, device=device).zero_(), int32([7, -1], device)),
            )
        ],
        "gather_mla_kv_cache": [
            (cached(device)["k_cache"], table, int32([0, 3, 5], device), out(6, 576, dtype=BF16))
        ],
    }
    assert set(calls) == OPS
    return calls[op]


OPS = {kernel["op"] for kernel in _C.kernels()}


def test_every_op_of_torch_has_kernels_and_the_reverse():
    registered = {
        name.removeprefix("dsa_ext::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("dsa_ext::")
    }
    assert registered == OPS
    for op in OPS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"dsa_ext::{op}", "CPU")
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"dsa_ext::{op}", "CUDA")
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"dsa_ext::{op}", "Meta")


def test_every_op_is_public_with_arguments_here():
    assert OPS.issubset(dsa_ext.__all__)
    assert set(PUBLIC) == OPS


@pytest.fixture
def allclose_of_fp8(monkeypatch):
    """opcheck looks for writes with torch.allclose, which e4m3 tensors do not have on the CPU."""
    allclose = torch.allclose

    def compare(a, b, **kwargs):
        return torch.equal(bits(a), bits(b)) if a.dtype == E4M3 else allclose(a, b, **kwargs)

    monkeypatch.setattr(torch, "allclose", compare)


@pytest.mark.usefixtures("allclose_of_fp8")
@pytest.mark.parametrize("op", sorted(OPS))
def test_opcheck(device, op):
    for arguments in op_arguments(op, device):
        args, kwargs = ((), arguments) if isinstance(arguments, dict) else (arguments, {})
        results = torch.library.opcheck(getattr(torch.ops.dsa_ext, op), args, kwargs)
        assert set(results.values()) == {"SUCCESS"}
        assert len(results) == 4


@pytest.mark.parametrize("op", sorted(OPS))
def test_schema_says_which_arguments_are_written(op):
    schema = torch._C._get_schema(f"dsa_ext::{op}", "")
    assert schema.is_mutable
    assert len(schema.returns) == 0
    written = {a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write}
    assert written == WRITTEN.get(op, {"out"})


WRITTEN = {
    "fp8_mqa_topk": {"indices", "scores", "workspace"},
    "fp8_paged_mqa_topk": {"indices", "scores", "workspace"},
    "topk_select": {"indices", "out_scores", "workspace"},
    "merge_topk": {"out_indices", "out_scores"},
    "flash_mla_sparse_fwd": {"out", "max_logits", "lse", "workspace"},
    "flash_mla_with_kvcache": {"out", "lse", "workspace"},
    "merge_attn_states": {"out", "lse"},
    "per_token_cast_to_fp8": {"out", "scale"},
    "indexer_k_quant_and_cache": {"kv_cache"},
    "gather_indexer_k_cache": {"k", "k_scale"},
    "mla_kv_quant_and_cache": {"kv_cache"},
}


# ---- the public functions ------------------------------------------------------------------------


def write_indexer(k, cache, slots):
    dsa_ext.indexer_k_quant_and_cache(k, cache, slots, "ue8m0")
    return cache


def write_mla(kv_c, k_pe, cache, slots):
    dsa_ext.mla_kv_quant_and_cache(kv_c, k_pe, cache, slots)
    return cache


def decode_with_metadata(case):
    """As FlashMLA's callers do: metadata made in the same graph."""
    metadata, num_splits = dsa_ext.get_mla_metadata()
    case = case | {"tile_scheduler_metadata": metadata, "num_splits": num_splits}
    return dsa_ext.flash_mla_with_kvcache(**case)


# op -> (a public call, its arguments on a device, the shapes and dtypes it returns)
PUBLIC = {
    "fp8_mqa_logits": (
        lambda *args: dsa_ext.fp8_mqa_logits(*args, logits_dtype=BF16),
        prefill,
        [((3, 9), BF16)],
    ),
    "fp8_mqa_topk": (
        lambda *args: dsa_ext.fp8_mqa_topk(*args, 4, return_scores=True),
        prefill,
        [((3, 4), INT32), ((3, 4), FP32)],
    ),
    "fp8_paged_mqa_logits": (
        lambda *args: dsa_ext.fp8_paged_mqa_logits(*args, clean_logits=True),
        decode,
        [((2, 10), FP32)],
    ),
    "fp8_paged_mqa_topk": (
        lambda *args: dsa_ext.fp8_paged_mqa_topk(*args, 4, return_slots=True),
        decode,
        [((2, 4), INT32)],
    ),
    "get_paged_mqa_logits_metadata": (
        lambda lens: dsa_ext.get_paged_mqa_logits_metadata(lens, 64, 5),
        lambda device: (int32([9, 4000], device),),
        [((6, 2), INT32)],
    ),
    "topk_select": (
        lambda scores, ends: dsa_ext.topk_select(
            scores, 4, None, ends, index_base=3, return_scores=True
        ),
        lambda device: (torch.randn(3, 9, device=device), int32([9, 2, 5], device)),
        [((3, 4), INT32), ((3, 4), FP32)],
    ),
    "map_to_slots": (
        lambda indices, table: dsa_ext.map_to_slots(indices, table, 5),
        lambda device: (int32(torch.arange(6).view(2, 1, 3), device), decode(device)[4]),
        [((2, 1, 3), INT32)],
    ),
    "merge_topk": (
        lambda scores, indices: dsa_ext.merge_topk(scores, indices, 4),
        lambda device: (
            torch.randn(3, 9, device=device),
            int32(torch.arange(27).view(3, 9), device),
        ),
        [((3, 4), INT32)],
    ),
    "flash_mla_sparse_fwd": (
        dsa_ext.flash_mla_sparse_fwd,
        sparse,
        [((3, 4, 64), BF16), ((3, 4), FP32), ((3, 4), FP32)],
    ),
    "flash_mla_with_kvcache": (
        decode_with_metadata,
        lambda device: (cached(device),),
        [((2, 1, 3, 512), BF16), ((2, 3, 1), FP32)],
    ),
    "merge_attn_states": (
        lambda a, b, lses: dsa_ext.merge_attn_states([a, b], lses),
        lambda device: (
            *torch.randn(2, 3, 2, 4, 8, device=device),
            torch.randn(2, 3, 2, 4, device=device),
        ),
        [((3, 2, 4, 8), FP32), ((3, 2, 4), FP32)],
    ),
    "hadamard_transform": (
        dsa_ext.hadamard_transform,
        lambda device: (torch.randn(3, 64).to(device, BF16),),
        [((3, 64), BF16)],
    ),
    "per_token_cast_to_fp8": (
        lambda x: dsa_ext.per_token_cast_to_fp8(x, True),
        lambda device: (torch.randn(3, 200, device=device),),
        [((3, 200), E4M3), ((3, 2), FP32)],
    ),
    "indexer_k_quant_and_cache": (
        write_indexer,
        lambda device: (
            torch.randn(2, 32, device=device),
            paged(4, 5, 36, device=device),
            int32([7, -1], device),
        ),
        [((4, 5, 1, 36), torch.uint8)],
    ),
    "gather_indexer_k_cache": (
        lambda cache, table, cu_seqlens: dsa_ext.gather_indexer_k_cache(
            cache, table, cu_seqlens, 6
        ),
        lambda device: (decode(device)[1], decode(device)[4], int32([0, 3, 5], device)),
        [((6, 32), E4M3), ((6,), FP32)],
    ),
    "mla_kv_quant_and_cache": (
        write_mla,
        lambda device: (
            torch.randn(2, 448).to(device, BF16),
            torch.randn(2, 64).to(device, BF16),
            paged(4, 5, 584, device=device),
            int32([7, -1], device),
        ),
        [((4, 5, 1, 584), torch.uint8)],
    ),
    "gather_mla_kv_cache": (
        lambda cache, table, cu_seqlens: dsa_ext.gather_mla_kv_cache(cache, table, cu_seqlens, 6),
        lambda device: (cached(device)["k_cache"], decode(device)[4], int32([0, 3, 5], device)),
        [((6, 576), BF16)],
    ),
}


def as_tuple(result) -> tuple:
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)


@pytest.mark.parametrize("op", sorted(OPS))
def test_fake_tensors(device, op):
    """Shapes and dtypes without data: what a compiler or a memory planner runs."""
    call, make, expected = PUBLIC[op]
    mode = FakeTensorMode()
    arguments = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, make(device))
    with mode:
        results = as_tuple(call(*arguments))
    assert [(tuple(r.shape), r.dtype) for r in results] == expected
    assert all(r.device.type == device for r in results)


@pytest.mark.parametrize("op", sorted(OPS))
def test_eager_shapes(device, op):
    call, make, expected = PUBLIC[op]
    results = as_tuple(call(*make(device)))
    assert [(tuple(r.shape), r.dtype) for r in results] == expected


def check_compiled(op, device, **options):
    call, make, _ = PUBLIC[op]
    arguments = make(device)
    # Of functions that write a cache, eager and compiled each get their own.
    copies = torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, arguments)
    expected = as_tuple(call(*arguments))
    torch._dynamo.reset()
    got = as_tuple(torch.compile(call, fullgraph=True, **options)(*copies))
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(bits(a), bits(b))


@pytest.mark.parametrize("op", sorted(OPS))
def test_compile(device, op):
    check_compiled(op, device, backend="aot_eager")


@pytest.mark.ops("flash_mla_sparse_fwd")
@pytest.mark.parametrize("given", [1, 3])
def test_compile_with_out(device, given):
    """A tensor, or a tuple: unpacked in the graph."""

    def work(arguments, out):
        return dsa_ext.flash_mla_sparse_fwd(*arguments, out=out[0] if len(out) == 1 else out)

    arguments = sparse(device)
    expected = dsa_ext.flash_mla_sparse_fwd(*arguments)
    out = tuple(torch.empty_like(result) for result in expected[:given])
    torch._dynamo.reset()
    got = torch.compile(work, fullgraph=True, backend="aot_eager")(arguments, out)
    for result, right in zip((*got, *out), (*expected, *expected), strict=False):
        assert_same_bits(result, right)


@pytest.mark.parametrize("op", ["topk_select", "hadamard_transform"])
def test_compile_with_dynamic_shapes(device, op):
    """One graph for all row counts."""
    call, make, _ = PUBLIC[op]
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    for repeats in (1, 2, 5):
        arguments = [torch.cat([a] * repeats) for a in make(device)]
        for a, b in zip(as_tuple(compiled(*arguments)), as_tuple(call(*arguments)), strict=True):
            assert_same_bits(a, b)


@pytest.mark.ops("hadamard_transform", "indexer_k_quant_and_cache", "gather_indexer_k_cache")
def test_compile_with_inductor(device):
    """A write to a graph input between two other ops: neither dropped nor reordered.

    No pointwise work, so inductor needs no C++ compiler.
    """

    def work(k, cache, slots, table, cu_seqlens):
        dsa_ext.indexer_k_quant_and_cache(dsa_ext.hadamard_transform(k), cache, slots)
        return dsa_ext.gather_indexer_k_cache(cache, table, cu_seqlens, 6)

    k = torch.randn(6, 32, device=device)
    cache, twin = (paged(3, 4, 36, device=device).zero_() for _ in range(2))
    slots = int32([3, 2, 9, 8, 0, 1], device)
    where = (slots, int32([[2, 0]], device), int32([0, 6], device))
    torch._dynamo.reset()
    got = torch.compile(work, fullgraph=True)(k, cache, *where)
    for a, b in zip(got, work(k, twin, *where), strict=True):
        assert_same_bits(a, b)
    assert_same_bits(cache, twin)


# ---- devices -------------------------------------------------------------------------------------


def tensors_of(arguments: dict) -> list[str]:
    return [name for name, value in arguments.items() if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize("op", sorted(OPS))
def test_one_tensor_on_meta(op):
    """Torch calls the fake kernel then: no result is left unwritten in silence."""
    for arguments in op_arguments(op, "cpu"):
        if not isinstance(arguments, dict):
            names = [a.name for a in torch._C._get_schema(f"dsa_ext::{op}", "").arguments]
            arguments = dict(zip(names, arguments, strict=True))
        for index, name in enumerate(tensors_of(arguments)):
            mixed = arguments | {name: arguments[name].to("meta")}
            with pytest.raises(ValueError) as error:
                getattr(torch.ops.dsa_ext, op)(**mixed)
            second = tensors_of(arguments)[1]
            expected = (
                f"{op}: {name}: expected a tensor on cpu, got one on meta"
                if index
                else f"{op}: {second}: expected a tensor on meta, got one on cpu"
            )
            assert str(error.value) == expected


@pytest.mark.parametrize("op", sorted(OPS))
def test_meta_tensors(op):
    """All on meta: shapes and dtypes, as of fake tensors."""
    call, make, expected = PUBLIC[op]
    arguments = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to("meta"), make("cpu"))
    results = as_tuple(call(*arguments))
    assert [(tuple(r.shape), r.dtype, r.device.type) for r in results] == [
        (shape, dtype, "meta") for shape, dtype in expected
    ]


# ---- autograd ------------------------------------------------------------------------------------

# An attention function, its arguments on a device, those that may require grad.
ATTENTION = {
    "flash_mla_sparse_fwd": (
        lambda device: (
            dict(zip(("q", "kv", "indices", "sm_scale", "d_v"), sparse(device), strict=True))
            | {"attn_sink": torch.randn(4, device=device)}
        ),
        ("q", "kv", "attn_sink"),
    ),
    "flash_mla_with_kvcache": (
        lambda device: cached(device, "bf16") | {"attn_sink": torch.randn(3, device=device)},
        ("q", "k_cache", "attn_sink"),
    ),
    "merge_attn_states": (
        lambda device: {
            "outs": torch.randn(2, 3, 4, 8, device=device),
            "lses": torch.randn(2, 3, 4, device=device),
        },
        ("outs", "lses"),
    ),
}
REQUIRES_GRAD = [(op, name) for op, (_, names) in ATTENTION.items() for name in names]


@pytest.mark.parametrize(("op", "name"), REQUIRES_GRAD)
def test_backward_through_attention_raises(device, op, name):
    """Forward goes on; a backward does not lose the gradients in silence. ``out`` stays plain."""
    function, case = getattr(dsa_ext, op), ATTENTION[op][0](device)
    expected = function(**case)
    assert not any(result.requires_grad for result in expected)
    case[name].requires_grad_()
    for result, right in zip(function(**case), expected, strict=True):
        assert_same_bits(result.detach(), right)
        with pytest.raises(RuntimeError) as error:
            result.float().sum().backward()
        assert str(error.value) == (
            f"{op}: not differentiable; use the function of this name in dsa_ext.reference"
        )
    out = tuple(torch.empty_like(result) for result in expected)
    for result, given, right in zip(function(**case, out=out), out, expected, strict=True):
        assert result is given and not given.requires_grad
        assert_same_bits(given, right)
    with torch.no_grad():
        assert not any(result.requires_grad for result in function(**case))


def test_attention_with_gradients_compiles(device):
    """The check is of eager calls alone: a graph of the op, without a break, is as before."""
    q, kv, indices, scale, d_v = sparse(device)
    torch._dynamo.reset()
    compiled = torch.compile(dsa_ext.flash_mla_sparse_fwd, fullgraph=True, backend="aot_eager")
    expected = dsa_ext.flash_mla_sparse_fwd(q, kv, indices, scale, d_v)
    for result, right in zip(
        compiled(q.requires_grad_(), kv, indices, scale, d_v), expected, strict=True
    ):
        assert_same_bits(result.detach(), right)

# SPDX-License-Identifier: Apache-2.0
"""The package as installed: names, signatures, report, ABI, and offsets past 2^31."""

from __future__ import annotations

import ast
import inspect
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dsa_ext
from dsa_ext import _C, reference
from helpers import (
    DECODE_TOLERANCE,
    FORMATS,
    assert_close,
    assert_lse_close,
    assert_same_bits,
    bits,
    int32,
    latent_cache,
    odd_scales,
    paged,
    poison,
    put_indexer_keys,
    random_e4m3,
    slots_of,
)

PACKAGE = Path(_C.__file__).parent
BF16 = torch.bfloat16
FAR = 2**31


# ---- names and signatures ------------------------------------------------------------------------

# Positional parameters, in order. Of FlashMLA:
FLASH_MLA = {
    "get_mla_metadata": [],
    "flash_mla_sparse_fwd": [
        "q",
        "kv",
        "indices",
        "sm_scale",
        "d_v",
        "attn_sink",
        "topk_length",
    ],
    "flash_mla_with_kvcache": [
        "q",
        "k_cache",
        "block_table",
        "cache_seqlens",
        "head_dim_v",
        "tile_scheduler_metadata",
        "num_splits",
        "softmax_scale",
        "causal",
        "is_fp8_kvcache",
        "indices",
        "attn_sink",
        "extra_k_cache",
        "extra_indices_in_kvcache",
        "topk_length",
        "extra_topk_length",
        "enable_batch_invariant",
    ],
}
# Of DeepGEMM:
DEEP_GEMM = {
    "get_num_sms": [],
    "set_num_sms": ["num_sms"],
    "fp8_fp4_mqa_logits": [
        "q",
        "kv",
        "weights",
        "cu_seq_len_k_start",
        "cu_seq_len_k_end",
        "clean_logits",
        "max_seqlen_k",
        "logits_dtype",
    ],
    "fp8_fp4_paged_mqa_logits": [
        "q",
        "kv_cache",
        "weights",
        "context_lens",
        "block_table",
        "schedule_meta",
        "max_context_len",
        "clean_logits",
        "logits_dtype",
        "indices",
    ],
    "fp8_mqa_logits": [
        "q",
        "kv",
        "weights",
        "cu_seq_len_k_start",
        "cu_seq_len_k_end",
        "clean_logits",
        "max_seqlen_k",
        "logits_dtype",
    ],
    "get_paged_mqa_logits_metadata": ["context_lens", "block_kv", "num_sms", "indices"],
    "fp8_paged_mqa_logits": [
        "q",
        "kv_cache",
        "weights",
        "context_lens",
        "block_table",
        "schedule_meta",
        "max_context_len",
        "clean_logits",
        "indices",
    ],
    "per_token_cast_to_fp8": ["x", "use_ue8m0", "gran_k", "use_packed_ue8m0"],
}
# Of this package alone:
OWN = {
    "fp8_mqa_topk": ["q", "kv", "weights", "cu_seq_len_k_start", "cu_seq_len_k_end", "k"],
    "fp8_paged_mqa_topk": [
        "q",
        "kv_cache",
        "weights",
        "context_lens",
        "block_table",
        "schedule_meta",
        "max_context_len",
        "k",
    ],
    "topk_select": ["scores", "k", "row_starts", "row_ends"],
    "map_to_slots": ["indices", "block_table", "page_size", "row_to_request"],
    "merge_topk": ["scores", "indices", "k"],
    "merge_attn_states": ["outs", "lses"],
    "hadamard_transform": ["x", "scale"],
    "indexer_k_quant_and_cache": ["k", "kv_cache", "slot_mapping", "scale_fmt"],
    "gather_indexer_k_cache": ["kv_cache", "block_table", "cu_seqlens", "num_tokens"],
    "mla_kv_quant_and_cache": ["kv_c", "k_pe", "kv_cache", "slot_mapping"],
    "gather_mla_kv_cache": ["kv_cache", "block_table", "cu_seqlens", "num_tokens"],
}
SIGNATURES = FLASH_MLA | DEEP_GEMM | OWN
DEFAULTS = {
    "flash_mla_sparse_fwd": {
        "d_v": 512,
        "attn_sink": None,
        "topk_length": None,
        "batch_invariant": False,
    },
    "flash_mla_with_kvcache": {
        "num_splits": None,
        "softmax_scale": None,
        "causal": False,
        "is_fp8_kvcache": False,
        "indices": None,
        "attn_sink": None,
        "extra_k_cache": None,
        "extra_indices_in_kvcache": None,
        "topk_length": None,
        "extra_topk_length": None,
        "enable_batch_invariant": False,
        "batch_invariant": False,
    },
    "fp8_mqa_logits": {"clean_logits": True, "max_seqlen_k": 0, "logits_dtype": torch.float32},
    "fp8_paged_mqa_logits": {
        "clean_logits": False,
        "indices": None,
        "logits_dtype": torch.float32,
    },
    "fp8_fp4_mqa_logits": {"clean_logits": True, "max_seqlen_k": 0, "logits_dtype": torch.float32},
    "fp8_fp4_paged_mqa_logits": {
        "clean_logits": False,
        "logits_dtype": torch.float32,
        "indices": None,
    },
    "per_token_cast_to_fp8": {"gran_k": 128, "use_packed_ue8m0": False},
    "hadamard_transform": {"scale": None},
    "get_paged_mqa_logits_metadata": {"indices": None},
    "topk_select": {"row_starts": None, "row_ends": None, "return_scores": False},
    "fp8_paged_mqa_topk": {"return_slots": False, "return_scores": False},
}


def positional(function) -> list[str]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in inspect.signature(function).parameters.values() if p.kind in kinds]


def test_every_name_of_all_exists_once():
    assert len(set(dsa_ext.__all__)) == len(dsa_ext.__all__)
    for name in dsa_ext.__all__:
        assert getattr(dsa_ext, name) is not None
    assert len(set(reference.__all__)) == len(reference.__all__)
    assert all(callable(getattr(reference, name)) for name in reference.__all__)
    assert all(callable(getattr(dsa_ext.nn, name)) for name in dsa_ext.nn.__all__)


def test_every_public_function_is_listed_here():
    public = {n for n in dsa_ext.__all__ if inspect.isfunction(getattr(dsa_ext, n))}
    assert public == set(SIGNATURES)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    function = getattr(dsa_ext, name)
    assert positional(function) == SIGNATURES[name]
    parameters = inspect.signature(function).parameters
    for parameter, default in DEFAULTS.get(name, {}).items():
        assert parameters[parameter].default == default
    if "out" in parameters:
        assert parameters["out"].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters["out"].default is None


# Names of callers' libraries alone: nothing of the oracle's.
NAMES_ALONE = {
    "get_mla_metadata",
    "get_num_sms",
    "set_num_sms",
    "fp8_fp4_mqa_logits",
    "fp8_fp4_paged_mqa_logits",
}


@pytest.mark.parametrize("name", sorted(set(SIGNATURES) - NAMES_ALONE))
def test_the_reference_has_the_same_signature(name):
    ours = inspect.signature(getattr(dsa_ext, name)).parameters
    theirs = inspect.signature(getattr(reference, name)).parameters
    assert positional(getattr(reference, name)) == SIGNATURES[name]
    common = [p for p in ours if p not in ("out", "workspace")]
    assert set(common) <= set(theirs)
    for parameter in common:
        assert ours[parameter].default == theirs[parameter].default, parameter


@pytest.mark.parametrize("name", SIGNATURES)
def test_docstring_names_every_argument(name):
    function = getattr(dsa_ext, name)
    text = inspect.getdoc(function)
    assert text
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD and parameter.name != "args":
            assert re.search(rf"\b{parameter.name}\b", text), parameter.name


def test_package_is_typed_and_versioned():
    assert (PACKAGE / "py.typed").exists()
    assert dsa_ext.__version__ == _C.build_info()["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", dsa_ext.__version__)


# ---- processes of their own ----------------------------------------------------------------------


def python(*arguments: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | environment,
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result.stdout


def test_import_prints_nothing_and_creates_no_cuda_context():
    script = """
import ctypes
import dsa_ext, torch
from dsa_ext import _C
_C.kernels(); _C.build_info()
assert not torch.cuda.is_initialized()
try:
    driver = ctypes.CDLL("libcuda.so.1")
except OSError:
    driver = None
count = ctypes.c_int(0)
if driver is not None and driver.cuInit(0) == 0:
    assert driver.cuDeviceGetCount(ctypes.byref(count)) == 0
for index in range(count.value):
    device, flags, active = ctypes.c_int(), ctypes.c_uint(), ctypes.c_int()
    assert driver.cuDeviceGet(ctypes.byref(device), index) == 0
    state = driver.cuDevicePrimaryCtxGetState
    assert state(device, ctypes.byref(flags), ctypes.byref(active)) == 0
    assert active.value == 0
"""
    assert python("-c", script) == ""


def test_report_lists_everything():
    text = python("-m", "dsa_ext", DSA_LOG="1", DSA_CPU_ISA="baseline")
    rows = [line.split(maxsplit=3) for line in text.splitlines()]
    for kernel in _C.kernels():
        row = next(r for r in rows if len(r) > 1 and r[1] == kernel["id"])
        assert row[0] == kernel["op"]
        assert row[2] == "yes" if kernel["device"] == "cpu" else row[2].startswith(("yes", "no"))
        assert row[3].endswith(kernel["takes"])
    for value in (dsa_ext.__version__, torch.__version__, "DSA_LOG=1", "baseline"):
        assert value in text
    table = text.split("\n\n")[1].splitlines()
    takes = table[0].index("takes")
    for row, kernel in zip(table[1:], sorted(_C.kernels(), key=lambda k: k["op"]), strict=True):
        assert row[takes - 2 :] == f"  {kernel['takes']}"


def test_report_says_why_no_device_is_visible():
    text = python("-m", "dsa_ext", CUDA_VISIBLE_DEVICES="")
    why = r" \(cudaDeviceGetAttribute: .+\)" if _C.build_info()["cuda"] else ""
    assert re.search(rf"^CUDA devices none visible{why}$", text, re.MULTILINE)


def test_an_unknown_instruction_set_is_reported():
    text = python("-m", "dsa_ext", DSA_CPU_ISA="mmx")
    assert "(DSA_CPU_ISA=mmx: not an instruction set of this build)" in text


def test_baseline_instruction_set():
    """The kernels for a CPU without AVX, which the rest of the suite does not reach with AVX."""
    script = """
import torch
import dsa_ext
from dsa_ext import _C
from test_attention import cache_case, check_cache, check_sparse, sparse_case
from test_indexer import test_logits, test_paged_topk, test_topk
assert _C.build_info()["cpu_isa"] == "baseline"
torch.manual_seed(0)
test_logits("cpu", (5, 3, 64, 77), torch.float32)
test_topk("cpu", (17, 32, 128, 300), 64)
test_paged_topk("cpu", (2, 3, 8, 32, 16), False, True)
check_sparse(sparse_case(5, 8, 512, 512, 300, 128, torch.bfloat16, "cpu", sink=True))
for name in ("bf16", "fp16", "v32", "v4"):
    check_cache(cache_case(name, "cpu", extra=7, lengths="b"))
print("done")
"""
    assert python("-c", script, DSA_CPU_ISA="baseline") == "done\n"


# ---- binaries ------------------------------------------------------------------------------------


def undefined_symbols(library: Path) -> list[str]:
    command = ["nm", "-D", "--undefined-only", "--format=posix", str(library)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [line.split()[0] for line in listing.splitlines()]


def test_torch_ops_use_the_stable_abi_alone():
    """What comes of torch is C functions of the stable ABI; C++ symbols are libstdc++'s."""
    symbols = undefined_symbols(PACKAGE / "libdsa_torch_ops.so")
    versioned = {s for s in symbols if "@" in s}
    assert versioned
    assert all(
        s.split("@")[-1].startswith(("GLIBC_", "GLIBCXX_", "CXXABI_", "GCC_")) for s in versioned
    )
    toolchain = {"_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__gmon_start__"}
    torchs = set(symbols) - versioned - toolchain
    assert "aoti_torch_library_def" in torchs
    assert [s for s in torchs if not s.startswith(("aoti_torch_", "torch_"))] == []
    mangled = [s for s in symbols if re.match(r"_Z\w*?N(2at|3c10|5torch)\d", s)]
    assert mangled == []


@pytest.mark.parametrize("library", ["libdsa_torch_ops.so", Path(_C.__file__).name])
def test_libraries_need_no_more_than_they_use(library):
    command = ["readelf", "-d", str(PACKAGE / library)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", listing))
    system = {"libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "libpthread.so.0"}
    system |= {"librt.so.1", "libdl.so.2"} | {n for n in needed if n.startswith("ld-linux")}
    own = {"libtorch.so"} if library.startswith("libdsa") else set()
    assert needed - system == own
    assert not re.search(r"\((RPATH|RUNPATH)\)", listing)


def test_libraries_export_nothing_but_entry_points():
    for library, expected in (("libdsa_torch_ops.so", 0), (Path(_C.__file__).name, 1)):
        command = ["nm", "-D", "--defined-only", "--format=posix", str(PACKAGE / library)]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        names = [line.split()[0] for line in listing.splitlines()]
        assert [n for n in names if "3dsa" in n] == []
        assert len([n for n in names if n.startswith("PyInit_")]) == expected


# ---- _C ------------------------------------------------------------------------------------------


def test_stub_agrees_with_the_module():
    tree = ast.parse((PACKAGE / "_C.pyi").read_text())
    functions = {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}
    constants = {n.target.id for n in tree.body if isinstance(n, ast.AnnAssign)}
    assert functions | constants == {n for n in dir(_C) if not n.startswith("__")}
    assert all(callable(getattr(_C, name)) for name in functions)
    fields = {
        n.name: {f.target.id: ast.unparse(f.annotation) for f in n.body}
        for n in tree.body
        if isinstance(n, ast.ClassDef)
    }
    values = [
        ("BuildInfo", _C.build_info()),
        ("MlaLayout", _C.MLA_V32),
        ("MlaLayout", _C.MLA_V4),
        *(("Kernel", kernel) for kernel in _C.kernels()),
        *(("CudaDevice", device) for device in _C.cuda_devices()),
    ]
    types = {"str": str, "int": int, "str | None": str | None}
    for name, value in values:
        assert set(value) == set(fields[name])
        for field, annotation in fields[name].items():
            assert isinstance(value[field], types[annotation]), (name, field)
    returns = {n.name: ast.unparse(n.returns) for n in tree.body if isinstance(n, ast.FunctionDef)}
    assert returns == {
        "build_info": "BuildInfo",
        "cuda_devices": "list[CudaDevice]",
        "kernels": "list[Kernel]",
        "kernel_refusal": "str",
    }


def test_registry():
    kernels = _C.kernels()
    ids = [kernel["id"] for kernel in kernels]
    assert len(set(ids)) == len(ids)
    for kernel in kernels:
        assert kernel["device"] in ("cpu", "cuda")
        assert re.fullmatch(r"[a-z0-9_]+", kernel["id"])
        assert kernel["takes"]
    assert {kernel["op"] for kernel in kernels if kernel["device"] == "cpu"} == {
        kernel["op"] for kernel in kernels
    }


def test_kernel_refusal():
    """On the GPU that is there, if any, and on those that are not."""
    for kernel, absent in itertools.product(_C.kernels(), (63, 64, 1000, -1)):
        reason = _C.kernel_refusal(kernel["id"], absent)
        if kernel["device"] == "cpu":
            without = "" if _C.build_info()["cuda"] else " (built without CUDA)"
            assert reason == f"takes cpu tensors, not cuda:{absent}{without}"
        else:  # what the runtime says of a device that is not there
            assert re.fullmatch(r"cudaDeviceGetAttribute: .+", reason)
    for device, properties in enumerate(_C.cuda_devices()):
        for kernel in _C.kernels():
            refused = _C.kernel_refusal(kernel["id"], device) != ""
            if kernel["id"].startswith("sm90a_"):
                assert refused == (properties["arch"] != 90)
            elif kernel["device"] == "cuda" and not kernel["id"].endswith("_e4m3"):
                assert refused == (properties["arch"] < 80)
    with pytest.raises(ValueError, match=r"^kernel_refusal: id: expected one of kernels"):
        _C.kernel_refusal("no_such_kernel", 0)


def test_layout_constants():
    assert _C.INDEXER_SCALE_BYTES == 4
    assert _C.MLA_V4_PAGE_STRIDE_ALIGN == 576
    v32 = {"d_nope": 512, "d_rope": 64, "d_v": 512, "group": 128, "token_bytes": 656}
    v4 = {"d_nope": 448, "d_rope": 64, "d_v": 512, "group": 64, "token_bytes": 584}
    assert v32 == _C.MLA_V32
    assert v4 == _C.MLA_V4


# ---- offsets past 2^31 ---------------------------------------------------------------------------
# Memory that is reserved and, but for a few pages, never touched.


@pytest.mark.ops("fp8_mqa_logits")
def test_logits_rows_far_apart(device):
    memory = torch.empty(FAR + 4096, dtype=BF16, device=device)
    out = memory.as_strided((2, 300), (FAR, 1))
    q, k = random_e4m3(2, 4, 32, device=device), random_e4m3(300, 32, device=device)
    args = (q, (k, odd_scales(300, device=device)), torch.randn(2, 4, device=device))
    window = (int32([0, 5], device), int32([300, 200], device))
    dsa_ext.fp8_mqa_logits(*args, *window, logits_dtype=BF16, out=out)
    expected = dsa_ext.fp8_mqa_logits(*args, *window, logits_dtype=BF16)
    assert_same_bits(out, expected)


@pytest.mark.ops("topk_select")
def test_scores_rows_and_columns_far_apart(device):
    memory = torch.empty(FAR + 4096, dtype=BF16, device=device)
    rows = memory.as_strided((2, 300), (FAR, 1))
    rows.copy_(torch.randn(2, 300))
    got = dsa_ext.topk_select(rows, 20)
    assert_same_bits(got, dsa_ext.topk_select(rows.contiguous(), 20))
    columns = memory.as_strided((1, 3), (1, FAR // 2))
    columns.copy_(torch.tensor([[1.0, 5.0, 7.0]]))
    assert dsa_ext.topk_select(columns, 2).tolist() == [[1, 2]]


@pytest.mark.ops("indexer_k_quant_and_cache", "gather_indexer_k_cache", "fp8_paged_mqa_logits")
def test_indexer_pages_far_apart(device):
    """The third page begins past 2^31 bytes."""
    stride, page_size = FAR // 2 + 64, 8
    memory = torch.empty(2 * stride + page_size * 36, dtype=torch.uint8, device=device)
    cache = memory.as_strided((3, page_size, 1, 36), (stride, 36, 36, 1))
    near = paged(3, page_size, 36, device=device)
    table = int32([[2, 0]], device)
    slots = slots_of(table, 0, torch.arange(16, device=device), page_size)
    k = torch.randn(16, 32, device=device)
    for c in (cache, near):
        dsa_ext.indexer_k_quant_and_cache(k, c, slots)
    assert_same_bits(cache[[0, 2]], near[[0, 2]])
    cu_seqlens = int32([0, 16], device)
    for a, b in zip(
        dsa_ext.gather_indexer_k_cache(cache, table, cu_seqlens, 16),
        dsa_ext.gather_indexer_k_cache(near, table, cu_seqlens, 16),
        strict=True,
    ):
        assert_same_bits(a, b)
    q, weights = random_e4m3(1, 1, 4, 32, device=device), torch.randn(1, 4, device=device)
    lens = int32([16], device)
    logits = [
        dsa_ext.fp8_paged_mqa_logits(q, c, weights, lens, table, None, 16) for c in (cache, near)
    ]
    assert_same_bits(*logits)


@pytest.mark.ops("mla_kv_quant_and_cache", "gather_mla_kv_cache", "flash_mla_with_kvcache")
@pytest.mark.parametrize("name", ["bf16", "v32", "v4"])
def test_latent_pages_far_apart(device, name):
    fmt = FORMATS[name]
    stride, page_size = FAR // 2 + 576, 4
    memory = torch.empty(2 * stride + page_size * fmt.width, dtype=fmt.dtype, device=device)
    cache = memory.as_strided((3, page_size, 1, fmt.width), (stride, fmt.width, fmt.width, 1))
    near = paged(3, page_size, fmt.width, dtype=fmt.dtype, device=device)
    table = int32([[2, 0]], device)
    slots = slots_of(table, 0, torch.arange(8, device=device), page_size)
    kv_c, k_pe = torch.randn(8, fmt.d_qk - 64).to(device, BF16), torch.randn(8, 64).to(device, BF16)
    for c in (cache, near):
        dsa_ext.mla_kv_quant_and_cache(kv_c, k_pe, c, slots)
    cu_seqlens = int32([0, 8], device)
    rows = [dsa_ext.gather_mla_kv_cache(c, table, cu_seqlens, 8) for c in (cache, near)]
    assert_same_bits(*rows)
    case = {
        "q": torch.randn(1, 1, 4, fmt.d_qk).to(device, BF16),
        "block_table": None,
        "cache_seqlens": None,
        "head_dim_v": 512,
        "is_fp8_kvcache": fmt.fp8,
        "indices": int32(slots.view(1, 1, 8), device),
    }
    far = dsa_ext.flash_mla_with_kvcache(k_cache=cache, **case)
    for a, b in zip(far, dsa_ext.flash_mla_with_kvcache(k_cache=near, **case), strict=True):
        assert_same_bits(a, b)


@pytest.mark.ops("flash_mla_sparse_fwd")
def test_latent_rows_far_apart(device):
    memory = torch.empty(FAR + 4096, dtype=BF16, device=device)
    kv = memory.as_strided((3, 1, 576), (FAR // 2, 576, 1))
    kv.copy_(torch.randn(3, 1, 576))
    q = torch.randn(1, 4, 576).to(device, BF16)
    indices = int32([[[0, 2, 1]]], device)
    got = dsa_ext.flash_mla_sparse_fwd(q, kv, indices, 0.05)
    expected = reference.flash_mla_sparse_fwd(
        q, kv.contiguous(), indices, 0.05, out_dtype=torch.float32
    )
    assert_close(got[0], expected[0], DECODE_TOLERANCE)
    assert_lse_close(got[2], expected[2])


def test_slots_past_int32(tmp_path):
    """A cache of more than 2^31 slots, in a file with a hole: int64 slots are used whole."""
    pages = FAR + 8
    memory = torch.from_file(str(tmp_path / "cache"), shared=True, size=2 * pages, dtype=BF16)
    cache = memory.view(pages, 1, 1, 2)
    slots = torch.tensor([FAR + 5, FAR + 8, 5, 2**32 + 5])
    kv_c, k_pe = torch.randn(4, 1).to(BF16), torch.randn(4, 1).to(BF16)
    dsa_ext.mla_kv_quant_and_cache(kv_c, k_pe, cache, slots)
    rows = torch.cat([kv_c, k_pe], 1)
    assert_same_bits(cache[FAR + 5, 0], rows[:1])
    assert_same_bits(cache[5, 0], rows[2:3])
    assert (cache[FAR + 6 :] == 0).all()
    assert (cache[:5] == 0).all()


@pytest.mark.ops("fp8_paged_mqa_logits")
def test_contexts_past_int32(device):
    """A table of pages that spans more than 2^31 tokens: lengths are compared as int64."""
    page_size = 2**20
    page = poison(torch.empty(1, page_size * 36, dtype=torch.uint8, device=device))
    cache = page.as_strided((1, page_size, 1, 36), (page_size * 36, 36, 36, 1))
    tokens = torch.arange(40, device=device)
    put_indexer_keys(
        cache, tokens, random_e4m3(40, 32, device=device), odd_scales(40, device=device)
    )
    table = int32(torch.full((1, 4096), -1), device)
    table[0, 0] = 0
    q, weights = random_e4m3(1, 1, 4, 32, device=device), torch.randn(1, 4, device=device)
    args = (q, cache, weights, int32([2**31 - 1], device), table, None, 40)
    got = dsa_ext.fp8_paged_mqa_logits(*args)
    assert torch.isfinite(got).all()
    assert_same_bits(bits(got), bits(dsa_ext.fp8_paged_mqa_logits(*args, clean_logits=True)))


@pytest.mark.ops("flash_mla_with_kvcache")
def test_caches_of_more_slots_than_int32(device):
    """Slots up to INT_MAX are inside such a cache; none is negative by overflow."""
    fmt = FORMATS["v32"]
    one = latent_cache(fmt, 1, 1, torch.arange(1), device=device)
    cache = one.expand(2**31 + 8, 1, 1, 656)
    q = torch.randn(1, 1, 2, 576).to(device, BF16)
    case = {
        "q": q,
        "block_table": None,
        "cache_seqlens": None,
        "head_dim_v": 512,
        "is_fp8_kvcache": True,
    }
    far = dsa_ext.flash_mla_with_kvcache(
        k_cache=cache, indices=int32([[[2**31 - 1, -1]]], device), **case
    )
    near = dsa_ext.flash_mla_with_kvcache(k_cache=one, indices=int32([[[0]]], device), **case)
    for a, b in zip(far, near, strict=True):
        assert_same_bits(a, b)

# SPDX-License-Identifier: Apache-2.0
from typing import TypedDict

class BuildInfo(TypedDict):
    version: str
    compiler: str
    torch: str
    cpu_isa: str
    cuda: str | None
    cuda_archs: str | None

class CudaDevice(TypedDict):
    name: str
    arch: int
    num_sms: int

class Kernel(TypedDict):
    op: str
    id: str
    device: str
    takes: str

class MlaLayout(TypedDict):
    d_nope: int
    d_rope: int
    d_v: int
    group: int
    token_bytes: int

MAX_WORKSPACE_BYTES: int
INDEXER_SCALE_BYTES: int
MLA_V32: MlaLayout
MLA_V4: MlaLayout
MLA_V4_PAGE_STRIDE_ALIGN: int

def build_info() -> BuildInfo: ...
def cuda_devices() -> list[CudaDevice]: ...
def kernels() -> list[Kernel]: ...
def kernel_refusal(id: str, device: int) -> str: ...

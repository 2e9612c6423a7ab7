# SPDX-License-Identifier: Apache-2.0
"""``python -m dsa_ext``: a report of this installation, for bug threads.

``--matrix`` prints the kernels alone, as the Markdown table of README.md.
"""

from __future__ import annotations

import argparse
import os
import platform

import torch

import dsa_ext
from dsa_ext import _C


def _where(kernel: _C.Kernel) -> str:
    """Say whether a kernel can run on this machine."""
    if kernel["device"] == "cpu":
        return "yes"
    refusals = [_C.kernel_refusal(kernel["id"], i) for i in range(len(_C.cuda_devices()))]
    if not refusals:
        return "no: no CUDA device"
    return "yes" if "" in refusals else f"no: {refusals[0]}"


def _devices() -> str:
    """Name the CUDA devices, or say why this build sees none."""
    found = [f"{d['name']} (SM{d['arch']}, {d['num_sms']} SMs)" for d in _C.cuda_devices()]
    cuda = [kernel["id"] for kernel in _C.kernels() if kernel["device"] == "cuda"]
    why = f" ({_C.kernel_refusal(cuda[0], 0)})" if cuda and not found else ""
    return ", ".join(found) or f"none visible{why}"


def report() -> str:
    """Return versions, devices, and every kernel with whether it can run here."""
    info = _C.build_info()
    cuda = f"{info['cuda']} (archs {info['cuda_archs']})" if info["cuda"] else "not built"
    settings = [f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith("DSA_")]
    kernels = [(k, _where(k)) for k in sorted(_C.kernels(), key=lambda k: k["op"])]
    width = max(len(where) for where in ("runs here", *(w for _, w in kernels)))
    lines = [
        f"dsa_ext      {dsa_ext.__version__}",
        f"python       {platform.python_version()} on {platform.platform()}",
        f"torch        {torch.__version__} (built with {info['torch']}, stable ABI 2.11)",
        f"compiler     {info['compiler']}",
        f"CPU          {info['cpu_isa']} kernels, {torch.get_num_threads()} threads",
        f"CUDA build   {cuda}",
        f"CUDA devices {_devices()}",
        f"settings     {' '.join(settings) or 'none (DSA_LOG, DSA_FORCE_KERNEL, DSA_CPU_ISA)'}",
        "",
        f"{'op':32} {'kernel':36} {'runs here':{width}}  takes",
    ]
    lines += [f"{k['op']:32} {k['id']:36} {where:{width}}  {k['takes']}" for k, where in kernels]
    return "\n".join(lines)


def matrix() -> str:
    """Return the kernels of this build as a Markdown table, best first for each op."""
    rows = [f"| `{k['op']}` | `{k['id']}` | {k['takes']} |" for k in _C.kernels()]
    return "\n".join(["| op | kernel | takes |", "| --- | --- | --- |", *rows])


def main() -> None:
    """Print what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m dsa_ext", description=report.__doc__)
    parser.add_argument("--matrix", action="store_true", help="the kernels as a Markdown table")
    print(matrix() if parser.parse_args().matrix else report())


if __name__ == "__main__":
    main()

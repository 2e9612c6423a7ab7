# SPDX-License-Identifier: Apache-2.0
"""Train a small byte-level language model with DSA in every layer, then serve it.

The text is the Python standard library's source. A model trained with dense attention branches
into four, which get the same further updates on the same batches and differ in what a query reads:
everything (dense), the k tokens its indexer picks (DSA, after a warm-up of the indexer alone), the
k most recent (sliding window), or k at random. The DSA model is then served from a paged FP8 cache
by the compiled ops: quantise, paged logits, top-k, sparse attention.

    python examples/byte_lm.py [--quick] [--out DIR] [--seed N]
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

# Read when torch loads OpenMP: threads that wait sleep soon, so that shared cores do not thrash.
os.environ["GOMP_SPINCOUNT"] = os.environ.get("GOMP_SPINCOUNT", "3000")

import torch

from demo.data import load_corpus
from demo.model import ByteLM
from demo.report import Quality, Serving, draw, print_cache, print_quality, print_serving
from demo.serve import generate, serve
from demo.train import Attention, Trainer, bits
from dsa_ext import _C
from dsa_ext.nn import DSAConfig


@dataclass(frozen=True)
class Plan:
    """Sizes of a run. Each branch takes ``branch`` steps after the trunk's."""

    length: int = 256
    batch: int = 8
    trunk: int = 440
    warm_up: int = 40
    branch: int = 70
    held_out: int = 96  # windows
    requests: int = 16
    chunk: int = 100
    prompt: int = 96
    generated: int = 160


QUICK = Plan(
    length=64, batch=2, trunk=3, warm_up=2, branch=2, held_out=4, requests=2, chunk=20, prompt=16,
    generated=8,
)  # fmt: skip


def model_config(plan: Plan) -> DSAConfig:
    """0.9M parameters in two layers; latent and RoPE have the widths of V3.2's FP8 layout."""
    return DSAConfig(
        dim=128,
        n_heads=4,
        q_lora_rank=64,
        kv_lora_rank=512,
        qk_nope_head_dim=32,
        qk_rope_head_dim=64,
        v_head_dim=32,
        index_n_heads=4,
        index_head_dim=64,
        index_topk=plan.length // 8,
        max_seq_len=plan.length,
    )


def train(plan: Plan, model: ByteLM, trainer: Trainer, seed: int) -> tuple[ByteLM, Quality]:
    """The dense trunk, the indexer's warm-up and the four branches; returns the DSA one."""
    speed = {}
    speed["train dense"] = trainer.run(
        "dense", model, "dense", plan.trunk, lambda at: min(1.0, 0.05 + 20 * at), seed=seed
    )
    speed["warm up the indexer"] = trainer.run(
        "indexer warm-up", model, "dense", plan.warm_up, lambda at: 1.0,
        main=False, indexer=True, seed=seed + 1,
    )  # fmt: skip
    windows = trainer.corpus.held_out_windows(plan.held_out, plan.length)
    trained: dict[Attention, float] = {}
    sparse = model
    for kind in get_args(Attention):
        branch = copy.deepcopy(model)
        rate = trainer.run(
            f"branch: {kind}", branch, kind, plan.branch, lambda at: 1.0 - at,
            indexer=kind == "dsa", seed=seed + 2,
        )  # fmt: skip
        trained[kind] = trainer.evaluate(branch, kind, windows)
        if kind == "dsa":
            speed["train sparse"] = rate
            sparse = branch
    swapped = {kind: trainer.evaluate(sparse, kind, windows) for kind in trained}
    return sparse, Quality(trained, swapped, speed)


def serves_on_gpu() -> bool:
    """Whether there is a GPU of SM80 or newer and this build has a CUDA kernel for every op."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        return False
    kernels = _C.kernels()
    with_cuda = {kernel["op"] for kernel in kernels if kernel["device"] == "cuda"}
    return with_cuda == {kernel["op"] for kernel in kernels}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="where the PNG goes")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    begin = time.perf_counter()
    plan = QUICK if args.quick else Plan()
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if serves_on_gpu() else "cpu")

    corpus = load_corpus()
    config = model_config(plan)
    model = ByteLM(config, n_layers=2, hidden=384).to(device)
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters on {device}; "
        f"context {plan.length}, k = {config.index_topk}; trained on {corpus.train_files} files "
        f"({len(corpus.train) / 1e6:.1f} MB), {len(corpus.held_out_files)} held out "
        f"({len(corpus.held_out) / 1e6:.1f} MB)",
        flush=True,
    )
    trainer = Trainer(corpus, plan.batch, plan.length, config.index_topk, device)
    model, quality = train(plan, model, trainer, args.seed)

    # Windows of held-out text, each a request: once in chunks, once token by token.
    windows = corpus.held_out_windows(plan.requests, plan.length).to(device)
    tokens, targets = windows[:, :-1], windows[:, 1:]
    prefill = serve(model, tokens, plan.chunk, "chunked prefill")
    decode = serve(model, tokens, 1, "decode")
    with torch.no_grad():
        unquantised = model(tokens, sparse=True)
    serving = Serving(
        tokens=tokens.numel(),
        decode_bits=bits(decode.logits, targets).mean().item(),
        unquantised_bits=bits(unquantised.logits, targets).mean().item(),
        decode_to_prefill=(decode.logits - prefill.logits).abs().max().item(),
        decode_to_unquantised=(decode.logits - unquantised.logits).abs().max().item(),
        speed={"chunked prefill": prefill.rate, "decode": decode.rate},
    )
    shown = plan.requests // 2
    prompt = windows[shown, : plan.prompt]
    text = generate(model, prompt, plan.generated, temperature=0.5, seed=args.seed)

    print_quality(quality, config.index_topk, plan.length)
    print_serving(serving, quality)
    print_cache(config, plan.length)
    print(f"\nit continues {bytes(prompt.tolist())[-40:]!r} with\n{text.decode(errors='replace')}")
    picture = args.out / "byte_lm.png"
    selected = [layer[shown].cpu() for layer in unquantised.selected]
    draw(picture, bytes(tokens[shown].tolist()), selected, quality)
    print(f"\npicture: {picture.resolve()}\n{time.perf_counter() - begin:.0f} s in all")


if __name__ == "__main__":
    main()

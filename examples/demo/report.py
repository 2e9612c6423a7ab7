# SPDX-License-Identifier: Apache-2.0
"""What the demo prints and draws."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from torch import Tensor

from demo.train import Attention
from dsa_ext.nn import DSAConfig, PagedCache

NAMES: dict[Attention, str] = {
    "dense": "dense",
    "dsa": "DSA",
    "window": "sliding window",
    "random": "random choice",
}
COLUMNS = 32  # characters a line of the drawn text


@dataclass(frozen=True)
class Quality:
    """Held-out bits/byte, and tokens/s of the training stages."""

    trained: dict[Attention, float]  # each branch under its own attention
    swapped: dict[Attention, float]  # the DSA branch made to read otherwise
    speed: dict[str, float]


@dataclass(frozen=True)
class Serving:
    """Held-out bits/byte through the FP8 cache, largest differences of logits, tokens/s."""

    tokens: int
    decode_bits: float
    unquantised_bits: float
    decode_to_prefill: float
    decode_to_unquantised: float
    speed: dict[str, float]


def print_quality(quality: Quality, k: int, length: int) -> None:
    dense = quality.trained["dense"]
    rows = [
        [
            NAMES[kind],
            f"{ours:.4f}",
            f"{ours / dense - 1:+.2%}",
            f"{quality.swapped[kind]:.4f}",
        ]
        for kind, ours in quality.trained.items()
    ]
    print(f"\nheld-out bits/byte; all but dense read k = {k} of up to {length} tokens (1/8)")
    print(table(["", "trained so", "vs dense", "DSA's weights reading so"], rows))


def print_serving(serving: Serving, quality: Quality) -> None:
    print(
        f"\nserved from the FP8 cache over {serving.tokens} held-out bytes: "
        f"{serving.decode_bits:.4f} bits/byte (training path: {serving.unquantised_bits:.4f})\n"
        "largest difference of logits, cached decode to chunked prefill: "
        f"{serving.decode_to_prefill:.1e} (to the training path: "
        f"{serving.decode_to_unquantised:.1e})\n\ntokens/s"
    )
    speed = quality.speed | serving.speed
    print(table(list(speed), [[f"{rate:,.0f}" for rate in speed.values()]]))


def print_cache(config: DSAConfig, context: int) -> None:
    v32 = DSAConfig()
    here, there = cache_bytes(config), cache_bytes(v32)
    rows = [[name, *(f"{c[name]}" if c[name] else "-" for c in (here, there))] for name in here]
    print("\ncache bytes a token and layer")
    print(table(["", "this model", "DeepSeek-V3.2"], rows))
    print("cache bytes that a decode step reads, against reading every FP8 latent")
    for name, shape, length in (("this model", config, context), ("V3.2", v32, 128 * 1024)):
        index, latents = share_read(shape, length)
        print(
            f"  {name} at {length} tokens: {index + latents:.1%} "
            f"(all index keys {index:.1%}, {shape.index_topk} latents {latents:.1%})"
        )


def cache_bytes(config: DSAConfig) -> dict[str, int | None]:
    """Bytes a token and layer; 16-bit values unless it says FP8."""
    head = 2 * (config.qk_head_dim + config.v_head_dim)
    fp8 = PagedCache(config, n_layers=1, n_pages=1, layout="v32_fp8")
    return {
        "MHA": config.n_heads * head,
        "GQA-8": 8 * head if config.n_heads >= 8 else None,
        "MQA": head,
        "MLA bf16": 2 * config.latent_dim,
        "MLA FP8 + index": fp8.latent_bytes_per_token + fp8.index_bytes_per_token,
    }


def share_read(config: DSAConfig, context: int) -> tuple[float, float]:
    """What a step reads of index keys and of latents, over the bytes of all latents."""
    fp8 = PagedCache(config, n_layers=1, n_pages=1, layout="v32_fp8")
    index = fp8.index_bytes_per_token / fp8.latent_bytes_per_token
    return index, min(config.index_topk, context) / context


def table(header: list[str], rows: list[list[str]]) -> str:
    """Columns to the right; the first, if it has no heading, holds names: to the left."""
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  "
        + "  ".join(
            cell.ljust(width) if i == 0 and not header[0] else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def draw(path: Path, text: bytes, selected: list[Tensor], quality: Quality) -> None:
    """Save the picture: each layer's selection, bits/byte, and three queries over the text.

    text has S bytes; selected holds bool [S (query), S (key)] for each of two layers.
    """
    figure = plt.figure(figsize=(15, 9), layout="constrained")
    grid = figure.add_gridspec(2, 3, height_ratios=(4, 3))
    for layer, chosen in enumerate(selected):
        axes = figure.add_subplot(grid[0, layer])
        axes.imshow(chosen.numpy(), cmap="Greys", interpolation="nearest")
        axes.set(title=f"layer {layer}: what each query reads", xlabel="key", ylabel="query")
    axes = figure.add_subplot(grid[0, 2])
    colours = ["C0" if kind == "dsa" else "0.6" for kind in quality.trained]
    bars = axes.barh(
        [NAMES[kind] for kind in quality.trained], list(quality.trained.values()), color=colours
    )
    axes.bar_label(bars, fmt="%.3f", padding=3)
    axes.invert_yaxis()
    axes.set(title="held-out bits/byte", xlim=(0, 1.2 * max(quality.trained.values())))
    for column, share in enumerate((0.55, 0.75, 0.95)):
        draw_text(figure.add_subplot(grid[1, column]), text, selected, int(share * len(text)))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_text(axes: Axes, text: bytes, selected: list[Tensor], query: int) -> None:
    """The text up to a query, each byte shaded by how many layers read it."""
    for position in range(query + 1):
        row, column = divmod(position, COLUMNS)
        read = sum(int(chosen[query, position]) for chosen in selected) / len(selected)
        colour, alpha = ("C3", 1.0) if position == query else ("C0", 0.6 * read)
        axes.add_patch(Rectangle((column, row), 1, 1, color=colour, alpha=alpha, linewidth=0))
        code = text[position]
        letter = chr(code) if 32 <= code < 127 else "\u21b5" if code == 10 else "\u00b7"
        axes.text(column + 0.5, row + 0.5, letter, ha="center", va="center", fontsize=8)
    axes.set(xlim=(0, COLUMNS), ylim=(-(-len(text) // COLUMNS), 0), xticks=[], yticks=[])
    axes.set_title(f"query {query} (red) reads: light in one layer, dark in both", fontsize=10)

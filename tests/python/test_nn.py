# SPDX-License-Identifier: Apache-2.0
"""dsa_ext.nn: RoPE, the layer's training path, the paged cache, and serving against training."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dsa_ext.nn import (
    CacheFullError,
    DSAConfig,
    DSAttention,
    PagedCache,
    apply_rope,
    rope_angles,
    rope_frequencies,
    top_k_mask,
)

CPU = torch.device("cpu")
SMALL = DSAConfig(
    dim=48,
    n_heads=3,
    q_lora_rank=32,
    kv_lora_rank=64,
    qk_nope_head_dim=16,
    qk_rope_head_dim=32,
    v_head_dim=24,
    index_n_heads=2,
    index_head_dim=64,
    index_topk=8,
    max_seq_len=256,
)
LAYOUTS = {  # layout: a config whose latent it takes, tolerance of one layer's output
    "bf16": (dataclasses.replace(SMALL, kv_lora_rank=128, qk_rope_head_dim=64), 0.01),
    "v32_fp8": (dataclasses.replace(SMALL, kv_lora_rank=512, qk_rope_head_dim=64), 0.05),
    "v4_fp8": (dataclasses.replace(SMALL, kv_lora_rank=448, qk_rope_head_dim=64), 0.05),
}
SERVING = pytest.mark.ops(
    "hadamard_transform",
    "per_token_cast_to_fp8",
    "indexer_k_quant_and_cache",
    "mla_kv_quant_and_cache",
    "get_paged_mqa_logits_metadata",
    "fp8_paged_mqa_logits",
    "topk_select",
    "flash_mla_with_kvcache",
)


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).detach().norm() / expected.detach().norm())


# ---- RoPE ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("offset", [0, 3, 6])
def test_rope_rotates_pairs(interleaved, offset):
    pairs, width = 5, 16
    x, angles = torch.randn(4, width), torch.randn(4, pairs)
    expected = x.clone()
    for row in range(4):
        for i in range(pairs):
            first, second = (2 * i, 2 * i + 1) if interleaved else (i, i + pairs)
            a, b = float(x[row, offset + first]), float(x[row, offset + second])
            angle = float(angles[row, i])
            expected[row, offset + first] = a * math.cos(angle) - b * math.sin(angle)
            expected[row, offset + second] = b * math.cos(angle) + a * math.sin(angle)
    actual = apply_rope(x, angles, interleaved=interleaved, offset=offset)
    torch.testing.assert_close(actual, expected)


def test_rope_scores_depend_on_distance_only():
    q, k = torch.randn(SMALL.qk_rope_head_dim), torch.randn(SMALL.qk_rope_head_dim)
    for interleaved in (False, True):

        def score(at_q, at_k, interleaved=interleaved):
            angles = rope_angles(SMALL, torch.tensor([at_q, at_k]))
            both = apply_rope(torch.stack((q, k)), angles, interleaved=interleaved)
            return float(both[0] @ both[1])

        assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-4)
        assert score(9, 4) != pytest.approx(score(9, 5), abs=1e-3)


def test_rope_keeps_dtype_and_names_a_wrong_offset():
    x, angles = torch.randn(2, 8, dtype=torch.bfloat16), torch.randn(2, 3)
    assert apply_rope(x, angles, interleaved=True, offset=2).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"offset: expected 0 <= offset <= 2 .* got 3"):
        apply_rope(x, angles, interleaved=True, offset=3)


@pytest.mark.parametrize(("where", "start"), [("first", 0), ("last", 32), (7, 7)])
def test_indexer_rope_offset(where, start):
    config = dataclasses.replace(SMALL, index_rope_offset=where)
    assert config.index_rope_start == start
    layer = DSAttention(config)
    x, q_latent = torch.randn(1, 6, config.dim), torch.randn(1, 6, config.q_lora_rank)
    moved = layer.indexer.project(x, q_latent, rope_angles(config, torch.arange(6) + 50))
    still = layer.indexer.project(x, q_latent, rope_angles(config, torch.zeros(6).long()))
    for a, b in ((moved.q, still.q), (moved.k, still.k)):
        changed = (a != b).flatten(0, -2).any(0).nonzero().flatten().tolist()
        assert changed == list(range(start, start + config.qk_rope_head_dim))


def test_config_errors_name_the_field():
    for field, value in (
        ("index_rope_offset", 33),
        ("index_rope_offset", "mid"),
        ("index_head_dim", 48),
        ("index_topk", 0),
        ("n_heads", -1),
        ("qk_rope_head_dim", 31),
        ("scale_fmt", "e8m0"),
    ):
        with pytest.raises(ValueError, match=f"DSAConfig: {field}: expected .* got {value!r}"):
            dataclasses.replace(SMALL, **{field: value})
    wide = r"qk_rope_head_dim: expected at most index_head_dim=64, got 66"
    with pytest.raises(ValueError, match=wide):
        dataclasses.replace(SMALL, qk_rope_head_dim=66)


def test_yarn():
    short = dataclasses.replace(SMALL, max_seq_len=4096)
    plain = rope_frequencies(short, CPU)
    pair = torch.arange(16)
    torch.testing.assert_close(plain, 10000.0 ** (-pair / 16.0))
    assert short.softmax_scale == SMALL.qk_head_dim**-0.5

    long = dataclasses.replace(SMALL, max_seq_len=4097, rope_factor=40.0, mscale=0.7)
    assert long.softmax_scale == pytest.approx(
        SMALL.qk_head_dim**-0.5 * (0.07 * math.log(40.0) + 1.0) ** 2
    )
    stretched = rope_frequencies(long, CPU)
    turns = 4096 * plain / (2 * math.pi)
    kept, slowed = turns > 32 * 2, turns < 1 / 2
    assert kept.any() and slowed.any()
    torch.testing.assert_close(stretched[kept], plain[kept])
    torch.testing.assert_close(stretched[slowed], plain[slowed] / 40)
    ratio = stretched / plain
    assert (ratio.diff() <= 1e-6).all() and ratio.max() <= 1 + 1e-6 and ratio.min() >= 1 / 40 - 1e-6


# ---- training path -------------------------------------------------------------------------------


def test_state_dict_names():
    assert {name: tuple(t.shape) for name, t in DSAttention(SMALL).state_dict().items()} == {
        "wq_a.weight": (32, 48),
        "q_norm.weight": (32,),
        "wq_b.weight": (3 * 48, 32),
        "wkv_a.weight": (64 + 32, 48),
        "kv_norm.weight": (64,),
        "wkv_b.weight": (3 * 40, 64),
        "wo.weight": (48, 3 * 24),
        "indexer.wq_b.weight": (2 * 64, 32),
        "indexer.wk.weight": (64, 48),
        "indexer.k_norm.weight": (64,),
        "indexer.k_norm.bias": (64,),
        "indexer.weights_proj.weight": (2, 48),
    }


def test_dense_attention_is_mla():
    """Against the definition, head by head and query by query."""
    layer, seq = DSAttention(SMALL).double(), 7
    x = torch.randn(1, seq, SMALL.dim).double()
    angles = rope_angles(SMALL, torch.arange(seq))
    q = layer.wq_b(layer.q_norm(layer.wq_a(x)))[0].view(seq, 3, 48)
    latent, k_rope = layer.wkv_a(x)[0].split([64, 32], dim=-1)
    kv = layer.wkv_b(layer.kv_norm(latent)).view(seq, 3, 40)
    k_rope = apply_rope(k_rope, angles, interleaved=True)
    rows = []
    for t in range(seq):
        heads = []
        for h in range(3):
            q_rope = apply_rope(q[t, h, 16:], angles[t], interleaved=True)
            logits = kv[: t + 1, h, :16] @ q[t, h, :16] + k_rope[: t + 1] @ q_rope
            heads.append((logits / math.sqrt(48)).softmax(0) @ kv[: t + 1, h, 16:])
        rows.append(torch.cat(heads))
    expected = layer.wo(torch.stack(rows)).unsqueeze(0)
    torch.testing.assert_close(layer(x, sparse=False).out, expected, rtol=1e-5, atol=1e-6)
    explicit = layer(x, sparse=False, index_loss=True).out
    torch.testing.assert_close(explicit, expected, rtol=1e-5, atol=1e-6)


def test_sparse_equals_dense_when_k_covers_the_context():
    layer = DSAttention(dataclasses.replace(SMALL, index_topk=20))
    x = torch.randn(2, 20, SMALL.dim)
    sparse = layer(x, sparse=True, index_loss=True)
    dense = layer(x, sparse=False, index_loss=True)
    torch.testing.assert_close(sparse.out, dense.out)
    torch.testing.assert_close(sparse.index_loss, dense.index_loss)


def test_sparse_attends_to_the_indexers_choice():
    layer, x = DSAttention(SMALL), torch.randn(2, 40, SMALL.dim)
    result = layer(x, sparse=True)
    counts = (torch.arange(40) + 1).clamp(max=SMALL.index_topk)
    assert torch.equal(result.selected.sum(-1), counts.expand(2, 40))
    assert not result.selected.triu(1).any()
    torch.testing.assert_close(result.out, layer(x, sparse=False, mask=result.selected).out)

    angles = rope_angles(SMALL, torch.arange(40)).unsqueeze(0)
    q, k, weights = layer.indexer.project(x, layer.q_norm(layer.wq_a(x)), angles)
    scores = torch.zeros(2, 40, 40)
    for head in range(SMALL.index_n_heads):
        scores += weights[..., head, None] * (q[:, :, head] @ k.transpose(1, 2)).relu()
    causal = torch.ones(40, 40).tril().bool()
    expected = top_k_mask(scores.masked_fill(~causal, -torch.inf), SMALL.index_topk) & causal
    assert torch.equal(result.selected, expected)


def test_mask_narrows_both_modes():
    layer, x = DSAttention(SMALL), torch.randn(1, 30, SMALL.dim)
    position = torch.arange(30)
    window = ((position.unsqueeze(1) - position) < 12).unsqueeze(0)
    out = layer(x, sparse=False, mask=window).out
    torch.testing.assert_close(out[:, :12], layer(x, sparse=False).out[:, :12])
    assert relative(out[:, 12:], layer(x, sparse=False).out[:, 12:]) > 1e-3
    assert not (layer(x, sparse=True, mask=window).selected & ~window).any()


@pytest.mark.parametrize("index_loss", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
def test_a_query_that_sees_nothing_gives_zeros(sparse, index_loss):
    """And finite derivatives, on their whole way back."""
    layer = DSAttention(SMALL)
    x = torch.randn(1, 20, SMALL.dim, requires_grad=True)
    mask = torch.ones(20, 20, dtype=torch.bool)
    mask[[0, 7]] = False
    with torch.autograd.set_detect_anomaly(True):
        result = layer(x, sparse=sparse, index_loss=index_loss, mask=mask)
        assert not result.out[:, [0, 7]].any() and result.out[:, 1:7].all()
        loss = result.out.square().sum() + (result.index_loss if index_loss else 0)
        loss.backward()
    gradients = [p.grad for p in layer.parameters() if p.grad is not None]
    assert all(torch.isfinite(g).all() for g in (*gradients, x.grad, loss))


@pytest.mark.parametrize("sparse", [False, True])
def test_index_loss_is_the_kl_over_what_is_read(sparse):
    layer, x = DSAttention(SMALL).double(), torch.randn(1, 25, SMALL.dim).double()
    result = layer(x, sparse=sparse, index_loss=True)
    angles = rope_angles(SMALL, torch.arange(25)).unsqueeze(0)
    q, latent, k_rope, q_latent = layer._project(x, angles)
    keys = layer.wkv_b(latent).view(1, 25, 3, 40)[..., :16]
    keys = torch.cat((keys, k_rope.unsqueeze(2).expand(-1, -1, 3, -1)), -1)
    logits = torch.einsum("bqhd,bkhd->bhqk", q, keys).detach() * SMALL.softmax_scale
    scores = layer.indexer(x, q_latent, angles)[0].detach().double()
    total = 0.0
    for t in range(25):
        read = result.selected[0, t].nonzero().flatten() if sparse else torch.arange(t + 1)
        target = logits[0, :, t, read].softmax(-1).sum(0)
        target = target / target.sum()
        total += float((target * (target.log() - scores[t, read].log_softmax(-1))).sum())
    assert result.index_loss.item() == pytest.approx(total / 25, rel=1e-4)


def test_gradients_do_not_mix():
    layer = DSAttention(SMALL)
    x = torch.randn(2, 32, SMALL.dim, requires_grad=True)
    indexer = dict(layer.indexer.named_parameters(prefix="indexer"))

    result = layer(x, sparse=True, index_loss=True)
    result.index_loss.backward(retain_graph=True)
    assert x.grad is None
    for name, p in layer.named_parameters():
        assert (p.grad is not None and p.grad.any()) == (name in indexer), name

    layer.zero_grad()
    result.out.square().sum().backward()
    assert x.grad.any()
    for name, p in layer.named_parameters():
        assert (p.grad is not None and p.grad.any()) == (name not in indexer), name


def test_warm_up_teaches_the_indexer_alone():
    layer, x = DSAttention(SMALL), torch.randn(4, 48, SMALL.dim)
    with torch.no_grad():
        layer.wq_b.weight.mul_(4)  # an attention that has something to teach
    before = {name: p.clone() for name, p in layer.named_parameters()}
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = layer(x, sparse=False, index_loss=True).index_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    for name, p in layer.named_parameters():
        assert torch.equal(p, before[name]) == (not name.startswith("indexer.")), name


# ---- PagedCache ----------------------------------------------------------------------------------


def test_append_says_where_tokens_go():
    cache = PagedCache(LAYOUTS["bf16"][0], n_layers=2, n_pages=6, page_size=4, layout="bf16")
    cache.allocate("a")
    cache.allocate("b")
    cache.append(["a"], 5)
    step = cache.append(["a", "b"], 3)
    assert step.context_lens.tolist() == [8, 3] and step.max_context_len == 8
    assert step.positions.tolist() == [[5, 6, 7], [0, 1, 2]]
    assert step.visible_lens.tolist() == [[6, 7, 8], [1, 2, 3]]
    (first, second), (third, padding) = step.block_table.tolist()
    assert padding == -1 and len({first, second, third}) == 3
    expected = [second * 4 + i for i in (1, 2, 3)] + [third * 4 + i for i in range(3)]
    assert step.slot_mapping.tolist() == expected
    assert cache.free_pages == 3 and cache.length("a") == 8
    assert torch.equal(cache.block_table(["a", "b"]), step.block_table)
    assert torch.equal(cache.context_lens(["b"]), step.context_lens[1:])


def test_pages_come_back_and_run_out():
    cache = PagedCache(LAYOUTS["bf16"][0], n_layers=1, n_pages=3, page_size=4, layout="bf16")
    cache.allocate(1)
    cache.allocate(2)
    cache.append([1], 4)
    with pytest.raises(CacheFullError, match=r"append needs 4 pages, 2 of 3 are free"):
        cache.append([1, 2], 5)
    assert cache.free_pages == 2 and cache.length(1) == 4 and cache.length(2) == 0
    held = set(cache.block_table([1]).flatten().tolist())
    cache.free(1)
    assert cache.free_pages == 3
    step = cache.append([2], 12)
    assert held < set(step.block_table.flatten().tolist()) == {0, 1, 2}


def test_cache_errors():
    config = LAYOUTS["bf16"][0]
    cache = PagedCache(config, n_layers=1, n_pages=2, page_size=4, layout="bf16")
    cache.allocate(1)
    with pytest.raises(ValueError, match="request 1 is already allocated"):
        cache.allocate(1)
    cache.free(1)
    for act in (
        cache.free,
        cache.length,
        lambda r: cache.append([r], 1),
        lambda r: cache.block_table([r]),
    ):
        with pytest.raises(ValueError, match=r"request 1 is not allocated \(or was freed\)"):
            act(1)
    cache.allocate(1)
    for requests, count in (([1, 1], 1), ([1], 0), ([], 1)):
        with pytest.raises(ValueError, match=r"expected distinct requests and n_tokens >= 1"):
            cache.append(requests, count)
    cache.allocate("1")
    for act in (lambda r: cache.append(r, 1), cache.block_table, cache.context_lens):
        with pytest.raises(ValueError, match=r"requests: expected a list of them, got '11'"):
            act("11")
    assert cache.length("1") == 0
    with pytest.raises(ValueError, match=r"layout: expected kv_lora_rank 512 .* got 128 and 64"):
        PagedCache(config, n_layers=1, n_pages=1, layout="v32_fp8")
    with pytest.raises(ValueError, match=r"layout: expected one of v32_fp8, .* got 'fp8'"):
        PagedCache(config, n_layers=1, n_pages=1, layout="fp8")
    sizes = {"n_layers": 1, "n_pages": 1, "page_size": 1}
    for name in sizes:
        with pytest.raises(ValueError, match=f"PagedCache: {name}: expected at least 1, got 0"):
            PagedCache(config, layout="bf16", **sizes | {name: 0})


def test_cache_bytes():
    for layout, latent in (("bf16", 2 * 192), ("v32_fp8", 656), ("v4_fp8", 584)):
        cache = PagedCache(LAYOUTS[layout][0], n_layers=3, n_pages=2, page_size=5, layout=layout)
        assert (cache.latent_bytes_per_token, cache.index_bytes_per_token) == (latent, 68)
        assert len(cache.layers) == 3
        assert cache.layers[0].index_keys.shape == (2, 5, 1, 68)
    assert cache.layers[0].latent.stride(0) % 576 == 0


# ---- serving -------------------------------------------------------------------------------------


def poisoned(config, layout, device, n_pages=24, page_size=16) -> PagedCache:
    """A cache whose unwritten bytes decode to NaN."""
    cache = PagedCache(config, 1, n_pages, page_size=page_size, layout=layout, device=device)
    for pages in cache.layers:
        pages.latent.view(torch.uint8).fill_(0xFF)
        pages.index_keys.fill_(0xFF)
    return cache


def feed(layer, cache, requests, x, chunks, sparse=True) -> torch.Tensor:
    """Run x [B, S, dim] through the cache in chunks of the given sizes."""
    parts = []
    for part in x.split(chunks, dim=1):
        step = cache.append(requests, part.shape[1])
        parts.append(layer.forward_cached(part, cache.layers[0], step, sparse=sparse))
    return torch.cat(parts, dim=1)


@SERVING
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dense_serving_matches_training(device, layout):
    config, tolerance = LAYOUTS[layout]
    layer, x = DSAttention(config).to(device), torch.randn(2, 70, config.dim, device=device)
    cache = poisoned(config, layout, device)
    cache.allocate("a")
    cache.allocate("b")
    served = feed(layer, cache, ["a", "b"], x, [1, 33, 20, 16], sparse=False)
    assert relative(served, layer(x, sparse=False).out) < tolerance


@SERVING
@pytest.mark.parametrize("scale_fmt", ["fp32", "ue8m0"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sparse_serving_matches_training(device, layout, scale_fmt):
    config, tolerance = LAYOUTS[layout]
    config = dataclasses.replace(config, scale_fmt=scale_fmt)
    layer, x = DSAttention(config).to(device), torch.randn(2, 64, config.dim, device=device)
    cache = poisoned(config, layout, device)
    cache.allocate("a")
    cache.allocate("b")
    served = feed(layer, cache, ["a", "b"], x, [64])

    # The choice, as slots of the same pages, mapped back to positions.
    again = poisoned(config, layout, device)
    again.allocate("a")
    again.allocate("b")
    step = again.append(["a", "b"], 64)
    angles = rope_angles(config, step.positions)
    q_latent = layer._project(x, angles)[-1]
    slots = layer.indexer.select_cached(x, q_latent, angles, again.layers[0], step).long()
    slot_of_key = step.slot_mapping.view(2, 1, 64, 1)
    selected = (slots.unsqueeze(2) == slot_of_key).any(-1)  # [B, query, key]
    counts = (torch.arange(64, device=device) + 1).clamp(max=config.index_topk)
    assert torch.equal(selected.sum(-1), counts.expand(2, 64))

    assert relative(served, layer(x, sparse=False, mask=selected).out) < tolerance
    trained = layer(x, sparse=True).selected
    assert (selected & trained).sum() > 0.9 * trained.sum()


@SERVING
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sparse_equals_dense_serving_when_k_covers_the_context(device, layout):
    config, _ = LAYOUTS[layout]
    layer = DSAttention(dataclasses.replace(config, index_topk=64)).to(device)
    x = torch.randn(1, 50, config.dim, device=device)
    outs = []
    for sparse in (True, False):
        cache = poisoned(config, layout, device)
        cache.allocate(0)
        outs.append(feed(layer, cache, [0], x, [30, 20], sparse))
    torch.testing.assert_close(outs[0], outs[1], rtol=0, atol=2e-3)


@SERVING
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_decode_equals_chunked_prefill(device, layout, sparse):
    config, _ = LAYOUTS[layout]
    layer, x = DSAttention(config).to(device), torch.randn(2, 40, config.dim, device=device)
    outs = []
    for chunks in ([40], [17, 16, 7], [1] * 40):
        cache = poisoned(config, layout, device)
        cache.allocate("a")
        cache.allocate("b")
        outs.append(feed(layer, cache, ["a", "b"], x, chunks, sparse))
    torch.testing.assert_close(outs[1], outs[0], rtol=0, atol=2e-3)
    torch.testing.assert_close(outs[2], outs[0], rtol=0, atol=2e-3)


@SERVING
def test_bf16_parameters(device):
    config, _ = LAYOUTS["v32_fp8"]
    layer = DSAttention(config).to(device)
    x = torch.randn(1, 50, config.dim, device=device)
    expected = layer(x, sparse=False).out
    layer, x = layer.bfloat16(), x.bfloat16()
    trained = layer(x, sparse=True, index_loss=True)
    assert trained.out.dtype == torch.bfloat16 and trained.index_loss.isfinite()
    assert relative(layer(x, sparse=False).out.float(), expected) < 0.03
    cache = poisoned(config, "v32_fp8", device)
    cache.allocate(0)
    assert relative(feed(layer, cache, [0], x, [50], sparse=False).float(), expected) < 0.06


@SERVING
def test_requests_of_different_lengths_and_reused_pages(device):
    """A request's result is the same alone, beside another, and on pages another left behind."""
    config, _ = LAYOUTS["v32_fp8"]
    layer = DSAttention(config).to(device)
    a, b = torch.randn(2, 1, 60, config.dim, device=device)
    alone = poisoned(config, "v32_fp8", device)
    alone.allocate("b")
    expected = feed(layer, alone, ["b"], b[:, :30], [20] + [1] * 10)

    shared = poisoned(config, "v32_fp8", device, n_pages=6)
    for request in ("old", "a", "b"):
        shared.allocate(request)
    feed(layer, shared, ["old"], a, [60])
    shared.free("old")
    feed(layer, shared, ["a"], a[:, :50], [50])
    first = feed(layer, shared, ["b"], b[:, :20], [20])
    both = torch.cat((a[:, 50:], b[:, 20:30]))
    then = feed(layer, shared, ["a", "b"], both, [1] * 10)
    torch.testing.assert_close(torch.cat((first, then[1:]), 1), expected, rtol=0, atol=2e-3)


# ---- the demo ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_demo_runs(tmp_path):
    script = Path(__file__).parents[2] / "examples" / "byte_lm.py"
    command = [sys.executable, str(script), "--quick", "--out", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    for said in ("sliding window", "cached decode to chunked prefill", "MLA FP8 + index"):
        assert said in done.stdout
    assert (tmp_path / "byte_lm.png").stat().st_size > 10_000

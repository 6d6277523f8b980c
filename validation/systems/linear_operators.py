"""Checks of mixers with a linear state: S4, GLA, DeltaNet, RetNet, Hydra."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hwmodels.catalogue import load_chip
from hwmodels.families import FAMILIES
from hwmodels.families.family import matrix_peak
from hwmodels.hardware import Chip
from hwmodels.mixers import MATRIX_SHARE, MEMORY_SHARE, mixer_seconds
from simcore.mixers import mixer_cost
from validation.systems.agreement import SIZES, agrees, execute_forms
from validation.systems.frame import Finding, check

Array = NDArray[np.floating[Any]]
HALF_BYTES = 2  # bf16 and fp16
TINY = SIZES["retnet"]
SETTING_TOLERANCE = 0.25  # of a ratio whose setting the paper gives but for its kernels' shares


def crossing(lengths: Array, ratios: Array, target: float) -> float | None:
    """Return where ``ratios`` first reaches ``target`` from below, interpolated in logarithms."""
    above = np.flatnonzero(ratios >= target)
    if len(above) == 0:
        return None
    i = int(above[0])
    if i == 0:
        return float(lengths[0])
    x, y = np.log(lengths), np.log(ratios)
    part = (np.log(target) - y[i - 1]) / (y[i] - y[i - 1])
    return float(np.exp(x[i - 1] + part * (x[i] - x[i - 1])))


# ------------------------------------------------------------------ G6.1


def _dense_token_seconds(batch: Array, width: float, layers: int, chip: Chip) -> Array:
    """Return one token of everything but the mixer: 12 h^2 weights a layer, 7 kernels a layer."""
    weights = 12 * width**2 * layers
    flops = 2 * weights * batch / (matrix_peak(chip, "fp16") * MATRIX_SHARE)
    moved = HALF_BYTES * weights / (chip.hbm.bytes_per_s * MEMORY_SHARE)
    return np.asarray(7 * layers * chip.launch_s + np.maximum(flops, moved))


def _generation_rate(form: str, length: float, batch: Array, sizes: dict[str, float]) -> Array:
    """Return tokens per second of ``batch`` sequences that each generate ``length`` tokens."""
    chip = load_chip("a100-sxm-80gb")
    width, layers = sizes["width"], int(sizes["layers"])
    shape: dict[str, float | Array] = {
        "batch": batch,
        "seq_len": length,
        "element_bytes": HALF_BYTES,
    }
    if form == "s4":
        cost = mixer_cost(
            "s4", "recurrent", {**shape, "channels": width, "d_state": sizes["state"]}
        )
    else:
        heads = {"heads": width / 64, "d_k": 64, "d_v": 64, "chunk": 64}
        seen = {"seq_len": length * sizes["cache_growth"]}
        cost = mixer_cost("attention", "recurrent", {**shape, **heads, **seen})
    mixing = layers * mixer_seconds(cost, chip, "fp16") / np.asarray(cost.launches) * length
    dense = length * _dense_token_seconds(batch, width, layers, chip)
    return np.asarray(batch * length / (mixing + dense))


@check("G6.1", mutant={"cache_growth": 1e-6})
def s4_generation(
    *,
    width: float = 1024,  # WikiText-103 model of the paper: 16 layers, 249M parameters
    layers: int = 16,
    state: float = 64,  # the paper's default state per channel
    speedup: float = 60,
    cache_growth: float = 1.0,
) -> Finding:
    """Each side at its best batch on an A100: where does recurrent S4 generate 60x faster?"""
    sizes = {"width": width, "layers": layers, "state": state, "cache_growth": cache_growth}
    lengths = 2.0 ** np.arange(8, 15)
    room = load_chip("a100-sxm-80gb").hbm.size_bytes - 12 * width**2 * layers * HALF_BYTES
    batches = 2.0 ** np.arange(0, 15)
    ratios, token_s = [], []
    for length in lengths:
        cache = 2 * width * layers * HALF_BYTES * max(1.0, length * cache_growth)
        fitting = np.append(batches[batches * cache <= room], np.floor(room / cache))
        transformer = _generation_rate("attention", length, fitting, sizes).max()
        s4 = _generation_rate("s4", length, batches, sizes)
        ratios.append(s4.max() / transformer)
        token_s.append(1 / s4[0])
    at = crossing(lengths, np.asarray(ratios), speedup)
    flat = max(token_s) / min(token_s) < 1.01
    agree, executed = agrees("s4")
    curve = ", ".join(f"{n:.0f}: {r:.0f}x" for n, r in zip(lengths, ratios, strict=True))
    reached = f"{speedup:g}x at {at:.0f} generated tokens" if at else f"{speedup:g}x nowhere"
    return Finding(
        at is not None and at > lengths[0] and flat and agree,
        f"{reached}; by tokens generated {curve}",
        "S4's token costs the same at any length; the cache's bytes and its share of memory grow"
        if at
        else "the cache costs too little for the published ratio at any length up to 16384",
        (
            "A100 80 GB, fp16, 16 layers of width 1024",
            "Transformer with a key-value cache, each side at the batch that gives most tokens/s",
            "both pay the same dense layers",
        ),
        executed,
    )


# ------------------------------------------------------------------ G6.2


def _gla_ratio(length: Array, sizes: dict[str, float]) -> tuple[Array, Array]:
    """Return (mixer alone, whole layer): time of GLA over that of FlashAttention-2, training.

    Backward of both mixers is 2.5 times forward (Dao 2023); of the products twice. On an A100,
    whose attention kernel in the family is FlashAttention-2.
    """
    chip = load_chip("a100-sxm-80gb")
    width, tokens = sizes["width"], sizes["tokens"]
    heads = sizes["heads"]
    gla = mixer_cost(
        "gla",
        "chunked",
        {
            "batch": tokens / length,
            "seq_len": length,
            "heads": heads,
            "d_k": width / 2 / heads,
            "d_v": width / heads,
            "chunk": sizes["chunk"],
            "element_bytes": HALF_BYTES,
        },
    )
    mixing = 3.5 * mixer_seconds(gla, chip, "bf16")
    family = FAMILIES["attention_prefill"]
    shape = {
        "batch": tokens / length,
        "seq_len": length,
        "kv_len": length,
        "heads": width / 128,
        "kv_heads": width / 128,
        "head_dim": 128.0,
        "window": 0.0,
        "kv_bytes": float(HALF_BYTES),
    }
    attention = 3.5 * sizes["attention_cost"] * family.seconds(shape, chip, "bf16", family.start())
    products = 3 * 24 * width**2 * tokens / (matrix_peak(chip, "bf16") * MATRIX_SHARE)
    return np.asarray(mixing / attention), np.asarray((mixing + products) / (attention + products))


@check("G6.2", mutant={"attention_cost": 0.1})
def gla_against_flash(
    *,
    width: float = 2048,  # the paper's 1.3B model: width 2048, 4 heads, keys half as wide
    heads: float = 4,
    chunk: float = 64,  # the paper's chunk
    tokens: float = 65536,  # of a batch, so that the longest length is one sequence
    attention_cost: float = 1.0,
) -> Finding:
    """A training layer of GLA against one of FlashAttention-2 on an A100, over lengths."""
    lengths = np.asarray([1024, 2048, 4096, 4160, 8192, 16384, 32768, 65536], dtype=np.float64)
    sizes = {
        "width": width,
        "heads": heads,
        "chunk": chunk,
        "tokens": max(tokens, 65536.0),
        "attention_cost": attention_cost,
    }
    alone, layer = _gla_ratio(lengths, sizes)
    equal = abs(layer[1] - 1) <= SETTING_TOLERANCE
    faster = bool(np.all(layer[lengths > 4096] < 1))
    same, executed = agrees("gla")
    text = ", ".join(
        f"{n:.0f}: {r:.2f} ({a:.2f} alone)" for n, r, a in zip(lengths, layer, alone, strict=True)
    )
    return Finding(
        equal and faster and same,
        f"GLA over FlashAttention-2, training layer: {text}",
        "chunked work is linear in the length, causal attention quadratic"
        if equal and faster
        else "missing: the kernels' own efficiency at small tiles and the secondary chunks of GLA",
        (
            "A100 (no chip is named), bf16, width 2048, chunk 64, all chunks' states in memory",
            "FlashAttention-2 as the attention family prices it before any fit",
            f"equal means within {SETTING_TOLERANCE:.0%}",
        ),
        executed,
    )


# ------------------------------------------------------------------ G6.3, G6.4, G6.6


@check("G6.3", mutant={"lag": 1})
def deltanet_chunks(*, lag: int = 0) -> Finding:
    """The chunked form: same output, serial depth S/C, products linear in S."""
    ran = execute_forms("deltanet", TINY, lag)
    depth = TINY["seq_len"] // TINY["chunk"]
    shape = {**TINY, "element_bytes": 2, "seq_len": np.asarray([1024.0, 2048.0, 4096.0])}
    flops = np.asarray(mixer_cost("deltanet", "chunked", shape).matrix_flops)
    linear = bool(np.allclose(flops / flops[0], [1, 2, 4]))
    steps = ran.serial_steps
    return Finding(
        ran.same and steps["chunked"] == depth and steps["recurrent"] == TINY["seq_len"] and linear,
        f"dependent steps {steps['chunked']} in chunks of {TINY['chunk']} against "
        f"{steps['recurrent']}; outputs differ by {ran.error:.0e}",
        "the product of reflections inside a chunk is one triangular solve"
        if ran.same
        else f"the forms differ by {ran.error:.0e}",
        ("float64, 16 tokens, executed on the CPU",),
        "cpu",
    )


@check("G6.4", mutant={"lag": 1})
def retnet_forms(*, lag: int = 0) -> Finding:
    """All three forms agree; a decoded token reads the same bytes at any t."""
    ran = execute_forms("retnet", TINY, lag)
    shape = {**TINY, "element_bytes": 2, "seq_len": np.asarray([16.0, 256.0, 4096.0])}
    per_token = np.asarray(mixer_cost("retnet", "recurrent", shape).hbm_bytes) / shape["seq_len"]
    constant = bool(np.allclose(per_token, per_token[0]))
    return Finding(
        ran.same and constant,
        f"three forms differ by {ran.error:.0e}; {per_token[0]:.0f} bytes a token at any length",
        "one recurrence with a constant fading factor, written three ways"
        if ran.same
        else f"the forms differ by {ran.error:.0e}",
        ("float64, 16 tokens, executed on the CPU",),
        "cpu",
    )


@check("G6.6", mutant={"directions": 1})
def hydra_scans(*, directions: int = 2) -> Finding:
    """Bidirectional mixing costs two scans that share their projections, linear in S."""
    ran = execute_forms("hydra", TINY)
    shape = {**TINY, "element_bytes": 2, "seq_len": np.asarray([1024.0, 4096.0])}
    both = mixer_cost("hydra", "chunked", shape)
    one = mixer_cost("mamba2", "chunked", shape)
    flops = np.asarray(both.matrix_flops) / np.asarray(one.matrix_flops)
    moved = np.asarray(both.hbm_bytes) / np.asarray(one.hbm_bytes)
    grows = np.asarray(both.matrix_flops)
    linear = bool(np.isclose(grows[1] / grows[0], 4))
    shared = bool(np.all(moved < 2))
    return Finding(
        ran.same and bool(np.allclose(flops, directions)) and shared and linear,
        f"{flops[0]:.2f} scans of FLOPs, {moved[0]:.2f} of bytes; forms differ by {ran.error:.0e}",
        "both directions read the same projections"
        if ran.same
        else f"the forms differ by {ran.error:.0e}",
        ("a scan is one of Mamba-2 at equal sizes", "executed in float64 on 16 tokens"),
        "cpu",
    )

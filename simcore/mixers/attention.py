"""Mixers that look at tokens by a softmax: dense, streamed, windowed, sharded, summarised."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from simcore.mixers.mixer import (
    BATCH,
    HEADS,
    Array,
    Dims,
    Form,
    Mixer,
    MixerCost,
    doubling_combines,
    doubling_levels,
)

TILE = 128  # queries of one block of a fused kernel (FlashAttention-2, head width 64 or 128)
SOFTMAX_OPS = 5  # scale, maximum, subtract and exponential, sum, divide


def _tokens(s: Dims) -> Array:
    return np.asarray(s["batch"] * s["heads"] * s["seq_len"])


def _io(s: Dims) -> Array:
    return np.asarray(2 * _tokens(s) * (s["d_k"] + s["d_v"]) * s["element_bytes"])


def _cache(s: Dims, kept: Array) -> Array:
    return np.asarray(s["batch"] * s["heads"] * kept * (s["d_k"] + s["d_v"]) * s["element_bytes"])


def _looks(keys: Callable[[Dims], Array], kept: Callable[[Dims], Array], passes: float = 1) -> Form:
    """Return one kernel in which every query looks at ``keys`` keys on average.

    ``kept``: tokens per head that decoding must cache. ``passes``: kernels.
    """

    def form(s: Dims) -> MixerCost:
        pairs = _tokens(s) * keys(s)
        return MixerCost(
            matrix_flops=2 * pairs * (s["d_k"] + s["d_v"]),
            vector_flops=SOFTMAX_OPS * pairs,
            hbm_bytes=_io(s),
            serial_depth=np.ones_like(pairs),
            launches=passes + 0 * pairs,
            state_bytes=_cache(s, kept(s)),
            on_chip_bytes=TILE * (s["d_k"] + s["d_v"] + TILE) * s["element_bytes"],
            pieces=_tokens(s) / TILE,
            l2_bytes=_io(s) + pairs / TILE * (s["d_k"] + s["d_v"]) * s["element_bytes"],
        )

    return form


def _all(s: Dims) -> Array:
    return s["seq_len"]


def _attention_parallel(s: Dims) -> MixerCost:
    """Return three kernels that leave the scores in memory: products, softmax, products."""
    base = _looks(_all, _all, 3)(s)
    scores = _tokens(s) * s["seq_len"] * s["element_bytes"]
    return replace(base, hbm_bytes=base.hbm_bytes + 4 * scores, l2_bytes=0.0)


def _attention_fused(s: Dims) -> MixerCost:
    """Return one kernel that walks over key blocks and keeps a running softmax (Dao 2022)."""
    held = (TILE + s["chunk"]) * (s["d_k"] + s["d_v"]) * s["element_bytes"]
    blocks = s["seq_len"] / s["chunk"]
    return replace(_looks(_all, _all)(s), serial_depth=blocks, on_chip_bytes=held)


def _decoding(kept_at_most: Callable[[Dims], Array]) -> Form:
    """Return a kernel per token that reads the cache so far, at most ``kept_at_most`` tokens."""

    def form(s: Dims) -> MixerCost:
        most = kept_at_most(s)
        length = s["seq_len"]
        seen = np.where(
            length <= most,
            length * (length + 1) / 2,
            most * (most + 1) / 2 + (length - most) * most,
        )
        pairs = s["batch"] * s["heads"] * seen
        return MixerCost(
            matrix_flops=2 * pairs * (s["d_k"] + s["d_v"]),
            vector_flops=SOFTMAX_OPS * pairs,
            hbm_bytes=_io(s) + pairs * (s["d_k"] + s["d_v"]) * s["element_bytes"],
            serial_depth=length,
            launches=length,
            state_bytes=_cache(s, np.minimum(length, most)),
            on_chip_bytes=TILE * (s["d_k"] + s["d_v"]) * s["element_bytes"] + 0 * pairs,
            pieces=s["batch"] * s["heads"],
            step="launch",
        )

    return form


# ------------------------------------------------------------------ attention as a scan


def _aaren_state(s: Dims) -> Array:
    """Return a maximum, a sum of weights and a weighted sum of values per head."""
    return np.asarray(s["batch"] * s["heads"] * (2 + s["d_v"]) * s["element_bytes"])


def _aaren(combines: Callable[[Array], Array], depth: Callable[[Array], Array], step: str) -> Form:
    def form(s: Dims) -> MixerCost:
        per_head = s["batch"] * s["heads"]
        depth_ = depth(s["seq_len"])
        merged = per_head * combines(s["seq_len"])
        spills = 2 * s["seq_len"] * _aaren_state(s) if step == "launch" else 0.0
        io = _tokens(s) * (s["d_k"] + 2 * s["d_v"]) * s["element_bytes"]
        return MixerCost(
            matrix_flops=2 * _tokens(s) * s["d_k"],
            vector_flops=merged * (6 + 3 * s["d_v"]),
            hbm_bytes=io + spills,
            serial_depth=depth_,
            launches=depth_ if step == "launch" else np.ones_like(depth_),
            state_bytes=_aaren_state(s),
            on_chip_bytes=s["seq_len"] * (2 + s["d_v"]) * s["element_bytes"],
            pieces=per_head,
            step=step,
        )

    return form


def _aaren_parallel(s: Dims) -> MixerCost:
    flops = 2 * _tokens(s) * (s["d_k"] + s["seq_len"] * s["d_v"])
    return replace(_looks(_all, _all)(s), matrix_flops=flops, state_bytes=_aaren_state(s))


# ------------------------------------------------------------------ fewer keys per query


def _window_blocks(s: Dims) -> Array:
    """Return the keys of a query's own block of ``window`` tokens and of the block before."""
    return 2 * s["window"]


def _local_and_summaries(s: Dims) -> Array:
    """Return the keys of a query's block and one summary for each block (Combiner-fixed)."""
    return np.asarray(s["block"] + s["seq_len"] / s["block"])


def _local_and_tree(s: Dims) -> Array:
    """Return the keys of a query's block and one summary per level of a binary tree."""
    return np.asarray(s["block"] + np.ceil(np.log2(s["seq_len"] / s["block"])))


def _shard(s: Dims) -> Array:
    """Return the tokens of a head's shard; a query's own token costs it no product."""
    return np.asarray(s["seq_len"] / s["shards"])


# ------------------------------------------------------------------ convolution and memory slots


def _gam(serial: bool) -> Form:
    def form(s: Dims) -> MixerCost:
        cells = s["batch"] * s["seq_len"] * s["width"]
        state = s["batch"] * (s["kernel"] - 1) * s["width"] * s["element_bytes"]
        steps = s["seq_len"] if serial else np.ones_like(cells)
        slots = 2 * s["slots"] * s["width"] * s["element_bytes"]
        return MixerCost(
            matrix_flops=cells * (4 * s["slots"] + 2 * s["kernel"]),
            vector_flops=4 * cells + SOFTMAX_OPS * s["batch"] * s["seq_len"] * s["slots"],
            hbm_bytes=4 * cells * s["element_bytes"] + slots * steps,
            serial_depth=steps,
            launches=4 * steps,  # convolution, lookup, softmax and sum, gate
            state_bytes=state,
            on_chip_bytes=TILE * s["slots"] * s["element_bytes"],
            pieces=s["batch"] * s["seq_len"] / TILE if not serial else s["batch"],
            step="launch" if serial else "unit",
        )

    return form


# ------------------------------------------------------------------ over layers


def stage_lengths(seq_len: float, layers: int, merge: float) -> list[float]:
    """Return the tokens left at each layer when every layer keeps 1 in ``merge``, at least one."""
    return [max(1.0, seq_len / merge**layer) for layer in range(layers)]


def merging_layer_flops(length: Array | float, width: Array | float) -> tuple[Array, Array]:
    """Return FLOPs of a layer over ``length`` tokens: linear attention, softmax attention.

    Linear attention: keys times values, queries times state, 4 n d^2. Softmax: 4 n^2 d.
    """
    n, d = np.asarray(length, dtype=np.float64), np.asarray(width, dtype=np.float64)
    return 4 * n * d * d, 4 * n * n * d


def _staged(s: Dims) -> MixerCost:
    """Return the sum over layers: linear while longer than ``switch``, softmax below it."""
    layers = int(s["layers"])
    lengths = np.asarray(stage_lengths(float(s["seq_len"]), layers, float(s["merge"])))
    linear, exact = merging_layer_flops(lengths, s["width"])
    flops = s["batch"] * np.where(lengths > s["switch"], linear, exact).sum()
    moved = 5 * s["batch"] * lengths.sum() * s["width"] * s["element_bytes"]
    state = s["batch"] * lengths[-1] * s["width"] * s["element_bytes"]
    return MixerCost(
        flops,
        SOFTMAX_OPS * flops / 4,
        moved,
        np.asarray(float(layers)),
        np.asarray(3.0 * layers),
        state,
        s["width"] * s["width"] * 4,
        s["batch"] * lengths[0] / TILE,
        "launch",
    )


def universal_layer_flops(seq_len: Array, width: Array) -> Array:
    """Return FLOPs per token of one shared layer: four projections, attention, 4x feed-forward.

    8 d^2 + 4 n d + 16 d^2, as in a Transformer (Vaswani et al. 2017).
    """
    return np.asarray(24 * width * width + 4 * seq_len * width)


def _universal(column: str) -> Form:
    """Return iterations until the last token halts; ``column`` says how many tokens pay for one."""

    def form(s: Dims) -> MixerCost:
        tokens = s["batch"] * s["seq_len"]
        steps = s["max_steps"]
        weights = 12 * s["width"] * s["width"] * s["element_bytes"]
        return MixerCost(
            matrix_flops=tokens * s[column] * universal_layer_flops(s["seq_len"], s["width"]),
            vector_flops=tokens * s[column] * SOFTMAX_OPS * s["seq_len"],
            hbm_bytes=steps * weights + 8 * tokens * s[column] * s["width"] * s["element_bytes"],
            serial_depth=steps,
            launches=6 * steps,
            state_bytes=tokens * s["width"] * s["element_bytes"],
            on_chip_bytes=TILE * s["width"] * s["element_bytes"],
            pieces=tokens / TILE,
            step="launch",
        )

    return form


_BLOCKED = {**HEADS, "block": "tokens of a block; divides seq_len"}

ATTENTION_MIXERS = (
    Mixer(
        "attention",
        {**HEADS, "chunk": "keys of a block of the fused kernel; divides seq_len"},
        {
            "parallel": _attention_parallel,
            "fused": _attention_fused,
            "recurrent": _decoding(_all),
        },
        "Vaswani et al. 2017; fused: Dao 2023, FlashAttention-2",
    ),
    Mixer(
        "sliding_attention",
        {**HEADS, "window": "tokens that a query sees, itself included; divides seq_len"},
        {
            "parallel": _looks(_all, lambda s: np.minimum(s["window"], s["seq_len"])),
            "chunked": _looks(_window_blocks, lambda s: np.minimum(s["window"], s["seq_len"])),
            "recurrent": _decoding(lambda s: s["window"]),
        },
        "Beltagy et al. 2020: Longformer; the causal half",
    ),
    Mixer(
        "aaren",
        HEADS,
        {
            "parallel": _aaren_parallel,
            "scan": _aaren(doubling_combines, doubling_levels, "unit"),
            "recurrent": _aaren(lambda n: n, lambda n: n, "launch"),
        },
        "Feng et al. 2024: Attention as an RNN",
    ),
    Mixer(
        "combiner",
        _BLOCKED,
        {
            "parallel": _looks(lambda s: s["seq_len"] + s["seq_len"] / s["block"], _all),
            "chunked": _looks(_local_and_summaries, _local_and_summaries, 2),
        },
        "Ren et al. 2021: Combiner, one level of regions",
    ),
    Mixer(
        "combiner_tree",
        _BLOCKED,
        {
            "parallel": _looks(lambda s: s["seq_len"] + 2 * s["seq_len"] / s["block"] - 1, _all),
            "chunked": _looks(
                _local_and_tree, lambda s: s["block"] + 2 * s["seq_len"] / s["block"], 2
            ),
        },
        "Ren et al. 2021: Combiner, regions that double",
    ),
    Mixer(
        "s2_attention",
        {
            **HEADS,
            "block": "tokens of a stripe",
            "shards": "shards; block x shards divides seq_len",
        },
        {
            "parallel": _looks(_all, _shard),
            "chunked": _looks(_shard, _shard),
        },
        "Lin et al. 2024: S2-Attention",
    ),
    Mixer(
        "gam",
        {
            **BATCH,
            "width": "channels",
            "kernel": "taps of the causal convolution",
            "slots": "memory slots",
        },
        {"parallel": _gam(serial=False), "recurrent": _gam(serial=True)},
        "Acharya 2025: gated associative memory",
    ),
    Mixer(
        "merging",
        {
            **BATCH,
            "layers": "layers, a whole number",
            "merge": "tokens merged into one after each layer",
            "switch": "longest sequence that gets softmax attention",
            "width": "channels",
        },
        {"parallel": _staged},
        "MAELRE: modality-agnostic efficient long-range encoder, 2025",
    ),
    Mixer(
        "universal_transformer",
        {
            **BATCH,
            "width": "channels",
            "mean_steps": "iterations of a token, averaged",
            "max_steps": "iterations of the token that halts last",
        },
        {"parallel": _universal("max_steps"), "compacted": _universal("mean_steps")},
        "Dehghani et al. 2018: Universal Transformers",
    ),
)

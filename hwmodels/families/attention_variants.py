"""Kinds of attention other than plain prefill and decode, on the same equations.

No measurements: each is priced with the coefficients of the family that it ``borrows``, and
differs from it only in what its kernels do.

- **backward**: 5 products a pair for 2 (scores again, dP, dV, dQ, dK), so 2.5 times the FLOPs, at
  ``_BACKWARD_SHARE`` of the forward's rate: 63 % of an A100's peak for 73 % (Dao,
  FlashAttention-2 (2023), section 4.1). Queries, results and their gradients are moved (twice the
  rows), keys, values and theirs (twice the cache). Blocks go over keys and add dQ in fp32 to
  memory: every pair of a query and a block of 128 keys sends 4 bytes an element, through L2 where
  there is one. Two more kernels: sums of dO x O before, dQ to 16 bits after.
- **latent** (MLA, DeepSeek-V2 (2024), section 2.1), decode with absorbed projections: all heads
  share one cached vector of latent + rope elements, of which the first ``latent`` serve as value
  too. FLOPs per key: 2 h (2 latent + rope). Blocks have 64 rows (deepseek-ai/FlashMLA). Prefill
  is not absorbed: keys (``qk_dim``) and values (``v_dim``) of every head.
- **sparse**: the share ``density`` of key blocks is computed and read, beyond each block's first.
- **verify**: ``seq_len`` rows of a tree or draft against kv_len keys. A mask tells which rows see
  each other, and the kernel computes all of them: no causal half. The mask's bits are read.
  Kernels made for this, for latent and for shared keys group heads and split keys everywhere.
- **shared_prefix** (cascade; Ye et al., FlashInfer (2025), section 3.1.2): keys of ``prefix_len``
  are common to the batch, so they are read once with all queries as rows; then every sequence's
  own keys; then a kernel merges the two results by their sums.
- **paged**: decode where ``page`` keys lie together: whole sectors of 32 bytes are moved, and a
  table entry of 4 bytes a page.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from hwmodels.families.attention import (
    ATTENTION_DECODE,
    ATTENTION_PREFILL,
    DECODE_KEEPS,
    PREFILL_KEEPS,
    Call,
    Tiling,
    call_of,
    column,
    seconds,
    tiling_of,
)
from hwmodels.families.family import Array, Coefficients, Family, Shape
from hwmodels.hardware import Chip

_BACKWARD_PRODUCTS = 2.5
_BACKWARD_SHARE = 0.63 / 0.73
_BACKWARD_KEYS = 128.0  # of a block that adds its part of dQ
_BACKWARD_KERNELS = 2
_FP32_BYTES = 4.0
_LATENT_ROWS = 64

Seconds = Callable[[Shape, Chip, str, Coefficients], Array]


def _splitting(chip: Chip) -> Tiling:
    """Return the chip's blocks in kernels that group heads and split keys of any call."""
    return replace(tiling_of(chip), swaps=False)


def _fixed(c: Coefficients, **kept: float) -> dict[str, float]:
    return {**PREFILL_KEEPS, **DECODE_KEEPS, **c, **kept}


def _backward(shape: Shape, chip: Chip, dtype: str, c: Coefficients) -> Array:
    forward = call_of(shape)
    # Twice the rows and the cache: each beside its gradient. FLOPs stay 2.5 times the forward's.
    call = replace(
        forward,
        width=2 * forward.width,
        cached=2 * forward.cached,
        products=_BACKWARD_PRODUCTS / 2,
    )
    rates = {name: c[name] * _BACKWARD_SHARE for name in ("matrix_share", "narrow_share")}
    core = seconds(call, chip, dtype, _fixed(c, **rates))
    elements = forward.batch * forward.heads * forward.queries * forward.width / 2
    near = chip.tier("l2") or chip.hbm
    seen = np.minimum(forward.keys - (forward.queries - 1) / 2, forward.window)
    added = elements * np.maximum(seen / _BACKWARD_KEYS, 1) * _FP32_BYTES / near.bytes_per_s
    # dO and O read before; after, dQ read in fp32 and written in 16 bits.
    beside = (forward.rows_bytes + elements * (_FP32_BYTES + 2)) / chip.hbm.bytes_per_s
    kernels = _BACKWARD_KERNELS * c["kernel_s"] + beside
    return np.asarray(np.maximum(core, c["launch_s"] + added) + kernels)


def _latent_decode(shape: Shape, chip: Chip, dtype: str, c: Coefficients) -> Array:
    latent, rope = column(shape, "latent_dim"), column(shape, "rope_dim")
    ones = np.ones_like(latent)
    call = Call(
        column(shape, "batch"),
        ones,
        column(shape, "kv_len"),
        column(shape, "heads"),
        ones,
        2 * latent + rope,
        latent + rope,
        column(shape, "kv_bytes"),
        np.inf * ones,
    )
    tiling = replace(_splitting(chip), rows=_LATENT_ROWS)
    return seconds(call, chip, dtype, _fixed(c), tiling)


def _latent_prefill(shape: Shape, chip: Chip, dtype: str, c: Coefficients) -> Array:
    width = column(shape, "qk_dim") + column(shape, "v_dim")
    heads = shape["heads"]
    call = call_of({**shape, "kv_heads": heads, "head_dim": width / 2, "kv_bytes": 2.0})
    return seconds(call, chip, dtype, _fixed(c, sequence_s=0.0, cached_share=0.0))


def _sparse(shape: Shape, chip: Chip, dtype: str, c: Coefficients) -> Array:
    call = replace(call_of(shape), density=np.clip(column(shape, "density"), 0.0, 1.0))
    return seconds(call, chip, dtype, _fixed(c))


def _verify(shape: Shape, chip: Chip, dtype: str, c: Coefficients) -> Array:
    call = replace(call_of(shape), causal=False)
    bits = call.batch * call.queries * call.keys
    found = seconds(call, chip, dtype, _fixed(c), _splitting(chip))
    return np.asarray(found + bits / 8 / chip.hbm.bytes_per_s)


def _shared_prefix(shape: Shape, chip: Chip, dtype: str, c: Coefficients) -> Array:
    whole = call_of({**shape, "seq_len": shape.get("seq_len", 1.0)})
    prefix = np.minimum(column(shape, "prefix_len"), whole.keys - whole.queries)
    common = replace(
        whole,
        batch=np.ones_like(whole.batch),
        queries=whole.batch * whole.queries,
        keys=np.maximum(prefix, 1.0),
        causal=False,
    )
    own = replace(whole, keys=whole.keys - prefix)
    kept, tiling = _fixed(c), _splitting(chip)
    first = seconds(common, chip, dtype, {**kept, "sequence_s": 0.0}, tiling) - c["launch_s"]
    # Both results and their sums are read in fp32, one is written in 16 bits.
    merge = c["kernel_s"] + 2.5 * whole.rows_bytes / chip.hbm.bytes_per_s
    apart = np.where(prefix > 0, first + merge, 0.0)
    return np.asarray(seconds(own, chip, dtype, kept, tiling) + apart)


def _paged(shape: Shape, chip: Chip, dtype: str, c: Coefficients) -> Array:
    call = call_of({**shape, "seq_len": 1.0})
    call = replace(call, page=column(shape, "page"), decode=True)
    return seconds(call, chip, dtype, _fixed(c))


@dataclass(frozen=True, slots=True)
class Variant:
    """A family without measurements of its own: ``borrows`` names the one whose curves it takes."""

    family: Family
    borrows: str


def _variant(name: str, base: Family, columns: dict[str, str], cost: Seconds) -> Variant:
    return Variant(Family(name, columns, base.coefficients, cost, cold=base.cold), base.name)


_PREFILL, _DECODE = dict(ATTENTION_PREFILL.columns), dict(ATTENTION_DECODE.columns)
_LATENT = {name: _DECODE[name] for name in ("batch", "kv_len", "heads", "kv_bytes")}
_EXPANDED = {name: _PREFILL[name] for name in ("batch", "seq_len", "kv_len", "heads")}

VARIANTS: dict[str, Variant] = {
    found.family.name: found
    for found in (
        _variant("attention_backward", ATTENTION_PREFILL, _PREFILL, _backward),
        _variant(
            "latent_attention_decode",
            ATTENTION_DECODE,
            {
                **_LATENT,
                "latent_dim": "width of the cached latent vector",
                "rope_dim": "width of the cached rotary key",
            },
            _latent_decode,
        ),
        _variant(
            "latent_attention_prefill",
            ATTENTION_PREFILL,
            {**_EXPANDED, "qk_dim": "width of a query and key head", "v_dim": "of a value head"},
            _latent_prefill,
        ),
        _variant(
            "sparse_attention",
            ATTENTION_PREFILL,
            {**_PREFILL, "density": "share of key blocks that is computed"},
            _sparse,
        ),
        _variant(
            "verify_attention",
            ATTENTION_DECODE,
            {**_DECODE, "seq_len": "rows of the tree or draft"},
            _verify,
        ),
        _variant(
            "shared_prefix_attention",
            ATTENTION_DECODE,
            {**_DECODE, "prefix_len": "keys that all sequences share, within kv_len"},
            _shared_prefix,
        ),
        _variant(
            "paged_attention_decode",
            ATTENTION_DECODE,
            {**_DECODE, "page": "keys that lie together in memory"},
            _paged,
        ),
    )
}

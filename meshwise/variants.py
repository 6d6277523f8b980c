"""Kinds of attention that were never measured, as operators: their sizes, FLOPs and bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from hwmodels.families import VARIANTS
from hwmodels.kernels import visible_pairs
from simcore.errors import InputError, nearest
from simcore.ops import Work

Sizes = Mapping[str, float]
OPTIONAL = {"window": 0.0, "kv_bytes": 2.0}


def checked(op: str, sizes: Sizes) -> dict[str, float]:
    """Return the columns of a variant. Raises `InputError` for one that is missing or unknown."""
    columns = VARIANTS[op].family.columns
    for name in sizes:
        if name not in columns:
            near = nearest(name, columns)
            hint = f"did you mean {near!r}?" if near else f"it takes {', '.join(columns)}."
            raise InputError(f"[workload].sizes of {op} has no {name!r}: {hint}")
    found = {**{k: v for k, v in OPTIONAL.items() if k in columns}, **sizes}
    for name, meaning in columns.items():
        if name not in found:
            raise InputError(f"[workload].sizes of {op} lacks {name!r} ({meaning}): add it.")
    return found


def _dense(s: Sizes) -> float:
    """Return the FLOPs of two products over the pairs that causality and window leave."""
    pairs = visible_pairs(s.get("seq_len", 1.0), s["kv_len"], s["window"])
    return float(4 * s["batch"] * s["heads"] * s["head_dim"] * pairs)


def _latent_prefill(s: Sizes) -> float:
    pairs = visible_pairs(s["seq_len"], s["kv_len"], 0.0)
    return float(2 * s["batch"] * s["heads"] * pairs * (s["qk_dim"] + s["v_dim"]))


def _latent_decode(s: Sizes) -> float:
    width = 2 * s["latent_dim"] + s["rope_dim"]
    return 2 * s["batch"] * s["heads"] * s["kv_len"] * width


def _verify(s: Sizes) -> float:
    return 4 * s["batch"] * s["heads"] * s["head_dim"] * s["seq_len"] * s["kv_len"]


FLOPS: dict[str, Callable[[Sizes], float]] = {
    "attention_backward": lambda s: 2.5 * _dense(s),
    "latent_attention_prefill": _latent_prefill,
    "latent_attention_decode": _latent_decode,
    "sparse_attention": lambda s: s["density"] * _dense(s),
    "verify_attention": _verify,
    "shared_prefix_attention": _dense,
    "paged_attention_decode": _dense,
}


def _cached(s: Sizes) -> float:
    """Return the bytes of keys and values that are read; shared ones once."""
    if "latent_dim" in s:
        return s["batch"] * s["kv_len"] * (s["latent_dim"] + s["rope_dim"]) * s["kv_bytes"]
    if "qk_dim" in s:
        return s["batch"] * s["kv_len"] * s["heads"] * (s["qk_dim"] + s["v_dim"]) * 2
    keys = s["batch"] * min(s["window"] or s["kv_len"], s["kv_len"])
    keys -= (s["batch"] - 1) * s.get("prefix_len", 0.0)
    each = 2 * s["kv_heads"] * s["head_dim"] * s["kv_bytes"]
    return max(keys, 1.0) * each * s.get("density", 1.0)


def variant_work(op: str, sizes: Sizes) -> Work:
    """Return the FLOPs of a variant's products and the bytes that it must move."""
    s = checked(op, sizes)
    width = s.get("head_dim") or s.get("v_dim") or s["latent_dim"]
    rows = 4 * s["batch"] * s.get("seq_len", 1.0) * s["heads"] * width
    copies = 2.0 if op == "attention_backward" else 1.0  # gradients beside values
    moved = copies * (_cached(s) + rows)
    return Work(flops=FLOPS[op](s), read_bytes=moved - rows / 2, write_bytes=rows / 2)

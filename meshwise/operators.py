"""One operator on one chip: which ops stand for it, what they do and how long they take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from hwmodels.cost import ClusterCost
from simcore.dtypes import DTYPE_BYTES
from simcore.metrics import op_metrics
from simcore.ops import Op, work
from simcore.workloads import OpCall

Dims = Mapping[str, float]


def _gemm(d: Dims, dtype: str) -> list[tuple[Op, float]]:
    return [(_product(d["m"], d["n"], d["k"], dtype), 1.0)]


def _product(m: float, n: float, k: float, dtype: str) -> Op:
    attrs = {"layout": "nt", "weight_dtype": dtype}
    return Op("matmul", {"m": m, "n": n, "k": k}, dtype, ("x", "w"), ("y",), attrs=attrs)


def _dtype_of(element_bytes: float) -> str:
    """Return a format of so many bytes per element."""
    return next(name for name, size in DTYPE_BYTES.items() if size == element_bytes)


def _attention(
    d: Dims, dtype: str, new_rows: float, reads: tuple[str, ...]
) -> list[tuple[Op, float]]:
    dims = {
        "b": d["batch"],
        "h": d["heads"],
        "hkv": d["kv_heads"],
        "s": new_rows,
        "kv": d["kv_len"],
        "d": d["head_dim"],
        "dv": d["head_dim"],
    }
    attrs = {"causal": bool(d.get("causal", 1.0)), "kv_dtype": _dtype_of(d["kv_element_bytes"])}
    return [(Op("attention", dims, dtype, reads, ("o", "lse"), attrs=attrs), 1.0)]


def expert_rows(d: Dims) -> list[float]:
    """Return the rows that each expert of the busiest rank gets, experts without rows left out.

    Expert i gets a share of the rows in proportion to i^-alpha (balanced: alpha 0); experts are
    dealt to the ranks in turn, so that rank 0 holds the busiest ones.
    """
    experts, ep = int(d["experts"]), int(d["ep"])
    weights = np.arange(1, experts + 1, dtype=np.float64) ** -d["alpha"]
    rows = np.minimum(d["tokens"], d["tokens"] * d["experts_per_token"] * weights / weights.sum())
    mine = np.sort(rows)[::-1][::ep]
    touched = max(1, min(len(mine), round(float(np.minimum(1.0, mine).sum()))))
    return [max(1.0, float(r)) for r in mine[:touched] * mine.sum() / mine[:touched].sum()]


def _moe(d: Dims, dtype: str) -> list[tuple[Op, float]]:
    """Return gated experts' products: up and gate together, then down, per distinct row count."""
    width = d["ffn"] / d["tp"]
    found: dict[float, float] = {}
    for rows in expert_rows(d):
        found[rows] = found.get(rows, 0.0) + 1.0
    ops = []
    for rows, count in found.items():
        ops += [
            (_product(rows, 2 * width, d["hidden"], dtype), count),
            (_product(rows, d["hidden"], width, dtype), count),
        ]
    return ops


OPERATORS: dict[str, Callable[[Dims, str], list[tuple[Op, float]]]] = {
    "gemm": _gemm,
    "attention_prefill": lambda d, dtype: _attention(d, dtype, d["seq_len"], ("qkv",)),
    "attention_decode": lambda d, dtype: _attention(d, dtype, 1.0, ("qkv", "cache")),
    "moe": _moe,
}


def operator_metrics(call: OpCall, cost: ClusterCost) -> dict[str, Any]:
    """Return the metrics of an operator: its ops fused into one launch."""
    chip = cost.cluster.chip
    peak = chip.peak_flops_per_s.get(call.dtype) or chip.vector_flops_per_s
    launch = 0.0 if cost.profile else chip.launch_s
    seconds, flops, moved, arithmetic = launch, 0.0, 0.0, 0.0
    for op, count in OPERATORS[call.op](call.dims, call.dtype):
        done = work(op)
        seconds += count * (float(cost.seconds(op)) - launch)
        flops += count * float(done.flops)
        moved += count * float(done.read_bytes + done.write_bytes)
        arithmetic += count * float(done.flops / peak + done.vector_flops / chip.vector_flops_per_s)
    limits = {
        "compute": arithmetic,
        "memory": moved / chip.hbm.bytes_per_s,
        "latency": chip.launch_s,
    }
    return op_metrics(seconds, flops, moved, limits)

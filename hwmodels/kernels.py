"""Seconds of compute ops on a chip: which kernel family an op belongs to, and its shape there.

An accelerator's op is priced by its family (`hwmodels.families`) with the curves fitted to its
chip or to its nearest relative. A CPU's is priced by what was measured on it, kind by kind, else
by launch plus the roofline (Williams et al. 2009): max(FLOPs / peak, bytes / bandwidth).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hwmodels.families.family import Shape
from hwmodels.families.matmul import LAYOUTS
from hwmodels.hardware import Chip
from simcore.dtypes import dtype_bytes
from simcore.errors import InputError
from simcore.ops import COMMUNICATION, FREE, WORK, Op, Size, work


@dataclass(frozen=True, slots=True)
class KernelFit:
    """Measured seconds of one op kind.

    ``points``: rising (elements, seconds), interpolated in their logarithms, for kinds whose cost
    follows one size; ``coefficients``: seconds per unit of each feature, for the others.
    """

    points: tuple[tuple[float, float], ...] = ()
    coefficients: Mapping[str, float] = field(default_factory=dict)
    residual: float = 0.0  # median absolute relative error on the shapes that were fitted


def moved_bytes(op: Op) -> Size:
    """Return the compulsory traffic of ``op`` with main memory."""
    done = work(op)
    return done.read_bytes + done.write_bytes


FEATURES: dict[str, Callable[[Op], Size]] = {
    "one": lambda op: 1.0,
    "flops": lambda op: work(op).flops,
    "bytes": moved_bytes,
    "vector": lambda op: work(op).vector_flops,
    # A product of several rows first copies its second operand into the order of its kernel
    # (Goto and van de Geijn 2008, section 4); a matrix-vector product does not.
    "packed_weights": lambda op: (
        op.dims.get("touched", 1)
        * op.dims["n"]
        * op.dims["k"]
        * np.where(op.dims["m"] > op.dims.get("touched", 1), 4.0, 0.0)
    ),
    # torch's CPU attention splits queries in blocks of 32, 64 or 256 rows (FlashAttentionKernel):
    # the smaller the block, the more of each product is start-up.
    "flops_per_block": lambda op: work(op).flops / _query_block(op),
    "experts": lambda op: op.dims.get("touched", 0),
    "heads": lambda op: op.dims["b"] * op.dims["h"],
    "queries": lambda op: op.dims["b"] * op.dims["h"] * op.dims["s"],
}


def _query_block(op: Op) -> Size:
    rows = op.dims["s"]
    return np.where(rows >= 768, 256.0, np.where(rows >= 192, 64.0, np.minimum(rows, 32.0)))


def elements(op: Op) -> Size:
    """Return the size that the cost of a one-size kind follows."""
    return op.dims["n"] * op.dims.get("t", 1)


OTHERS = "others"  # the family of what is not measured on its own: start-up, FLOPs and bytes
BY_ROOFLINE: frozenset[str] = frozenset(
    {
        *("split_columns", "gather_rows", "scatter_rows"),
        *("attention_tasks", "attention_tasks_backward"),
        *("offload", "fetch", "release"),
    }
)  # kinds that no microbenchmark measures, so far


def family(op: Op) -> str:
    """Return the key of the op's measurements: its kind, and the form that it takes."""
    form = FORMS[op.kind](op) if op.kind in FORMS else ""
    return f"{op.kind}.{form}" if form else op.kind


# Kinds that run as different code, each of which is measured on its own.
FORMS: dict[str, Callable[[Op], str]] = {
    "matmul": lambda op: str(op.attrs["layout"]),
    "grouped_matmul": lambda op: op.attrs["layout"] + (".sorted" if len(op.reads) > 2 else ""),
    "attention": lambda op: "cached" if len(op.reads) > 1 else "",
    "attention_block": lambda op: "masked" if op.attrs["causal"] else "",
    "attention_block_backward": lambda op: "masked" if op.attrs["causal"] else "",
    "attention_rows": lambda op: "" if op.attrs["first"] else "first",
    "attention_rows_backward": lambda op: "" if op.attrs["first"] else "first",
    "encode": lambda op: "kept" if len(op.reads) > 1 else "",
    "decode": lambda op: "summed" if op.attrs["summed"] else "",
    "regroup": lambda op: op.attrs["by"] + (".back" if op.attrs["inverse"] else ""),
}


def interpolate(points: tuple[tuple[float, float], ...], size: Size) -> Size:
    """Return seconds at ``size``: linear in logarithms, the last slope kept beyond the ends."""
    x, y = np.log(np.array(points)).T
    at = np.log(np.maximum(np.asarray(size, dtype=np.float64), 1e-300))
    inside = np.interp(at, x, y)
    if len(points) < 2:
        return np.exp(inside)
    above = y[-1] + np.maximum(1.0, (y[-1] - y[-2]) / (x[-1] - x[-2])) * (at - x[-1])
    return np.exp(np.where(at > x[-1], above, inside))


def roofline(op: Op, chip: Chip) -> Size:
    """Return launch plus the larger of arithmetic and traffic time."""
    done = work(op)
    peak = chip.peak_flops_per_s.get(op.dtype) or chip.vector_flops_per_s
    arithmetic = done.flops / peak + done.vector_flops / chip.vector_flops_per_s
    traffic = (done.read_bytes + done.write_bytes) / chip.hbm.bytes_per_s
    if op.kind in FREE:
        return 0.0
    return chip.launch_s + np.maximum(arithmetic, traffic)


def fitted(op: Op, fit: KernelFit) -> Size:
    """Return the seconds that a fit gives."""
    if fit.points:
        return interpolate(fit.points, elements(op))
    return sum(value * FEATURES[name](op) for name, value in fit.coefficients.items())


# -- families ------------------------------------------------------------------------------------


def _matmul(op: Op) -> tuple[str, Shape]:
    sizes = {name: op.dims[name] for name in ("m", "n", "k")}
    return "matmul", {**sizes, **LAYOUTS[op.attrs["layout"]]}


def _grouped_matmul(op: Op) -> tuple[str, Shape]:
    """Equal products of the experts that have rows, in one launch."""
    layout, groups = op.attrs["layout"], op.dims["touched"]
    m, n, k = op.dims["m"] / groups, op.dims["n"], op.dims["k"]
    sizes = {"m": n, "n": k, "k": m} if layout == "tn" else {"m": m, "n": n, "k": k}
    return "matmul", {**sizes, "groups": groups, **LAYOUTS[layout]}


def _heads(op: Op) -> Shape:
    d = op.dims
    shape = {
        "batch": d["b"],
        "seq_len": d["s"],
        "kv_len": d["kv"],
        "heads": d["h"],
        "kv_heads": d["hkv"],
        "head_dim": (d["d"] + d["dv"]) / 2,
        "window": op.attrs.get("window", 0),
        "kv_bytes": dtype_bytes(op.attrs.get("kv_dtype", op.dtype)),
    }
    return shape if op.attrs.get("causal", True) else without_mask(shape)


def visible_pairs(queries: Size, keys: Size, window: Size) -> Size:
    """Return the (query, key) pairs of a sequence and head that causality and a window leave.

    ``keys`` are those that the last query sees; a window of 0 is none.
    """
    first = keys - queries + 1
    width = np.where(np.asarray(window) > 0, window, keys)
    turn = np.clip(width, first - 1, keys)  # the last query that sees all keys before it
    return (turn - first + 1) * (first + turn) / 2 + (keys - turn) * width


def without_mask(shape: Shape) -> Shape:
    """Return the causal call in which queries see as many keys as they do here without a mask.

    Its mean query sees (seq_len - 1) / 2 keys fewer than its last one.
    """
    return {**shape, "kv_len": shape["kv_len"] + (shape["seq_len"] - 1) / 2}


def _attention(op: Op) -> tuple[str, Shape]:
    """One new row runs the decode kernels, several run those of prefill."""
    shape = _heads(op)
    if np.all(op.dims["s"] == 1):
        return "attention_decode", {k: v for k, v in shape.items() if k != "seq_len"}
    return "attention_prefill", shape


def _attention_backward(op: Op) -> tuple[str, Shape]:
    return "attention_backward", _heads(op)


def _memory(op: Op) -> tuple[str, Shape]:
    return "memory", {"moved_bytes": moved_bytes(op), "vector_flops": work(op).vector_flops}


# op kind -> (family, its columns); every compute kind has one.
KERNELS: dict[str, Callable[[Op], tuple[str, Shape]]] = {
    **{kind: _memory for kind in WORK if kind not in COMMUNICATION},
    "matmul": _matmul,
    "grouped_matmul": _grouped_matmul,
    "attention": _attention,
    "attention_backward": _attention_backward,
    "attention_block": _attention,
    "attention_block_backward": _attention_backward,
    "attention_tasks": _attention,
    "attention_tasks_backward": _attention_backward,
    "attention_rows": _attention,
    "attention_rows_backward": _attention_backward,
}


def product_dtype(op: Op) -> str:
    """Return the format that prices an op: narrower weights are converted to its own on the way."""
    weight = op.attrs.get("weight_dtype", op.dtype)
    if op.kind in ("matmul", "grouped_matmul") and dtype_bytes(weight) < dtype_bytes(op.dtype):
        return f"{weight}_wo"
    return op.dtype


def read_kernel_fits(table: Mapping[str, Any], where: str) -> dict[str, KernelFit]:
    """Return the fits of a profile's table. Raises `InputError` for an ill-formed one."""
    found = {}
    for name, row in table.items():
        try:
            points = tuple((float(a), float(b)) for a, b in row.get("points", ()))
            coefficients = {str(k): float(v) for k, v in row.get("coefficients", {}).items()}
            if set(coefficients) - set(FEATURES):
                raise ValueError(f"unknown feature among {sorted(coefficients)}")
            found[name] = KernelFit(points, coefficients, float(row.get("residual", 0.0)))
        except (TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"{where}: kernel {name!r} is ill-formed ({error}): calibrate anew."
            ) from None
    return found

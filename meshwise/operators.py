"""One operator on one chip: which ops stand for it, what they do and how long they take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from hwmodels.cost import DATASHEET_DEVIATION, ClusterCost
from hwmodels.families import VARIANTS
from hwmodels.families.family import Shape, matrix_peak
from hwmodels.families.routing import expert_rows
from hwmodels.hardware import Chip
from hwmodels.kernels import visible_pairs, without_mask
from hwmodels.mixers import mixer_seconds
from meshwise.variants import checked, variant_work
from simcore.dtypes import DTYPE_BYTES, dtype_bytes
from simcore.errors import InputError
from simcore.metrics import op_metrics
from simcore.mixers import mixer_cost
from simcore.ops import Op, Work, work
from simcore.uncertainty import interval
from simcore.workloads import OpCall

Dims = Mapping[str, float]


def _gemm(d: Dims, dtype: str) -> list[tuple[Op, float]]:
    return [(_product(d["m"], d["n"], d["k"], dtype), 1.0)]


def _product(m: float, n: float, k: float, dtype: str) -> Op:
    """Return a product; ``int4_wo`` and its like have narrow weights and bf16 for the rest."""
    own = "bf16" if dtype.endswith("_wo") else dtype
    weight = dtype.removesuffix("_wo")
    attrs = {"layout": "nt", "weight_dtype": weight, "out_dtype": _result(own)}
    return Op("matmul", {"m": m, "n": n, "k": k}, own, ("x", "w"), ("y",), attrs=attrs)


def _result(dtype: str) -> str:
    """Return the format of a product's result: narrow operands give bf16."""
    return dtype if dtype_bytes(dtype) >= 2 else "bf16"


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


def _moe(d: Dims, dtype: str) -> list[tuple[Op, float]]:
    """Return gated experts' products: up and gate together, then down, per distinct row count."""
    width = d["ffn"] / d["tp"]
    found: dict[float, float] = {}
    chosen, ranks = int(d["experts_per_token"]), int(d["ep"])
    for rows in expert_rows(d["tokens"], int(d["experts"]), chosen, ranks, d["alpha"]).tolist():
        found[rows] = found.get(rows, 0.0) + 1.0
    ops = []
    for rows, count in found.items():
        ops += [
            (_product(rows, 2 * width, d["hidden"], dtype), count),
            (_product(rows, d["hidden"], width, dtype), count),
        ]
    return ops


def _rowwise(kind: str) -> Callable[[Dims, str], list[tuple[Op, float]]]:
    def ops(d: Dims, dtype: str) -> list[tuple[Op, float]]:
        if kind == "adam":
            dims = {"n": d["t"] * d["n"]}
            attrs = {"grad_dtype": "fp32", "master": dtype_bytes(dtype) < 4}
            return [(Op(kind, dims, dtype, ("w",), ("w",), attrs=attrs), 1.0)]
        return [(Op(kind, dict(d), dtype, ("x",), ("y",)), 1.0)]

    return ops


ROWWISE = (
    "add", "adam", "embedding", "gelu", "layernorm", "rmsnorm", "rope", "sample",
    "softmax_backward", "softmax_loss", "swiglu",
)  # fmt: skip

OPERATORS: dict[str, Callable[[Dims, str], list[tuple[Op, float]]]] = {
    "gemm": _gemm,
    "attention_prefill": lambda d, dtype: _attention(d, dtype, d["seq_len"], ("qkv",)),
    "attention_decode": lambda d, dtype: _attention(d, dtype, 1.0, ("qkv", "cache")),
    "moe": _moe,
    **{kind: _rowwise(kind) for kind in ROWWISE},
}


def _copy(d: Dims, dtype: str) -> Work:
    size = d["t"] * d["n"] * dtype_bytes(dtype)
    return Work(read_bytes=size, write_bytes=size)


def _quantise(d: Dims, dtype: str) -> Work:
    """Read rows in 16 bits, find each row's largest value, write it in ``dtype`` with a scale."""
    elements = d["t"] * d["n"]
    return Work(
        vector_flops=3 * elements,
        read_bytes=2 * elements,
        write_bytes=elements * dtype_bytes(dtype) + 4 * d["t"],
    )


# Operators that no program has as an op yet.
PLAIN: dict[str, Callable[[Dims, str], Work]] = {"copy": _copy, "quantise": _quantise}


def _heads(d: Dims) -> dict[str, float]:
    names = ("batch", "kv_len", "heads", "kv_heads", "head_dim", "window")
    return {**{name: d[name] for name in names}, "kv_bytes": d["kv_element_bytes"]}


def _prefill(d: Dims) -> tuple[str, Shape]:
    shape = {**_heads(d), "seq_len": d["seq_len"]}
    return "attention_prefill", shape if d["causal"] else without_mask(shape)


# operator -> (kernel family, its columns), for chips that families price
FAMILY_SHAPES: dict[str, Callable[[Dims], tuple[str, Shape]]] = {
    "gemm": lambda d: ("matmul", {name: d[name] for name in ("m", "n", "k")}),
    "attention_prefill": _prefill,
    "attention_decode": lambda d: ("attention_decode", _heads(d)),
    "moe": lambda d: ("moe", dict(d)),
}


def operator_work(call: OpCall) -> Work:
    """Return the FLOPs and bytes of an operator, masked attention left out."""
    if call.op == "mixer":
        cost = mixer_cost(call.mixer, call.form, _sizes(call))
        return Work(float(cost.matrix_flops), float(cost.vector_flops), float(cost.hbm_bytes))
    if call.op in PLAIN:
        return PLAIN[call.op](call.dims, call.dtype)
    if call.op in VARIANTS:
        return variant_work(call.op, call.dims)
    done = [(work(op), count) for op, count in OPERATORS[call.op](call.dims, call.dtype)]
    flops, vector, read, written = (
        sum(count * float(getattr(each, name)) for each, count in done)
        for name in ("flops", "vector_flops", "read_bytes", "write_bytes")
    )
    return Work(flops * unmasked(call), vector * unmasked(call), read, written)


def _sizes(call: OpCall) -> dict[str, float]:
    """Return a mixer's sizes, the bytes of an element from the format."""
    return {"element_bytes": dtype_bytes(call.dtype), **call.dims}


def unmasked(call: OpCall) -> float:
    """Return the share of (query, key) pairs that causal mask and window leave."""
    if call.op not in ("attention_prefill", "attention_decode"):
        return 1.0
    d = call.dims
    queries, keys = d.get("seq_len", 1.0), d["kv_len"]
    if d.get("causal", 1.0):
        return float(visible_pairs(queries, keys, d["window"]) / (queries * keys))
    return min(d["window"] or keys, keys) / keys


def operator_seconds(call: OpCall, cost: ClusterCost) -> tuple[float, float]:
    """Return the seconds of an operator and the standard deviation of their logarithm."""
    chip = cost.cluster.chip
    if call.op == "mixer":
        found = mixer_seconds(mixer_cost(call.mixer, call.form, _sizes(call)), chip, call.dtype)
        return float(found), DATASHEET_DEVIATION
    if not cost.synchronous:
        name, shape = _family_shape(call)
        choice = cost.choice(name, call.dtype)
        return float(choice.seconds(shape, chip)), float(choice.deviation(shape, chip))
    if call.op in VARIANTS:
        raise InputError(
            f"{call.op} is priced on accelerators alone: choose another [cluster].gpu."
        )
    if call.op in PLAIN:
        done = PLAIN[call.op](call.dims, call.dtype)
        return _traffic_seconds(done, chip), DATASHEET_DEVIATION
    launch = 0.0 if cost.profile else chip.launch_s
    seconds, deviation = launch, 0.0
    for op, count in OPERATORS[call.op](call.dims, call.dtype):
        seconds += count * (float(cost.seconds(op)) - launch)
        deviation = max(deviation, float(cost.uncertainty(op)[1]))
    return seconds, deviation


def _family_shape(call: OpCall) -> tuple[str, Shape]:
    if call.op in FAMILY_SHAPES:
        return FAMILY_SHAPES[call.op](call.dims)
    if call.op in VARIANTS:
        return call.op, checked(call.op, call.dims)
    done = operator_work(call)
    moved = done.read_bytes + done.write_bytes
    return "memory", {"moved_bytes": moved, "vector_flops": done.vector_flops}


def _traffic_seconds(done: Work, chip: Chip) -> float:
    moved = done.read_bytes + done.write_bytes
    return float(chip.launch_s + moved / chip.hbm.bytes_per_s)


def operator_metrics(call: OpCall, cost: ClusterCost) -> dict[str, Any]:
    """Return the metrics of an operator: its ops fused into one launch."""
    chip, done = cost.cluster.chip, operator_work(call)
    moved = float(done.read_bytes + done.write_bytes)
    arithmetic = done.flops / matrix_peak(chip, call.dtype)
    limits = {
        "compute": float(arithmetic + done.vector_flops / chip.vector_flops_per_s),
        "memory": moved / chip.hbm.bytes_per_s,
        "latency": chip.launch_s,
    }
    seconds, deviation = operator_seconds(call, cost)
    found = op_metrics(seconds, float(done.flops), moved, limits)
    return {**found, "interval_s": interval(seconds, deviation)}

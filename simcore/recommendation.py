"""Recommendation models: embedding tables shared out over ranks, dense layers on all of them.

DLRM (Naumov et al. 2019): a rank looks up its tables for the whole batch, an all-to-all brings the
rows to the ranks of their samples, a small network turns the dense features into one more row,
the dot products of all pairs of rows join it, and a second network says whether a user clicks.
Tables are updated where they were read, by plain descent; the networks' gradients are summed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from simcore.adjoints import backward
from simcore.errors import InputError
from simcore.network import Builder
from simcore.ops import Buffer, Op
from simcore.program import Action, Block, Call, Program

AXIS = "dp_replicate"  # tables, samples and copies of the networks: all over the same ranks
CLASSES = 2  # clicked or not


@dataclass(frozen=True, slots=True)
class Recommender:
    """Sizes of a network: tables of ``rows`` x ``dim``, dense features, widths of hidden layers.

    The last layers, of ``dim`` below and of the two classes above, come on top of the widths.
    """

    name: str
    tables: int
    rows: int
    dim: int
    features: int
    below: tuple[int, ...] = ()
    above: tuple[int, ...] = ()
    dtype: str = "fp32"

    @property
    def dense_parameters(self) -> int:
        """Weights and biases of both networks."""
        return sum(n * (k + 1) for widths in self.widths for k, n in itertools.pairwise(widths))

    @property
    def parameters(self) -> int:
        """All numbers that are learned, those of the tables and of both networks."""
        return self.tables * self.rows * self.dim + self.dense_parameters

    @property
    def pairs(self) -> int:
        """Pairs of rows of a sample, those of its tables and the one of its dense features."""
        return math.comb(self.tables + 1, 2)

    @property
    def widths(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Inputs and outputs of every layer of the network below, and of the one above."""
        below = (self.features, *self.below, self.dim)
        return below, (self.dim + self.pairs, *self.above, CLASSES)


def check_recommender(model: Recommender, ranks: int, batch: int) -> None:
    """Raise `InputError` where tables or samples cannot be shared out evenly."""
    shared = {"[model].tables": model.tables, "[workload].global_batch": batch}
    for what, count in shared.items():
        if count % ranks:
            raise InputError(
                f"{what} = {count} is not a multiple of the {ranks} ranks of [cluster], which "
                f"share them out: {max(count // ranks, 1) * ranks} would be."
            )


def lower_recommender(model: Recommender, ranks: int, batch: int) -> Program:
    """Return the program of one training step over ``batch`` samples in all.

    Raises `InputError` where tables or samples cannot be shared out evenly.
    """
    check_recommender(model, ranks, batch)
    buffers: dict[str, Buffer] = {}
    forward = _forward(model, ranks, batch, buffers)
    _flatten(model, buffers)
    tape = backward(tuple(forward), buffers, ())
    group = AXIS if ranks > 1 else ""
    n = buffers["mlp.g"].elements
    summed = Op("all_reduce", {"n": n}, model.dtype, ("mlp.g",), ("mlp.g",), "dp", group)
    states = ("mlp.w", "mlp.m", "mlp.v")
    attrs = {"grad_dtype": model.dtype, "master": False}
    ops = {
        "net.F": tuple(forward),
        "net.B": tape.joined(),
        "mlp.reduce": (summed,) if group else (),
        "mlp.step": (
            Op("adam", {"n": n}, model.dtype, ("mlp.g", *states), states, attrs=attrs),
            Op("fill", {"n": n}, model.dtype, (), ("mlp.g",)),
        ),
    }
    blocks = {name: Block(name, found) for name, found in ops.items() if found}
    bodies = {
        "0F": (Call("net.F", 0),),
        "0BR": tuple(Call(name, 0) for name in ("net.B", "mlp.reduce") if name in blocks),
        "0O": (Call("mlp.step", 0),),
    }
    info = {
        "kind": "train",
        "data": "clicks",
        "microbatches": 1,
        "batch": batch // ranks,
        "seq_len": 1,
        "dp": ranks,
        "tables": model.tables,
        "rows": model.rows,
        "features": model.features,
        "keep": ("loss",),
        "updates": 1,
    }
    mesh = {"pp": 1, AXIS: ranks, "dp_shard": 1, "cp": 1, "tp": 1}
    order = tuple(Action(0, kind, 0) for kind in ("F", "BR", "O"))
    return Program(mesh, blocks, buffers, bodies, (order,), (0,), info)


def _forward(model: Recommender, ranks: int, batch: int, buffers: dict[str, Buffer]) -> list[Op]:
    """Return the forward ops; the exchange runs beside the network below."""
    held, mine, dtype = model.tables // ranks, batch // ranks, model.dtype
    b = Builder("mlp", dtype, buffers, layered=False)
    tables = Buffer(
        (held, model.rows, model.dim), dtype, "weight", False, experts=model.tables,
        expert_group=AXIS if ranks > 1 else "", base="tables.w",
    )  # fmt: skip
    buffers["tables.table"] = tables
    buffers["tables.w"] = Buffer((tables.elements,), dtype, "weight", False)
    index, x, targets = "index", "dense", "targets"
    buffers[index] = Buffer((batch, held), "int64", "data", layered=False)
    buffers[x] = Buffer((mine, model.features), dtype, "data", layered=False)
    buffers[targets] = Buffer((mine,), "int64", "data", layered=False)
    size: dict[str, Any] = {"t": batch * held, "n": model.dim}
    found = b.act("looked", batch * held, model.dim)
    b.op("lookup", ("tables.table", index), (found,), **size)
    if ranks > 1:
        came = b.act("came", batch * held, model.dim)
        b.op("all_to_all", (found,), (came,), n=batch * held * model.dim, group=AXIS, stream="ep")
        found = came
    z = _network(b, model.widths[0], x, "below", mine, last=True)
    if ranks > 1:
        turned = b.act("by_sample", batch * held, model.dim)
        blocks = {"outer": ranks, "inner": mine}
        found = b.op("swap_blocks", (found,), (turned,), **size, attrs=blocks)
    joined = b.act("joined", mine, model.widths[1][0])
    dims: dict[str, Any] = {"t": mine, "rows": model.tables + 1, "n": model.dim}
    b.op("pairs", (z, found), (joined,), **dims)
    logits = _network(b, model.widths[1], joined, "above", mine, last=False)
    loss, lse = b.act("loss", 1, dtype="fp32"), b.act("lse", mine, dtype="fp32")
    stats = b.act("stats", mine, 3, dtype="fp32")
    attrs: dict[str, Any] = {"vocab": CLASSES, "scale": 1.0 / batch}
    dims = {"t": mine, "n": CLASSES}
    b.op("softmax_stats", (logits, targets), (stats,), **dims, attrs=attrs)
    b.op("softmax_loss", (logits, targets, stats), (loss, lse), **dims, attrs=attrs)
    return b.ops


def _network(b: Builder, widths: Sequence[int], x: str, name: str, rows: int, *, last: bool) -> str:
    """Append layers with biases, each followed by a ReLU, the last one where ``last`` says so."""
    for number, (k, n) in enumerate(itertools.pairwise(widths)):
        reads = (
            x,
            b.weight(f"w{name}{number}", n, k, dtype=b.dtype),
            b.weight(f"b{name}{number}", n, dtype=b.dtype, init="zeros"),
        )
        out = b.act(f"{name}{number}", rows, n)
        x = b.op("matmul", reads, (out,), m=rows, n=n, k=k,
                 attrs={"layout": "nt", "weight_dtype": b.dtype})  # fmt: skip
        if last or number < len(widths) - 2:
            x = b.op("relu", (out,), (b.act(f"{name}{number}.act", rows, n),), t=rows, n=n)
    return x


def _flatten(model: Recommender, buffers: dict[str, Buffer]) -> None:
    """Lay the networks' weights and gradients out in flat buffers, with the optimizer's states."""
    offset, dtype = 0, model.dtype
    for name in [name for name in buffers if name.startswith("mlp.")]:
        held = buffers[name]
        buffers[name] = replace(held, base="mlp.w", offset=offset)
        buffers[f"g.{name}"] = Buffer(held.dims, dtype, "grad", False, "mlp.g", offset)
        offset += held.elements
    buffers["mlp.w"] = Buffer((offset,), dtype, "weight", False)
    buffers["mlp.g"] = Buffer((offset,), dtype, "grad", False, init="zeros")
    for state in ("m", "v"):
        buffers[f"mlp.{state}"] = Buffer((offset,), "fp32", "state", False, init="zeros")

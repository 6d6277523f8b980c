"""Backward op lists, derived from forward ones.

`backward(ops, buffers)` walks a forward op list in reverse and asks the op kind's adjoint for the
ops that produce the gradients. Input gradients and weight gradients come apart, so that a
schedule may run them together (``B``) or one after the other (``I``, ``W``).

The gradient of activation ``x`` is ``d.x``; the gradient of weight ``w`` is ``g.w``, into which
weight-gradient ops always accumulate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from simcore.linear import carry_adjoint, linear_adjoint
from simcore.ops import Buffer, Op, Size
from simcore.ring import merge_adjoint, regroup_adjoint
from simcore.servers import gather_rows_adjoint, split_columns_adjoint, tasks_adjoint
from simcore.streaming import attention_rows_adjoint, put_rows_adjoint, take_rows_adjoint


class Tape:
    """Collects the backward ops of one block."""

    def __init__(self, buffers: dict[str, Buffer]) -> None:
        self.buffers = buffers
        self.input_ops: list[Op] = []
        self.weight_ops: list[tuple[int, Op]] = []  # (how many input ops precede it, op)
        self._have: set[str] = set()

    def seed(self, name: str) -> None:
        """Declare that the gradient of ``name`` is given from outside the block."""
        self._have.add(name)
        self._declare(name, f"d.{name}")

    def has(self, name: str) -> bool:
        """Whether any gradient of ``name`` was produced."""
        return name in self._have

    def _declare(self, name: str, grad: str) -> None:
        source = self.buffers[name.removesuffix("+")]
        self.buffers.setdefault(grad.removesuffix("+"), replace(source, scope="act"))

    def contribute(
        self,
        name: str,
        kind: str,
        dims: Mapping[str, Size],
        dtype: str,
        reads: tuple[str, ...],
        also: tuple[str, ...] = (),
        **attrs: Any,
    ) -> None:
        """Emit an op whose first result adds to the gradient of ``name``.

        ``also`` names further buffers that the op writes (weight gradients).
        """
        if self.buffers[name.removesuffix("+")].scope == "data":
            return
        op = self._op(kind, dims, dtype, reads, (f"d.{name}", *also), attrs)
        if name not in self._have:
            self._have.add(name)
            self._declare(name, f"d.{name}")
            self.input_ops.append(op)
            return
        part = f"d.{name.removesuffix('+')}.part"
        self._declare(name, part)
        size = self.buffers[name.removesuffix("+")].elements
        reads = (f"d.{name}", part)
        if kind == "alias":
            reads = (f"d.{name}", *op.reads)
        else:
            self.input_ops.append(replace(op, writes=(part, *also)))
        self.input_ops.append(Op("add", {"t": size, "n": 1}, dtype, reads, (f"d.{name}",)))

    def weight(
        self,
        name: str,
        kind: str,
        dims: Mapping[str, Size],
        dtype: str,
        reads: tuple[str, ...],
        **attrs: Any,
    ) -> None:
        """Emit an op that accumulates the gradient of weight ``name``."""
        attrs |= {"accumulate": True, "out_dtype": self.buffers[f"g.{name}"].dtype}
        op = self._op(kind, dims, dtype, reads, (f"g.{name}",), attrs)
        self.weight_ops.append((len(self.input_ops), op))

    @staticmethod
    def _op(
        kind: str,
        dims: Mapping[str, Size],
        dtype: str,
        reads: tuple[str, ...],
        writes: tuple[str, ...],
        attrs: Mapping[str, Any],
    ) -> Op:
        attrs = dict(attrs)
        stream, group = attrs.pop("stream", "compute"), attrs.pop("group", "")
        return Op(kind, dims, dtype, reads, writes, stream, group, attrs)

    def joined(self) -> tuple[Op, ...]:
        """Return input and weight ops in one list, each weight op one input op late.

        The delay lets the collective that follows an input gradient run beside the weight
        gradient (Megatron-LM's asynchronous tensor-parallel all-reduce).
        """
        merged: list[Op] = []
        waiting = sorted(self.weight_ops, key=lambda item: item[0])
        for index, op in enumerate(self.input_ops):
            while waiting and waiting[0][0] < index:
                merged.append(waiting.pop(0)[1])
            merged.append(op)
        merged.extend(op for _, op in waiting)
        return tuple(merged)


def _matmul(op: Op, tape: Tape) -> None:
    m, n, k = op.dims["m"], op.dims["n"], op.dims["k"]
    x, weight = op.reads[0], op.reads[1]
    dy = f"d.{op.writes[0]}"
    tape.contribute(x, "matmul", {"m": m, "n": k, "k": n}, op.dtype, (dy, weight), layout="nn")
    tape.weight(weight, "matmul", {"m": n, "n": k, "k": m}, op.dtype, (dy, x), layout="tn")
    if len(op.reads) > 2:
        tape.weight(op.reads[2], "sum_rows", {"t": m, "n": n}, op.dtype, (dy,))


def _bias(op: Op, tape: Tape) -> None:
    dy = f"d.{op.writes[0]}"
    tape.contribute(op.reads[0], "alias", op.dims, op.dtype, (dy,))
    tape.weight(op.reads[1], "sum_rows", op.dims, op.dtype, (dy,))


def _norm(op: Op, tape: Tape) -> None:
    grads = tuple(f"g.{weight}" for weight in op.reads[1:])
    tape.contribute(
        op.reads[0],
        f"{op.kind}_backward",
        op.dims,
        op.dtype,
        (f"d.{op.writes[0]}", op.reads[0], op.reads[1]),
        also=grads,
        **op.attrs,
    )


def _head_norm(op: Op, tape: Tape) -> None:
    grads = tuple(f"g.{weight}" for weight in op.reads[1:])
    tape.contribute(
        op.reads[0],
        "head_norm_backward",
        op.dims,
        op.dtype,
        (f"d.{op.writes[0]}", *op.reads),
        also=grads,
        **op.attrs,
    )


def _embedding(op: Op, tape: Tape) -> None:
    tape.weight(
        op.reads[0],
        "embedding_backward",
        op.dims,
        op.dtype,
        (f"d.{op.writes[0]}", op.reads[1]),
        **op.attrs,
    )


def _elementwise_saved(op: Op, tape: Tape) -> None:
    tape.contribute(
        op.reads[0],
        f"{op.kind}_backward",
        op.dims,
        op.dtype,
        (f"d.{op.writes[0]}", op.reads[0]),
        **op.attrs,
    )


def _rope(op: Op, tape: Tape) -> None:
    attrs = {**op.attrs, "inverse": True}
    tape.contribute(
        op.reads[0], "rope", op.dims, op.dtype, (f"d.{op.writes[0]}", *op.reads[1:]), **attrs
    )


def _add(op: Op, tape: Tape) -> None:
    for name in op.reads:
        tape.contribute(name, "alias", op.dims, op.dtype, (f"d.{op.writes[0]}",))


def _attention(op: Op, tape: Tape) -> None:
    out, lse = op.writes
    tape.contribute(
        op.reads[0],
        "attention_backward",
        op.dims,
        op.dtype,
        (f"d.{out}", op.reads[0], out, lse),
        **op.attrs,
    )


def _softmax_loss(op: Op, tape: Tape) -> None:
    logits, targets = op.reads[0], op.reads[1]
    tape.contribute(
        logits, "softmax_backward", op.dims, op.dtype, (logits, targets, op.writes[1]), **op.attrs
    )


def _collective(adjoint: str) -> Callable[[Op, Tape], None]:
    def rule(op: Op, tape: Tape) -> None:
        attrs = {**op.attrs, "stream": op.stream, "group": op.group}
        tape.contribute(op.reads[0], adjoint, op.dims, op.dtype, (f"d.{op.writes[0]}",), **attrs)

    return rule


def _all_to_all(op: Op, tape: Tape) -> None:
    """Every part goes back to where it came from."""
    attrs = {**op.attrs, "stream": op.stream, "group": op.group}
    if "counts" in attrs:
        attrs["counts"] = tuple(zip(*attrs["counts"], strict=True))
    tape.contribute(op.reads[0], op.kind, op.dims, op.dtype, (f"d.{op.writes[0]}",), **attrs)


def _all_reduce(op: Op, tape: Tape) -> None:
    """Megatron's g: the sum's gradient is already whole on every rank."""
    tape.contribute(op.reads[0], "alias", op.dims, op.dtype, (f"d.{op.writes[0]}",))


def _alias(op: Op, tape: Tape) -> None:
    """An alias with a group is Megatron's f: every rank's gradient is a part of the sum."""
    dy = f"d.{op.writes[0]}"
    if not op.group:
        tape.contribute(op.reads[0], "alias", op.dims, op.dtype, (dy,))
        return
    tape.contribute(
        op.reads[0], "all_reduce", op.dims, op.dtype, (dy,), stream=op.group, group=op.group
    )


def _grouped_matmul(op: Op, tape: Tape) -> None:
    (x, weight), counts, dy = op.reads[:2], op.reads[2:], f"d.{op.writes[0]}"
    turned = {**op.dims, "n": op.dims["k"], "k": op.dims["n"]}
    tape.contribute(x, op.kind, turned, op.dtype, (dy, weight, *counts), layout="nn")
    tape.weight(weight, op.kind, op.dims, op.dtype, (dy, x, *counts), layout="tn")


def _route(op: Op, tape: Tape) -> None:
    gates, chosen = op.writes[:2]
    reads = (f"d.{gates}", gates, chosen)
    tape.contribute(op.reads[0], "route_backward", op.dims, op.dtype, reads, **op.attrs)


def _permute(op: Op, tape: Tape) -> None:
    reads = (f"d.{op.writes[0]}", op.reads[1])
    tape.contribute(op.reads[0], "permute_backward", op.dims, op.dtype, reads, **op.attrs)


def _combine(op: Op, tape: Tape) -> None:
    rows, gates, _ = op.reads
    tape.seed(gates)
    reads = (f"d.{op.writes[0]}", *op.reads)
    also = (f"d.{gates}",)
    tape.contribute(rows, "combine_backward", op.dims, op.dtype, reads, also, **op.attrs)


def _swap_blocks(op: Op, tape: Tape) -> None:
    attrs = {**op.attrs, "outer": op.attrs["inner"], "inner": op.attrs["outer"]}
    tape.contribute(op.reads[0], op.kind, op.dims, op.dtype, (f"d.{op.writes[0]}",), **attrs)


def _lookup(op: Op, tape: Tape) -> None:
    """Rows of tables are changed where they were read; no gradient of a whole table is kept."""
    tables, index = op.reads
    reads = (f"d.{op.writes[0]}", index, tables)
    step = Op("descend_rows", op.dims, op.dtype, reads, (tables,))
    tape.weight_ops.append((len(tape.input_ops), step))


def _pairs(op: Op, tape: Tape) -> None:
    row, found = op.reads
    tape.seed(found)
    reads = (f"d.{op.writes[0]}", row, found)
    tape.contribute(row, "pairs_backward", op.dims, op.dtype, reads, (f"d.{found}",))


def _nothing(op: Op, tape: Tape) -> None:
    """The op lies outside the differentiated path."""


ADJOINTS: dict[str, Callable[[Op, Tape], None]] = {
    "matmul": _matmul,
    "bias": _bias,
    "rmsnorm": _norm,
    "layernorm": _norm,
    "head_norm": _head_norm,
    "embedding": _embedding,
    "rope": _rope,
    "swiglu": _elementwise_saved,
    "gelu": _elementwise_saved,
    "relu": _elementwise_saved,
    "add": _add,
    "attention": _attention,
    "attention_merge": merge_adjoint,
    "attention_rows": attention_rows_adjoint,
    "take_rows": take_rows_adjoint,
    "put_rows": put_rows_adjoint,
    "linear_attention": linear_adjoint,
    "linear_carry": carry_adjoint,
    "regroup": regroup_adjoint,
    "attention_tasks": tasks_adjoint,
    "split_columns": split_columns_adjoint,
    "gather_rows": gather_rows_adjoint,
    "all_to_all": _all_to_all,
    "softmax_loss": _softmax_loss,
    "softmax_stats": _nothing,
    "grouped_matmul": _grouped_matmul,
    "route": _route,
    "permute": _permute,
    "combine": _combine,
    "swap_blocks": _swap_blocks,
    "all_reduce": _all_reduce,
    "all_gather": _collective("reduce_scatter"),
    "reduce_scatter": _collective("all_gather"),
    "alias": _alias,
    "lookup": _lookup,
    "pairs": _pairs,
}


def backward(ops: tuple[Op, ...], buffers: dict[str, Buffer], outputs: tuple[str, ...]) -> Tape:
    """Return the tape with the backward ops of ``ops``; gradient buffers join ``buffers``.

    ``outputs`` are the block's results whose gradients come from outside.
    """
    tape = Tape(buffers)
    for name in outputs:
        tape.seed(name)
    for op in reversed(ops):
        if any(tape.has(name) for name in op.writes) or op.kind == "softmax_loss":
            ADJOINTS[op.kind](op, tape)
    return tape

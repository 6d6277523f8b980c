"""Attention over sequences split between ranks, as ops: ring attention, Ulysses, or both.

Forward: Ulysses trades rows for heads by all-to-all; then blocks of keys and values go round the
ring while each rank attends to the block at hand, and partial outputs are merged by the logarithm
of their sums of exponentials (lse). Backward: blocks go round again and their gradients travel with
them until they are home; each block's gradients follow from the merged output and lse alone (Dao
2023, algorithm 2), so no block is kept between the passes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple
from typing import TYPE_CHECKING, Any

from simcore.gathered import gathered, gathered_adjoint
from simcore.lightseq import balanced, balanced_adjoint
from simcore.ops import Buffer, Op
from simcore.sequence import SequenceSplit, Tile, busiest, tiles
from simcore.token_ring import query_ring, query_ring_adjoint

if TYPE_CHECKING:
    from simcore.adjoints import Tape
    from simcore.network import Builder, Rows

STREAM = "cp"
Heads = tuple[int, int, int]  # heads, KV heads, head width
Sizes = tuple[int, int, int, int, int]  # batch, rows, heads, KV heads, head width


def split_attention(
    b: Builder, rows: Rows, qkv: str, heads: int, kv_heads: int, d: int, *, causal: bool
) -> str:
    """Append attention of packed rows [tokens, (heads + 2 kv_heads) d] of a split sequence.

    Return the output, [tokens, heads d], of the same rows.
    """
    split = rows.split
    way = _WAYS[split.travels if split.ring > 1 else ""]

    def attended(x: str, sizes: Heads) -> str:
        inside = rows.batch, rows.new * split.ulysses, *sizes
        return way(b, Ring(split, inside, causal, b.dtype), x)

    return exchanged(b, rows, qkv, (heads, kv_heads, d), attended)


def exchanged(
    b: Builder, rows: Rows, qkv: str, sizes: Heads, attended: Callable[[str, Heads], str]
) -> str:
    """Append what ``attended`` does, between all-to-alls that trade rows for heads and back.

    ``attended`` is given the packed rows and their heads, and returns the name of its output.
    Without Ulysses ranks nothing is traded.
    """
    heads, kv_heads, d = sizes
    split, parts = rows.split, rows.split.ulysses
    if parts == 1:
        return attended(qkv, sizes)
    pieces = (heads * d, kv_heads * d, kv_heads * d)
    qkv = _exchange(b, split, qkv, rows.batch, rows.new, pieces, to_heads=True)
    out = attended(qkv, (heads // parts, kv_heads // parts, d))
    return _exchange(b, split, out, rows.batch, rows.new, pieces[:1], to_heads=False)


def _exchange(
    b: Builder,
    split: SequenceSplit,
    x: str,
    batch: int,
    rows: int,
    pieces: tuple[int, ...],
    *,
    to_heads: bool,
) -> str:
    """Append an all-to-all from rows of all heads to all rows of some heads, or back.

    ``pieces``: widths of the columns' parts, each of which is divided over the ranks.
    """
    parts, width = split.ulysses, sum(pieces)
    tokens = batch * rows
    columns = {"parts": parts, "pieces": pieces, "by": "columns"}
    by_rows = {"parts": parts, "batch": batch, "by": "rows"}
    first, last = (columns, by_rows) if to_heads else (by_rows, columns)
    count: dict[str, Any] = {"t": tokens, "n": width}
    sent = b.act(f"{x}.sent", parts, tokens, width // parts)
    b.op("regroup", (x,), (sent,), attrs={**first, "inverse": False}, **count)
    came = b.act(f"{x}.came", parts, tokens, width // parts)
    group = split.ulysses_axis
    b.op("all_to_all", (sent,), (came,), n=tokens * width, group=group, stream=STREAM)
    shape = (tokens * parts, width // parts) if to_heads else (tokens, width)
    out = b.act(f"{x}.turned", *shape)
    return b.op("regroup", (came,), (out,), attrs={**last, "inverse": True}, **count)


def _alone(b: Builder, ring: Ring, qkv: str) -> str:
    """Append attention of whole sequences."""
    batch, rows, heads, kv_heads, d = ring.sizes
    out, lse = ring.pair(b, "")
    dims: dict[str, Any] = {"b": batch, "s": rows, "kv": rows, "h": heads, "hkv": kv_heads}
    attrs = {"causal": ring.causal}
    return b.op("attention", (qkv,), (out, lse), attrs=attrs, d=d, dv=d, **dims)


def _ring(b: Builder, ring: Ring, qkv: str) -> str:
    """Append attention in which keys and values go round; return the output."""
    block, last = b.act("kv.0", *ring.kv_shape), ring.split.ring - 1
    b.ops.append(ring.packed(qkv, block))
    total: tuple[str, str] | None = None
    for step in range(last + 1):
        for following, outer in ring.following(step):
            b.ops.append(ring.shifted(block, b.act(following, *ring.kv_shape), outer=outer))
        part = ring.pair(b, f".{step}")
        b.ops.append(ring.block("attention_block", step, (qkv, block), part))
        if total is not None:
            merged = ring.pair(b, "" if step == last else f".to{step}")
            b.ops.append(ring.merge(qkv, total, part, merged))
            part = merged
        total, block = part, f"kv.{step + 1}"
    return "o"


class Ring:
    """The ops that forward and backward of one ring share."""

    def __init__(self, split: SequenceSplit, sizes: Sizes, causal: bool, dtype: str) -> None:
        self.split, self.sizes, self.causal, self.dtype = split, sizes, causal, dtype
        batch, rows, heads, kv_heads, d = sizes
        self.tokens, self.q_width, self.kv_width = batch * rows, heads * d, 2 * kv_heads * d

    @classmethod
    def of(cls, merge: Op) -> Ring:
        """Return the ring of a merge, from its attributes."""
        a = merge.attrs
        return cls(SequenceSplit(*a["split"]), a["sizes"], a["causal"], merge.dtype)

    def pair(self, b: Builder, suffix: str) -> tuple[str, str]:
        """Declare an output [tokens, width] and its lse; return their names."""
        batch, rows, heads, _, _ = self.sizes
        out = b.act(f"o{suffix}", self.tokens, self.q_width)
        return out, b.act(f"lse{suffix}", batch, heads, rows, dtype="fp32")

    def merge(
        self, source: str, left: tuple[str, str], right: tuple[str, str], out: tuple[str, str]
    ) -> Op:
        """Return the op that joins two partial outputs, with what backward needs of its ring."""
        attrs = {
            "source": source,
            "split": astuple(self.split),
            "sizes": self.sizes,
            "causal": self.causal,
        }
        dims = {"t": self.tokens, "n": self.q_width}
        return Op("attention_merge", dims, self.dtype, (*left, *right), out, attrs=attrs)

    def columns(self, x: str, out: str, first: int, width: int) -> Op:
        """Return the op that copies ``width`` columns of packed rows, from column ``first`` on."""
        dims = {"t": self.tokens, "n": width}
        return Op("take_columns", dims, self.dtype, (x,), (out,), attrs={"first": first})

    def packed(self, qkv: str, block: str) -> Op:
        """Return the op that copies keys and values out of packed rows."""
        return self.columns(qkv, block, self.q_width, self.kv_width)

    @property
    def kv_shape(self) -> tuple[int, int]:
        """Rows and columns of a block of keys and values."""
        return self.tokens, self.kv_width

    def following(self, step: int) -> list[tuple[str, bool]]:
        """Return the blocks that the block of ``step`` is passed on as, and whether outwards.

        The first block of an inner ring also goes to the next inner ring.
        """
        inner, found = self.split.inner, []
        if step % inner == 0 and step + inner < self.split.ring:
            found.append((f"kv.{step + inner}", True))
        if (step + 1) % inner:
            found.append((f"kv.{step + 1}", False))
        return found

    def shifted(self, block: str, following: str, *, outer: bool = False) -> Op:
        """Return the op that passes a block to the next rank, or to that of the next ring."""
        dims, split = {"n": self.tokens * self.kv_width}, self.split
        axis = ("cp_outer" if outer else "cp_inner") if split.doubled else split.ring_axis
        stream = f"{STREAM}.outer" if outer else STREAM
        return Op("ring_shift", dims, self.dtype, (block,), (following,), stream, axis)

    def block(self, kind: str, step: int, reads: tuple[str, ...], writes: tuple[str, ...]) -> Op:
        """Return an op on the queries and the block of ``step``; its dims are the busiest rank's.

        ``rows`` and ``tiles`` say what part of the operands each rank uses.
        """
        batch, rows, heads, kv_heads, d = self.sizes
        found: tuple[Tile, ...] = tiles(self.split, rows, step, self.causal)
        q0, q1, k0, k1, masked = busiest(found)
        dims = {"b": batch, "s": q1 - q0, "kv": k1 - k0, "h": heads, "hkv": kv_heads}
        attrs = {"causal": masked, "tiles": found, "axis": self.split.ring_axis, "rows": rows}
        return Op(kind, {**dims, "d": d, "dv": d}, self.dtype, reads, writes, attrs=attrs)

    def sum(self, left: str, right: str, out: str, width: int) -> Op:
        """Return the op that adds two gradients of ``width`` columns."""
        return Op("add", {"t": self.tokens, "n": width}, self.dtype, (left, right), (out,))


def _ring_adjoint(op: Op, ring: Ring, tape: Tape) -> None:
    """Emit the backward ring of the merge that ends a forward ring.

    No earlier op of the ring has a gradient of its own: the ring runs again, with the merged
    output and lse.
    """
    (out, lse), qkv = op.writes, op.attrs["source"]

    def fresh(name: str, width: int) -> str:
        tape.buffers.setdefault(name, Buffer((ring.tokens, width), ring.dtype))
        return name

    emit, inner = tape.input_ops.append, ring.split.inner

    def plus(carried: str, part: str, name: str, width: int) -> str:
        """Return the sum of two gradients, or the second where there is no first."""
        if not carried:
            return part
        emit(ring.sum(carried, part, fresh(name, width), width))
        return name

    def passed(grad: str, name: str, *, outer: bool = False) -> str:
        emit(ring.shifted(grad, fresh(name, ring.kv_width), outer=outer))
        return name

    emit(ring.packed(qkv, "kv.0"))
    queries, carried, home = "", "", ""  # home: of the inner rings before
    for step in range(ring.split.ring):
        for following, outer in ring.following(step):
            emit(ring.shifted(f"kv.{step}", following, outer=outer))
        dq, dkv = fresh(f"d.q.{step}", ring.q_width), fresh(f"d.kv.{step}", ring.kv_width)
        reads = (f"d.{out}", qkv, f"kv.{step}", out, lse)
        emit(ring.block("attention_block_backward", step, reads, (dq, dkv)))
        queries = plus(queries, dq, f"d.q.to{step}", ring.q_width)
        total = plus(carried, dkv, f"d.kv.to{step}", ring.kv_width)
        carried = passed(total, f"d.kv.came{step}")
        if (step + 1) % inner == 0:  # home in its inner ring
            home = plus(home, carried, f"d.kv.home{step}", ring.kv_width)
            carried = ""
            if ring.split.doubled:
                home = passed(home, f"d.kv.back{step}", outer=True)
    width = {"t": ring.tokens, "n": ring.q_width + ring.kv_width}
    tape.contribute(qkv, "join_columns", width, op.dtype, (queries, home))


def regroup_adjoint(op: Op, tape: Tape) -> None:
    """The gradient is put back the way that the rows came."""
    attrs = {**op.attrs, "inverse": not op.attrs["inverse"]}
    tape.contribute(op.reads[0], "regroup", op.dims, op.dtype, (f"d.{op.writes[0]}",), **attrs)


_WAYS: dict[str, Callable[[Builder, Ring, str], str]] = {
    "": _alone,
    "keys": _ring,
    "queries": query_ring,
    "both": balanced,
    "gathered": gathered,
}
_BACK: dict[str, Callable[[Op, Ring, Tape], None]] = {
    "keys": _ring_adjoint,
    "queries": query_ring_adjoint,
    "both": balanced_adjoint,
    "gathered": gathered_adjoint,
}


def merge_adjoint(op: Op, tape: Tape) -> None:
    """Emit the backward ring that a forward ring's last merge stands for."""
    ring = Ring.of(op)
    _BACK[ring.split.travels](op, ring, tape)

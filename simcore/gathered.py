"""Softmax attention with all keys and values gathered (LASP-2H, Sun et al. 2025, section 3.4).

Each rank holds one run of tokens. It attends to its own keys while those of all ranks are gathered,
then to those of the ranks before it, and merges the two. Backward gathers again, and sums the
gradients of keys and values where they belong.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from simcore.ops import Buffer, Op, Size
from simcore.sequence import NO_TILE, Tile, busiest

if TYPE_CHECKING:
    from simcore.adjoints import Tape
    from simcore.network import Builder
    from simcore.ring import Ring

STREAM = "cp"


def _gather(ring: Ring, block: str, every: str, whole: str) -> list[Op]:
    """Return the ops that collect all ranks' blocks, and put them in the sequences' order."""
    size, parts = ring.tokens * ring.kv_width, ring.split.ring
    axis = ring.split.ring_axis
    dims = {"n": parts * size}
    return [
        Op("all_gather", dims, ring.dtype, (block,), (every,), STREAM, axis),
        _ordered(ring, every, whole, inverse=True),
    ]


def _ordered(ring: Ring, x: str, out: str, *, inverse: bool) -> Op:
    """Return the op that turns [ranks, batch, rows] into [batch, ranks, rows], or back."""
    parts = ring.split.ring
    attrs = {"parts": parts, "batch": ring.sizes[0], "by": "rows", "inverse": inverse}
    dims = {"t": parts * ring.tokens, "n": ring.kv_width}
    return Op("regroup", dims, ring.dtype, (x,), (out,), attrs=attrs)


def _block(ring: Ring, kind: str, found: tuple[Tile, ...], names: tuple[Any, Any]) -> Op:
    """Return an op of attention to tiles of the own block or of the whole sequence."""
    batch, rows, heads, kv_heads, d = ring.sizes
    q0, q1, k0, k1, masked = busiest(found)
    dims = {"b": batch, "s": q1 - q0, "kv": k1 - k0, "h": heads, "hkv": kv_heads, "d": d, "dv": d}
    attrs = {"causal": masked, "tiles": found, "axis": ring.split.ring_axis, "rows": rows}
    return Op(kind, dims, ring.dtype, *names, attrs=attrs)


def _tiles(ring: Ring) -> tuple[tuple[Tile, ...], tuple[Tile, ...]]:
    """Return per rank the tile of its own keys, and that of the ranks' before it."""
    rows, ranks = ring.sizes[1], range(ring.split.ring)
    own: tuple[Tile, ...] = tuple((0, rows, 0, rows, True) for _ in ranks)
    past: tuple[Tile, ...] = tuple((0, rows, 0, r * rows, False) if r else NO_TILE for r in ranks)
    return own, past


def gathered(b: Builder, ring: Ring, qkv: str) -> str:
    """Append attention over gathered keys and values; return the output."""
    block = b.act("kv.0", *ring.kv_shape)
    whole: tuple[Size, Size] = (ring.split.ring * ring.tokens, ring.kv_width)
    every, ordered = b.act("kv.all", *whole), b.act("kv.whole", *whole)
    gather, order = _gather(ring, block, every, ordered)
    own, past = _tiles(ring)
    left, right, out = ring.pair(b, ".own"), ring.pair(b, ".past"), ring.pair(b, "")
    b.ops += [
        ring.packed(qkv, block),
        gather,
        _block(ring, "attention_block", own, ((qkv, block), left)),
        order,
        _block(ring, "attention_block", past, ((qkv, ordered), right)),
        ring.merge(qkv, left, right, out),
    ]
    return out[0]


def gathered_adjoint(op: Op, ring: Ring, tape: Tape) -> None:
    """Emit the backward of the merge that ends attention over gathered keys and values."""
    (out, lse), qkv, emit = op.writes, op.attrs["source"], tape.input_ops.append

    def fresh(name: str, width: int, parts: int = 1) -> str:
        tape.buffers.setdefault(name, Buffer((parts * ring.tokens, width), ring.dtype))
        return name

    parts = ring.split.ring
    gather, order = _gather(ring, "kv.0", "kv.all", "kv.whole")
    own, past = _tiles(ring)
    mine = fresh("d.q.own", ring.q_width), fresh("d.kv.own", ring.kv_width)
    other = fresh("d.q.past", ring.q_width), fresh("d.kv.past", ring.kv_width, parts)
    turned, home = fresh("d.kv.turned", ring.kv_width, parts), fresh("d.kv.home", ring.kv_width)
    queries, pairs = fresh("d.q.sum", ring.q_width), fresh("d.kv.sum", ring.kv_width)
    back = "attention_block_backward"
    emit(ring.packed(qkv, "kv.0"))
    emit(gather)
    emit(order)
    emit(_block(ring, back, past, ((f"d.{out}", qkv, "kv.whole", out, lse), other)))
    emit(_ordered(ring, other[1], turned, inverse=False))
    dims = {"n": parts * ring.tokens * ring.kv_width}
    axis = ring.split.ring_axis
    emit(Op("reduce_scatter", dims, ring.dtype, (turned,), (home,), STREAM, axis))
    emit(_block(ring, back, own, ((f"d.{out}", qkv, "kv.0", out, lse), mine)))
    emit(ring.sum(mine[0], other[0], queries, ring.q_width))
    emit(ring.sum(mine[1], home, pairs, ring.kv_width))
    width = {"t": ring.tokens, "n": ring.q_width + ring.kv_width}
    tape.contribute(qkv, "join_columns", width, op.dtype, (queries, pairs))

"""TokenRing (Wang et al. 2024): queries go round, keys and values stay, outputs are sent home.

Queries travel one way, a place per step; the partial outputs of step k go k places the other way,
on a stream of their own. Backward does the same with queries, outputs and their gradients one
way, and the queries' gradients home.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from simcore.dtypes import dtype_bytes
from simcore.ops import Buffer, Op
from simcore.sequence import SequenceSplit

if TYPE_CHECKING:
    from simcore.adjoints import Tape
    from simcore.network import Builder
    from simcore.ring import Ring

AWAY, HOME = "cp", "cp.home"


class _Exchange:
    """The two ways of a ring, and what each carries in a step, in bytes."""

    def __init__(self, ring: Ring, away_bytes: float, home_bytes: float) -> None:
        self.ring = ring
        self.beside = {AWAY: home_bytes / away_bytes, HOME: away_bytes / home_bytes}

    def shift(self, buffer: Buffer, name: str, out: str, distance: int) -> Op:
        """Return the op that sends a buffer so many places on, or back.

        ``beside_bytes``: its share of what the other way carries in the same step.
        """
        way = AWAY if distance > 0 else HOME
        attrs = {"distance": distance, "beside_bytes": float(buffer.size_bytes) * self.beside[way]}
        dims = {"n": buffer.elements}
        axis = self.ring.split.ring_axis
        return Op("ring_shift", dims, buffer.dtype, (name,), (out,), way, axis, attrs)


def _sizes_bytes(ring: Ring) -> tuple[float, float]:
    """Return the bytes of a rank's queries and of their lse."""
    batch, rows, heads, _, _ = ring.sizes
    return ring.tokens * ring.q_width * dtype_bytes(ring.dtype), batch * heads * rows * 4.0


def query_ring(b: Builder, ring: Ring, qkv: str) -> str:
    """Append attention in which queries go round; return the output."""
    q_bytes, lse_bytes = _sizes_bytes(ring)
    ways, last = _Exchange(ring, q_bytes, q_bytes + lse_bytes), ring.split.ring - 1
    query = b.act("q.0", ring.tokens, ring.q_width)
    block = b.act("kv.0", ring.tokens, ring.kv_width)
    b.ops += [ring.columns(qkv, query, 0, ring.q_width), ring.packed(qkv, block)]
    total = part = ring.pair(b, ".0")

    def merge(step: int) -> tuple[str, str]:
        merged = ring.pair(b, "" if step == last else f".to{step}")
        b.ops.append(ring.merge(qkv, total, part, merged))
        return merged

    for step in range(last + 1):
        if step < last:
            following = b.act(f"q.{step + 1}", ring.tokens, ring.q_width)
            b.ops.append(ways.shift(b.buffers[query], query, following, 1))
        here = ring.pair(b, f".away{step}") if step else part
        b.ops.append(ring.block("attention_block", step, (query, block), here))
        if step > 1:  # a step late: it has had time to arrive
            total = merge(step - 1)
        if step:
            part = ring.pair(b, f".{step}")
            b.ops += [
                ways.shift(b.buffers[name], name, out, -step)
                for name, out in zip(here, part, strict=True)
            ]
        query = f"q.{step + 1}"
    return merge(last)[0]


def query_ring_adjoint(op: Op, ring: Ring, tape: Tape) -> None:
    """Emit the backward of the merge that ends a ring of queries."""
    qkv, (out, lse) = op.attrs["source"], op.writes
    q_bytes, lse_bytes = _sizes_bytes(ring)
    ways, last = _Exchange(ring, 3 * q_bytes + lse_bytes, q_bytes), ring.split.ring - 1
    emit = tape.input_ops.append
    emit(ring.columns(qkv, "q.0", 0, ring.q_width))
    emit(ring.packed(qkv, "kv.0"))

    def fresh(name: str, like: str) -> str:
        tape.buffers.setdefault(name, tape.buffers[like])
        return name

    carried = [f"d.{out}", "q.0", out, lse]
    kinds = [("o.grad", "q.0"), ("q", "q.0"), ("o.with", "q.0"), ("lse.with", lse)]
    block_grad, homes = "", []
    for step in range(last + 1):
        following = carried
        if step < last:
            following = [fresh(f"{name}.{step + 1}", like) for name, like in kinds]
            for name, arriving, (_, like) in zip(carried, following, kinds, strict=True):
                emit(ways.shift(tape.buffers[like], name, arriving, 1))
        part = fresh(f"d.q.away{step}", "q.0"), fresh(f"d.kv.{step}", "kv.0")
        grad, query, output, norm = carried
        reads = (grad, query, "kv.0", output, norm)
        emit(ring.block("attention_block_backward", step, reads, part))
        homes.append(part[0])
        if step:
            homes[-1] = fresh(f"d.q.{step}", "q.0")
            emit(ways.shift(tape.buffers["q.0"], part[0], homes[-1], -step))
            total = fresh(f"d.kv.to{step}", "kv.0")
            emit(ring.sum(block_grad, part[1], total, ring.kv_width))
            part = part[0], total
        block_grad, carried = part[1], following
    queries = homes[0]
    for step, home in enumerate(homes[1:], 1):
        total = fresh(f"d.q.to{step}", "q.0")
        emit(ring.sum(queries, home, total, ring.q_width))
        queries = total
    width = {"t": ring.tokens, "n": ring.q_width + ring.kv_width}
    tape.contribute(qkv, "join_columns", width, op.dtype, (queries, block_grad))


def query_ring_bytes(
    split: SequenceSplit, tokens: float, width: float, heads: float, size: float
) -> tuple[float, float]:
    """Return the bytes that a rank sends away and home in one forward pass of one layer.

    ``tokens`` of the whole sequences, ``width`` of their queries; an output goes with one fp32
    number per head.
    """
    hops = (split.ring - 1) * tokens / split.degree
    return hops * width * size, hops * (width * size + 4 * heads)

"""LightSeq (Li et al. 2023, DistFlashAttn): causal attention in which early places help late ones.

Every place holds one run of the sequence. With keys and values alone on their way, place p has
something to do in p + 1 of n steps. Here step t lets place p >= t attend to the keys of place
p - t, which it fetched a step ahead, while a place p < t, which has no further keys to see, takes
the queries of place p + n - t on its own keys and sends the output back. So a step does the pairs
of places at distance t and those at distance n - t, and all is done after floor(n / 2) steps
(section 3.1 and algorithm 2); with n even, half of the places rest in the last one. Backward does
the same with queries, outputs and their gradients, and sends gradients back.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING

from simcore.ops import Buffer, Op
from simcore.sequence import SequenceSplit, helpers

if TYPE_CHECKING:
    from simcore.adjoints import Tape
    from simcore.network import Builder
    from simcore.ring import Ring

Pair = tuple[str, str]
# Streams: keys to later places, queries to helpers, and what comes back from either.
KEYS, QUERIES, KEYS_BACK, QUERIES_BACK = "cp", "cp.help", "cp.back", "cp.home"


class _Exchange:
    """The messages of one step: who sends, and whose sums they enter."""

    def __init__(self, ring: Ring, step: int) -> None:
        self.ring, self.step, self.places = ring, step, ring.split.ring
        self.helping = helpers(self.places, step)
        self.working = tuple(place >= step for place in range(self.places))
        self.helped = tuple(place >= self.places - step for place in range(self.places))
        self.seen = tuple(place < self.places - step for place in range(self.places))

    def message(
        self, buffer: Buffer, name: str, out: str, stream: str, senders: tuple[bool, ...]
    ) -> Op:
        """Return the op that sends a buffer on (``senders`` here), or back."""
        back = stream in (KEYS_BACK, QUERIES_BACK)
        distance = -self.step if back else self.step
        attrs = {"distance": distance, "senders": senders}
        dims, axis = {"n": buffer.elements}, self.ring.split.ring_axis
        return Op("ring_shift", dims, buffer.dtype, (name,), (out,), stream, axis, attrs)

    def block(
        self, kind: str, own: tuple[str, ...], other: tuple[str, ...], writes: tuple[str, ...]
    ) -> Op:
        """Return the op on the ``own`` queries, or where a place helps on ``other`` ones."""
        if not any(self.helping):
            return self.ring.block(kind, self.step, own, writes)
        found = self.ring.block(kind, self.step, own + other, writes)
        return replace(found, attrs={**found.attrs, "helps": self.helping})

    def where(self, op: Op, places: tuple[bool, ...]) -> Op:
        """Return a sum or merge whose second part counts on ``places`` alone."""
        attrs = {**op.attrs, "places": places, "axis": self.ring.split.ring_axis}
        return replace(op, attrs=attrs)


def balanced(b: Builder, ring: Ring, qkv: str) -> str:
    """Append causal attention in which idle places help; return the output."""
    last = ring.split.ring // 2
    keys = b.act("kv.0", *ring.kv_shape)
    b.ops.append(ring.packed(qkv, keys))
    query = "q.0"
    if ring.split.ring > 2:
        b.act(query, ring.tokens, ring.q_width)
        b.ops.append(ring.columns(qkv, query, 0, ring.q_width))
    total: Pair = ring.pair(b, ".0")
    parts: deque[tuple[_Exchange, Pair, tuple[bool, ...]]] = deque()  # to be merged, in turn

    def merge(left: Pair) -> Pair:
        """Merge the next part into what there is."""
        exchange, part, places = parts.popleft()
        final = exchange.step == last and not parts
        kind = "home" if places is exchange.helped else ""
        merged = ring.pair(b, "" if final else f".to{kind}{exchange.step}")
        b.ops.append(exchange.where(ring.merge(qkv, left, part, merged), places))
        return merged

    def fetch(step: int) -> None:
        ahead = _Exchange(ring, step)
        came = b.act(f"kv.{step}", *ring.kv_shape)
        b.ops.append(ahead.message(b.buffers[keys], keys, came, KEYS, ahead.seen))
        if any(ahead.helping):
            came = b.act(f"q.{step}", ring.tokens, ring.q_width)
            b.ops.append(ahead.message(b.buffers[query], query, came, QUERIES, ahead.helped))

    fetch(1)
    b.ops.append(ring.block("attention_block", 0, (qkv, keys), total))
    for step in range(1, last + 1):
        if step < last:
            fetch(step + 1)
        here, part = _Exchange(ring, step), ring.pair(b, f".{step}")
        own, other = (qkv, f"kv.{step}"), (f"q.{step}", keys)
        b.ops.append(here.block("attention_block", own, other, part))
        due = len(parts)  # of earlier steps: they have had time to arrive
        parts.append((here, part, here.working))
        if any(here.helping):
            home = ring.pair(b, f".home{step}")
            b.ops += [
                here.message(b.buffers[name], name, out, QUERIES_BACK, here.helping)
                for name, out in zip(part, home, strict=True)
            ]
            parts.append((here, home, here.helped))
        for _ in range(due):
            total = merge(total)
    while parts:
        total = merge(total)
    return total[0]


def balanced_adjoint(op: Op, ring: Ring, tape: Tape) -> None:
    """Emit the backward of the merge that ends balanced attention."""
    qkv, (out, lse), last = op.attrs["source"], op.writes, ring.split.ring // 2
    emit, buffers = tape.input_ops.append, tape.buffers
    emit(ring.packed(qkv, "kv.0"))
    buffers.setdefault("q.0", Buffer((ring.tokens, ring.q_width), ring.dtype))
    if ring.split.ring > 2:
        emit(ring.columns(qkv, "q.0", 0, ring.q_width))
    sent = {"o.grad": f"d.{out}", "q": "q.0", "o.with": out, "lse.with": lse}

    def fresh(name: str, like: str) -> str:
        buffers.setdefault(name, buffers[like])
        return name

    def fetch(step: int) -> None:
        ahead = _Exchange(ring, step)
        came = fresh(f"kv.{step}", "kv.0")
        emit(ahead.message(buffers["kv.0"], "kv.0", came, KEYS, ahead.seen))
        for name, source in sent.items() if any(ahead.helping) else ():
            came = fresh(f"{name}.{step}", source)
            emit(ahead.message(buffers[source], source, came, QUERIES, ahead.helped))

    totals = {"q": "d.q.0", "kv": "d.kv.0"}
    names = iter(range(4 * last))

    def add(here: _Exchange, which: str, part: str, places: tuple[bool, ...]) -> None:
        width = ring.q_width if which == "q" else ring.kv_width
        out = fresh(f"d.{which}.to{next(names)}", f"{which}.0")
        emit(here.where(ring.sum(totals[which], part, out, width), places))
        totals[which] = out

    fetch(1)
    first = fresh("d.q.0", "q.0"), fresh("d.kv.0", "kv.0")
    emit(ring.block("attention_block_backward", 0, (f"d.{out}", qkv, "kv.0", out, lse), first))
    late: list[tuple[_Exchange, str, str, tuple[bool, ...]]] = []
    for step in range(1, last + 1):
        if step < last:
            fetch(step + 1)
        here = _Exchange(ring, step)
        part = fresh(f"d.q.{step}", "q.0"), fresh(f"d.kv.{step}", "kv.0")
        own = (f"d.{out}", qkv, f"kv.{step}", out, lse)
        other = (f"o.grad.{step}", f"q.{step}", "kv.0", f"o.with.{step}", f"lse.with.{step}")
        emit(here.block("attention_block_backward", own, other, part))
        home = fresh(f"d.kv.home{step}", "kv.0")
        emit(here.message(buffers["kv.0"], part[1], home, KEYS_BACK, here.working))
        due, late = late, [(here, "kv", home, here.seen)]
        if any(here.helping):
            home = fresh(f"d.q.home{step}", "q.0")
            emit(here.message(buffers["q.0"], part[0], home, QUERIES_BACK, here.helping))
            late.append((here, "q", home, here.helped))
            add(here, "kv", part[1], here.helping)
        add(here, "q", part[0], here.working)
        for arrived in due:
            add(*arrived)
    for arrived in late:
        add(*arrived)
    width = {"t": ring.tokens, "n": ring.q_width + ring.kv_width}
    tape.contribute(qkv, "join_columns", width, op.dtype, (totals["q"], totals["kv"]))


def lightseq_bytes(
    split: SequenceSplit, tokens: float, widths: tuple[float, float], heads: float, size: float
) -> tuple[float, float]:
    """Return the mean bytes that a rank sends in forward and in backward of one layer.

    ``tokens`` of the whole sequences; ``widths`` of a token's queries and of its keys, as many
    values; ``size`` bytes per element. An output goes with one fp32 number per head.
    """
    n = split.ring
    helped = sum(step for step in range(1, n // 2 + 1) if 2 * step < n)  # pairs of places
    fetched = n * (n - 1) / 2 - helped
    query, keys = widths[0] * size, 2 * widths[1] * size
    each = tokens / n / n
    forward = fetched * keys + helped * (2 * query + 4 * heads)
    backward = 2 * fetched * keys + helped * (4 * query + 4 * heads)
    return each * forward, each * backward

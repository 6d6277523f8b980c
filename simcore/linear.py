"""Linear attention as ops, on whole sequences and on sequences split between ranks.

    o_i = d^(-1/2) sum over j <= i of g^(i - j) (q_i . k_j) v_j

with one decay g per KV head: 1 is linear attention (Katharopoulos et al. 2020), less is retention
(Sun et al. 2023, RetNet) and Lightning Attention (Qin et al. 2024). It is computed in chunks: a
product with a mask inside a chunk, a state of head_dim x head_dim per KV head between chunks
(RetNet, eq. 7). KV heads may serve several heads.

Of a split sequence each rank holds one run of tokens. It needs of all runs before its own only
one state, whatever their length:

    own state     M = sum over j of g^(rows - 1 - j) k_j v_j'
    state before  S of rank r + 1 = g^rows (S of rank r) + (M of rank r)
    output        o_i + d^(-1/2) g^(i + 1) q_i S

LASP (Sun et al. 2024) hands S from rank to rank, ZeCO (Chou et al. 2025) too, in slices that
follow one another; LASP-2 (Sun et al. 2025) gathers every M and sums where they arrive. Backward
does the same with the gradients of states, from the last rank to the first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass, replace
from typing import TYPE_CHECKING, Any

from simcore.ops import Buffer, Op, Size
from simcore.ring import STREAM, Sizes
from simcore.sequence import SequenceSplit

if TYPE_CHECKING:
    from simcore.adjoints import Tape
    from simcore.network import Builder

CHUNK = 64  # tokens; flash-linear-attention's chunk_size
STATE_DTYPE = "fp32"
SCAN = "state_scan"

# law -> decay of a KV head by its number
DECAYS: dict[str, Callable[[int], float]] = {
    "none": lambda head: 1.0,
    "retnet": lambda head: 1.0 - 2.0 ** (-5.0 - head),  # Sun et al. 2023, eq. 8
}

Declare = Callable[[str, tuple[Size, ...], str], str]


@dataclass(frozen=True, slots=True)
class Linear:
    """The ops that forward and backward of one layer's linear attention share."""

    split: SequenceSplit
    sizes: Sizes
    decay: str
    dtype: str

    @classmethod
    def of(cls, op: Op) -> Linear:
        """Return the layer that an op of it belongs to, from its attributes."""
        a = op.attrs
        return cls(SequenceSplit(*a["split"]), a["sizes"], a["decay"], op.dtype)

    @property
    def dims(self) -> Mapping[str, Size]:
        """Sizes of every op: batch, rows, heads, KV heads, head width, tokens of a chunk."""
        batch, rows, heads, kv_heads, d = self.sizes
        return {"b": batch, "s": rows, "h": heads, "hkv": kv_heads, "d": d, "c": min(CHUNK, rows)}

    @property
    def attrs(self) -> Mapping[str, Any]:
        """What `Linear.of` needs, and the law of decay."""
        return {"split": astuple(self.split), "sizes": self.sizes, "decay": self.decay}

    @property
    def tokens(self) -> Size:
        """Tokens of this rank."""
        return self.sizes[0] * self.sizes[1]

    @property
    def widths(self) -> tuple[Size, Size]:
        """Columns of the queries, and of keys and values."""
        _, _, heads, kv_heads, d = self.sizes
        return heads * d, 2 * kv_heads * d

    @property
    def state(self) -> tuple[Size, ...]:
        """Dims of a state: [batch, KV heads, head_dim, head_dim]."""
        batch, _, _, kv_heads, d = self.sizes
        return batch, kv_heads, d, d

    def op(self, kind: str, reads: tuple[str, ...], writes: tuple[str, ...]) -> Op:
        """Return one of the layer's compute ops."""
        return Op(kind, self.dims, self.dtype, reads, writes, attrs=self.attrs)

    def exchange(self, source: str, result: str, declare: Declare, *, reverse: bool) -> list[Op]:
        """Return the ops that turn every rank's state into the one that reaches it.

        ``reverse``: from later ranks. Reads also ``fade``, by how much a rank's rows fade what
        comes.
        """
        batch, kv_heads, d, _ = self.state
        elements, axis = batch * kv_heads * d * d, self.split.ring_axis
        declare(result, self.state, STATE_DTYPE)
        reads = source, "fade"
        attrs: dict[str, Any] = {"reverse": reverse}
        if self.split.states == "scan":
            attrs["slices"] = self.split.slices
            dims = {"n": elements}
            return [Op(SCAN, dims, STATE_DTYPE, reads, (result,), STREAM, axis, attrs)]
        parts = self.split.degree
        every = declare(f"{source}.all", (parts * batch, kv_heads, d, d), STATE_DTYPE)
        dims = {"n": parts * elements}
        gather = Op("all_gather", dims, STATE_DTYPE, (source,), (every,), STREAM, axis)
        dims = {"t": elements, "n": 1, "parts": parts}
        found = (every, "fade"), (result,)
        sums = Op("state_prefix", dims, STATE_DTYPE, *found, attrs={**attrs, "axis": axis})
        return [gather, sums]


def linear_attention(b: Builder, split: SequenceSplit, sizes: Sizes, decay: str, qkv: str) -> str:
    """Append linear attention of packed rows [tokens, (heads + 2 kv_heads) d].

    Return the output, [tokens, heads d], of the same rows.
    """
    layer = Linear(split, sizes, decay, b.dtype)
    out = b.act("o", layer.tokens, layer.widths[0])
    if split.degree == 1:
        b.ops.append(layer.op("linear_attention", (qkv,), (out,)))
        return out

    def declare(name: str, dims: tuple[Size, ...], dtype: str) -> str:
        return b.act(name, *dims, dtype=dtype)

    declare("state", layer.state, STATE_DTYPE)
    declare("fade", layer.state[1:2], STATE_DTYPE)
    b.ops.append(layer.op("linear_state", (qkv,), ("state", "fade")))
    gather, *sums = layer.exchange("state", "before", declare, reverse=False)
    local = b.act("o.local", layer.tokens, layer.widths[0])
    within = layer.op("linear_attention", (qkv,), (local,))  # while states are under way
    b.ops += [gather, within, *sums, layer.op("linear_carry", (local, qkv, "before"), (out,))]
    return out


def linear_adjoint(op: Op, tape: Tape) -> None:
    """Emit the backward of linear attention within a rank; its states are computed again."""
    reads = (f"d.{op.writes[0]}", op.reads[0])
    tape.contribute(op.reads[0], f"{op.kind}_backward", op.dims, op.dtype, reads, **op.attrs)


def carry_adjoint(op: Op, tape: Tape) -> None:
    """Emit the backward of linear attention of a split sequence, of which the carry is the end.

    No earlier op of it has a gradient of its own: the gradient of the state that came is on its
    way to earlier ranks while the part within the rank is computed.
    """
    layer, (_, qkv, before), grad = Linear.of(op), op.reads, f"d.{op.writes[0]}"
    emit = tape.input_ops.append

    def declare(name: str, dims: tuple[Size, ...], dtype: str) -> str:
        tape.buffers.setdefault(name, Buffer(dims, dtype))
        return name

    queries = declare("d.q.carried", (layer.tokens, layer.widths[0]), layer.dtype)
    pairs = declare("d.kv.carried", (layer.tokens, layer.widths[1]), layer.dtype)
    declare("d.before", layer.state, STATE_DTYPE)
    emit(layer.op("linear_carry_backward", (grad, qkv, before), ("d.before", queries)))
    gather, *sums = layer.exchange("d.before", "d.state", declare, reverse=True)
    emit(gather)
    tape.contribute(
        qkv, "linear_attention_backward", layer.dims, layer.dtype, (grad, qkv), **layer.attrs
    )
    for each in sums:
        emit(each)
    emit(layer.op("linear_state_backward", (qkv, "d.state"), (pairs,)))
    width = {"t": layer.tokens, "n": sum(layer.widths)}
    tape.contribute(qkv, "join_columns", width, layer.dtype, (queries, pairs))


def behind(op: Op) -> Op:
    """Return a scan whose ranks are already staggered by one that went the same way before.

    Rank r got the earlier layer's state r hops late and has been that late since: the state of
    this layer is there when it comes to it. Only the last hop's own time remains.
    """
    return replace(op, attrs={**op.attrs, "behind": True})


def hops(op: Op, first: int, last: int) -> tuple[Op, Op]:
    """Return a scan's way between two places of its group: of its last slice, and of all."""
    places = min(first, last), max(first, last)
    ways = ({"between": places, "last_slice": True}, {"between": places})
    return tuple(replace(op, attrs={**op.attrs, **way}) for way in ways)  # type: ignore[return-value]


def state_bytes(batch: float, kv_heads: float, head_dim: float) -> float:
    """Return the bytes of a layer's state, of which LASP's message consists: 4 b h d^2.

    They depend neither on the sequence's length nor on the number of ranks (LASP, section 2.4).
    """
    return 4.0 * batch * kv_heads * head_dim**2

"""Streamed layers and losses: the sequence in chunks, one chunk's activations alive at a time.

StreamBP (Luo et al. 2025) computes exact gradients of checkpointed layers chunk by chunk. A chunk's
queries read the keys and values of its own and of earlier chunks alone, so that the pairs which a
causal mask hides between chunks are never multiplied. Forward: chunk after chunk, the packed
queries, keys and values of all rows gathered in ``qkv.all``. Backward: these once more, then the
chunks from the last to the first, each run forward again and backward at once. The gradient of
``qkv.all`` adds up: when a chunk's turn comes, all that read its keys have come before.

The head runs forward and backward of a chunk of rows in one go, so that only its logits live.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from simcore.errors import InputError
from simcore.models import LINEAR, ModelSpec
from simcore.ops import Buffer, Op, Size
from simcore.recompute import needed
from simcore.strategy import ParallelStrategy

if TYPE_CHECKING:
    from simcore.adjoints import Tape

PACKED = "qkv.all"  # queries, keys and values of all rows of a layer
Chunk = tuple[Op, ...]
Adjoint = Callable[[tuple[Op, ...], dict[str, Buffer], tuple[str, ...]], "Tape"]


def check_streaming(
    model: ModelSpec, parallel: ParallelStrategy, rows: int, *, split_backward: bool = False
) -> None:
    """Raise `InputError` where the ``rows`` of a sequence on a rank cannot be streamed."""
    chunks, loss_chunks = parallel.stream_chunks, parallel.loss_chunks or parallel.stream_chunks
    tokens = parallel.microbatch * rows
    local = tokens // parallel.tp if parallel.sequence_parallel else tokens
    if local % loss_chunks:
        key = "loss_chunks" if parallel.loss_chunks else "stream_chunks"
        raise InputError(
            f"[parallel].{key} {loss_chunks} does not divide the {local} tokens of a "
            "microbatch on a rank: choose one that does."
        )
    if split_backward and max(chunks, loss_chunks) > 1:
        raise InputError(
            f"the schedule {parallel.schedule!r} splits backwards, which streamed ones are not: "
            "leave [parallel].stream_chunks and loss_chunks out, or choose '1f1b'."
        )
    if chunks == 1:
        return
    wrong = {
        "a causal model": not model.causal,
        "a model without experts": model.experts > 0,
        "a model without linear layers": LINEAR in model.mixers,
        "cp = 1": parallel.cp > 1,
        "sequence_parallel = false": parallel.sequence_parallel,
        "no recompute keys, since streamed layers keep their input alone": (
            parallel.recompute != "none"
        ),
    }
    for need, missing in wrong.items():
        if missing:
            raise InputError(
                f"[parallel].stream_chunks = {chunks} needs {need}: leave stream_chunks out, or "
                "change that."
            )
    if rows % chunks:
        raise InputError(
            f"[parallel].stream_chunks {chunks} does not divide the sequence of {rows} tokens: "
            "choose one that does."
        )


# -- layers ----------------------------------------------------------------------------------------


def layer_chunks(
    plain: Sequence[Op], buffers: dict[str, Buffer], batch: int, chunks: int
) -> list[Chunk]:
    """Return a layer's forward ops over every chunk, from ``plain``, those of one chunk alone."""
    part, whole = buffers["h"], _times(buffers["h"], chunks)
    packed = next(op.reads[0] for op in plain if op.kind == "attention")
    buffers |= {"h.c": part, "h.out": part, "h": whole, PACKED: _times(buffers[packed], chunks)}
    buffers["positions.c"] = Buffer(part.dims[:1], "int64")
    return [_layer_chunk(plain, buffers, batch, index) for index in range(chunks)]


def layer_forward(each: Sequence[Chunk]) -> list[Op]:
    """Return a layer's forward: its chunks in order."""
    return opened(op for ops in each for op in ops)


def layer_backward(each: Sequence[Chunk], buffers: dict[str, Buffer], adjoint: Adjoint) -> list[Op]:
    """Return a layer's backward: keys and values again, then its chunks from the last one."""
    found = [op for ops in each for op in needed(ops, {PACKED})]
    for ops in reversed(each):
        back = adjoint(ops, buffers, ("h+", PACKED)).joined()
        wanted = {name for op in back for name in op.reads} - {PACKED}
        found += needed([op for op in ops if PACKED not in op.writes], wanted)
        found += back
    return opened(found)


def _times(buffer: Buffer, chunks: int) -> Buffer:
    return replace(buffer, dims=(buffer.dims[0] * chunks, *buffer.dims[1:]))


def _layer_chunk(plain: Sequence[Op], buffers: dict[str, Buffer], batch: int, index: int) -> Chunk:
    """Return the forward ops of chunk ``index``: its rows taken, its results put."""
    names = {"h": "h.c", "h+": "h.out", "positions": "positions.c"}
    take = [
        part_of_rows("take_rows", x, names[x], buffers, batch, index) for x in ("h", "positions")
    ]
    found = [op for op in take if any(op.reads[0] in other.reads for other in plain)]
    for op in plain:
        reads, writes = (
            tuple(names.get(name, name) for name in side) for side in (op.reads, op.writes)
        )
        if op.kind != "attention":
            found.append(replace(op, reads=reads, writes=writes))
            continue
        rows = op.dims["s"]
        attrs = {**op.attrs, "first": index * rows}
        found.append(part_of_rows("put_rows", PACKED, reads[0], buffers, batch, index))
        dims = {**op.dims, "kv": (index + 1) * rows}
        found.append(Op("attention_rows", dims, op.dtype, (PACKED,), writes, attrs=attrs))
    return (*found, part_of_rows("put_rows", "h+", "h.out", buffers, batch, index))


def part_of_rows(
    kind: str, whole: str, part: str, buffers: dict[str, Buffer], parts: int, index: int
) -> Op:
    """Return the op that takes rows out of each of ``parts`` equal runs of ``whole``, or puts them.

    Run by run, the rows of ``part`` are those of chunk ``index``.
    """
    held = buffers[part]
    total = buffers[whole.removesuffix("+")].dims[0]
    dims = {"t": held.dims[0], "n": held.dims[1] if len(held.dims) > 1 else 1}
    attrs = {"parts": parts, "first": index * held.dims[0] // parts, "total": total}
    reads, writes = ((whole,), (part,)) if kind == "take_rows" else ((whole, part), (whole,))
    return Op(kind, dims, held.dtype, reads, writes, attrs=attrs)


def opened(ops: Iterable[Op]) -> list[Op]:
    """Return the ops with every whole buffer made by the first op that writes a part of it."""
    made: set[str] = set()
    found = []
    for op in ops:
        own = op.writes[0] if op.writes else ""
        if own in op.reads[:1] and op.kind in IN_PLACE and own not in made:
            op = replace(op, reads=op.reads[1:])  # noqa: PLW2901
        made.update(op.writes)
        found.append(op)
    return found


# Kinds that change rows of the buffer that they read first, or make it where they do not read it.
IN_PLACE = frozenset({"put_rows", "attention_rows_backward"})


# -- the loss --------------------------------------------------------------------------------------


def loss_chunks(
    plain: Sequence[Op], buffers: dict[str, Buffer], chunks: int, runs: int
) -> list[Chunk]:
    """Return the head's forward ops over every chunk, from ``plain``, those of one chunk alone.

    ``runs``: ranks that a chunk of the residual stream is gathered from, whose rows of the targets
    lie apart.
    """
    names = {"h": "h.rows", "targets": "targets.rows"}  # not a layer's: of another size
    for name, part in names.items():
        buffers[part] = replace(buffers[name], scope="act", layered=True)
        buffers[name] = _times(buffers[name], chunks)
    buffers["loss.c"] = buffers["loss"]
    found = []
    for index in range(chunks):
        ops = [
            part_of_rows("take_rows", "h", names["h"], buffers, 1, index),
            part_of_rows("take_rows", "targets", names["targets"], buffers, runs, index),
        ]
        loss = "loss.c" if index else "loss"
        for op in plain:
            reads = tuple(names.get(name, name) for name in op.reads)
            writes = tuple(loss if name == "loss" else name for name in op.writes)
            ops.append(replace(op, reads=reads, writes=writes))
        found.append(tuple(ops))
    return found


def loss_backward(each: Sequence[Chunk], buffers: dict[str, Buffer], adjoint: Adjoint) -> list[Op]:
    """Return the head's forward and backward, chunk by chunk; the losses add up."""
    found: list[Op] = []
    for index, ops in enumerate(each):
        found += ops
        if index:
            dims: dict[str, Size] = {"t": 1, "n": 1}
            found.append(Op("add", dims, "fp32", ("loss", "loss.c"), ("loss",)))
        found += adjoint(ops, buffers, ()).joined()
    return opened(found)


# -- adjoints --------------------------------------------------------------------------------------


def take_rows_adjoint(op: Op, tape: Tape) -> None:
    """The gradient of a chunk joins that of the whole."""
    whole = f"d.{op.reads[0]}"
    reads = (whole, f"d.{op.writes[0]}")
    tape.contribute(op.reads[0], "put_rows", op.dims, op.dtype, reads, **op.attrs)


def put_rows_adjoint(op: Op, tape: Tape) -> None:
    """The gradient of a chunk is its part of the whole's."""
    reads = (f"d.{op.writes[0]}",)
    tape.contribute(op.reads[-1], "take_rows", op.dims, op.dtype, reads, **op.attrs)


def attention_rows_adjoint(op: Op, tape: Tape) -> None:
    """Add to the gradients of the chunk's queries, and of all keys and values that it read."""
    (packed,), (out, lse) = op.reads, op.writes
    reads = (f"d.{packed}", f"d.{out}", packed, out, lse)
    kind = "attention_rows_backward"
    tape.input_ops.append(Op(kind, op.dims, op.dtype, reads, reads[:1], attrs=op.attrs))

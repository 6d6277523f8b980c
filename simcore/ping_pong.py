"""Layers that two halves of a microbatch take turns in: one computes while the other's rows travel.

DistCA (Zhuang et al. 2025) serves attention to one half ("ping") beside the products of the other
("pong"). A half is half of the sequences, with buffers of its own. Its ops come in parts, each of
which ends where the half would wait for a message; parts of the two halves alternate, so the
messages of one are on their way while the other computes. Gradients of weights add up as always.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import zip_longest

from simcore.errors import InputError
from simcore.models import ModelSpec
from simcore.ops import Buffer, Op
from simcore.strategy import ParallelStrategy
from simcore.streaming import Adjoint, Chunk, opened, part_of_rows

HALVES = 2


def check_ping_pong(
    model: ModelSpec, parallel: ParallelStrategy, *, split_backward: bool = False
) -> None:
    """Raise `InputError` where two halves of a microbatch cannot take turns."""
    if not parallel.ping_pong:
        return
    needs = {
        "cp_kind = 'servers' and cp > 1, whose transfers it hides": (
            parallel.cp_kind != "servers" or parallel.cp == 1
        ),
        f"an even number of sequences, not {parallel.microbatch}, in [parallel].microbatch": (
            parallel.microbatch % HALVES > 0
        ),
        "sequence_parallel = false": parallel.sequence_parallel,
        "a model without experts": model.experts > 0,
        f"a schedule with whole backwards, which {parallel.schedule!r} splits": split_backward,
    }
    for need, missing in needs.items():
        if missing:
            raise InputError(
                f"[parallel].ping_pong needs {need}: change that, or leave ping_pong out."
            )


def layer_halves(
    build: Callable[[dict[str, Buffer]], list[Op]], buffers: dict[str, Buffer]
) -> list[Chunk]:
    """Return a layer's forward ops over each half; ``build`` gives those of one alone.

    The weights and the buffers of both halves join ``buffers``, the whole residual stream too.
    """
    own: dict[str, Buffer] = {}
    plain = build(own)
    buffers |= {name: held for name, held in own.items() if held.scope == "weight"}
    stream = own["h"]
    buffers["h"] = replace(stream, dims=(stream.dims[0] * HALVES, *stream.dims[1:]))
    own["h+"] = stream
    if any("positions" in op.reads for op in plain):
        own["positions"] = Buffer((buffers["positions"].dims[0] // HALVES,), "int64")
    return [_half(plain, own, buffers, index) for index in range(HALVES)]


def _half(
    plain: Sequence[Op], own: dict[str, Buffer], buffers: dict[str, Buffer], index: int
) -> Chunk:
    """Return the ops of one half: its rows taken, its results put."""
    names = {
        name: f"{name.replace('+', '.out')}.{index}"
        for name, held in own.items()
        if held.scope != "weight"
    }
    buffers |= {names[name]: own[name] for name in names}

    def renamed(side: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(names.get(name, name) for name in side)

    given = [name for name in ("h", "positions") if name in names]
    return (
        *(part_of_rows("take_rows", x, names[x], buffers, 1, index) for x in given),
        *(replace(op, reads=renamed(op.reads), writes=renamed(op.writes)) for op in plain),
        part_of_rows("put_rows", "h+", names["h+"], buffers, 1, index),
    )


def halves_forward(halves: Sequence[Chunk]) -> list[Op]:
    """Return a layer's forward: parts of its halves in turn."""
    return opened(in_turn(halves))


def halves_backward(
    halves: Sequence[Chunk], buffers: dict[str, Buffer], adjoint: Adjoint
) -> list[Op]:
    """Return a layer's backward: parts of its halves' backwards in turn."""
    return opened(in_turn([adjoint(ops, buffers, ("h+",)).joined() for ops in halves]))


def in_turn(halves: Iterable[Sequence[Op]]) -> list[Op]:
    """Return the ops of all halves, part by part."""
    rounds = zip_longest(*map(parts_of, halves), fillvalue=())
    return [op for parts in rounds for part in parts for op in part]


def parts_of(ops: Sequence[Op]) -> list[list[Op]]:
    """Return ops in parts: a new one begins at the first op that waits for a message.

    Messages that one part sent are waited for at once.
    """
    found: list[list[Op]] = [[]]
    coming: set[str] = set()
    for op in ops:
        if op.stream == "compute" and not coming.isdisjoint(op.reads):
            found.append([])
            coming = set()
        found[-1].append(op)
        if op.stream != "compute":
            coming.update(op.writes)
    return found

"""Activations by token: some copied to host memory behind compute, the rest computed again.

MEMO (Zhao et al. 2025) moves a layer's input and attention's output to the host whole, since
attention is what takes long to run again, and of every other saved activation the rows of a share
of the tokens. Backward fetches these while the layer after runs, and computes the other rows again
from the input and attention's output: all else in a layer works on every token alone.

Copies run on streams of their own, one for each direction. A layer's activations leave the device
once the layer after has run, so that compute waits for no copy that takes no longer than a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from simcore.errors import InputError
from simcore.models import ModelSpec
from simcore.ops import Buffer, Op
from simcore.recompute import needed
from simcore.strategy import ParallelStrategy
from simcore.streaming import opened

TO_HOST, TO_DEVICE = "to_host", "to_device"


def check_swapping(
    model: ModelSpec, parallel: ParallelStrategy, *, split_backward: bool = False
) -> None:
    """Raise `InputError` where activations cannot be swapped by token."""
    share = parallel.swap_fraction
    if share is None:
        return
    if not 0 <= share <= 1:
        raise InputError(f"[parallel].swap_fraction {share} must lie between 0 and 1.")
    wrong = {
        "a model without experts": model.experts > 0,
        "cp = 1": parallel.cp > 1,
        "sequence_parallel = false": parallel.sequence_parallel,
        "no recompute keys, since it recomputes what it does not swap": parallel.recompute
        != "none",
        "stream_chunks = 1": parallel.stream_chunks > 1,
        "a schedule that does not split backwards": split_backward,
    }
    for need, missing in wrong.items():
        if missing:
            raise InputError(
                f"[parallel].swap_fraction needs {need}: leave swap_fraction out, or change that."
            )


@dataclass(frozen=True, slots=True)
class Swap:
    """The blocks of a layer that swaps: copies out, waiting for them, copies in, and the rest."""

    offload: list[Op]
    release: list[Op]
    fetch: list[Op]
    again: list[Op]


def swap_layer(
    forward: Sequence[Op],
    backward: Iterable[Op],
    buffers: dict[str, Buffer],
    share: float,
    build: Callable[[int], tuple[list[Op], dict[str, Buffer]]],
) -> Swap:
    """Return what a layer of these ops swaps and computes again.

    ``build`` returns the forward ops of so many tokens, and their buffers.
    """
    made = {"h", *(name for op in forward for name in op.writes)}
    read = {name for op in backward for name in op.reads}
    saved = sorted(name for name in made & read if buffers[name].scope == "act")
    core = next(op for op in forward if op.kind == "attention")
    tokens = int(buffers["h"].dims[0])
    kept = round(share * tokens)
    whole = [name for name in saved if name in ("h", *core.writes)]
    parts = [name for name in saved if name not in whole]
    moved = [*((name, int(buffers[name].dims[0])) for name in whole), *((n, kept) for n in parts)]
    moved = [(name, rows) for name, rows in moved if rows]
    offload = [_copy(buffers, name, rows, out=True) for name, rows in moved]
    gone = tuple(name for op in offload for name in (*op.reads, *op.writes))
    release = Op("release", {}, core.dtype, gone, ())
    fetch = [_copy(buffers, name, rows, out=False) for name, rows in moved]
    again = _again(parts, core, buffers, kept, *build(tokens - kept)) if kept < tokens else []
    return Swap(offload, [release], fetch, again)


def _copy(buffers: dict[str, Buffer], name: str, rows: int, *, out: bool) -> Op:
    """Return the op that copies the first rows of a buffer to the host, or back into a new one."""
    held, there = buffers[name], f"{name}.host"
    width = 1
    for dim in held.dims[1:]:
        width *= dim
    buffers[there] = Buffer((rows, *held.dims[1:]), held.dtype, "host", held.layered)
    attrs = {"total": held.dims[0]}
    dims = {"t": rows, "n": width}
    if out:
        return Op("offload", dims, held.dtype, (name,), (there,), TO_HOST, attrs=attrs)
    return Op("fetch", dims, held.dtype, (there,), (name,), TO_DEVICE, attrs=attrs)


def _again(
    parts: Sequence[str],
    core: Op,
    buffers: dict[str, Buffer],
    kept: int,
    plain: Sequence[Op],
    rest: dict[str, Buffer],
) -> list[Op]:
    """Return the ops that compute the rows from ``kept`` on again, and put them in their buffers.

    Names of these rows end in ``.rest``. Attention's rows are taken from its whole output.
    """
    touched = {name for op in plain for name in (*op.reads, *op.writes)}
    names = {n for n in touched if rest[n.removesuffix("+")].scope in ("act", "data")}
    short = {name: f"{name.replace('+', '.next')}.rest" for name in names}
    held = {short[name]: rest[name.removesuffix("+")] for name in names}
    held["positions.rest"] = Buffer(rest["h"].dims[:1], "int64")
    for name, buffer in held.items():
        buffers[name] = replace(buffer, scope="act", layered=True)
    given = ("h", core.writes[0], "positions")
    ops = [_part("take_rows", x, short[x], buffers, kept) for x in given if x in short]
    for op in plain:
        if op.kind != "attention":
            reads, writes = (tuple(short.get(n, n) for n in side) for side in (op.reads, op.writes))
            ops.append(replace(op, reads=reads, writes=writes))
    found = list(needed(ops, {short[name] for name in parts}))
    found += [_part("put_rows", name, short[name], buffers, kept) for name in parts]
    return found if kept else opened(found)


def _part(kind: str, whole: str, part: str, buffers: dict[str, Buffer], first: int) -> Op:
    """Return the op that takes the rows from ``first`` on out of a buffer, or puts them there."""
    held = buffers[part]
    dims = {"t": held.dims[0], "n": held.dims[1] if len(held.dims) > 1 else 1}
    attrs = {"parts": 1, "first": first, "total": buffers[whole].dims[0]}
    reads, writes = ((whole,), (part,)) if kind == "take_rows" else ((whole, part), (whole,))
    return Op(kind, dims, held.dtype, reads, writes, attrs=attrs)

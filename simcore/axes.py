"""Sequences that form a grid, frames x places, along one axis of which each layer attends.

A ``space`` layer attends within a frame, a ``time`` layer within a place, across the frames; such
layers alternate in spatio-temporal transformers (Ma et al. 2024, Latte, variant 1). Rows lie frame
by frame. Dynamic sequence parallelism (DSP, Zhao et al. 2024) shards the axis along which a layer
does not attend, so that attention itself moves nothing, and turns the residual stream from one axis
to the other by one all-to-all where the next layer attends along the sharded one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from simcore.errors import InputError
from simcore.models import GRID, ModelSpec
from simcore.ops import Buffer, Op
from simcore.sequence import SequenceSplit

if TYPE_CHECKING:
    from simcore.network import Builder
    from simcore.strategy import ParallelStrategy

SPACE, TIME = GRID  # mixers: names of the axis along which a layer attends
STREAM = "cp"


@dataclass(frozen=True, slots=True)
class Grid:
    """The rows of a sequence on a rank: so many frames of so many places."""

    frames: int
    places: int

    def shared(self, axis: str, ranks: int) -> Grid:
        """Return a rank's part where ``ranks`` share ``axis``."""
        if axis == TIME:
            return Grid(self.frames // ranks, self.places)
        return Grid(self.frames, self.places // ranks)


def grid_of(model: ModelSpec, length: int) -> Grid:
    """Return the grid that a whole sequence forms."""
    return Grid(model.frames, length // model.frames)


def local_grid(model: ModelSpec, split: SequenceSplit, rows: int, mixer: str) -> Grid:
    """Return what a rank attends over that holds so many ``rows`` of a sequence, split so."""
    grid = grid_of(model, rows * split.degree)
    if split.travels == "nothing":
        return grid.shared(SPACE if mixer == TIME else TIME, split.degree)
    return grid if split.ulysses > 1 else grid_of(model, rows)


def attend(
    b: Builder, batch: int, grid: Grid, axis: str, qkv: str, heads: tuple[int, int, int],
    *, causal: bool,
) -> str:  # fmt: skip
    """Append attention of packed rows along one axis; return the output, rows in their order.

    ``heads``: how many, how many of keys, width of one.
    """
    count, kv_heads, d = heads
    tokens, width = batch * grid.frames * grid.places, (count + 2 * kv_heads) * d

    def swapped(x: str, out: str, n: int, outer: int, inner: int) -> str:
        attrs = {"batch": batch, "outer": outer, "inner": inner}
        return b.op("swap_blocks", (x,), (b.act(out, tokens, n),), t=tokens, n=n, attrs=attrs)

    runs, rows, out = grid.frames, grid.places, "o"
    if axis == TIME:
        qkv = swapped(qkv, f"{qkv}.by_place", width, grid.frames, grid.places)
        runs, rows, out = rows, runs, "o.by_place"
    b.act(out, tokens, count * d)
    lse = b.act("lse", batch * runs, count, rows, dtype="fp32")
    dims: dict[str, Any] = {"s": rows, "kv": rows, "h": count, "hkv": kv_heads, "d": d, "dv": d}
    b.op("attention", (qkv,), (out, lse), b=batch * runs, attrs={"causal": causal}, **dims)
    return swapped(out, "o", count * d, grid.places, grid.frames) if axis == TIME else out


# ---------------------------------------------------------------- which axis is sharded


def axis_plan(
    allowed: Sequence[Sequence[str]], cost: Callable[[int, str, str], float]
) -> tuple[str, ...]:
    """Return the sharded axis of every stage so that switches cost least: a shortest path.

    ``allowed``: axes that each stage may shard; ``cost(i, a, b)`` of a switch before stage i > 0.
    """
    best: dict[str, tuple[float, tuple[str, ...]]] = {axis: (0.0, (axis,)) for axis in allowed[0]}
    for stage, axes in enumerate(allowed[1:], 1):
        best = {
            axis: min(
                (spent + (cost(stage, path[-1], axis) if path[-1] != axis else 0.0), (*path, axis))
                for spent, path in best.values()
            )
            for axis in axes
        }
    return min(best.values())[1]


def sharded_axes(model: ModelSpec) -> tuple[str, ...]:
    """Return the axis that every layer shards: the one that it does not attend along."""
    return axis_plan(
        [[TIME if mixer == SPACE else SPACE] for mixer in model.mixers], lambda i, a, b: 1.0
    )


def turns(model: ModelSpec, parallel: ParallelStrategy) -> dict[int, str]:
    """Return the layers before which the residual stream turns, and the axis sharded from then."""
    if parallel.split.travels != "nothing" or parallel.cp == 1:
        return {}
    axes = sharded_axes(model)
    return {i: axes[i] for i in range(1, model.layers) if axes[i] != axes[i - 1]}


def turn(buffers: dict[str, Buffer], name: str, batch: int, grid: Grid, ranks: int, axis: str,
         dtype: str) -> list[Op]:  # fmt: skip
    """Return the ops that turn ``name``, [batch x rows of a rank, width], to shard ``axis``.

    ``grid``: that of the whole sequence.
    """
    source = buffers[name]
    tokens, width = source.dims
    for part in ("sent", "came"):
        buffers.setdefault(f"{name}.{part}", Buffer(source.dims, dtype))
    sequences, frames = batch, batch * grid.frames // ranks  # runs of which each rank gets a part
    before, after = (frames, sequences) if axis == SPACE else (sequences, frames)
    attrs = {"batch": 1, "outer": before, "inner": ranks}
    back = {"batch": 1, "outer": ranks, "inner": after}
    dims = {"t": tokens, "n": width}
    sent, came = f"{name}.sent", f"{name}.came"
    return [
        Op("swap_blocks", dims, dtype, (name,), (sent,), attrs=attrs),
        Op("all_to_all", {"n": tokens * width}, dtype, (sent,), (came,), STREAM, "cp"),
        Op("swap_blocks", dims, dtype, (came,), (name,), attrs=back),
    ]


# ---------------------------------------------------------------- checks


def check_grid(model: ModelSpec, parallel: ParallelStrategy, length: int) -> None:
    """Raise `InputError` where a network on a grid, or its sharding, is not covered."""
    wants = parallel.cp_kind == "dsp"
    on_grid = [mixer in GRID for mixer in model.mixers]
    if not any(on_grid):
        if wants:
            raise InputError(
                f"[parallel].cp_kind = 'dsp' switches between axes, of which model {model.name!r} "
                "has one: choose 'ring', or give it frames and mixers 'space' and 'time'."
            )
        return
    needs = {
        "a model whose mixers are all 'space' or 'time'": not all(on_grid),
        "a model without experts": model.experts > 0,
        "learned or no positions": model.position not in ("learned", "none"),
        "[parallel].stream_chunks = 1": parallel.stream_chunks > 1,
        "[parallel].cp_kind 'dsp' or 'ulysses'": (
            parallel.cp > 1 and parallel.cp_kind not in ("dsp", "ulysses")
        ),
        "[parallel].sequence_parallel = false for cp_kind 'dsp'": (
            wants and parallel.cp > 1 and parallel.sequence_parallel
        ),
    }
    for need, missing in needs.items():
        if missing:
            raise InputError(f"attention along one axis of a grid needs {need}: change that.")
    if length % model.frames:
        near = max(length // model.frames, 1) * model.frames
        raise InputError(
            f"seq_len {length} is not a multiple of the model's {model.frames} frames: "
            f"[workload].seq_len = {near} is."
        )
    grid = grid_of(model, length)
    if wants and (grid.frames % parallel.cp or grid.places % parallel.cp):
        near = math.gcd(math.gcd(grid.frames, grid.places), parallel.cp)
        raise InputError(
            f"[parallel].cp {parallel.cp} does not divide {grid.frames} frames and {grid.places} "
            f"places of a frame, as 'dsp' needs: cp = {near} does."
        )

"""Sequence parallelism: which tokens of a sequence each rank holds, and which block it attends to.

A sequence is split over ``cp`` = ring x Ulysses ranks, the Ulysses ranks of one ring place next to
one another. Ring place r holds the rows that the layout gives it; its Ulysses ranks hold equal
runs of these rows.
Sources: ring attention (Liu et al. 2023), striped layout (Brandon et al. 2023), zigzag layout
(Llama 3, Dubey et al. 2024, section 3.3.2), Ulysses (Jacobs et al. 2023), both at once (USP, Fang
and Zhao 2024), double ring (LoongTrain, Gu et al. 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from simcore.ops import Op, Size
from simcore.program import Program, group_ranks

# Rows [first, end) of the queries, rows [first, end) of the keys, and whether a causal mask lies
# on the square between them.
Tile = tuple[int, int, int, int, bool]
Run = tuple[int, int]  # rows [first, end)
Served = tuple[int, int, tuple[Run, ...]]  # a task: rows of its queries, runs of its keys
Positions = NDArray[np.int64]
NO_TILE: Tile = (0, 0, 0, 0, False)


@dataclass(frozen=True, slots=True)
class SequenceSplit:
    """Over how many ranks a sequence is split, how, and which rows a ring place holds."""

    ring: int = 1
    ulysses: int = 1
    layout: str = "zigzag"
    # keys and values, queries, both (idle places help: `lightseq`), nothing (`axes`), tasks
    # (`servers`); "gathered": every rank gets all keys and values at once
    travels: str = "keys"
    window: int = 0  # double ring: places of an inner ring; 0: one ring
    states: str = ""  # how linear attention's states get on: "scan" or "gather"; "": not at all
    slices: int = 1  # of a state in a scan, which follow one another

    @property
    def degree(self) -> int:
        """Ranks that share a sequence."""
        return self.ring * self.ulysses

    @property
    def axes(self) -> dict[str, int]:
        """The mesh axes that the sequence is split over, outermost first."""
        if self.doubled:
            return {"cp_outer": self.ring // self.window, "cp_inner": self.window}
        if self.ring > 1 and self.ulysses > 1:
            return {"cp_ring": self.ring, "cp_ulysses": self.ulysses}
        return {"cp": self.degree}

    @property
    def doubled(self) -> bool:
        """Whether blocks go round inner rings, which pass them on to one another."""
        return 1 < self.window < self.ring

    @property
    def ring_axis(self) -> str:
        """Mesh axis, or axes, along which places on the ring are counted."""
        if self.doubled:
            return "*".join(self.axes)
        return "cp_ring" if self.ulysses > 1 else "cp"

    @property
    def inner(self) -> int:
        """Places of the ring that a block goes round before it moves to the next one."""
        return self.window if self.doubled else self.ring

    def source(self, place: int, step: int) -> int:
        """Return the place whose block ``place`` has in a step."""
        (outer, inner), (rounds, steps) = divmod(place, self.inner), divmod(step, self.inner)
        rings = self.ring // self.inner
        return (outer - rounds) % rings * self.inner + (inner - steps) % self.inner

    @property
    def ulysses_axis(self) -> str:
        """Mesh axis of the all-to-all."""
        return "cp_ulysses" if self.ring > 1 else "cp"

    @property
    def unit(self) -> int:
        """What a sequence's length must be a multiple of."""
        return int(np.lcm(self.degree, 2 * self.ring if self.pairs else 1))

    @property
    def pairs(self) -> bool:
        """Whether a ring place holds two runs of rows."""
        return self.layout == "zigzag" and self.ring > 1


WHOLE = SequenceSplit()

# ---------------------------------------------------------------- layouts


def _contiguous(length: int, ring: int, place: int) -> NDArray[np.int64]:
    rows = length // ring
    return np.arange(place * rows, (place + 1) * rows)


def _zigzag(length: int, ring: int, place: int) -> NDArray[np.int64]:
    runs = np.arange(length).reshape(2 * ring, -1)
    return np.concatenate((runs[place], runs[2 * ring - 1 - place]))


def _striped(length: int, ring: int, place: int) -> NDArray[np.int64]:
    return np.arange(place, length, ring)


def _whole_or_nothing(rows: int, place: int, source: int) -> Tile:
    return (0, rows, 0, rows, False) if source < place else NO_TILE


def _half(rows: int, place: int, source: int) -> Tile:
    """Both runs see the first run of an earlier place; the last one sees all of a later place."""
    if source < place:
        return (0, rows, 0, rows // 2, False)
    return (rows // 2, rows, 0, rows, False)


def _triangle(rows: int, place: int, source: int) -> Tile:
    """Row i of a place sees rows up to i of an earlier one, and up to i - 1 of a later one."""
    if source < place:
        return (0, rows, 0, rows, True)
    return (1, rows, 0, rows - 1, True) if rows > 1 else NO_TILE


# layout -> (rows of a ring place, tile of a place's queries against another place's keys)
LAYOUTS: dict[
    str,
    tuple[Callable[[int, int, int], NDArray[np.int64]], Callable[[int, int, int], Tile]],
] = {
    "contiguous": (_contiguous, _whole_or_nothing),
    "zigzag": (_zigzag, _half),
    "striped": (_striped, _triangle),
}


def positions(split: SequenceSplit, length: int, place: int, part: int) -> NDArray[np.int64]:
    """Return the positions of the rows that Ulysses rank ``part`` of ring ``place`` holds."""
    held = LAYOUTS[split.layout][0] if split.ring > 1 else _contiguous
    return np.split(held(length, split.ring, place), split.ulysses)[part]


@lru_cache(maxsize=1024)  # a ring's passes, and its layers, ask for the same ones
def tiles(split: SequenceSplit, rows: int, step: int, causal: bool) -> tuple[Tile, ...]:
    """Return per ring place its tile of step ``step``, where it has keys of `SequenceSplit.source`.

    Where queries travel, it has that place's queries. ``rows``: those of one ring place.
    """
    if not causal:
        return ((0, rows, 0, rows, False),) * split.ring
    if split.travels == "both" and step:
        whole: Tile = (0, rows, 0, rows, False)
        busy = zip(range(split.ring), helpers(split.ring, step), strict=True)
        return tuple(whole if place >= step or helps else NO_TILE for place, helps in busy)
    if step == 0:
        return ((0, rows, 0, rows, True),) * split.ring
    tile = LAYOUTS[split.layout][1]
    pairs = [(place, split.source(place, step)) for place in range(split.ring)]
    if split.travels == "queries":
        pairs = [(source, place) for place, source in pairs]
    return tuple(tile(rows, place, source) for place, source in pairs)


def helpers(places: int, step: int) -> tuple[bool, ...]:
    """Return which of ``places`` work for later ones in a step of balanced attention."""
    return tuple(place < step and 2 * step != places for place in range(places))


def visible(tile: Tile) -> float:
    """Return the (query, key) pairs that a tile leaves."""
    queries, keys = tile[1] - tile[0], tile[3] - tile[2]
    return queries * (queries + 1) / 2 if tile[4] else float(queries * keys)


def busiest(found: tuple[Tile, ...]) -> Tile:
    """Return the tile with most pairs."""
    return max(found, key=visible)


# ---------------------------------------------------------------- programs


def split_of(program: Program) -> SequenceSplit:
    """Return how a program splits its sequences."""
    return SequenceSplit(*program.info.get("split", ()))


def grid_positions(frames: int, length: int, axis: str, ranks: int, place: int) -> Positions:
    """Return the positions of a rank's rows where ``axis`` of a grid of frames is shared out."""
    every = np.arange(length).reshape(frames, -1)
    return np.split(every, ranks, 0 if axis == "time" else 1)[place].ravel()


def rank_positions(program: Program, rank: int, *, last: bool = False) -> Positions:
    """Return the positions in a sequence of the rows that ``rank`` embeds, or judges at last."""
    split = split_of(program)

    def index(axis: str) -> int:
        return group_ranks(program.mesh, axis, rank).index(rank)

    place = index(split.ring_axis) if split.ring > 1 else 0
    if "axes" in program.info:
        frames, axes, length = program.info["frames"], program.info["axes"], program.info["seq_len"]
        return grid_positions(int(frames), int(length), axes[last], split.ring, place)
    part = index(split.ulysses_axis) if split.ulysses > 1 else 0
    return positions(split, int(program.info["seq_len"]), place, part)


def task_dims(served: Sequence[Served]) -> dict[str, Size]:
    """Return a rank's tasks, the mean of their query rows, the keys that a row sees, the pairs.

    Of a task's last keys, which are its own rows, a causal mask hides half; ``area`` holds them.
    """
    sizes = [(q1 - q0, sum(k1 - k0 for k0, k1 in keys)) for q0, q1, keys in served]
    rows, area = sum(q for q, _ in sizes), sum(q * k for q, k in sizes)
    seen = area - sum(q * (q - 1) / 2 for q, _ in sizes)
    each = max(len(sizes), 1), max(rows, 1)
    return {"b": len(sizes), "s": rows / each[0], "kv": seen / each[1], "area": area}


UNEQUAL = frozenset({"tiles", "tasks"})  # attributes that say what each rank has to compute


def with_tile(op: Op, tile: Tile) -> Op:
    """Return an op on blocks of attention as a rank that has this tile runs it."""
    dims = {**op.dims, "s": tile[1] - tile[0], "kv": tile[3] - tile[2]}
    return replace(op, dims=dims, attrs={**op.attrs, "causal": tile[4]})


def on_rank(program: Program, op: Op, rank: int) -> Op:
    """Return ``op`` as ``rank`` runs it: its dims are those of the rank with most to do."""
    if "senders" in op.attrs:
        group = group_ranks(program.mesh, op.group, rank)
        sends = op.attrs["senders"][group.index(rank)]
        return op if sends else replace(op, dims={"n": 0})
    if "counts" in op.attrs:
        place = group_ranks(program.mesh, op.group, rank).index(rank)
        return replace(op, dims={"n": sum(op.attrs["counts"][place]) * op.attrs["width"]})
    if "tasks" in op.attrs:
        place = group_ranks(program.mesh, op.attrs["axis"], rank).index(rank)
        return replace(op, dims={**op.dims, **task_dims(op.attrs["tasks"][place])})
    if "tiles" not in op.attrs:
        return op
    group = group_ranks(program.mesh, op.attrs["axis"], rank)
    return with_tile(op, op.attrs["tiles"][group.index(rank)])


def mean_share(op: Op) -> float:
    """Return the mean over ranks of an op's products, relative to the rank with most to do."""
    if "tasks" in op.attrs:
        areas = [task_dims(served)["area"] for served in op.attrs["tasks"]]
        return float(sum(areas) / len(areas) / op.dims["area"])
    if "tiles" not in op.attrs:
        return 1.0
    found: tuple[Tile, ...] = op.attrs["tiles"]
    areas = [(t[1] - t[0]) * (t[3] - t[2]) for t in found]
    return float(sum(areas) / len(areas) / (op.dims["s"] * op.dims["kv"]))


# ---------------------------------------------------------------- volumes


def ring_bytes(split: SequenceSplit, tokens: float, kv_width: float, size: float) -> float:
    """Return the bytes that a rank sends in one forward pass of ring attention in one layer.

    ``tokens`` of the whole sequences; ``kv_width`` elements of a token's keys, as many values;
    ``size`` bytes per element. With Ulysses ranks each passes on its share of the heads.
    """
    return (split.ring - 1) * tokens / split.degree * 2 * kv_width * size


def ring_backward_bytes(split: SequenceSplit, tokens: float, kv_width: float, size: float) -> float:
    """Return the bytes that a rank sends in backward: the blocks again, and their gradients home.

    The gradients take one step more than the blocks.
    """
    if split.ring == 1:
        return 0.0
    return (2 * split.ring - 1) * tokens / split.degree * 2 * kv_width * size


def ulysses_bytes(
    split: SequenceSplit, tokens: float, width: float, kv_width: float, size: float
) -> float:
    """Return the bytes that a rank puts into all-to-all in one forward pass of one layer.

    Queries, keys, values and outputs each go once: (2 width + 2 kv_width) tokens / cp. The share
    1 / ulysses of them stays where it is. Backward moves as much.
    """
    if split.ulysses == 1:
        return 0.0
    return tokens / split.degree * 2 * (width + kv_width) * size

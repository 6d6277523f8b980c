"""What a strategy lowers to: blocks of ops, actions made of blocks, and an order per rank.

A `Block` is a template: the op list of one layer. A `Body` is a list of `Call`s of blocks with
layer numbers; an `Action` runs one body on one microbatch. So a layer, a microbatch and a rank
are indices, never copies.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from simcore.ops import Buffer, Op

Key = tuple[str, int, int]  # buffer name, layer, microbatch; -1 where the buffer has none


@dataclass(frozen=True, slots=True)
class Block:
    """An ordered op list and the buffers that it declares."""

    name: str
    ops: tuple[Op, ...]


class Call(NamedTuple):
    """One use of a block: its name and the layer that it is applied to."""

    block: str
    layer: int


class Action(NamedTuple):
    """One entry of a schedule in torch's notation: ``2F5`` is stage 2, forward, microbatch 5."""

    stage: int
    kind: str
    microbatch: int

    @property
    def body(self) -> str:
        """Name of the body that the action runs."""
        return f"{self.stage}{self.kind}"

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"


class Versions(NamedTuple):
    """Where a stage keeps several versions of its weights, in places numbered from 0.

    Without it there is one version, changed in place.
    """

    kept: int  # places
    used: tuple[int, ...]  # the place that every microbatch's forward and backward read
    updates: tuple[tuple[int, int], ...]  # the places that every update reads and writes


@dataclass(frozen=True, slots=True)
class Program:
    """Per pipeline rank, the ordered actions, with everything that they refer to.

    ``mesh`` maps axis to degree, outermost first; ranks that differ only along other axes than
    ``pp`` run the same order on different shards.
    """

    mesh: Mapping[str, int]
    blocks: Mapping[str, Block]
    buffers: Mapping[str, Buffer]
    bodies: Mapping[str, tuple[Call, ...]]
    order: tuple[tuple[Action, ...], ...]
    stage_rank: tuple[int, ...]  # which pipeline rank holds each stage
    info: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[int, Versions] = field(default_factory=dict)  # by stage

    @property
    def world(self) -> int:
        """Number of ranks."""
        total = 1
        for degree in self.mesh.values():
            total *= degree
        return total

    def ops(self, body: str) -> Iterator[tuple[Call, int, Op]]:
        """Yield (call, index in block, op) of a body in issue order."""
        for call in self.bodies[body]:
            for index, op in enumerate(self.blocks[call.block].ops):
                yield call, index, op

    def places(self, action: Action) -> tuple[int, int]:
        """Return in which places an action reads and writes weights; -1 where there is but one."""
        held = self.versions.get(action.stage)
        if held is None:
            return -1, -1
        if action.kind == "O":
            return held.updates[action.microbatch]
        return held.used[action.microbatch], held.used[action.microbatch]

    def key(self, name: str, layer: int, microbatch: int) -> Key:
        """Return the instance that ``name`` means in a call on ``layer``."""
        if name.endswith("+"):
            name, layer = name[:-1], layer + 1
        buffer = self.buffers[name]
        if buffer.base:
            name = buffer.base
            buffer = self.buffers[name]
        per_microbatch = buffer.scope in PER_MICROBATCH
        return (name, layer if buffer.layered else -1, microbatch if per_microbatch else -1)

    def buffer(self, name: str) -> Buffer:
        """Return the declaration of ``name``, whether or not it means the next layer's."""
        return self.buffers[name.removesuffix("+")]


PER_MICROBATCH = frozenset({"act", "data", "cache", "host"})
PERSISTENT = frozenset({"weight", "grad", "state", "cache"})


ENDS = "ends"  # the group of the first and the last pipeline rank
MIRROR = "mirror"  # the group of the pipeline ranks r and p - 1 - r


def fold(name: str, inner: int, degree: int) -> str:
    """Return the group called ``name`` of ``degree`` ranks that lie ``inner`` apart in a stage.

    A second grid over the same ranks consists of such groups: the one for experts reuses those of
    dp, cp and tp ("" for groups of one rank).
    """
    return f"{name}:{inner}x{degree}" if degree > 1 else ""


def folded(group: str) -> tuple[int, int] | None:
    """Return how far apart the members of a `fold` lie and how many they are; None for axes."""
    _, colon, sizes = group.partition(":")
    if not colon:
        return None
    inner, _, degree = sizes.partition("x")
    return int(inner), int(degree)


def axis_degree(mesh: Mapping[str, int], group: str) -> int:
    """Return a group's ranks: along an axis, axes joined by ``*``, a `fold`, ends or mirrors."""
    if group in (ENDS, MIRROR):
        return min(2, mesh["pp"])
    fold_sizes = folded(group)
    if fold_sizes is not None:
        return fold_sizes[1]
    total = 1
    for axis in filter(None, group.split("*")):
        total *= mesh[axis]
    return total


def coordinates(mesh: Mapping[str, int], rank: int) -> dict[str, int]:
    """Return the rank's index along every axis; the last axis varies fastest."""
    found: dict[str, int] = {}
    for axis in reversed(tuple(mesh)):
        rank, found[axis] = divmod(rank, mesh[axis])
    return {axis: found[axis] for axis in mesh}


def rank_at(mesh: Mapping[str, int], where: Mapping[str, int]) -> int:
    """Return the rank with the given coordinates."""
    rank = 0
    for axis, degree in mesh.items():
        rank = rank * degree + where[axis]
    return rank


def group_ranks(mesh: Mapping[str, int], group: str, rank: int) -> list[int]:
    """Return the ranks that share every coordinate of ``rank`` except those along ``group``."""
    fold_sizes = folded(group)
    if fold_sizes is not None:
        inner, degree = fold_sizes
        first = rank - rank // inner % degree * inner
        return [first + index * inner for index in range(degree)]
    axes = group.split("*")
    mine = coordinates(mesh, rank)
    if group == ENDS:
        return [rank_at(mesh, mine | {"pp": end}) for end in sorted({0, mesh["pp"] - 1})]
    if group == MIRROR:
        both = sorted({mine["pp"], mesh["pp"] - 1 - mine["pp"]})
        return [rank_at(mesh, mine | {"pp": place}) for place in both]
    total = axis_degree(mesh, group)
    members = []
    for index in range(total):
        where, rest = dict(mine), index
        for axis in reversed(axes):
            rest, where[axis] = divmod(rest, mesh[axis])
        members.append(rank_at(mesh, where))
    return members

"""Collectives as steps of flows, so that any algorithm runs on any fabric, message by message.

A step starts when the one before has ended on every rank. ``size_bytes`` follows nccl-tests: the
per-rank buffer of all_reduce, all_to_all, broadcast and send_recv, the gathered buffer of
all_gather and reduce_scatter. Algorithms: Thakur, Rabenseifner and Gropp 2005.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import numpy as np
from numpy.typing import ArrayLike

from hwmodels.fabric import Fabric, Ints
from hwmodels.flows import Flows, make_flows, simulate_flows
from simcore.errors import InputError, unknown


@dataclass(frozen=True, slots=True)
class Step:
    """Flows that start together; ``repeats`` times in a row."""

    flows: Flows
    repeats: int = 1


Steps = list[Step]
Exchange = Callable[[Ints, float], Steps]  # (ranks, size in bytes) -> steps


def _ring(laps: int) -> Exchange:
    """Return ``laps`` passes of n - 1 steps, S / n to the next rank."""

    def steps(ranks: Ints, size: float) -> Steps:
        flows = make_flows(ranks, np.roll(ranks, -1), size / ranks.size)
        return [Step(flows, laps * (ranks.size - 1))]

    return steps


def _pairs(ranks: Ints) -> tuple[Ints, Ints]:
    """Return every ordered pair of different ranks."""
    a, b = np.divmod(np.arange(ranks.size**2), ranks.size)
    return ranks[a[a != b]], ranks[b[a != b]]


def _shards(rounds: int = 1) -> Exchange:
    """Return ``rounds`` in which every rank sends S / n to every other one."""
    return lambda ranks, size: [Step(make_flows(*_pairs(ranks), size / ranks.size), rounds)]


def _everything(ranks: Ints, size: float) -> Steps:
    """Every rank sends its whole buffer to every other one."""
    return [Step(make_flows(*_pairs(ranks), size))]


def _from_root(ranks: Ints, size: float) -> Steps:
    return [Step(make_flows(ranks[0], ranks[1:], size))]


def _pairwise(ranks: Ints, size: float) -> Steps:
    """n - 1 rounds; in round k rank i sends S / n to rank i + k."""
    share = size / ranks.size
    return [Step(make_flows(ranks, np.roll(ranks, -k), share)) for k in range(1, ranks.size)]


def _distances(count: int) -> list[int]:
    """Return 1, 2, 4, ... below ``count``."""
    return [1 << k for k in range((count - 1).bit_length())]


def _partners(ranks: Ints, distance: int, size: float) -> Step:
    if ranks.size & (ranks.size - 1):
        raise InputError(
            f"halving-doubling needs a power of two of ranks, not {ranks.size}: use another one."
        )
    return Step(make_flows(ranks, ranks[np.arange(ranks.size) ^ distance], size))


def _halving(ranks: Ints, size: float) -> Steps:
    """Exchanges of S/2 with the neighbour, S/4 at distance 2, and so on."""
    return [_partners(ranks, d, size / (2 * d)) for d in _distances(ranks.size)]


def _doubling(ranks: Ints, size: float) -> Steps:
    return _halving(ranks, size)[::-1]


def _hypercube(ranks: Ints, size: float) -> Steps:
    """Exchanges of half of the buffer at every distance (store and forward)."""
    return [_partners(ranks, d, size / 2) for d in _distances(ranks.size)]


def _tree(ranks: Ints, size: float) -> Steps:
    """A binomial tree: ranks that have the buffer send it on, nearest subtrees last."""
    steps = []
    for d in reversed(_distances(ranks.size)):
        have = np.arange(0, ranks.size - d, 2 * d)
        steps.append(Step(make_flows(ranks[have], ranks[have + d], size)))
    return steps


def _tree_all_reduce(ranks: Ints, size: float) -> Steps:
    """Up the tree and down again."""
    down = _tree(ranks, size)
    up = [
        replace(s, flows=Flows(s.flows.dsts, s.flows.srcs, s.flows.sizes_bytes)) for s in down[::-1]
    ]
    return up + down


def _to_next(ranks: Ints, size: float) -> Steps:
    return [Step(make_flows(ranks, np.roll(ranks, -1), size))]


EXCHANGES: dict[str, dict[str, Exchange]] = {
    "ring": {"all_reduce": _ring(2), "all_gather": _ring(1), "reduce_scatter": _ring(1)},
    "tree": {"all_reduce": _tree_all_reduce, "broadcast": _tree},
    "halving-doubling": {
        "all_reduce": lambda ranks, size: _halving(ranks, size) + _doubling(ranks, size),
        "all_gather": _doubling,
        "reduce_scatter": _halving,
        "all_to_all": _hypercube,
    },
    "direct": {
        "all_reduce": _everything,
        "all_gather": _shards(),
        "reduce_scatter": _shards(),
        "all_to_all": _shards(),
        "broadcast": _from_root,
    },
    "two-shot": {"all_reduce": _shards(rounds=2)},
    "pairwise": {"all_to_all": _pairwise},
    "point-to-point": {"send_recv": _to_next},
}


def collective_flows(op: str, algorithm: str, ranks: ArrayLike, size_bytes: float) -> Steps:
    """Return the steps of a collective over ``ranks`` (in the algorithm's order; the first is the
    root). A group of one has none. send_recv goes from every rank to the next, as in nccl-tests."""
    if algorithm not in EXCHANGES:
        raise unknown("algorithm", algorithm, EXCHANGES)
    if op not in EXCHANGES[algorithm]:
        able = [name for name, ops in EXCHANGES.items() if op in ops]
        if not able:
            raise unknown("collective", op, {name for ops in EXCHANGES.values() for name in ops})
        raise InputError(f"algorithm {algorithm!r} cannot do {op}: use one of {', '.join(able)}.")
    members = np.asarray(ranks, dtype=np.int64).ravel()
    if members.size < 1 or np.unique(members).size < members.size:
        raise InputError("ranks of a group must be different ones, one at least.")
    return EXCHANGES[algorithm][op](members, float(size_bytes)) if members.size > 1 else []


def _grid(nodes: ArrayLike) -> Ints:
    grid = np.asarray(nodes, dtype=np.int64)
    if grid.ndim != 2 or not grid.size:
        raise InputError("nodes must be a table of ranks, a row of equal length per node.")
    return grid


def channel_flows(op: str, nodes: ArrayLike, size_bytes: float) -> Steps:
    """Return the steps of a ring collective as m rings at once, each with 1/m of the bytes.

    ``nodes``: the ranks as [k nodes, m each]. Ring c leaves the first node from position c - 1 and
    every other node runs backwards, so that each ring meets a rail where it changes node and every
    adapter carries one ring (NCCL's channels with alternating adapters, NCCL_CROSS_NIC = 2).
    """
    grid = _grid(nodes)
    rings = []
    for first in range(grid.shape[1]):
        turned = np.roll(grid, -first, axis=1)
        turned[1::2] = turned[1::2, ::-1]
        rings.append(collective_flows(op, "ring", turned, float(size_bytes) / grid.shape[1]))
    return together(rings)


def hierarchical_flows(op: str, nodes: ArrayLike, size_bytes: float) -> Steps:
    """Return the steps of a collective by levels: ``nodes`` are the ranks as [k nodes, m each].

    all_reduce: reduce_scatter in the nodes, all_reduce of S/m between equal positions, all_gather
    in the nodes. all_gather: between positions, then in the nodes; reduce_scatter the reverse.
    all_to_all: in the nodes by the destination's position, then between equal positions.
    """
    grid = _grid(nodes)

    def inside(op: str, algorithm: str, size: float) -> Steps:
        return together([collective_flows(op, algorithm, row, size) for row in grid])

    def between(op: str, algorithm: str, size: float) -> Steps:
        return together([collective_flows(op, algorithm, column, size) for column in grid.T])

    size, bundle = float(size_bytes), float(size_bytes) / grid.shape[1]
    if op == "all_reduce":
        return [
            *inside("reduce_scatter", "ring", size),
            *between("all_reduce", "ring", bundle),
            *inside("all_gather", "ring", size),
        ]
    if op == "all_gather":
        return between(op, "ring", bundle) + inside(op, "ring", size)
    if op == "reduce_scatter":
        return inside(op, "ring", size) + between(op, "ring", bundle)
    if op == "all_to_all":
        return inside(op, "direct", size) + between(op, "direct", size)
    raise unknown("collective", op, ("all_reduce", "all_gather", "reduce_scatter", "all_to_all"))


def together(groups: Sequence[Steps]) -> Steps:
    """Return equal collectives of several groups as one that runs them side by side."""
    shapes = [[step.repeats for step in steps] for steps in groups]
    if any(shape != shapes[0] for shape in shapes):
        raise InputError("groups that run together must do the same collective over as many ranks.")
    return [
        Step(reduce(Flows.__add__, (step.flows for step in steps)), steps[0].repeats)
        for steps in zip(*groups, strict=True)
    ]


def steps_seconds(fabric: Fabric, steps: Steps, aggregate: bool = True) -> float:
    """Return the seconds of steps in a row on an otherwise idle fabric."""
    return sum(
        step.repeats * float(simulate_flows(fabric, step.flows, aggregate).max(initial=0.0))
        for step in steps
    )

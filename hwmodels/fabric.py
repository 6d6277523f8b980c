"""A fabric: ranks, switches, adapters and bridges joined by wires, and the way messages take.

Ranks are the whole numbers 0, 1, ...; every other node has a name. A message takes a shortest path
by count of wires. Where several next wires lie on shortest paths, those of the lowest ``order`` are
meant (dimension order on a torus, fast wires before slow ones), and among equals one is chosen per
message: by the number of the source's machine ("spread": s-mod-k routing, Rodriguez et al. 2009,
which loads the spines of a fat tree evenly) or by a hash of source, destination and hop ("hash":
ECMP).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hwmodels.topology import max_min_rates
from simcore.errors import InputError, unknown

Array = NDArray[np.float64]
Ints = NDArray[np.int64]
Node = int | str

KINDS = ("duplex", "shared", "one-way")
ROUTINGS = ("spread", "hash")
FAR = np.iinfo(np.int64).max


@dataclass(frozen=True, slots=True)
class Wire:
    """A connection of nodes ``a`` and ``b``: payload bytes per second and latency of a direction.

    ``kind``: "duplex" has a link for either direction, "shared" one for both together, "one-way"
    leads from ``a`` to ``b`` alone. Lower ``order`` is tried first (see the module).
    """

    a: Node
    b: Node
    bytes_per_s: float
    latency_s: float = 0.0
    kind: str = "duplex"
    order: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Fabric:
    """Nodes, directed edges and the links behind them, as arrays.

    Nodes are numbered: ranks 0 to ``world`` - 1 first, then the named ones. Edges are sorted by
    tail; both edges of a shared wire lie on one link. ``ranks_per_node``: neighbouring ranks that
    share a machine. ``forwarding``: whether messages may pass through a rank.
    """

    name: str
    world: int
    nodes: tuple[Node, ...]
    tails: Ints  # of edges, node numbers
    heads: Ints
    links: Ints  # of edges, link numbers
    orders: Ints  # of edges
    into: Ints  # edges sorted by head
    into_first: Ints  # of nodes and one more, where their edges start in ``into``
    capacities: Array  # of links, bytes per second
    latencies: Array  # of links, s
    ranks_per_node: int = 1
    forwarding: bool = False
    routing: str = "spread"

    def paths(self, srcs: ArrayLike, dsts: ArrayLike) -> Ints:
        """Return the links that messages cross, a row per message, -1 behind a path's end."""
        src, dst = np.broadcast_arrays(np.asarray(srcs, dtype=np.int64), dsts)
        self.check_ranks(src)
        self.check_ranks(dst)
        order = np.argsort(dst, kind="stable")
        ends, starts = np.unique(dst[order], return_index=True)
        rows = np.split(order, starts[1:]) if order.size else []
        walks = [self._walk(src[row], int(end)) for row, end in zip(rows, ends, strict=True)]
        found = np.full((src.size, max((w.shape[1] for w in walks), default=0)), -1, np.int64)
        for row, walk in zip(rows, walks, strict=True):
            found[row, : walk.shape[1]] = walk
        return found

    def path(self, src: int, dst: int) -> tuple[int, ...]:
        """Return the links that a message from rank ``src`` to rank ``dst`` crosses, in order."""
        return _path(self, src, dst)

    def latency(self, path: Sequence[int]) -> float:
        """Return the seconds that an empty message takes along ``path``."""
        return float(self.latencies[list(path)].sum()) if path else 0.0

    def path_latencies(self, paths: Ints) -> Array:
        """Return `latency` of every row of `paths`."""
        padded = np.append(self.latencies, 0.0)
        return np.asarray(padded[paths].sum(axis=1))

    def rates(self, paths: Sequence[Sequence[int]]) -> Sequence[float]:
        """Return max-min fair rates, in bytes per second."""
        return list(max_min_rates(paths, self.capacities))

    def check_ranks(self, ranks: Ints) -> None:
        """Raise `InputError` for a rank that the fabric does not have."""
        wrong = ranks[(ranks < 0) | (ranks >= self.world)]
        if wrong.size:
            raise InputError(
                f"rank {wrong[0]} is not in {self.name} of {self.world}: use 0 to {self.world - 1}."
            )

    def _walk(self, srcs: Ints, dst: int) -> Ints:
        """Return the paths of messages to one rank, -1 behind a path's end."""
        first, count, edges = _towards(self, dst, srcs)
        at = srcs.copy()
        steps: list[Ints] = []
        while (moving := at != dst).any():
            ways = np.where(moving, count[at], 1)
            if not ways.all():
                stuck = int(srcs[ways == 0][0])
                raise InputError(f"{self.name}: no way leads from rank {stuck} to rank {dst}.")
            turn = self._choice(srcs, dst, len(steps)) % ways
            edge = edges[np.where(moving, first[at] + turn, 0)]
            steps.append(np.where(moving, self.links[edge], -1))
            at = np.where(moving, self.heads[edge], at)
        return np.stack(steps, axis=1) if steps else np.empty((srcs.size, 0), np.int64)

    def _choice(self, srcs: Ints, dst: int, hop: int) -> Ints:
        """Return the number that chooses among equal ways."""
        if self.routing == "spread":
            return srcs // self.ranks_per_node
        mixed = ((hop * self.world + dst) * self.world + srcs + 1).astype(np.uint64)
        for shift in (30, 27, 31):  # splitmix64's finaliser (Steele, Lea and Flood 2014)
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(0xBF58476D1CE4E5B9)
        return (mixed >> np.uint64(1)).astype(np.int64)


@lru_cache(maxsize=65536)
def _path(fabric: Fabric, src: int, dst: int) -> tuple[int, ...]:
    return tuple(int(link) for link in fabric.paths([src], [dst])[0] if link >= 0)


def _towards(fabric: Fabric, dst: int, srcs: Ints) -> tuple[Ints, Ints, Ints]:
    """Return the edges that lead nearer to ``dst``: first place and count per node, edges.

    Breadth first from ``dst`` backwards, as far as the farthest of ``srcs``.
    """
    far = np.full(len(fabric.nodes), FAR)
    far[dst] = level = 0
    frontier, found = np.array([dst]), [np.empty(0, np.int64)]
    while frontier.size and far[srcs].max() == FAR:
        edges = _entering(fabric, frontier)
        tails = fabric.tails[edges]
        level += 1
        near = tails[far[tails] == FAR]
        far[near] = level
        found.append(edges[far[tails] == level])
        frontier = np.unique(near if fabric.forwarding else near[near >= fabric.world])
    edges = np.sort(np.concatenate(found))
    tails, orders = fabric.tails[edges], fabric.orders[edges]
    least = np.full(len(fabric.nodes), FAR)
    np.minimum.at(least, tails, orders)
    edges = edges[orders == least[tails]]
    count = np.bincount(fabric.tails[edges], minlength=len(fabric.nodes))
    return np.cumsum(count) - count, count, edges


def _entering(fabric: Fabric, nodes: Ints) -> Ints:
    """Return the edges into any of ``nodes``."""
    first, count = fabric.into_first[nodes], np.diff(fabric.into_first)[nodes]
    before = np.cumsum(count) - count
    return np.asarray(fabric.into[np.arange(count.sum()) + np.repeat(first - before, count)])


def make_fabric(
    name: str,
    wires: Iterable[Wire],
    ranks_per_node: int = 1,
    forwarding: bool = False,
    routing: str = "spread",
) -> Fabric:
    """Return the fabric of ``wires``. Raises `InputError` for a wire that cannot be."""
    wires = list(wires)
    if routing not in ROUTINGS:
        raise unknown("routing", routing, ROUTINGS)
    ends = dict.fromkeys(end for wire in wires for end in (wire.a, wire.b))
    ranks = sorted(end for end in ends if isinstance(end, int))
    if not ranks or ranks != list(range(len(ranks))):
        raise InputError(f"{name}: number the ranks 0, 1, 2, ... without a gap, one at least.")
    nodes: tuple[Node, ...] = (*ranks, *(end for end in ends if isinstance(end, str)))
    number = {node: i for i, node in enumerate(nodes)}
    edges: list[tuple[int, int, int, int]] = []
    capacities: list[float] = []
    latencies: list[float] = []
    for wire in wires:
        _check_wire(name, wire)
        a, b = number[wire.a], number[wire.b]
        for tail, head in ((a, b), (b, a))[: 1 if wire.kind == "one-way" else 2]:
            if wire.kind != "shared" or tail == a:
                capacities.append(wire.bytes_per_s)
                latencies.append(wire.latency_s)
            edges.append((tail, head, len(capacities) - 1, wire.order))
    edges.sort(key=lambda edge: edge[0])
    tails, heads, links, orders = np.array(edges, dtype=np.int64).T
    arriving = np.bincount(heads, minlength=len(nodes))
    return Fabric(
        name,
        len(ranks),
        nodes,
        tails,
        heads,
        links,
        orders,
        np.argsort(heads, kind="stable"),
        np.append(0, np.cumsum(arriving)),
        np.array(capacities),
        np.array(latencies),
        ranks_per_node,
        forwarding,
        routing,
    )


def _check_wire(name: str, wire: Wire) -> None:
    where = f"{name}: wire {wire.a} to {wire.b}"
    if wire.kind not in KINDS:
        raise unknown(f"kind of {where}", wire.kind, KINDS)
    if wire.a == wire.b:
        raise InputError(f"{where} leads to itself: leave it out.")
    if not wire.bytes_per_s > 0 or not wire.latency_s >= 0:
        raise InputError(f"{where}: bytes_per_s must be above 0 and latency_s 0 or above.")

"""Where ranks sit and which links their messages cross; fair shares of links.

Ranks are numbered node by node: node = rank // gpus_per_node. A node's ranks hang on a switch (one
link out of each rank and one into it) or on a mesh (a link per ordered pair). Between nodes a
message leaves through the adapter of its rank and enters through that of the other one; the fabric
in between is non-blocking unless oversubscribed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hwmodels.collectives import GroupLayout
from hwmodels.hardware import Cluster
from simcore.errors import InputError, unknown
from simcore.strategy import MESH_AXES

Array = NDArray[np.float64]
Path = tuple[int, ...]

# Names for products of neighbouring axes, outermost first.
AXIS_GROUPS: dict[str, tuple[str, ...]] = {
    **{axis: (axis,) for axis in MESH_AXES},
    "dp": ("dp_replicate", "dp_shard"),
    "dp_shard_cp": ("dp_shard", "cp"),
    "dp_cp": ("dp_replicate", "dp_shard", "cp"),
    "world": MESH_AXES,
}


class Mesh(Protocol):
    """A strategy's degrees: one whole number per mesh axis, read by name."""

    def coordinates(self, rank: int) -> dict[str, int]:
        """Return the rank's index along every mesh axis."""
        ...


@dataclass(frozen=True, slots=True)
class Topology:
    """Directed links of a cluster, numbered 0, 1, ...: capacities and latencies by number.

    Order: links inside nodes, then adapters out, adapters in, then (if oversubscribed) the nodes'
    uplinks out and in. A link that is not duplex has one number for both directions. A path's
    latency is the sum over its links.
    """

    cluster: Cluster
    capacities: Array  # payload bytes per second
    latencies: Array  # s
    oversubscription: float = 1.0

    @property
    def per_node(self) -> int:
        """Links inside one node."""
        ranks = self.cluster.gpus_per_node
        if is_mesh(self.cluster):
            return ranks * (ranks - 1)
        return 2 * ranks

    def path(self, src: int, dst: int) -> Path:
        """Return the links that a message from rank ``src`` to rank ``dst`` crosses, in order."""
        world, ranks = self.cluster.world, self.cluster.gpus_per_node
        for rank in (src, dst):
            if not 0 <= rank < world:
                raise InputError(
                    f"rank {rank} is not in the cluster of {world}: use 0 to {world - 1}."
                )
        if src == dst:
            return ()
        (a, i), (b, j) = divmod(src, ranks), divmod(dst, ranks)
        return self._inside(a, i, j) if a == b else self._between(a, i, b, j)

    def _inside(self, node: int, i: int, j: int) -> Path:
        first, ranks = node * self.per_node, self.cluster.gpus_per_node
        if is_mesh(self.cluster):
            return (first + i * (ranks - 1) + j - (j > i),)
        back = ranks if self.cluster.scale_up.duplex else 0
        return (first + i, first + back + j)

    def _between(self, a: int, i: int, b: int, j: int) -> Path:
        nodes, adapters = self.cluster.nodes, _adapters(self.cluster)
        out = nodes * self.per_node
        into = out + (nodes * adapters if self.cluster.scale_out.duplex else 0)
        share = self.cluster.gpus_per_node / adapters
        ends = (out + a * adapters + int(i / share), into + b * adapters + int(j / share))
        if self.oversubscription <= 1:
            return ends
        spine = out + 2 * nodes * adapters
        return (ends[0], spine + a, spine + nodes + b, ends[1])

    def latency(self, path: Path) -> float:
        """Return the seconds that an empty message takes along ``path``."""
        return float(self.latencies[list(path)].sum()) if path else 0.0


def is_mesh(cluster: Cluster) -> bool:
    return cluster.scale_up.kind == "mesh"


def _adapters(cluster: Cluster) -> int:
    """Return the adapters of a node that the topology tells apart: at most one per rank."""
    own = cluster.scale_out.nics_per_node or cluster.gpus_per_node
    return min(own, cluster.gpus_per_node)


def make_topology(cluster: Cluster, oversubscription: float = 1.0) -> Topology:
    """Return the links of ``cluster``.

    ``oversubscription``: bandwidth of a node's adapters over that of its uplink into the fabric.
    A link's latency is split evenly over its two ends, out and in.
    """
    if oversubscription < 1:
        raise InputError(f"oversubscription {oversubscription} must be 1 or more.")
    up, out, nodes = cluster.scale_up, cluster.scale_out, cluster.nodes
    ranks, adapters = cluster.gpus_per_node, _adapters(cluster)
    mesh = is_mesh(cluster)
    inside = nodes * (ranks * (ranks - 1) if mesh else 2 * ranks)
    up_rate = (up.peer_rate_bytes_per_s if mesh else up.bytes_per_s) * up.efficiency
    node_rate = out.bytes_per_s * out.efficiency * ranks
    parts = [
        (inside, up_rate, up.latency_s / (1 if mesh else 2)),
        (2 * nodes * adapters, node_rate / adapters, out.latency_s / 2),
    ]
    if oversubscription > 1:
        parts.append((2 * nodes, node_rate / oversubscription, 0.0))
    counts = [count for count, _, _ in parts]
    return Topology(
        cluster,
        np.repeat([rate for _, rate, _ in parts], counts),
        np.repeat([latency for _, _, latency in parts], counts),
        oversubscription,
    )


# -- fair shares ---------------------------------------------------------------------------------


def max_min_rates(flows: Sequence[Sequence[int]], capacities: ArrayLike) -> Array:
    """Return the max-min fair rate of every flow (progressive filling; Bertsekas and Gallager).

    All rates rise together; when a link is full its flows stop, the others go on. A flow over no
    link has an infinite rate; one that crosses a link twice takes its rate there twice.
    """
    owner = np.repeat(np.arange(len(flows)), [len(flow) for flow in flows])
    link = np.array([x for flow in flows for x in flow], dtype=np.intp)
    return fair_rates(owner, link, np.ones(link.size), len(flows), capacities)


def fair_rates(
    owner: NDArray[np.intp],
    link: NDArray[np.intp],
    weight: Array,
    count: int,
    capacities: ArrayLike,
) -> Array:
    """Return the max-min fair rates of ``count`` flows, or classes of equal flows.

    The arrays hold one entry per crossing: flow ``owner`` at rate r takes ``weight`` x r of the
    capacity of ``link``.
    """
    room = np.array(capacities, dtype=np.float64)
    rates = np.full(count, np.inf)
    active = np.zeros(count, dtype=np.bool_)
    active[owner] = True
    while active.any():
        moving = active[owner]
        users = np.bincount(link[moving], weight[moving], minlength=room.size)
        fair = np.divide(room, users, out=np.full(room.size, np.inf), where=users > 0)
        rate = float(fair.min())
        if math.isinf(rate):  # nothing bounds the flows that are left
            break
        full = fair <= rate * (1 + 1e-12)
        stopped = np.unique(owner[moving & full[link]])
        rates[stopped] = rate
        active[stopped] = False
        gone = moving & ~active[owner]
        room -= rate * np.bincount(link[gone], weight[gone], minlength=room.size)
        room = np.maximum(room, 0.0)
    return rates


# -- groups on nodes -----------------------------------------------------------------------------


def members_per_node(
    inner_degree: ArrayLike, degree: ArrayLike, gpus_per_node: ArrayLike
) -> NDArray[np.int64]:
    """Return how many members of a group share a node, in the group where they are fewest.

    Members are ``inner_degree`` ranks apart (the product of the faster-varying axes), ``degree`` of
    them. Nodes and groups start together every g = gcd(inner x degree, gpus_per_node) ranks, and a
    window of g ranks holds at least floor(g / inner) members, one at least. Exact where
    inner x degree divides gpus_per_node or is a multiple of it; else no group has fewer.
    """
    inner = np.asarray(inner_degree, dtype=np.int64)
    span = inner * np.asarray(degree, dtype=np.int64)
    window = np.gcd(span, np.asarray(gpus_per_node, dtype=np.int64))
    return np.asarray(np.maximum(window // inner, 1))


def inner_degree(axes: Sequence[str], strategy: Mesh) -> int:
    """Return the product of the axes that vary faster than ``axes``."""
    last = MESH_AXES.index(axes[-1])
    return math.prod(int(getattr(strategy, axis)) for axis in MESH_AXES[last + 1 :])


def place_group(axis: str, strategy: Mesh, cluster: Cluster) -> GroupLayout:
    """Return the layout of the groups along ``axis``: a mesh axis, "ep" or a key of `AXIS_GROUPS`.

    Expert groups reuse dp, cp and tp ranks: neighbours first, beyond the expert tensor ranks
    (``etp``, where the strategy has it).
    """
    if axis == "ep":
        degree, inner = int(getattr(strategy, "ep", 1)), int(getattr(strategy, "etp", 1) or 1)
    elif axis in AXIS_GROUPS:
        axes = AXIS_GROUPS[axis]
        degree = math.prod(int(getattr(strategy, name)) for name in axes)
        inner = inner_degree(axes, strategy)
    else:
        raise unknown("mesh axis", axis, (*AXIS_GROUPS, "ep"))
    shared = int(members_per_node(inner, degree, cluster.gpus_per_node))
    return GroupLayout(degree, shared, cluster.scale_up, cluster.scale_out)

"""Lower bounds on the time of any algorithm for a collective on a fabric, fluid and at full rate.

Traffic that is given per pair (all_to_all, send_recv, a matrix D) is a maximum concurrent flow
(Shahrokhi and Matula 1990), with commodities merged by source. Over the bytes f[s, e] that rank s
sends through edge e, and the time T:

    minimise T
    (1) sum over e into v of f[s, e] - sum over e out of v of f[s, e] = D[s, v]
                                                     for every rank s and node v other than s
    (2) sum over s and the edges e of link l of f[s, e] <= c_l T   for every link l
    (3) f >= 0                                            -> `traffic_bound`

Ranks may pass on what is not for them, though a fabric's own routes may not: algorithms do.

Where bytes may be copied or summed on their way, the bytes that one rank must get from (or give to)
the others still are a flow to (from) that rank alone:

    (4) all_gather: S/n from every rank to d, for every d, T the greatest: this bound is attained
        (Zhao et al. 2024, ForestColl); reduce_scatter is its reverse      -> `gather_bound`
    (5) broadcast: S over the least cut between the root and any rank (Edmonds 1973)
    (6) all_reduce: S over the least cut between two ranks; and, as each byte needs 2 (k - 1)
        messages between k parties that start with a term each (one-way gossip: Harary and Schwenk
        1974; Patarasuk and Yuan 2009), 2 (k - 1) S over what all parties can send, or receive, at
        once. Parties are the ranks, or the nodes.                      -> `all_reduce_bound`

(6) assumes switches that neither sum nor copy, and messages of sums of one byte position, not
codes over several. A message's latency bounds the time too.

The programmes go to HiGHS through scipy: their matrix is a Kronecker product of the incidence
matrix, which is at hand as arrays, and (4) solves a small programme per rank.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse
from scipy.optimize import linprog
from scipy.sparse import csgraph

from hwmodels.fabric import Fabric, Ints
from simcore.errors import InputError, unknown

Array = NDArray[np.float64]
Crossing = Callable[[NDArray[np.bool_]], float]
VARIABLES = 300_000  # of ranks x edges; above it cuts are taken
TINY = np.finfo(np.float64).tiny
UNITS = 1e9  # whole units in which the greatest flow that could be is counted
COLLECTIVES = (
    "all_to_all",
    "send_recv",
    "all_gather",
    "reduce_scatter",
    "broadcast",
    "all_reduce",
)


@dataclass(frozen=True, slots=True)
class FlowBound:
    """Seconds that no algorithm beats, what they come from, and the seconds it took to find out.

    ``method``: "programme" (1)-(3), "gather" (4), "broadcast" (5), "reduce" (6), "cuts" where the
    programmes would be too large, or "latency" where one message's latency is longer.
    """

    seconds: float
    method: str
    wall_s: float


def flow_bound(op: str, fabric: Fabric, ranks: ArrayLike, size_bytes: float) -> FlowBound:
    """Return the bound of a collective over ``ranks``, the first being the root.

    ``size_bytes`` as in `hwmodels.exchanges.collective_flows`.
    """
    members = _members(fabric, ranks)
    begun, n, size = time.perf_counter(), members.size, float(size_bytes)
    if op not in COLLECTIVES:
        raise unknown("collective", op, COLLECTIVES)
    if not (math.isfinite(size) and size >= 0):
        raise InputError(f"size_bytes {size_bytes} must be a finite number, 0 or above.")
    if n == 1 or size == 0:
        return FlowBound(0.0, "latency", 0.0)
    if op in ("all_to_all", "send_recv"):
        return traffic_bound(fabric, members, _demand(op, n, size))
    quick = n * fabric.tails.size > VARIABLES
    if op == "broadcast":
        least = min(_max_flow(fabric, members[:1], [rank]) for rank in members[1:])
        found = size / least, "broadcast"
    elif op == "all_reduce":
        found = all_reduce_bound(fabric, members, size, quick), "cuts" if quick else "reduce"
    else:
        bound = _gather_cuts if quick else gather_bound
        found = bound(fabric, members, size, op == "reduce_scatter"), "cuts" if quick else "gather"
    root = members[:1] if op == "broadcast" else members
    return _bound(*found, float(_latencies(fabric, root, members).max()), begun)


def _members(fabric: Fabric, ranks: ArrayLike) -> Ints:
    members = np.asarray(ranks, dtype=np.int64).ravel()
    if np.unique(members).size != members.size or members.size < 1:
        raise InputError("ranks of a group must be different ones, one at least.")
    fabric.check_ranks(members)
    return members


def _bound(transfer: float, method: str, latency: float, begun: float) -> FlowBound:
    wall = time.perf_counter() - begun
    return FlowBound(max(transfer, latency), "latency" if latency > transfer else method, wall)


def _demand(op: str, n: int, size: float) -> Array:
    """Return the bytes from rank to rank, [n, n]."""
    if op == "send_recv":
        return np.roll(np.eye(n), 1, axis=1) * size
    return (1 - np.eye(n)) * size / n


def _latencies(fabric: Fabric, srcs: Ints, dsts: Ints) -> Array:
    """Return the least latency of any way between ranks, [srcs, dsts], in s."""
    # A wire without latency must still be an edge of the sparse graph.
    none = 1e-15
    delays = np.maximum(fabric.latencies[fabric.links], none)
    ends = fabric.tails * len(fabric.nodes) + fabric.heads
    order = np.lexsort((delays, ends))
    ends, first = np.unique(ends[order], return_index=True)  # of parallel edges the quickest
    shape = (len(fabric.nodes),) * 2
    graph = sparse.csr_array((delays[order][first], np.divmod(ends, shape[0])), shape=shape)
    found = csgraph.dijkstra(graph, indices=srcs)[:, dsts]
    return np.asarray(np.maximum(found - len(fabric.nodes) * none, 0.0))


# -- traffic per pair ----------------------------------------------------------------------------


def traffic_bound(fabric: Fabric, ranks: ArrayLike, demand_bytes: ArrayLike) -> FlowBound:
    """Return the bound of sending ``demand_bytes[i, j]`` from rank i to rank j of ``ranks``."""
    begun = time.perf_counter()
    members = _members(fabric, ranks)
    demand = np.array(demand_bytes, dtype=np.float64)
    if demand.shape != (members.size,) * 2:
        raise InputError(
            f"demand_bytes {demand.shape} must have a row and a column per rank ({members.size})."
        )
    if not (np.isfinite(demand).all() and demand.min() >= 0):
        raise InputError("demand_bytes must be finite numbers, 0 or above.")
    np.fill_diagonal(demand, 0.0)
    if not demand.any():
        return FlowBound(0.0, "latency", 0.0)
    far = float(_latencies(fabric, members, members)[demand > 0].max())
    sending = demand.any(axis=1)
    if sending.sum() * fabric.tails.size > VARIABLES:
        return _bound(traffic_cuts(fabric, members, demand), "cuts", far, begun)
    net = np.zeros((members.size, len(fabric.nodes)))
    net[:, members] = demand
    net[np.arange(members.size), members] = -demand.sum(axis=1)
    return _bound(_least_seconds(fabric, net[sending]), "programme", far, begun)


def traffic_cuts(fabric: Fabric, ranks: Ints, demand_bytes: Array) -> float:
    """Return `cut_bound` of traffic between pairs, in seconds."""
    return cut_bound(
        fabric,
        ranks,
        lambda inside: float(demand_bytes[inside][:, ~inside].sum()),
        lambda inside: float(demand_bytes[~inside][:, inside].sum()),
    )


def _least_seconds(fabric: Fabric, net_bytes: Array) -> float:
    """Solve (1) to (3); ``net_bytes[k, v]``: bytes of commodity k that stay in node v."""
    edges, nodes = fabric.tails.size, len(fabric.nodes)
    finite = np.isfinite(fabric.capacities)
    unit_bytes, unit_rate = net_bytes.max(), fabric.capacities[finite].max()
    each = np.arange(edges)
    incidence = sparse.csr_array(
        (
            np.repeat([1.0, -1.0], edges),
            (np.append(fabric.heads, fabric.tails), np.tile(each, 2)),
        ),
        shape=(nodes, edges),
    )
    on_link = sparse.csr_array((np.ones(edges), (fabric.links, each)), shape=(finite.size, edges))[
        np.flatnonzero(finite)
    ]
    commodities = len(net_bytes)
    conserve = sparse.hstack(  # (1)
        [
            sparse.kron(sparse.eye_array(commodities), incidence),
            sparse.csr_array((commodities * nodes, 1)),
        ]
    )
    rates = -fabric.capacities[finite, None] / unit_rate
    capacity = sparse.hstack(  # (2)
        [sparse.kron(np.ones((1, commodities)), on_link), sparse.csr_array(rates)]
    )
    cost = np.zeros(commodities * edges + 1)
    cost[-1] = 1.0
    found = linprog(
        cost,
        A_ub=capacity.tocsc(),
        b_ub=np.zeros(capacity.shape[0]),
        A_eq=conserve.tocsc(),
        b_eq=net_bytes.ravel() / unit_bytes,
        method="highs-ipm",  # the simplex method takes ten times as long on symmetric fabrics
    )
    if found.status != 0:
        raise InputError(f"{fabric.name}: some ranks cannot be reached ({found.message}).")
    return float(found.fun * unit_bytes / unit_rate)


# -- copies and sums on the way ------------------------------------------------------------------


def gather_bound(fabric: Fabric, ranks: Ints, size_bytes: float, reverse: bool = False) -> float:
    """Return (4), in seconds: one programme per rank, of one commodity each."""
    worst = 0.0
    for rank in ranks:
        net = np.zeros(len(fabric.nodes))
        net[ranks] = -size_bytes / ranks.size
        net[rank] = size_bytes * (ranks.size - 1) / ranks.size
        worst = max(worst, _least_seconds(fabric, np.atleast_2d(-net if reverse else net)))
    return worst


def _gather_cuts(fabric: Fabric, ranks: Ints, size_bytes: float, reverse: bool) -> float:
    """Return `cut_bound` of (4): a party gives its own shards once and gets all the others."""

    def own(inside: NDArray[np.bool_]) -> float:
        return size_bytes * float(inside.mean())

    def others(inside: NDArray[np.bool_]) -> float:
        return size_bytes * float((~inside).mean())

    return cut_bound(fabric, ranks, *((others, own) if reverse else (own, others)))


def all_reduce_bound(fabric: Fabric, ranks: Ints, size_bytes: float, quick: bool = False) -> float:
    """Return (6), in seconds; ``quick`` takes the cuts of `cut_bound` alone."""
    if quick:
        found = cut_bound(fabric, ranks, lambda _: size_bytes, lambda _: size_bytes)
    else:
        root, both = ranks[:1], (False, True)
        found = size_bytes / min(_max_flow(fabric, root, [r], w) for r in ranks[1:] for w in both)
    for parties in filter(None, (_singles(ranks), _nodes(fabric, ranks))):
        for reverse in (False, True):
            total = sum(_way(fabric, party, ranks, reverse, quick) for party in parties)
            found = max(found, 2 * (len(parties) - 1) * size_bytes / total)
    return found


# -- cuts ----------------------------------------------------------------------------------------


def cut_bound(fabric: Fabric, ranks: Ints, out: Crossing, into: Crossing) -> float:
    """Return the greatest time over cuts round a rank and round the ranks of a node, in seconds.

    ``out`` and ``into`` give the bytes that must leave or enter a party (a mask over ``ranks``).
    Weaker than the programmes, and quick for thousands of ranks.
    """
    found = 0.0
    for party in (*_singles(ranks), *_nodes(fabric, ranks)):
        inside = np.isin(ranks, party)
        for crossing, reverse in ((out, False), (into, True)):
            needed = crossing(inside)
            if needed:
                found = max(found, needed / _way(fabric, party, ranks, reverse, quick=True))
    return found


def _singles(ranks: Ints) -> list[Ints]:
    return [ranks[[i]] for i in range(ranks.size)]


def _nodes(fabric: Fabric, ranks: Ints) -> list[Ints]:
    """Return the ranks of each node, where nodes of several ranks divide them."""
    node = ranks // fabric.ranks_per_node
    parts = [ranks[node == number] for number in np.unique(node)]
    return parts if 1 < len(parts) < ranks.size else []


def _way(fabric: Fabric, party: Ints, ranks: Ints, reverse: bool, quick: bool) -> float:
    """Return the bytes per second out of a party to the other ranks (into it if ``reverse``).

    ``quick`` counts a single rank's own links instead of following them.
    """
    if not quick or party.size > 1:
        return _max_flow(fabric, party, np.setdiff1d(ranks, party), reverse)
    own = (fabric.heads if reverse else fabric.tails) == party[0]
    return float(fabric.capacities[fabric.links[own]].sum())


def _max_flow(fabric: Fabric, srcs: ArrayLike, dsts: ArrayLike, reverse: bool = False) -> float:
    """Return the bytes per second from ``srcs`` to ``dsts`` together, rounded up.

    A shared link counts in full for both of its directions.
    """
    starts, ends = np.asarray(srcs), np.asarray(dsts)
    if reverse:
        starts, ends = ends, starts
    nodes = len(fabric.nodes)
    rates = fabric.capacities[fabric.links]
    around = (np.isin(fabric.tails, starts), np.isin(fabric.heads, ends), np.isfinite(rates))
    unit = min(rates[edges].sum() for edges in around) / UNITS
    tails = np.concatenate([fabric.tails, np.full(starts.size, nodes), ends])
    heads = np.concatenate([fabric.heads, starts, np.full(ends.size, nodes + 1)])
    rates = np.append(rates, np.full(starts.size + ends.size, np.inf))
    graph = sparse.csr_matrix((rates, (tails, heads)), shape=(nodes + 2, nodes + 2))
    graph.data = np.ceil(np.minimum(graph.data, UNITS * unit) / max(unit, TINY))
    flow = csgraph.maximum_flow(graph.astype(np.int32), nodes, nodes + 1).flow_value
    if flow == 0:
        raise InputError(f"{fabric.name}: some ranks cannot be reached from others.")
    return float(flow * unit)

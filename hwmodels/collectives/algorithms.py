"""The registry of algorithms and libraries, and nccl-tests' conventions of bytes.

Sizes follow nccl-tests: the per-rank buffer for all_reduce, all_to_all, broadcast, reduce,
exclusive_scan and send_recv, the full gathered buffer for all_gather, reduce_scatter, gather and
scatter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hwmodels.collectives.traffic import (
    Array,
    Shape,
    Traffic,
    binomial,
    bruck,
    chain,
    direct,
    doubling_scan,
    grouped_sends,
    halving,
    hierarchical_all_reduce,
    hierarchical_all_to_all,
    hierarchical_broadcast,
    hierarchical_gather,
    one_send,
    pairwise,
    ring,
    shard,
    star,
    switch_all_reduce,
    switch_between,
    tree_all_reduce,
    tree_between,
    tree_rooted,
    whole,
)
from simcore.errors import InputError, unknown


def _once(n: Array) -> Array:
    return np.where(n > 1, 1.0, 0.0)


def _others(n: Array) -> Array:
    return (n - 1) / n


# op -> bus bytes per byte of size for n ranks (nccl-tests, doc/PERFORMANCE.md; the scan, which
# nccl-tests does not have, as a broadcast).
BUS_FACTORS: dict[str, Callable[[Array], Array]] = {
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "all_gather": _others,
    "reduce_scatter": _others,
    "all_to_all": _others,
    "broadcast": _once,
    "send_recv": _once,
    "reduce": _once,
    "gather": _others,
    "scatter": _others,
    "exclusive_scan": _once,
}


@dataclass(frozen=True, slots=True)
class Algorithm:
    """How a collective moves its bytes: one `Traffic` function per op that it can do."""

    name: str
    ops: Mapping[str, Shape]
    serial: bool = False  # True: the links inside and between nodes are used in turn
    power_of_two: bool = False  # needs a power of two of ranks, in whole powers of two per node
    single_peer: bool = False  # talks to one peer at a time
    in_switch: bool = False  # needs switches that reduce and copy; never taken unasked


ALGORITHMS: dict[str, Algorithm] = {
    algorithm.name: algorithm
    for algorithm in (
        Algorithm(
            "ring",
            {
                "all_reduce": ring(2),
                "all_gather": ring(1),
                "reduce_scatter": ring(1),
                "broadcast": chain,
                "reduce": chain,
                "exclusive_scan": chain,
            },
        ),
        Algorithm(
            "tree",
            {
                "all_reduce": tree_all_reduce,
                "broadcast": tree_rooted,
                "reduce": tree_rooted,
                "gather": binomial,
                "scatter": binomial,
            },
        ),
        Algorithm(
            "halving-doubling",
            {
                "all_reduce": halving(2),
                "all_gather": halving(1),
                "reduce_scatter": halving(1),
                "all_to_all": bruck,
                "exclusive_scan": doubling_scan,
            },
            serial=True,
            power_of_two=True,
            single_peer=True,
        ),
        Algorithm(
            "direct",
            {
                "all_reduce": direct(whole),
                "all_gather": direct(shard),
                "reduce_scatter": direct(shard),
                "all_to_all": direct(shard),
                "broadcast": direct(whole),
                "reduce": direct(whole),
                "gather": direct(shard),
                "scatter": direct(shard),
                "exclusive_scan": direct(whole),
            },
        ),
        Algorithm("two-shot", {"all_reduce": direct(shard, rounds=2)}),
        Algorithm(
            "star",
            {
                "all_reduce": star(whole, whole),
                "all_gather": star(shard, whole),
                "reduce_scatter": star(whole, shard),
            },
        ),
        Algorithm("pairwise", {"all_to_all": pairwise}, serial=True, single_peer=True),
        Algorithm("point-to-point", {"send_recv": one_send}, single_peer=True),
        Algorithm(
            "hierarchical",
            {
                "all_reduce": hierarchical_all_reduce(tree=False),
                "all_gather": hierarchical_gather,
                "reduce_scatter": hierarchical_gather,
                "all_to_all": hierarchical_all_to_all,
                "broadcast": hierarchical_broadcast,
            },
            serial=True,
        ),
        Algorithm(
            "hierarchical-tree", {"all_reduce": hierarchical_all_reduce(tree=True)}, serial=True
        ),
        Algorithm("in-switch", {"all_reduce": switch_all_reduce(tree_between)}, in_switch=True),
        Algorithm("sharp", {"all_reduce": switch_all_reduce(switch_between)}, in_switch=True),
        Algorithm(
            "grouped-sends",
            {"all_to_all": grouped_sends, "gather": grouped_sends, "scatter": grouped_sends},
        ),
    )
}

# What a library picks from, per op, where the algorithm is given as the library's name.
LIBRARIES: dict[str, dict[str, tuple[str, ...]]] = {
    "closed-form": {
        op: tuple(n for n, a in ALGORITHMS.items() if op in a.ops and not a.in_switch)
        for op in BUS_FACTORS
    },
    "one-shot": {
        "all_reduce": ("direct", "two-shot"),
        "send_recv": ("point-to-point",),
        **{op: ("direct",) for op in ALGORITHMS["direct"].ops if op != "all_reduce"},
    },
}


def sizes(ranks: ArrayLike, ranks_per_node: ArrayLike | None) -> tuple[Array, Array, Array]:
    """Return n, m and k as arrays that broadcast, checked."""
    n = np.asarray(ranks, dtype=np.float64)
    m = n if ranks_per_node is None else np.asarray(ranks_per_node, dtype=np.float64)
    if n.size and (np.min(n) < 1 or np.min(m) < 1):
        raise InputError("a group needs at least 1 rank, and 1 rank per node.")
    n, m = np.broadcast_arrays(n, np.minimum(m, n))
    return n, m, np.ceil(n / m - 1e-12)


def feasible(algorithm: Algorithm, n: Array, m: Array) -> NDArray[np.bool_]:
    """Return where ``algorithm`` can run."""
    if not algorithm.power_of_two:
        return np.ones(n.shape, dtype=np.bool_)
    whole_powers = [np.exp2(np.round(np.log2(x))) == x for x in (n, m)]
    return np.asarray(whole_powers[0] & whole_powers[1])


def known_op(op: str) -> None:
    """Raise where ``op`` is no collective."""
    if op not in BUS_FACTORS:
        raise unknown("collective", op, BUS_FACTORS)


def algorithm_of(op: str, name: str) -> Algorithm:
    """Return the algorithm called ``name``, checked to do ``op``."""
    known_op(op)
    if name not in ALGORITHMS:
        raise unknown("algorithm", name, ALGORITHMS)
    if op not in ALGORITHMS[name].ops:
        can = ", ".join(n for n, a in ALGORITHMS.items() if op in a.ops)
        raise InputError(f"algorithm {name!r} cannot do {op}: use one of {can}.")
    return ALGORITHMS[name]


def traffic(
    op: str, ranks: ArrayLike, algorithm: str = "ring", ranks_per_node: ArrayLike | None = None
) -> Traffic:
    """Return hops and bytes per byte of size; without ``ranks_per_node`` the group is one node."""
    n, m, k = sizes(ranks, ranks_per_node)
    found = algorithm_of(op, algorithm).ops[op](n, m, k)
    parts = (found.up_hops, found.out_hops, found.up_share, found.out_share)
    rest = (found.local_share, found.chunk_share, found.pieces)
    spread = (np.broadcast_to(np.asarray(x, dtype=np.float64), n.shape) for x in (*parts, *rest))
    return Traffic(*spread)


def wire_bytes(
    op: str,
    size_bytes: ArrayLike,
    ranks: ArrayLike,
    algorithm: str = "ring",
    ranks_per_node: ArrayLike | None = None,
) -> Array:
    """Return the bytes that the busiest rank moves in its busier direction, over all links."""
    moved = traffic(op, ranks, algorithm, ranks_per_node)
    return np.asarray(np.asarray(size_bytes, dtype=np.float64) * (moved.up_share + moved.out_share))


def hops(
    op: str, ranks: ArrayLike, algorithm: str = "ring", ranks_per_node: ArrayLike | None = None
) -> Array:
    """Return how many messages follow one another on the longest chain of a call."""
    moved = traffic(op, ranks, algorithm, ranks_per_node)
    return np.asarray(moved.up_hops + moved.out_hops)


def bus_bytes(op: str, size_bytes: ArrayLike, ranks: ArrayLike) -> Array:
    """Return the bytes that nccl-tests counts for the bus bandwidth: size x the op's factor."""
    known_op(op)
    n = np.asarray(ranks, dtype=np.float64)
    return np.asarray(np.asarray(size_bytes, dtype=np.float64) * BUS_FACTORS[op](n))


def bus_bytes_per_s(op: str, size_bytes: ArrayLike, ranks: ArrayLike, seconds: ArrayLike) -> Array:
    """Return nccl-tests' bus bandwidth; 0 where nothing is moved."""
    moved = bus_bytes(op, size_bytes, ranks)
    moved, time = np.broadcast_arrays(moved, np.asarray(seconds, dtype=np.float64))
    return np.asarray(np.divide(moved, time, out=np.zeros(moved.shape), where=moved > 0))

"""Seconds and bytes of collectives: closed forms over arrays of sizes and groups.

Sizes follow nccl-tests: the per-rank buffer for all_reduce, all_to_all, broadcast and send_recv,
the full gathered buffer for all_gather and reduce_scatter. With n ranks on k nodes, m = n / k of
them in each, an `Algorithm` gives the `Traffic` of a call of S bytes:

    T = base + hops_up a_up + hops_out a_out + (S f_up / B_up  (+) S f_out / B_out)

a, B: latency and bandwidth of the links inside a node and between nodes; f: bytes sent by the
busiest rank over either, as a share of S; (+): the greater where the algorithm pipelines over both
links, the sum where it uses them in turn (alpha-beta model: Hockney 1994; algorithms: Thakur,
Rabenseifner and Gropp 2005; double tree: Sanders, Speck and Traeff 2009; base and hop latencies as
in NCCL's tuning model). Reduction arithmetic is not counted. A group of one costs exactly 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hwmodels.hardware import Link
from simcore.errors import InputError, unknown

Array = NDArray[np.float64]

# op -> bus bytes per byte of size for n ranks (nccl-tests, doc/PERFORMANCE.md).
BUS_FACTORS: dict[str, Callable[[Array], Array]] = {
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "all_gather": lambda n: (n - 1) / n,
    "reduce_scatter": lambda n: (n - 1) / n,
    "all_to_all": lambda n: (n - 1) / n,
    "broadcast": lambda n: np.where(n > 1, 1.0, 0.0),
    "send_recv": lambda n: np.where(n > 1, 1.0, 0.0),
}


@dataclass(frozen=True, slots=True)
class Traffic:
    """What one call does, as arrays over groups: messages in a row and bytes sent per byte of size.

    ``up`` is inside a node, ``out`` between nodes; the bytes are those of the busiest rank.
    """

    up_hops: Array
    out_hops: Array
    up_share: Array
    out_share: Array


# (n ranks, m of them per node, k nodes) -> traffic
Shape = Callable[[Array, Array, Array], Traffic]


@dataclass(frozen=True, slots=True)
class Algorithm:
    """How a collective moves its bytes: one `Traffic` function per op that it can do."""

    name: str
    ops: Mapping[str, Shape]
    serial: bool = False  # True: the links inside and between nodes are used in turn
    power_of_two: bool = False  # needs a power of two of ranks, in whole powers of two per node
    single_peer: bool = False  # talks to one peer at a time


@dataclass(frozen=True, slots=True)
class GroupLayout:
    """A group's place: ``ranks`` members, ``ranks_per_node`` of them sharing a node.

    Both may be arrays. Where ``ranks_per_node`` does not divide ``ranks`` the group is priced as
    ceil(ranks / ranks_per_node) nodes.
    """

    ranks: ArrayLike
    ranks_per_node: ArrayLike
    scale_up: Link
    scale_out: Link


def _log2(n: Array) -> Array:
    """Return ceil(log2 n), exact for whole n."""
    return np.ceil(np.log2(n) - 1e-12)


# -- rings ---------------------------------------------------------------------------------------


def _ring(laps: float) -> Shape:
    """Return the traffic of ``laps`` passes round the ring of n - 1 steps with S / n bytes each.

    m rings run at once, each leaving a node at another rank (NCCL's channels, one per adapter): a
    rank sends S laps (n-1)/n in all, 1/m of it between nodes. A chunk crosses nodes on k of a
    ring's n edges, hence on at most ceil(steps k / n) of its steps.
    """

    def shape(n: Array, m: Array, k: Array) -> Traffic:
        steps, share = laps * (n - 1), laps * (n - 1) / n
        spans = k > 1
        out_hops = np.where(spans, np.minimum(steps, np.ceil(steps * k / n - 1e-9)), 0.0)
        out = np.where(spans, share / m, 0.0)
        return Traffic(steps - out_hops, out_hops, share - out, out)

    return shape


def _ring_broadcast(n: Array, m: Array, k: Array) -> Traffic:
    """A pipelined chain: n - 1 hops until the last rank has its first bytes, S sent per rank."""
    alone = n <= 1
    out = np.where(k > 1, 1 / m, 0.0)
    return Traffic(n - k, k - 1, np.where(alone, 0.0, 1 - out), out)


# -- trees ---------------------------------------------------------------------------------------


def double_tree_share(n: Array) -> Array:
    """Return the bytes that the busiest rank of a double binary tree sends, all_reduce, over S.

    A rank inside one tree and a leaf of the other sends S/2 (1 + 2) + S/2 = 2 S; two and three
    ranks have shorter trees: 1 and 1.5.
    """
    return np.select([n <= 1, n == 2, n == 3], [0.0, 1.0, 1.5], default=2.0)


def _tree_all_reduce(n: Array, m: Array, k: Array) -> Traffic:
    """Up and down two binary trees, each with half of the bytes, pipelined.

    Over several nodes the trees join one rank per node, another one in each of m channels, and a
    chain joins the ranks of a node (NCCL's tree).
    """
    spans = k > 1
    return Traffic(
        np.where(spans, 2 * (m - 1), 2 * _log2(n)),
        2 * _log2(k),
        np.where(spans, 2 * (m - 1) / m, double_tree_share(n)),
        np.where(spans, double_tree_share(k) / m, 0.0),
    )


def _tree_broadcast(n: Array, m: Array, k: Array) -> Traffic:
    spans = k > 1
    return Traffic(
        np.where(spans, _log2(m), _log2(n)),
        _log2(k),
        np.where(spans, np.where(m > 1, 1.0, 0.0), np.where(n > 1, 1.0, 0.0)),
        np.where(spans, 1 / m, 0.0),
    )


# -- recursive halving and doubling --------------------------------------------------------------


def _halving(passes: int) -> Shape:
    """Return the traffic of recursive halving (or doubling), nearest ranks taking the largest part.

    log2 n exchanges per pass; inside a node S (m-1)/m, between nodes (S/m)(k-1)/k = S (k-1)/n.
    """

    def shape(n: Array, m: Array, k: Array) -> Traffic:
        return Traffic(
            passes * _log2(m), passes * _log2(k), passes * (m - 1) / m, passes * (k - 1) / n
        )

    return shape


def _bruck(n: Array, m: Array, k: Array) -> Traffic:
    """log2 n exchanges of half of the buffer each (Bruck et al. 1997, powers of two)."""
    return Traffic(_log2(m), _log2(k), _log2(m) / 2, _log2(k) / 2)


# -- direct exchanges ----------------------------------------------------------------------------


def _direct(peers: Callable[[Array, Array], Array], rounds: int = 1) -> Shape:
    """Return the traffic of ``rounds`` in which every rank sends to all n - 1 others at once.

    ``peers(n, count)`` gives the bytes to ``count`` peers over S.
    """

    def shape(n: Array, m: Array, k: Array) -> Traffic:
        spans = k > 1
        return Traffic(
            np.where(~spans & (n > 1), float(rounds), 0.0),
            np.where(spans, float(rounds), 0.0),
            rounds * peers(n, m - 1),
            rounds * peers(n, n - m),
        )

    return shape


def _pairwise(n: Array, m: Array, k: Array) -> Traffic:
    """n - 1 rounds, in each of which every rank exchanges S / n with another one."""
    return Traffic(m - 1, n - m, (m - 1) / n, (n - m) / n)


def _send(n: Array, m: Array, k: Array) -> Traffic:
    """One message of S bytes to one peer, between nodes where the group spans them."""
    pair = np.where(n > 1, 1.0, 0.0)
    out = np.where(k > 1, pair, 0.0)
    return Traffic(pair - out, out, pair - out, out)


# -- hierarchical --------------------------------------------------------------------------------


def _hierarchical_all_reduce(tree: bool) -> Shape:
    """Return: reduce_scatter in the node, all_reduce of S/m between nodes, all_gather in the node.

    Between nodes a ring, 2 (k-1)/k S/m, or a double tree.
    """

    def shape(n: Array, m: Array, k: Array) -> Traffic:
        out = double_tree_share(k) if tree else 2 * (k - 1) / k
        return Traffic(2 * (m - 1), 2 * (_log2(k) if tree else k - 1), 2 * (m - 1) / m, out / m)

    return shape


def _hierarchical_gather(n: Array, m: Array, k: Array) -> Traffic:
    """S/n shards round the k nodes, then S/m bundles round the node (or the reverse)."""
    return Traffic(m - 1, k - 1, (m - 1) / m, (k - 1) / n)


def _hierarchical_all_to_all(n: Array, m: Array, k: Array) -> Traffic:
    """Exchange inside the node by destination's local index, then between equal local indices."""
    return Traffic(np.where(m > 1, 1.0, 0.0), np.where(k > 1, 1.0, 0.0), (m - 1) / m, (k - 1) / k)


def _hierarchical_broadcast(n: Array, m: Array, k: Array) -> Traffic:
    """Scatter in the root's node, m chains between nodes, all_gather in every node."""
    return Traffic(2 * (m - 1), k - 1, 2 * (m - 1) / m, np.where(k > 1, 1 / m, 0.0))


def _shard(n: Array, count: Array) -> Array:
    return count / n


def _whole(n: Array, count: Array) -> Array:
    return count


ALGORITHMS: dict[str, Algorithm] = {
    algorithm.name: algorithm
    for algorithm in (
        Algorithm(
            "ring",
            {
                "all_reduce": _ring(2),
                "all_gather": _ring(1),
                "reduce_scatter": _ring(1),
                "broadcast": _ring_broadcast,
            },
        ),
        Algorithm("tree", {"all_reduce": _tree_all_reduce, "broadcast": _tree_broadcast}),
        Algorithm(
            "halving-doubling",
            {
                "all_reduce": _halving(2),
                "all_gather": _halving(1),
                "reduce_scatter": _halving(1),
                "all_to_all": _bruck,
            },
            serial=True,
            power_of_two=True,
            single_peer=True,
        ),
        Algorithm(
            "direct",
            {
                "all_reduce": _direct(_whole),
                "all_gather": _direct(_shard),
                "reduce_scatter": _direct(_shard),
                "all_to_all": _direct(_shard),
                "broadcast": _direct(_whole),
            },
        ),
        Algorithm("two-shot", {"all_reduce": _direct(_shard, rounds=2)}),
        Algorithm("pairwise", {"all_to_all": _pairwise}, serial=True, single_peer=True),
        Algorithm("point-to-point", {"send_recv": _send}, single_peer=True),
        Algorithm(
            "hierarchical",
            {
                "all_reduce": _hierarchical_all_reduce(tree=False),
                "all_gather": _hierarchical_gather,
                "reduce_scatter": _hierarchical_gather,
                "all_to_all": _hierarchical_all_to_all,
                "broadcast": _hierarchical_broadcast,
            },
            serial=True,
        ),
        Algorithm(
            "hierarchical-tree", {"all_reduce": _hierarchical_all_reduce(tree=True)}, serial=True
        ),
    )
}

# What a library picks from, per op, where the algorithm is given as the library's name.
# NCCL sends all_to_all to every peer in one group call (docs: point-to-point communication).
LIBRARIES: dict[str, dict[str, tuple[str, ...]]] = {
    "auto": {op: tuple(n for n, a in ALGORITHMS.items() if op in a.ops) for op in BUS_FACTORS},
    "nccl": {
        "all_reduce": ("ring", "tree"),
        "all_gather": ("ring",),
        "reduce_scatter": ("ring",),
        "broadcast": ("ring",),
        "all_to_all": ("direct",),
        "send_recv": ("point-to-point",),
    },
    "one-shot": {
        "all_reduce": ("direct", "two-shot"),
        "all_gather": ("direct",),
        "reduce_scatter": ("direct",),
        "broadcast": ("direct",),
        "all_to_all": ("direct",),
        "send_recv": ("point-to-point",),
    },
}


def algorithms_for(op: str, algorithm: str = "auto") -> tuple[str, ...]:
    """Return the names of the algorithms that ``algorithm`` allows for ``op``.

    ``algorithm`` is an algorithm or a set of them (a key of `LIBRARIES`, "auto" being all).
    """
    if op not in BUS_FACTORS:
        raise unknown("collective", op, BUS_FACTORS)
    if algorithm not in ALGORITHMS and algorithm not in LIBRARIES:
        raise unknown("algorithm", algorithm, (*ALGORITHMS, *LIBRARIES))
    if algorithm in LIBRARIES:
        return LIBRARIES[algorithm][op]
    if op not in ALGORITHMS[algorithm].ops:
        can = ", ".join(LIBRARIES["auto"][op])
        raise InputError(f"algorithm {algorithm!r} cannot do {op}: use one of {can}.")
    return (algorithm,)


def _sizes(ranks: ArrayLike, ranks_per_node: ArrayLike | None) -> tuple[Array, Array, Array]:
    """Return n, m and k as arrays that broadcast, checked."""
    n = np.asarray(ranks, dtype=np.float64)
    m = n if ranks_per_node is None else np.asarray(ranks_per_node, dtype=np.float64)
    if n.size and (np.min(n) < 1 or np.min(m) < 1):
        raise InputError("a group needs at least 1 rank, and 1 rank per node.")
    n, m = np.broadcast_arrays(n, np.minimum(m, n))
    return n, m, np.ceil(n / m - 1e-12)


def _feasible(algorithm: Algorithm, n: Array, m: Array) -> NDArray[np.bool_]:
    if not algorithm.power_of_two:
        return np.ones(n.shape, dtype=np.bool_)
    whole = [np.exp2(np.round(np.log2(x))) == x for x in (n, m)]
    return np.asarray(whole[0] & whole[1])


def traffic(
    op: str, ranks: ArrayLike, algorithm: str = "ring", ranks_per_node: ArrayLike | None = None
) -> Traffic:
    """Return hops and bytes per byte of size; without ``ranks_per_node`` the group is one node."""
    (name,) = algorithms_for(op, algorithm)[:1]
    n, m, k = _sizes(ranks, ranks_per_node)
    found = ALGORITHMS[name].ops[op](n, m, k)
    parts = (found.up_hops, found.out_hops, found.up_share, found.out_share)
    return Traffic(*(np.broadcast_to(np.asarray(x, dtype=np.float64), n.shape) for x in parts))


def wire_bytes(
    op: str,
    size_bytes: ArrayLike,
    ranks: ArrayLike,
    algorithm: str = "ring",
    ranks_per_node: ArrayLike | None = None,
) -> Array:
    """Return the bytes that the busiest rank sends, over all links."""
    moved = traffic(op, ranks, algorithm, ranks_per_node)
    return np.asarray(size_bytes, dtype=np.float64) * (moved.up_share + moved.out_share)


def hops(
    op: str, ranks: ArrayLike, algorithm: str = "ring", ranks_per_node: ArrayLike | None = None
) -> Array:
    """Return how many messages follow one another on the longest chain of a call."""
    moved = traffic(op, ranks, algorithm, ranks_per_node)
    return moved.up_hops + moved.out_hops


def bus_bytes(op: str, size_bytes: ArrayLike, ranks: ArrayLike) -> Array:
    """Return the bytes that nccl-tests counts for the bus bandwidth: size x the op's factor."""
    if op not in BUS_FACTORS:
        raise unknown("collective", op, BUS_FACTORS)
    n = np.asarray(ranks, dtype=np.float64)
    return np.asarray(np.asarray(size_bytes, dtype=np.float64) * BUS_FACTORS[op](n))


def bus_bytes_per_s(op: str, size_bytes: ArrayLike, ranks: ArrayLike, seconds: ArrayLike) -> Array:
    """Return nccl-tests' bus bandwidth; 0 where nothing is moved."""
    moved = bus_bytes(op, size_bytes, ranks)
    moved, time = np.broadcast_arrays(moved, np.asarray(seconds, dtype=np.float64))
    return np.asarray(np.divide(moved, time, out=np.zeros(moved.shape), where=moved > 0))


# -- seconds -------------------------------------------------------------------------------------


def _rate(link: Link, algorithm: Algorithm, op: str, members: Array) -> Array:
    """Return the payload bandwidth of a rank's port: wires to ``members - 1`` peers of a mesh.

    A link that is not duplex halves it where ranks send and receive at once.
    """
    peers = np.ones_like(members) if algorithm.single_peer else np.maximum(members - 1, 1)
    rate = np.minimum(link.bytes_per_s, peers * link.peer_rate_bytes_per_s)
    share = 1.0 if link.duplex or op == "send_recv" else 0.5
    return np.asarray(rate * link.efficiency * share)


def _algorithm_seconds(
    algorithm: Algorithm, op: str, size: Array, group: GroupLayout, efficiency: Array
) -> Array:
    """Return T of the module's formula; infinite where the algorithm cannot run."""
    n, m, k = _sizes(group.ranks, group.ranks_per_node)
    moved = algorithm.ops[op](n, m, k)
    up, out = group.scale_up, group.scale_out
    latency = moved.up_hops * up.latency_s + moved.out_hops * out.latency_s
    base = np.where(k > 1, max(up.base_s, out.base_s), up.base_s)
    up_s = size * moved.up_share / (_rate(up, algorithm, op, m) * efficiency)
    out_s = size * moved.out_share / (_rate(out, algorithm, op, k) * efficiency)
    transfer = up_s + out_s if algorithm.serial else np.maximum(up_s, out_s)
    seconds = np.where(n > 1, base + latency + transfer, 0.0)
    return np.where(_feasible(algorithm, n, m), seconds, np.inf)


def collective_seconds(
    op: str,
    size_bytes: ArrayLike,
    group: GroupLayout,
    algorithm: str = "auto",
    efficiency: ArrayLike = 1.0,
    fit: CollectiveFit | None = None,
) -> Array:
    """Return the seconds of the fastest algorithm that ``algorithm`` allows, as an array.

    ``size_bytes`` (nccl-tests' convention), the group's sizes and ``efficiency`` (a further share
    of the links' bandwidth) broadcast. Where ``fit`` knows the op and the group size, for groups
    inside one node, its measured seconds come instead.
    """
    return choose(op, size_bytes, group, algorithm, efficiency, fit)[0]


def choose(
    op: str,
    size_bytes: ArrayLike,
    group: GroupLayout,
    algorithm: str = "auto",
    efficiency: ArrayLike = 1.0,
    fit: CollectiveFit | None = None,
) -> tuple[Array, NDArray[np.str_]]:
    """Return the seconds and the name of the algorithm behind them ("measured": from ``fit``)."""
    names = algorithms_for(op, algorithm)
    size, share = np.broadcast_arrays(
        np.asarray(size_bytes, dtype=np.float64), np.asarray(efficiency, dtype=np.float64)
    )
    each = [_algorithm_seconds(ALGORITHMS[name], op, size, group, share) for name in names]
    if np.any(np.all(np.isinf(each), axis=0)):
        raise InputError(
            f"algorithm {algorithm!r} needs a power of two of ranks: use 'auto' or another one."
        )
    stacked = np.stack(np.broadcast_arrays(*each))
    best = np.argmin(stacked, axis=0)
    seconds, chosen = np.min(stacked, axis=0), np.asarray(names)[best]
    if fit is None:
        return seconds, chosen
    n, _, k = _sizes(group.ranks, group.ranks_per_node)
    measured = np.where(k > 1, np.nan, fit_seconds(fit, op, size, n))
    known = ~np.isnan(measured)
    return np.where(known, measured, seconds), np.where(known, "measured", chosen)


# -- measured collectives ------------------------------------------------------------------------

FitKey = tuple[str, int]


@dataclass(frozen=True, slots=True)
class CollectiveFit:
    """Measured collectives of one machine, keyed by (op, ranks).

    ``points``: rising (bytes, seconds) pairs, interpolated linearly in their logarithms.
    ``coefficients``: (alpha in s, beta in s per byte), t = alpha + beta x bus bytes.
    Points come first where both are given.
    """

    points: Mapping[FitKey, tuple[tuple[float, float], ...]] = field(default_factory=dict)
    coefficients: Mapping[FitKey, tuple[float, float]] = field(default_factory=dict)


def read_fit(rows: Iterable[Mapping[str, Any]], where: str = "collectives") -> CollectiveFit:
    """Return the fit of a profile's rows.

    A row holds ``op``, ``ranks`` and either ``points`` ([[bytes, seconds], ...]) or ``alpha_s``
    and ``beta_s_per_byte``.
    """
    points: dict[FitKey, tuple[tuple[float, float], ...]] = {}
    lines: dict[FitKey, tuple[float, float]] = {}
    for number, row in enumerate(rows):
        spot = f"{where}[{number}]"
        try:
            key = (str(row["op"]), int(row["ranks"]))
            if "points" in row:
                points[key] = _points(row["points"], spot)
            else:
                lines[key] = (float(row["alpha_s"]), float(row["beta_s_per_byte"]))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{spot}: {error!r}: give op, ranks and either points = [[bytes, seconds], ...] "
                "or alpha_s and beta_s_per_byte."
            ) from None
        if key[0] not in BUS_FACTORS:
            raise InputError(f"{spot}: {unknown('collective', key[0], BUS_FACTORS)}")
    return CollectiveFit(points, lines)


def _points(rows: Iterable[Iterable[float]], where: str) -> tuple[tuple[float, float], ...]:
    found = tuple((float(size), float(seconds)) for size, seconds in rows)
    sizes = [size for size, _ in found]
    if not found or sizes != sorted(set(sizes)) or min(min(pair) for pair in found) <= 0:
        raise InputError(f"{where}: points must be above 0 and sorted by rising bytes.")
    return found


def fit_seconds(fit: CollectiveFit, op: str, size_bytes: ArrayLike, ranks: ArrayLike) -> Array:
    """Return the measured seconds, NaN where the fit does not know (op, ranks), 0 for one rank.

    Below the first point its seconds hold; beyond the last its bandwidth does.
    """
    size, n = np.broadcast_arrays(
        np.asarray(size_bytes, dtype=np.float64), np.asarray(ranks, dtype=np.float64)
    )
    found = np.where(n <= 1, 0.0, np.nan)
    for count in np.unique(n[n > 1]):
        key, here = (op, int(count)), n == count
        if key in fit.points:
            found[here] = _interpolate(np.asarray(fit.points[key]), size[here])
        elif key in fit.coefficients:
            alpha, beta = fit.coefficients[key]
            found[here] = alpha + beta * bus_bytes(op, size[here], count)
    return found


def _interpolate(points: Array, size: Array) -> Array:
    """Return seconds at ``size``: log-log between points, flat below, same bandwidth above."""
    sizes, seconds = points[:, 0], points[:, 1]
    inside = np.clip(size, sizes[0], sizes[-1])
    between = np.exp(np.interp(np.log(inside), np.log(sizes), np.log(seconds)))
    return np.asarray(between * np.maximum(size / sizes[-1], 1.0))

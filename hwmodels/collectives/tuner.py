"""Seconds of a collective: every algorithm that a library may take is priced, the fastest wins.

A closed form of the registry costs, with the link's own constants,

    T = base + hops_up a_up + hops_out a_out + (S f_up / B_up  (+) S f_out / B_out)

(+): the greater where the algorithm pipelines over both links, the sum where it uses them in turn.
NCCL's candidates follow `hwmodels.collectives.nccl`. Reduction arithmetic is not counted. A group
of one costs exactly 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hwmodels.collectives.algorithms import (
    ALGORITHMS,
    LIBRARIES,
    Algorithm,
    algorithm_of,
    feasible,
    known_op,
    sizes,
)
from hwmodels.collectives.measured import CollectiveFit, fit_seconds
from hwmodels.collectives.nccl import (
    CANDIDATES,
    Ports,
    call_seconds,
    candidates,
    library_on,
    offered,
    on_link,
)
from hwmodels.collectives.traffic import Array, Traffic
from hwmodels.hardware import Link
from simcore.errors import InputError, unknown


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


def algorithms_for(op: str, algorithm: str = "auto", link: str = "") -> tuple[str, ...]:
    """Return the names of what ``algorithm`` allows for ``op`` on the link called ``link``.

    ``algorithm``: one of `ALGORITHMS` or `CANDIDATES`, a library ("nccl" or a key of `LIBRARIES`),
    or "auto": NCCL on the links that it was fitted for, closed forms elsewhere.
    """
    known_op(op)
    if algorithm == "auto":
        algorithm = "closed-form" if on_link(link) is None else "nccl"
    if algorithm == "nccl":
        return candidates(op)
    if algorithm in LIBRARIES:
        return LIBRARIES[algorithm][op]
    if algorithm in CANDIDATES:
        if algorithm not in candidates(op):
            can = ", ".join(candidates(op))
            raise InputError(f"algorithm {algorithm!r} cannot do {op}: use one of {can}.")
        return (algorithm,)
    if algorithm not in ALGORITHMS:
        raise unknown("algorithm", algorithm, (*ALGORITHMS, *CANDIDATES, *LIBRARIES, "nccl"))
    return (algorithm_of(op, algorithm).name,)


def rate(link: Link, members: Array, single_peer: bool = False, one_way: bool = False) -> Array:
    """Return the payload bandwidth of a rank's port: wires to ``members - 1`` peers of a mesh.

    A link that is not duplex halves it where ranks send and receive at once.
    """
    peers = np.ones_like(members) if single_peer else np.maximum(members - 1, 1)
    found = np.minimum(link.bytes_per_s, peers * link.peer_rate_bytes_per_s)
    share = 1.0 if link.duplex or one_way else 0.5
    return np.asarray(found * link.efficiency * share)


def moved_seconds(
    name: str,
    size: Array,
    moved: Traffic,
    group: GroupLayout,
    efficiency: Array,
    one_way: bool = False,
    dtype: str = "bf16",
) -> Array:
    """Return the seconds of ``moved`` under the algorithm or candidate called ``name``.

    Infinite where it cannot run. ``one_way``: no rank sends and receives at once.
    """
    n, m, k = sizes(group.ranks, group.ranks_per_node)
    up, out = group.scale_up, group.scale_out
    candidate = CANDIDATES.get(name)
    algorithm = ALGORITHMS[candidate.algorithm if candidate else name]
    up_rate = rate(up, m, algorithm.single_peer, one_way) * efficiency
    out_rate = rate(out, k, algorithm.single_peer, one_way) * efficiency
    if candidate is None:
        return _closed_form(algorithm, size, moved, group, up_rate, out_rate)
    library = library_on(up.name)
    if not offered(candidate, library, dtype):
        return np.full(np.broadcast(size, n).shape, np.inf)
    ports = Ports(up_rate, out_rate, up.latency_s, out.latency_s)
    seconds = call_seconds(candidate, library, size, moved, m, ports)
    ruled_out = (k <= 1) & candidate.spans_only | (algorithm.in_switch & (m <= 2))
    return np.where(n > 1, np.where(ruled_out, np.inf, seconds), 0.0)


def _closed_form(
    algorithm: Algorithm, size: Array, moved: Traffic, group: GroupLayout, up: Array, out: Array
) -> Array:
    n, m, k = sizes(group.ranks, group.ranks_per_node)
    latency = moved.up_hops * group.scale_up.latency_s + moved.out_hops * group.scale_out.latency_s
    call = np.where(
        k > 1, max(group.scale_up.base_s, group.scale_out.base_s), group.scale_up.base_s
    )
    up_s, out_s = size * moved.up_share / up, size * moved.out_share / out
    transfer = up_s + out_s if algorithm.serial else np.maximum(up_s, out_s)
    seconds = np.where(n > 1, call + latency + transfer, 0.0)
    return np.where(feasible(algorithm, n, m), seconds, np.inf)


def collective_seconds(
    op: str,
    size_bytes: ArrayLike,
    group: GroupLayout,
    algorithm: str = "auto",
    efficiency: ArrayLike = 1.0,
    fit: CollectiveFit | None = None,
    dtype: str = "bf16",
) -> Array:
    """Return the seconds of the fastest algorithm that ``algorithm`` allows, as an array.

    ``size_bytes`` (nccl-tests' convention), the group's sizes and ``efficiency`` (a further share
    of the links' bandwidth) broadcast. Where ``fit`` knows the op and the group size, for groups
    inside one node, its measured seconds come instead.
    """
    return choose(op, size_bytes, group, algorithm, efficiency, fit, dtype)[0]


def choose(
    op: str,
    size_bytes: ArrayLike,
    group: GroupLayout,
    algorithm: str = "auto",
    efficiency: ArrayLike = 1.0,
    fit: CollectiveFit | None = None,
    dtype: str = "bf16",
) -> tuple[Array, NDArray[np.str_]]:
    """Return the seconds and the name of the algorithm behind them ("measured": from ``fit``)."""
    names = algorithms_for(op, algorithm, group.scale_up.name)
    size, share = np.broadcast_arrays(
        np.asarray(size_bytes, dtype=np.float64), np.asarray(efficiency, dtype=np.float64)
    )
    n, m, k = sizes(group.ranks, group.ranks_per_node)
    seconds = np.full(np.broadcast(size, n).shape, np.inf)
    chosen = np.zeros(seconds.shape, dtype=np.intp)
    for index, name in enumerate(names):
        shape = CANDIDATES[name].algorithm if name in CANDIDATES else name
        moved = ALGORITHMS[shape].ops[op](n, m, k)
        one_way = op == "send_recv"
        found = moved_seconds(name, size, moved, group, share, one_way, dtype)
        chosen = np.where(found < seconds, index, chosen)
        seconds = np.minimum(found, seconds)
    if np.any(np.isinf(seconds)):
        raise InputError(
            f"algorithm {algorithm!r} cannot run {op} of {dtype} on this group: "
            f"use 'auto', or another algorithm (some need a power of two of ranks)."
        )
    return _measured_first(op, size, n, k, seconds, np.asarray(names)[chosen], fit)


def _measured_first(
    op: str,
    size: Array,
    n: Array,
    k: Array,
    seconds: Array,
    chosen: NDArray[np.str_],
    fit: CollectiveFit | None,
) -> tuple[Array, NDArray[np.str_]]:
    if fit is None:
        return seconds, chosen
    measured = np.where(k > 1, np.nan, fit_seconds(fit, op, size, n))
    known = ~np.isnan(measured)
    return np.where(known, measured, seconds), np.where(known, "measured", chosen)

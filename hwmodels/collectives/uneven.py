"""Collectives of unequal members: who sends how much to whom, and the busiest rank's seconds."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hwmodels.collectives.algorithms import sizes
from hwmodels.collectives.nccl import CANDIDATES
from hwmodels.collectives.traffic import Array, Traffic
from hwmodels.collectives.tuner import GroupLayout, algorithms_for, moved_seconds
from simcore.errors import InputError

Mask = NDArray[np.bool_]


def gather_matrix(members_bytes: ArrayLike) -> Array:
    """Return who sends what to whom in an all_gather of unequal parts: [i, j] = part i."""
    parts = np.asarray(members_bytes, dtype=np.float64)
    return np.where(np.eye(len(parts), dtype=np.bool_), 0.0, parts[:, None])


def scatter_matrix(members_bytes: ArrayLike) -> Array:
    """Return who sends what to whom in a reduce_scatter of unequal parts: [i, j] = part j."""
    return gather_matrix(members_bytes).T


def busiest_bytes(matrix: ArrayLike, duplex: bool = True) -> float:
    """Return the bytes of the busiest port in its busier direction.

    ``matrix``: [n, n] bytes from rank i to rank j; the diagonal stays where it is. A port that is
    not duplex has half its rate for either direction, hence carries the mean of both.
    """
    moved = _without_diagonal(matrix)
    sent, received = moved.sum(axis=1), moved.sum(axis=0)
    return float(np.max(np.maximum(sent, received) if duplex else (sent + received) / 2))


def matrix_seconds(matrix: ArrayLike, group: GroupLayout, algorithm: str = "auto") -> float:
    """Return the seconds of an all_to_all by a traffic matrix: [n, n] bytes from rank i to rank j.

    Ranks lie in node order. All messages are posted at once, by sends or by direct copies; the
    busiest port and the largest message decide. With equal messages of S / n this is all_to_all of
    S. Raises `InputError` for a matrix that does not fit the group, or another algorithm.
    """
    n, m, _ = sizes(group.ranks, group.ranks_per_node)
    moved = _without_diagonal(matrix)
    if len(moved) != int(n):
        raise InputError(f"a traffic matrix of {len(moved)} ranks meets a group of {int(n)}.")
    if not moved.any():
        return 0.0
    node = np.arange(len(moved)) // int(m)
    near = node[:, None] == node[None, :]
    own = float(np.max(np.diag(np.asarray(matrix, dtype=np.float64))))
    one, found = np.asarray(1.0), {}
    for name in algorithms_for("all_to_all", algorithm, group.scale_up.name):
        shape = CANDIDATES[name].algorithm if name in CANDIDATES else name
        if shape in ("grouped-sends", "direct"):
            traffic = _traffic(moved, near, own, shape == "direct", group)
            found[name] = float(moved_seconds(name, one, traffic, group, one))
    if not found:
        raise InputError(
            f"algorithm {algorithm!r} takes no traffic matrix: use 'auto', 'nccl' or 'direct'."
        )
    return min(found.values())


def _traffic(moved: Array, near: Mask, own: float, at_once: bool, group: GroupLayout) -> Traffic:
    """Return the bytes, not shares, of the busiest ranks, and the messages that they start."""
    inside, across = np.where(near, moved, 0.0), np.where(near, 0.0, moved)
    near_hops, far_hops = (float(np.max((part > 0).sum(axis=1))) for part in (inside, across))
    if at_once:
        near_hops, far_hops = float(not across.any()), float(across.any())
    up = busiest_bytes(inside, group.scale_up.duplex)
    out = busiest_bytes(across, group.scale_out.duplex)
    return Traffic(near_hops, far_hops, up, out, own, float(np.max(moved)), 1.0)


def _without_diagonal(matrix: ArrayLike) -> Array:
    found = np.asarray(matrix, dtype=np.float64)
    if found.ndim != 2 or found.shape[0] != found.shape[1] or not len(found) or np.min(found) < 0:
        raise InputError("a traffic matrix is square, [from, to], with bytes of 0 or above.")
    return np.where(np.eye(len(found), dtype=np.bool_), 0.0, found)

"""Lengths of a step's sequences: drawn from a law, and rounded up to a few classes."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from simcore.errors import InputError

Lengths = NDArray[np.int64]
CANDIDATES = 400  # distinct lengths among which classes are chosen


def lognormal_lengths(
    count: int, median: float, sigma: float, longest: int, seed: int = 0
) -> Lengths:
    """Return ``count`` lengths in tokens from a log-normal law, at least 1 and at most longest."""
    if not (count > 0 and median > 0 and sigma >= 0 and longest > 0):
        raise InputError("lengths need count, median and longest above 0, and sigma of 0 or more.")
    drawn = np.random.default_rng(seed).lognormal(math.log(median), sigma, count)
    return np.clip(np.ceil(drawn), 1, longest).astype(np.int64)


def length_classes(lengths: Lengths, classes: int, unit: int = 1) -> Lengths:
    """Return every length rounded up to one of at most ``classes`` lengths, multiples of ``unit``.

    The classes are those that pad least (FlexSP, Wang et al. 2025, section 4.1.3, also finds them
    by dynamic programming). Of more than `CANDIDATES` distinct lengths as many are considered.
    """
    whole = -(-np.asarray(lengths, dtype=np.int64) // unit) * unit
    distinct, counts = np.unique(whole, return_counts=True)
    if distinct.size <= classes:
        return whole
    if distinct.size > CANDIDATES:
        kept = np.unique(np.linspace(0, distinct.size - 1, CANDIDATES).round().astype(np.int64))
        counts = np.add.reduceat(counts, np.concatenate(([0], kept[:-1] + 1)))
        distinct = distinct[kept]
    edges = distinct[_least_padding(distinct, counts, classes)]
    found: Lengths = edges[np.searchsorted(edges, whole)]
    return found


def _least_padding(distinct: Lengths, counts: Lengths, classes: int) -> Lengths:
    """Return which of ascending lengths make the classes with the fewest padded tokens.

    best(c, j) = min over i < j of best(c - 1, i) + length_j x (sequences longer than length_i, up
    to length_j): all up to j in c classes, j the longest.
    """
    total = np.concatenate(([0], np.cumsum(counts)))
    last = distinct * (total[1:, None] - total[None, :-1]).T  # (first of the class, its longest)
    cost = np.where(np.tri(distinct.size, k=-1, dtype=bool), np.inf, last)
    best, cut = cost[0].copy(), []
    for _ in range(classes - 1):
        whole = np.concatenate(([np.inf], best[:-1]))[:, None] + cost
        cut.append(whole.argmin(0))
        best = whole.min(0)
    edges = [distinct.size - 1]
    for choice in reversed(cut):
        edges.append(int(choice[edges[-1]]) - 1)
    return np.array(edges[::-1])

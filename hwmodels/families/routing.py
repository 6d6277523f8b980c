"""Which experts the rows of a layer visit, and what the busiest rank gets of them.

Two laws of routing, those of the public kernel tables that the project calibrates on
(ai-dynamo/aiconfigurator, collector/helper.py, Apache-2.0):

- balanced (alpha 0): rows are dealt evenly, so that T rows of k experts each touch
  min(E, T k) experts, and a rank of L experts gets the ceiling of its share.
- power law (alpha > 0): every expert draws a popularity from the density x^-alpha, cut off at
  1 <= x <= 0.8 T (at 0.01 <= x <= 2 while T k <= E), by its quantile function

      Q(u) = (lo^(1-alpha) + u (hi^(1-alpha) - lo^(1-alpha)))^(1/(1-alpha)).                  (1)

  Expert e gets n_e = T k x_e / sum(x) rows, at most T (a row visits an expert once). What
  exceeds T fills up the least visited experts, to a common level. Rows are whole: n_e is rounded,
  and rows lost in rounding go to experts without rows, in turn over the ranks.

The busiest rank is the one of the ep groups of E / ep experts with the most rows. Its load has no
closed form, so that it is averaged over draws of (1) from a fixed seed, on a grid of T (powers of
two), linear in T between.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

TILES = (16, 32, 64, 128)  # rows of a tile: the sizes that grouped products are built with
_POWERS = 23  # the grid of tokens is 1, 2, 4 ... 2^22; beyond, loads grow in proportion
_GRID = 2.0 ** np.arange(_POWERS)
_DRAWS = 48


@dataclass(frozen=True, slots=True)
class RankLoad:
    """What the busiest rank gets: ``rows``, ``touched`` experts, ``tiles`` per size in `TILES`.

    ``crowded``: experts (of one row each) that it would touch besides, if all rows that rounding
    leaves over fell on this one rank. All are expectations; arrays of one shape.
    """

    rows: Array
    touched: Array
    crowded: Array
    tiles: tuple[Array, ...]


def expected_distinct(tokens: Any, experts: Any, top: Any) -> Array:
    """Return the experts that independent rows touch, each choosing ``top`` of them uniformly.

    E (1 - (1 - k / E)^T), the expectation of the size of the union. Arguments broadcast.
    """
    share = np.minimum(1.0, np.asarray(top, dtype=np.float64) / experts)
    return np.asarray(experts * (1.0 - (1.0 - share) ** np.asarray(tokens, dtype=np.float64)))


def expert_rows(tokens: float, experts: int, top: int, ep: int, alpha: float) -> Array:
    """Return the expected rows of each expert of the busiest rank, the most visited first.

    Experts that get less than half a row on average are left out.
    """
    if alpha == 0.0:
        load = busiest_rank(tokens, experts, top, ep, alpha)
        return np.full(int(load.touched), float(load.rows / load.touched))
    loads, short = _busiest(tokens, experts, min(top, experts), ep, alpha)
    mean = np.sort(np.rint(loads), axis=-1)[:, ::-1].mean(axis=0)
    found = mean[mean >= 0.5]
    dealt = min(math.ceil(float(short.mean()) / ep), len(mean) - len(found))
    return np.sort(np.concatenate([found, np.ones(dealt)]))[::-1]


def busiest_rank(tokens: Any, experts: Any, top: Any, ep: Any, alpha: Any) -> RankLoad:
    """Return the load of the busiest of ``ep`` ranks. Arguments broadcast, one load per element."""
    law = [np.asarray(x, dtype=np.float64) for x in (experts, top, ep, alpha)]
    shape = np.broadcast_shapes(np.shape(tokens), *(x.shape for x in law))
    rows = np.broadcast_to(np.asarray(tokens, dtype=np.float64), shape).ravel()
    group, values = _groups(law, shape)
    skewed = values[:, 3] != 0.0
    found = np.empty((3 + len(TILES), rows.size))
    dealt = ~skewed[group]
    found[:, dealt] = _balanced(rows[dealt], *values[group[dealt], :3].T)
    if skewed.any():
        tables = np.stack([_table(*row) if row[3] else _NONE for row in values])
        found[:, ~dealt] = _interpolated(tables, group[~dealt], rows[~dealt])
    touched, crowded, extra, *tiles = (column.reshape(shape) for column in found)
    return RankLoad(touched + extra, touched, crowded, tuple(touched + tile for tile in tiles))


def _groups(law: list[Array], shape: tuple[int, ...]) -> tuple[NDArray[np.int64], Array]:
    """Return which distinct combination of the columns of ``law`` each element has, and those."""
    codes = np.zeros(math.prod(shape), dtype=np.int64)
    for column in law:
        if column.size > 1:
            distinct, inverse = np.unique(column, return_inverse=True)
            spread = np.broadcast_to(inverse.reshape(column.shape), shape).ravel()
            codes = codes * len(distinct) + spread
    _, first, group = np.unique(codes, return_index=True, return_inverse=True)
    flat = [np.broadcast_to(column, shape).ravel()[first] for column in law]
    return group, np.stack(flat, axis=-1)


def _balanced(tokens: Array, experts: Array, top: Array, ep: Array) -> Array:
    """Return the columns of `_table` where rows are dealt evenly."""
    local = np.ceil(experts / ep)
    rows = np.maximum(1.0, np.ceil(tokens * np.minimum(top, experts) * local / experts))
    touched = np.minimum(local, rows)
    tiles = [touched * (np.ceil(rows / touched / m) - 1) for m in TILES]
    return np.stack([touched, np.zeros_like(rows), rows - touched, *tiles])


def _interpolated(tables: Array, group: NDArray[np.int64], tokens: Array) -> Array:
    """Return the columns of each element's table at its tokens, linear between grid points."""
    _, exponent = np.frexp(np.maximum(tokens, 1.0))
    left = np.minimum(exponent - 1, _POWERS - 2)
    share = np.minimum(np.maximum(tokens, 1.0) / _GRID[left] - 1.0, 1.0)
    beyond = np.maximum(1.0, tokens / _GRID[-1])
    found = np.empty((tables.shape[1], tokens.size))
    for column, rows in enumerate(tables.transpose(1, 0, 2)):
        low = rows[group, left]
        found[column] = low + share * (rows[group, left + 1] - low)
        if column >= _SATURATING:
            found[column] *= beyond
    return found


_SATURATING = 2  # the first columns, touched and crowded, do not grow beyond the grid
_NONE = np.zeros((3 + len(TILES), _POWERS))


@lru_cache(maxsize=1024)
def _table(experts: float, top: float, ep: float, alpha: float) -> Array:
    """Return (touched, crowded, rows and tiles beyond the first of each expert) by grid of tokens.

    Each is non-decreasing in the tokens, crowded only together with touched.
    """
    columns = []
    for tokens in _GRID:
        loads, short = _busiest(tokens, int(experts), int(min(top, experts)), int(ep), alpha)
        whole = np.rint(loads)
        idle = (whole == 0).sum(axis=-1)
        dealt = np.minimum(np.ceil(short / ep), idle)  # in turn, to experts without rows
        found = [loads.shape[-1] - idle + dealt, np.minimum(short, idle) - dealt]
        beyond = (np.maximum(0.0, np.ceil(whole / size) - 1) for size in (1, *TILES))
        found += [count.sum(axis=-1) for count in beyond]
        columns.append(np.stack(found).mean(axis=-1))
    table = np.stack(columns, axis=-1)
    table[1] += table[0]
    table = np.maximum.accumulate(table, axis=-1)
    table[1] -= table[0]
    return table


def _busiest(tokens: float, experts: int, top: int, ep: int, alpha: float) -> tuple[Array, Array]:
    """Return rows per expert of the busiest rank [draws, local] and rows lost [draws].

    Rows are not rounded yet; those that rounding loses are counted over the whole layer.
    """
    local = -(-experts // ep)
    few = tokens * top <= experts
    low, high = (0.01, 2.0) if few else (1.0, max(0.8 * tokens, 1.0))
    popularity = _quantile(np.random.default_rng(0).random((_DRAWS, experts)), alpha, low, high)
    shares = popularity / popularity.sum(axis=-1, keepdims=True)
    loads = _levelled(tokens * top * shares, tokens)
    lost = np.maximum(0.0, tokens * top - np.rint(loads).sum(axis=-1))
    ranks = np.pad(loads, ((0, 0), (0, local * ep - experts))).reshape(_DRAWS, ep, local)
    return ranks[np.arange(_DRAWS), ranks.sum(axis=-1).argmax(axis=-1)], lost


def _quantile(u: Array, alpha: float, low: float, high: float) -> Array:
    """Return equation (1); its limit low (high / low)^u where alpha is one."""
    power = 1.0 - alpha
    if abs(power) < 1e-6:
        return np.asarray(low * (high / low) ** u)
    return np.asarray((low**power + u * (high**power - low**power)) ** (1.0 / power))


def _levelled(loads: Array, most: float) -> Array:
    """Return ``loads`` [draws, experts] cut off at ``most``, the rest raising the least loaded."""
    capped = np.minimum(loads, most)
    over = (loads - capped).sum(axis=-1, keepdims=True)
    ranked = np.sort(capped, axis=-1)
    # Level at which the first 1, 2, ... of the ranked experts stand once raised together.
    levels = (np.cumsum(ranked, axis=-1) + over) / np.arange(1, ranked.shape[-1] + 1)
    following = np.concatenate([ranked[:, 1:], np.full((len(ranked), 1), np.inf)], axis=-1)
    level = np.take_along_axis(levels, (levels <= following).argmax(axis=-1)[:, None], axis=-1)
    return np.where(over > 0, np.maximum(capped, np.minimum(level, most)), capped)

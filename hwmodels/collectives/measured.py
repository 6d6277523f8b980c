"""Collectives measured on the machine at hand: points or lines per op and group size."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from hwmodels.collectives.algorithms import BUS_FACTORS, bus_bytes
from hwmodels.collectives.traffic import Array
from simcore.errors import InputError, unknown

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

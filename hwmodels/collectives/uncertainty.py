"""How far a collective's real seconds lie from the predicted: an 80 % interval by op and size.

The data file holds the 10th and 90th percentile of log(measured / predicted) on calls that the fit
had not seen: of other sizes on a generation of links that was measured, of another generation where
the coefficients are borrowed.
"""

from __future__ import annotations

import json
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike

from hwmodels.collectives.nccl import DATA, library_on
from hwmodels.collectives.traffic import Array

# class -> its greatest bytes: latency alone, protocols in turn, bandwidth alone.
SIZE_CLASSES = {"small": 128 * 1024.0, "middle": 32 * 2**20.0, "large": np.inf}
Z80 = 1.2816  # of a normal variable, 80 % lie within so many standard deviations


@lru_cache(maxsize=1)
def _intervals() -> dict[str, dict[str, dict[str, list[float]]]]:
    found: dict[str, dict[str, dict[str, list[float]]]] = json.loads(
        DATA.read_text(encoding="utf-8")
    )["intervals"]
    return found


def interval(op: str, size_bytes: ArrayLike, link: str) -> tuple[Array, Array]:
    """Return what seconds on the link called ``link`` are to be multiplied with: (low, high).

    Eight calls in ten should lie between. An op that was not measured has the interval of all ops.
    """
    library = library_on(link)
    by_op = _intervals()["measured" if library.fitted else "borrowed"]
    rows = by_op.get(op, by_op["any"])
    size = np.asarray(size_bytes, dtype=np.float64)
    place = np.searchsorted(list(SIZE_CLASSES.values()), size)
    edges = np.exp(np.array([rows[name] for name in SIZE_CLASSES]))
    return edges[place, 0], edges[place, 1]


def deviation(op: str, size_bytes: ArrayLike, link: str) -> Array:
    """Return the standard deviation of log(real / predicted) that the interval stands for."""
    low, high = interval(op, size_bytes, link)
    return np.asarray(np.log(high / low) / (2 * Z80))

"""Scores of predicted seconds against measured ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
PAIRS = 20_000
WORTH = 0.1  # pairs that differ by less are not asked about


@dataclass(frozen=True, slots=True)
class Score:
    """Errors |predicted / measured - 1|: their number, median and 90th percentile."""

    rows: int
    median: float
    p90: float


def score(predicted: Array, measured: Array) -> Score:
    """Return the score of predictions."""
    errors = np.abs(predicted / measured - 1)
    return Score(len(errors), float(np.median(errors)), float(np.quantile(errors, 0.9)))


def pair_order(predicted: Array, measured: Array, seed: int = 0) -> float:
    """Return the share of pairs ordered right, of those that differ by over 10 % when measured.

    At most `PAIRS` random pairs are looked at; NaN where none differs.
    """
    draw = np.random.default_rng(seed)
    a, b = draw.integers(0, len(measured), (2, PAIRS))
    apart = np.abs(np.log(measured[a] / measured[b])) > np.log(1 + WORTH)
    right = (predicted[a] > predicted[b]) == (measured[a] > measured[b])
    return float(np.mean(right[apart])) if apart.any() else float("nan")


def coverage(predicted: Array, measured: Array, deviation: Array | float, z: float) -> float:
    """Return the share of measurements within ``z`` deviations of the log of their prediction."""
    return float(np.mean(np.abs(np.log(measured / predicted)) <= z * deviation))

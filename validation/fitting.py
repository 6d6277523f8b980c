"""Fits of kernel families to measured samples, robust to outliers, scored on held-out shapes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from hwmodels.catalogue import load_chip
from hwmodels.curves import Curve
from hwmodels.families import FAMILIES
from hwmodels.profile import write_atomically
from simcore.uncertainty import Z_80
from validation.datasets import Array, Sample

# What a held-out shape is: all rows that share these columns are held out together.
GROUPS: dict[str, tuple[str, ...]] = {
    "matmul": ("n", "k"),
    "attention_prefill": ("heads", "kv_heads", "head_dim"),
    "attention_decode": ("heads", "kv_heads", "head_dim"),
    "moe": ("hidden", "ffn", "experts", "experts_per_token"),
    "memory": ("moved_bytes",),
}
Spread = tuple[tuple[float, float], ...]
FOLDS = 3
FEWEST = 60  # rows: a sample with fewer is not fitted
PRIOR = 0.01  # log residual of every row that a coefficient's whole range is worth
ROBUST = 0.15  # log residual beyond which a row counts linearly (soft L1)


def fit_coefficients(family: str, samples: Sequence[Sample]) -> dict[str, float]:
    """Return the coefficients that minimise the soft-L1 loss of log(predicted / measured).

    Each sample weighs the same, however many rows it has. A weak pull holds at its start what the
    samples do not feel.
    """
    model = FAMILIES[family]
    names = list(model.coefficients)
    table = np.array([model.coefficients[name] for name in names])
    low, high = table[:, 1], table[:, 2]
    chips = [load_chip(sample.chip) for sample in samples]
    targets = [np.log(sample.seconds) for sample in samples]
    rows = np.mean([len(sample) for sample in samples])
    weights = [np.sqrt(rows / len(sample)) for sample in samples]

    def residuals(x: Array) -> Array:
        c = dict(zip(names, low + x * (high - low), strict=True))
        parts = [
            weight * (np.log(model.seconds(sample.shape, chip, sample.dtype, c)) - target)
            for sample, chip, target, weight in zip(samples, chips, targets, weights, strict=True)
        ]
        return np.concatenate([*parts, pull * (x - start)])

    pull = PRIOR * np.sqrt(sum(len(sample) for sample in samples))
    start = np.clip((table[:, 0] - low) / (high - low), 1e-3, 1 - 1e-3)
    found = least_squares(
        residuals, start, bounds=(0.0, 1.0), loss="soft_l1", f_scale=ROBUST, diff_step=1e-4
    )
    values = low + found.x * (high - low)
    return {name: float(f"{value:.6g}") for name, value in zip(names, values, strict=True)}


def predict(family: str, sample: Sample, coefficients: dict[str, float]) -> Array:
    """Return the seconds of every row of ``sample``."""
    chip = load_chip(sample.chip)
    return FAMILIES[family].seconds(sample.shape, chip, sample.dtype, coefficients)


def folds(sample: Sample) -> NDArray[np.int64]:
    """Return the fold of every row: rows that share the family's group columns go together."""
    columns = [sample.shape[name] for name in GROUPS[sample.family]]
    keys = [",".join(f"{value:g}" for value in row) for row in zip(*columns, strict=True)]
    number = {k: int(hashlib.sha256(k.encode()).hexdigest()[:8], 16) % FOLDS for k in set(keys)}
    found = np.array([number[key] for key in keys])
    if len(set(found)) < 2:  # too few shapes for a hash to part them
        places = {key: place % FOLDS for place, key in enumerate(sorted(set(keys)))}
        found = np.array([places[key] for key in keys])
    return found


def held_out(sample: Sample) -> Array:
    """Return predictions of every row by the fit that has not seen its fold."""
    fold = folds(sample)
    predicted = np.empty(len(sample))
    for number in np.unique(fold):
        unseen = fold == number
        c = fit_coefficients(sample.family, [sample.take(~unseen)])
        predicted[unseen] = predict(sample.family, sample.take(unseen), c)
    return predicted


BIN = 40  # rows that a deviation is taken over, at least
BINS = 8


def spread_of(predicted: Array, measured: Array) -> Spread:
    """Return rising (predicted seconds, deviation of the log residual) over bins of equal rows.

    The deviation is that of the normal variable with as wide an 80 % interval about zero.
    """
    order = np.argsort(predicted)
    bins = np.array_split(order, min(BINS, max(1, len(order) // BIN)))
    off = np.abs(np.log(measured / predicted))
    return tuple(
        (_four(np.exp(np.mean(np.log(predicted[b])))), _four(np.quantile(off[b], 0.8) / Z_80))
        for b in bins
    )


def _four(value: float) -> float:
    """Return a number with four digits, as files of curves hold them."""
    return float(f"{value:.4g}")


def deviation_of(sample: Sample, predicted: Array) -> Array:
    """Return the standard deviation of log(real / predicted) for every row, from other folds."""
    fold = folds(sample)
    found = np.empty(len(sample))
    for number in np.unique(fold):
        seen, unseen = fold != number, fold == number
        at, deviation = np.array(spread_of(predicted[seen], sample.seconds[seen])).T
        found[unseen] = np.interp(np.log(predicted[unseen]), np.log(at), deviation)
    return found


def fit_samples(samples: Sequence[Sample]) -> list[Curve]:
    """Return a curve for each sample that has enough rows and shapes for its held-out folds."""
    return [
        fit_curve(sample)
        for sample in samples
        if len(sample) >= FEWEST and len(set(folds(sample))) > 1
    ]


def write_curves(path: Path, curves: Sequence[Curve], carried: Mapping[str, float]) -> None:
    """Write curves, and per family their deviation on another generation, as one file."""
    table = {
        "curves": [curve.to_dict() for curve in curves],
        "carried_deviation": dict(carried),
    }
    write_atomically(path, json.dumps(table, indent=1) + "\n")


def fit_curve(sample: Sample) -> Curve:
    """Return the curve of a sample, its spread and errors taken on held-out shapes."""
    predicted = held_out(sample)
    errors = np.abs(predicted / sample.seconds - 1)
    provenance = {
        "source": sample.source,
        "date": datetime.now(UTC).date().isoformat(),
        "rows": len(sample),
        "held_out_median_error": round(float(np.median(errors)), 4),
        "held_out_p90_error": round(float(np.quantile(errors, 0.9)), 4),
    }
    return Curve(
        sample.family,
        sample.chip,
        sample.implementation,
        sample.dtype,
        fit_coefficients(sample.family, [sample]),
        spread_of(predicted, sample.seconds),
        provenance,
    )

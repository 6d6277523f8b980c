"""Fits of kernel families to measured samples, robust to outliers, scored on held-out shapes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from hwmodels.catalogue import load_chip
from hwmodels.curves import Curve
from hwmodels.families import FAMILIES
from validation.datasets import Array, Sample

# What a held-out shape is: all rows that share these columns are held out together.
GROUPS: dict[str, tuple[str, ...]] = {
    "matmul": ("n", "k"),
    "attention_prefill": ("heads", "kv_heads", "head_dim"),
    "attention_decode": ("heads", "kv_heads", "head_dim"),
    "moe": ("hidden", "ffn", "experts", "experts_per_token"),
}
FOLDS = 3
ROBUST = 0.15  # log residual beyond which a row counts linearly (soft L1)


def fit_coefficients(family: str, samples: Sequence[Sample]) -> dict[str, float]:
    """Return the coefficients that minimise the soft-L1 loss of log(predicted / measured).

    Each sample weighs the same, however many rows it has.
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
        return np.concatenate(parts)

    start = np.clip((table[:, 0] - low) / (high - low), 1e-3, 1 - 1e-3)
    found = least_squares(
        residuals, start, bounds=(0.0, 1.0), loss="soft_l1", f_scale=ROBUST, diff_step=1e-4
    )
    values = low + found.x * (high - low)
    return {name: float(value) for name, value in zip(names, values, strict=True)}


def predict(family: str, sample: Sample, coefficients: dict[str, float]) -> Array:
    """Return the seconds of every row of ``sample``."""
    chip = load_chip(sample.chip)
    return FAMILIES[family].seconds(sample.shape, chip, sample.dtype, coefficients)


def folds(sample: Sample) -> NDArray[np.int64]:
    """Return the fold of every row: rows that share the family's group columns go together."""
    columns = [sample.shape[name] for name in GROUPS[sample.family]]
    keys = [",".join(f"{value:g}" for value in row) for row in zip(*columns, strict=True)]
    number = {k: int(hashlib.sha256(k.encode()).hexdigest()[:8], 16) % FOLDS for k in set(keys)}
    return np.array([number[key] for key in keys])


def held_out(sample: Sample) -> Array:
    """Return predictions of every row by the fit that has not seen its fold."""
    fold = folds(sample)
    predicted = np.empty(len(sample))
    for number in np.unique(fold):
        unseen = fold == number
        c = fit_coefficients(sample.family, [sample.take(~unseen)])
        predicted[unseen] = predict(sample.family, sample.take(unseen), c)
    return predicted


def fit_curve(sample: Sample) -> Curve:
    """Return the curve of a sample, its spread and errors taken on held-out shapes."""
    ratio = sample.seconds / held_out(sample)
    errors = np.abs(1 / ratio - 1)
    provenance = {
        "source": sample.source,
        "date": datetime.now(UTC).date().isoformat(),
        "rows": len(sample),
        "held_out_median_error": round(float(np.median(errors)), 4),
        "held_out_p90_error": round(float(np.quantile(errors, 0.9)), 4),
    }
    low, high = np.quantile(ratio, [0.1, 0.9])
    return Curve(
        sample.family,
        sample.chip,
        sample.implementation,
        sample.dtype,
        fit_coefficients(sample.family, [sample]),
        (float(low), float(high)),
        provenance,
    )

"""From measurements to the samples that curves are fitted to, and what a set of them holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from hwmodels.families import FAMILIES
from simcore.errors import InputError
from simcore.measurement import Measurement
from validation.datasets import Sample

Key = tuple[str, str, str, str]


def key(measurement: Measurement) -> Key:
    """Return (subject, chip, implementation, dtype), what curves are fitted by; "" for unknown."""
    shape, machine = measurement.shape, measurement.fingerprint
    chip = machine.get("chip") or machine.get("device") or ""
    return (
        measurement.subject,
        str(chip),
        str(shape.get("implementation", "")),
        str(shape.get("dtype", "")),
    )


def samples(measurements: Iterable[Measurement]) -> list[Sample]:
    """Return one sample per kernel family, chip, library and dtype, medians as its seconds.

    Measurements of other subjects (collectives, serving, training, launches) are left out. Raises
    `InputError` for one that lacks a column of its family, or whose chip is not known.
    """
    groups: dict[Key, list[Measurement]] = {}
    for measurement in measurements:
        if measurement.subject in FAMILIES:
            groups.setdefault(key(measurement), []).append(measurement)
    return [_sample(names, rows) for names, rows in sorted(groups.items())]


def _sample(names: Key, rows: Sequence[Measurement]) -> Sample:
    family, chip, implementation, dtype = names
    if not chip:
        raise InputError(f"{rows[0].source}: its {family} rows do not tell the chip: add it.")
    shape = {name: _column(rows, name, family) for name in FAMILIES[family].columns}
    seconds = np.array([row.median_s for row in rows])
    source = rows[0].source.partition(":")[0].strip().partition(" ")[0]
    return Sample(family, chip, implementation, dtype, shape, seconds, source)


def _column(rows: Sequence[Measurement], name: str, family: str) -> Any:
    for row in rows:
        value = row.shape.get(name)
        if not isinstance(value, int | float):
            raise InputError(
                f"{row.source}: a {family} measurement has {name} = {value!r:.40}, a number is "
                "expected: measure it anew."
            )
    return np.array([float(row.shape[name]) for row in rows])


def summary(measurements: Iterable[Measurement]) -> list[dict[str, Any]]:
    """Return rows that count measurements and samples by subject, chip, library and dtype."""
    counts: Counter[Key] = Counter()
    repeats: Counter[Key] = Counter()
    for measurement in measurements:
        counts[key(measurement)] += 1
        repeats[key(measurement)] += len(measurement.samples_s)
    names = ("subject", "chip", "implementation", "dtype")
    return [
        {
            **dict(zip(names, found, strict=True)),
            "measurements": counts[found],
            "samples": repeats[found],
            "kernel": found[0] in FAMILIES,
        }
        for found in sorted(counts)
    ]

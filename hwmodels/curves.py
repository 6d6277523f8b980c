"""Curves: the fitted coefficients of a kernel family on one chip, by one library, in one dtype."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from hwmodels.families import FAMILIES
from hwmodels.families.family import Array, Shape
from hwmodels.hardware import Chip
from simcore.errors import InputError, unknown

DATA = Path(__file__).parent / "data" / "curves"


@dataclass(frozen=True, slots=True)
class Curve:
    """Coefficients of ``family`` as fitted to ``chip``, ``implementation`` and ``dtype``.

    ``spread``: 10th and 90th percentile of measured over predicted seconds on shapes that were
    held out of the fit. ``provenance``: source, date, rows and held-out errors.
    """

    family: str
    chip: str
    implementation: str
    dtype: str
    coefficients: Mapping[str, float]
    spread: tuple[float, float] = (1.0, 1.0)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def seconds(self, shape: Shape, chip: Chip) -> Array:
        """Return seconds of ``shape`` on ``chip``: the coefficients, with that chip's datasheet."""
        found = FAMILIES[self.family].seconds(shape, chip, self.dtype, self.coefficients)
        return np.asarray(found, dtype=np.float64)

    def to_dict(self) -> dict[str, Any]:
        """Return the curve as plain data."""
        return {**asdict(self), "spread": list(self.spread)}


def read_curve(row: Mapping[str, Any], where: str) -> Curve:
    """Return the curve of a file's row. Raises `InputError` for an ill-formed one."""
    try:
        name = str(row["family"])
        if name not in FAMILIES:
            raise unknown("kernel family", name, FAMILIES)
        coefficients = {str(k): float(v) for k, v in row["coefficients"].items()}
        if set(coefficients) != set(FAMILIES[name].coefficients):
            raise ValueError(f"coefficients must be {', '.join(FAMILIES[name].coefficients)}")
        low, high = (float(x) for x in row["spread"])
        return Curve(
            name,
            str(row["chip"]),
            str(row["implementation"]),
            str(row["dtype"]),
            coefficients,
            (low, high),
            row.get("provenance", {}),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{where}: ill-formed curve ({error}): fit it anew.") from None


@lru_cache(maxsize=1)
def shipped_curves() -> tuple[Curve, ...]:
    """Return the curves that come with the project."""
    found = []
    for path in sorted(DATA.glob("kernels-*.json")):
        rows = json.loads(path.read_text(encoding="utf-8"))["curves"]
        found += [read_curve(row, path.name) for row in rows]
    return tuple(found)

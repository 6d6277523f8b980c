"""What a kernel family is: seconds from a shape, a chip and a few fitted coefficients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hwmodels.hardware import Chip

Array = NDArray[np.float64]
Shape = Mapping[str, Any]  # column -> number or array; all broadcast
Coefficients = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Family:
    """One family of kernels that share a cost formula.

    ``columns``: what `seconds` reads of a shape, with their meaning. ``coefficients``: (start,
    low, high) of each fitted number; they are shares, counts or seconds, never rates, so that what
    was fitted on one chip can be carried to another by its datasheet. ``seconds`` is vectorised
    over the shape; it takes (shape, chip, dtype, coefficients).
    """

    name: str
    columns: Mapping[str, str]
    coefficients: Mapping[str, tuple[float, float, float]]
    seconds: Callable[[Shape, Chip, str, Coefficients], Array]

    def start(self) -> dict[str, float]:
        """Return the coefficients that a fit starts from, typical of a well-tuned library."""
        return {name: start for name, (start, _, _) in self.coefficients.items()}


# Formats without a rate of their own in data sheets: the format whose matrix units they use.
_UNITS = {"fp8_block": "fp8", "mxfp8": "fp8", "int4": "bf16", "int4_wo": "bf16"}


def matrix_peak(chip: Chip, dtype: str) -> float:
    """Return the dense matrix rate in FLOP/s for ``dtype``, the vector rate where there is none."""
    found = chip.peak_flops_per_s.get(_UNITS.get(dtype, dtype))
    return float(found or chip.vector_flops_per_s)

"""What a kernel family is: seconds from a shape, a chip and a few fitted coefficients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
    over the shape; it takes (shape, chip, dtype, coefficients). ``cold``: coefficients of a call
    whose operands have left the caches, where benchmarks find them warm.
    """

    name: str
    columns: Mapping[str, str]
    coefficients: Mapping[str, tuple[float, float, float]]
    seconds: Callable[[Shape, Chip, str, Coefficients], Array]
    cold: Mapping[str, float] = field(default_factory=dict)

    def start(self) -> dict[str, float]:
        """Return the coefficients that a fit starts from, typical of a well-tuned library."""
        return {name: start for name, (start, _, _) in self.coefficients.items()}


# The format whose matrix units a product runs on where the chip has none for the format itself:
# values are converted on their way to the multipliers.
_WIDER = {
    "fp8_block": ("fp8", "bf16", "fp16"),
    "mxfp8": ("fp8", "bf16", "fp16"),
    "nvfp4": ("mxfp4", "fp8", "bf16", "fp16"),
    "mxfp4": ("nvfp4", "fp8", "bf16", "fp16"),
    "fp8": ("bf16", "fp16"),
    "int8": ("fp8", "bf16", "fp16"),
    "int4": ("bf16", "fp16"),
    "int4_wo": ("bf16", "fp16"),
    "int8_wo": ("bf16", "fp16"),
    "fp8_wo": ("bf16", "fp16"),
}


def matrix_peak(chip: Chip, dtype: str) -> float:
    """Return the dense matrix rate in FLOP/s for ``dtype``, the vector rate where there is none.

    A format without units of its own is converted and multiplied in the next wider one.
    """
    if dtype not in chip.peak_flops_per_s:
        for wider in _WIDER.get(dtype, ()):
            if wider in chip.peak_flops_per_s:
                return matrix_peak(chip, wider)
    return float(chip.peak_flops_per_s.get(dtype) or chip.vector_flops_per_s)

"""Writes the curves of kernels that the project ships, from the calibration data.

    python -m validation.accuracy.kernel_files DATA

Each curve stands with its source, the date, its number of rows and its errors on shapes that the
fit had not seen. Samples that are too small to hold shapes out are left.
"""

from __future__ import annotations

import sys
from pathlib import Path

from hwmodels.curves import DATA
from validation.accuracy.kernels import SMALLEST, carried_deviation
from validation.datasets import LAYOUTS, kernel_samples
from validation.fitting import fit_samples, write_curves


def write_kernels(data: Path) -> None:
    """Fit every family to its samples and write the file of curves."""
    curves, carried = [], {}
    for family in LAYOUTS:
        samples = [s for s in kernel_samples(data, family) if len(s) >= SMALLEST]
        curves += fit_samples(samples)
        carried[family] = round(carried_deviation(family, samples), 4)
    write_curves(DATA, curves, carried)


if __name__ == "__main__":
    write_kernels(Path(sys.argv[1]))

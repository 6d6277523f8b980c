"""Dense matrix products: y[m, n] = x[m, k] w[n, k]."""

from __future__ import annotations

import numpy as np

from hwmodels.families.family import Array, Coefficients, Family, Shape, matrix_peak
from hwmodels.hardware import Chip
from simcore.dtypes import dtype_bytes


def _seconds(shape: Shape, chip: Chip, dtype: str, c: Coefficients) -> Array:
    m, n, k = (np.asarray(shape[name], dtype=np.float64) for name in ("m", "n", "k"))
    size = dtype_bytes("fp8" if dtype == "fp8_block" else dtype)
    arithmetic = 2 * m * n * k / (matrix_peak(chip, dtype) * c["peak_share"])
    moved = (m * k + n * k) * size + 2 * m * n
    traffic = moved / (chip.hbm.bytes_per_s * c["bandwidth_share"])
    return np.asarray(c["launch_s"] + np.maximum(arithmetic, traffic))


MATMUL = Family(
    "matmul",
    {"m": "rows", "n": "columns of the result", "k": "length of the sum"},
    {
        "launch_s": (4e-6, 0.0, 5e-5),
        "peak_share": (0.75, 0.2, 1.0),
        "bandwidth_share": (0.8, 0.3, 1.0),
    },
    _seconds,
)

"""A fused layer of gated experts on one rank: gather, two grouped products, combine."""

from __future__ import annotations

import numpy as np

from hwmodels.families.family import Array, Coefficients, Family, Shape, matrix_peak
from hwmodels.hardware import Chip
from simcore.dtypes import dtype_bytes


def _seconds(shape: Shape, chip: Chip, dtype: str, c: Coefficients) -> Array:
    t, hidden, ffn, top, experts, tp, ep = (
        np.asarray(shape[name], dtype=np.float64)
        for name in ("tokens", "hidden", "ffn", "experts_per_token", "experts", "tp", "ep")
    )
    size = {"fp8_block": 1.0, "int4_wo": 0.5}.get(dtype) or dtype_bytes(dtype)
    local = experts / ep
    touched = local * (1 - (1 - top / experts) ** t)
    weights = 3 * hidden * ffn / tp
    arithmetic = 2 * t * top / ep * weights / (matrix_peak(chip, dtype) * c["peak_share"])
    traffic = touched * weights * size / (chip.hbm.bytes_per_s * c["bandwidth_share"])
    return np.asarray(c["launch_s"] + np.maximum(arithmetic, traffic))


MOE = Family(
    "moe",
    {
        "tokens": "rows before routing",
        "hidden": "model width",
        "ffn": "expert width before tp",
        "experts_per_token": "experts chosen per row",
        "experts": "experts of the layer, over all ranks",
        "tp": "ranks that split each expert",
        "ep": "ranks that share out the experts",
        "alpha": "exponent of the power law of expert popularity; 0: balanced",
    },
    {
        "launch_s": (2e-5, 0.0, 2e-4),
        "peak_share": (0.6, 0.1, 1.0),
        "bandwidth_share": (0.7, 0.2, 1.0),
    },
    _seconds,
)

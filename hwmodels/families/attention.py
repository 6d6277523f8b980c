"""Attention with queries from one pass and keys from a cache: prefill and decode."""

from __future__ import annotations

import numpy as np

from hwmodels.families.family import Array, Coefficients, Family, Shape, matrix_peak
from hwmodels.hardware import Chip


def _prefill(shape: Shape, chip: Chip, dtype: str, c: Coefficients) -> Array:
    b, s, kv, h, d = (
        np.asarray(shape[name], dtype=np.float64)
        for name in ("batch", "seq_len", "kv_len", "heads", "head_dim")
    )
    pairs = b * h * s * (kv - (s - 1) / 2)
    arithmetic = 4 * pairs * d / (matrix_peak(chip, dtype) * c["peak_share"])
    moved = b * d * (4 * s * h + 2 * kv * shape["kv_heads"] * shape["kv_bytes"])
    traffic = moved / (chip.hbm.bytes_per_s * c["bandwidth_share"])
    return np.asarray(c["launch_s"] + np.maximum(arithmetic, traffic))


def _decode(shape: Shape, chip: Chip, dtype: str, c: Coefficients) -> Array:
    return _prefill({**shape, "seq_len": 1.0}, chip, dtype, c)


_COLUMNS = {
    "batch": "sequences",
    "kv_len": "keys that the last query sees, new ones included",
    "heads": "query heads on this rank",
    "kv_heads": "key and value heads on this rank",
    "head_dim": "width of a head",
    "window": "keys that a query sees at most; 0: all",
    "kv_bytes": "bytes per element of the cache",
}
_COEFFICIENTS = {
    "launch_s": (4e-6, 0.0, 5e-5),
    "peak_share": (0.6, 0.1, 1.0),
    "bandwidth_share": (0.8, 0.3, 1.0),
}

ATTENTION_PREFILL = Family(
    "attention_prefill", {"seq_len": "new queries, causal", **_COLUMNS}, _COEFFICIENTS, _prefill
)
ATTENTION_DECODE = Family("attention_decode", _COLUMNS, _COEFFICIENTS, _decode)

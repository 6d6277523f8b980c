"""Kernels that wait for memory: norms, activations, embedding, softmax, optimizer, copies.

    T = launch + max(bytes / (B share), vector FLOPs / (V share))            (1)

B: bandwidth of the main memory; V: fp32 rate of the vector units. A working set that fits in half
of the last-level cache is served from there: the other half holds what the neighbours wrote.
The starting shares are what STREAM-like kernels reach on A100 and H100 (BabelStream: 0.85 to 0.93
of the datasheet's bandwidth).
"""

from __future__ import annotations

import numpy as np

from hwmodels.families.family import Array, Coefficients, Family, Shape
from hwmodels.hardware import Chip


def _seconds(shape: Shape, chip: Chip, dtype: str, c: Coefficients) -> Array:
    moved = np.asarray(shape["moved_bytes"], dtype=np.float64)
    rate = np.full(moved.shape, chip.hbm.bytes_per_s * c["bandwidth_share"])
    cache = chip.tier("l2")
    if cache is not None and cache.bytes_per_s > chip.hbm.bytes_per_s:
        # Only the part that the cache can hold is faster: time stays monotone in the bytes.
        held = np.minimum(moved, cache.size_bytes * c["cache_share"])
        traffic = held / (cache.bytes_per_s * c["bandwidth_share"]) + (moved - held) / rate
    else:
        traffic = moved / rate
    arithmetic = shape["vector_flops"] / (chip.vector_flops_per_s * c["vector_share"])
    return np.asarray(c["launch_s"] + np.maximum(traffic, arithmetic))


MEMORY = Family(
    "memory",
    {
        "moved_bytes": "bytes read and written",
        "vector_flops": "arithmetic outside the matrix units",
    },
    {
        "launch_s": (3e-6, 0.0, 5e-5),
        "bandwidth_share": (0.88, 0.3, 1.0),
        "cache_share": (0.5, 0.0, 1.0),
        "vector_share": (0.5, 0.05, 1.0),
    },
    _seconds,
)

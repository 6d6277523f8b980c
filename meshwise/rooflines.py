"""The points of a roofline picture: what kernels reach on a chip, measured or predicted."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hwmodels.curves import choose_curves
from hwmodels.families.family import Array
from hwmodels.hardware import Chip
from simcore.errors import InputError
from validation.accuracy.kernels import arithmetic_flops, least_bytes
from validation.datasets import LAYOUTS, Sample, kernel_files, kernel_samples

Points = dict[str, tuple[Array, Array]]
SHOWN = 400  # points of one library that a picture shows
SIZES = np.array([2.0**power for power in range(15)])


def _points(sample: Sample) -> tuple[Array, Array]:
    flops = arithmetic_flops(sample)
    return flops / least_bytes(sample), flops / sample.seconds


def measured_points(chip: Chip, dtype: str, data: Path) -> Points:
    """Return the measured points of ``chip``. Raises `InputError` where ``data`` has none."""
    found: dict[str, list[tuple[Array, Array]]] = {}
    for family in LAYOUTS:
        samples = kernel_samples(data, family) if kernel_files(data, family) else []
        for sample in samples:
            if sample.chip == chip.name and sample.dtype == dtype:
                thin = sample.take(np.arange(0, len(sample), max(1, len(sample) // SHOWN)))
                found.setdefault(family.replace("_", " "), []).append(_points(thin))
    if not found:
        raise InputError(f"{data} has no measurements of {chip.name} in {dtype}: drop --data.")
    return {
        name: (np.concatenate([x for x, _ in each]), np.concatenate([y for _, y in each]))
        for name, each in found.items()
    }


def _example_shapes() -> dict[str, dict[str, Array]]:
    """Return shapes of an 8-billion-parameter model's layer, by family, over batch or length."""
    n = len(SIZES)
    heads = {
        "heads": np.full(n, 32.0), "kv_heads": np.full(n, 8.0), "head_dim": np.full(n, 128.0),
        "window": np.zeros(n), "kv_bytes": np.full(n, 2.0),
    }  # fmt: skip
    return {
        "matmul": {"m": SIZES, "n": np.full(n, 4096.0), "k": np.full(n, 4096.0)},
        "attention_prefill": {
            **heads, "batch": np.ones(n), "seq_len": SIZES, "kv_len": SIZES,
        },
        "attention_decode": {**heads, "batch": SIZES, "kv_len": np.full(n, 4096.0)},
    }  # fmt: skip


def curve_points(chip: Chip, dtype: str) -> Points:
    """Return what the curves of ``chip`` give for the layers of a model, size by size."""
    if chip.kind == "cpu":
        return {}
    found: Points = {}
    for family, shape in _example_shapes().items():
        seconds = choose_curves(family, chip, dtype).seconds(shape, chip)
        sample = Sample(family, chip.name, "", dtype, shape, seconds, "")
        found[family.replace("_", " ")] = _points(sample)
    return found

"""How fast a million kernels of one family are priced, as arrays."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from hwmodels.catalogue import load_chip
from hwmodels.curves import choose_curves
from hwmodels.families.family import Array

pytestmark = pytest.mark.benchmark

COUNT = 1_000_000
CHIP = load_chip("h100-sxm-80gb")


def _powers(draw: np.random.Generator, low: int, high: int) -> Array:
    return np.floor(2.0 ** draw.uniform(low, high, COUNT))


def _heads(draw: np.random.Generator) -> dict[str, Array]:
    kv_heads = 2.0 ** draw.integers(0, 4, COUNT)
    return {
        "batch": _powers(draw, 0, 7),
        "kv_len": _powers(draw, 8, 15),
        "heads": kv_heads * 2.0 ** draw.integers(0, 4, COUNT),
        "kv_heads": kv_heads,
        "head_dim": np.full(COUNT, 128.0),
        "window": np.zeros(COUNT),
        "kv_bytes": np.full(COUNT, 2.0),
    }


SHAPES: dict[str, Callable[[np.random.Generator], dict[str, Array]]] = {
    "matmul": lambda d: {"m": _powers(d, 0, 14), "n": _powers(d, 8, 15), "k": _powers(d, 8, 15)},
    "attention_prefill": lambda d: {**_heads(d), "seq_len": _powers(d, 4, 8)},
    "attention_decode": _heads,
    "memory": lambda d: {"moved_bytes": _powers(d, 10, 36), "vector_flops": _powers(d, 10, 36)},
    "moe": lambda d: {
        "tokens": _powers(d, 0, 14),
        "hidden": _powers(d, 10, 13),
        "ffn": _powers(d, 9, 13),
        "experts_per_token": np.full(COUNT, 8.0),
        "experts": np.full(COUNT, 128.0),
        "tp": 2.0 ** d.integers(0, 4, COUNT),
        "ep": 2.0 ** d.integers(0, 4, COUNT),
        "alpha": np.zeros(COUNT),
    },
}


@pytest.mark.parametrize("family", SHAPES)
def test_a_million_prices(benchmark: BenchmarkFixture, family: str) -> None:
    shape = SHAPES[family](np.random.default_rng(0))
    choice = choose_curves(family, CHIP, "bf16", "trtllm")
    found = benchmark.pedantic(choice.seconds, (shape, CHIP), rounds=3)
    assert np.all(found > 0)
    if benchmark.stats:
        benchmark.extra_info["prices_per_s"] = COUNT / benchmark.stats.stats.min

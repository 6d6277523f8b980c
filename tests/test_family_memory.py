"""Kernels that wait for memory: laws of their price."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwmodels.catalogue import chip_names, load_chip
from hwmodels.families.memory import MEMORY
from hwmodels.hardware import MemoryTier

H100 = load_chip("h100-sxm-80gb")
COEFFICIENTS = MEMORY.start()


def seconds(moved: object, flops: object = 0.0, chip: object = H100) -> np.ndarray:
    shape = {"moved_bytes": moved, "vector_flops": flops}
    return MEMORY.seconds(shape, chip, "bf16", COEFFICIENTS)  # type: ignore[arg-type]


@given(st.floats(0, 1e12), st.floats(0, 1e12), st.floats(0, 1e15))
def test_more_bytes_or_arithmetic_take_no_less(a: float, b: float, flops: float) -> None:
    low, high = sorted((a, b))
    assert seconds(low) <= seconds(high)
    assert seconds(low, flops) >= seconds(low)


@given(st.floats(1, 1e12), st.floats(1, 4))
def test_more_bandwidth_is_never_slower(moved: float, faster: float) -> None:
    tiers = tuple(MemoryTier(t.name, t.size_bytes, t.bytes_per_s * faster) for t in H100.tiers)
    assert seconds(moved, chip=replace(H100, tiers=tiers)) <= seconds(moved)


@pytest.mark.parametrize("name", chip_names())
def test_every_chip_has_a_price_below_its_bandwidth(name: str) -> None:
    chip = load_chip(name)
    moved = np.geomspace(1, 1e12, 50)
    fastest = max(tier.bytes_per_s for tier in chip.tiers if tier.name in ("l2", "hbm"))
    found = seconds(moved, chip=chip)
    assert np.all(np.isfinite(found))
    assert np.all(moved / found < fastest)


def test_large_copies_run_at_the_share_of_main_memory() -> None:
    rate = 1e12 / seconds(1e12)
    assert rate == pytest.approx(H100.hbm.bytes_per_s * COEFFICIENTS["bandwidth_share"], rel=1e-3)

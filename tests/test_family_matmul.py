"""The matmul family: laws of its formula, closed forms, and its errors on unseen measurements."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwmodels.catalogue import chip_names, load_chip
from hwmodels.families.family import Array
from hwmodels.families.matmul import LAYOUTS, MATMUL
from hwmodels.hardware import Chip, MemoryTier
from validation.datasets import Sample, kernel_samples
from validation.fitting import fit_coefficients, held_out, predict

START = MATMUL.start()
# Nothing lost anywhere: what is left is whole tiles, whole waves and the two rooflines.
IDEAL = {
    **dict.fromkeys(("peak_share", "bandwidth_share", "feed_share"), 1.0),
    **dict.fromkeys(("launch_cycles", "tile_cycles", "split_cycles", "smallest_tile"), 0.0),
    **dict.fromkeys(("grown_tile", "unhidden_share", "warm_share", "quantise_bytes"), 0.0),
    "flop_energy_j": 0.0,
}
CHIPS = ("a100-sxm-80gb", "h100-sxm-80gb", "h200-sxm-141gb", "l40s", "t4", "mi300x", "generic-cpu")
DTYPES = ("bf16", "fp16", "fp32", "tf32", "int8", "fp8", "fp8_block", "mxfp8", "nvfp4", "mxfp4")
WEIGHTS_ONLY = ("int4_wo", "int8_wo", "fp8_wo")
ACROSS = [(chip, dtype) for chip in CHIPS for dtype in ("bf16", "fp8", "fp8_block", "int4_wo")]

sizes = st.integers(1, 70_000)
shapes = st.fixed_dictionaries({"m": sizes, "n": sizes, "k": sizes})
coefficients = st.fixed_dictionaries(
    {name: st.floats(low, high) for name, (_, low, high) in MATMUL.coefficients.items()}
)


def seconds(shape: Mapping[str, float], chip: Chip, dtype: str = "bf16", **changed: float) -> float:
    return float(MATMUL.seconds(shape, chip, dtype, {**START, **changed}))


# -- laws ----------------------------------------------------------------------------------------


@given(
    shapes,
    st.sampled_from(ACROSS),
    st.sampled_from("mnk"),
    st.floats(1.0, 3.0),
    st.one_of(st.just(START), coefficients),
)
def test_more_work_is_never_faster(
    shape: dict[str, int], on: tuple[str, str], size: str, factor: float, c: dict[str, float]
) -> None:
    chip = load_chip(on[0])
    larger = {**shape, size: int(np.ceil(shape[size] * factor))}
    before, after = (float(MATMUL.seconds(s, chip, on[1], c)) for s in (shape, larger))
    assert after >= before * (1 - 1e-12)


@given(shapes, st.sampled_from(ACROSS), coefficients)
def test_no_faster_than_the_peak_and_the_nearest_memory(
    shape: dict[str, int], on: tuple[str, str], c: dict[str, float]
) -> None:
    chip, dtype = load_chip(on[0]), on[1]
    found = float(MATMUL.seconds(shape, chip, dtype, c))
    m, n, k = shape["m"], shape["n"], shape["k"]
    weight_bytes = {"bf16": 2.0, "fp8": 1.0, "fp8_block": 1.0, "int4_wo": 0.5}[dtype]
    fastest = max(tier.bytes_per_s for tier in chip.tiers)
    assert found >= 2.0 * m * n * k / max(chip.peak_flops_per_s.values()) * (1 - 1e-12)
    assert found >= (n * k * weight_bytes + 2 * m * n) / fastest * (1 - 1e-12)


def _improved(chip: Chip, what: str, factor: float) -> Chip:
    peaks = {name: rate * factor for name, rate in chip.peak_flops_per_s.items()}
    tiers = tuple(replace(tier, bytes_per_s=tier.bytes_per_s * factor) for tier in chip.tiers)
    return {
        "memory": replace(chip, tiers=tiers),
        "power": replace(chip, power_w=chip.power_w * factor),
        "multipliers": replace(chip, peak_flops_per_s=peaks),
        "lanes": replace(chip, vector_flops_per_s=chip.vector_flops_per_s * factor),
    }[what]


@given(
    shapes,
    st.sampled_from(("a100-sxm-80gb", "h100-sxm-80gb", "l40s")),
    st.sampled_from(("bf16", "fp8_block", "int4_wo")),
    st.sampled_from(("memory", "power", "multipliers", "lanes")),
    st.floats(1.0, 2.0),
)
def test_a_better_chip_is_never_slower(
    shape: dict[str, int], name: str, dtype: str, what: str, factor: float
) -> None:
    chip = load_chip(name)
    better = _improved(chip, what, factor)
    assert seconds(shape, better, dtype) <= seconds(shape, chip, dtype) * (1 + 1e-12)


@given(shapes, st.sampled_from(("a100-sxm-80gb", "h100-sxm-80gb")), st.integers(1, 200))
def test_more_units_of_the_same_kind_are_never_slower(
    shape: dict[str, int], name: str, added: int
) -> None:
    chip = load_chip(name)
    factor = (chip.units + added) / chip.units
    wider = _improved(_improved(chip, "multipliers", factor), "lanes", factor)
    wider = replace(wider, units=chip.units + added)
    assert seconds(shape, wider) <= seconds(shape, chip) * (1 + 1e-9)


@pytest.mark.parametrize("name", chip_names())
def test_every_chip_and_format_has_a_finite_price(name: str) -> None:
    edges = np.array([1.0, 17.0, 1e6])
    m, n, k = (grid.ravel() for grid in np.meshgrid(edges, edges, edges))
    for dtype in DTYPES + WEIGHTS_ONLY:
        found = MATMUL.seconds({"m": m, "n": n, "k": k}, load_chip(name), dtype, START)
        assert np.all((found > 0) & (found < np.inf)), dtype


def test_rows_of_arrays_are_priced_like_single_products_and_fast() -> None:
    rng = np.random.default_rng(5)
    chip = load_chip("h100-sxm-80gb")
    shape = {name: np.ceil(2 ** rng.uniform(0, 15, 200_000)) for name in "mnk"}
    began = time.perf_counter()
    found = MATMUL.seconds(shape, chip, "fp8_block", START)
    assert time.perf_counter() - began < 2.0
    for row in range(0, 200_000, 40_000):
        one = {name: float(column[row]) for name, column in shape.items()}
        assert seconds(one, chip, "fp8_block") == found[row]


# -- closed forms --------------------------------------------------------------------------------

TOY = replace(
    load_chip("a100-sxm-80gb"),
    units=4,
    clock_hz=1e9,
    peak_flops_per_s={"bf16": 4 * 2048e9},
    tiers=(MemoryTier("hbm", 1e12, 1e15),),
)


def test_whole_waves_run_at_peak_and_one_more_tile_costs_a_wave() -> None:
    full = {"m": 512.0, "n": 256.0, "k": 64.0}  # four tiles of 256 x 128 or eight of 128 x 128
    at_peak = 2 * 512 * 256 * 64 / (4 * 2048e9)
    assert float(MATMUL.seconds(full, TOY, "bf16", IDEAL)) == pytest.approx(at_peak, rel=1e-9)
    # A 513th row needs tiles of its own: the smallest that the port can feed, on units that wait.
    more = float(MATMUL.seconds({**full, "m": 513.0}, TOY, "bf16", IDEAL))
    assert at_peak * 1.05 < more <= at_peak * 2


def test_a_single_tile_is_split_over_the_units_along_k() -> None:
    skinny = {"m": 128.0, "n": 128.0, "k": 65536.0}
    split = float(MATMUL.seconds(skinny, TOY, "bf16", IDEAL))
    assert split == pytest.approx(2 * 128 * 128 * 65536 / (4 * 2048e9), rel=1e-9)
    apart = MATMUL.seconds(skinny, TOY, "bf16", {**IDEAL, "split_cycles": 1e12, "smallest_tile": 1})
    assert float(apart) == pytest.approx(4 * split, rel=1e-9)


def test_a_power_limit_costs_the_cube_root() -> None:
    chip = load_chip("h100-sxm-80gb")
    shape = dict.fromkeys("mnk", 65536.0)
    hot = [seconds(shape, replace(chip, power_w=power)) for power in (200.0, 100.0)]
    assert hot[1] / hot[0] == pytest.approx(2 ** (1 / 3), rel=0.01)
    assert seconds(shape, replace(chip, power_w=1e5)) == seconds(shape, chip, flop_energy_j=0.0)


def test_a_skinny_product_takes_its_weights_from_memory() -> None:
    chip = load_chip("h100-sxm-80gb")
    shape = {"m": 1.0, "n": 16384.0, "k": 16384.0}
    rate = 16384**2 * 2 / seconds(shape, chip) / chip.hbm.bytes_per_s
    assert 0.7 < rate < START["bandwidth_share"]
    assert 3.0 < seconds(shape, chip) / seconds(shape, chip, "int4_wo") < 4.0


def test_narrow_weights_save_no_arithmetic() -> None:
    chip, shape = load_chip("a100-sxm-80gb"), dict.fromkeys("mnk", 8192.0)
    assert seconds(shape, chip, "int8_wo") >= 0.99 * seconds(shape, chip)
    assert seconds(shape, chip, "fp8") == seconds(shape, chip, "fp8_wo")  # no fp8 units


def test_operands_that_stay_in_cache_beat_main_memory() -> None:
    chip, shape = load_chip("h100-sxm-80gb"), {"m": 1.0, "n": 1024.0, "k": 1024.0}
    assert seconds(shape, chip, warm_share=0.5) < seconds(shape, chip, warm_share=0.0)


def test_a_weight_gradient_pays_for_its_sum_in_fp32() -> None:
    chip, few = load_chip("h100-sxm-80gb"), {"m": 8192, "n": 8192, "k": 16}
    price = {name: seconds({**few, **added}, chip) for name, added in LAYOUTS.items()}
    assert price["nt"] == price["nn"]
    # Of 16 tokens the result is all there is to move: four times as much where it is a sum.
    assert 2.5 < price["tn"] / price["nt"] < 4.0


def test_prices_stay_as_they_were(golden: Callable[..., None]) -> None:
    cases = {
        f"{chip}/{dtype}/{m}x{n}x{k}": seconds({"m": m, "n": n, "k": k}, load_chip(chip), dtype)
        for chip in ("a100-sxm-80gb", "h100-sxm-80gb", "b200-sxm-180gb")
        for dtype in ("bf16", "fp8", "fp8_block", "int4_wo")
        for m, n, k in ((1, 4096, 4096), (128, 8192, 1024), (4096, 4096, 16384))
    }
    golden("family_matmul", cases, rel=1e-6)


# -- measurements --------------------------------------------------------------------------------


def _sample(data: Path, chip: str, implementation: str, dtype: str) -> Sample:
    return next(
        s
        for s in kernel_samples(data, "matmul")
        if (s.chip, s.implementation, s.dtype) == (chip, implementation, dtype)
    )


def _errors(predicted: Array, sample: Sample) -> tuple[float, float]:
    errors = np.abs(predicted / sample.seconds - 1)
    return float(np.median(errors)), float(np.quantile(errors, 0.9))


def _datasheet(sample: Sample) -> Array:
    return MATMUL.seconds(sample.shape, load_chip(sample.chip), sample.dtype, IDEAL)


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_unseen_shapes(data_dir: Path, dtype: str) -> None:
    sample = _sample(data_dir, "h100-sxm-80gb", "trtllm", dtype)
    predicted = held_out(sample)
    median, p90 = _errors(predicted, sample)
    assert median < 0.05
    assert p90 < 0.15
    assert median < _errors(_datasheet(sample), sample)[0] / 3
    rng = np.random.default_rng(0)
    one, two = rng.integers(len(sample), size=(2, 20_000))
    measured = np.log(sample.seconds[one] / sample.seconds[two])
    apart = np.abs(measured) > np.log(1.1)
    ordered = np.log(predicted[one] / predicted[two]) * measured > 0
    assert np.mean(ordered[apart]) > 0.95


def test_unseen_generation(data_dir: Path) -> None:
    old, new = (
        _sample(data_dir, chip, "trtllm", "bf16") for chip in ("a100-sxm-80gb", "h100-sxm-80gb")
    )
    median, p90 = _errors(predict("matmul", new, fit_coefficients("matmul", [old])), new)
    assert median < 0.10
    assert p90 < 0.20
    assert median < _errors(_datasheet(new), new)[0] / 3

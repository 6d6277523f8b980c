"""The attention families: laws of their equations, closed forms, and errors on unseen shapes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwmodels.catalogue import chip_names, load_chip
from hwmodels.families.attention import ATTENTION_DECODE, ATTENTION_PREFILL
from hwmodels.families.attention_variants import VARIANTS
from hwmodels.families.family import Array, Family, matrix_peak
from hwmodels.hardware import Chip, MemoryTier
from validation.datasets import Sample, kernel_samples
from validation.fitting import fit_coefficients, folds, held_out, predict

PLAIN = (ATTENTION_PREFILL, ATTENTION_DECODE)
FAMILIES = {family.name: family for family in PLAIN} | {n: v.family for n, v in VARIANTS.items()}
CHIPS = ("a100-sxm-80gb", "h100-sxm-80gb", "h200-sxm-141gb", "b200-sxm-180gb", "l40s", "mi300x")
DTYPES = ("bf16", "fp16", "fp32", "tf32", "int8", "fp8", "fp8_block", "mxfp8", "nvfp4", "mxfp4")
SHAPE = {
    "batch": 8.0,
    "seq_len": 1024.0,
    "kv_len": 4096.0,
    "heads": 32.0,
    "kv_heads": 8.0,
    "head_dim": 128.0,
    "window": 0.0,
    "kv_bytes": 2.0,
    "latent_dim": 512.0,
    "rope_dim": 64.0,
    "qk_dim": 192.0,
    "v_dim": 128.0,
    "density": 0.5,
    "prefix_len": 1024.0,
    "page": 16.0,
}

lengths = st.integers(1, 20_000)
shapes = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 300),
        "seq_len": lengths,
        "kv_len": lengths,
        "heads": st.sampled_from((8, 24, 40, 64)),
        "kv_heads": st.sampled_from((1, 2, 8)),
        "head_dim": st.sampled_from((64, 96, 128, 192, 256)),
        "window": st.sampled_from((0, 0, 128, 1024)),
        "kv_bytes": st.sampled_from((1.0, 2.0)),
    }
)
families = st.sampled_from(PLAIN)
chips = st.sampled_from(CHIPS)


def coefficients(family: Family) -> st.SearchStrategy[dict[str, float]]:
    drawn = {name: st.floats(low, high) for name, (_, low, high) in family.coefficients.items()}
    return st.one_of(st.just(family.start()), st.fixed_dictionaries(drawn))


def seconds(family: Family, shape: dict[str, float], chip: Chip, dtype: str = "bf16") -> float:
    return float(family.seconds(shape, chip, dtype, family.start()))


# -- laws ----------------------------------------------------------------------------------------


@given(st.data(), families, shapes, chips, st.floats(1.0, 3.0))
def test_more_work_is_never_faster(
    data: st.DataObject, family: Family, shape: dict[str, float], name: str, factor: float
) -> None:
    c = data.draw(coefficients(family))
    size = data.draw(st.sampled_from(("batch", "seq_len", "kv_len")))
    shape = {**shape, "kv_len": max(shape["kv_len"], shape["seq_len"])}
    larger = {**shape, size: np.ceil(shape[size] * factor)}
    larger["kv_len"] = max(larger["kv_len"], larger["seq_len"])
    chip = load_chip(name)
    less, more = (float(family.seconds(x, chip, "bf16", c)) for x in (shape, larger))
    assert more >= less * (1 - 1e-9)


@given(st.data(), families, shapes, chips)
def test_wider_heads_are_never_faster(
    data: st.DataObject, family: Family, shape: dict[str, float], name: str
) -> None:
    c, chip = data.draw(coefficients(family)), load_chip(name)
    widths = np.array([32.0, 64.0, 96.0, 128.0, 160.0, 192.0, 256.0, 512.0])
    found = family.seconds({**shape, "head_dim": widths}, chip, "bf16", c)
    assert np.all(np.diff(found) >= -1e-12)


@pytest.mark.parametrize("name", ["a100-sxm-80gb", "h100-sxm-80gb"])
@pytest.mark.parametrize("family", PLAIN, ids=lambda family: family.name)
def test_more_heads_to_a_key_are_never_faster(family: Family, name: str) -> None:
    heads = 8.0 * np.arange(2, 17)
    for length in (64.0, 4096.0):
        shape = {**SHAPE, "seq_len": length, "kv_len": length, "heads": heads}
        found = family.seconds(shape, load_chip(name), "bf16", family.start())
        assert np.all(np.diff(found) >= -1e-12)


def faster(chip: Chip) -> dict[str, Chip]:
    """The chip with one resource more."""
    peaks = {name: 1.5 * rate for name, rate in chip.peak_flops_per_s.items()}
    tiers = tuple(replace(tier, bytes_per_s=1.5 * tier.bytes_per_s) for tier in chip.tiers)
    units = {name: rate * 1.5 for name, rate in chip.peak_flops_per_s.items()}
    return {
        "bandwidth": replace(chip, tiers=tiers),
        "rate": replace(chip, peak_flops_per_s=peaks),
        "units": replace(
            chip,
            units=round(1.5 * chip.units),
            peak_flops_per_s=units,
            vector_flops_per_s=1.5 * chip.vector_flops_per_s,
        ),
    }


@given(families, shapes, chips, st.sampled_from(("bandwidth", "rate", "units")))
def test_a_better_chip_is_never_slower(
    family: Family, shape: dict[str, float], name: str, resource: str
) -> None:
    chip = load_chip(name)
    better = faster(chip)[resource]
    assert seconds(family, shape, better) <= seconds(family, shape, chip) * (1 + 1e-6)


@given(st.data(), families, shapes, chips, st.sampled_from(("bf16", "fp8")))
def test_no_faster_than_the_peak_nor_than_the_fastest_memory_that_holds_it(
    data: st.DataObject, family: Family, shape: dict[str, float], name: str, dtype: str
) -> None:
    chip, c = load_chip(name), data.draw(coefficients(family))
    found = float(family.seconds(shape, chip, dtype, c))
    queries = shape["seq_len"] if family is ATTENTION_PREFILL else 1
    keys = max(shape["kv_len"], queries)
    seen = np.arange(keys - queries + 1, keys + 1, dtype=np.float64)
    window = shape["window"] or np.inf
    pairs = shape["batch"] * shape["heads"] * np.minimum(seen, window).sum()
    assert 4 * pairs * shape["head_dim"] / found <= matrix_peak(chip, dtype) * (1 + 1e-9)
    rows = 4 * shape["batch"] * queries * shape["heads"] * shape["head_dim"]
    cached = np.minimum(keys, window + queries - 1) * shape["kv_bytes"]
    moved = rows + 2 * shape["batch"] * shape["kv_heads"] * shape["head_dim"] * cached
    holds = [tier.bytes_per_s for tier in chip.tiers if tier.size_bytes >= moved]
    assert moved / found <= max([*holds, chip.hbm.bytes_per_s]) * (1 + 1e-9)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_chip_and_format_gives_a_time(name: str) -> None:
    family = FAMILIES[name]
    sizes = np.array([1.0, 7.0, 4096.0, 1e6])
    shape = {**SHAPE, "batch": sizes, "seq_len": sizes, "kv_len": sizes}
    for chip in map(load_chip, chip_names()):
        for dtype in (*DTYPES, "int4_wo", "int8_wo", "fp8_wo"):
            found = family.seconds(shape, chip, dtype, family.start())
            assert found.shape == sizes.shape
            assert np.all(np.isfinite(found) & (found > 0)), (chip.name, dtype)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("chip", ["a100-sxm-80gb", "h100-sxm-80gb"])
def test_kinds_of_attention_rise_with_their_sizes(name: str, chip: str) -> None:
    family, grid = FAMILIES[name], np.unique(np.geomspace(1, 20_000, 200).round())
    for size in ("batch", "kv_len"):
        shape = {**SHAPE, "seq_len": 1.0, "prefix_len": 0.0, size: grid}
        found = family.seconds(shape, load_chip(chip), "bf16", family.start())
        assert np.all(np.diff(found) >= -1e-12), size


def test_a_million_calls_are_priced_at_once() -> None:
    rng = np.random.default_rng(0)
    many = {name: rng.integers(1, 8192, 1_000_000) for name in ("batch", "seq_len", "kv_len")}
    start = time.perf_counter()
    for family in PLAIN:
        family.seconds({**SHAPE, **many}, load_chip("h100-sxm-80gb"), "bf16", family.start())
    assert time.perf_counter() - start < 10  # seconds; 0.6 on an idle core


# -- closed forms --------------------------------------------------------------------------------

IDEAL = {
    **dict.fromkeys(("launch_s", "block_s", "kernel_s", "lockstep_s", "tail"), 0.0),
    **dict.fromkeys(("row_passes", "cache_passes"), 0.0),
    **dict.fromkeys(("matrix_share", "bandwidth_share", "grouped"), 1.0),
    "narrow_share": 0.5,
}


def test_long_prefill_tends_to_products_and_half_the_softmax_of_the_causal_half() -> None:
    chip = load_chip("h100-sxm-80gb")
    shape = {**SHAPE, "seq_len": 65536.0, "kv_len": 65536.0}
    pairs = 8 * 32 * 65536 * 65537 / 2
    exponential = 1 / (16 * chip.clock_hz * chip.units)
    others = 4 / (chip.vector_flops_per_s / 2)
    each = 4 * 128 / chip.peak_flops_per_s["bf16"] + (exponential + others) / 2
    found = float(ATTENTION_PREFILL.seconds(shape, chip, "bf16", IDEAL))
    assert found == pytest.approx(pairs * each, rel=0.01)


def test_long_decode_tends_to_the_bandwidth() -> None:
    c = {**IDEAL, "sequence_s": 0.0, "cached_share": 0.0}
    chip, shape = load_chip("h200-sxm-141gb"), {**SHAPE, "batch": 66.0, "kv_len": 32768.0}
    read = 66 * 8 * 2 * 128 * 2 * 32768
    found = float(ATTENTION_DECODE.seconds(shape, chip, "bf16", c))
    assert found == pytest.approx(read / chip.hbm.bytes_per_s, rel=0.01)


def test_waves_are_whole_and_splits_fill_idle_units() -> None:
    chip = load_chip("h100-sxm-80gb")
    waves = [
        seconds(ATTENTION_DECODE, {**SHAPE, "kv_heads": 1.0, "batch": b, "kv_len": 64.0}, chip)
        for b in (131.0, 132.0, 133.0)
    ]
    assert waves[2] - waves[1] > 10 * (waves[1] - waves[0])
    one = {**SHAPE, "batch": 1.0, "kv_heads": 1.0, "kv_len": 131072.0}
    alone = ATTENTION_DECODE.start()["matrix_share"] * matrix_peak(chip, "bf16") / chip.units
    assert seconds(ATTENTION_DECODE, one, chip) < 4 * 64 * 131072 * 128 / alone / 8


def test_a_cache_that_stays_in_l2_is_read_at_its_rate() -> None:
    chip = load_chip("h200-sxm-141gb")
    bare = replace(chip, tiers=(chip.hbm,))
    small, large = ({**SHAPE, "batch": b, "kv_len": 1024.0} for b in (4.0, 256.0))
    assert seconds(ATTENTION_DECODE, small, chip) < seconds(ATTENTION_DECODE, small, bare)
    assert seconds(ATTENTION_DECODE, large, chip) == seconds(ATTENTION_DECODE, large, bare)
    tiny = replace(chip, tiers=(MemoryTier("l2", 1.0, 1e13), chip.hbm))
    assert seconds(ATTENTION_DECODE, small, tiny) == seconds(ATTENTION_DECODE, small, bare)
    cold = {**ATTENTION_DECODE.start(), **ATTENTION_DECODE.cold}
    found = float(ATTENTION_DECODE.seconds(small, chip, "bf16", cold))
    assert found == seconds(ATTENTION_DECODE, small, bare)


# -- kinds of attention --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a100-sxm-80gb", "h100-sxm-80gb"])
def test_backward_takes_about_two_and_a_half_forwards(name: str) -> None:
    shape, chip = {**SHAPE, "seq_len": 8192.0, "kv_len": 8192.0}, load_chip(name)
    back = seconds(VARIANTS["attention_backward"].family, shape, chip)
    assert 2.0 < back / seconds(ATTENTION_PREFILL, shape, chip) < 3.2


def test_a_latent_cache_is_read_once_for_all_heads() -> None:
    chip = load_chip("h200-sxm-141gb")
    latent = VARIANTS["latent_attention_decode"].family
    c = {**latent.start(), "cached_share": 0.0}
    shape = {**SHAPE, "batch": 64.0, "heads": 8.0, "kv_len": 65536.0}
    found = float(latent.seconds(shape, chip, "bf16", c))
    read = 64 * 65536 * 576 * 2 / (chip.hbm.bytes_per_s * c["bandwidth_share"])
    assert found == pytest.approx(read, rel=0.05)


def test_half_of_the_blocks_takes_half_of_the_time() -> None:
    sparse, chip = VARIANTS["sparse_attention"].family, load_chip("h100-sxm-80gb")
    shape = {**SHAPE, "seq_len": 16384.0, "kv_len": 16384.0, "density": 1.0}
    full = seconds(sparse, shape, chip)
    assert full == pytest.approx(seconds(ATTENTION_PREFILL, shape, chip))
    assert seconds(sparse, {**shape, "density": 0.5}, chip) == pytest.approx(full / 2, rel=0.1)


def test_verifying_a_few_rows_costs_little_more_than_one() -> None:
    verify, chip = VARIANTS["verify_attention"].family, load_chip("h200-sxm-141gb")
    one, eight = (seconds(verify, {**SHAPE, "batch": 64.0, "seq_len": s}, chip) for s in (1.0, 8.0))
    assert one <= eight < 1.1 * one
    plain = seconds(ATTENTION_DECODE, {**SHAPE, "batch": 64.0}, chip)
    assert one == pytest.approx(plain, rel=0.01)


def test_a_shared_prefix_is_read_once() -> None:
    shared, chip = VARIANTS["shared_prefix_attention"].family, load_chip("h200-sxm-141gb")
    shape = {**SHAPE, "batch": 64.0, "kv_len": 33_024.0, "seq_len": 1.0}
    apart = seconds(shared, {**shape, "prefix_len": 0.0}, chip)
    assert apart == pytest.approx(seconds(ATTENTION_DECODE, shape, chip))
    assert seconds(shared, {**shape, "prefix_len": 32_768.0}, chip) < apart / 10


def test_small_pages_cost_a_little() -> None:
    paged, chip = VARIANTS["paged_attention_decode"].family, load_chip("a100-sxm-80gb")
    shape = {**SHAPE, "batch": 64.0, "page": np.array([1.0, 16.0, 64.0, 4096.0])}
    found = paged.seconds(shape, chip, "bf16", paged.start())
    assert np.all(np.diff(found) < 0)
    assert found[0] < 1.05 * found[-1]
    whole = seconds(ATTENTION_DECODE, {**SHAPE, "batch": 64.0}, chip)
    assert found[-1] == pytest.approx(whole, rel=1e-4)


def test_kinds_borrow_the_curves_of_families_with_the_same_coefficients() -> None:
    measured = {family.name: family for family in PLAIN}
    for variant in VARIANTS.values():
        assert variant.family.coefficients == measured[variant.borrows].coefficients


def test_golden(golden: Callable[..., None]) -> None:
    found = {
        f"{name} {chip} {dtype}": seconds(
            family, {**SHAPE, "kv_bytes": size}, load_chip(chip), dtype
        )
        for name, family in FAMILIES.items()
        for chip in ("a100-sxm-80gb", "h100-sxm-80gb", "b200-sxm-180gb", "mi300x")
        for dtype, size in (("bf16", 2.0), ("bf16", 1.0), ("fp8", 1.0))
    }
    golden("family_attention", found, rel=1e-6)


# -- measurements --------------------------------------------------------------------------------


def errors(sample: Sample, predicted: Array) -> tuple[float, float]:
    """Median and 90th percentile of the absolute relative error."""
    found = np.abs(predicted / sample.seconds - 1)
    return float(np.median(found)), float(np.quantile(found, 0.9))


def samples(data: Path, family: str) -> list[Sample]:
    return [sample for sample in kernel_samples(data, family) if len(sample) > 300]


def order(sample: Sample, predicted: Array) -> float:
    """Share of pairs that differ by over 10 % whose order is predicted right."""
    left, right = np.random.default_rng(0).integers(0, len(sample), (2, 20_000))
    apart = np.abs(np.log(sample.seconds[left] / sample.seconds[right])) > np.log(1.1)
    right_order = (predicted[left] > predicted[right]) == (
        sample.seconds[left] > sample.seconds[right]
    )
    return float(right_order[apart].mean())


def coverage(sample: Sample, predicted: Array) -> float:
    """Share of rows inside the 80 % interval of the other folds' ratios."""
    ratio, fold = sample.seconds / predicted, folds(sample)
    inside = np.zeros(len(sample), dtype=bool)
    for number in np.unique(fold):
        low, high = np.quantile(ratio[fold != number], [0.1, 0.9])
        here = fold == number
        inside[here] = (ratio[here] >= low) & (ratio[here] <= high)
    return float(inside.mean())


@pytest.mark.slow
@pytest.mark.parametrize("family", [family.name for family in PLAIN])
def test_unseen_shapes(data_dir: Path, family: str) -> None:
    for sample in samples(data_dir, family):
        predicted = held_out(sample)
        median, p90 = errors(sample, predicted)
        name = (sample.chip, sample.implementation, sample.dtype)
        assert median < 0.12, name
        assert p90 < 0.30, name
        assert order(sample, predicted) > 0.95, name
        assert 0.7 < coverage(sample, predicted) < 0.9, name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "limit"), [("attention_prefill", 0.20), ("attention_decode", 0.18)]
)
def test_another_generation(data_dir: Path, family: str, limit: float) -> None:
    found = [s for s in samples(data_dir, family) if s.dtype == "bf16"]
    for library in {s.implementation for s in found}:
        own = [s for s in found if s.implementation == library]
        old = [s for s in own if s.chip.startswith("a100")]
        new = [s for s in own if not s.chip.startswith("a100")]
        for seen, unseen in ((old, new), (new, old)):
            c = fit_coefficients(family, seen)
            for sample in unseen:
                assert errors(sample, predict(family, sample, c))[0] < limit, (library, sample.chip)

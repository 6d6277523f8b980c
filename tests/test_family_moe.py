"""Laws of routing and of the fused expert layer, and its accuracy on measured kernels."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwmodels.catalogue import chip_names, load_chip
from hwmodels.families.family import Array, matrix_peak
from hwmodels.families.moe import MOE
from hwmodels.families.routing import (
    TILES,
    RankLoad,
    busiest_rank,
    expected_distinct,
    expert_rows,
)
from hwmodels.hardware import Chip
from validation.datasets import kernel_samples
from validation.fitting import fit_coefficients, held_out, predict

CHIP = load_chip("h100-sxm-80gb")
DTYPES = ("bf16", "fp16", "fp32", "tf32", "int8", "fp8", "fp8_block", "mxfp8", "nvfp4", "mxfp4")
WEIGHT_ONLY = ("int4_wo", "int8_wo", "fp8_wo", "mxfp4_wo")
C = MOE.start()
LAYER = {
    "tokens": 256, "hidden": 4096, "ffn": 1536, "experts_per_token": 8, "experts": 128, "tp": 1,
    "ep": 1, "alpha": 0.0,
}  # fmt: skip
ALPHAS = st.sampled_from([0.0, 0.6, 1.0, 1.01, 1.2])
LAWS = st.sampled_from([(8, 2, 1), (8, 2, 8), (128, 8, 4), (256, 8, 1), (256, 8, 32), (60, 4, 7)])


def seconds(chip: Chip = CHIP, dtype: str = "bf16", c: Any = C, **changes: Any) -> Array:
    return MOE.seconds({**LAYER, **changes}, chip, dtype, c)


# ---------------------------------------------------------------- routing


@pytest.mark.parametrize(("experts", "top", "tokens"), [(4, 2, 1), (4, 2, 3), (5, 1, 4), (4, 3, 2)])
def test_expected_distinct_is_the_mean_over_all_choices(
    experts: int, top: int, tokens: int
) -> None:
    choices = list(combinations(range(experts), top))
    unions = [len(set().union(*rows)) for rows in product(choices, repeat=tokens)]
    assert expected_distinct(tokens, experts, top) == pytest.approx(np.mean(unions))


@pytest.mark.parametrize("tokens", [1, 4, 16, 256, 4096])
@pytest.mark.parametrize("law", [(8, 2, 1), (8, 2, 4), (128, 8, 8), (256, 8, 64)])
def test_balanced_rows_are_those_of_dealing_them(tokens: int, law: tuple[int, int, int]) -> None:
    experts, top, ep = law
    stride = experts // top
    start = np.arange(tokens) if tokens >= stride else np.arange(tokens) * stride // tokens
    visits = (start[:, None] + stride * np.arange(top)) % experts
    local = np.bincount(visits.ravel(), minlength=experts)[: experts // ep]
    load = busiest_rank(tokens, experts, top, ep, 0.0)
    assert load.rows == pytest.approx(local.sum(), abs=1.0, rel=0.1)
    assert load.touched == (local > 0).sum()
    for size, count in zip(TILES, load.tiles, strict=True):
        assert count == pytest.approx(np.ceil(local / size).sum(), abs=1.0, rel=0.1)


def drawn(tokens: int, experts: int, top: int, ep: int, alpha: float) -> Array:
    """Return (rows, touched, tiles of 64) of the busiest rank, row by row, over fresh draws."""
    random, found = np.random.default_rng(1234), []
    low, high = (1.0, 0.8 * tokens) if tokens * top > experts else (0.01, 2.0)
    for _ in range(200):
        ends = np.array([high, low]) ** (1 - alpha)
        x = ((ends[0] - ends[1]) * random.random(experts) + ends[1]) ** (1 / (1 - alpha))
        rows = np.rint(x / x.sum() * tokens * top).astype(int)
        for _ in range(int(np.maximum(rows - tokens, 0).sum())):
            rows[rows.argmax()] -= 1
            rows[rows.argmin()] += 1
        ranks = rows.reshape(ep, -1)
        for turn in range(tokens * top - rows.sum()):
            rank = ranks[turn % ep]
            rank[rank.argmin()] += 1
        load = ranks[ranks.sum(axis=1).argmax()]
        found.append([load.sum(), (load > 0).sum(), np.ceil(load / 64).sum()])
    return np.asarray(np.mean(found, axis=0))


@pytest.mark.parametrize("alpha", [1.01, 1.2])
@pytest.mark.parametrize(
    ("tokens", "experts", "top", "ep"),
    [(1, 256, 8, 8), (16, 128, 8, 1), (64, 8, 2, 8), (256, 256, 8, 32), (512, 8, 2, 2)],
)
def test_power_law_load_is_that_of_drawing_it(
    tokens: int, experts: int, top: int, ep: int, alpha: float
) -> None:
    load = busiest_rank(tokens, experts, top, ep, alpha)
    expected = drawn(tokens, experts, top, ep, alpha)
    found = [load.rows, load.touched, load.tiles[TILES.index(64)]]
    assert np.array(found, dtype=float) == pytest.approx(expected, rel=0.1)


@given(LAWS, ALPHAS, st.floats(1.0, 1e7), st.floats(1.0, 8.0))
def test_load_grows_with_tokens_within_its_bounds(
    law: tuple[int, int, int], alpha: float, tokens: float, more: float
) -> None:
    experts, top, ep = law
    load = busiest_rank(np.array([tokens, tokens * more]), experts, top, ep, alpha)
    local = -(-experts // ep)
    for column in (load.rows, load.touched, *load.tiles, load.touched + load.crowded):
        assert column[1] >= column[0] * (1 - 1e-9)
    assert np.all(load.touched >= 1 - 1e-9)
    assert np.all(load.touched + load.crowded <= local + 1e-9)
    assert np.all(load.rows >= load.touched - 1e-9)
    for size, count in zip(TILES, load.tiles, strict=True):
        assert np.all(count >= load.rows / size * 0.999)
        assert np.all(count <= load.touched + load.rows / size)


@pytest.mark.parametrize("alpha", [0.0, 1.01, 1.2])
@pytest.mark.parametrize("tokens", [64, 1000, 16384])
def test_one_rank_gets_every_row_and_more_ranks_at_least_their_share(
    tokens: int, alpha: float
) -> None:
    every = tokens * 8
    assert busiest_rank(tokens, 128, 8, 1, alpha).rows == pytest.approx(every, rel=0.01)
    shares = busiest_rank(tokens, 128, 8, np.array([2, 4, 16]), alpha).rows
    assert np.all(shares >= every / np.array([2, 4, 16]) * 0.99)
    assert np.all(np.diff(shares) < 0)


@pytest.mark.parametrize("alpha", [0.0, 1.01, 1.2])
@pytest.mark.parametrize(("tokens", "ep"), [(4, 8), (300, 1), (5000, 16)])
def test_rows_by_expert_add_up_to_the_busiest_rank(tokens: int, ep: int, alpha: float) -> None:
    rows = expert_rows(tokens, 128, 8, ep, alpha)
    load: RankLoad = busiest_rank(tokens, 128, 8, ep, alpha)
    assert np.all(np.diff(rows) <= 0)
    assert rows.sum() == pytest.approx(float(load.rows), rel=0.15)
    assert len(rows) == pytest.approx(float(load.touched), rel=0.25, abs=1.5)


# ---------------------------------------------------------------- the layer


@given(
    st.sampled_from([*DTYPES, *WEIGHT_ONLY]),
    LAWS,
    ALPHAS,
    st.sampled_from(["tokens", "hidden", "ffn"]),
    st.floats(1.0, 1e5),
    st.floats(1.0, 4.0),
    st.sampled_from([0.0, 0.5, 1.0]),
)
def test_more_work_is_never_faster(
    dtype: str, law: tuple[int, int, int], alpha: float, size: str, low: float, more: float,
    crowding: float,
) -> None:  # fmt: skip
    experts, top, ep = law
    shape: dict[str, Any] = {"experts": experts, "experts_per_token": top, "ep": ep, "alpha": alpha}
    shape[size] = np.array([low, low * more])
    found = seconds(dtype=dtype, c={**C, "crowding": crowding}, **shape)
    assert found[1] >= found[0] * (1 - 1e-9)


@given(
    st.sampled_from([*DTYPES, *WEIGHT_ONLY]), LAWS, ALPHAS, st.integers(1, 10**6),
    st.integers(16, 32768), st.integers(16, 32768),
)  # fmt: skip
def test_no_rate_above_the_chip(
    dtype: str, law: tuple[int, int, int], alpha: float, tokens: int, hidden: int, ffn: int
) -> None:
    experts, top, ep = law
    best = {
        **dict.fromkeys(C, 0.0), "peak_share": 1.0, "bandwidth_share": 1.0, "overlap": 60.0
    }  # fmt: skip
    shape: dict[str, Any] = {
        "tokens": tokens, "hidden": hidden, "ffn": ffn, "experts": experts,
        "experts_per_token": top, "ep": ep, "alpha": alpha,
    }  # fmt: skip
    found = seconds(dtype=dtype, c=best, **shape)
    load = busiest_rank(tokens, experts, top, ep, alpha)
    weights = 3.0 * hidden * ffn
    assert found * matrix_peak(CHIP, dtype) >= 2 * load.rows * weights * 0.999
    assert found * CHIP.hbm.bytes_per_s >= load.touched * weights * 0.5 * 0.999


@pytest.mark.parametrize("dtype", ["bf16", "fp8", "int4_wo"])
def test_a_better_chip_is_never_slower(dtype: str) -> None:
    tokens = 2.0 ** np.arange(18)
    base = seconds(tokens=tokens, dtype=dtype)
    wide = tuple(replace(tier, bytes_per_s=2 * tier.bytes_per_s) for tier in CHIP.tiers)
    strong = {name: 2 * rate for name, rate in CHIP.peak_flops_per_s.items()}
    for better in (
        replace(CHIP, tiers=wide),
        replace(CHIP, peak_flops_per_s=strong),
        replace(CHIP, clock_hz=2 * CHIP.clock_hz),
    ):
        assert np.all(seconds(better, dtype, tokens=tokens) <= base)


@pytest.mark.parametrize("name", chip_names())
def test_finite_and_positive_on_every_chip(name: str) -> None:
    sizes = np.array([1.0, 64.0, 1e6])
    for dtype in (*DTYPES, *WEIGHT_ONLY):
        for alpha in (0.0, 1.2):
            found = seconds(load_chip(name), dtype, tokens=sizes, alpha=alpha)
            assert np.all(np.isfinite(found) & (found > 0))


def test_more_ranks_and_narrower_weights_take_less() -> None:
    tokens = np.array([1.0, 64.0, 8192.0])
    assert np.all(seconds(tokens=tokens, tp=8) < seconds(tokens=tokens))
    assert np.all(seconds(tokens=tokens, ep=8) < seconds(tokens=tokens))
    assert np.all(seconds(tokens=tokens, dtype="fp8") < seconds(tokens=tokens))


def test_few_rows_read_the_weights_they_touch() -> None:
    """At one token, eight of 128 experts: time in excess of the launch is theirs to read."""
    c = {**C, "edge": 0.0, "step_cycles": 0.0, "local_passes": 0.0, "global_passes": 0.0}
    c |= {"bandwidth_share": 1.0, "peak_share": 1.0, "tile_rows": 0.0, "overlap": 60.0}
    weights = 8 * 3 * 4096 * 1536 * 2
    found = float(seconds(tokens=1, c=c)) - c["launch_s"]
    assert found == pytest.approx(weights / CHIP.hbm.bytes_per_s, rel=0.01)


def test_known_layers(golden: Callable[..., None]) -> None:
    found = {
        f"{dtype}-{alpha:g}-{tokens}": float(seconds(dtype=dtype, alpha=alpha, tokens=tokens, ep=8))
        for dtype in ("bf16", "fp8_block", "int4_wo")
        for alpha in (0.0, 1.2)
        for tokens in (1, 256, 8192)
    }
    golden("family_moe", found, rel=1e-6)


def test_a_million_shapes_are_priced_in_seconds() -> None:
    random, count = np.random.default_rng(0), 1_000_000
    shape = {
        "tokens": random.integers(1, 20000, count), "hidden": random.integers(1, 8192, count),
        "ffn": random.integers(1, 8192, count), "experts": random.choice([8, 128, 256], count),
        "experts_per_token": random.choice([2, 8], count), "tp": random.choice([1, 2, 4], count),
        "ep": random.choice([1, 2, 8], count), "alpha": random.choice([0.0, 1.01, 1.2], count),
    }  # fmt: skip
    MOE.seconds(shape, CHIP, "bf16", C)  # the tables of its routing laws are made once
    start = time.perf_counter()
    MOE.seconds(shape, CHIP, "bf16", C)
    assert time.perf_counter() - start < 6.0  # 0.6 on an idle core


# ---------------------------------------------------------------- measured kernels


@pytest.mark.parametrize(
    ("chip", "library", "dtype", "median", "high"),
    [
        ("h200-sxm-141gb", "vllm", "fp8_block", 0.08, 0.25),
        ("h100-sxm-80gb", "vllm", "int4_wo", 0.13, 0.40),
        pytest.param("h100-sxm-80gb", "trtllm", "fp8", 0.12, 0.35, marks=pytest.mark.slow),
        pytest.param("a100-sxm-80gb", "vllm", "bf16", 0.15, 0.45, marks=pytest.mark.slow),
    ],
)
def test_shapes_held_out_of_the_fit(
    data_dir: Path, chip: str, library: str, dtype: str, median: float, high: float
) -> None:
    sample = next(
        s for s in kernel_samples(data_dir, "moe")
        if (s.chip, s.implementation, s.dtype) == (chip, library, dtype)
    )  # fmt: skip
    errors = np.abs(held_out(sample) / sample.seconds - 1)
    plain = dict.fromkeys(C, 0.0) | {"peak_share": 1.0, "bandwidth_share": 1.0, "overlap": 60.0}
    roofline = np.abs(predict("moe", sample, plain) / sample.seconds - 1)
    assert np.median(errors) < median < np.median(roofline)
    assert np.quantile(errors, 0.9) < high


@pytest.mark.slow
@pytest.mark.parametrize("library", ["trtllm", "vllm"])
@pytest.mark.parametrize(("fitted", "scored"), [("a100", "h"), ("h", "a100")])
def test_the_other_generation_from_its_datasheet(
    data_dir: Path, library: str, fitted: str, scored: str
) -> None:
    samples = [
        s for s in kernel_samples(data_dir, "moe")
        if s.implementation == library and s.dtype == "bf16"
    ]  # fmt: skip
    c = fit_coefficients("moe", [s for s in samples if s.chip.startswith(fitted)])
    for sample in (s for s in samples if s.chip.startswith(scored)):
        errors = np.abs(predict("moe", sample, c) / sample.seconds - 1)
        assert np.median(errors) < 0.25

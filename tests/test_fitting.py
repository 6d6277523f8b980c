"""Fits find what made the data, whole shapes are held out, and outliers do not pull."""

from __future__ import annotations

import numpy as np
import pytest

from hwmodels.catalogue import load_chip
from hwmodels.families import FAMILIES
from simcore.uncertainty import Z_80
from validation.accuracy.scores import coverage, pair_order, score
from validation.datasets import Sample
from validation.fitting import deviation_of, fit_coefficients, fit_curve, folds, held_out

CHIP = "a100-sxm-80gb"


def made(noise: float = 0.0, outliers: int = 0) -> Sample:
    """Return products timed by the family's own formula, with noise."""
    draw = np.random.default_rng(1)
    n, k = (2.0 ** draw.integers(8, 14, 40) for _ in "nk")
    m = 2.0 ** np.arange(0, 13)
    shape = {"m": np.tile(m, 40), "n": np.repeat(n, 13), "k": np.repeat(k, 13)}
    family = FAMILIES["matmul"]
    seconds = family.seconds(shape, load_chip(CHIP), "bf16", family.start())
    seconds = seconds * np.exp(noise * draw.standard_normal(len(seconds)))
    seconds[:outliers] *= 20
    return Sample("matmul", CHIP, "made", "bf16", shape, seconds, "this test")


def test_a_fit_finds_what_made_the_data() -> None:
    sample = made()
    found = fit_coefficients("matmul", [sample])
    predicted = FAMILIES["matmul"].seconds(sample.shape, load_chip(CHIP), "bf16", found)
    assert score(predicted, sample.seconds).p90 < 0.01


def test_a_few_outliers_do_not_pull_the_fit() -> None:
    sample = made(0.02, outliers=20)
    found = fit_coefficients("matmul", [sample])
    predicted = FAMILIES["matmul"].seconds(sample.shape, load_chip(CHIP), "bf16", found)
    assert score(predicted[20:], sample.seconds[20:]).median < 0.04


def test_a_shape_is_held_out_with_all_its_rows() -> None:
    sample = made()
    number = folds(sample)
    assert set(number) == {0, 1, 2}
    shapes = list(zip(sample.shape["n"], sample.shape["k"], strict=True))
    for shape in set(shapes):
        assert len({f for f, other in zip(number, shapes, strict=True) if other == shape}) == 1


def test_the_interval_of_held_out_rows_covers_what_it_says() -> None:
    sample = made(0.1)
    predicted = held_out(sample)
    inside = coverage(predicted, sample.seconds, deviation_of(sample, predicted), Z_80)
    assert inside == pytest.approx(0.8, abs=0.06)


def test_a_curve_carries_its_held_out_errors() -> None:
    curve = fit_curve(made(0.1))
    assert curve.provenance["rows"] == 520
    assert curve.provenance["held_out_median_error"] == pytest.approx(0.0674, abs=0.02)
    assert np.mean([deviation for _, deviation in curve.spread]) == pytest.approx(0.1, rel=0.2)


def test_scores() -> None:
    measured = np.array([1.0, 2.0, 4.0, 8.0])
    assert score(measured * 1.1, measured).median == pytest.approx(0.1)
    assert pair_order(measured * 3, measured) == 1.0
    assert pair_order(1 / measured, measured) == 0.0
    assert np.isnan(pair_order(measured[:1], measured[:1]))
    assert coverage(measured, measured * np.array([1, 1.5, 0.9, 1]), 0.1, 1.3) == 0.75

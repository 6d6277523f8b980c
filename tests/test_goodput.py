"""Whole runs from one step: days, goodput, cost; steps to a loss and the batch that is soonest."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simcore.critical_batch import (
    DATA_EXPONENT,
    LossCurve,
    StepsToLoss,
    best_batch,
    best_degree,
    critical_batch,
    fit_steps,
    seconds_to_loss,
)
from simcore.errors import InputError
from simcore.faults import Cause, Faults, part_rates, system_rate_per_s
from simcore.goodput import Budget, Step, forecast, no_faults
from simcore.stragglers import Slow

STEP = Step(10.0, 7.0, 2.0, 1_000_000)
LLAMA = 1 / system_rate_per_s(part_rates("llama-3.1-405b"), 16384, 2048)


def llama_faults(down_s: float = 600.0) -> Faults:
    return Faults((Cause("any", 1 / LLAMA, down_s),), stall_s=30.0)


def test_a_run_without_faults_is_its_steps() -> None:
    found, reason = forecast(STEP, Budget(tokens=10**9 + 1), 16, no_faults(), Slow(), 2.0)
    assert not reason
    assert found["steps"] == 1001
    assert found["days"] == pytest.approx(10010 / 86400)
    assert found["goodput_fraction"] == found["effective_training_fraction"] == 1.0
    assert found["effective_tokens_per_s"] == pytest.approx(1e5)
    assert found["run_cost_usd"] == pytest.approx(16 * 2.0 * 10010 / 3600)
    assert (found["mtbf_s"], found["expected_failures"]) == (None, 0.0)


def test_parts_sum_to_the_days_and_goodput_counts_stragglers() -> None:
    slow = Slow(0.001, 1.2)
    found, _ = forecast(STEP, Budget(steps=100_000), 16384, llama_faults(), slow)
    assert sum(found["run_parts_s"].values()) == pytest.approx(found["days"] * 86400)
    share = STEP.step_s / found["slowed_step_s"]
    assert found["goodput_fraction"] == pytest.approx(found["effective_training_fraction"] * share)
    assert "run_cost_usd" not in found


def test_failures_of_54_days_at_16384_devices() -> None:
    """The rate is Llama 3's: days of wall clock at it hold as many failures as were counted."""
    found, _ = forecast(STEP, Budget(steps=400_000), 16384, llama_faults(), Slow())
    assert found["expected_failures"] == pytest.approx(found["days"] / 54 * 419)


def test_what_cannot_finish_says_why() -> None:
    found, reason = forecast(STEP, Budget(steps=10), 16384, llama_faults(1e5), Slow(), 1.0)
    assert found["finishes"] is False
    assert "detection and restart take" in reason
    assert found["days"] is found["run_cost_usd"] is found["expected_failures"] is None
    busy = Faults((Cause("any", 1 / 100, 90.0),), stall_s=600.0)
    found, reason = forecast(STEP, Budget(steps=1000), 8, busy, Slow())
    assert not found["finishes"]
    assert "of the time would be of use" in reason


# ---------------------------------------------------------------- steps to a loss


@given(st.floats(10, 1e5), st.floats(1, 1e5))
def test_the_law_of_steps(least: float, critical: float) -> None:
    law = StepsToLoss(least, critical)
    assert law.steps(critical) == pytest.approx(2 * least)
    assert law.samples(critical) == pytest.approx(2 * least * critical)
    small = critical * 1e-6  # linear scaling: the product of steps and batch stays
    assert law.steps(small) == pytest.approx(2 * law.steps(2 * small), rel=1e-5)
    linear = least * critical / law.largest_batch()
    assert law.steps(law.largest_batch()) == pytest.approx(1.2 * linear)
    assert law.overhead(law.largest_batch()) == pytest.approx(0.2)


@given(st.floats(10, 1e5), st.floats(1, 1e5))
def test_a_fit_finds_the_law_again(least: float, critical: float) -> None:
    law, batches = StepsToLoss(least, critical), critical * np.array([0.1, 0.5, 1.0, 4.0])
    found = fit_steps(list(batches), list(np.asarray(law.steps(batches))))
    assert found.least_steps == pytest.approx(least, rel=1e-6)
    assert found.critical_batch == pytest.approx(critical, rel=1e-6)


def test_steps_that_do_not_fall_are_refused() -> None:
    with pytest.raises(InputError, match="do not fall"):
        fit_steps([1, 2, 4], [10, 20, 40])
    with pytest.raises(InputError, match="two sizes"):
        fit_steps([1, 1], [10, 10])
    with pytest.raises(InputError, match="above 0"):
        StepsToLoss(0, 1)


@given(st.floats(1, 1e4), st.floats(0.01, 100), st.floats(1e-3, 10))
def test_the_best_batch_of_a_linear_step(critical: float, fixed: float, each: float) -> None:
    """(1 + Bc / B)(f + e B) is least at sqrt(Bc f / e)."""
    law = StepsToLoss(1000, critical)
    exact = math.sqrt(critical * fixed / each)
    batches = list(exact * np.geomspace(0.05, 20, 401))
    found = best_batch(law, batches, lambda b: fixed + each * b)
    assert found == pytest.approx(exact, rel=0.016)


def step_s(degree: int) -> float:
    """A replica's compute, and an all-reduce whose latency grows with the degree."""
    return 1.0 + 0.02 * math.log2(degree) + 0.001 * degree


def degree_for(tokens: float) -> int:
    law = StepsToLoss(5000, critical_batch(tokens, known_batch=100, known_tokens=1e9))
    found = best_degree(law, range(1, 4096), 8, step_s)
    assert found is not None
    return found


def test_the_best_degree_follows_data() -> None:
    """Zhang et al. (2024): the critical batch grows with tokens; no size of a network enters."""
    degrees = [degree_for(tokens) for tokens in (1e9, 1e10, 1e11, 1e12)]
    assert degrees == sorted(set(degrees))


@given(st.floats(1e8, 1e13), st.floats(1.01, 100))
def test_critical_batch_is_a_power_of_the_tokens(tokens: float, times: float) -> None:
    one, more = (critical_batch(t, 256, 3e9) for t in (tokens, times * tokens))
    assert more / one == pytest.approx(times**DATA_EXPONENT)
    assert critical_batch(3e9, 256, 3e9) == 256


def test_a_budget_of_device_seconds_bounds_the_degree() -> None:
    law = StepsToLoss(1000, 64)
    free = best_degree(law, range(1, 512), 1, step_s)
    bounded = best_degree(law, range(1, 512), 1, step_s, device_seconds=1.2 * 64_000)
    assert free is not None
    assert bounded is not None
    assert bounded < free
    assert bounded * seconds_to_loss(law, bounded, step_s(bounded)) <= 1.2 * 64_000
    assert best_degree(law, range(1, 9), 1, step_s, device_seconds=1.0) is None


@given(st.floats(1e8, 1e12), st.floats(1e9, 1e13))
def test_a_loss_curve_and_its_inverse(parameters: float, tokens: float) -> None:
    curve = LossCurve(1.7, 400, 0.34, 410, 0.28)
    loss = curve.loss(parameters, tokens)
    assert curve.tokens(parameters, loss) == pytest.approx(tokens, rel=1e-6)
    assert curve.tokens(parameters, 1.0) == math.inf

"""Failures and checkpoints: closed forms against scipy, Monte Carlo and one another."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, optimize, special, stats

from simcore.errors import InputError
from simcore.fault_runs import simulate_run, simulate_shrinking
from simcore.faults import (
    DAY_S,
    HOUR_S,
    Cause,
    Faults,
    best_interval_s,
    daly_interval_s,
    failure_records,
    interval_cost_s,
    part_rates,
    run_time,
    system_rate_per_s,
    young_interval_s,
)
from simcore.stragglers import (
    Slow,
    best_backups,
    chance_of_any,
    expected_kth_s,
    exponential_kth_s,
    harmonic,
    shrink_share,
    slowed_step_s,
)

RUNS = 400
mtbfs = st.floats(1e3, 1e7)
shares = st.floats(1e-6, 1.5)


def faults(
    mtbf_s: float = 3600.0, down_s: float = 300.0, stall_s: float = 30.0, **more: float
) -> Faults:
    return Faults((Cause("any", 1 / mtbf_s, down_s),), stall_s, **more)


# ---------------------------------------------------------------- rates


def test_the_llama_record_counts_419_and_gives_them_back() -> None:
    record = failure_records()["llama-3.1-405b"]
    assert sum(record["failures"].values()) == 419
    rate = system_rate_per_s(part_rates("llama-3.1-405b"), 16384, 2048)
    assert rate * 54 * DAY_S == pytest.approx(419)
    assert 1 / rate / HOUR_S == pytest.approx(3.09, abs=0.01)  # one in about three hours


def test_rates_of_a_node_give_the_published_mean_times() -> None:
    """Kokolis et al. (2025): 1.8 hours on 16,384 GPUs and 0.23 hours on 131,072 at RSC-1's rate."""
    rates = part_rates("rsc-1")
    assert 1 / system_rate_per_s(rates, 16384, 2048) / HOUR_S == pytest.approx(1.8, abs=0.05)
    assert 1 / system_rate_per_s(rates, 131072, 16384) / HOUR_S == pytest.approx(0.23, abs=0.005)


def test_time_between_failures_falls_as_one_over_the_parts() -> None:
    rates = {k: v for k, v in part_rates("llama-3.1-405b").items() if k != "job"}
    one = system_rate_per_s(rates, 8, 1)
    assert system_rate_per_s(rates, 8000, 1000) == pytest.approx(1000 * one)
    whole = part_rates("llama-3.1-405b")
    assert system_rate_per_s(whole, 8000, 1000) < 1000 * system_rate_per_s(whole, 8, 1)  # jobs


def test_an_unknown_record_is_refused_with_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'rsc-1'"):
        part_rates("rsc1")


def test_every_record_has_a_source() -> None:
    for name, record in failure_records().items():
        assert record["source"], name
        assert record["about"], name


# ---------------------------------------------------------------- the best interval


@given(mtbfs, shares)
def test_best_interval_is_lamberts(mtbf: float, share: float) -> None:
    """x = 1 + W(-exp(-1 - C / M)), the closed form of (1 - x) exp(x + C / M) = 1."""
    expected = 1 + special.lambertw(-math.exp(-1 - share)).real
    assert best_interval_s(share * mtbf, mtbf) == pytest.approx(expected * mtbf, rel=1e-5)


@given(mtbfs, st.floats(1e-4, 1.0))
def test_best_interval_minimises_the_cost(mtbf: float, share: float) -> None:
    case = faults(mtbf, 0.1 * mtbf, share * mtbf)
    found = optimize.minimize_scalar(
        lambda x: interval_cost_s(case, x * mtbf) / x, bounds=(1e-4, 5), method="bounded",
        options={"xatol": 1e-9},
    )  # fmt: skip
    best = best_interval_s(case.stall_s, mtbf)
    cost = interval_cost_s(case, best) / (best / mtbf)
    assert cost <= found.fun * (1 + 1e-9)


@given(mtbfs, st.floats(1e-6, 0.5))
def test_daly_is_close_and_young_is_its_first_term(mtbf: float, share: float) -> None:
    stall, case = share * mtbf, faults(mtbf, 0.0, share * mtbf)
    best = best_interval_s(stall, mtbf)
    assert daly_interval_s(stall, mtbf) == pytest.approx(best, rel=0.01)
    if share < 1e-3:
        assert young_interval_s(stall, mtbf) == pytest.approx(best, rel=0.04)
    for other in (daly_interval_s(stall, mtbf), young_interval_s(stall, mtbf)):
        assert interval_cost_s(case, other) / other >= interval_cost_s(case, best) / best * 0.999999


def test_best_interval_at_the_ends() -> None:
    assert best_interval_s(10.0, math.inf) == math.inf
    assert best_interval_s(0.0, 100.0) == 0.0
    assert daly_interval_s(500.0, 100.0) == 100.0


@given(st.floats(0.0, 100.0), st.floats(0.0, 1000.0))
def test_intervals_begin_after_the_last_copy_is_written(stall: float, write: float) -> None:
    case = faults(stall_s=stall, write_s=write)
    assert case.every_s() + case.stall_s >= write
    if case.shortest_s > 1e-9:
        with pytest.raises(InputError, match="before the last one is written"):
            dataclasses.replace(case, interval_s=0.5 * case.shortest_s)


# ---------------------------------------------------------------- Monte Carlo equals closed forms


def sample(case: Faults, work_s: float) -> np.ndarray:
    return np.array([simulate_run(case, work_s, seed).total_s for seed in range(RUNS)])


def agrees(draws: np.ndarray, expected: float) -> bool:
    """Within four standard errors: a right formula fails once in 16,000 such tests."""
    error = draws.std(ddof=1) / math.sqrt(draws.size)
    return abs(draws.mean() - expected) < 4 * error


CASES = [
    faults(interval_s=600.0),
    faults(mtbf_s=1000.0, down_s=500.0, interval_s=300.0),
    faults(mtbf_s=20_000.0),
    Faults(
        (Cause("device", 1 / 5000, 600.0), Cause("link", 1 / 9000, 60.0), Cause("job", 1 / 2e4, 5)),
        stall_s=20.0,
        interval_s=500.0,
    ),
]


@pytest.mark.parametrize("case", CASES)
def test_runs_take_what_the_closed_form_says(case: Faults) -> None:
    work = 100 * case.every_s()
    assert agrees(sample(case, work), run_time(case, work).total_s)


@pytest.mark.parametrize("write", [60.0, 250.0, 600.0])
def test_runs_with_copies_in_the_background(write: float) -> None:
    """The last copy is waited for by nobody: cost x (1 - exp(-write / M)) less, exactly."""
    case = faults(mtbf_s=3000.0, stall_s=5.0, write_s=write, interval_s=600.0)
    cost, count = interval_cost_s(case, 600.0), 60
    exact = count * cost + cost * math.expm1(-write / case.mtbf_s)
    assert run_time(case, count * 600.0).total_s == pytest.approx(count * cost)
    assert agrees(sample(case, count * 600.0), exact)


def test_the_parts_of_a_run_agree_too() -> None:
    case, work = CASES[3], 100 * 500.0
    runs, expected = [simulate_run(case, work, seed) for seed in range(RUNS)], run_time(case, work)
    for part in ("lost_s", "down_s", "failures"):
        assert agrees(np.array([getattr(run, part) for run in runs]), getattr(expected, part)), part


def test_announced_preemptions_only_pause() -> None:
    case = dataclasses.replace(CASES[0], pause_per_s=1 / 7200, pause_s=900.0)
    work = 100 * 600.0
    assert agrees(sample(case, work), run_time(case, work).total_s)
    still, paused = run_time(CASES[0], work), run_time(case, work)
    assert paused.total_s == pytest.approx(still.total_s * (1 + 900 / 7200))
    assert paused.lost_s == pytest.approx(still.lost_s)


def test_a_wrong_formula_would_be_caught() -> None:
    """Leaving out failures during restarts, the commonest shortcut, is outside the error."""
    case = CASES[1]
    work, mtbf = 100 * 300.0, case.mtbf_s
    shortcut = 100 * (mtbf + 500.0) * math.expm1(330.0 / mtbf)
    assert not agrees(sample(case, work), shortcut)


def test_equal_seeds_give_equal_runs() -> None:
    assert simulate_run(CASES[3], 1e5, 7) == simulate_run(CASES[3], 1e5, 7)
    assert simulate_run(CASES[3], 1e5, 7) != simulate_run(CASES[3], 1e5, 8)


# ---------------------------------------------------------------- laws of runs


@given(mtbfs, st.floats(0, 2), st.floats(1e-4, 1), st.floats(1.0, 1e3))
def test_more_failures_never_help(mtbf: float, down: float, stall: float, work: float) -> None:
    case = faults(mtbf, down * mtbf, stall * mtbf)
    rarer = faults(2 * mtbf, down * mtbf, stall * mtbf)
    one, two = run_time(case, work * mtbf), run_time(rarer, work * mtbf)
    assert work * mtbf <= two.total_s <= one.total_s * (1 + 1e-12)
    assert 0 < one.effective_ratio <= 1
    assert one.lost_s >= -1e-9 * one.total_s


@given(mtbfs, st.floats(1e-4, 0.3), st.floats(0.01, 1.0))
def test_copies_in_the_background_never_cost_more_than_waiting(
    mtbf: float, stall: float, share: float
) -> None:
    every = 2 * stall * mtbf
    waiting = faults(mtbf, 0.0, stall * mtbf, interval_s=every)
    behind = faults(
        mtbf, 0.0, share * stall * mtbf, write_s=(1 - share) * stall * mtbf, interval_s=every
    )
    assert run_time(behind, 1e2 * every).total_s <= run_time(waiting, 1e2 * every).total_s * (
        1 + 1e-12
    )


def test_nothing_fails() -> None:
    never = Faults((Cause("none", 0.0, 10.0),), 5.0, interval_s=100.0)
    assert run_time(never, 1000.0).total_s == simulate_run(never, 1000.0).total_s == 1050.0
    assert never.mtbf_s == math.inf


def test_free_checkpoints_lose_only_restarts() -> None:
    case = faults(1000.0, 100.0, 0.0)
    assert run_time(case, 1e5).lost_s == pytest.approx(0.0, abs=1e-6)
    nearly = faults(1000.0, 100.0, 1e-7)
    assert run_time(nearly, 1e5).total_s == pytest.approx(run_time(case, 1e5).total_s, rel=1e-3)


def test_a_restart_longer_than_the_time_between_failures_never_ends() -> None:
    case = faults(100.0, 1000.0, 1.0)
    assert "restart faster" in case.reason()
    with pytest.raises(InputError, match="never ends"):
        simulate_run(case, 1e5)
    assert not faults().reason()


def test_senseless_faults_are_refused() -> None:
    for bad in (lambda: faults(-1.0), lambda: faults(down_s=-1.0), lambda: faults(stall_s=-1.0)):
        with pytest.raises(InputError):
            bad()


# ---------------------------------------------------------------- slow ranks, backups, shrinking


@given(st.integers(1, 3000), st.data())
def test_order_statistics_of_exponentials(n: int, data: st.DataObject) -> None:
    backups = data.draw(st.integers(0, n - 1))
    numeric = expected_kth_s(n, backups, lambda chance: -2.0 * np.log(chance))
    assert numeric == pytest.approx(exponential_kth_s(n, backups, 2.0), rel=1e-3)


@pytest.mark.parametrize(("n", "backups"), [(1, 0), (8, 0), (8, 3), (64, 0), (64, 4), (1000, 10)])
def test_order_statistics_of_a_lognormal(n: int, backups: int) -> None:
    law = stats.lognorm(0.3, scale=2.0)
    beta = stats.beta(n - backups, backups + 1)
    exact = integrate.quad(
        lambda u: law.ppf(u) * beta.pdf(u), 0, 1, limit=500, points=[beta.mean()]
    )[0]
    assert expected_kth_s(n, backups, law.isf) == pytest.approx(exact, rel=2e-3)
    draws = np.sort(law.rvs((2000, n), random_state=1), axis=1)[:, n - backups - 1]
    assert agrees(draws, expected_kth_s(n, backups, law.isf))


@given(st.integers(2, 200))
def test_each_backup_shortens_the_step(n: int) -> None:
    times = [exponential_kth_s(n, b, 1.0) for b in range(n)]
    assert all(a > b for a, b in pairwise(times))
    assert times[-1] == pytest.approx(1 / n)
    assert harmonic(n) == pytest.approx(special.digamma(n + 1) + np.euler_gamma)


def test_best_backups_weigh_the_gradients_left_out() -> None:
    n = 50
    alike = best_backups(n, lambda b: 10 + exponential_kth_s(n, b, 1.0), lambda b: (n - b) / n)
    wild = best_backups(n, lambda b: 10 + exponential_kth_s(n, b, 40.0), lambda b: (n - b) / n)
    assert 0 <= alike < wild < n
    assert best_backups(n, lambda b: 1.0, lambda b: (n - b) / n) == 0
    with pytest.raises(InputError, match="below the 4 workers"):
        exponential_kth_s(4, 4, 1.0)


@given(st.floats(0, 1), st.integers(1, 100))
def test_chance_that_any_is_slow(chance: float, count: int) -> None:
    assert chance_of_any(chance, count) == pytest.approx(1 - (1 - chance) ** count, abs=1e-12)


def test_a_step_waits_for_slow_ranks_and_links() -> None:
    assert slowed_step_s(10.0, 8.0, 1.0, 4, Slow()) == 10.0
    assert slowed_step_s(10.0, 8.0, 1.0, 4, Slow(1.0, 1.5)) == pytest.approx(14.0)
    assert slowed_step_s(10.0, 8.0, 1.0, 4, Slow(0, 1, 1.0, 3.0)) == pytest.approx(12.0)
    random = np.random.default_rng(0)
    slow = (random.random((20_000, 64)) < 0.01).any(axis=1)
    expected = slowed_step_s(10.0, 8.0, 1.0, 64, Slow(0.01, 1.5))
    assert agrees(np.where(slow, 14.0, 10.0), expected)
    with pytest.raises(InputError, match="slow link"):
        Slow(0.0, 1.0, 2.0, 1.0)


@pytest.mark.parametrize(("rate", "repair"), [(1e-3, 100.0), (1e-3, 2000.0)])
def test_shrinking_runs_keep_the_share_at_work(rate: float, repair: float) -> None:
    draws = np.array([simulate_shrinking(32, rate, repair, 2e5, seed) for seed in range(40)])
    assert draws.mean() == pytest.approx(shrink_share(rate, repair), rel=0.02)

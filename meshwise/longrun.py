"""A training run of so many tokens: days, goodput and cost beside the metrics of its step."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from meshwise.setting import Setting
from simcore.fault_runs import simulate_run
from simcore.faults import DAY_S, Faults
from simcore.goodput import Budget, Step, forecast, no_faults
from simcore.metrics import Metrics
from simcore.scenario import Scenario
from simcore.scenario.workloads import TrainWorkload
from simcore.stragglers import Slow
from simcore.timeline import Timeline
from simcore.workloads import TrainStep

DRAWS = 100
MOST_FAILURES = 200_000  # over all draws, about ten seconds


def run_metrics(
    scenario: Scenario, setting: Setting, timeline: Timeline, engine: str
) -> tuple[Metrics, tuple[str, ...], tuple[str, ...]]:
    """Return the metrics of the whole run, assumptions and warnings; nothing without its length.

    With the engine "simulate" runs are also drawn at random, failure by failure: their mean and
    80 % interval stand beside the expectation.
    """
    table = scenario.workload
    assert isinstance(table, TrainWorkload)
    if table.tokens is None and table.steps is None:
        return {}, (), ()
    cluster, given = setting.cluster, scenario.faults
    faults = given.faults(cluster.world, cluster.nodes) if given else no_faults()
    parallel = scenario.strategy()
    backups = parallel.backup_workers if parallel else 0
    slow = replace(given.slow() if given else Slow(), spared=backups)
    busiest = max(timeline.times.values(), key=lambda times: times.compute_s)
    work = scenario.work()
    assert isinstance(work, TrainStep)
    tokens = work.tokens
    if parallel and backups:  # what is dropped teaches nothing
        tokens = tokens * (parallel.dp - backups) // parallel.dp
    step = Step(timeline.step_s, busiest.compute_s, busiest.exposed_s, tokens)
    budget, price = Budget(table.tokens, table.steps), cluster.chip.price_per_hour
    metrics, reason = forecast(step, budget, cluster.world, faults, slow, price)
    warnings = (f"the run does not finish: {reason}.",) if reason else ()
    notes = _notes(scenario)
    if engine == "simulate" and given and not reason:
        drawn = _drawn(faults, metrics, scenario.run.seed)
        metrics |= drawn
        notes += (f"simulated_days are {drawn['simulated_runs']} runs with failures at random.",)
    return metrics, notes, warnings


def _notes(scenario: Scenario) -> tuple[str, ...]:
    """Return what the metrics of a whole run rest on."""
    if scenario.faults is None:
        return ("without [faults] a run is its steps: nothing fails, nothing is saved.",)
    origin = scenario.faults.rates
    rate = f"as counted in {origin}" if origin else "of every device"
    return (
        f"failures are independent and exponential, {rate}; each loses the work since the last "
        "checkpoint, and a failure during a restart begins it anew.",
        "goodput_fraction is the time that the bare steps need over all; "
        "effective_training_fraction counts steps with stragglers as useful too.",
    )


def _drawn(faults: Faults, metrics: Metrics, seed: int) -> Metrics:
    """Return mean and 80 % interval of the days of runs drawn at random, as many as time allows."""
    work_s = metrics["steps"] * metrics["slowed_step_s"]
    draws = int(min(DRAWS, MOST_FAILURES / max(metrics["expected_failures"], 1.0)))
    if draws == 0 or faults.every_s() == 0:
        return {"simulated_runs": 0}
    days = [simulate_run(faults, work_s, seed + i).total_s / DAY_S for i in range(draws)]
    low, high = np.quantile(days, [0.1, 0.9])
    return {
        "simulated_runs": draws,
        "simulated_days": float(np.mean(days)),
        "simulated_days_interval": [float(low), float(high)],
    }

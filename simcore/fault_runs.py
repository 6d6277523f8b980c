"""Runs with failures, event by event: the Monte Carlo beside the closed forms of `simcore.faults`.

Between failures nothing happens but work and checkpoints, so a run jumps from failure to failure.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

import numpy as np

from simcore.errors import InputError
from simcore.faults import Faults, RunTime


@dataclass(slots=True)
class _Run:
    """One run under way."""

    faults: Faults
    random: np.random.Generator
    every_s: float
    down_s: float = 0.0
    failures: int = 0

    def recover(self) -> float:
        """Return the seconds until work goes on; failures on the way begin the restart anew."""
        rates = np.array([cause.rate_per_s for cause in self.faults.causes])
        spent = 0.0
        while True:
            self.failures += 1
            cause = self.faults.causes[self.random.choice(rates.size, p=rates / rates.sum())]
            alive = self.random.exponential(self.faults.mtbf_s)
            if alive >= cause.down_s:
                return spent + cause.down_s
            spent += alive

    def safe(self, alive_s: float) -> int:
        """Return how many intervals are safe after ``alive_s`` since a safe copy was loaded."""
        period = self.every_s + self.faults.stall_s
        count = math.floor(alive_s / period)
        written = alive_s - count * period >= self.faults.write_s
        return count if written or count == 0 else count - 1


def simulate_run(faults: Faults, work_s: float, seed: int = 0) -> RunTime:
    """Return the seconds of one run of ``work_s`` of useful work, failures drawn at random.

    A last interval may be shorter. Raises `InputError` where the run would never end.
    """
    if faults.reason():
        raise InputError(f"the run never ends: {faults.reason()}.")
    every = min(faults.every_s(), work_s) or faults.shortest_s
    if every == 0:
        raise InputError("free checkpoints without an interval: give interval_s.")
    run = _Run(faults, np.random.default_rng(seed), every)
    intervals = work_s / every
    count = math.ceil(intervals - 1e-9)
    whole = work_s + intervals * faults.stall_s  # seconds of work and stalls if nothing fails
    period, saved, clock = every + faults.stall_s, 0, 0.0
    while True:
        left = whole - saved * period
        alive = run.random.exponential(faults.mtbf_s) if faults.rate_per_s else math.inf
        if alive >= left:
            clock += left
            break
        saved = min(saved + run.safe(alive), count)
        down = run.recover()
        run.down_s += down
        clock += alive + down
    pauses = run.random.poisson(faults.pause_per_s * clock)
    stalls = intervals * faults.stall_s
    return RunTime(
        work_s,
        stalls,
        clock - run.down_s - work_s - stalls,
        run.down_s,
        pauses * faults.pause_s,
        run.failures,
    )


def simulate_shrinking(
    replicas: int, rate_per_s: float, repair_s: float, horizon_s: float, seed: int = 0
) -> float:
    """Return the mean share of ``replicas`` at work while broken ones are away for ``repair_s``.

    Each replica at work fails with ``rate_per_s``; repairs are exponential and do not wait for one
    another. The oracle of `simcore.stragglers.shrink_share`.
    """
    random = np.random.default_rng(seed)
    events = [(random.exponential(1 / rate_per_s), True) for _ in range(replicas)]
    heapq.heapify(events)
    clock, at_work, area = 0.0, replicas, 0.0
    while events[0][0] < horizon_s:
        when, breaks = heapq.heappop(events)
        area += at_work * (when - clock)
        clock = when
        at_work += -1 if breaks else 1
        mean = repair_s if breaks else 1 / rate_per_s
        heapq.heappush(events, (when + random.exponential(mean), not breaks))
    return (area + at_work * (horizon_s - clock)) / (replicas * horizon_s)

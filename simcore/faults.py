"""Failures of a long run, and what checkpoints save of it: rates, closed forms, the best interval.

Failures are exponential, independent and without memory; those of many parts add up, so the mean
time between them falls as 1 / parts. A run saves its state after every ``interval_s`` of useful
work, which stalls it for ``stall_s``; the copy is safe ``write_s`` after that (0 where the run
waits for it). A failure costs detection, restart and the work since the last safe copy; failures
during a restart begin it anew. With M the mean time between failures, R detection and restart, the
expected seconds per interval of work are

    M exp((R + write) / M) (exp((interval + stall) / M) - 1),

which for write = 0 is equation 20 of Daly (2006, A higher order estimate of the optimum checkpoint
interval for restart dumps). All functions of this module are exact in this model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from simcore.errors import InputError, unknown

HOUR_S, DAY_S = 3600.0, 86400.0


# ---------------------------------------------------------------- rates


@cache
def failure_records() -> dict[str, dict[str, Any]]:
    """Return the published records by name: failures counted on a cluster, or rates of parts."""
    path = Path(__file__).parent / "data" / "failures.json"
    found: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return found


def parts_of(devices: int, nodes: int) -> dict[str, int]:
    """Return how many of each kind of part a job has; one network link per device."""
    return {"device": devices, "node": nodes, "link": devices, "job": 1}


def part_rates(name: str) -> dict[str, float]:
    """Return failures per second of one part of each kind, as a published record counts them.

    Raises `InputError` for a name that is in no record.
    """
    records = failure_records()
    if name not in records:
        raise unknown("failure record", name, records)
    record = records[name]
    if "per_part_and_day" in record:
        return {part: each / DAY_S for part, each in record["per_part_and_day"].items()}
    counts = parts_of(record["devices"], record["nodes"])
    return {
        part: failures / (counts[part] * record["days"] * DAY_S)
        for part, failures in record["failures"].items()
    }


def system_rate_per_s(rates: Mapping[str, float], devices: int, nodes: int) -> float:
    """Return failures per second of a job: those of all its parts."""
    counts = parts_of(devices, nodes)
    return sum(rate * counts[part] for part, rate in rates.items())


# ---------------------------------------------------------------- what happens


@dataclass(frozen=True, slots=True)
class Cause:
    """One cause of failures of the whole job: how often, and seconds until work goes on."""

    name: str
    rate_per_s: float
    down_s: float


@dataclass(frozen=True, slots=True)
class Faults:
    """What can interrupt a job, and how it saves its state.

    ``stall_s``: seconds that a checkpoint halts the run; ``write_s``: seconds after that until the
    copy is safe. ``interval_s``: useful seconds between checkpoints, None for the best.
    ``pause_per_s`` and ``pause_s``: preemptions that are announced early enough to save everything.
    """

    causes: tuple[Cause, ...]
    stall_s: float
    write_s: float = 0.0
    interval_s: float | None = None
    pause_per_s: float = 0.0
    pause_s: float = 0.0

    def __post_init__(self) -> None:
        for cause in self.causes:
            if cause.rate_per_s < 0 or cause.down_s < 0:
                raise InputError(
                    f"failures of {cause.name!r} need a rate and seconds of 0 or more."
                )
        if self.stall_s < 0 or self.write_s < 0:
            raise InputError("a checkpoint needs stall_s and write_s of 0 or more.")
        if self.interval_s is not None and self.interval_s < self.shortest_s:
            raise InputError(
                f"a checkpoint every {self.interval_s:g} s begins before the last one is written: "
                f"give at least {self.shortest_s:g} s."
            )

    @property
    def shortest_s(self) -> float:
        """Useful seconds of the shortest interval: a checkpoint ends before the next begins."""
        return max(0.0, self.write_s - self.stall_s)

    @property
    def rate_per_s(self) -> float:
        """Failures per second of the job, whatever the cause."""
        return sum(cause.rate_per_s for cause in self.causes)

    @property
    def mtbf_s(self) -> float:
        """Mean seconds between failures of the job; infinite where nothing fails."""
        return 1.0 / self.rate_per_s if self.rate_per_s else math.inf

    @property
    def down_s(self) -> float:
        """Expected seconds from a failure until work goes on, failures on the way included.

        Each attempt draws its cause anew: sum p M (1 - e) / sum p e with e = exp(-down / M).
        """
        total = self.rate_per_s
        if not total:
            return 0.0
        alive = sum(c.rate_per_s * math.exp(-c.down_s * total) for c in self.causes) / total
        lost = sum(-c.rate_per_s * math.expm1(-c.down_s * total) for c in self.causes) / total
        return lost / total / alive if alive else math.inf

    def every_s(self) -> float:
        """Return the useful seconds between checkpoints, the best where none are given."""
        if self.interval_s is not None:
            return self.interval_s
        return max(self.shortest_s, best_interval_s(self.stall_s, self.mtbf_s))

    def reason(self) -> str:
        """Return why the job cannot get anywhere, or nothing where it can."""
        longest = max((c.down_s for c in self.causes if c.rate_per_s), default=0.0)
        if self.mtbf_s < longest:
            return (
                f"something fails every {self.mtbf_s:.4g} s on average but detection and restart "
                f"take {longest:.4g} s: restart faster, or use fewer devices"
            )
        return ""


# ---------------------------------------------------------------- when to save


def young_interval_s(stall_s: float, mtbf_s: float) -> float:
    """Return sqrt(2 C M) (Young 1974), the first-order optimum."""
    return math.sqrt(2 * stall_s * mtbf_s)


def daly_interval_s(stall_s: float, mtbf_s: float) -> float:
    """Return Daly's (2006, equation 37) closed form, M where a checkpoint takes 2 M or more."""
    half = stall_s / (2 * mtbf_s)
    if half >= 1:
        return mtbf_s
    root = math.sqrt(half)
    return young_interval_s(stall_s, mtbf_s) * (1 + root / 3 + half / 9) - stall_s


def best_interval_s(stall_s: float, mtbf_s: float) -> float:
    """Return the useful seconds between checkpoints that make a run shortest.

    x = interval / M solves (1 - x) exp(x + C / M) = 1: Newton's method from Daly's value.
    Infinite where nothing fails; 0 where checkpoints are free.
    """
    if math.isinf(mtbf_s):
        return math.inf
    if stall_s == 0:
        return 0.0
    share = stall_s / mtbf_s
    x = min(max(daly_interval_s(stall_s, mtbf_s) / mtbf_s, 1e-12), 1 - 1e-12)
    for _ in range(60):
        # f(x) = log(1 - x) + x + C / M is concave and falls: Newton's steps stay below the root
        # once they are, and 1 is never passed.
        step = (math.log1p(-x) + x + share) * (1 - x) / x
        new = min(max(x + step, x / 4), 1 - (1 - x) / 4)
        if abs(new - x) <= 1e-15 * x:
            break
        x = new
    return x * mtbf_s


def interval_cost_s(faults: Faults, interval_s: float) -> float:
    """Return the expected seconds per ``interval_s`` of useful work in a long run."""
    mtbf, period = faults.mtbf_s, interval_s + faults.stall_s
    if math.isinf(mtbf):
        return period
    try:
        alive = mtbf * math.expm1(period / mtbf) * math.exp(faults.write_s / mtbf)
    except OverflowError:
        return math.inf
    return alive * (1 + faults.down_s / mtbf)


@dataclass(frozen=True, slots=True)
class RunTime:
    """Expected seconds of a run by what they went to; they sum to ``total_s``."""

    useful_s: float
    checkpoint_s: float  # stalls of checkpoints that were of use
    lost_s: float  # work and stalls done again
    down_s: float  # detection and restart
    paused_s: float  # preemptions that lost no work
    failures: float

    @property
    def total_s(self) -> float:
        """Seconds from start to end."""
        return self.useful_s + self.checkpoint_s + self.lost_s + self.down_s + self.paused_s

    @property
    def effective_ratio(self) -> float:
        """Useful seconds over all: the effective training time ratio."""
        return self.useful_s / self.total_s


def run_time(faults: Faults, work_s: float) -> RunTime:
    """Return the expected seconds of ``work_s`` of useful work, each interval at its long-run cost.

    Exact where work_s is a whole number of intervals and write_s is 0; a last write that nothing
    waits for makes a run with write_s shorter, by less than one interval.
    """
    every = min(faults.every_s(), work_s) or faults.shortest_s
    if every == 0:  # free checkpoints all the time: nothing is lost but the restarts
        total, stalls = work_s * (1 + faults.rate_per_s * faults.down_s), 0.0
    else:
        count = work_s / every
        total, stalls = count * interval_cost_s(faults, every), count * faults.stall_s
    up = total / (1 + faults.rate_per_s * faults.down_s) if math.isfinite(total) else math.inf
    return RunTime(
        work_s,
        stalls,
        up - work_s - stalls,
        total - up if math.isfinite(total) else math.inf,
        faults.pause_per_s * faults.pause_s * total,
        faults.rate_per_s * total,
    )

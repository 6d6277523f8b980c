"""From the seconds of one step to the days and dollars of a whole run.

A run of so many steps takes their seconds, stretched by slow ranks and links, then what failures
and checkpoints add (`simcore.faults`). Goodput is the share of wall-clock time that a run without
faults, checkpoints and stragglers would need; the effective training time ratio counts stretched
steps as useful too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from simcore.faults import DAY_S, Cause, Faults, RunTime, run_time
from simcore.stragglers import Slow, slowed_step_s

LEAST_GOODPUT = 0.01  # a run that spends 99 % of its time otherwise is reported as not finishing


@dataclass(frozen=True, slots=True)
class Step:
    """What a run repeats: seconds of a step, of the busiest rank's compute and exposed talk."""

    step_s: float
    compute_s: float
    exposed_s: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Budget:
    """How much is to be trained: tokens, or else steps."""

    tokens: int | None = None
    steps: int | None = None

    def step_count(self, tokens_per_step: int) -> int:
        """Return the whole number of steps; the last one may pass the budget of tokens."""
        if self.tokens is not None:
            return math.ceil(self.tokens / tokens_per_step)
        assert self.steps is not None
        return self.steps


def no_faults() -> Faults:
    """Return faults that never happen, and checkpoints that cost nothing."""
    return Faults((Cause("none", 0.0, 0.0),), 0.0)


def forecast(
    step: Step,
    budget: Budget,
    devices: int,
    faults: Faults,
    slow: Slow,
    price_per_hour: float | None = None,
) -> tuple[dict[str, Any], str]:
    """Return the metrics of a whole run, and why it would never finish (or nothing).

    ``price_per_hour``: US dollars of one device. Where the run does not finish, what depends on
    its length is None.
    """
    steps = budget.step_count(step.tokens)
    slowed = slowed_step_s(step.step_s, step.compute_s, step.exposed_s, devices, slow)
    ideal = steps * step.step_s
    took = run_time(faults, steps * slowed)
    reason = faults.reason()
    if not reason and not ideal / took.total_s >= LEAST_GOODPUT:
        reason = (
            f"only {ideal / took.total_s:.2g} of the time would be of use with something failing "
            f"every {faults.mtbf_s:.4g} s: checkpoint and restart faster, or use fewer devices"
        )
    every = faults.every_s()
    known: dict[str, Any] = {
        "steps": steps,
        "slowed_step_s": slowed,
        "mtbf_s": faults.mtbf_s if math.isfinite(faults.mtbf_s) else None,
        "checkpoint_interval_s": every if 0 < every < math.inf else None,
        "finishes": not reason,
    }
    return known | _lengths(
        took, ideal, steps * step.tokens, devices, price_per_hour, reason
    ), reason


def _lengths(
    took: RunTime,
    ideal_s: float,
    tokens: int,
    devices: int,
    price_per_hour: float | None,
    reason: str,
) -> dict[str, Any]:
    """Return what depends on the length of a run, None where it does not finish."""
    total = took.total_s
    found: dict[str, Any] = {
        "days": total / DAY_S,
        "goodput_fraction": ideal_s / total,
        "effective_training_fraction": took.effective_ratio,
        "effective_tokens_per_s": tokens / total,
        "expected_failures": took.failures,
        "run_parts_s": {
            "steps": took.useful_s,
            "checkpoints": took.checkpoint_s,
            "lost": took.lost_s,
            "down": took.down_s,
            "paused": took.paused_s,
        },
    }
    if price_per_hour is not None:
        found["run_cost_usd"] = price_per_hour * devices * total / 3600
    return dict.fromkeys(found) if reason else found

"""How tokens are produced: a decode plan is a generator of passes.

A plan yields a `Pass` and receives, through ``send()``, the `Outcome` of that pass: an expectation
from the estimator, a draw from the simulator, or what the logits decided from the executor. The
loop that drives a plan is the same for all three.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass

from simcore.workloads import Generation


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward pass of one network over ``new_rows`` rows per sequence.

    ``cached_rows`` earlier rows have their keys and values in the cache.
    """

    new_rows: int
    cached_rows: int
    network: str = "target"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a pass gave: the tokens committed per sequence (an expectation may be fractional)."""

    committed: float = 1.0


Plan = Generator[Pass, Outcome, None]


def autoregressive(workload: Generation) -> Plan:
    """Prefill, then one token a pass."""
    done = 0.0
    rows, cached = workload.input_tokens, 0
    while done < workload.output_tokens:
        outcome = yield Pass(rows, cached)
        done += outcome.committed
        cached += rows
        rows = 1


DECODING: dict[str, Callable[[Generation], Plan]] = {"autoregressive": autoregressive}


def passes(method: str, workload: Generation) -> list[Pass]:
    """Return the passes of a plan whose every pass commits one token."""
    plan, found = DECODING[method](workload), []
    try:
        step = next(plan)
        while True:
            found.append(step)
            step = plan.send(Outcome())
    except StopIteration:
        return found

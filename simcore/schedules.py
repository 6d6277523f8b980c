"""Pipeline schedules: functions from (stages, microbatches) to each rank's ordered actions.

Kinds: ``F`` forward, ``B`` backward with weight gradients, ``I`` input gradient alone, ``W``
weight gradient alone (torch's notation). Communication is added by `simcore.lower`.
"""

from __future__ import annotations

from collections.abc import Callable

from simcore.program import Action

Order = list[list[Action]]


def gpipe(stages: int, microbatches: int) -> Order:
    """All forwards, then all backwards (Huang et al. 2019)."""
    return [
        [Action(s, "F", m) for m in range(microbatches)]
        + [Action(s, "B", m) for m in range(microbatches)]
        for s in range(stages)
    ]


def one_f_one_b(stages: int, microbatches: int) -> Order:
    """Warm up, then one forward and one backward in turn (PipeDream-Flush; Narayanan 2021)."""
    order: Order = []
    for s in range(stages):
        warm = min(stages - 1 - s, microbatches)
        steady = microbatches - warm
        actions = [Action(s, "F", m) for m in range(warm)]
        for m in range(steady):
            actions += [Action(s, "F", warm + m), Action(s, "B", m)]
        actions += [Action(s, "B", m) for m in range(steady, microbatches)]
        order.append(actions)
    return order


SCHEDULES: dict[str, Callable[[int, int], Order]] = {
    "1f1b": one_f_one_b,
    "gpipe": gpipe,
}

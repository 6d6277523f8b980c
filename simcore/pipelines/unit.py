"""Schedules on made-up costs: when every action runs, how much is idle, what is held.

Each kind of action takes so many units on every stage; messages take none. Nothing of a network
or of a machine is needed, so any list of actions can be looked at.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from simcore.ops import COMPUTE
from simcore.pipelines.orders import stage_ranks
from simcore.pipelines.placement import BACKWARD, Placement
from simcore.program import Action
from simcore.timeline import Span, Timeline, timeline

UNIT_S = 1e-3
EQUAL = {"F": UNIT_S, "B": 2 * UNIT_S, "I": UNIT_S, "W": UNIT_S}
"""Seconds per kind on a whole rank; a stage of a rank with v stages takes 1/v of it."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a run on unit costs shows: its timeline, and seconds per rank.

    ``busy``: at work; ``within``: idle between the rank's first action and its last.
    """

    line: Timeline
    busy: tuple[float, ...]
    within: tuple[float, ...]

    @property
    def bubble_fraction(self) -> float:
        """Idle share of the ranks' time from the first action of all to the last."""
        return 1 - sum(self.busy) / (len(self.busy) * self.line.step_s)

    @property
    def bubble_ratio(self) -> float:
        """Idle time over busy time, as papers of interleaved schedules give it."""
        return (len(self.busy) * self.line.step_s - sum(self.busy)) / sum(self.busy)

    @property
    def inner_bubble_fraction(self) -> float:
        """Idle share within the ranks' own first and last actions.

        What is left where steps follow one another and no rank waits for all others (Qi 2023).
        """
        return sum(self.within) / (sum(self.busy) + sum(self.within))


def causes(action: Action, placement: Placement) -> list[Action]:
    """Return the actions one of which each must have ended before; a backward is B or I."""
    stage, kind, microbatch = action
    if kind == "F":
        before = placement.before(stage)
        return [] if before is None else [Action(before, "F", microbatch)]
    if kind in BACKWARD:
        after = placement.after(stage)
        needs = [Action(stage, "F", microbatch)]
        return needs if after is None else [*needs, Action(after, "B", microbatch)]
    return [Action(stage, "B", microbatch)]


def as_cause(action: Action) -> Action:
    """Return the name under which others wait for an action: input gradients count as B."""
    return action._replace(kind="B") if action.kind == "I" else action


def run_units(
    order: Sequence[Sequence[Action]],
    copies: int = 1,
    seconds: Mapping[str, float] = EQUAL,
) -> Found:
    """Return what the order does on unit costs. Raises RuntimeError where it deadlocks."""
    ranks = stage_ranks(order)
    placement = Placement(ranks, len(ranks) // copies)
    share = len(order) / placement.chain
    ended: dict[Action, float] = {}
    waiting = [deque(actions) for actions in order]
    free, spans = [0.0] * len(order), []
    moving = True
    while moving:
        moving = False
        for rank, left in enumerate(waiting):
            while left and all(cause in ended for cause in causes(left[0], placement)):
                action, moving = left.popleft(), True
                start = max([free[rank], *(ended[c] for c in causes(action, placement))])
                free[rank] = ended[as_cause(action)] = start + share * seconds[action.kind]
                spans.append(Span(rank, COMPUTE, action.body, start, free[rank], str(action)))
    stuck = [f"{left[0]} on rank {rank}" for rank, left in enumerate(waiting) if left]
    if stuck:
        raise RuntimeError(f"the order deadlocks: {stuck[0]} waits for what never comes")
    line = timeline(spans, max(free))
    busy = tuple(sum(s.end_s - s.start_s for s in spans if s.rank == r) for r in range(len(order)))
    within = tuple(
        max(s.end_s for s in spans if s.rank == r)
        - min(s.start_s for s in spans if s.rank == r)
        - busy[r]
        for r in range(len(order))
    )
    return Found(line, busy, within)

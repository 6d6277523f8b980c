"""Schedules made by running them: every rank takes the most urgent of what it could start.

The wave and bidirectional pipelines say where stages lie and how many microbatches may be under
way; the order follows from a run in whole units of time, with a backward twice as long as a
forward. Of two rules of urgency, backwards first or forwards first, the one that ends earlier is
kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from simcore.errors import InputError
from simcore.pipelines.orders import Order
from simcore.pipelines.placement import Placement
from simcore.program import Action

UNITS = {"F": 1, "B": 2}


@dataclass(slots=True)
class _Run:
    """A run of a pipeline: when each action ends, and what each rank did."""

    placement: Placement
    microbatches: Sequence[Sequence[int]]  # of every copy
    limit: int  # most microbatches that a copy has under way
    eager: str = "B"  # the kind that goes first where both could start
    ended: dict[Action, int] = field(default_factory=dict)
    order: Order = field(default_factory=list)
    free: list[int] = field(default_factory=list)
    flying: Counter[int] = field(default_factory=Counter)
    next: Counter[tuple[int, str]] = field(default_factory=Counter)

    def ready(self, stage: int, kind: str) -> tuple[int, Action] | None:
        """Return when the stage's next action of a kind could start; None while it is unknown."""
        mine = self.microbatches[stage // self.placement.chain]
        count = self.next[stage, kind]
        first = kind == "F" and stage % self.placement.chain == 0
        if count == len(mine) or (first and self.flying[stage] >= self.limit):
            return None
        action = Action(stage, kind, mine[count])
        if kind == "F":
            before = self.placement.before(stage)
        else:
            before = self.placement.after(stage)
            if action._replace(kind="F") not in self.ended:
                return None
        if before is None:
            return 0, action
        cause = Action(before, kind, mine[count])
        return (self.ended[cause], action) if cause in self.ended else None

    def choose(self, rank: int) -> tuple[int, int, int, Action] | None:
        """Return the rank's most urgent next action, by start, then kind, then depth."""
        found = []
        for stage, place in enumerate(self.placement.stage_rank):
            for kind in UNITS if place == rank else ():
                known = self.ready(stage, kind)
                if known is not None:
                    start, depth = max(known[0], self.free[rank]), stage % self.placement.chain
                    first = depth if (kind, self.eager) == ("B", "B") else -depth
                    found.append((start, kind != self.eager, first, known[1]))
        return min(found, default=None)

    def run(self) -> Order:
        """Return each rank's actions."""
        ranks = max(self.placement.stage_rank) + 1
        self.order, self.free = [[] for _ in range(ranks)], [0] * ranks
        while True:
            options = [(c, rank) for rank in range(ranks) if (c := self.choose(rank)) is not None]
            if not options:
                return self.order
            (start, *_, action), rank = min(options)
            self.free[rank] = self.ended[action] = start + UNITS[action.kind]
            self.next[action.stage, action.kind] += 1
            self.flying[action.stage] += 1 if action.kind == "F" else -1
            self.order[rank].append(action)


def _best(placement: Placement, microbatches: Sequence[Sequence[int]], limit: int) -> Order:
    """Return the order of the shorter run."""
    runs = [_Run(placement, microbatches, limit, kind) for kind in ("B", "F")]
    orders = [run.run() for run in runs]
    return min(zip(runs, orders, strict=True), key=lambda pair: max(pair[0].free))[1]


def _zigzag(ranks: int, virtual: int) -> list[int]:
    """Return the ranks of stages that go down the ranks, up again, and so on."""
    down = list(range(ranks))
    return [rank for turn in range(virtual) for rank in (down if turn % 2 == 0 else down[::-1])]


def hanayo(ranks: int, microbatches: int, virtual: int) -> Order:
    """Waves: ``virtual`` / 2 times down the ranks and up again (Liu et al. 2023).

    Raises `InputError` where the stages of a rank are odd in number.
    """
    if virtual % 2:
        raise InputError(
            f"the schedule 'hanayo' goes down the ranks and up again: [parallel].virtual_stages "
            f"must be even, not {virtual}."
        )
    placement = Placement(tuple(_zigzag(ranks, virtual)), ranks * virtual)
    return _best(placement, [range(microbatches)], 2 * ranks)


def _both_ways(ranks: int, microbatches: int, name: str) -> tuple[range, range]:
    if ranks % 2 or microbatches % 2:
        raise InputError(
            f"the schedule {name!r} needs an even pp and an even number of microbatches, not pp "
            f"{ranks} with {microbatches} microbatches."
        )
    return range(microbatches // 2), range(microbatches // 2, microbatches)


def chimera(ranks: int, microbatches: int) -> Order:
    """Two copies of the network in opposite directions, 1F1B each (Li & Hoefler 2021).

    Raises `InputError` with odd ranks or microbatches.
    """
    halves = _both_ways(ranks, microbatches, "chimera")
    down = list(range(ranks))
    placement = Placement((*down, *down[::-1]), ranks)
    return _best(placement, halves, ranks)


def bitpipe(ranks: int, microbatches: int) -> Order:
    """Two copies in opposite directions, each down the ranks and up again (Wu et al. 2024).

    Raises `InputError` with odd ranks or microbatches.
    """
    halves = _both_ways(ranks, microbatches, "bitpipe")
    down = _zigzag(ranks, 2)
    placement = Placement((*down, *(ranks - 1 - rank for rank in down)), 2 * ranks)
    return _best(placement, halves, ranks)

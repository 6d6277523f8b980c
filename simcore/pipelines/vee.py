"""Schedules whose stages go down the ranks and up again: rank r has stages r and 2p - 1 - r."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field

from simcore.errors import InputError
from simcore.pipelines.orders import Order
from simcore.program import Action


@dataclass(slots=True)
class _Writer:
    """A rank's growing actions: each kind of each of its two stages counts microbatches up."""

    stages: tuple[int, int]
    actions: list[Action] = field(default_factory=list)
    counts: Counter[tuple[int, str]] = field(default_factory=Counter)
    late: deque[Action] = field(default_factory=deque)  # weight gradients that wait

    def add(self, which: int, kind: str) -> None:
        """Add the next action of a kind to stage ``which`` (0 down, 1 up)."""
        key = which, "F" if kind == "F" else "back"
        action = Action(self.stages[which], kind, self.counts[key])
        self.counts[key] += 1
        self.actions.append(action)
        if kind == "I":
            self.late.append(action._replace(kind="W"))

    def weight(self) -> None:
        """Add the oldest weight gradient that waits, if any does."""
        if self.late:
            self.actions.append(self.late.popleft())

    def pair(self, which: int) -> None:
        """Add both parts of a backward, one after the other."""
        self.add(which, "I")
        self.actions.append(self.late.pop())


def zero_bubble_v(ranks: int, microbatches: int) -> Order:
    """ZB-V: no bubble at equal F, I and W, with the memory of 1F1B (Qi et al. 2023)."""
    full = max(2 * ranks - 1, microbatches)  # fewer do not fill the pipeline: they are cut out
    order = []
    for rank in range(ranks):
        out = _Writer((rank, 2 * ranks - 1 - rank))
        for _ in range(2 * (ranks - rank) - 1):
            out.add(0, "F")
        for _ in range(rank):
            out.add(1, "F")
            out.add(0, "F")
        for _ in range(ranks - rank):
            out.add(1, "F")
            out.pair(1)
        while out.counts[1, "F"] < full:
            if out.counts[0, "F"] < full:
                out.add(0, "F")
            out.pair(0)
            out.add(1, "F")
            out.pair(1)
        for _ in range(rank):
            out.add(0, "I")
            out.add(1, "I")
        down = deque(action for action in out.late if action.stage == rank)
        up = [action for action in out.late if action.stage != rank]
        for _ in range(ranks - rank):
            out.add(0, "I")
            down.append(out.actions[-1]._replace(kind="W"))
            out.actions.append(down.popleft())
        out.actions += [*up, *down]
        order.append([action for action in out.actions if action.microbatch < microbatches])
    return order


def dualpipe_v(ranks: int, microbatches: int) -> Order:
    """DualPipe folded in the middle (DeepSeek-AI 2024; "cut in half" by Sea AI Lab 2025).

    A forward and a backward that may share the chip follow one another here. Raises `InputError`
    with fewer microbatches than stages.
    """
    if microbatches < 2 * ranks:
        raise InputError(
            f"the schedule 'dualpipev' on {ranks} ranks needs at least {2 * ranks} microbatches, "
            f"not {microbatches}: raise [workload].global_batch."
        )
    return [_dualpipe_rank(rank, ranks, microbatches) for rank in range(ranks)]


def _dualpipe_rank(rank: int, ranks: int, microbatches: int) -> list[Action]:
    out, above = _Writer((rank, 2 * ranks - 1 - rank)), ranks - 1 - rank
    for _ in range(2 * above):
        out.add(0, "F")
    for _ in range(rank + 1):
        out.add(0, "F")
        out.add(1, "F")
    for _ in range(above):
        out.add(1, "I")
        out.weight()
        out.add(1, "F")
    for _ in range(microbatches - 2 * ranks + rank + 1):
        for forward, back in ((0, 1), (1, 0)):
            out.add(forward, "F")
            out.add(back, "B")
    for _ in range(above):
        out.add(1, "B")
        out.add(1, "F")
        out.add(0, "B")
    last = rank + 1
    split = 2 * (last // 2) + (rank % 2 == 0)  # from here on weight gradients wait
    for turn in range(2 * last):
        out.add((turn + 1) % 2, "I" if turn >= split else "B")
    for _ in range(above):
        out.weight()
        out.add(0, "I" if 2 * last > split else "B")
    while out.late:
        out.weight()
    return out.actions


def dualpipe(ranks: int, microbatches: int) -> Order:
    """DualPipe: two copies of the stages, entered from both ends (DeepSeek-AI 2024).

    Stage p + s is the second copy of stage s; it is on rank p - 1 - s and takes the second half of
    the microbatches. Raises `InputError` with odd ranks, odd or too few microbatches.
    """
    if ranks % 2 or microbatches % 2 or microbatches < 2 * ranks:
        raise InputError(
            f"the schedule 'dualpipe' needs an even pp and an even number of microbatches of at "
            f"least 2 x pp, not pp {ranks} with {microbatches} microbatches."
        )
    half, each = ranks // 2, microbatches // 2
    folded = dualpipe_v(half, each)
    order: Order = []
    for rank in range(ranks):
        near = rank < half
        actions = folded[rank if near else ranks - 1 - rank]
        order.append([_entered(action, near, half, each) for action in actions])
    return order


def _entered(action: Action, near: bool, half: int, each: int) -> Action:
    """Return an action of the folded pipeline in the copy that enters at this end, or the other."""
    second = (action.stage < half) != near
    return Action(action.stage + 2 * half * second, action.kind, action.microbatch + each * second)

"""Whether a schedule can run, and how much it holds: a check of any list of actions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from simcore.errors import InputError
from simcore.pipelines.orders import stage_ranks
from simcore.pipelines.placement import Message, Placement, ways
from simcore.pipelines.unit import run_units
from simcore.program import Action


@dataclass(frozen=True, slots=True)
class Report:
    """What a check found.

    ``peak_in_flight``: per rank, the most pairs of stage and microbatch whose activations are
    held, from the forward to the end of the backward, weight gradient included;
    ``peak_before_input_gradient`` the same up to the input gradient alone.
    ``early_messages``: the most messages that a rank has received, in the order in which they were
    sent, before it wants them.
    """

    problems: tuple[str, ...]
    stage_rank: tuple[int, ...]
    microbatches: int
    peak_in_flight: tuple[int, ...] = ()
    peak_before_input_gradient: tuple[int, ...] = ()
    early_messages: int = 0

    @property
    def runs(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def check_schedule(
    order: Sequence[Sequence[Action]], stage_rank: Sequence[int] | None = None, copies: int = 1
) -> Report:
    """Check an order: whole, legal, free of deadlock; and count what it holds.

    ``stage_rank``: where the stages should be; None: where the order puts them. ``copies``: how
    often the network occurs, each copy with microbatches of its own.
    """
    count = 1 + max((a.microbatch for actions in order for a in actions), default=-1)
    try:
        ranks = stage_ranks(order)
    except InputError as error:
        return Report((str(error).rstrip("."),), (), count)
    if not ranks or len(ranks) % copies:
        problem = f"its {len(ranks)} stages are no {copies} copies of a network"
        return Report((problem,), ranks, count)
    placement = Placement(ranks, len(ranks) // copies)
    problems = [
        f"stage {stage} is on rank {ranks[stage]} instead of {place}"
        for stage, place in enumerate(stage_rank or ())
        if stage >= len(ranks) or ranks[stage] != place
    ]
    problems += _incomplete(order, placement, count) or _misordered(order)
    if not problems:
        try:
            run_units(order, copies)
        except RuntimeError as error:
            problems.append(str(error))
    return Report(
        tuple(problems),
        ranks,
        count,
        tuple(_most(actions, ("B", "W")) for actions in order),
        tuple(_most(actions, ("B", "I")) for actions in order),
        0 if problems else _early(order, placement),
    )


def _incomplete(order: Sequence[Sequence[Action]], placement: Placement, count: int) -> list[str]:
    """Return what is missing or doubled: F and B, or F, I and W, of each microbatch once."""
    done = Counter(action for actions in order for action in actions)
    problems = [f"{action} occurs {times} times" for action, times in done.items() if times > 1]
    copies = len(placement.stage_rank) // placement.chain
    for copy in range(copies):
        stages = range(copy * placement.chain, (copy + 1) * placement.chain)
        mine = {action.microbatch for action in done if action.stage in stages}
        if copies == 1:
            mine = set(range(count))
        problems += [
            f"stage {stage} does {'+'.join(kinds) or 'nothing'} of microbatch {microbatch}, "
            "which takes F and B, or F, I and W"
            for stage in stages
            for microbatch in sorted(mine)
            if (kinds := [k for k in "FBIW" if (stage, k, microbatch) in done])
            not in (["F", "B"], ["F", "I", "W"])
        ]
    return problems


def _misordered(order: Sequence[Sequence[Action]]) -> list[str]:
    """Return where a stage does the parts of a microbatch in another order than F, I, W."""
    problems = []
    for actions in order:
        last: dict[tuple[int, int], Action] = {}
        for action in actions:
            before = last.get((action.stage, action.microbatch))
            if before is not None and "FBIW".index(before.kind) > "FBIW".index(action.kind):
                problems.append(f"{action} comes after {before}")
            last[action.stage, action.microbatch] = action
    return problems


def _early(order: Sequence[Sequence[Action]], placement: Placement) -> int:
    """Return how many messages come before others that their rank wants first."""
    sent, early = ways(order, placement), 0
    for actions in order:
        came: set[Message] = set()
        for wanted in filter(None, map(placement.received, actions)):
            while wanted not in came:
                came.add(sent[wanted.way].popleft())
            came.remove(wanted)
            early = max(early, len(came))
    return early


def _most(actions: Sequence[Action], ends: tuple[str, str]) -> int:
    now = most = 0
    for action in actions:
        now += (action.kind == "F") - (action.kind in ends)
        most = max(most, now)
    return most

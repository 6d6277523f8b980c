"""Schedules whose stages go round the ranks: stage s is on rank s mod p.

One rule makes them: forwards until the first gradient is due, then a forward and a backward in
turn, then the backwards that are left. Where the backward is split, weight gradients follow with
a delay, and fill what would be idle.
"""

from __future__ import annotations

from collections.abc import Iterator

from simcore.errors import InputError
from simcore.pipelines.orders import Order
from simcore.program import Action


def _round(ranks: int, microbatches: int, name: str) -> int:
    """Return how many microbatches pass through one stage before the next stage's turn comes."""
    rounds = max(1, microbatches // ranks)
    if microbatches % rounds:
        near = microbatches - microbatches % ranks
        raise InputError(
            f"the schedule {name!r} on {ranks} ranks cannot divide {microbatches} microbatches "
            f"into {rounds} equal rounds: {near} would do; change [workload].global_batch."
        )
    return microbatches // rounds


def _turns(rank: int, ranks: int, each: int, stages: range) -> Iterator[tuple[int, int]]:
    """Yield (stage, microbatch) in rounds of ``each`` microbatches per stage, without end."""
    first = 0
    while True:
        for local in stages:
            for microbatch in range(first, first + each):
                yield local * ranks + rank, microbatch
        first += each


def _rank_actions(
    rank: int, ranks: int, total: tuple[int, int], each: int, warm: int, delay: int | None
) -> list[Action]:
    """Return a rank's actions; ``total`` is (stages per rank, microbatches).

    ``delay``: how many input gradients the weight gradients stay behind; None: backward whole.
    """
    virtual, microbatches = total
    count = virtual * microbatches
    warm = min(warm, count)
    forward = _turns(rank, ranks, each, range(virtual))
    back = _turns(rank, ranks, each, range(virtual - 1, -1, -1))
    late = _turns(rank, ranks, each, range(virtual - 1, -1, -1))
    actions = []
    for step in range(warm + count):
        if step < count:
            stage, microbatch = next(forward)
            actions.append(Action(stage, "F", microbatch))
        if step >= warm:
            stage, microbatch = next(back)
            actions.append(Action(stage, "B" if delay is None else "I", microbatch))
            if delay is not None and step - warm >= delay:
                stage, microbatch = next(late)
                actions.append(Action(stage, "W", microbatch))
    for _ in range(min(delay or 0, count)):
        stage, microbatch = next(late)
        actions.append(Action(stage, "W", microbatch))
    return actions


def interleaved(ranks: int, microbatches: int, virtual: int) -> Order:
    """Interleaved 1F1B: depth first over the stages of a rank (Narayanan et al. 2021).

    Raises `InputError` where microbatches are no equal rounds of at least ``ranks``.
    """
    each = _round(ranks, microbatches, "interleaved")
    return [
        _rank_actions(
            rank,
            ranks,
            (virtual, microbatches),
            each,
            (virtual - 1) * each + 2 * (ranks - 1 - rank),
            None,
        )
        for rank in range(ranks)
    ]


def interleaved_zero_bubble(ranks: int, microbatches: int, virtual: int) -> Order:
    """ZB-H1 over several stages of a rank, as torch's ScheduleInterleavedZeroBubble has it."""
    each = _round(ranks, microbatches, "interleaved_zb")
    return [
        _rank_actions(
            rank,
            ranks,
            (virtual, microbatches),
            each,
            (virtual - 1) * each + ranks - 1 - rank,
            rank,
        )
        for rank in range(ranks)
    ]


def zero_bubble_h1(ranks: int, microbatches: int) -> Order:
    """1F1B's memory; weight gradients fill two thirds of its bubble (Qi et al. 2023, ZB-H1)."""
    return [
        _rank_actions(rank, ranks, (1, microbatches), microbatches, ranks - 1 - rank, rank)
        for rank in range(ranks)
    ]


def zero_bubble_h2(ranks: int, microbatches: int) -> Order:
    """Twice the warm-up and twice the delay of ZB-H1: no bubble at equal F, I and W (ZB-H2).

    Ranks start and end one after the other, each without a gap.
    """
    return [
        _rank_actions(
            rank, ranks, (1, microbatches), microbatches, 2 * (ranks - 1 - rank), 2 * rank
        )
        for rank in range(ranks)
    ]


def looped_bfs(ranks: int, microbatches: int, virtual: int) -> Order:
    """Breadth first: all microbatches through a stage, then the next (Lamy-Poirier 2023)."""
    order: Order = []
    for rank in range(ranks):
        stages = range(rank, ranks * virtual, ranks)
        forward = [Action(s, "F", m) for s in stages for m in range(microbatches)]
        back = [Action(s, "B", m) for s in reversed(stages) for m in reversed(range(microbatches))]
        order.append(forward + back)
    return order

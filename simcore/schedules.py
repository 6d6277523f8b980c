"""Pipeline schedules: functions from (stages, microbatches) to each rank's ordered actions.

Kinds: ``F`` forward, ``B`` backward with weight gradients, ``I`` input gradient alone, ``W``
weight gradient alone (torch's notation). Communication is added by `simcore.lower`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from simcore.errors import InputError, unknown
from simcore.pipelines.asynchronous import ASYNCHRONOUS, Asynchronous
from simcore.pipelines.greedy import bitpipe, chimera, hanayo
from simcore.pipelines.looped import (
    interleaved,
    interleaved_zero_bubble,
    looped_bfs,
    zero_bubble_h1,
    zero_bubble_h2,
)
from simcore.pipelines.orders import Order
from simcore.pipelines.text import from_file
from simcore.pipelines.vee import dualpipe, dualpipe_v, zero_bubble_v
from simcore.program import Action


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


@dataclass(frozen=True, slots=True)
class Schedule:
    """A pipeline schedule: (ranks, microbatches) to each rank's actions.

    ``stages_per_rank``: how many stages of the network a rank holds; None where the user chooses,
    and ``order`` then takes that number as its third argument. ``copies`` of the network enter
    the pipeline at either end. The rank of every stage follows from the order. ``updates``: how
    weights change while microbatches are under way, where the pipeline is never flushed.
    """

    order: Callable[..., Order]
    stages_per_rank: int | None = 1
    copies: int = 1
    updates: Asynchronous | None = None

    def __call__(self, ranks: int, microbatches: int, virtual: int = 1) -> Order:
        """Return each rank's actions. Raises `InputError` for numbers that it cannot have."""
        self.check(virtual)
        more = (virtual,) if self.stages_per_rank is None else ()
        return self.order(ranks, microbatches, *more)

    def check(self, virtual: int, name: str = "") -> None:
        """Raise `InputError` where a rank cannot have so many stages; ``name``: the schedule's."""
        if self.stages_per_rank is not None and virtual != self.stages_per_rank:
            raise InputError(
                f"{f'the schedule {name!r}' if name else 'this schedule'} puts "
                f"{self.stages_per_rank} stages on every rank, not {virtual}: "
                f"set [parallel].virtual_stages = {self.stages_per_rank}, or choose 'interleaved'."
            )


SCHEDULES: dict[str, Schedule] = {
    "1f1b": Schedule(one_f_one_b),
    "gpipe": Schedule(gpipe),
    "interleaved": Schedule(interleaved, None),
    "looped_bfs": Schedule(looped_bfs, None),
    "zb_h1": Schedule(zero_bubble_h1),
    "zb_h2": Schedule(zero_bubble_h2),
    "interleaved_zb": Schedule(interleaved_zero_bubble, None),
    "zbv": Schedule(zero_bubble_v, 2),
    "dualpipev": Schedule(dualpipe_v, 2),
    "dualpipe": Schedule(dualpipe, 1, copies=2),
    "hanayo": Schedule(hanayo, None),
    "chimera": Schedule(chimera, 1, copies=2),
    "bitpipe": Schedule(bitpipe, 2, copies=2),
    **{name: Schedule(one_f_one_b, updates=how) for name, how in ASYNCHRONOUS.items()},
}


def find_schedule(name: str) -> Schedule:
    """Return the schedule of that name, or in the CSV file of that name (torch's notation).

    Raises `InputError` where there is none.
    """
    if name.endswith(".csv"):
        return Schedule(partial(from_file, name), None)
    if name not in SCHEDULES:
        raise unknown("schedule", name, SCHEDULES)
    return SCHEDULES[name]

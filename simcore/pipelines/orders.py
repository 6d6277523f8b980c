"""What every pipeline schedule is: each rank's actions; and where that puts the stages."""

from __future__ import annotations

from collections.abc import Sequence

from simcore.errors import InputError
from simcore.program import Action

Order = list[list[Action]]
COMPUTING = ("F", "B", "I", "W")  # torch's notation: forward, backward, input and weight gradient


def stage_ranks(order: Sequence[Sequence[Action]]) -> tuple[int, ...]:
    """Return the rank of every stage, as the order has it.

    Raises `InputError` where a stage is on two ranks or on none.
    """
    found: dict[int, int] = {}
    for rank, actions in enumerate(order):
        for action in actions:
            if found.setdefault(action.stage, rank) != rank:
                raise InputError(
                    f"the schedule runs stage {action.stage} on ranks {found[action.stage]} and "
                    f"{rank}: a stage belongs to one rank."
                )
    missing = set(range(max(found, default=-1) + 1)) - set(found)
    if missing:
        raise InputError(
            f"the schedule runs no action of stage {min(missing)} but of later ones: number the "
            "stages from 0 without gaps."
        )
    return tuple(found[stage] for stage in sorted(found))


def is_split(order: Sequence[Sequence[Action]]) -> bool:
    """Whether some backward comes in two parts: input gradients, then weight gradients."""
    return any(action.kind == "W" for actions in order for action in actions)

"""Schedules as text, in the notation and the CSV form of torch's pipeline runtime.

One row per rank, one action per cell: stage, kind, microbatch, as in ``2F0``. Kinds: ``F``, ``B``,
``I`` (input gradient), ``W`` (weight gradient). An empty cell is a pause and means nothing here.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path

from simcore.errors import InputError
from simcore.pipelines.checking import check_schedule
from simcore.pipelines.orders import COMPUTING, Order
from simcore.program import Action

CELL = re.compile(r"(\d{1,9})([A-Z_]+)(\d{0,9})")
BOTH = re.compile(r"\(([^()]*)\)OVERLAP_F_B")  # a forward and a backward that share the chip
OTHERS = ("UNSHARD", "RESHARD", "REDUCE_GRAD", "SEND_F", "RECV_F", "SEND_B", "RECV_B")
MAX_BYTES = 50_000_000


def schedule_to_text(order: Sequence[Sequence[Action]]) -> str:
    """Return the order as CSV that torch loads with ``_load_csv(path, "compute_only")``."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([str(a) for a in row] for row in order)
    return out.getvalue()


def schedule_from_text(text: str) -> Order:
    """Return the order that a CSV text holds; messages and sharding in it are left out.

    Raises `InputError` for a cell that is no action.
    """
    rows = csv.reader(io.StringIO(text))
    return [
        [action for column, cell in enumerate(row) for action in _actions(cell, rank, column)]
        for rank, row in enumerate(rows)
    ]


def _actions(cell: str, rank: int, column: int) -> list[Action]:
    cell = cell.strip()
    both = BOTH.fullmatch(cell)
    if both:
        return [a for part in both[1].split(";") for a in _actions(part, rank, column)]
    found = CELL.fullmatch(cell)
    if found and found[2] in COMPUTING and found[3]:
        return [Action(int(found[1]), found[2], int(found[3]))]
    if not cell or (found and found[2] in OTHERS):
        return []
    raise InputError(
        f"row {rank + 1}, cell {column + 1} of the schedule holds {cell[:20]!r}, which is "
        "no action: write stage, kind (F, B, I or W) and microbatch, as in 2F0."
    )


def read_schedule(path: str) -> Order:
    """Return the order in a CSV file. Raises `InputError` where it cannot be read or run."""
    place = Path(path)
    try:
        if place.stat().st_size > MAX_BYTES:
            raise InputError(f"the schedule {path!r} is larger than {MAX_BYTES} bytes.")
        text = place.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"the schedule {path!r} cannot be read: {error}.") from error
    order = schedule_from_text(text)
    problems = check_schedule(order).problems if order else ("it has no rows",)
    if problems:
        raise InputError(f"the schedule {path!r} cannot run: {problems[0]}.")
    return order


def from_file(path: str, ranks: int, microbatches: int, virtual: int) -> Order:
    """Return the order in a CSV file, which must be for so many ranks, microbatches and stages."""
    order = read_schedule(path)
    actions = [action for row in order for action in row]
    stages = 1 + max(action.stage for action in actions)
    count = 1 + max(action.microbatch for action in actions)
    found = {"pp": len(order), "microbatches": count, "stages": stages}
    wanted = {"pp": ranks, "microbatches": microbatches, "stages": ranks * virtual}
    for what, number in found.items():
        if number != wanted[what]:
            raise InputError(
                f"the schedule {path!r} is for {what} = {number}, but the scenario has "
                f"{wanted[what]}: change [parallel] or [workload].global_batch, or the file."
            )
    return order

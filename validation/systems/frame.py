"""The frame of published systems: every row, the checks registered for some, and verdicts.

A check is a function of keyword arguments, whose defaults are the check's inputs, each with its
source; it returns a `Finding`. Its mutant overrides some of the inputs so that the same
function must fail: a check that no wrong input can fail proves nothing.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from simcore.errors import unknown

Executed = Literal["cpu", "gpu", "no"]
Status = Literal["pass", "fail", "not covered"]

ROWS = Path(__file__).parent / "rows.json"
NO_CHECK = "no check is registered for this row yet"


@dataclass(frozen=True, slots=True)
class Row:
    """One published system, closed form, problem or primitive, as listed in ``rows.json``."""

    id: str
    kind: str
    group: str
    name: str
    title: str
    priority: int  # 1 core, 2 secondary, 3 add-on
    published: str  # the figure as reported
    check_kind: str
    check: str  # what has to hold
    runs_on: str


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found: whether it holds, what was predicted, why, and on what it rests."""

    holds: bool
    predicted: str
    reason: str
    assumptions: tuple[str, ...] = ()
    executed: Executed = "no"


@dataclass(frozen=True, slots=True)
class Verdict:
    """A row's outcome, with the published figure beside the predicted one."""

    id: str
    verdict: Status
    published: str
    predicted: str
    executed: Executed
    reason: str
    assumptions: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the verdict as plain data for JSON."""
        return {**asdict(self), "assumptions": list(self.assumptions)}


class NotCoveredError(Exception):
    """Raised by a check that cannot be made here; its text says what is missing."""


@dataclass(frozen=True, slots=True)
class Check:
    """A check and the inputs that must make it fail."""

    run: Callable[..., Finding]
    mutant: Mapping[str, Any]


CHECKS: dict[str, Check] = {}


def check(row: str, *, mutant: Mapping[str, Any]) -> Callable[[Callable[..., Finding]], Any]:
    """Register a function as the check of a row, with the inputs that must make it fail."""

    def register(function: Callable[..., Finding]) -> Callable[..., Finding]:
        CHECKS[row] = Check(function, mutant)
        return function

    return register


@cache
def _table() -> tuple[dict[str, str], dict[str, Row]]:
    data = json.loads(ROWS.read_text(encoding="utf-8"))
    return data["groups"], {row["id"]: Row(**row) for row in data["rows"]}


def groups() -> dict[str, str]:
    """Return the name of every group, such as ``{"G6": "Sequence operators and kernels"}``."""
    return _table()[0]


def rows() -> dict[str, Row]:
    """Return all rows by id, in their published order."""
    return _table()[1]


def select(names: Iterable[str]) -> list[Row]:
    """Return the rows of the named ids and groups, in order and once each.

    Raises `InputError` with the nearest id for a name that is neither.
    """
    found: dict[str, Row] = {}
    for name in names:
        wanted = name.strip().upper()
        members = [row for row in rows().values() if wanted in (row.id, row.group)]
        if not members:
            raise unknown("system or group", name, _near(wanted))
        found.update({row.id: row for row in members})
    return list(found.values())


def _near(name: str) -> list[str]:
    """Return the ids that an unknown name may mean: its group's, closest numbers last to differ."""
    group = re.match(r"G\d+(?=\.)", name)
    members = [row.id for row in rows().values() if group and row.group == group[0]]
    return members or [*rows(), *groups()]


def judge(row: Row, mutant: bool = False) -> Verdict:
    """Run the row's check and return its verdict; an error inside it is a fail with its text.

    ``mutant``: run it with the inputs that must make it fail.
    """
    entry = CHECKS.get(row.id)
    if entry is None:
        return Verdict(row.id, "not covered", row.published, "", "no", NO_CHECK)
    try:
        found = entry.run(**(entry.mutant if mutant else {}))
    except NotCoveredError as missing:
        return Verdict(row.id, "not covered", row.published, "", "no", str(missing))
    except Exception as error:  # a broken check is a failed one, never a traceback
        reason = f"the check broke: {type(error).__name__}: {error}"
        return Verdict(row.id, "fail", row.published, "", "no", reason)
    status: Status = "pass" if found.holds else "fail"
    return Verdict(
        row.id,
        status,
        row.published,
        found.predicted,
        found.executed,
        found.reason,
        found.assumptions,
    )


def have_torch() -> bool:
    """Return whether torch is installed; without it nothing is executed."""
    return importlib.util.find_spec("torch") is not None


def need_torch() -> None:
    """Raise `NotCoveredError` where torch is missing."""
    if not have_torch():
        raise NotCoveredError("this check executes tensors: install torch (make install)")

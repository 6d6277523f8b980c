"""The commands on published systems: list them, check them."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from simcore.errors import InputError

if TYPE_CHECKING:
    from validation.systems import Row, Verdict

systems_app = typer.Typer(
    help="Published systems: what is known of each, and checks of it.", rich_markup_mode=None
)
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Group = Annotated[
    list[str] | None,
    typer.Option(metavar="ID", help="Only this group, such as G6, or row.", show_default=False),
]


def system_rows(names: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Return the rows of the named ids and groups (all by default) and whether each has a check.

    Raises `InputError` for an unknown id.
    """
    from dataclasses import asdict

    from validation.systems import CHECKS, rows, select

    chosen = select(names) if names else list(rows().values())
    return [{**asdict(row), "has_check": row.id in CHECKS} for row in chosen]


def system_verdicts(names: Sequence[str] = (), every: bool = False) -> list[Verdict]:
    """Return the verdicts of the named ids and groups, or of ``every`` row.

    Raises `InputError` for an unknown id, and where nothing is named.
    """
    from validation.systems import judge

    return [judge(row) for row in _chosen(names, every)]


def _chosen(names: Sequence[str], every: bool) -> list[Row]:
    from validation.systems import rows, select

    if not names and not every:
        raise InputError("systems check needs an id or a group, such as G6.13 or G6, or --all.")
    return list(rows().values()) if every else select(names)


@systems_app.callback(invoke_without_command=True)
def systems(context: typer.Context, group: Group = None, json: Json = False) -> None:
    """List the published systems."""
    if context.invoked_subcommand is not None:
        return
    listed = system_rows(group or ())
    if json:
        _dump(listed)
        return
    from meshwise.render import print_rows

    keys = ("id", "name", "priority", "published", "check_kind", "runs_on", "has_check")
    print_rows([{key: row[key] for key in keys} for row in listed], "published systems")


@systems_app.command("check")
def check(
    ids: Annotated[
        list[str] | None,
        typer.Argument(metavar="[ID]...", help="Rows or groups: G6.13, G6.", show_default=False),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Check every row.")] = False,
    json: Json = False,
) -> None:
    """Run the checks of rows or groups: published beside predicted, and a verdict."""
    verdicts = system_verdicts(ids or (), every)
    if json:
        _dump([verdict.to_dict() for verdict in verdicts])
        return
    from meshwise.render import print_rows

    keys = ("id", "verdict", "executed", "published", "predicted", "reason")
    print_rows([{key: verdict.to_dict()[key] for key in keys} for verdict in verdicts])
    for verdict in verdicts:
        for text in verdict.assumptions:
            print(f"  {verdict.id} assumes: {text}")
    print(tally(verdicts))


def tally(verdicts: Sequence[Verdict]) -> str:
    """Return one line that counts the verdicts."""
    counts = dict.fromkeys(("pass", "fail", "not covered"), 0)
    for verdict in verdicts:
        counts[verdict.verdict] += 1
    executed = sum(verdict.executed != "no" for verdict in verdicts)
    said = ", ".join(f"{count} {word}" for word, count in counts.items())
    return f"{len(verdicts)} rows: {said}; {executed} executed."


def _dump(rows: list[dict[str, Any]]) -> None:
    print(jsonlib.dumps(rows, indent=2, ensure_ascii=False))

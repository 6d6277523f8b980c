"""One sentence for every mistake: what is wrong, where, and how to mend it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from simcore.errors import InputError
from simcore.scenario.tables import KINDS
from simcore.scenario.words import MAX_SENTENCE, shown_as, wrong_choice


def _wrong_integer(value: object) -> str:
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return f"must be a whole number: write {int(value)} instead of {value}."
    if isinstance(value, str) and re.fullmatch(r"\d{1,15}", value):
        return f"must be a whole number: write {value} without quotes."
    hint = "; distributions are not available in this version" if isinstance(value, dict) else ""
    return f"must be a whole number, not {shown_as(value)}{hint}."


def _wrong_number(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"= {shown_as(value)} is out of range."
    if isinstance(value, str) and re.fullmatch(r"[0-9.eE+-]{1,20}", value):
        return f"must be a number: write {value} without quotes."
    return f"must be a number, not {shown_as(value)}."


def _bounds(error: Mapping[str, Any]) -> str:
    context = error["ctx"]
    for bound, words in (("ge", "at least"), ("gt", "more than"), ("le", "at most")):
        if bound in context:
            limit = context[bound]
            limit = limit if isinstance(limit, int) else f"{limit:g}"
            return f"= {shown_as(error['input'])} is out of range: it must be {words} {limit}."
    return "is out of range."


def _complaint(error: Mapping[str, Any], place: tuple[str, str]) -> str:
    """Return the end of the sentence for one of pydantic's errors."""
    kind, value = error["type"], error["input"]
    plain: dict[str, Callable[[], str]] = {
        "scenario": lambda: str(error["ctx"]["text"]),
        "missing": lambda: f"is missing: {_missing_hint(place)}",
        "literal_error": lambda: wrong_choice(place, value, _expected(error)),
        "int_type": lambda: _wrong_integer(value),
        "int_from_float": lambda: _wrong_integer(value),
        "float_type": lambda: _wrong_number(value),
        "finite_number": lambda: f"must be a finite number, not {shown_as(value)}.",
        "bool_type": lambda: f"must be true or false, not {shown_as(value)}.",
        "string_type": lambda: f"must be text in quotes, not {shown_as(value)}.",
        "string_too_long": lambda: f"= {shown_as(value)} is too long: give at most 500 characters.",
        "tuple_type": lambda: f"must be a list, not {shown_as(value)}.",
        "too_long": lambda: f"is {shown_as(value)}: give at most 10000.",
    }
    for suffix in ("greater_than_equal", "greater_than", "less_than_equal"):
        plain[suffix] = lambda: _bounds(error)
    return plain[kind]() if kind in plain else f"= {shown_as(value)} is not valid."


def _expected(error: Mapping[str, Any]) -> list[str]:
    return re.findall(r"'([^']*)'", error["ctx"]["expected"])


def _missing_hint(place: tuple[str, str]) -> str:
    table, key = place
    if not key:
        return {
            "workload": f"give its kind ({', '.join(KINDS)}) and the keys of that kind.",
            "cluster": "give gpu, gpus_per_node and nodes, or cluster.",
        }.get(table, "add it.")
    return f"this kind of [{table}] needs it."


def _place(loc: tuple[int | str, ...]) -> tuple[str, str, str]:
    """Return (table, key, index) of a pydantic location, less the tags of unions."""
    table, rest = str(loc[0]), list(loc[1:])
    if table in ("workload", "model") and rest:
        rest = rest[2:] if rest[0] == "op" else rest[1:]
    index = "".join(f"[{part}]" for part in rest[1:] if isinstance(part, int))
    return table, str(rest[0]) if rest else "", index


def sentence_of(error: Mapping[str, Any]) -> str:
    table, key, index = _place(error["loc"])
    key = key or error.get("ctx", {}).get("key", "")
    where = f"[{table}].{key}{index}" if key else f"[{table}]"
    where = f"the table {where}" if error["type"] == "missing" and not key else where
    return f"{where} {_complaint(error, (table, key))}"


def one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= MAX_SENTENCE else line[: MAX_SENTENCE - 3] + "..."


def raise_problems(problems: list[str]) -> NoReturn:
    more = len(problems) - 1
    tail = f" (and {more} more problem{'s' if more > 1 else ''})" if more else ""
    raise InputError(one_line(problems[0])[: MAX_SENTENCE - len(tail)] + tail)

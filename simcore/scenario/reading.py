"""Scenarios from files, standard input, text and dicts; their schema and hash."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import sys
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn

from pydantic import BaseModel

from simcore.errors import InputError
from simcore.scenario.checks import check_scenario, validated
from simcore.scenario.fields import MAX_FILE_BYTES, schedule_names
from simcore.scenario.mistakes import one_line
from simcore.scenario.tables import Scenario
from simcore.scenario.words import key_text, shown_as


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise InputError(
                f"the key {key_text(key)} stands twice in one table: keep one of them."
            )
        found[key] = value
    return found


def _no_constant(name: str) -> NoReturn:
    raise InputError(f"{name} is not a number that a scenario may hold: give a finite one.")


def _from_json(text: str) -> object:
    try:
        return json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise InputError(
            f"not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}."
        ) from None
    except ValueError:
        raise InputError("not valid JSON: a number has too many digits.") from None


# 64 key parts joined by dots: tomllib needs memory in the square of them.
_DEEP_KEY = re.compile(
    r"""(?<![\w-])(?:(?:[\w-]++|"(?:[^"\\\n]|\\.)*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+){64}"""
)


def _from_toml(text: str) -> object:
    if _DEEP_KEY.search(text):
        raise InputError("not valid TOML for a scenario: a dotted key is nested too deeply.")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"not valid TOML: {str(error)[:150]}.") from None
    except ValueError:
        raise InputError("not valid TOML: a number has too many digits.") from None


def _decode(data: bytes, suffix: str) -> object:
    """Return the raw value of a file's bytes; the suffix names the format, or the text does."""
    if len(data) > MAX_FILE_BYTES:
        raise InputError(f"is larger than {MAX_FILE_BYTES // 10**6} MB: a scenario is a few lines.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"not UTF-8 text (byte {error.start}): give a TOML or JSON scenario."
        ) from None
    if not text.strip():
        raise InputError("is empty: give the tables [model], [cluster] and [workload].")
    is_json = suffix == ".json" or (suffix != ".toml" and text.lstrip()[0] in '{["')
    return _from_json(text) if is_json and not _toml_header(text, suffix) else _from_toml(text)


def _toml_header(text: str, suffix: str) -> bool:
    """Return whether text of an unnamed format opens with a TOML table, as ``[model]``."""
    return suffix != ".json" and re.match(r"\s*\[\s*[A-Za-z_\"']", text) is not None


def _read_standard_input() -> bytes:
    if sys.stdin is None:
        raise InputError("is closed: pipe a TOML or JSON scenario into it.")
    if hasattr(sys.stdin, "buffer"):
        return sys.stdin.buffer.read(MAX_FILE_BYTES + 1)
    return sys.stdin.read(MAX_FILE_BYTES + 1).encode("utf-8", "surrogatepass")


def _read(source: str | Path) -> tuple[bytes, str]:
    """Return a file's bytes and its suffix; ``-`` is standard input."""
    if str(source) == "-":
        return _read_standard_input(), ""
    path = Path(source)
    try:
        if path.is_dir():
            raise InputError("is a folder: give a .toml or .json file.")
        with path.open("rb") as file:
            return file.read(MAX_FILE_BYTES + 1), path.suffix.lower()
    except FileNotFoundError:
        raise InputError("no such file: give the path of a .toml or .json scenario.") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a path"
        raise InputError(f"cannot be read: {reason}.") from None


def _origin(source: object) -> str:
    """Return the words that open a sentence about ``source``."""
    if not isinstance(source, str | Path):
        return ""
    if str(source) == "-":
        return "standard input: "
    text = str(source)
    text = text if text and text.isprintable() else repr(text)
    return (text if len(text) <= 60 else "..." + text[-57:]) + ": "


def _checked(raw: object, folder: Path) -> Scenario:
    """Return the scenario of a raw value, all its tables checked."""
    if not isinstance(raw, Mapping):
        raise InputError(f"a scenario is a table of tables, not {shown_as(raw)}.")
    scenario = validated(raw)
    scenario._folder = folder
    check_scenario(scenario)
    return scenario


def _guarded(make: Callable[[], Scenario], origin: str) -> Scenario:
    """Return ``make()``; open its complaints with ``origin``, and bound their length."""
    try:
        return make()
    except InputError as error:
        raise InputError(one_line(origin + str(error))) from None
    except RecursionError:
        raise InputError(f"{origin}tables or lists are nested too deeply.") from None


def load_scenario(source: str | Path | Mapping[str, Any]) -> Scenario:
    """Return the scenario of a .toml or .json file, of ``-`` (standard input) or of a dict.

    Text that opens with a brace is read as JSON itself. Raises `InputError`.
    """
    if isinstance(source, str) and source.lstrip().startswith("{"):
        return parse_scenario(source)
    if isinstance(source, str | Path):
        path = source

        def read() -> Scenario:
            folder = Path() if str(path) == "-" else Path(path).parent
            return _checked(_decode(*_read(path)), folder)

        return _guarded(read, _origin(path))
    return _guarded(lambda: _checked(source, Path()), "")


def parse_scenario(text: str, folder: str | Path = ".") -> Scenario:
    """Return the scenario of JSON or TOML text, as one line of a JSON Lines file."""
    data = text.encode("utf-8", "surrogatepass")
    return _guarded(lambda: _checked(_decode(data, ""), Path(folder)), "")


def make_scenario(**tables: Any) -> Scenario:
    """Return the scenario of tables given as dicts or as this module's models."""
    raw = {
        name: table.model_dump(exclude_unset=True) if isinstance(table, BaseModel) else table
        for name, table in tables.items()
        if not isinstance(table, NoneType)
    }
    return load_scenario(raw)


def scenario_schema() -> dict[str, Any]:
    """Return the JSON Schema of a scenario, with the meaning and unit of every key."""
    schema = Scenario.model_json_schema()
    schema["title"] = "meshwise scenario"
    schema["$defs"]["ParallelTable"]["properties"]["schedule"]["enum"] = sorted(schedule_names())
    return schema


def scenario_hash(scenario: Scenario) -> str:
    """Return 16 hex digits that are equal for scenarios that mean the same."""
    data = scenario.model_dump(mode="json")
    strategy = scenario.strategy()
    data["parallel"] = "auto" if strategy is None else dataclasses.asdict(strategy)
    if "microbatch" in data["workload"]:
        data["workload"]["microbatch"] = scenario.microbatch
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]

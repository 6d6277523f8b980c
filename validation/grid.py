"""Grid files: many scenarios that share most of their tables.

A grid is TOML: ``[defaults.<table>]`` hold keys of every case, ``[models.<name>]`` networks, and
each ``[[case]]`` has a ``name``, a ``model`` (one of those names, or a table) and the tables of a
scenario, whose keys are laid over the defaults.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simcore.errors import InputError, unknown
from simcore.scenario import TABLES, Scenario, parse_scenario

GRID_KEYS = ("case", "defaults", "models", "title")
MAX_CASES = 500
Table = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Case:
    """One scenario of a grid; ``group`` is equal for cases of one model and batch."""

    name: str
    model: str
    group: str
    scenario: Scenario


@dataclass(frozen=True, slots=True)
class Grid:
    """The cases of a grid file, in its order."""

    title: str
    cases: tuple[Case, ...]


def read_grid(path: Path) -> Grid:
    """Return the cases of a grid file. Raises `InputError`, naming the case that is wrong."""
    table = _read(path)
    unknown_keys = sorted(set(table) - set(GRID_KEYS))
    if unknown_keys:
        raise InputError(f"{path.name}: {unknown('grid key', unknown_keys[0], GRID_KEYS)}")
    cases = table.get("case", [])
    if not isinstance(cases, list) or not all(isinstance(case, dict) for case in cases):
        raise InputError(f"{path.name}: write each case as a table under [[case]].")
    if not 1 <= len(cases) <= MAX_CASES:
        raise InputError(f"{path.name}: give 1 to {MAX_CASES} [[case]] tables, not {len(cases)}.")
    found = tuple(_case(raw, table, path) for raw in cases)
    names = [case.name for case in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"{path.name}: two cases are called {twice!r}: rename one.")
    return Grid(str(table.get("title", path.stem)), found)


def _read(path: Path) -> Table:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the grid {path}: {error.strerror}.") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path.name} is not a TOML file: {str(error)[:150]}.") from None


def _case(raw: Table, grid: Table, path: Path) -> Case:
    name = raw.get("name")
    if not isinstance(name, str) or not name.strip():
        raise InputError(f"{path.name}: every [[case]] needs a name.")
    label, tables = _tables(raw, grid)
    where = f"{path.name}, case {name!r}: "
    try:
        scenario = parse_scenario(json.dumps(tables), folder=path.parent)
    except InputError as error:
        raise InputError(f"{where}{error}") from None
    except (TypeError, ValueError):
        raise InputError(f"{where}its values must be text, numbers, lists or tables.") from None
    if scenario.workload.kind not in ("train", "generate"):
        raise InputError(f"{where}only workloads of kind 'train' and 'generate' are run.")
    if scenario.strategy() is None:
        raise InputError(f"{where}give [parallel]: the cases of a grid name their strategy.")
    return Case(name, label, f"{label}, {batch_text(scenario)}", scenario)


def _tables(raw: Table, grid: Table) -> tuple[str, dict[str, Any]]:
    """Return the name of the case's model and its scenario's raw tables."""
    tables: dict[str, Any] = {name: value for name, value in raw.items() if name != "name"}
    model, label = tables.get("model"), "inline"
    if isinstance(model, str):
        models = grid.get("models", {})
        if model not in models:
            raise unknown("model of the grid", model, models)
        label, tables["model"] = model, models[model]
    for name, defaults in grid.get("defaults", {}).items():
        if name not in TABLES or not isinstance(defaults, Mapping):
            raise unknown("table under [defaults]", name, TABLES)
        own = tables.get(name, {})
        tables[name] = {**defaults, **own} if isinstance(own, Mapping) else own
    return label, tables


def batch_text(scenario: Scenario) -> str:
    """Return the size of the work in a few words."""
    table: Any = scenario.workload
    if table.kind == "train":
        return f"{table.global_batch} x {table.seq_len} tokens"
    return f"{table.batch} x ({table.input_tokens} + {table.output_tokens}) tokens"

"""The one input: a scenario's tables, how they are read, checked and turned into core types.

`load_scenario` reads a file, standard input or a dict; `parse_scenario` reads text;
`make_scenario` takes the tables as keyword arguments. Each raises `InputError` with one sentence.
"""

from __future__ import annotations

from simcore.scenario.checks import check_scenario
from simcore.scenario.fields import MAX_FILE_BYTES, schedule_names
from simcore.scenario.model import ModelTable
from simcore.scenario.reading import (
    load_scenario,
    make_scenario,
    parse_scenario,
    scenario_hash,
    scenario_schema,
)
from simcore.scenario.recommender import RecommenderTable
from simcore.scenario.tables import KINDS, TABLES, ParallelTable, Scenario

__all__ = [
    "KINDS",
    "MAX_FILE_BYTES",
    "TABLES",
    "ModelTable",
    "ParallelTable",
    "RecommenderTable",
    "Scenario",
    "check_scenario",
    "load_scenario",
    "make_scenario",
    "parse_scenario",
    "scenario_hash",
    "scenario_schema",
    "schedule_names",
]

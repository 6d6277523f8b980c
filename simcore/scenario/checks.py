"""From raw tables to a checked `Scenario`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, get_args

from pydantic import ValidationError

from simcore.errors import InputError, nearest
from simcore.mixed import check_mixed
from simcore.ping_pong import check_ping_pong
from simcore.recommendation import check_recommender
from simcore.recompute import check_recompute
from simcore.scenario.effect import check_effective, check_generates
from simcore.scenario.fields import GenerateMetric, Table, TrainMetric
from simcore.scenario.mistakes import raise_problems, sentence_of
from simcore.scenario.recommender import RecommenderTable
from simcore.scenario.tables import (
    KIND_TABLES,
    KINDS,
    OP_TABLES,
    TABLES,
    GoalTable,
    Scenario,
    class_of,
    homes_of,
)
from simcore.scenario.words import (
    LATER_KEYS,
    LATER_TABLES,
    either_of,
    key_text,
    shown_as,
    wrong_choice,
)
from simcore.scenario.workloads import CollectiveWorkload
from simcore.schedules import find_schedule
from simcore.strategy import (
    MESH_AXES,
    ParallelStrategy,
    check_split,
    check_strategy,
    microbatches,
    stage_layers,
)
from simcore.streaming import check_streaming
from simcore.swapping import check_swapping
from simcore.workloads import Generation, RecommendStep, TrainStep


def _workload_class(raw: object) -> tuple[type[Table] | None, str]:
    """Return the class of a raw [workload] and "", or None and the sentence of what is wrong."""
    if not isinstance(raw, dict):
        return None, ""
    for key, table in (("kind", KIND_TABLES), ("op", OP_TABLES)):
        choices = KINDS if key == "kind" else tuple(OP_TABLES)
        value = raw.get(key)
        if key not in raw:
            return None, f"[workload].{key} is missing: give {either_of(sorted(choices))}."
        if not isinstance(value, str) or value not in choices:
            return None, _wrong_kind(key, value, choices)
        if value in table:
            return table[value], ""
    raise AssertionError("every kind has a class")


def _wrong_kind(key: str, value: object, choices: tuple[str, ...]) -> str:
    return f"[workload].{key} {wrong_choice(('workload', key), value, choices)}"


def _unknown_table(name: object) -> str:
    if not isinstance(name, str):
        return f"{key_text(name)} is not a table: the tables are {', '.join(TABLES)}."
    if name in LATER_TABLES:
        about = LATER_TABLES[name]
        return (
            f"[{name}] belongs to {about}, which this version does not offer: remove the table; "
            f"workload kinds are {', '.join(KINDS)}."
        )
    homes = homes_of(name)
    if homes:
        return f"the key {key_text(name)} stands outside any table: it belongs to {homes[0]}."
    near = nearest(name, TABLES) if len(name) < 100 else None
    hint = f"did you mean [{near}]?" if near else f"the tables are {', '.join(TABLES)}."
    return f"[{key_text(name)}] is not a table: {hint}"


def _unknown_key(table: str, key: object, fields: Iterable[str], what: str) -> str:
    where = f"[{table}].{key_text(key)}"
    name = key if isinstance(key, str) and len(key) < 100 else ""
    if name in LATER_KEYS.get(table, ()):
        return f"{where} is not available in this version: remove it."
    known = sorted(fields)
    homes = [home for home in homes_of(name) if home != f"[{table}]"]
    near = nearest(name, known) if name else None
    if homes:
        return f"{where} is not a key of {what}: it belongs to {homes[0]}."
    if near:
        return f"{where} is not a key of {what}: did you mean {near}?"
    listed = ", ".join(known[:14]) + (", ..." if len(known) > 14 else "")
    return f"{where} is not a key of {what}: its keys are {listed}."


def _structure(raw: Mapping[Any, Any]) -> tuple[list[str], dict[str, Any]]:
    """Return the faults of tables and keys, and the scenario less what is unknown."""
    problems: list[str] = []
    clean: dict[str, Any] = {}
    work, trouble = _workload_class(raw.get("workload"))
    if trouble:
        problems.append(trouble)
    for name, table in raw.items():
        if not isinstance(name, str) or name not in TABLES:
            problems.append(_unknown_table(name))
            continue
        if not isinstance(table, dict):
            problems.append(f"[{name}] must be a table of keys, not {shown_as(table)}.")
            continue
        owner = work if name == "workload" else class_of(name, table)
        clean[name] = table if owner is None else _known_keys(name, table, owner, problems)
    return problems, clean


def _known_keys(
    name: str, table: dict[Any, Any], owner: type[Table], problems: list[str]
) -> dict[str, Any]:
    """Return the table less unknown keys, which are added to ``problems``."""
    what = (
        f"a {table.get('op') if table['kind'] == 'op' else table['kind']} workload"
        if name == "workload"
        else ("a [model] of kind recommender" if owner is RecommenderTable else f"[{name}]")
    )
    known = {key: value for key, value in table.items() if key in owner.model_fields}
    fields = owner.model_fields
    problems += [_unknown_key(name, key, fields, what) for key in table if key not in known]
    return known


# Faults that `_structure` has already put in words.
_STRUCTURAL = ("union_tag_invalid", "union_tag_not_found", "model_type", "model_attributes_type")


def validated(raw: Mapping[Any, Any]) -> Scenario:
    """Return the checked scenario of a raw mapping."""
    problems, clean = _structure(raw)
    try:
        scenario = Scenario.model_validate(clean)
    except ValidationError as error:
        found = error.errors(include_url=False)
        absent = [e for e in found if e["type"] == "missing"]
        others = [e for e in found if e["type"] not in (*_STRUCTURAL, "missing")]
        named = [e for e in absent if not (len(e["loc"]) == 1 and e["loc"][0] in raw)]
        problems += [sentence_of(e) for e in (*others, *named)]
        raise_problems(problems or ["the scenario is not valid."])
    if problems:
        raise_problems(problems)
    return scenario


def _check_tables(scenario: Scenario) -> None:
    """Raise where tables do not fit the workload's kind."""
    kind = scenario.workload.kind
    if kind in {"train", "generate", "recommend"} and scenario.model is None:
        raise InputError(f"the table [model] is missing: a {kind} workload needs it.")
    if kind not in {"train", "generate"}:
        for name in ("parallel", "goal") if kind == "recommend" else ("model", "parallel", "goal"):
            if getattr(scenario, name) is not None:
                raise InputError(
                    f"[{name}] has no meaning for a workload of kind {kind!r}: remove it."
                )
    if scenario.decoding is not None and kind != "generate":
        raise InputError(f"[decoding] has no meaning for a workload of kind {kind!r}: remove it.")
    if scenario.faults is not None:
        _check_faults(scenario)
    if scenario.goal is not None:
        _check_goal(scenario.goal, kind)
    if isinstance(scenario.workload, CollectiveWorkload):
        _check_ranks(scenario.workload.ranks, scenario.world)


def _check_faults(scenario: Scenario) -> None:
    """Raise where [faults] stands beside anything but a run of known length."""
    work = scenario.workload
    if work.kind != "train":
        raise InputError(
            f"[faults] has no meaning for a workload of kind {work.kind!r}: remove it."
        )
    if work.tokens is None and work.steps is None:
        raise InputError("[faults] needs the length of the run: give [workload].tokens, or steps.")


def _check_goal(goal: GoalTable, kind: str) -> None:
    key = "minimise" if goal.minimise is not None else "maximise"
    metrics = get_args(TrainMetric if kind == "train" else GenerateMetric)
    metric = getattr(goal, key)
    if metric not in metrics:
        raise InputError(
            f"[goal].{key} = {metric!r} is no metric of a {kind} workload: "
            f"did you mean {nearest(metric, metrics) or metrics[0]!r}?"
        )


def _check_ranks(ranks: int, world: int | None) -> None:
    if world is not None and ranks > world:
        raise InputError(
            f"[workload].ranks = {ranks} exceeds the cluster's {world} ranks: lower it, or raise "
            "[cluster].gpus_per_node or nodes."
        )


def _check_microbatch(scenario: Scenario) -> None:
    alias = getattr(scenario.workload, "microbatch", None)
    if alias is not None and scenario.microbatch != alias:
        raise InputError(
            f"[workload].microbatch = {alias} disagrees with [parallel].microbatch = "
            f"{scenario.microbatch}: make them agree or drop one."
        )
    work = scenario.work()
    if isinstance(work, TrainStep) and alias and not work.lengths and work.global_batch % alias:
        raise InputError(
            f"[workload].global_batch = {work.global_batch} is not a multiple of "
            f"microbatch = {alias}: change one."
        )


def _check_mesh(parallel: ParallelStrategy, world: int | None) -> None:
    """Raise where the mesh does not cover the cluster, in terms of the keys that are not 1."""
    if world is None or parallel.world == world:
        return
    degrees = [(axis, getattr(parallel, axis)) for axis in MESH_AXES]
    product = " x ".join(f"{axis} {degree}" for axis, degree in degrees if degree > 1) or "1"
    raise InputError(
        f"[parallel] makes {product} = {parallel.world} ranks but [cluster] has {world} "
        "(gpus_per_node x nodes): make them agree."
    )


def _check_balance(scenario: Scenario, parallel: ParallelStrategy | None) -> None:
    """Raise where lengths and the way to balance them do not stand together."""
    differ = getattr(scenario.workload, "lengths", None) is not None
    if differ and parallel is None:
        raise InputError(
            "[workload].lengths needs a strategy, which the planner does not choose where lengths "
            "differ: give [parallel] with its degrees."
        )
    if parallel is not None and parallel.balance and not differ:
        raise InputError(
            f"[parallel].balance = {parallel.balance!r} has no meaning for sequences of one "
            "length: give [workload].lengths, or remove it."
        )


def check_scenario(scenario: Scenario) -> None:
    """Raise `InputError` where tables contradict one another.

    Where only a named cluster knows the world, the caller checks that with `check_strategy`.
    """
    _check_tables(scenario)
    _check_microbatch(scenario)
    parallel = scenario.strategy()
    if parallel is not None:
        _check_mesh(parallel, scenario.world)
    _check_balance(scenario, parallel)
    work = scenario.work()
    if isinstance(work, RecommendStep):
        model = scenario.recommender()
        if scenario.world is not None:
            check_recommender(model, scenario.world, work.global_batch)
        return
    if scenario.model is None:
        return
    spec = scenario.model_spec()
    if parallel is None:
        return
    if isinstance(work, Generation):
        check_generates(parallel)
    check_effective(parallel)
    find_schedule(parallel.schedule).check(parallel.virtual_stages, parallel.schedule)
    check_recompute(parallel, stage_layers(spec, parallel))
    check_strategy(spec, parallel, parallel.world)
    if isinstance(work, TrainStep) and work.lengths:
        check_mixed(spec, parallel)
    elif isinstance(work, TrainStep):
        microbatches(parallel, work)
        check_split(spec, parallel, work.seq_len)
        check_streaming(spec, parallel, work.seq_len // parallel.cp)
        check_swapping(spec, parallel)
        check_ping_pong(spec, parallel)

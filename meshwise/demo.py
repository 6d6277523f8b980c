"""The main job, end to end: calibrate, plan, really run the best plans, compare, report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hwmodels.profile import default_path, read_profile
from meshwise.execution import calibrate_machine, load_warning
from meshwise.prediction import provenance, question_of, strategy_table, strategy_text
from meshwise.result import Result
from meshwise.setting import resolve
from simcore.errors import InputError
from simcore.scenario import ParallelTable, Scenario, load_scenario, scenario_hash
from simcore.strategy import ParallelStrategy
from solvers.search import Candidate, search
from validation.compare import Compared, validate_cases
from validation.grid import Case, batch_text
from validation.report import write_report

SCENARIO = Path("examples") / "cpu_train.toml"
EVERYTHING = 10_000  # more strategies than two ranks have
Say = Callable[[str], None]


def find_scenario() -> Path:
    """Return the demo's scenario: under the working folder, or beside the packages."""
    for folder in (Path(), Path(__file__).resolve().parents[1]):
        if (folder / SCENARIO).is_file():
            return folder / SCENARIO
    raise InputError(f"{SCENARIO} is not here: run the demo from a copy of the repository.")


def layout(parallel: ParallelStrategy) -> tuple[object, ...]:
    """Return what tells two ways of sharing the work apart, microbatch and schedule aside."""
    return (
        parallel.dp_replicate,
        parallel.dp_shard,
        parallel.tp,
        parallel.pp,
        parallel.zero,
        parallel.sequence_parallel,
    )


def best_of_each_layout(candidates: Sequence[Candidate], top: int) -> list[Candidate]:
    """Return the best plans that share the work in different ways, best first."""
    found: dict[tuple[object, ...], Candidate] = {}
    for each in candidates:
        found.setdefault(layout(each.strategy), each)
    return list(found.values())[:top]


def case_of(scenario: Scenario, parallel: ParallelStrategy) -> Case:
    """Return the scenario with a strategy, as a case that can be run beside others."""
    table = ParallelTable.model_validate(strategy_table(parallel))
    named = scenario.model_copy(update={"parallel": table})
    label = scenario.model_spec().name
    return Case(strategy_text(parallel), label, f"{label}, {batch_text(scenario)}", named)


def rows_of(cases: Sequence[Compared]) -> list[dict[str, Any]]:
    """Return prediction and measurement of every plan that was run, in the planner's order."""
    order = sorted(range(len(cases)), key=lambda i: cases[i].measured_s)
    places = {index: place for place, index in enumerate(order, start=1)}
    return [
        {
            "strategy": each.name,
            "predicted_step_s": each.predicted_s,
            "measured_step_s": each.measured_s,
            "error": each.error,
            "predicted_place": index + 1,
            "measured_place": places[index],
        }
        for index, each in enumerate(cases)
    ]


def verdict(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return in words which plan really was fastest."""
    fastest = min(rows, key=lambda row: float(row["measured_step_s"]))
    if fastest["predicted_place"] == 1:
        return f"the plan predicted to be fastest really was: {fastest['strategy']}."
    first = rows[0]
    loss = float(first["measured_step_s"]) / float(fastest["measured_step_s"]) - 1
    return (
        f"really fastest was {fastest['strategy']}, predicted number "
        f"{fastest['predicted_place']}; the plan chosen was {loss:.1%} slower."
    )


def prepare(fresh: bool, say: Say) -> bool:
    """Calibrate this machine unless it has a profile that can be read; return whether it did."""
    if not fresh and _has_profile():
        return False
    say("calibrating this machine (once; a minute or two)")
    calibrate_machine(None, progress=say)
    return True


def _has_profile() -> bool:
    try:
        return default_path().is_file() and bool(read_profile(default_path()).name)
    except InputError:  # of an older version
        return False


def run_demo(
    *, fresh: bool = False, top: int = 5, out: Path = Path("report"), say: Say = lambda text: None
) -> Result:
    """Return the demo's result; its report lies in ``out``."""
    path = find_scenario()
    now = prepare(fresh, say)
    scenario = load_scenario(path)
    setting = resolve(scenario)
    assert setting.profile is not None
    say("planning a training step on two ranks")
    plan = search(question_of(scenario, setting), top=EVERYTHING)
    chosen = best_of_each_layout(plan.candidates, top)
    if not chosen:
        raise InputError("no strategy of the demo fits this machine's memory.")
    busy = load_warning(setting.cluster.world)
    say(f"running {len(chosen)} plans for real on {setting.cluster.world} ranks")
    cases = [case_of(scenario, each.strategy) for each in chosen]
    comparison = validate_cases("meshwise demo", cases, setting.profile, say)
    report = write_report(comparison, out)
    rows = rows_of(comparison.cases)
    metrics = {
        "verdict": verdict(rows),
        "strategies_priced": len(plan.candidates),
        **comparison.summary(),
        "calibrated_now": now,
        "report": str(report),
        "plans": rows,
    }
    notes = (
        *setting.assumptions,
        "of every way to share the work the best microbatch and schedule is run.",
        *comparison.assumptions,
    )
    return Result(
        scenario_hash(scenario),
        metrics,
        notes,
        (*setting.warnings, *busy),
        provenance(scenario, setting, "estimate and execute"),
    )

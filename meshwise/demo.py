"""The main job, end to end: calibrate, plan, really run the best plans, compare, report."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from backends.launch import Job, RunResult, run_many
from hwmodels.profile import default_path
from meshwise.execution import (
    calibrate_machine,
    load_warning,
    options_of,
    runnable,
    work_of,
)
from meshwise.prediction import provenance, question_of, strategy_text
from meshwise.result import Result
from meshwise.setting import Setting, resolve
from simcore.errors import InputError
from simcore.scenario import Scenario, load_scenario, scenario_hash
from simcore.strategy import ParallelStrategy
from solvers.search import Candidate, search

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
    return (parallel.dp_replicate, parallel.dp_shard, parallel.tp, parallel.pp, parallel.zero,
            parallel.sequence_parallel)


def best_of_each_layout(candidates: Sequence[Candidate], top: int) -> list[Candidate]:
    """Return the best plans that share the work in different ways, best first."""
    found: dict[tuple[object, ...], Candidate] = {}
    for each in candidates:
        found.setdefault(layout(each.strategy), each)
    return list(found.values())[:top]


def rows_of(chosen: Sequence[Candidate], runs: Sequence[RunResult]) -> list[dict[str, Any]]:
    """Return prediction and measurement of every plan that was run."""
    order = sorted(range(len(runs)), key=lambda i: runs[i].step_s)
    places = {index: place for place, index in enumerate(order, start=1)}
    return [
        {
            "strategy": strategy_text(each.strategy),
            "predicted_step_s": float(each.metrics["step_s"]),
            "measured_step_s": run.step_s,
            "error": float(each.metrics["step_s"]) / run.step_s - 1,
            "predicted_place": index + 1,
            "measured_place": places[index],
        }
        for index, (each, run) in enumerate(zip(chosen, runs, strict=True))
    ]


def run_plans(
    scenario: Scenario, chosen: Sequence[Candidate], say: Say
) -> list[RunResult]:
    """Return real runs of the plans, all in one launch."""
    options = options_of(scenario, None, None, None)
    model, work = scenario.model_spec(), runnable(scenario)
    jobs = [Job(work_of(model, each.strategy, work), options) for each in chosen]
    say(f"running {len(jobs)} plans for real on {jobs[0].processes} ranks")
    return run_many(jobs, lambda done: say(f"{done} of {len(jobs)} plans were run"))


def verdict(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return in words which plan really was fastest."""
    fastest = min(rows, key=lambda row: float(row["measured_step_s"]))
    if fastest["predicted_place"] == 1:
        return f"the plan predicted to be fastest really was: {fastest['strategy']}."
    first = rows[0]
    loss = float(first["measured_step_s"]) / float(fastest["measured_step_s"]) - 1
    return (f"really fastest was {fastest['strategy']}, predicted number "
            f"{fastest['predicted_place']}; the plan chosen was {loss:.1%} slower.")


def median_error(rows: Sequence[Mapping[str, Any]]) -> float:
    """Return the median absolute relative error."""
    import statistics

    return statistics.median(abs(float(row["error"])) for row in rows)


def prepare(fresh: bool, say: Say) -> bool:
    """Calibrate this machine if that was not done yet; return whether it was done now."""
    if default_path().is_file() and not fresh:
        return False
    say("calibrating this machine (once; about a minute)")
    calibrate_machine(None, progress=say)
    return True


def run_demo(
    *, fresh: bool = False, top: int = 5, out: Path = Path("report"), say: Say = lambda text: None
) -> Result:
    """Return the demo's result; its report lies in ``out``."""
    path = find_scenario()
    now = prepare(fresh, say)
    scenario = load_scenario(path)
    setting = resolve(scenario)
    say("planning a training step on two ranks")
    plan = search(question_of(scenario, setting), top=EVERYTHING)
    chosen = best_of_each_layout(plan.candidates, top)
    if not chosen:
        raise InputError("no strategy of the demo fits this machine's memory.")
    busy = load_warning(setting.cluster.world)
    runs = run_plans(scenario, chosen, say)
    rows = rows_of(chosen, runs)
    metrics = {
        "plans": rows,
        "strategies_priced": len(plan.candidates),
        "median_absolute_error": median_error(rows),
        "verdict": verdict(rows),
        "calibrated_now": now,
    }
    result = _result(scenario, setting, metrics, busy)
    return dataclasses.replace(
        result, metrics={**metrics, "report": str(write_demo_report(result, chosen, runs, out))})


def _result(
    scenario: Scenario, setting: Setting, metrics: Mapping[str, Any], busy: tuple[str, ...]
) -> Result:
    notes = (
        *setting.assumptions,
        "of every way to share the work the best microbatch and schedule is run; no run is used "
        "for calibration.",
        "measured: median of the repeats after warm-up, until the slowest rank is done.",
    )
    return Result(scenario_hash(scenario), metrics, notes, (*setting.warnings, *busy),
                  provenance(scenario, setting, "estimate and execute"))


def write_demo_report(
    result: Result, chosen: Sequence[Candidate], runs: Sequence[RunResult], out: Path
) -> Path:
    """Write report.html into ``out`` and return its path."""
    from meshwise.api import write_text
    from meshwise.render import page_html

    path = out / "report.html"
    write_text(path, page_html("meshwise demo", result))
    return path

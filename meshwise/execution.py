"""Real runs: a scenario on ranks of this machine, and its prediction beside the measurement."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import statistics
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from backends.launch import GenerationJob, Job, RunOptions, RunResult, run_many
from hwmodels.catalogue import THIS_CPU
from hwmodels.profile import Profile, default_path, read_profile
from meshwise import __version__, recommendation
from meshwise.lengths import measured, share_out
from meshwise.prediction import Answer, network_of, provenance, strategy_table
from meshwise.prediction import choose_strategy as plan_strategy
from meshwise.result import Result
from meshwise.setting import Setting, resolve
from simcore.decode import passes
from simcore.errors import InputError
from simcore.lower import check_generation, lower_training
from simcore.metrics import Metrics, PassTimes, generate_metrics, pass_program, train_metrics
from simcore.models import ModelSpec
from simcore.program import Program
from simcore.scenario import Scenario, scenario_hash
from simcore.strategy import ParallelStrategy, check_strategy
from simcore.workloads import Generation, RecommendStep, TrainStep

MAX_RANKS = 16  # processes that one machine is asked to start
MAX_GRID_BYTES = 1_000_000
Say = Callable[[str], None]


# ---------------------------------------------------------------- jobs


def runnable(scenario: Scenario) -> TrainStep | Generation | RecommendStep:
    """Return the workload. Raises `InputError` for kinds that are not run on ranks."""
    work = scenario.work()
    if not isinstance(work, TrainStep | Generation | RecommendStep):
        raise InputError(
            f"a workload of kind {scenario.workload.kind!r} cannot be run: give one "
            "of kind 'train', 'generate' or 'recommend'."
        )
    return work


def strategy_of(scenario: Scenario, setting: Setting) -> ParallelStrategy:
    """Return the scenario's strategy, or the planner's. Raises `InputError` where there is none."""
    given = scenario.strategy()
    found = given or plan_strategy(scenario, setting)[0]
    if found is None:
        raise InputError("no strategy covers the cluster: give [parallel], or change [cluster].")
    check_strategy(scenario.model_spec(), found, setting.cluster.world)
    return found


def work_of(
    model: ModelSpec,
    parallel: ParallelStrategy,
    work: TrainStep | Generation,
    method: str = "autoregressive",
) -> Program | GenerationJob:
    """Return what the ranks run."""
    if isinstance(work, TrainStep):
        return lower_training(model, parallel, work)
    check_generation(parallel, work)
    steps = passes(method, work)
    later = (
        steps[-1]
        if len(steps) > 1
        else dataclasses.replace(steps[0], new_rows=1, cached_rows=work.input_tokens)
    )
    return GenerationJob(
        pass_program(model, parallel, work, steps[0]),
        pass_program(model, parallel, work, later),
        work,
        method,
    )


def options_of(
    scenario: Scenario, rank: int | None, repeats: int | None, timeout_s: float | None
) -> RunOptions:
    """Return how the scenario's [run] table wants it run."""
    table = scenario.run
    gpu = table.backend == "gpu"
    return RunOptions(
        seed=table.seed,
        repeats=repeats or table.repeats,
        warmup=table.warmup,
        device="cuda" if gpu else "cpu",
        backend="nccl" if gpu else "gloo",
        alone_rank=rank,
        record_spans=True,
        timeout_s=timeout_s or table.timeout_s,
    )


def _check_rank(rank: int | None, world: int) -> None:
    if rank is not None and not 0 <= rank < world:
        raise InputError(
            f"--rank {rank} is not one of the scenario's {world} ranks: give one from "
            f"0 to {world - 1}."
        )
    if rank is None and world > MAX_RANKS:
        raise InputError(
            f"the scenario has {world} ranks, more than the {MAX_RANKS} that one "
            "machine starts: give --rank to run one of them alone."
        )


# ---------------------------------------------------------------- measured metrics


def measured_metrics(
    model: ModelSpec,
    parallel: ParallelStrategy,
    work: TrainStep | Generation,
    job: Program | GenerationJob,
    found: RunResult,
    setting: Setting,
) -> Metrics:
    """Return the metrics of a run, with the same names as a prediction's."""
    room, reserve = setting.memory_bytes, setting.reserve_bytes
    if isinstance(work, Generation):
        assert isinstance(job, GenerationJob)
        # Medians pass by pass need not sum to the median generation: share that out instead.
        share = found.step_s / sum(found.pass_seconds)
        seconds = tuple(share * each for each in found.pass_seconds)
        times = PassTimes(tuple(passes(job.method, work)), seconds)
        metrics = generate_metrics(
            model, parallel, work, times, memory_bytes=room, reserve_bytes=reserve
        )
    else:
        assert isinstance(job, Program)
        peak = setting.peak_flops_per_s(model.compute_dtype)
        metrics = train_metrics(
            model,
            parallel,
            work,
            job,
            found.timeline(),
            chip_peak_flops_per_s=peak,
            memory_bytes=room,
            reserve_bytes=reserve,
        )
    return metrics | repeated(found)


def repeated(found: RunResult) -> Metrics:
    """Return what the repeats and the ranks of a run took and moved."""
    return {
        "repeats_s": list(found.seconds),
        "ranks": [
            {
                "rank": each.rank,
                "median_s": statistics.median(each.seconds),
                "payload_bytes": {
                    f"{kind}.{group}": size for (kind, group), size in each.payload_bytes.items()
                },
            }
            for each in found.ranks
        ],
    }


def run_scenario(
    scenario: Scenario,
    rank: int | None = None,
    repeats: int | None = None,
    timeout_s: float | None = None,
    profile: Path | str | None = None,
    strategy: ParallelStrategy | None = None,
) -> Result:
    """Return what a real run measured."""
    work, setting = runnable(scenario), resolve(scenario, profile)
    _check_rank(rank, setting.cluster.world)
    options = options_of(scenario, rank, repeats, timeout_s)
    busy = load_warning(1 if rank is not None else setting.cluster.world)
    origin = provenance(scenario, setting, "execute") | network_of(scenario)
    if isinstance(work, RecommendStep):
        found, metrics = _run_recommender(scenario, work, setting, options)
    else:
        parallel = strategy or strategy_of(scenario, setting)
        found, metrics = _run_transformer(scenario, work, parallel, setting, options)
        origin["strategy"] = strategy_table(parallel)
    origin["fingerprint"] = dict(found.ranks[0].fingerprint)
    timeline = None if isinstance(work, Generation) else found.timeline()
    return Result(
        scenario_hash(scenario), metrics, _run_notes(rank, setting, options), busy, origin, timeline
    )


def _run_transformer(
    scenario: Scenario,
    work: TrainStep | Generation,
    parallel: ParallelStrategy,
    setting: Setting,
    options: RunOptions,
) -> tuple[RunResult, Metrics]:
    """Return a run of a training step or a generation, and its metrics."""
    model = scenario.model_spec()
    if isinstance(work, TrainStep) and work.lengths:
        shared = share_out(model, work, parallel, setting)
        found = run_many([Job(shared.mixed, options)])[0]
        return found, measured(shared, setting, found.timeline()) | repeated(found)
    method = scenario.decoding.method if scenario.decoding else "autoregressive"
    job = work_of(model, parallel, work, method)
    found = run_many([Job(job, options)])[0]
    return found, measured_metrics(model, parallel, work, job, found, setting)


def _run_recommender(
    scenario: Scenario, work: RecommendStep, setting: Setting, options: RunOptions
) -> tuple[RunResult, Metrics]:
    """Return a run of a recommendation model's step, and its metrics."""
    program = recommendation.lowered(scenario, work, setting)
    found = run_many([Job(program, options)])[0]
    metrics = recommendation.metrics_of(scenario, work, program, setting, found.timeline())
    return found, metrics | repeated(found)


def load_warning(ranks: int) -> tuple[str, ...]:
    """Return a warning where other processes leave this machine too few cores for the ranks."""
    try:
        load = os.getloadavg()[0]
    except (OSError, AttributeError):
        return ()
    cores = os.cpu_count() or 1
    if load + ranks <= cores + 1:
        return ()
    return (
        f"this machine was busy when the run started (load {load:.1f} on {cores} cores): its "
        "times are those of a shared machine.",
    )


def _run_notes(rank: int | None, setting: Setting, options: RunOptions) -> tuple[str, ...]:
    notes = [
        f"measured: median of {options.repeats} repeats after {options.warmup} warm-up steps, "
        "until the slowest rank is done; weights and tokens are random.",
        "peak memory and hfu's FLOPs are the program's own, not measured.",
        f"ranks ran on {options.device}, whatever [cluster] names ({setting.cluster.chip.name}).",
    ]
    if rank is not None:
        notes.append(
            f"rank {rank} ran alone at its real shapes: its collectives are local copies "
            "of the same size, and it waits for nobody."
        )
    return tuple(notes)


# ---------------------------------------------------------------- prediction beside measurement


def main_metric(metrics: Mapping[str, Any]) -> str:
    """Return the metric that a kind of workload is compared by."""
    return "step_s" if "step_s" in metrics else "seconds"


def validate_scenario(scenario: Scenario, profile: Path | str | None = None) -> Result:
    """Return measured metrics, with the prediction and its relative error."""
    setting = resolve(scenario, profile)
    work = runnable(scenario)
    _check_comparable(scenario, setting)
    parallel = None if isinstance(work, RecommendStep) else strategy_of(scenario, setting)
    predicted = predict_with(scenario, setting, parallel)
    measured = run_scenario(scenario, profile=profile, strategy=parallel)
    name = main_metric(predicted.metrics)
    guess, truth = float(predicted.metrics[name]), float(measured.metrics[name])
    metrics = {
        **measured.metrics,
        f"predicted_{name}": guess,
        f"measured_{name}": truth,
        "error": guess / truth - 1,
    }
    notes = (*setting.assumptions, *predicted.assumptions, *measured.assumptions)
    return dataclasses.replace(
        measured,
        metrics=metrics,
        assumptions=notes,
        warnings=(*setting.warnings, *predicted.warnings, *measured.warnings),
    )


def _check_comparable(scenario: Scenario, setting: Setting) -> None:
    """Raise `InputError` where the prediction is for other hardware than the run's."""
    chip = setting.cluster.chip.name
    if scenario.run.backend != "gpu" and chip != THIS_CPU:
        raise InputError(
            f"the scenario predicts {chip!r} but the ranks would run on this CPU: set "
            f'[cluster].gpu = "{THIS_CPU}", or [run].backend = "gpu" on a machine that has it.'
        )


def predict_with(scenario: Scenario, setting: Setting, parallel: ParallelStrategy | None) -> Answer:
    """Return the estimate for a scenario under a given strategy, where its kind has one."""
    from meshwise.prediction import predict_generation, predict_recommender, predict_training

    work = runnable(scenario)
    if isinstance(work, RecommendStep):
        return predict_recommender(scenario, work, setting, "estimate")
    model, parallel = scenario.model_spec(), parallel or strategy_of(scenario, setting)
    if isinstance(work, TrainStep):
        return predict_training(model, work, parallel, setting, "estimate")
    return predict_generation(model, work, parallel, setting, "estimate")


# ---------------------------------------------------------------- grids and calibration


def is_grid(source: str | Path) -> bool:
    """Return whether a file is a grid of cases rather than one scenario."""
    path = Path(source)
    try:
        if path.suffix.lower() != ".toml" or path.stat().st_size > MAX_GRID_BYTES:
            return False
        return "case" in tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False


def machine_profile(profile: Path | str | None) -> Profile:
    """Return the measured profile. Raises `InputError` where this machine has none yet."""
    path = default_path() if profile is None else Path(profile)
    if profile is None and not path.is_file():
        raise InputError("this machine is not calibrated: run 'meshwise calibrate' first.")
    return read_profile(path)


def calibrate_machine(path: Path | None, progress: Say | None = None) -> Profile:
    """Measure this machine and return its profile, written to ``path`` or the default place."""
    from validation.calibrate import calibrate

    return calibrate(path, progress=progress)


def validate_grid_file(
    path: Path, profile: Path | str | None, out: Path | str | None, progress: Say | None
) -> Result:
    """Return the comparison of every case of a grid; its report is written into ``out``."""
    from validation.compare import validate_grid
    from validation.report import write_report

    measured = machine_profile(profile)
    busy = load_warning(2)
    comparison = validate_grid(path, measured, progress)
    report = write_report(comparison, Path(out or "report"))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    origin = {
        "meshwise": __version__,
        "engine": "estimate and execute",
        "grid": str(path),
        "profile": {"name": measured.name, **measured.provenance},
        "fingerprint": dict(comparison.fingerprint),
    }
    return Result(
        digest,
        {**comparison.metrics(), "report": str(report)},
        comparison.assumptions,
        busy,
        origin,
    )


def calibration_result(path: Path | None, progress: Say | None) -> Result:
    """Return what a calibration found: where it was written, rates and residuals."""
    profile = calibrate_machine(path, progress)
    fitted = {name: fit.residual for name, fit in profile.kernels.items() if fit.coefficients}
    metrics = {
        "profile": str(path or default_path()),
        **{f"measured_{name}": rate for name, rate in profile.peaks.items()},
        "issue_s": profile.issue_s,
        "blocking": profile.blocking,
        "message_latency_s": profile.messages[0],
        "kernels": len(profile.kernels),
        "median_residuals": fitted,
    }
    notes = (
        "residuals are median absolute relative errors on the shapes that were fitted, not on "
        "others.",
    )
    return Result("", metrics, notes, (), {"engine": "measure", **profile.provenance})

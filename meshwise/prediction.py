"""Prediction: a checked scenario to its metrics, by the estimator or by the event engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hwmodels.collectives import GroupLayout, bus_bytes_per_s, deviation, library_call
from meshwise.longrun import run_metrics
from meshwise.operators import operator_metrics
from meshwise.result import Result
from meshwise.setting import Setting, resolve
from simcore.decode import Pass
from simcore.errors import InputError, unknown
from simcore.estimate import estimate
from simcore.lower import check_generation, lower_training
from simcore.metrics import (
    TRAIN_PARTS,
    Metrics,
    PassTimes,
    generate_metrics,
    generation_seconds,
    memory_metrics,
    pass_program,
    train_metrics,
)
from simcore.models import ModelSpec, parameter_count
from simcore.program import Program
from simcore.scenario import Scenario, scenario_hash
from simcore.strategy import ParallelStrategy, check_strategy
from simcore.timeline import Span, Timeline, timeline
from simcore.uncertainty import interval, program_deviation
from simcore.workloads import CollectiveCall, Generation, OpCall, RecommendStep, TrainStep

if TYPE_CHECKING:
    from solvers.search import Plan

ENGINES = ("estimate", "simulate")
SIMULATED_PASSES = 9  # of each kind; the passes between are interpolated
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a workload's kind adds to a result."""

    metrics: Metrics
    assumptions: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    timeline: Timeline | None = None
    strategy: ParallelStrategy | None = None


def check_engine(engine: str | None) -> str:
    """Return the engine, by default the estimator. Raises `InputError` for an unknown one."""
    if engine is None:
        return ENGINES[0]
    if engine not in ENGINES:
        raise unknown("engine", engine, ENGINES)
    return engine


def run_timeline(program: Program, setting: Setting, engine: str) -> Timeline:
    """Return the timeline of one run of a program."""
    program, cost = setting.as_run(program)
    if engine == "estimate":
        return estimate(program, cost, cost)
    from simcore.engine import simulate

    return simulate(program, cost, cost)


# ---------------------------------------------------------------- strategy


def question_of(scenario: Scenario, setting: Setting) -> Any:
    """Return what the planner is asked about a scenario."""
    from solvers.search import Question

    work = scenario.work()
    assert isinstance(work, TrainStep | Generation)
    goal = scenario.goal
    wanted: tuple[str, str] | None = None
    if goal is not None:
        wanted = (
            ("minimise", str(goal.minimise)) if goal.minimise else ("maximise", str(goal.maximise))
        )
    model = scenario.model_spec()
    dtype = model.compute_dtype
    return Question(
        model,
        work,
        setting.cluster,
        setting.profile,
        setting.memory_bytes,
        setting.reserve_bytes,
        setting.peak_flops_per_s(dtype),
        host=setting.host,
        curves=setting.curves,
        goal=wanted,
        microbatch=scenario.microbatch,
    )


def choose_strategy(scenario: Scenario, setting: Setting) -> tuple[ParallelStrategy | None, Plan]:
    """Return the planner's best strategy, one that fits if any does, and the plan."""
    from solvers.search import search

    plan = search(question_of(scenario, setting), top=1)
    return (plan.candidates[0].strategy if plan.candidates else plan.least_memory), plan


def strategy_text(parallel: ParallelStrategy) -> str:
    """Return a strategy in a few words, what is at its default left out."""
    default = ParallelStrategy()
    words = []
    for item in dataclasses.fields(parallel):
        value = getattr(parallel, item.name)
        if value == getattr(default, item.name) and item.name != "microbatch":
            continue
        if item.name == "schedule" and parallel.pp == 1:
            continue
        words.append(item.name if value is True else f"{item.name} {value}")
    if parallel.pp > 1 and parallel.schedule == default.schedule:
        words.append(parallel.schedule)
    return ", ".join(words)


# ---------------------------------------------------------------- kinds


def _folding(program: Program) -> str:
    followed = len(program.order)
    return (
        f"ranks that hold the same pipeline stage do the same and are followed once: "
        f"{followed} of {program.world} ranks."
    )


INTERVAL_NOTE = (
    "interval_s holds 80 % of the errors of kernels and collectives; what no op stands for (data "
    "loading, stragglers, other jobs) is not in it."
)


def predict_training(
    model: ModelSpec, work: TrainStep, parallel: ParallelStrategy, setting: Setting, engine: str
) -> Answer:
    """Return the answer for one training step."""
    check_strategy(model, parallel, setting.cluster.world)
    if work.lengths:
        return _predict_lengths(model, work, parallel, setting)
    program = lower_training(model, parallel, work)
    found = run_timeline(program, setting, engine)
    metrics = train_metrics(
        model,
        parallel,
        work,
        program,
        found,
        chip_peak_flops_per_s=setting.peak_flops_per_s(model.compute_dtype),
        memory_bytes=setting.memory_bytes,
        reserve_bytes=setting.reserve_bytes,
        memory=training_memory(program, setting),
    )
    deviation = program_deviation(*setting.as_run(program))
    metrics["interval_s"] = interval(metrics["step_s"], deviation)
    notes = (
        _folding(program),
        _mfu_note(model, setting),
        _memory_note(setting),
        INTERVAL_NOTE,
    )
    warnings = setting.dtype_warnings(model.compute_dtype) + _fit_warning(metrics)
    return Answer(metrics, notes, warnings, found, parallel)


def training_memory(program: Program, setting: Setting) -> Metrics:
    """Return the memory metrics of a step: its tensors, what a framework keeps, the reserve."""
    held, room = setting.held(program), setting.memory_bytes
    found = memory_metrics(held, TRAIN_PARTS, room, setting.reserve_bytes)
    return found | ({"reserve_parts_bytes": dict(setting.reserve)} if setting.reserve else {})


def _memory_note(setting: Setting) -> str:
    known = setting.framework
    kept = f", and what {known.name} keeps beside them" if known and known.keeps else ""
    tensors = f"peak memory is what the worst rank's tensors occupy at once{kept}; "
    return tensors + setting.reserve_note


def _mfu_note(model: ModelSpec, setting: Setting) -> str:
    return (
        "mfu counts 6 N + 12 L h s FLOPs per token (full attention), mfu_causal half of the "
        "attention; both over the peak of " + _peak_name(setting, model.compute_dtype) + "."
    )


def _predict_lengths(
    model: ModelSpec, work: TrainStep, parallel: ParallelStrategy, setting: Setting
) -> Answer:
    """Return the answer for one training step over sequences of unequal length."""
    from meshwise import lengths

    shared = lengths.share_out(model, work, parallel, setting)
    metrics, found = lengths.predicted(shared, setting)
    notes = (
        *lengths.notes(shared),
        _mfu_note(model, setting),
        _memory_note(setting),
        INTERVAL_NOTE,
    )
    warnings = setting.dtype_warnings(model.compute_dtype) + _fit_warning(metrics)
    return Answer(metrics, notes, warnings, found, parallel)


def predict_recommender(
    scenario: Scenario, work: RecommendStep, setting: Setting, engine: str
) -> Answer:
    """Return the answer for one training step of a recommendation model."""
    from meshwise import recommendation

    program = recommendation.lowered(scenario, work, setting)
    found = run_timeline(program, setting, engine)
    metrics = recommendation.metrics_of(scenario, work, program, setting, found)
    deviation = program_deviation(program, setting.cost(program.mesh))
    metrics["interval_s"] = interval(metrics["step_s"], deviation)
    dtype = scenario.recommender().dtype
    notes = (*recommendation.notes(program), _memory_note(setting), INTERVAL_NOTE)
    warnings = setting.dtype_warnings(dtype) + _fit_warning(metrics)
    return Answer(metrics, notes, warnings, found)


def _peak_name(setting: Setting, dtype: str) -> str:
    rate = setting.peak_flops_per_s(dtype) / 1e12
    origin = "measured" if setting.profile is not None else f"datasheet, {dtype}"
    return f"{rate:.4g} TFLOP/s per rank ({origin})"


def _fit_warning(metrics: Metrics) -> tuple[str, ...]:
    if metrics["fits"]:
        return ()
    need, have = metrics["peak_memory_bytes"], metrics["device_memory_bytes"]
    return (
        f"does not fit: {need / 1e9:.4g} GB + {metrics['reserve_bytes'] / 1e9:.3g} GB reserve "
        f"exceed the device's {have / 1e9:.4g} GB; times are given all the same.",
    )


def predict_generation(
    model: ModelSpec,
    work: Generation,
    parallel: ParallelStrategy,
    setting: Setting,
    engine: str,
    method: str = "autoregressive",
) -> Answer:
    """Return the answer for one generation."""
    check_strategy(model, parallel, setting.cluster.world)
    check_generation(parallel, work)
    cost = setting.cost(parallel.mesh)
    times = generation_seconds(model, parallel, work, method, cost, cost)
    shown: Timeline | None = None
    notes = [
        "every sequence has the stated lengths and all prompts come at once.",
        "a sampled token goes straight to the next pass: no time of a server is counted.",
    ]
    if engine == "simulate":
        times, shown = _simulated(model, work, parallel, setting, times)
        notes.append(
            f"the first {SIMULATED_PASSES} lengths of a kind of pass, evenly spread, are "
            "simulated and the others interpolated; the trace shows the simulated ones."
        )
    metrics = generate_metrics(
        model,
        parallel,
        work,
        times,
        memory_bytes=setting.memory_bytes,
        reserve_bytes=setting.reserve_bytes,
    )
    ends = times.passes[0], times.passes[-1]
    deviations = [
        program_deviation(pass_program(model, parallel, work, step), cost) for step in ends
    ]
    metrics["interval_s"] = interval(metrics["seconds"], max(deviations))
    notes.append(INTERVAL_NOTE)
    notes.append(
        "peak memory holds weights, the whole KV cache and a pass's activations; "
        + setting.reserve_note
    )
    warnings = setting.dtype_warnings(model.compute_dtype) + _fit_warning(metrics)
    return Answer(metrics, tuple(notes), warnings, shown, parallel)


def _axes() -> tuple[str, ...]:
    from simcore.strategy import MESH_AXES

    return MESH_AXES


def _simulated(
    model: ModelSpec,
    work: Generation,
    parallel: ParallelStrategy,
    setting: Setting,
    times: PassTimes,
) -> tuple[PassTimes, Timeline]:
    """Return pass times by the event engine, and the simulated passes one after the other."""
    seconds = np.array(times.seconds)
    spans: list[Span] = []
    clock = 0.0
    for rows in sorted({step.new_rows for step in times.passes}, reverse=True):
        places = [i for i, step in enumerate(times.passes) if step.new_rows == rows]
        chosen = sorted(set(np.linspace(0, len(places) - 1, SIMULATED_PASSES).round().astype(int)))
        steps = [times.passes[places[i]] for i in chosen]
        runs = [_pass_timeline(model, work, parallel, setting, step) for step in steps]
        for run in runs:
            spans += [
                span._replace(start_s=span.start_s + clock, end_s=span.end_s + clock)
                for span in run.spans
            ]
            clock += run.step_s
        overhead = float(setting.host.pass_seconds(work.batch))
        at = [float(step.cached_rows) for step in steps]
        cached = [float(times.passes[i].cached_rows) for i in places]
        seconds[places] = np.interp(cached, at, [run.step_s + overhead for run in runs])
    return PassTimes(times.passes, tuple(float(s) for s in seconds)), timeline(spans, clock)


def _pass_timeline(
    model: ModelSpec, work: Generation, parallel: ParallelStrategy, setting: Setting, step: Pass
) -> Timeline:
    return run_timeline(pass_program(model, parallel, work, step), setting, "simulate")


def predict_collective(work: CollectiveCall, setting: Setting) -> Answer:
    """Return the answer for one collective."""
    from simcore.metrics import collective_metrics

    cluster = setting.cluster
    if work.ranks > cluster.world:
        raise InputError(
            f"[workload].ranks = {work.ranks} exceeds the cluster's {cluster.world} "
            "ranks: lower it, or raise [cluster].nodes."
        )
    per_node = min(work.ranks, cluster.gpus_per_node)
    group = GroupLayout(work.ranks, per_node, cluster.scale_up, cluster.scale_out)
    fit = setting.profile.collectives if setting.profile else None
    seconds, algorithm = library_call(
        work.op, work.size_bytes, group, cluster.chip, work.implementation, fit, work.dtype
    )
    bus = bus_bytes_per_s(work.op, work.size_bytes, work.ranks, seconds)
    metrics = collective_metrics(work, float(seconds), float(bus), str(algorithm))
    link = cluster.scale_up if work.ranks <= cluster.gpus_per_node else cluster.scale_out
    sure = float(deviation(work.op, work.size_bytes, link.name))
    return Answer(
        {**metrics, "interval_s": interval(metrics["seconds"], sure)},
        ("bytes and bus bandwidth follow nccl-tests' convention; nothing else uses the links.",),
    )


def predict_op(work: OpCall, setting: Setting) -> Answer:
    """Return the answer for one operator."""
    cost = dataclasses.replace(
        setting.cost(dict.fromkeys(_axes(), 1)), implementation=work.implementation
    )
    metrics = operator_metrics(work, cost)
    notes = ["FLOPs are those of matrix products, 2 m n k."]
    used = {curve.implementation for choice in cost.choices.values() for curve in choice.curves}
    if work.implementation and used and work.implementation not in used:
        notes.append(f"no such kernel of {work.implementation} was measured: others stand in.")
    if work.op == "attention_prefill":
        notes.append("attention is counted over the (query, key) pairs that the mask leaves.")
    if work.op == "moe":
        notes.append(
            "the experts are gated FFNs of one rank, the busiest one; permutation is counted, "
            "routing and communication between ranks are not."
        )
    return Answer(metrics, tuple(notes), setting.dtype_warnings(work.dtype))


# ---------------------------------------------------------------- whole predictions


def answer(scenario: Scenario, setting: Setting, engine: str) -> Answer:
    """Return what the scenario's kind of workload gives."""
    work = scenario.work()
    if isinstance(work, CollectiveCall):
        return predict_collective(work, setting)
    if isinstance(work, OpCall):
        return predict_op(work, setting)
    if isinstance(work, RecommendStep):
        return predict_recommender(scenario, work, setting, engine)
    parallel = scenario.strategy()
    notes: tuple[str, ...] = ()
    if parallel is None:
        parallel, notes = _planned(scenario, setting)
    if parallel is None:
        return Answer({"fits": False, "plan_found": False}, warnings=notes)
    model = scenario.model_spec()
    if isinstance(work, TrainStep):
        found = predict_training(model, work, parallel, setting, engine)
        found = _whole_run(found, scenario, setting, engine)
    else:
        method = scenario.decoding.method if scenario.decoding else "autoregressive"
        found = predict_generation(model, work, parallel, setting, engine, method)
    return dataclasses.replace(found, assumptions=(*notes, *found.assumptions))


def _whole_run(found: Answer, scenario: Scenario, setting: Setting, engine: str) -> Answer:
    """Return the answer for a step and, where the run has a length, the run's metrics too."""
    assert found.timeline is not None
    metrics, notes, warnings = run_metrics(scenario, setting, found.timeline, engine)
    return dataclasses.replace(
        found,
        metrics={**found.metrics, **metrics},
        assumptions=(*found.assumptions, *notes),
        warnings=(*found.warnings, *warnings),
    )


def _planned(
    scenario: Scenario, setting: Setting
) -> tuple[ParallelStrategy | None, tuple[str, ...]]:
    parallel, plan = choose_strategy(scenario, setting)
    if parallel is None:
        reasons = "; ".join(f"{n} x {why}" for why, n in plan.reasons.items())
        return None, (f"no plan found: {reasons or 'no strategy covers the cluster'}.",)
    picked = "the planner chose" if plan.candidates else "nothing fits: the smallest strategy is"
    return parallel, (f"no strategy was given, {picked} {strategy_text(parallel)}.",)


def provenance(scenario: Scenario, setting: Setting, engine: str) -> dict[str, Any]:
    """Return where a result comes from: version, engine, seed, hardware and profile."""
    from meshwise import __version__

    profile = setting.profile
    return {
        "meshwise": __version__,
        "engine": engine,
        "seed": scenario.run.seed,
        "cluster": setting.cluster.name,
        "profile": None if profile is None else {"name": profile.name, **profile.provenance},
    }


def network_of(scenario: Scenario) -> dict[str, Any]:
    """Return the name and size of the scenario's network, if it has one."""
    if scenario.model is None:
        return {}
    if isinstance(scenario.work(), RecommendStep):
        clicks = scenario.recommender()
        return {"model": clicks.name, "parameters": clicks.parameters}
    model = scenario.model_spec()
    return {"model": model.name, "parameters": parameter_count(model)}


def expenses(metrics: Metrics, setting: Setting) -> tuple[Metrics, tuple[str, ...]]:
    """Return the energy and, where the chip has a rental price, the cost of the whole cluster."""
    seconds = metrics.get("step_s", metrics.get("seconds"))
    chip = setting.cluster.chip
    if seconds is None or chip.kind == "cpu":
        return {}, ()
    chip_seconds = seconds * setting.cluster.world
    found = {"energy_j": chip.power_w * chip_seconds}
    notes = [f"energy counts {chip.power_w:.4g} W per chip, its limit, all the time."]
    if chip.price_per_hour is not None:
        found["cost_usd"] = chip.price_per_hour * chip_seconds / 3600
        about = chip.sources.get("price_per_hour", "undated")
        notes.append(f"a chip costs ${chip.price_per_hour:.4g} per hour ({about}).")
    return found, tuple(notes)


def predict_scenario(
    scenario: Scenario, engine: str | None = None, profile: Path | str | None = None
) -> Result:
    """Return the prediction for a checked scenario."""
    engine = check_engine(engine)
    setting = resolve(scenario, profile)
    found = answer(scenario, setting, engine)
    origin = provenance(scenario, setting, engine)
    spent, spent_notes = expenses(found.metrics, setting)
    origin |= network_of(scenario)
    if found.strategy is not None:
        origin["strategy"] = strategy_table(found.strategy)
    return Result(
        scenario_hash(scenario),
        {**found.metrics, **spent},
        (*setting.assumptions, *found.assumptions, *spent_notes),
        (*setting.warnings, *found.warnings),
        origin,
        found.timeline,
    )


def strategy_table(parallel: ParallelStrategy) -> dict[str, Any]:
    """Return a strategy as the keys of the scenario's [parallel] table."""
    table = dataclasses.asdict(parallel)
    table["zero_stage"] = parallel.zero
    for key in ("layers_per_stage", "recompute_modules", "recompute_layers"):
        table[key] = list(table[key])
        if not table[key]:
            del table[key]
    return table


def plan_scenario(
    scenario: Scenario,
    top: int = 10,
    profile: Path | str | None = None,
    progress: Progress | None = None,
) -> Result:
    """Return the planner's ranking as a result."""
    from solvers.search import search

    if not isinstance(scenario.work(), TrainStep | Generation):
        raise InputError(
            "a plan needs a training step or a generation: give a [model] and a "
            "[workload] of kind 'train' or 'generate'."
        )
    setting = resolve(scenario, profile)
    found = search(question_of(scenario, setting), top, progress)
    model = scenario.model_spec()
    notes = [
        "tp stays within a node unless nothing fits that way; microbatches are divisors of a "
        "replica's share, at most 64 sequences.",
        setting.reserve_note,
    ]
    warnings = [*setting.warnings, *setting.dtype_warnings(model.compute_dtype)]
    if scenario.strategy() is not None:
        notes.append("the scenario's own strategy is ignored: the planner chooses.")
    if not found.candidates:
        warnings.append("no plan found: see infeasible_reasons.")
    origin = provenance(scenario, setting, "estimate")
    origin |= network_of(scenario)
    return Result(
        scenario_hash(scenario),
        found.to_dict(),
        (*setting.assumptions, *notes),
        tuple(warnings),
        origin,
    )

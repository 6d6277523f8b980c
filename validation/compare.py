"""Predicted against measured: every case of a grid priced, really run, and compared.

A prediction is the estimator's; the measurement is the median over repeats that are spread over
several rounds, so that a busy minute of the machine touches every case and decides none.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from backends.launch import GenerationJob, Job, RunOptions, RunResult, run_many
from hwmodels.catalogue import load_cluster, make_cluster
from hwmodels.cost import ClusterCost
from hwmodels.hardware import Cluster
from hwmodels.profile import Profile
from simcore.costs import transfer_seconds
from simcore.decode import passes
from simcore.engine import simulate
from simcore.errors import InputError
from simcore.estimate import estimate, representative
from simcore.lower import check_generation, lower_pass, lower_training
from simcore.measurement import Measurement
from simcore.metrics import generation_seconds
from simcore.ops import Op, work
from simcore.program import Program, coordinates, group_ranks
from simcore.scenario import Scenario
from simcore.strategy import ParallelStrategy, check_strategy
from simcore.timeline import Span, Timeline, timeline
from simcore.workloads import Generation, TrainStep
from validation.grid import Case, batch_text, read_grid
from validation.processor import measured_processor_seconds, predicted_processor_seconds

ROUNDS = 5
ORDER_MARGIN = 0.10  # pairs that differ by less are ties
BOUNDS = ("compute", "memory", "communication")
Say = Callable[[str], None]


# ---------------------------------------------------------------- what a comparison holds


@dataclass(frozen=True, slots=True)
class Compared:
    """One case: prediction, measurement and baseline, and both timelines.

    ``bound_s``: seconds of the busiest rank's ops, by what limits each. ``metric`` is the quantity
    compared: ``step_s`` of a training step, ``seconds`` of a generation.
    """

    name: str
    model: str
    group: str
    strategy: str
    metric: str
    predicted_s: float
    baseline_s: float
    measurement: Measurement
    bound_s: Mapping[str, float]
    predicted: Timeline = field(repr=False, compare=False)
    measured: Timeline = field(repr=False, compare=False)
    processor_s: tuple[float, float] = (0.0, 0.0)  # of all ranks: predicted, measured (0: not told)

    @property
    def measured_s(self) -> float:
        """Median measured seconds."""
        return self.measurement.median_s

    @property
    def error(self) -> float:
        """Predicted over measured, less one."""
        return self.predicted_s / self.measured_s - 1

    @property
    def processor_error(self) -> float | None:
        """Predicted over measured processor time, less one."""
        predicted, measured = self.processor_s
        return predicted / measured - 1 if measured else None

    @property
    def quietest_error(self) -> float:
        """Predicted over the quietest repeat, less one."""
        return self.predicted_s / self.measurement.quietest_s - 1

    @property
    def baseline_error(self) -> float:
        """The baseline over measured, less one."""
        return self.baseline_s / self.measured_s - 1

    @property
    def bound(self) -> str:
        """What most of the predicted time goes to."""
        return max(BOUNDS, key=lambda name: self.bound_s.get(name, 0.0))

    @property
    def batch(self) -> str:
        """Size of the work in a few words."""
        return str(self.measurement.shape.get("batch", ""))

    def to_dict(self) -> dict[str, Any]:
        """Return the case as plain data, the timelines left out."""
        return {
            "name": self.name,
            "model": self.model,
            "group": self.group,
            "strategy": self.strategy,
            "metric": self.metric,
            f"predicted_{self.metric}": self.predicted_s,
            f"measured_{self.metric}": self.measured_s,
            "error": self.error,
            "quietest_error": self.quietest_error,
            "predicted_processor_s": self.processor_s[0],
            "measured_processor_s": self.processor_s[1],
            "processor_error": self.processor_error,
            "baseline_s": self.baseline_s,
            "baseline_error": self.baseline_error,
            "bound": self.bound,
            "bound_s": dict(self.bound_s),
            "spread": self.measurement.spread,
            "samples_s": list(self.measurement.samples_s),
        }


@dataclass(frozen=True, slots=True)
class Comparison:
    """The cases of a grid, compared on one machine with one profile."""

    title: str
    cases: tuple[Compared, ...]
    profile: Profile
    assumptions: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        """The machine that the cases ran on."""
        return self.cases[0].measurement.fingerprint if self.cases else {}

    def summary(self) -> dict[str, Any]:
        """Return the errors over all cases, the baseline's beside them."""
        errors = [abs(case.error) for case in self.cases]
        right, pairs = ordered_pairs(self.cases)
        processor = [abs(e) for each in self.cases if (e := each.processor_error) is not None]
        return {
            "cases": len(self.cases),
            "median_abs_error": statistics.median(errors),
            "p90_abs_error": percentile(errors, 0.9),
            "max_abs_error": max(errors),
            "worst_case": max(self.cases, key=lambda case: abs(case.error)).name,
            "mean_error": statistics.mean(case.error for case in self.cases),
            "ordered_pairs": pairs,
            "ordered_right_fraction": right / pairs if pairs else None,
            "baseline_median_abs_error": statistics.median(
                abs(case.baseline_error) for case in self.cases
            ),
            "median_spread": statistics.median(case.measurement.spread for case in self.cases),
            "quietest_median_abs_error": statistics.median(
                abs(case.quietest_error) for case in self.cases
            ),
            "processor_median_abs_error": statistics.median(processor) if processor else None,
            "bounds": {b: sum(case.bound == b for case in self.cases) for b in BOUNDS},
        }

    def metrics(self) -> dict[str, Any]:
        """Return the summary and the rows of all cases."""
        return {**self.summary(), "rows": [case.to_dict() for case in self.cases]}

    def to_json(self) -> dict[str, Any]:
        """Return all but the timelines as plain data."""
        return {
            "title": self.title,
            "metrics": self.metrics(),
            "assumptions": list(self.assumptions),
            "fingerprint": dict(self.fingerprint),
            "profile": {
                "name": self.profile.name,
                "peaks": dict(self.profile.peaks),
                **self.profile.provenance,
            },
        }


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that at least ``share`` of the values do not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def ordered_pairs(cases: Sequence[Compared]) -> tuple[int, int]:
    """Return (pairs ordered right, pairs) within one model and batch, measured ties left out."""
    right = total = 0
    for one, other in combinations(cases, 2):
        fast, slow = sorted((one, other), key=lambda case: case.measured_s)
        if one.group != other.group or slow.measured_s <= fast.measured_s * (1 + ORDER_MARGIN):
            continue
        total += 1
        right += fast.predicted_s < slow.predicted_s
    return right, total


# ---------------------------------------------------------------- lowering


@dataclass(frozen=True, slots=True)
class Lowered:
    """A case made ready: what the ranks run, and the programs of one run in order.

    A training step is one program; a generation one per pass.
    """

    job: Program | GenerationJob
    programs: tuple[Program, ...]
    parallel: ParallelStrategy
    work: TrainStep | Generation
    cluster: Cluster

    def cost(self, profile: Profile | None) -> ClusterCost:
        """Return the cost model of its mesh."""
        return ClusterCost(self.cluster, self.programs[0].mesh, profile)


def cluster_of(scenario: Scenario) -> Cluster:
    """Return the scenario's cluster."""
    table = scenario.cluster
    if table.cluster is not None:
        return load_cluster(table.cluster, table.nodes or 1)
    return make_cluster(
        table.gpu or "", table.gpus_per_node or 1, table.nodes or 1, table.scale_up, table.scale_out
    )


def lower_case(scenario: Scenario) -> Lowered:
    """Return the scenario's programs. Raises `InputError` where they do not fit the cluster."""
    model, parallel, step = scenario.model_spec(), scenario.strategy(), scenario.work()
    cluster = cluster_of(scenario)
    assert parallel is not None
    check_strategy(model, parallel, cluster.world)
    if isinstance(step, TrainStep):
        program = lower_training(model, parallel, step)
        return Lowered(program, (program,), parallel, step, cluster)
    assert isinstance(step, Generation)
    check_generation(parallel, step)
    method = scenario.decoding.method if scenario.decoding else "autoregressive"
    steps = passes(method, step)
    programs = tuple(
        lower_pass(model, parallel, step.batch, each.new_rows, each.cached_rows) for each in steps
    )
    decode = (
        programs[-1]
        if len(programs) > 1
        else lower_pass(model, parallel, step.batch, 1, step.input_tokens)
    )
    job = GenerationJob(programs[0], decode, step, method)
    return Lowered(job, programs, parallel, step, cluster)


# ---------------------------------------------------------------- predictions


def predicted_seconds(scenario: Scenario, lowered: Lowered, profile: Profile) -> float:
    """Return the estimator's seconds of one step or generation.

    Ranks that take turns on fewer processors are simulated: who waits decides who computes.
    """
    cost = lowered.cost(profile)
    if isinstance(lowered.job, Program):
        if shared_cores(lowered, profile):
            return predicted_timeline(lowered, profile).step_s
        return estimate(lowered.job, cost, cost).step_s
    assert isinstance(lowered.work, Generation)
    times = generation_seconds(
        scenario.model_spec(), lowered.parallel, lowered.work, lowered.job.method, cost, cost
    )
    return sum(times.seconds)


def predicted_timeline(lowered: Lowered, profile: Profile) -> Timeline:
    """Return the simulated timeline of every rank, op by op; passes follow one another."""
    cost = lowered.cost(profile)
    cores = shared_cores(lowered, profile)
    runs = [
        simulate(program, cost, cost, detail=True, every_rank=True, cores=cores)
        for program in lowered.programs
    ]
    return joined(runs)


def shared_cores(lowered: Lowered, profile: Profile) -> int:
    """Return how many processors all ranks take turns on; 0 where each has its own."""
    return profile.cores if profile.cores < lowered.cluster.world else 0


def joined(runs: Sequence[Timeline]) -> Timeline:
    """Return timelines one after the other."""
    spans: list[Span] = []
    clock = 0.0
    for run in runs:
        spans += [
            span._replace(start_s=span.start_s + clock, end_s=span.end_s + clock)
            for span in run.spans
        ]
        clock += run.step_s
    return timeline(spans, clock)


def rank_ops(program: Program, rank: int) -> Iterator[Op]:
    """Yield the ops that pipeline rank ``rank`` runs in one step."""
    for action in program.order[rank]:
        for _, _, op in program.ops(action.body):
            yield op


def limited_by(op: Op, peaks: Mapping[str, float]) -> str:
    """Return what limits an op: other ranks, or the larger of its FLOPs and its bytes over peak."""
    if op.is_communication:
        return "communication"
    done = work(op)
    moved = done.read_bytes + done.write_bytes
    arithmetic = done.flops / peaks["flops_per_s"]
    return "compute" if arithmetic >= moved / peaks["bytes_per_s"] else "memory"


def op_seconds(program: Program, rank: int, op: Op, cost: ClusterCost) -> float:
    """Return the seconds of an op, a message's flight included."""
    if op.kind not in ("send", "recv"):
        return float(cost.seconds(op))
    here = representative(program, rank)
    where = coordinates(program.mesh, here)["pp"]
    peer = group_ranks(program.mesh, "pp", here)[where + op.attrs["peer"]]
    return transfer_seconds(cost, here, peer, float(work(op).payload_bytes))


def bound_seconds(lowered: Lowered, profile: Profile) -> dict[str, float]:
    """Return the predicted op seconds of the busiest rank, by what limits each op."""
    cost = lowered.cost(profile)
    ranks = []
    for rank in range(len(lowered.programs[0].order)):
        spent = dict.fromkeys(BOUNDS, 0.0)
        for program in lowered.programs:
            for op in rank_ops(program, rank):
                spent[limited_by(op, profile.peaks)] += op_seconds(program, rank, op, cost)
        ranks.append(spent)
    return max(ranks, key=lambda spent: sum(spent.values()))


def baseline_seconds(lowered: Lowered, profile: Profile) -> float:
    """Return matrix-product FLOPs of the busiest rank over the measured peak: the baseline."""
    flops = [
        sum(float(work(op).flops) for program in lowered.programs for op in rank_ops(program, rank))
        for rank in range(len(lowered.programs[0].order))
    ]
    return max(flops) / profile.peaks["flops_per_s"]


def strategy_text(parallel: ParallelStrategy, kind: str) -> str:
    """Return a strategy in a few words."""
    words = [
        f"{axis} {getattr(parallel, axis)}"
        for axis in ("dp_replicate", "dp_shard", "cp", "tp", "pp")
        if getattr(parallel, axis) > 1
    ]
    if kind == "generate":
        return ", ".join(words) or "one rank"
    if parallel.cp > 1:
        words.append(parallel.cp_kind)
    if parallel.ep > 1:
        words.append(f"ep {parallel.ep}")
    if parallel.dp > 1:
        words.append(f"ZeRO {parallel.zero}")
    if parallel.sequence_parallel:
        words.append("sequence parallel")
    if parallel.pp > 1:
        words.append(parallel.schedule)
    if parallel.recompute != "none":
        words.append(f"recompute {parallel.recompute}")
    return ", ".join([*words, f"microbatch {parallel.microbatch}"])


# ---------------------------------------------------------------- measurements


def rounds_of(repeats: int) -> tuple[int, int]:
    """Return (rounds, repeats in a round) that make at least ``repeats``."""
    rounds = min(ROUNDS, repeats)
    return rounds, -(-repeats // rounds)


def options_of(scenario: Scenario, repeats: int) -> RunOptions:
    """Return how a round of a case is run."""
    table = scenario.run
    return RunOptions(
        seed=table.seed,
        repeats=repeats,
        warmup=table.warmup,
        record_spans=True,
        timeout_s=table.timeout_s,
    )


def run_cases(
    cases: Sequence[Case], lowered: Sequence[Lowered], say: Say | None = None
) -> list[list[RunResult]]:
    """Return every case's rounds; those of one number of ranks take turns in one launch."""
    plans = [rounds_of(case.scenario.run.repeats) for case in cases]
    total = sum(rounds for rounds, _ in plans)
    found: list[list[RunResult]] = [[] for _ in cases]
    before = 0
    for world in sorted({ready.cluster.world for ready in lowered}):
        turns = [
            index
            for number in range(ROUNDS)
            for index, (rounds, _) in enumerate(plans)
            if number < rounds and lowered[index].cluster.world == world
        ]

        def heard(done: int, before: int = before, turns: Sequence[int] = turns) -> None:
            if say is not None:
                say(f"measured {before + done} of {total}: {cases[turns[done - 1]].name}")

        jobs = [
            Job(lowered[index].job, options_of(cases[index].scenario, plans[index][1]))
            for index in turns
        ]
        for index, result in zip(turns, run_many(jobs, heard), strict=True):
            found[index].append(result)
        before += len(turns)
    return found


def measurement_of(case: Case, results: Sequence[RunResult]) -> Measurement:
    """Return the samples of a case over its rounds."""
    samples = tuple(seconds for result in results for seconds in result.seconds)
    shape = {"model": case.model, "batch": batch_text(case.scenario)}
    return Measurement(
        case.name, shape, samples, results[0].ranks[0].fingerprint, "meshwise validate"
    )


def typical(results: Sequence[RunResult], median_s: float) -> Timeline:
    """Return the timeline of the round closest to the median."""
    return min(results, key=lambda result: abs(result.step_s - median_s)).timeline()


# ---------------------------------------------------------------- comparison


def compare_case(
    case: Case, lowered: Lowered, results: Sequence[RunResult], profile: Profile
) -> Compared:
    """Return a case's prediction beside its measurement."""
    measured = measurement_of(case, results)
    kind = case.scenario.workload.kind
    return Compared(
        case.name,
        case.model,
        case.group,
        strategy_text(lowered.parallel, kind),
        "step_s" if kind == "train" else "seconds",
        predicted_seconds(case.scenario, lowered, profile),
        baseline_seconds(lowered, profile),
        measured,
        bound_seconds(lowered, profile),
        predicted_timeline(lowered, profile),
        typical(results, measured.median_s),
        (
            predicted_processor_seconds(lowered.programs, lowered.cost(profile)),
            measured_processor_seconds(results),
        ),
    )


def assumptions_of(cases: Sequence[Case], profile: Profile) -> tuple[str, ...]:
    """Return what the comparison rests on, in sentences."""
    rounds, each = rounds_of(cases[0].scenario.run.repeats)
    warmup = cases[0].scenario.run.warmup
    about = profile.provenance
    return (
        f"Measured: the median of {rounds * each} repeats in {rounds} rounds in which all cases "
        f"of one number of ranks take turns, each round after {warmup} warm-up runs; a repeat "
        "lasts until the slowest rank is done.",
        "Predicted: the estimator, or the simulator where ranks share cores, with the profile "
        f"{profile.name!r} ({about.get('date', 'undated')}, "
        f"{about.get('measurements', 'an unknown number of')} "
        "measurements of single ops, collectives and messages).",
        "The profile describes an undisturbed machine. The spread of a case is the range of the "
        "middle half of its repeats over their median: what other work and the machine itself add.",
        "No case of the grid was used for calibration: the profile knows ops, not models.",
        "Baseline: matrix-product FLOPs of the busiest rank over the measured peak "
        f"({profile.peaks['flops_per_s'] / 1e9:.4g} GFLOP/s), nothing else.",
        "A case is bound by what most of its predicted op seconds go to: ops limited by FLOPs over "
        "measured peak, ops limited by bytes over measured bandwidth, or communication.",
        "Pairs are ordered right where the prediction ranks two cases of one model and batch as "
        f"the measurement does; pairs that measure within {ORDER_MARGIN:.0%} are ties, left out.",
        "Weights and tokens are random; the predicted timelines are simulated op by op.",
    )


def validate_cases(
    title: str, cases: Sequence[Case], profile: Profile, progress: Say | None = None
) -> Comparison:
    """Return the comparison of cases that run on ranks of this machine."""
    lowered = [_lowered(case) for case in cases]
    results = run_cases(cases, lowered, progress)
    compared = tuple(
        compare_case(case, ready, found, profile)
        for case, ready, found in zip(cases, lowered, results, strict=True)
    )
    return Comparison(title, compared, profile, assumptions_of(cases, profile))


def _lowered(case: Case) -> Lowered:
    try:
        found = lower_case(case.scenario)
    except InputError as error:
        raise InputError(f"case {case.name!r}: {error}") from None
    if found.cluster.chip.name != "this-cpu":
        raise InputError(
            f'case {case.name!r}: a grid runs on this machine: set [cluster].gpu = "this-cpu".'
        )
    return found


def validate_grid(path: Path | str, profile: Profile, progress: Say | None = None) -> Comparison:
    """Predict and really run every case of a grid file; ``progress`` hears one line per run.

    Raises `InputError` for a grid that is wrong and `RunError` where a run fails.
    """
    grid = read_grid(Path(path))
    return validate_cases(grid.title, grid.cases, profile, progress)

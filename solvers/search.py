"""An exhaustive planner: every strategy of the lattice, memory first, then time.

Lattice: mesh degrees, sharding stage, microbatch, schedule, sequence parallelism, recomputation,
each strategy once. Where the goal falls with the time, candidates are priced in the order of a
lower bound on it, and pricing stops when no bound is below the worst kept candidate: what is left
out is proven worse, so the gap is 0.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from hwmodels.cost import ClusterCost
from hwmodels.curves import Curve
from hwmodels.hardware import Cluster
from hwmodels.hosts import NO_HOST, Host
from hwmodels.profile import Profile
from simcore.errors import InputError
from simcore.estimate import estimate
from simcore.lower import check_generation, lower_training
from simcore.metrics import (
    TRAIN_PARTS,
    Metrics,
    generate_metrics,
    generation_seconds,
    memory_metrics,
    train_metrics,
)
from simcore.models import ModelSpec, is_moe_layer
from simcore.strategy import ParallelStrategy, check_strategy, microbatches
from simcore.workloads import Generation, TrainStep
from solvers.bounds import Bounds, TrainBounds

MAX_MICROBATCH = 64
BY_TIME = {  # metrics that are better exactly when the step or the generation is shorter
    ("minimise", "step_s"),
    ("minimise", "seconds"),
    ("maximise", "tokens_per_s"),
    ("maximise", "tokens_per_s_per_gpu"),
    ("maximise", "mfu"),
}
Goal = tuple[str, str]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Question:
    """What is to be planned, on what, and what makes a plan good."""

    model: ModelSpec
    workload: TrainStep | Generation
    cluster: Cluster
    profile: Profile | None
    memory_bytes: float
    reserve_bytes: float
    peak_flops_per_s: float
    host: Host = NO_HOST
    curves: tuple[Curve, ...] | None = None
    goal: Goal | None = None
    microbatch: int | None = None  # fixed by the scenario
    method: str = "autoregressive"

    @property
    def aim(self) -> Goal:
        """The goal, by default the shortest time."""
        if self.goal is not None:
            return self.goal
        return ("minimise", "step_s" if isinstance(self.workload, TrainStep) else "seconds")

    @property
    def budget_bytes(self) -> float:
        """Memory that a rank may use."""
        return self.memory_bytes - self.reserve_bytes


@dataclass(frozen=True, slots=True)
class Candidate:
    """A strategy with its metrics."""

    strategy: ParallelStrategy
    metrics: Metrics


@dataclass(frozen=True, slots=True)
class Infeasible:
    """A strategy that is out, and why: ``kind`` groups reasons, ``reason`` is a sentence."""

    strategy: ParallelStrategy
    kind: str
    reason: str
    excess_bytes: float = 0.0


@dataclass(frozen=True, slots=True)
class SolverReport:
    """How the search went. ``bound`` is the proven best value of the goal, ``gap`` relative."""

    method: str
    status: str  # "optimal" or "infeasible"
    strategies: int
    infeasible: int
    priced: int
    wall_s: float
    objective: float | None
    bound: float | None
    gap: float | None


@dataclass(frozen=True, slots=True)
class Plan:
    """Ranked candidates, what was infeasible and why, and the solver's report."""

    candidates: tuple[Candidate, ...]
    infeasible: tuple[Infeasible, ...]
    report: SolverReport
    goal: Goal

    @property
    def reasons(self) -> dict[str, int]:
        """How many strategies each kind of reason excluded."""
        return dict(Counter(each.kind for each in self.infeasible).most_common())

    @property
    def least_memory(self) -> ParallelStrategy | None:
        """The strategy that comes closest to fitting, or None where none could be laid out."""
        close = [each for each in self.infeasible if each.excess_bytes > 0]
        return min(close, key=lambda each: each.excess_bytes).strategy if close else None

    def to_dict(self, examples: int = 20) -> dict[str, Any]:
        """Return the plan as plain data, ``examples`` of the infeasible strategies among it."""
        near = sorted(self.infeasible, key=lambda each: each.excess_bytes or float("inf"))
        return {
            "candidates": [
                {"rank": number, "strategy": _table(each.strategy), **each.metrics}
                for number, each in enumerate(self.candidates, start=1)
            ],
            "infeasible": [
                {"strategy": _table(each.strategy), "reason": each.reason}
                for each in near[:examples]
            ],
            "infeasible_reasons": self.reasons,
            "solver": {"goal": " ".join(self.goal), **dataclasses.asdict(self.report)},
        }


def _table(parallel: ParallelStrategy) -> dict[str, Any]:
    """Return the keys of [parallel] that a strategy decides."""
    keys = (
        "dp_replicate",
        "dp_shard",
        "tp",
        "pp",
        "microbatch",
        "schedule",
        "sequence_parallel",
        "recompute",
    )
    return {**{key: getattr(parallel, key) for key in keys}, "zero_stage": parallel.zero}


# ---------------------------------------------------------------- the lattice


def divisors(n: int) -> list[int]:
    """Return the divisors of ``n``, rising."""
    return [d for d in range(1, n + 1) if n % d == 0]


def data_layouts(dp: int) -> list[tuple[int, int, int | None]]:
    """Return (dp_replicate, dp_shard, zero_stage) of every distinct way to use ``dp`` ranks."""
    if dp == 1:
        return [(1, 1, None)]
    whole: list[tuple[int, int, int | None]] = [(dp, 1, None), (dp, 1, 1), (dp, 1, 2)]
    return whole + [(dp // shard, shard, None) for shard in divisors(dp) if shard > 1]


def meshes(question: Question, max_tp: int) -> Iterator[ParallelStrategy]:
    """Yield the meshes that cover the cluster: tp within ``max_tp``, pp within the layers."""
    world, model = question.cluster.world, question.model
    training = isinstance(question.workload, TrainStep)
    for tp in (t for t in divisors(world) if t <= max_tp):
        for pp in (p for p in divisors(world // tp) if p <= model.layers):
            dp = world // tp // pp
            layouts = data_layouts(dp) if training else [(dp, 1, None)]
            for replicate, shard, stage in layouts:
                yield ParallelStrategy(
                    dp_replicate=replicate, dp_shard=shard, tp=tp, pp=pp, zero_stage=stage
                )


def variants(question: Question, mesh: ParallelStrategy) -> Iterator[ParallelStrategy]:
    """Yield the strategies of a mesh that differ in what they do."""
    work = question.workload
    if not isinstance(work, TrainStep):
        yield mesh
        return
    share, rest = divmod(work.global_batch, mesh.dp)
    if rest or not share:
        yield (
            mesh
            if question.microbatch is None
            else dataclasses.replace(mesh, microbatch=question.microbatch)
        )
        return
    sizes = (
        [question.microbatch]
        if question.microbatch
        else [size for size in divisors(share) if size <= MAX_MICROBATCH]
    )
    for size, sequence, recompute in product(
        sizes, (False, True) if mesh.tp > 1 else (False,), ("none", "full")
    ):
        for schedule in ("1f1b", "gpipe") if mesh.pp > 1 and share > size else ("1f1b",):
            yield dataclasses.replace(
                mesh,
                microbatch=size,
                schedule=schedule,
                sequence_parallel=sequence,
                recompute=recompute,
            )


def check(question: Question, parallel: ParallelStrategy) -> None:
    """Raise `InputError` where the strategy cannot be laid out."""
    check_strategy(question.model, parallel, question.cluster.world)
    if question.model.frames:
        raise InputError(
            f"model {question.model.name!r} has layers of two kinds, on the axes of a grid, for "
            "which no plan is searched in this version: give the strategy in [parallel]."
        )
    work = question.workload
    if isinstance(work, TrainStep):
        microbatches(parallel, work)
        rows = parallel.microbatch * work.seq_len
        if parallel.sequence_parallel and rows % parallel.tp:
            raise InputError(
                f"sequence_parallel needs microbatch x seq_len {rows} to be a "
                f"multiple of tp {parallel.tp}."
            )
    else:
        check_generation(parallel, work)


def lattice(question: Question, max_tp: int) -> tuple[list[ParallelStrategy], list[Infeasible]]:
    """Return the strategies that can be laid out, and those that cannot."""
    sound, out = [], []
    for mesh in meshes(question, max_tp):
        for parallel in variants(question, mesh):
            try:
                check(question, parallel)
            except InputError as error:
                out.append(Infeasible(parallel, "divisibility", str(error)))
            else:
                sound.append(parallel)
    return sound, out


# ---------------------------------------------------------------- pricing


def cost_of(question: Question, parallel: ParallelStrategy) -> ClusterCost:
    """Return the cost model of a strategy's mesh."""
    mesh, profile = parallel.mesh, question.profile
    return ClusterCost(question.cluster, mesh, profile, host=question.host, curves=question.curves)


def price(question: Question, parallel: ParallelStrategy, *, unless_large: bool = False) -> Metrics:
    """Return the metrics of a strategy. Raises `InputError` where it cannot be lowered.

    With ``unless_large`` a strategy that does not fit gets its memory metrics alone.
    """
    work, cost = question.workload, cost_of(question, parallel)
    room, reserve = question.memory_bytes, question.reserve_bytes
    if isinstance(work, Generation):
        times = generation_seconds(question.model, parallel, work, question.method, cost, cost)
        return generate_metrics(
            question.model, parallel, work, times, memory_bytes=room, reserve_bytes=reserve
        )
    program = lower_training(question.model, parallel, work)
    memory = memory_metrics(program, TRAIN_PARTS, room, reserve)
    if unless_large and not memory["fits"]:
        return memory
    found = estimate(program, cost, cost)
    return train_metrics(
        question.model,
        parallel,
        work,
        program,
        found,
        memory=memory,
        chip_peak_flops_per_s=question.peak_flops_per_s,
        memory_bytes=room,
        reserve_bytes=reserve,
    )


def _too_large(parallel: ParallelStrategy, need: float, question: Question) -> Infeasible:
    have = question.budget_bytes
    return Infeasible(
        parallel,
        "memory",
        f"needs {need / 1e9:.4g} GB per rank, {(need - have) / 1e9:.3g} GB more than the "
        f"{have / 1e9:.4g} GB beside the reserve.",
        need - have,
    )


@dataclass(slots=True)
class _Search:
    """The growing plan."""

    question: Question
    top: int
    bounds: Bounds
    progress: Progress | None = None
    kept: list[Candidate] = field(default_factory=list)
    out: list[Infeasible] = field(default_factory=list)
    priced: int = 0
    cut_by: float | None = None

    def value(self, metrics: Mapping[str, Any]) -> float:
        """Return what is to be made small."""
        sense, name = self.question.aim
        return float(metrics[name]) * (1.0 if sense == "minimise" else -1.0)

    def keep(self, parallel: ParallelStrategy) -> None:
        """Price a strategy and keep it if it fits."""
        try:
            metrics = price(self.question, parallel, unless_large=True)
        except InputError as error:
            self.out.append(Infeasible(parallel, "not lowered", str(error)))
            return
        self.priced += 1
        if not metrics["fits"]:
            self.out.append(_too_large(parallel, metrics["peak_memory_bytes"], self.question))
            return
        self.kept.append(Candidate(parallel, metrics))
        self.kept.sort(key=lambda each: self.value(each.metrics))

    def worst_time(self) -> float:
        """Return the time that a further candidate has to beat."""
        if len(self.kept) < self.top:
            return float("inf")
        name = "step_s" if isinstance(self.question.workload, TrainStep) else "seconds"
        return float(self.kept[self.top - 1].metrics[name])

    def run(self, strategies: Sequence[ParallelStrategy]) -> None:
        """Price what the memory bound lets through, in order of the time bound."""
        open_: list[tuple[float, ParallelStrategy]] = []
        for parallel in strategies:
            try:
                need = self.bounds.memory_bytes(parallel)
            except InputError as error:
                self.out.append(Infeasible(parallel, "not lowered", str(error)))
                continue
            if need > self.question.budget_bytes:
                self.out.append(_too_large(parallel, need, self.question))
                continue
            open_.append((self.bounds.seconds(parallel), parallel))
        open_.sort(key=lambda item: item[0])
        self._price_in_order(open_, self.question.aim in BY_TIME)

    def _price_in_order(self, open_: list[tuple[float, ParallelStrategy]], may_stop: bool) -> None:
        for number, (bound, parallel) in enumerate(open_):
            if may_stop and bound >= self.worst_time():
                break
            self.keep(parallel)
            if self.progress:
                self.progress(number + 1, len(open_))


class _NoBounds:
    """Bounds of a lattice that is priced as a whole: it is small, or its layers differ."""

    def memory_bytes(self, parallel: ParallelStrategy) -> float:
        """Return 0."""
        return 0.0

    def seconds(self, parallel: ParallelStrategy) -> float:
        """Return 0."""
        return 0.0


def make_bounds(question: Question) -> Bounds:
    """Return the bounds of the question's kind of workload."""
    work = question.workload
    kinds = {is_moe_layer(question.model, layer) for layer in range(question.model.layers)}
    if not isinstance(work, TrainStep) or len(kinds) > 1:
        return _NoBounds()
    return TrainBounds(question.model, work, lambda parallel: cost_of(question, parallel))


def search(question: Question, top: int = 10, progress: Progress | None = None) -> Plan:
    """Return the ``top`` best strategies that fit.

    Tensor parallelism stays within a node unless nothing fits that way.
    """
    if top < 1:
        raise InputError(f"top = {top} must be at least 1.")
    start, world = time.perf_counter(), question.cluster.world
    node = min(question.cluster.gpus_per_node, world)
    run = _Search(question, top, make_bounds(question), progress)
    strategies, run.out = lattice(question, node)
    run.run(strategies)
    if not run.kept and world > node:
        wider, out = lattice(question, world)
        seen = set(strategies)
        strategies = strategies + [each for each in wider if each not in seen]
        run.out += [each for each in out if each.strategy.tp > node]
        run.run([each for each in wider if each not in seen])
    return _report(run, len(strategies), time.perf_counter() - start)


def _report(run: _Search, strategies: int, wall_s: float) -> Plan:
    kept = tuple(run.kept[: run.top])
    best = float(kept[0].metrics[run.question.aim[1]]) if kept else None
    laid_out = [each for each in run.out if each.kind != "divisibility"]
    report = SolverReport(
        "exhaustive with bounds",
        "optimal" if kept else "infeasible",
        strategies + len(run.out) - len(laid_out),
        len(run.out),
        run.priced,
        wall_s,
        best,
        best,
        0.0 if kept else None,
    )
    return Plan(kept, tuple(run.out), report, run.question.aim)

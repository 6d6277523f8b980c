"""The largest batch, length or model whose predicted peak memory fits, by bisection."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from meshwise.prediction import choose_strategy, provenance, strategy_table, training_memory
from meshwise.result import Result
from meshwise.setting import Setting, resolve
from simcore.errors import InputError, unknown
from simcore.lower import lower_training
from simcore.metrics import Metrics
from simcore.models import ModelSpec
from simcore.scenario import Scenario, scenario_hash
from simcore.strategy import ParallelStrategy, check_strategy, microbatches
from simcore.workloads import TrainStep

Case = tuple[ModelSpec, ParallelStrategy, TrainStep]


@dataclass(frozen=True, slots=True)
class Growth:
    """What is made larger: its step, its largest sensible value, and the case that has it."""

    unit: Callable[[Case], int]
    limit: Callable[[Case], int]
    grown: Callable[[Case, int], Case]


def _with_batch(case: Case, value: int) -> Case:
    model, parallel, work = case
    return model, parallel, dataclasses.replace(work, global_batch=value)


def _with_microbatch(case: Case, value: int) -> Case:
    """Return the case with this microbatch and as many microbatches as before."""
    model, parallel, work = case
    batch = value * parallel.dp * microbatches(parallel, work)
    return (
        model,
        dataclasses.replace(parallel, microbatch=value),
        dataclasses.replace(work, global_batch=batch),
    )


def _with_length(case: Case, value: int) -> Case:
    """Return the case with sequences of so many tokens: packed documents repeat in their order."""
    model, parallel, work = case
    packed = work.documents * (value // work.seq_len)
    return model, parallel, dataclasses.replace(work, seq_len=value, documents=packed)


def _same_share(case: Case, layers: int) -> tuple[int, ...]:
    """Return how many of a stage's layers recompute so that their share stays."""
    counts = case[1].recompute_layers
    return (-(-sum(counts) * layers // (len(counts) * case[0].layers)),) if counts else ()


def _with_layers(case: Case, value: int) -> Case:
    """Return the case with so many layers, split evenly; kinds of layer repeat in their order."""
    model, parallel, work = case
    mixers = tuple(model.mixers[i % len(model.mixers)] for i in range(value) if model.mixers)
    return (
        dataclasses.replace(model, layers=value, mixers=mixers),
        dataclasses.replace(
            parallel, layers_per_stage=(), recompute_layers=_same_share(case, value)
        ),
        work,
    )


def _sequences(case: Case) -> int:
    return case[1].dp * case[1].microbatch


def _split(case: Case) -> int:
    """Return what the tokens of a sequence are divided by: ranks that share them, and chunks."""
    parallel = case[1]
    chunks = math.lcm(parallel.stream_chunks, parallel.loss_chunks or 1)
    return parallel.split.unit * (parallel.tp if parallel.sequence_parallel else 1) * chunks


def _rows(case: Case) -> int:
    """Return the fewest sequences whose tokens split evenly over the ranks of a tensor group."""
    tokens = _split(case)
    return tokens // math.gcd(tokens, case[2].seq_len)


def _length(case: Case) -> int:
    """Return the step in which a sequence may grow: documents stay whole, frames divide evenly."""
    whole = case[2].seq_len if case[2].documents else 1
    return math.lcm(_split(case), whole, case[0].frames * case[1].cp or 1)


def _longest(case: Case) -> int:
    """Return the most tokens that a sequence may have: learned positions are a table."""
    if case[2].documents:
        return case[2].seq_len * MOST_REPEATS
    return case[0].max_positions if case[0].position == "learned" else 10**9


def _stages(case: Case) -> int:
    return case[1].pp * case[1].virtual_stages


MOST_MICROBATCHES = 4096  # of one replica: schedules that keep memory bounded are flat long before
MOST_REPEATS = 4096  # of a sequence's documents: every one is tasks of its own to share out
GROWTHS = {
    "global_batch": Growth(_sequences, lambda c: MOST_MICROBATCHES * _sequences(c), _with_batch),
    "microbatch": Growth(_rows, lambda c: 10**6, _with_microbatch),
    "seq_len": Growth(_length, _longest, _with_length),
    "layers": Growth(_stages, lambda c: 10**4, _with_layers),
}


@dataclass(slots=True)
class Search:
    """Memory by value, each predicted once."""

    case: Case
    growth: Growth
    setting: Setting
    found: dict[int, Metrics] = field(default_factory=dict)

    def memory(self, value: int) -> Metrics:
        """Return the memory metrics with this value."""
        if value not in self.found:
            model, parallel, work = self.growth.grown(self.case, value)
            program = lower_training(model, parallel, work)
            self.found[value] = training_memory(program, self.setting)
        return self.found[value]

    def peak(self, value: int) -> float:
        """Return the peak bytes of the worst rank with this value."""
        peak: float = self.memory(value)["peak_memory_bytes"]
        return peak

    def fits(self, value: int) -> bool:
        """Return whether this value fits beside the reserve."""
        return self.peak(value) + self.setting.reserve_bytes <= self.setting.memory_bytes

    def largest(self) -> int:
        """Return the largest value that fits, 0 where none does: doubling, then bisection."""
        unit, limit = self.growth.unit(self.case), self.growth.limit(self.case)
        low, high = 0, 1  # units that fit, units that do not
        while self.fits(high * unit):
            low, high = high, 2 * high
            if high * unit > limit:
                return low * unit
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.fits(middle * unit) else (low, middle)
        return low * unit

    def monotone(self) -> bool:
        """Return whether memory never fell as the value grew, over all that was predicted."""
        peaks = [self.peak(value) for value in sorted(self.found)]
        return all(a <= b for a, b in pairwise(peaks))


def _case(scenario: Scenario, setting: Setting) -> Case:
    work = scenario.work()
    if isinstance(work, TrainStep) and work.lengths:
        raise InputError(
            "the largest of what fits is sought for sequences of one length: remove "
            "[workload].lengths; seq_len stands for the longest."
        )
    if not isinstance(work, TrainStep):
        raise InputError("the largest size is that of a training step: give kind = 'train'.")
    parallel = scenario.strategy() or choose_strategy(scenario, setting)[0]
    if parallel is None:
        raise InputError("no strategy covers the cluster: give [parallel].")
    model = scenario.model_spec()
    check_strategy(model, parallel, setting.cluster.world)
    return model, parallel, work


def largest_scenario(scenario: Scenario, what: str, profile: str | Path | None = None) -> Result:
    """Return the largest ``what`` that fits, and by how much the next one does not.

    ``what`` is a key of `GROWTHS`; all else stays, but for the global batch that a larger
    microbatch needs. Raises `InputError` for another name, or a workload that is no training step.
    """
    if what not in GROWTHS:
        raise unknown("size", what, GROWTHS)
    setting = resolve(scenario, profile)
    case = _case(scenario, setting)
    search = Search(case, GROWTHS[what], setting)
    found, unit = search.largest(), GROWTHS[what].unit(case)
    bounded = not search.fits(found + unit)
    room = setting.memory_bytes - setting.reserve_bytes
    metrics = {
        "what": what,
        "largest": found,
        "peak_memory_bytes": search.peak(found) if found else None,
        "bounded": bounded,
        "next": found + unit,
        "next_peak_memory_bytes": search.peak(found + unit),
        "lacking_bytes": search.peak(found + unit) - room if bounded else None,
        "device_memory_bytes": setting.memory_bytes,
        "reserve_bytes": setting.reserve_bytes,
        "evaluations": len(search.found),
        "monotone": search.monotone(),
    }
    memory = search.memory(found) if found else {}
    metrics |= {key: memory[key] for key in ("host_memory_bytes",) if key in memory}
    notes = [f"{what} grows in steps of {unit}.", setting.reserve_note]
    if "host_memory_bytes" in metrics:
        notes.append("the host is taken to have room for host_memory_bytes of each rank.")
    warnings = list(setting.warnings)
    if not bounded:
        warnings.append(f"memory does not bound {what}: the search ended at {found}.")
    if not metrics["monotone"]:
        warnings.append(f"memory fell as {what} grew: a larger value may fit too.")
    origin = provenance(scenario, setting, "estimate") | {"strategy": strategy_table(case[1])}
    return Result(scenario_hash(scenario), metrics, tuple(notes), tuple(warnings), origin)

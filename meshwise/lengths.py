"""Training steps over sequences of unequal length: who runs what, predicted and measured."""

from __future__ import annotations

from dataclasses import dataclass, replace

from meshwise.setting import Setting
from simcore.balance import BALANCERS, Menu, Pieces, ends_of, make_menu
from simcore.costs import CostOf
from simcore.errors import InputError, unknown
from simcore.metrics import Metrics
from simcore.mixed import IDLE, Assignment, MixedProgram, lower_mixed
from simcore.mixed_engine import simulate_mixed
from simcore.mixed_metrics import heaviest, mixed_metrics
from simcore.models import ModelSpec
from simcore.strategy import ParallelStrategy
from simcore.timeline import Timeline
from simcore.uncertainty import interval, program_deviation
from simcore.workloads import TrainStep

DEFAULT = "static"


@dataclass(frozen=True, slots=True)
class Shared:
    """A step whose sequences have been given to lanes."""

    pieces: Pieces
    menu: Menu
    assignment: Assignment
    mixed: MixedProgram


def share_out(
    model: ModelSpec, work: TrainStep, parallel: ParallelStrategy, setting: Setting
) -> Shared:
    """Return who runs what. Raises `InputError` where memory or the strategy does not allow it."""
    name = parallel.balance or DEFAULT
    if name not in BALANCERS:
        raise unknown("balance", name, BALANCERS)
    if setting.framework:
        raise InputError(
            f"[run].framework = {setting.framework!r} counts memory for sequences of one length: "
            "leave it out where lengths differ."
        )
    if name == "zeppelin" and parallel.cp_kind == "ring" and not parallel.cp_window:
        # Rings within nodes whose ranks each pass on their own block: every NIC carries its share.
        parallel = replace(parallel, cp_window=setting.cluster.gpus_per_node // parallel.tp)
    pieces = Pieces(
        model,
        parallel,
        work,
        _priced_once(setting),
        setting.memory_bytes,
        setting.reserve_bytes,
    )
    menu = make_menu(pieces)
    assignment = BALANCERS[name](menu)
    return Shared(pieces, menu, assignment, lower_mixed(model, parallel, work, assignment))


def _priced_once(setting: Setting) -> CostOf:
    """Return the cost model of every mesh, made once."""
    from functools import cache

    made = cache(lambda mesh: setting.cost(dict(mesh)))
    return lambda mesh: made(tuple(mesh.items()))


def predicted(shared: Shared, setting: Setting) -> tuple[Metrics, Timeline]:
    """Return the metrics and the simulated timeline of a step."""
    pieces, mixed = shared.pieces, shared.mixed
    laid = {kind: pieces.laid(kind) for kind in mixed.variants if kind != IDLE}
    timeline = simulate_mixed(mixed, pieces.cost_of, laid)
    metrics = measured(shared, setting, timeline)
    some = mixed.variants[heaviest(mixed)]
    deviation = program_deviation(some, pieces.cost_of(some.mesh))
    ends = ends_of(shared.menu, shared.assignment)
    metrics |= {
        "interval_s": interval(timeline.step_s, deviation),
        "pieces_s": float(ends.max()),
        "pieces_bound_s": shared.menu.bound_s,
    }
    return metrics, timeline


def measured(shared: Shared, setting: Setting, timeline: Timeline) -> Metrics:
    """Return the metrics of a step from its timeline."""
    model = shared.pieces.model
    return mixed_metrics(
        model,
        shared.pieces.work,
        shared.mixed,
        timeline,
        chip_peak_flops_per_s=setting.peak_flops_per_s(model.compute_dtype),
        memory_bytes=setting.memory_bytes,
        reserve_bytes=setting.reserve_bytes,
    )


def notes(shared: Shared) -> tuple[str, ...]:
    """Return what the prediction of a step over unequal lengths rests on."""
    return (
        f"sequences of {len(shared.menu.classes)} classes of length were given to groups of "
        f"{shared.menu.lanes} lanes by {shared.pieces.parallel.balance or DEFAULT!r}; the step is "
        "simulated by either engine, since groups wait for one another.",
        "pieces_s is when the last lane is done with its sequences, reductions and optimizer "
        "apart; pieces_bound_s is what no assignment beats.",
    )

"""The metrics of a step over sequences of unequal length, whichever machine gave the timeline."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from simcore.metrics import TRAIN_PARTS, Metrics, achieved, executed_flops, memory_metrics
from simcore.mixed import IDLE, MixedProgram, Variant
from simcore.models import ModelSpec
from simcore.timeline import Timeline
from simcore.workloads import TrainStep


def mixed_flops(mixed: MixedProgram) -> float:
    """Return the matrix-product FLOPs of the step over all ranks, padding included."""
    each = {
        # the order of a variant's program holds two pieces on every group of its degree
        kind: executed_flops(program) / (2 * len(mixed.lanes) / kind.degree)
        for kind, program in mixed.variants.items()
        if kind != IDLE
    }
    return sum(each[piece.variant] for piece in mixed.pieces)


def heaviest(mixed: MixedProgram) -> Variant:
    """Return the variant of which a lane holds the most rows at once."""
    kinds = (kind for kind in mixed.variants if kind != IDLE)
    return max(kinds, key=lambda kind: kind.tokens * kind.batch / kind.degree)


def mixed_memory(mixed: MixedProgram, memory_bytes: float, reserve_bytes: float) -> Metrics:
    """Return the memory metrics of the lanes that run the heaviest pieces.

    In a pipeline every microbatch in flight counts as such a piece, which errs to the wide side.
    """
    program = mixed.variants[heaviest(mixed)]
    busiest = replace(program, order=mixed.orders[max(mixed.orders)])
    return memory_metrics(busiest, TRAIN_PARTS, memory_bytes, reserve_bytes)


def mixed_metrics(
    model: ModelSpec,
    workload: TrainStep,
    mixed: MixedProgram,
    timeline: Timeline,
    *,
    chip_peak_flops_per_s: float,
    memory_bytes: float,
    reserve_bytes: float,
) -> Metrics:
    """Return the metrics of a training step, and how its sequences were shared out.

    ``groups``: sequences by the ranks that shared each; ``imbalance``: time that the busiest
    followed rank is not idle over the mean; ``padding_fraction``: tokens added over real ones.
    """
    step, world = timeline.step_s, mixed.world
    groups: Counter[int] = Counter()
    for piece in mixed.pieces:
        groups[piece.degree] += len(piece.sequences)
    busy = [step - times.idle_s for times in timeline.times.values()]
    padded = sum(len(piece.sequences) * piece.tokens for piece in mixed.pieces)
    return {
        **achieved(model, workload, world, step, chip_peak_flops_per_s),
        "hfu": mixed_flops(mixed) / (step * world * chip_peak_flops_per_s),
        **mixed_memory(mixed, memory_bytes, reserve_bytes),
        "bubble_fraction": timeline.bubble_fraction,
        "exposed_communication_fraction": timeline.exposed_communication_fraction,
        "groups": {str(degree): groups[degree] for degree in sorted(groups)},
        "imbalance": max(busy) * len(busy) / sum(busy),
        "padding_fraction": padded / workload.tokens - 1,
    }

"""What a run is judged by: every metric of a result, with one definition for all three machines.

Units are SI and stand in the names. Model FLOPs follow PaLM (Chowdhery et al. 2022, appendix B):
6 N + 12 L h s per trained token, N all parameters (tied ones once, active experts only) and
h = heads x head_dim; ``mfu_causal`` counts half of the attention term. ``hfu`` counts the
matrix-product FLOPs that the program really executes, recomputation and padding included.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from simcore.costs import CostModel, Network
from simcore.decode import Pass, passes
from simcore.estimate import is_message, message_seconds, only_op
from simcore.liveness import activation_parts, host_peak, residents, swaps
from simcore.lower import lower_pass
from simcore.models import (
    STATEFUL,
    ModelSpec,
    active_parameter_count,
    mixer_of,
    recurrence_flops,
)
from simcore.ops import Size, work
from simcore.pipelines.orders import is_split
from simcore.program import Action, Program
from simcore.sequence import mean_share
from simcore.strategy import ParallelStrategy
from simcore.templates import lay
from simcore.timeline import Timeline
from simcore.workloads import CollectiveCall, Generation, TrainStep

Metrics = dict[str, Any]
TRAIN_PARTS = ("weights", "stashes", "gradients", "optimizer", "activations", "logits")
GENERATE_PARTS = ("weights", "kv_cache", "activations", "logits")


# ---------------------------------------------------------------- model FLOPs


def model_flops_per_token(model: ModelSpec, seq_len: int, *, causal: bool = False) -> float:
    """Return 6 N + 12 L h s, or 6 N + 6 L h s where causal attention is counted as half.

    A layer with a state has no scores: three times the products of its recurrence stand for them.
    """
    mixers = Counter(mixer_of(model, layer) for layer in range(model.layers))
    states = sum(3 * mixers[mixer] * recurrence_flops(model, mixer) for mixer in STATEFUL)
    attending = model.layers - sum(mixers[mixer] for mixer in STATEFUL)
    attention = 12 * attending * model.heads * model.head_dim * seq_len
    return 6 * active_parameter_count(model) + states + attention * (0.5 if causal else 1.0)


def step_flops(model: ModelSpec, workload: TrainStep, *, causal: bool = False) -> float:
    """Return the model FLOPs of a step, each sequence at its own length."""
    alike = Counter(workload.lengths) or {workload.seq_len: workload.global_batch}
    return sum(
        count * length * model_flops_per_token(model, length, causal=causal)
        for length, count in alike.items()
    )


def executed_flops(program: Program) -> float:
    """Return the matrix-product FLOPs of one run of the program, over all ranks."""
    blocks = {
        name: float(sum(work(op).flops * mean_share(op) for op in block.ops))
        for name, block in program.blocks.items()
    }
    bodies = {
        name: sum(blocks[call.block] for call in calls) for name, calls in program.bodies.items()
    }
    copies = program.world // len(program.order)
    counts = Counter(action.body for actions in program.order for action in actions)
    return copies * sum(bodies[body] * times for body, times in counts.items())


def achieved(
    model: ModelSpec, workload: TrainStep, world: int, step_s: float, peak_flops_per_s: float
) -> Metrics:
    """Return throughput and model-FLOPs utilisation of a step that took ``step_s``."""
    tokens = workload.tokens
    flops, causal = (step_flops(model, workload, causal=half) for half in (False, True))
    available = step_s * world * peak_flops_per_s
    return {
        "step_s": step_s,
        "tokens_per_s": tokens / step_s,
        "tokens_per_s_per_gpu": tokens / step_s / world,
        "mfu": flops / available,
        "mfu_causal": causal / available,
        "model_flops": float(flops),
    }


# ---------------------------------------------------------------- memory


def rank_memory_parts(program: Program, rank: int) -> dict[str, float]:
    """Return the bytes that pipeline rank ``rank`` holds at its peak, by part."""
    return dict(residents(program, rank).parts) | activation_parts(program, rank)


def heaviest_ranks(program: Program) -> list[int]:
    """Return, of the pipeline ranks that run the same blocks, the one that holds most microbatches.

    The peak of ranks with equal stages grows with the microbatches in flight, so no other is worse.
    """
    found: dict[object, tuple[int, int]] = {}
    if is_split(program.order):  # what waits for its weight gradient counts too
        return list(range(len(program.order)))
    for rank, actions in enumerate(program.order):
        kinds = {action.body: action.kind for action in actions}
        low = min(call.layer for body in kinds for call in program.bodies[body])
        shape = tuple(
            (kind, tuple((call.block, call.layer - low) for call in program.bodies[body]))
            for body, kind in sorted(kinds.items(), key=lambda item: item[1])
        )
        found[shape] = max(found.get(shape, (0, rank)), (most_in_flight(actions), rank))
    return sorted(rank for _, rank in found.values())


def most_in_flight(actions: Sequence[Action]) -> int:
    """Return the largest number of microbatches between their forward and backward."""
    flying, most = 0, 0
    for action in actions:
        flying += (action.kind == "F") - (action.kind in ("B", "BR", "W", "WR"))
        most = max(most, flying)
    return most


def memory_metrics(
    program: Program, names: Sequence[str], memory_bytes: float, reserve_bytes: float
) -> Metrics:
    """Return peak memory of the worst rank, by part, and whether it fits beside the reserve."""
    worst = max(
        (rank_memory_parts(program, rank) for rank in heaviest_ranks(program)),
        key=lambda parts: sum(parts.values()),
    )
    total = sum(worst.values())
    ranks = heaviest_ranks(program) if swaps(program) else []
    host = {"host_memory_bytes": max(host_peak(program, rank) for rank in ranks)} if ranks else {}
    return {
        **host,
        "peak_memory_bytes": total,
        "peak_memory_parts_bytes": {name: worst[name] for name in names},
        "device_memory_bytes": memory_bytes,
        "reserve_bytes": reserve_bytes,
        "fits": bool(total + reserve_bytes <= memory_bytes),
    }


# ---------------------------------------------------------------- training


def train_metrics(
    model: ModelSpec,
    parallel: ParallelStrategy,
    workload: TrainStep,
    program: Program,
    timeline: Timeline,
    *,
    chip_peak_flops_per_s: float,
    memory_bytes: float,
    reserve_bytes: float,
    memory: Metrics | None = None,
) -> Metrics:
    """Return the metrics of one training step, whichever machine gave the timeline.

    ``memory`` are the program's memory metrics where they are known already.
    """
    step, world = timeline.step_s, parallel.world
    rates = achieved(model, workload, world, step, chip_peak_flops_per_s)
    return {
        **rates,
        "hfu": executed_flops(program) / (step * world * chip_peak_flops_per_s),
        **(memory or memory_metrics(program, TRAIN_PARTS, memory_bytes, reserve_bytes)),
        "bubble_fraction": timeline.bubble_fraction,
        "exposed_communication_fraction": timeline.exposed_communication_fraction,
    }


def recommendation_metrics(
    samples: int,
    program: Program,
    timeline: Timeline,
    *,
    chip_peak_flops_per_s: float,
    memory_bytes: float,
    reserve_bytes: float,
) -> Metrics:
    """Return the metrics of one step of a recommendation model over ``samples`` in all."""
    step, world = timeline.step_s, program.world
    return {
        "step_s": step,
        "samples_per_s": samples / step,
        "samples_per_s_per_gpu": samples / step / world,
        "hfu": executed_flops(program) / (step * world * chip_peak_flops_per_s),
        **memory_metrics(program, TRAIN_PARTS, memory_bytes, reserve_bytes),
        "bubble_fraction": timeline.bubble_fraction,
        "exposed_communication_fraction": timeline.exposed_communication_fraction,
    }


# ---------------------------------------------------------------- generation


@dataclass(frozen=True, slots=True)
class PassTimes:
    """Seconds of every pass of a generation, in order, and the passes themselves."""

    passes: tuple[Pass, ...]
    seconds: tuple[float, ...]


def pass_program(
    model: ModelSpec, parallel: ParallelStrategy, workload: Generation, step: Pass
) -> Program:
    """Return the program of one pass."""
    return lower_pass(model, parallel, workload.batch, step.new_rows, step.cached_rows)


def pass_seconds(program: Program, cost: CostModel, network: Network) -> Size:
    """Return the seconds of a pass, an array where the program's dims are arrays.

    The stages follow one another; between two of them goes one message.
    """
    total: Size = 0.0
    for rank, actions in enumerate(program.order):
        for action in actions:
            if is_message(action):
                total = total + _message_seconds(program, rank, action, cost, network)
            else:
                total = total + lay(program, action.body, cost).elapsed_s
    return total


def _message_seconds(
    program: Program, rank: int, action: Action, cost: CostModel, network: Network
) -> float:
    """Return a send's issue and flight; its receive is posted meanwhile."""
    op = only_op(program, action)
    if op.kind != "send":
        return 0.0
    size = float(np.max(work(op).payload_bytes))
    flight = message_seconds(program, network, rank, rank + op.attrs["peer"], size)
    return float(cost.issue_seconds(op)) + flight


def generation_seconds(
    model: ModelSpec,
    parallel: ParallelStrategy,
    workload: Generation,
    method: str,
    cost: CostModel,
    network: Network,
) -> PassTimes:
    """Return the seconds of every pass; passes with as many new rows are priced at once."""
    steps = tuple(passes(method, workload))
    seconds = np.zeros(len(steps))
    for rows in sorted({step.new_rows for step in steps}):
        places = [i for i, step in enumerate(steps) if step.new_rows == rows]
        cached: Any = np.array([steps[i].cached_rows for i in places])
        program = lower_pass(model, parallel, workload.batch, rows, cached)
        seconds[places] = pass_seconds(program, cost, network)
    seconds += cost.pass_overhead_seconds(workload.batch)
    return PassTimes(steps, tuple(float(value) for value in seconds))


def generation_memory(
    model: ModelSpec,
    parallel: ParallelStrategy,
    workload: Generation,
    steps: Sequence[Pass],
    memory_bytes: float,
    reserve_bytes: float,
) -> Metrics:
    """Return the memory metrics of the heavier of the first and the last pass.

    The cache of either is the whole one, since a server reserves it at the start.
    """
    ends = (steps[0], steps[-1])
    longest = max(step.new_rows + step.cached_rows for step in steps)
    found = []
    for step in ends:
        program = pass_program(model, parallel, workload, step)
        metrics = memory_metrics(program, GENERATE_PARTS, memory_bytes, reserve_bytes)
        scale = longest / (step.new_rows + step.cached_rows)
        found.append(_with_cache(metrics, scale, memory_bytes, reserve_bytes))
    return max(found, key=lambda metrics: float(metrics["peak_memory_bytes"]))


def _with_cache(
    metrics: Metrics, scale: float, memory_bytes: float, reserve_bytes: float
) -> Metrics:
    parts = dict(metrics["peak_memory_parts_bytes"])
    parts["kv_cache"] *= scale
    total = sum(parts.values())
    return {
        **metrics,
        "peak_memory_bytes": total,
        "peak_memory_parts_bytes": parts,
        "fits": bool(total + reserve_bytes <= memory_bytes),
    }


def generate_metrics(
    model: ModelSpec,
    parallel: ParallelStrategy,
    workload: Generation,
    times: PassTimes,
    *,
    memory_bytes: float,
    reserve_bytes: float,
) -> Metrics:
    """Return the metrics of one generation from the seconds of its passes."""
    total, first = sum(times.seconds), times.seconds[0]
    count, later = len(times.passes), workload.output_tokens - 1
    return {
        "seconds": total,
        "tokens_per_s": workload.batch * workload.output_tokens / total,
        "ttft_s": first,
        "tpot_s": (total - first) / later if later else 0.0,
        "passes": count,
        "committed_per_pass": workload.output_tokens / count,
        "speedup_vs_autoregressive": 1.0,
        **generation_memory(model, parallel, workload, times.passes, memory_bytes, reserve_bytes),
    }


# ---------------------------------------------------------------- collectives and operators


def collective_metrics(
    call: CollectiveCall, seconds: float, bus_bytes_per_s: float, algorithm: str
) -> Metrics:
    """Return the metrics of one collective; rates are 0 where it takes no time."""
    rate = call.size_bytes / seconds if seconds else 0.0
    return {
        "seconds": seconds,
        "algorithm_bytes_per_s": rate,
        "bus_bytes_per_s": bus_bytes_per_s,
        "algorithm": algorithm,
    }


def op_metrics(
    seconds: float, flops: float, moved_bytes: float, limits_s: Mapping[str, float]
) -> Metrics:
    """Return the metrics of one operator; ``bound`` is the largest of ``limits_s``.

    ``limits_s`` holds the seconds that each of compute, memory and latency alone would take.
    """
    return {
        "seconds": seconds,
        "flops_per_s": flops / seconds,
        "bytes_per_s": moved_bytes / seconds,
        "bound": max(limits_s, key=lambda name: limits_s[name]),
    }

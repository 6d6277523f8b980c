"""Lowering: (model, parallel strategy, workload) -> `Program`.

The forward blocks come from `simcore.network`, their backward from `simcore.adjoints`. Around
them `simcore.lowering` puts what data parallelism, sharding and pipelining do: flat weight and
gradient buffers, gathers and reductions, sends and receives, the optimizer. Here is the order.
"""

from __future__ import annotations

from dataclasses import astuple, replace

import numpy as np

from simcore.axes import check_grid, sharded_axes
from simcore.codecs import check_codecs
from simcore.dtypes import DTYPE_BYTES
from simcore.errors import InputError, unknown
from simcore.lowering.sharding import OPTIMIZER_STATES, Lowering, Sharding
from simcore.lowering.stages import pipeline_bodies, summed_and_updated, token_return
from simcore.lowering.units import QUORUM, UNITS, backward_blocks, forward_blocks, turn_blocks
from simcore.models import LINEAR, ModelSpec
from simcore.network import TRAINABLE, Rows, TensorParallel, check_lowerable
from simcore.ops import Size
from simcore.ping_pong import check_ping_pong
from simcore.pipelines.asynchronous import (
    Asynchronous,
    group_reduces,
    update_group,
    versions_of,
    with_updates,
)
from simcore.pipelines.orders import Order, is_split
from simcore.pipelines.placement import Placement, last_reduces, with_messages
from simcore.program import Action, Block, Call, Program, Versions
from simcore.quorum import check_backups, quorum
from simcore.recompute import check_recompute
from simcore.schedules import Schedule, find_schedule
from simcore.servers import check_documents
from simcore.strategy import (
    ParallelStrategy,
    check_experts,
    check_split,
    microbatches,
    stage_layers,
)
from simcore.streaming import check_streaming
from simcore.swapping import check_swapping
from simcore.workloads import Generation, TrainStep


def _check_dtypes(model: ModelSpec, workload: TrainStep) -> None:
    for what, dtype in (("weights", model.weights_dtype), ("gradients", workload.grads_dtype)):
        if dtype not in TRAINABLE:
            raise InputError(
                f"training keeps {what} in {dtype!r}, which is not trainable: use one of "
                f"{', '.join(TRAINABLE)}."
            )
    if workload.optimizer not in OPTIMIZER_STATES:
        raise unknown("optimizer", workload.optimizer, OPTIMIZER_STATES)


def lower_training(model: ModelSpec, parallel: ParallelStrategy, workload: TrainStep) -> Program:
    """Return the program of one optimizer step.

    Raises `InputError` where the strategy does not fit the model or the batch.
    """
    if workload.params_dtype:
        model = replace(model, weights_dtype=workload.params_dtype)
    check_lowerable(model, workload.seq_len)
    check_experts(model, parallel)
    _check_dtypes(model, workload)
    schedule = find_schedule(parallel.schedule)
    count = microbatches(parallel, workload)
    orders = schedule(parallel.pp, count, parallel.virtual_stages)
    placement = Placement.of(orders, schedule.copies)
    _check_backward(parallel, orders)
    shards = Sharding.of(parallel)
    group = update_group(schedule.updates, model, parallel, count, sharded=bool(shards.stage))
    updates = count // group
    if model.tied_embeddings:
        _check_tied(parallel, orders, placement)
    _check_parts(model, parallel, workload, schedule, split=is_split(orders))
    rows = Rows(
        parallel.microbatch,
        workload.seq_len // parallel.cp,
        split=parallel.split,
        documents=workload.documents,
        task_rows=parallel.task_rows,
    )
    tp = TensorParallel(parallel.tp, parallel.sequence_parallel)
    if tp.shards_tokens and rows.tokens % parallel.tp:
        raise InputError(
            f"sequence_parallel needs microbatch x seq_len {rows.tokens} to be a multiple of tp "
            f"{parallel.tp}: change [workload].seq_len or [parallel].tp."
        )
    low = Lowering(
        model,
        parallel,
        shards,
        Sharding.of_experts(parallel),
        tp.shards_tokens,
        workload.grads_dtype,
        workload.optimizer,
        is_split(orders),
    )
    tokens = workload.loss_tokens or workload.global_batch * workload.seq_len
    forward_blocks(low, tp, rows, updates / tokens)
    backward_blocks(low)
    turn_blocks(low, rows.batch, workload.seq_len)
    for unit in UNITS:
        low.sharding_blocks(unit)
    if parallel.backup_workers:
        backups, replicas = parallel.backup_workers, low.shards.replicas
        low.blocks[QUORUM] = (quorum(low.buffers, "embed", replicas, parallel.dp, backups),)
    bodies = pipeline_bodies(low, tp.local(rows.tokens) * model.hidden, placement)
    order, versions = _order(bodies, orders, placement, schedule.updates, group)
    info = {
        "kind": "train",
        "microbatches": count,
        "batch": parallel.microbatch,
        "seq_len": workload.seq_len,
        "vocab": model.vocab,
        "dp": parallel.dp,
        "split": astuple(parallel.split),
        "keep": ("loss",),
        "schedule": parallel.schedule,
        "updates": updates,
        "backups": parallel.backup_workers,
    }
    if parallel.split.travels == "nothing":
        axes = sharded_axes(model)
        info |= {"frames": model.frames, "axes": (axes[0], axes[-1])}
    return replace(_program(low, bodies, order, placement, info), versions=versions)


def _check_parts(
    model: ModelSpec,
    parallel: ParallelStrategy,
    workload: TrainStep,
    schedule: Schedule,
    *,
    split: bool,
) -> None:
    """Raise where a part of the strategy does not go with the model, the batch or another part."""
    check_split(model, parallel, workload.seq_len)
    check_grid(model, parallel, workload.seq_len)
    check_documents(model, parallel, workload)
    check_recompute(parallel, stage_layers(model, parallel))
    check_backups(model, parallel, streams=schedule.updates is not None)
    shards = Sharding.of(parallel)
    summed = schedule.copies > 1 or (model.tied_embeddings and parallel.pp > 1)
    check_codecs(parallel, replicas=bool(shards.stage and shards.replicas), summed=summed)
    check_streaming(model, parallel, workload.seq_len // parallel.cp, split_backward=split)
    check_swapping(model, parallel, split_backward=split)
    check_ping_pong(model, parallel, split_backward=split)


def _order(
    bodies: dict[str, tuple[Call, ...]],
    orders: Order,
    placement: Placement,
    updates: Asynchronous | None,
    group: int,
) -> tuple[tuple[tuple[Action, ...], ...], dict[int, Versions]]:
    """Return every rank's actions with messages, sums and updates, and the versions of weights."""
    if updates is not None:
        reduced = [group_reduces(actions, group) for actions in orders]
        versions = {s: versions_of(updates, actions, group) for s, actions in enumerate(orders)}
        return tuple(
            tuple(with_updates(row)) for row in with_messages(reduced, placement)
        ), versions
    reduced = [last_reduces(actions) for actions in orders]
    return tuple(
        tuple(summed_and_updated(bodies, placement, rank, actions))
        for rank, actions in enumerate(with_messages(reduced, placement))
    ), {}


def _check_backward(parallel: ParallelStrategy, orders: Order) -> None:
    """Raise where gradients would have to be sharded twice, once per part of a backward."""
    if is_split(orders) and Sharding.of(parallel).stage >= 2:
        raise InputError(
            f"the schedule {parallel.schedule!r} splits backwards, which needs zero_stage 0 or 1: "
            "lower [parallel].zero_stage, or choose '1f1b'."
        )


def _check_tied(parallel: ParallelStrategy, orders: Order, placement: Placement) -> None:
    """Raise where a rank with both ends would reduce a tied table before its gradient is whole."""
    first, last = 0, placement.chain - 1
    if last and placement.stage_rank[first] == placement.stage_rank[last]:
        final = {action.stage: i for i, action in enumerate(orders[placement.stage_rank[first]])}
        if final[last] > final[first]:
            raise InputError(
                f"the schedule {parallel.schedule!r} ends the last stage after the first, which "
                "tied embeddings on one rank do not allow: let the first stage's last action be "
                "the last of all."
            )


def _program(
    low: Lowering,
    bodies: dict[str, tuple[Call, ...]],
    order: tuple[tuple[Action, ...], ...],
    placement: Placement,
    info: dict[str, object],
) -> Program:
    used = {call.block for body in bodies.values() for call in body}
    blocks = {n: Block(n, ops) for n, ops in low.blocks.items() if n in used}
    mesh = low.parallel.mesh
    return Program(mesh, blocks, low.buffers, bodies, order, placement.stage_rank, info)


def lower_pass(
    model: ModelSpec, parallel: ParallelStrategy, batch: Size, new: Size, cached: Size
) -> Program:
    """Return the program of one forward pass of generation: new rows over a key-value cache.

    ``new`` and ``cached`` may be arrays (one value per pass) when the program is only priced.
    """
    check_lowerable(model, int(np.max(new + cached)))
    if parallel.virtual_stages > 1:
        raise InputError(
            f"[parallel].virtual_stages = {parallel.virtual_stages} serves training alone: remove "
            "it to generate."
        )
    if parallel.act_codec != "none":
        raise InputError(
            "[parallel].act_codec serves training alone in this version: remove it to generate."
        )
    if model.frames:
        raise InputError(
            f"model {model.name!r} attends along the axes of a grid, which is trained only in this "
            "version: choose a model without frames to generate."
        )
    if LINEAR in model.mixers:
        raise InputError(
            f"model {model.name!r} has linear layers, which are trained only in this version: "
            "choose a model without them to generate."
        )
    if parallel.cp > 1:
        raise InputError(
            "generation does not split sequences in this version: set [parallel].cp to 1."
        )
    if model.compute_dtype not in DTYPE_BYTES:
        raise unknown("dtype", model.compute_dtype, DTYPE_BYTES)
    rows = Rows(batch // parallel.dp, new, cached, keep_cache=True)
    tp = TensorParallel(parallel.tp, False)
    plain = replace(parallel, zero_stage=0, sequence_parallel=False)
    check_experts(model, plain)
    alone = Sharding(0, "", 1)
    low = Lowering(model, plain, alone, alone, False, "fp32", "adam")
    forward_blocks(low, tp, rows, 0)
    passes = [[Action(stage, "F", 0)] for stage in range(parallel.pp)]
    placement = Placement.of(passes)
    bodies = pipeline_bodies(low, rows.tokens * model.hidden, placement)
    order = tuple(map(tuple, with_messages(passes, placement)))
    if parallel.pp > 1:
        order = token_return(low, bodies, order, rows.batch)
    low.buffers = {
        n: b
        for n, b in low.buffers.items()
        if not n.startswith("g.") and not n.endswith((".g", ".g.rep"))
    }
    info = {
        "kind": "generate",
        "new_rows": rows.new,
        "microbatches": 1,
        "batch": rows.batch,
        "vocab": model.vocab,
        "dp": parallel.dp,
        "keep": ("next",),
    }
    return _program(low, bodies, order, placement, info)


def check_generation(parallel: ParallelStrategy, workload: Generation) -> None:
    """Raise `InputError` where the batch cannot be divided over the replicas."""
    if workload.batch % parallel.dp:
        raise InputError(
            f"[workload].batch {workload.batch} is not a multiple of dp {parallel.dp}."
        )

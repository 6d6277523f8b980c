"""Lowering: (model, parallel strategy, workload) -> `Program`.

The forward blocks come from `simcore.network`, their backward from `simcore.adjoints`. This
module adds what data parallelism, sharding and pipelining do around them: flat weight and
gradient buffers, gathers and reductions, sends and receives, the optimizer, and the order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, field, replace

import numpy as np

from simcore.adjoints import Tape, backward
from simcore.axes import SPACE, TIME, check_grid, grid_of, sharded_axes, turn, turns
from simcore.codecs import CodedSum, check_codecs, coded_boundary, coded_bytes, coded_sum
from simcore.dtypes import DTYPE_BYTES
from simcore.errors import InputError, unknown
from simcore.models import GRID, LINEAR, ModelSpec, is_moe_layer, mixer_of
from simcore.moe import EXPERTS, LAYER, ExpertGrid, moe_block
from simcore.network import (
    TRAINABLE,
    Rows,
    TensorParallel,
    check_lowerable,
    embed_block,
    head_block,
    layer_block,
)
from simcore.ops import Buffer, Op, Size
from simcore.pipelines.asynchronous import group_reduces, update_group, versions_of, with_updates
from simcore.pipelines.orders import Order, is_split
from simcore.pipelines.placement import Placement, last_reduces, with_messages
from simcore.program import MIRROR, Action, Block, Call, Program
from simcore.quorum import check_backups, quorum, quorum_reduce
from simcore.recompute import check_recompute, recompute_ops, recomputed_layers
from simcore.schedules import find_schedule
from simcore.servers import check_documents
from simcore.strategy import (
    ParallelStrategy,
    check_experts,
    check_split,
    microbatches,
    stage_layers,
)
from simcore.streaming import (
    Chunk,
    check_streaming,
    layer_backward,
    layer_chunks,
    layer_forward,
    loss_backward,
    loss_chunks,
)
from simcore.swapping import check_swapping, swap_layer
from simcore.workloads import Generation, TrainStep

LAYERS = ("layer", *GRID, LINEAR, LAYER)  # units that layers are: see `layer_unit`
UNITS = ("embed", *LAYERS, "head")
PARTS = {LAYER: (LAYER, EXPERTS)}  # units of which several flat buffers hold the weights
QUORUM = "quorum"  # the block that finds which data ranks count
OPTIMIZER_STATES = {"adam": ("m", "v"), "adamw": ("m", "v")}


@dataclass(frozen=True, slots=True)
class Sharding:
    """Along which axes weights, gradients and states are split, and which gradients are summed."""

    stage: int
    axis: str  # shards over this group; "" for none
    degree: int
    replicas: str = ""  # group that holds copies of each shard
    replica_degree: int = 1

    @classmethod
    def of(cls, parallel: ParallelStrategy) -> Sharding:
        """Return the sharding of a strategy (ZeRO, Rajbhandari et al. 2020; HSDP for both axes)."""
        split = parallel.split.axes  # every rank of a sequence has a part of the gradients
        inner = [a for a, size in {"dp_shard": parallel.dp_shard, **split}.items() if size > 1]
        outer = ["dp_replicate"] if parallel.dp_replicate > 1 else []
        every, degree = "*".join(outer + inner), parallel.dp * parallel.cp
        stage = parallel.zero if every else 0
        if stage == 0:
            return cls(0, "", 1, every, degree)
        if stage < 3 or not (outer and inner):
            return cls(stage, every, degree)
        copies = parallel.dp_replicate
        return cls(3, "*".join(inner), degree // copies, "dp_replicate", copies)

    @classmethod
    def of_experts(cls, parallel: ParallelStrategy) -> Sharding:
        """Return the sharding of experts, over the ranks that hold copies of the same ones.

        The stage is that of dense weights; where those are sharded within replicas, so are these.
        """
        dense, grid = cls.of(parallel), ExpertGrid.of(parallel)
        replicas = {0: grid.edp, 3: dense.replica_degree}.get(dense.stage, 1)
        if dense.stage and grid.edp <= replicas:  # no copies within a replica to shard over
            replicas = 1
        group, degree, copies, count = grid.copies(replicas)
        return cls(dense.stage if degree > 1 else 0, group, degree, copies, count)


@dataclass(slots=True)
class _Lowering:
    """The growing program: blocks, buffers and what each unit needs."""

    model: ModelSpec
    parallel: ParallelStrategy
    shards: Sharding
    expert_shards: Sharding
    sequence: bool
    grads_dtype: str
    optimizer: str
    split: bool = False  # whether some backward comes as input and weight gradients
    buffers: dict[str, Buffer] = field(default_factory=dict)
    blocks: dict[str, tuple[Op, ...]] = field(default_factory=dict)
    chunks: dict[str, list[Chunk]] = field(default_factory=dict)  # of units that are streamed

    def sharding(self, unit: str) -> Sharding:
        """Return how a unit's weights are split."""
        return self.expert_shards if unit == EXPERTS else self.shards

    def weights_of(self, unit: str) -> list[str]:
        """Return the unit's weights, those whose gradients are summed over tp first, in one run."""
        names = [
            n
            for n, b in self.buffers.items()
            if b.scope == "weight" and n.startswith(f"{unit}.") and n != f"{unit}.w"
        ]
        return sorted(names, key=lambda n: not self._summed(self.buffers[n]))

    def _summed(self, weight: Buffer) -> bool:
        """Whether every tensor rank has only a part of the weight's gradient.

        With the tokens sharded that is so for every replicated weight (Korthikanti et al. 2022).
        """
        if np.ndim(self.parallel.tp) == 0 and self.parallel.tp == 1:
            return False
        if weight.experts:
            return False
        return weight.partial or (weight.shard_dim < 0 and self.sequence)

    def flatten(self, unit: str) -> None:
        """Lay the unit's weights and gradients out in flat buffers, padded to whole shards."""
        names = self.weights_of(unit)
        if not names:
            return
        offset: Size = 0
        summed: Size = 0
        shards, layered = self.sharding(unit), self.buffers[names[0]].layered
        stage = shards.stage
        for name in names:
            buffer = self.buffers[name]
            self.buffers[name] = replace(buffer, base=f"{unit}.w", offset=offset)
            self.buffers[f"g.{name}"] = Buffer(
                buffer.dims, self.grads_dtype, "grad", layered, f"{unit}.g", offset
            )
            offset = offset + buffer.elements
            if self._summed(buffer):
                summed = offset
        dtype = self.buffers[names[0]].dtype
        padded = -(-offset // shards.degree) * shards.degree
        whole = "work" if stage == 3 else "weight"
        self.buffers[f"{unit}.w"] = Buffer((padded,), dtype, whole, layered)
        grads = "work" if stage >= 2 else "grad"
        self.buffers[f"{unit}.g"] = Buffer(
            (padded,), self.grads_dtype, grads, layered, init="zeros"
        )
        self.buffers[f"{unit}.g.rep"] = Buffer(
            (summed,), self.grads_dtype, "grad", layered, f"{unit}.g"
        )
        if stage:
            part = (padded // shards.degree,)
            base = f"{unit}.w" if stage < 3 else ""
            self.buffers[f"{unit}.ws"] = Buffer(
                part, dtype, "weight", layered, base, part=shards.axis if base else ""
            )
            self.buffers[f"{unit}.gs"] = Buffer(
                part, self.grads_dtype, "grad", layered, init="zeros"
            )
            if stage >= 2:
                self.buffers[f"{unit}.gt"] = Buffer(part, self.grads_dtype, "work", layered)

    def add(self, name: str, ops: tuple[Op, ...] | list[Op]) -> None:
        """Keep a block, unless it has nothing to do."""
        if ops:
            self.blocks[name] = tuple(ops)

    def sharding_blocks(self, unit: str) -> None:
        """Add the unit's gathers, gradient clearing, gradient reduction and optimizer."""
        found: dict[str, list[Op]] = {}
        for part in PARTS.get(unit, (unit,)):
            for what, ops in self._sharding_ops(part).items():
                found.setdefault(what, []).extend(ops)
        for what, ops in found.items():
            self.add(f"{unit}.{what}", ops)

    def _sharding_ops(self, unit: str) -> dict[str, list[Op]]:
        """Return what one flat buffer of weights needs, by the block that it joins."""
        if f"{unit}.w" not in self.buffers:
            return {}
        stage, whole = self.sharding(unit).stage, self.buffers[f"{unit}.w"]
        n, dtype = whole.elements, whole.dtype
        gather = Op(
            "all_gather",
            {"n": n},
            dtype,
            (f"{unit}.ws",),
            (f"{unit}.w",),
            "dp",
            self.sharding(unit).axis,
        )
        clear = Op("fill", {"n": n}, self.grads_dtype, (), (f"{unit}.g",))
        coded = self._coded(unit)
        return {
            "unshard": [gather] if stage == 3 else [],
            "clear": [clear] if stage >= 2 else [],
            "reduce": [*self._partial_sums(unit), *(coded.reduce or self._sums(unit, n))],
            "settle": [*coded.settle, *self._settlement(unit)],
            "step": [
                *coded.step,
                *self._optimizer(unit),
                *([gather] if stage in (1, 2) else ()),
            ],
        }

    def _coded(self, unit: str) -> CodedSum:
        """Return the coded sum of a unit's gradients over data ranks; no ops where it is plain."""
        shards, codec = self.sharding(unit), self.parallel.grad_codec
        if codec == "none" or not (shards.axis or shards.replicas):
            return CodedSum()
        part = ("", f"{unit}.gs", f"{unit}.gt", f"{unit}.gt")[shards.stage]
        every, shared = (shards.replicas, shards.replica_degree), (shards.axis, shards.degree)
        return coded_sum(
            self.buffers,
            unit,
            part,
            shared if part else every,
            codec,
            feedback=self.parallel.error_feedback,
        )

    def _partial_sums(self, unit: str) -> list[Op]:
        """Sum gradients of which every tensor rank has a part."""
        rep, dtype = f"{unit}.g.rep", self.grads_dtype
        n = self.buffers[rep].elements
        return [Op("all_reduce", {"n": n}, dtype, (rep,), (rep,), "tp", "tp")] if n else []

    def _sums(self, unit: str, n: Size) -> list[Op]:
        """Sum gradients over data ranks."""
        shards, dtype = self.sharding(unit), self.grads_dtype
        backups = self.parallel.backup_workers
        if backups:
            return [quorum_reduce(self.buffers, unit, shards.replicas, backups)]
        ops: list[Op] = []
        whole = f"{unit}.g"
        if shards.stage:
            part = f"{unit}.gs" if shards.stage == 1 else f"{unit}.gt"
            ops.append(Op("reduce_scatter", {"n": n}, dtype, (whole,), (part,), "dp", shards.axis))
            whole, n = part, n // shards.degree
        if shards.replicas:
            ops.append(Op("all_reduce", {"n": n}, dtype, (whole,), (whole,), "dp", shards.replicas))
        return ops

    def _settlement(self, unit: str) -> list[Op]:
        """Add a microbatch's reduced gradients to the shard that gathers the step's."""
        if self.sharding(unit).stage < 2:
            return []
        dims = {"t": self.buffers[f"{unit}.gt"].elements, "n": 1}
        reads = (f"{unit}.gs", f"{unit}.gt")
        return [Op("add", dims, self.grads_dtype, reads, (f"{unit}.gs",))]

    def _optimizer(self, unit: str) -> list[Op]:
        stage = self.sharding(unit).stage
        weight, grad = (f"{unit}.ws", f"{unit}.gs") if stage else (f"{unit}.w", f"{unit}.g")
        held = self.buffers[weight]
        states = []
        for state in OPTIMIZER_STATES[self.optimizer]:
            states.append(f"{unit}.{state}")
            self.buffers[states[-1]] = Buffer(
                held.dims, "fp32", "state", held.layered, init="zeros"
            )
        master = held.dtype != "fp32"
        if master:
            states.append(f"{unit}.master")
            self.buffers[states[-1]] = Buffer(held.dims, "fp32", "state", held.layered, init="copy")
        attrs = {"grad_dtype": self.grads_dtype, "master": master}
        n = held.elements
        clears = {grad, f"{unit}.g"} if stage == 1 else {grad}
        return [
            Op(
                "adam",
                {"n": n},
                held.dtype,
                (grad, weight, *states),
                (weight, *states),
                attrs=attrs,
            ),
            *(
                Op("fill", {"n": self.buffers[g].elements}, self.grads_dtype, (), (g,))
                for g in sorted(clears)
            ),
        ]


def _forward_blocks(low: _Lowering, tp: TensorParallel, rows: Rows, loss_scale: float) -> None:
    buffers, model = low.buffers, low.model
    buffers["positions"] = Buffer((rows.tokens,), "int64", "data", layered=False)
    low.add("embed.F", embed_block(model, tp, rows, buffers))
    units = {layer_unit(model, layer) for layer in range(model.layers)}
    streamed = low.parallel.stream_chunks
    chunked = streamed > 1 or low.parallel.swap_fraction is not None
    if chunked and (units != {"layer"} or rows.documents):
        raise InputError(
            "[parallel].stream_chunks and swap_fraction need layers that attend to every earlier "
            "token of a sequence, which is one document: leave them out."
        )
    if streamed > 1:
        chunk = layer_block(model, tp, replace(rows, new=rows.new // streamed), buffers)
        low.chunks["layer"] = layer_chunks(chunk, buffers, rows.batch, streamed)
        low.add("layer.F", layer_forward(low.chunks["layer"]))
    elif "layer" in units:
        low.add("layer.F", layer_block(model, tp, rows, buffers))
    for mixer in units.intersection((*GRID, LINEAR)):
        found = layer_block(model, tp, rows, buffers, prefix=mixer, mixer=mixer)
        low.add(f"{mixer}.F", found)
    if LAYER in units:
        grid = ExpertGrid.of(low.parallel)
        low.add(f"{LAYER}.F", moe_block(model, tp, rows, buffers, grid))
    count = low.parallel.loss_chunks or streamed
    if count > 1 and not rows.keep_cache:
        chunk = head_block(model, tp, Rows(1, rows.tokens // count), buffers, loss_scale)
        runs = tp.degree if tp.shards_tokens else 1
        low.chunks["head"] = loss_chunks(chunk, buffers, count, runs)
    else:
        low.add("head.F", head_block(model, tp, rows, buffers, loss_scale))
    for unit in UNITS:
        for part in PARTS.get(unit, (unit,)):
            low.flatten(part)


def _backward_blocks(low: _Lowering) -> None:
    outputs = {"embed": ("h",), **dict.fromkeys(LAYERS, ("h+",)), "head": ()}
    streamed = {"layer": layer_backward, "head": loss_backward}
    for unit, chunks in low.chunks.items():
        low.add(f"{unit}.B", streamed[unit](chunks, low.buffers, backward))
    for unit in (u for u in UNITS if f"{u}.F" in low.blocks and u not in low.chunks):
        tape: Tape = backward(low.blocks[f"{unit}.F"], low.buffers, outputs[unit])
        low.add(f"{unit}.B", tape.joined())
        low.add(f"{unit}.I", tape.input_ops)
        low.add(f"{unit}.W", [op for _, op in tape.weight_ops])
        if unit == "layer" and low.parallel.swap_fraction is not None:
            _swap_blocks(low, tape.joined())
        elif unit in LAYERS:
            again = recompute_ops(low.parallel, low.blocks[f"{unit}.F"], tape.joined())
            low.add(f"{unit}.R", again)


def _swap_blocks(low: _Lowering, back: tuple[Op, ...]) -> None:
    """Add the blocks by which a layer's activations go to the host and come back, or are redone."""
    tp = TensorParallel(low.parallel.tp)

    def build(tokens: int) -> tuple[list[Op], dict[str, Buffer]]:
        rest = dict(low.buffers)
        return layer_block(low.model, tp, Rows(1, tokens), rest), rest

    share = low.parallel.swap_fraction
    assert share is not None
    found = swap_layer(low.blocks["layer.F"], back, low.buffers, share, build)
    low.add("layer.offload", found.offload)
    low.add("layer.release", found.release)
    low.add("layer.fetch", found.fetch)
    low.add("layer.R", found.again)


def layer_unit(model: ModelSpec, layer: int) -> str:
    """Return the unit that a layer (from 0) is: plain, of a mixer of its own, or with experts."""
    if is_moe_layer(model, layer):
        return LAYER
    mixer = mixer_of(model, layer)
    return mixer if mixer in LAYERS else "layer"


def _turn_blocks(low: _Lowering, batch: Size, length: int) -> None:
    """Add the units that turn the residual stream from one axis of a grid to the other."""
    dtype = low.model.compute_dtype
    for axis in sorted(set(turns(low.model, low.parallel).values())):
        other = TIME if axis == SPACE else SPACE
        for name, kinds, to in (("h", "F", axis), ("d.h", "BI", other)):
            for kind in kinds:
                grid = grid_of(low.model, length)
                ops = turn(low.buffers, name, batch, grid, low.parallel.cp, to, dtype)
                low.add(f"to_{axis}.{kind}", ops)


def _units(low: _Lowering, first: int, count: int, *, embed: bool, head: bool) -> list[Call]:
    model, turned = low.model, turns(low.model, low.parallel)
    calls = []
    for layer in range(first, first + count):
        if layer in turned:
            calls.append(Call(f"to_{turned[layer]}", layer))
        calls.append(Call(layer_unit(model, layer), layer))
    if embed:
        calls.insert(0, Call("embed", first))
    if head:
        calls.append(Call("head", first + count))
    return calls


def _prefetched(calls: list[list[Call]], unshard: list[list[Call]]) -> tuple[Call, ...]:
    """Interleave gathers one unit ahead of the unit that needs them."""
    body: list[Call] = []
    for index, unit in enumerate(calls):
        wanted = unshard[:2] if index == 0 else unshard[index + 1 : index + 2]
        body += [call for gathers in wanted for call in gathers]
        body += unit
    return tuple(body)


def _stage_bodies(low: _Lowering, stage: int, units: list[Call]) -> dict[str, tuple[Call, ...]]:
    """Return the bodies of one stage: F, B, BR (backward of the last microbatch), O (optimizer).

    Where backwards are split also I, W and WR.
    """

    def present(unit: Call, what: str) -> list[Call]:
        name = f"{unit.block}.{what}"
        return [Call(name, unit.layer)] if name in low.blocks else []

    # A stage without layers only passes on what comes.
    ends = {"embed": units[0], "head": units[-1]} if units else {}
    tied = low.model.tied_embeddings and all(ends[name].block == name for name in ends)

    def first(unit: Call, what: str) -> list[Call]:
        """What comes before a unit's backward; the head's also prepares a tied table."""
        if not tied or unit.block not in ends:
            return present(unit, what)
        return (
            present(ends["head"], what) + present(ends["embed"], what)
            if (unit.block == "head")
            else []
        )

    always = low.shards.stage >= 2
    backups = low.parallel.backup_workers
    layers = [unit.layer for unit in units if unit.block in LAYERS]
    swaps = low.parallel.swap_fraction is not None
    repeated = set(layers) if swaps else recomputed_layers(low.parallel, stage, layers)

    def forwards() -> list[list[Call]]:
        """Every unit's forward; what it copied to the host leaves the device one unit later."""
        found = [[*present(unit, "F"), *present(unit, "offload")] for unit in units]
        for index, unit in enumerate(units):
            found[min(index + 1, len(found) - 1)] += present(unit, "release")
        return found

    def again(unit: Call) -> list[Call]:
        return present(unit, "R") if unit.layer in repeated else []

    def back(unit: Call, last: bool) -> list[Call]:
        reduce = present(unit, "reduce") if always or (last and not backups) else []
        return [*first(unit, "clear"), *again(unit), *present(unit, "B"), *reduce]

    def backs(last: bool) -> list[list[Call]]:
        """Every unit's backward; its reduced gradients are settled one unit later, when they
        have had time to arrive."""
        found = [back(unit, last) for unit in reverse]
        for index, unit in enumerate(reverse):
            later = present(unit, "settle") if always or last else []
            found[min(index + 1, len(found) - 1)] += later
        if last and backups:
            found[-1] += [Call(QUORUM, 0), *(c for u in reverse for c in present(u, "reduce"))]
        return found

    reverse = units[::-1]
    gathers = [present(u, "unshard") if present(u, "F") else [] for u in units]
    regathers = [[*first(u, "unshard"), *present(u, "fetch")] for u in reverse]
    split: dict[str, tuple[Call, ...]] = {}
    if low.split:
        split = {
            f"{stage}I": tuple(c for u in reverse for c in (*again(u), *present(u, "I"))),
            f"{stage}W": tuple(c for u in reverse for c in present(u, "W")),
            f"{stage}WR": tuple(
                c
                for u in reverse
                for c in (*present(u, "W"), *present(u, "reduce"), *present(u, "settle"))
            ),
        }
    return split | {
        f"{stage}F": _prefetched(forwards(), gathers),
        f"{stage}B": _prefetched(backs(False), regathers),
        f"{stage}BR": _prefetched(backs(True), regathers),
        f"{stage}O": tuple(call for u in units for call in present(u, "step")),
    }


def _message(low: _Lowering, kind: str, peer: int, elements: Size) -> str:
    """Add the block of a message to or from the rank ``peer`` places on; return its name."""
    call, channel = kind.lower().split("_")
    forward = channel == "f"
    usual = 1 if forward == (call == "send") else -1
    name = kind.lower() if peer == usual else f"{kind.lower()}{peer:+d}"
    buffer, dtype = ("h",) if forward else ("d.h",), low.model.compute_dtype
    if low.parallel.act_codec != "none":
        buffer, elements, dtype = (f"{buffer[0]}.code",), coded_bytes(elements), "uint8"
    reads, writes = (buffer, ()) if call == "send" else ((), buffer)
    attrs = {"peer": peer, "channel": channel.upper()}
    low.blocks[name] = (Op(call, {"n": elements}, dtype, reads, writes, name, "pp", attrs),)
    return name


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
    sharded = bool(Sharding.of(parallel).stage)
    group = update_group(schedule.updates, model, parallel, count, sharded=sharded)
    updates = count // group
    if model.tied_embeddings:
        _check_tied(parallel, orders, placement)
    check_split(model, parallel, workload.seq_len)
    check_grid(model, parallel, workload.seq_len)
    check_documents(model, parallel, workload)
    check_recompute(parallel, stage_layers(model, parallel))
    shards = Sharding.of(parallel)
    summed = schedule.copies > 1 or (model.tied_embeddings and parallel.pp > 1)
    check_backups(model, parallel, streams=schedule.updates is not None)
    check_codecs(parallel, replicas=bool(shards.stage and shards.replicas), summed=summed)
    length = workload.seq_len // parallel.cp
    check_streaming(model, parallel, length, split_backward=is_split(orders))
    check_swapping(model, parallel, split_backward=is_split(orders))
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
    low = _Lowering(
        model,
        parallel,
        Sharding.of(parallel),
        Sharding.of_experts(parallel),
        tp.shards_tokens,
        workload.grads_dtype,
        workload.optimizer,
        is_split(orders),
    )
    tokens = workload.loss_tokens or workload.global_batch * workload.seq_len
    _forward_blocks(low, tp, rows, updates / tokens)
    _backward_blocks(low)
    _turn_blocks(low, rows.batch, workload.seq_len)
    for unit in UNITS:
        low.sharding_blocks(unit)
    if parallel.backup_workers:
        backups, replicas = parallel.backup_workers, low.shards.replicas
        low.blocks[QUORUM] = (quorum(low.buffers, "embed", replicas, parallel.dp, backups),)
    bodies = _pipeline_bodies(low, tp.local(rows.tokens) * model.hidden, placement)
    if schedule.updates:
        found = schedule.updates
        reduced = [group_reduces(actions, group) for actions in orders]
        order = tuple(tuple(with_updates(row)) for row in with_messages(reduced, placement))
        versions = {s: versions_of(found, actions, group) for s, actions in enumerate(orders)}
    else:
        reduced, versions = [last_reduces(actions) for actions in orders], {}
        order = tuple(
            tuple(_summed_and_updated(bodies, placement, rank, actions))
            for rank, actions in enumerate(with_messages(reduced, placement))
        )
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


def _summed_and_updated(
    bodies: dict[str, tuple[Call, ...]],
    placement: Placement,
    rank: int,
    actions: Sequence[Action],
) -> Iterator[Action]:
    """Yield a rank's actions with the sums over copies or tied ends, then the optimizer.

    A copy's sums start once its last gradient is there, beside what the rank still computes (eager
    synchronisation; Li and Hoefler 2021, Chimera, section 3.2). Later stages come first, on both
    ranks of a pair. Tied ends wait for all: the last rank has its gradient long before the first.
    """
    copied = len(placement.stage_rank) > placement.chain
    mine = [stage for stage, place in enumerate(placement.stage_rank) if place == rank]
    waiting = sorted(mine, key=lambda stage: stage % placement.chain)
    reduced: set[int] = set()
    for action, following in zip(actions, [*actions[1:], None], strict=True):
        yield action
        if action.kind in ("BR", "WR"):
            reduced.add(action.stage)
        if following is not None and following.kind.startswith("SEND"):
            continue  # what others wait for leaves first
        while waiting and (waiting[-1] in reduced if copied else following is None):
            stage = waiting.pop()
            ties = [body for body in bodies if body.startswith(f"{stage}TIE")]
            yield from (Action(stage, body.removeprefix(str(stage)), 0) for body in ties)
    yield from (Action(stage, "O", 0) for stage in mine)


def _pipeline_bodies(
    low: _Lowering, boundary: Size, placement: Placement
) -> dict[str, tuple[Call, ...]]:
    layers = stage_layers(low.model, low.parallel)
    last = placement.chain - 1
    bodies: dict[str, tuple[Call, ...]] = {}
    for stage in range(len(placement.stage_rank)):
        place = stage % placement.chain
        first, count = sum(layers[:place]), layers[place]
        units = _units(low, first, count, embed=place == 0, head=place == last)
        bodies |= _stage_bodies(low, stage, units)
        edges = (
            (first, placement.before(stage), ("RECV_F", "SEND_B")),
            (first + count, placement.after(stage), ("SEND_F", "RECV_B")),
        )
        for layer, other, kinds in edges:
            step = placement.step(stage, other)
            for kind in kinds if step else ():
                bodies[f"{stage}{kind}"] = (Call(_message(low, kind, step, boundary), layer),)
                if low.parallel.act_codec != "none":
                    _code_boundary(low, bodies, stage, kind, layer)
    if low.model.tied_embeddings and last and "embed.step" in low.blocks:
        _tie(low, bodies, placement)
    if len(placement.stage_rank) > placement.chain:
        _sum_copies(low, bodies, placement)
    return bodies


def _code_boundary(
    low: _Lowering, bodies: dict[str, tuple[Call, ...]], stage: int, kind: str, layer: int
) -> None:
    """Pack what a message sends behind the actions that give it, or unpack what it brings."""
    call, name = kind[:4], "h" if kind.endswith("F") else "d.h"
    what = "pack" if call == "SEND" else "unpack"
    low.blocks[f"{name}.{what}"] = (
        coded_boundary(low.buffers, name, low.parallel.act_codec)[what],
    )
    more = (Call(f"{name}.{what}", layer),)
    for action in ("F",) if name == "h" else ("B", "BR", "I"):
        body = bodies.get(f"{stage}{action}")
        if body is not None:
            bodies[f"{stage}{action}"] = (*body, *more) if call == "SEND" else (*more, *body)


def _sum_copies(low: _Lowering, bodies: dict[str, tuple[Call, ...]], placement: Placement) -> None:
    """Sum every unit's gradient over the two ranks that have a copy of it."""
    if low.model.tied_embeddings:
        raise InputError(
            "tied embeddings need a schedule with one copy of the network: choose 'dualpipev' or "
            "'1f1b'."
        )
    for stage in range(len(placement.stage_rank)):
        for number, call in enumerate(bodies[f"{stage}O"]):
            unit = call.block.removesuffix(".step")
            name = f"{unit}.gs" if low.shards.stage else f"{unit}.g"
            grads = low.buffers[name]
            summed = Op(
                "all_reduce",
                {"n": grads.elements},
                grads.dtype,
                (name,),
                (name,),
                "dp",
                MIRROR,
            )
            low.blocks[f"{unit}.sum"] = (summed,)
            bodies[f"{stage}TIE{number}"] = (Call(f"{unit}.sum", call.layer),)


def _tie(low: _Lowering, bodies: dict[str, tuple[Call, ...]], placement: Placement) -> None:
    """Sum the tied table's gradient over the first and the last stage (Megatron-LM).

    Where one rank holds both, it keeps one gradient, and nothing is left to do.
    """
    last = placement.chain - 1
    if low.shards.stage >= 2:
        raise InputError(
            "tied embeddings with pp > 1 need zero_stage 0 or 1 in this version: lower "
            "[parallel].zero_stage or pp."
        )
    if placement.stage_rank[0] == placement.stage_rank[last]:
        return
    grads = low.buffers["embed.gs" if low.shards.stage else "embed.g"]
    name = "embed.gs" if low.shards.stage else "embed.g"
    low.add(
        "embed.tie",
        [Op("all_reduce", {"n": grads.elements}, grads.dtype, (name,), (name,), "dp", "ends")],
    )
    for stage in (0, last):
        bodies[f"{stage}TIE"] = (Call("embed.tie", 0),)
    bodies[f"{last}O"] += (Call("embed.step", 0),)
    for kind in ("B", "BR", "WR"):
        if Call("embed.reduce", 0) in bodies.get(f"0{kind}", ()):
            bodies[f"{last}{kind}"] += (Call("embed.reduce", 0),)


def _program(
    low: _Lowering,
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
    low = _Lowering(model, plain, alone, alone, False, "fp32", "adam")
    _forward_blocks(low, tp, rows, 0)
    passes = [[Action(stage, "F", 0)] for stage in range(parallel.pp)]
    placement = Placement.of(passes)
    bodies = _pipeline_bodies(low, rows.tokens * model.hidden, placement)
    order = tuple(map(tuple, with_messages(passes, placement)))
    if parallel.pp > 1:
        order = _token_return(low, bodies, order, rows.batch)
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


def _token_return(
    low: _Lowering,
    bodies: dict[str, tuple[Call, ...]],
    order: tuple[tuple[Action, ...], ...],
    batch: Size,
) -> tuple[tuple[Action, ...], ...]:
    """Send the chosen tokens from the last stage back to the first, which embeds them next."""
    last = len(order) - 1
    head = next(call.layer for call in bodies[f"{last}F"] if call.block == "head.F")
    ends = {"send": (last, -last), "recv": (0, last)}
    found = list(order)
    for kind, (stage, peer) in ends.items():
        reads, writes = (("next",), ()) if kind == "send" else ((), ("next",))
        low.blocks[f"{kind}_t"] = (
            Op(
                kind,
                {"n": batch},
                "int64",
                reads,
                writes,
                f"{kind}_t",
                "pp",
                {"peer": peer, "channel": "T"},
            ),
        )
        name = f"{kind.upper()}_T"
        bodies[f"{stage}{name}"] = (Call(f"{kind}_t", head),)
        found[stage] = (*found[stage], Action(stage, name, 0))
    return tuple(found)


def check_generation(parallel: ParallelStrategy, workload: Generation) -> None:
    """Raise `InputError` where the batch cannot be divided over the replicas."""
    if workload.batch % parallel.dp:
        raise InputError(
            f"[workload].batch {workload.batch} is not a multiple of dp {parallel.dp}."
        )

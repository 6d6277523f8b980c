"""Lowering: (model, parallel strategy, workload) -> `Program`.

The forward blocks come from `simcore.network`, their backward from `simcore.adjoints`. This
module adds what data parallelism, sharding and pipelining do around them: flat weight and
gradient buffers, gathers and reductions, sends and receives, the optimizer, and the order.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, field, replace

import numpy as np

from simcore.adjoints import Tape, backward
from simcore.dtypes import DTYPE_BYTES
from simcore.errors import InputError, unknown
from simcore.models import ModelSpec
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
from simcore.program import Action, Block, Call, Program
from simcore.schedules import SCHEDULES
from simcore.strategy import ParallelStrategy, check_split, microbatches, stage_layers
from simcore.workloads import Generation, TrainStep

UNITS = ("embed", "layer", "head")
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


@dataclass(slots=True)
class _Lowering:
    """The growing program: blocks, buffers and what each unit needs."""

    model: ModelSpec
    parallel: ParallelStrategy
    shards: Sharding
    sequence: bool
    grads_dtype: str
    optimizer: str
    buffers: dict[str, Buffer] = field(default_factory=dict)
    blocks: dict[str, tuple[Op, ...]] = field(default_factory=dict)

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
        return weight.partial or (weight.shard_dim < 0 and self.sequence)

    def flatten(self, unit: str) -> None:
        """Lay the unit's weights and gradients out in flat buffers, padded to whole shards."""
        names = self.weights_of(unit)
        if not names:
            return
        offset: Size = 0
        summed: Size = 0
        stage, layered = self.shards.stage, self.buffers[names[0]].layered
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
        padded = -(-offset // self.shards.degree) * self.shards.degree
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
            part = (padded // self.shards.degree,)
            base = f"{unit}.w" if stage < 3 else ""
            self.buffers[f"{unit}.ws"] = Buffer(
                part, dtype, "weight", layered, base, part=self.shards.axis if base else ""
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
        if f"{unit}.w" not in self.buffers:
            return
        stage, whole = self.shards.stage, self.buffers[f"{unit}.w"]
        n, dtype = whole.elements, whole.dtype
        gather = Op(
            "all_gather", {"n": n}, dtype, (f"{unit}.ws",), (f"{unit}.w",), "dp", self.shards.axis
        )
        clear = Op("fill", {"n": n}, self.grads_dtype, (), (f"{unit}.g",))
        if stage == 3:
            self.add(f"{unit}.unshard", [gather])
        if stage >= 2:
            self.add(f"{unit}.clear", [clear])
        self.add(f"{unit}.reduce", self._reduction(unit, n))
        self.add(f"{unit}.settle", self._settlement(unit))
        self.add(f"{unit}.step", [*self._optimizer(unit), *([gather] if stage in (1, 2) else ())])

    def _reduction(self, unit: str, n: Size) -> list[Op]:
        shards, dtype = self.shards, self.grads_dtype
        ops: list[Op] = []
        rep = f"{unit}.g.rep"
        if self.buffers[rep].elements:
            ops.append(
                Op(
                    "all_reduce",
                    {"n": self.buffers[rep].elements},
                    dtype,
                    (rep,),
                    (rep,),
                    "tp",
                    "tp",
                )
            )
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
        if self.shards.stage < 2:
            return []
        dims = {"t": self.buffers[f"{unit}.gt"].elements, "n": 1}
        reads = (f"{unit}.gs", f"{unit}.gt")
        return [Op("add", dims, self.grads_dtype, reads, (f"{unit}.gs",))]

    def _optimizer(self, unit: str) -> list[Op]:
        stage = self.shards.stage
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
    low.add("layer.F", layer_block(model, tp, rows, buffers))
    low.add("head.F", head_block(model, tp, rows, buffers, loss_scale))
    for unit in UNITS:
        low.flatten(unit)


def _backward_blocks(low: _Lowering) -> None:
    outputs = {"embed": ("h",), "layer": ("h+",), "head": ()}
    for unit in UNITS:
        tape: Tape = backward(low.blocks[f"{unit}.F"], low.buffers, outputs[unit])
        low.add(f"{unit}.B", tape.joined())
        low.add(f"{unit}.I", tape.input_ops)
        low.add(f"{unit}.W", [op for _, op in tape.weight_ops])


def _units(first: int, count: int, *, embed: bool, head: bool) -> list[Call]:
    calls = [Call("layer", layer) for layer in range(first, first + count)]
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
    """Return the bodies of one stage: F, B, BR (backward of the last microbatch), O (optimizer)."""

    def present(unit: Call, what: str) -> list[Call]:
        name = f"{unit.block}.{what}"
        return [Call(name, unit.layer)] if name in low.blocks else []

    ends = {"embed": units[0], "head": units[-1]}
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
    full = low.parallel.recompute == "full"

    def back(unit: Call, last: bool) -> list[Call]:
        again = present(unit, "F") if full and unit.block == "layer" else []
        reduce = present(unit, "reduce") if always or last else []
        return [*first(unit, "clear"), *again, *present(unit, "B"), *reduce]

    def backs(last: bool) -> list[list[Call]]:
        """Every unit's backward; its reduced gradients are settled one unit later, when they
        have had time to arrive."""
        found = [back(unit, last) for unit in reverse]
        for index, unit in enumerate(reverse):
            found[min(index + 1, len(found) - 1)] += present(unit, "settle")
        return found

    reverse = units[::-1]
    gathers = [present(u, "unshard") for u in units]
    regathers = [first(u, "unshard") for u in reverse]
    return {
        f"{stage}F": _prefetched([present(u, "F") for u in units], gathers),
        f"{stage}B": _prefetched(backs(False), regathers),
        f"{stage}BR": _prefetched(backs(True), regathers),
        f"{stage}O": tuple(call for u in units for call in present(u, "step")),
    }


def _boundary(low: _Lowering, elements: Size) -> None:
    """Add the blocks that pass activations and gradients between neighbouring stages."""
    for name, buffer, step in (("F", "h", 1), ("B", "d.h", -1)):
        dims, dtype = {"n": elements}, low.model.compute_dtype
        for kind, peer in (("send", step), ("recv", -step)):
            reads, writes = ((buffer,), ()) if kind == "send" else ((), (buffer,))
            low.blocks[f"{kind}_{name.lower()}"] = (
                Op(
                    kind,
                    dims,
                    dtype,
                    reads,
                    writes,
                    f"{kind}_{name.lower()}",
                    "pp",
                    {"peer": peer, "channel": name},
                ),
            )


def _with_communication(actions: list[Action], stages: int) -> list[Action]:
    """Add sends after and receives one action before the actions that need them."""

    def receives(action: Action) -> list[Action]:
        if action.kind == "F" and action.stage > 0:
            return [Action(action.stage, "RECV_F", action.microbatch)]
        if action.kind.startswith("B") and action.stage < stages - 1:
            return [Action(action.stage, "RECV_B", action.microbatch)]
        return []

    def sends(action: Action) -> list[Action]:
        if action.kind == "F" and action.stage < stages - 1:
            return [Action(action.stage, "SEND_F", action.microbatch)]
        if action.kind.startswith("B") and action.stage > 0:
            return [Action(action.stage, "SEND_B", action.microbatch)]
        return []

    out: list[Action] = receives(actions[0])
    for action, following in zip(actions, [*actions[1:], None], strict=True):
        out += receives(following) if following else []
        out += [action, *sends(action)]
    return out


def _last_reduces(actions: list[Action]) -> list[Action]:
    """Mark each stage's last backward, which also reduces gradients."""
    final = {a.stage: i for i, a in enumerate(actions) if a.kind == "B"}
    return [a._replace(kind="BR") if final.get(a.stage) == i else a for i, a in enumerate(actions)]


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
    _check_dtypes(model, workload)
    if parallel.schedule not in SCHEDULES:
        raise unknown("schedule", parallel.schedule, SCHEDULES)
    count = microbatches(parallel, workload)
    check_split(model, parallel, workload.seq_len)
    rows = Rows(parallel.microbatch, workload.seq_len // parallel.cp, split=parallel.split)
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
        tp.shards_tokens,
        workload.grads_dtype,
        workload.optimizer,
    )
    _forward_blocks(low, tp, rows, 1.0 / (workload.global_batch * workload.seq_len))
    _backward_blocks(low)
    for unit in UNITS:
        low.sharding_blocks(unit)
    bodies, layers = _pipeline_bodies(low, tp.local(rows.tokens) * model.hidden)
    stages = len(layers)
    orders = SCHEDULES[parallel.schedule](stages, count)
    order = tuple(
        (
            *_with_communication(_last_reduces(actions), stages),
            *([Action(rank, "TIE", 0)] if f"{rank}TIE" in bodies else []),
            Action(rank, "O", 0),
        )
        for rank, actions in enumerate(orders)
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
    }
    return _program(low, bodies, order, info)


def _pipeline_bodies(
    low: _Lowering, boundary: Size
) -> tuple[dict[str, tuple[Call, ...]], tuple[int, ...]]:
    layers = stage_layers(low.model, low.parallel)
    last = len(layers) - 1
    bodies: dict[str, tuple[Call, ...]] = {}
    first = 0
    if last:
        _boundary(low, boundary)
    for stage, count in enumerate(layers):
        units = _units(first, count, embed=stage == 0, head=stage == last)
        bodies |= _stage_bodies(low, stage, units)
        if stage:
            bodies |= {
                f"{stage}{kind}": (Call(kind.lower(), first),) for kind in ("RECV_F", "SEND_B")
            }
        if stage < last:
            bodies |= {
                f"{stage}{kind}": (Call(kind.lower(), first + count),)
                for kind in ("SEND_F", "RECV_B")
            }
        first += count
    if low.model.tied_embeddings and last and "embed.step" in low.blocks:
        _tie(low, bodies, last)
    return bodies, layers


def _tie(low: _Lowering, bodies: dict[str, tuple[Call, ...]], last: int) -> None:
    """Sum the tied table's gradient over the first and the last stage (Megatron-LM)."""
    grads = low.buffers["embed.gs" if low.shards.stage else "embed.g"]
    name = "embed.gs" if low.shards.stage else "embed.g"
    low.add(
        "embed.tie",
        [Op("all_reduce", {"n": grads.elements}, grads.dtype, (name,), (name,), "dp", "ends")],
    )
    for stage in (0, last):
        bodies[f"{stage}TIE"] = (Call("embed.tie", 0),)
    bodies[f"{last}O"] += (Call("embed.step", 0),)
    for kind in ("B", "BR"):
        if Call("embed.reduce", 0) in bodies[f"0{kind}"]:
            bodies[f"{last}{kind}"] += (Call("embed.reduce", 0),)
    if low.shards.stage >= 2:
        raise InputError(
            "tied embeddings with pp > 1 need zero_stage 0 or 1 in this version: lower "
            "[parallel].zero_stage or pp."
        )


def _program(
    low: _Lowering,
    bodies: dict[str, tuple[Call, ...]],
    order: tuple[tuple[Action, ...], ...],
    info: dict[str, object],
) -> Program:
    used = {call.block for body in bodies.values() for call in body}
    blocks = {n: Block(n, ops) for n, ops in low.blocks.items() if n in used}
    return Program(
        low.parallel.mesh, blocks, low.buffers, bodies, order, tuple(range(len(order))), info
    )


def lower_pass(
    model: ModelSpec, parallel: ParallelStrategy, batch: Size, new: Size, cached: Size
) -> Program:
    """Return the program of one forward pass of generation: new rows over a key-value cache.

    ``new`` and ``cached`` may be arrays (one value per pass) when the program is only priced.
    """
    check_lowerable(model, int(np.max(new + cached)))
    if parallel.cp > 1:
        raise InputError(
            "generation does not split sequences in this version: set [parallel].cp to 1."
        )
    if model.compute_dtype not in DTYPE_BYTES:
        raise unknown("dtype", model.compute_dtype, DTYPE_BYTES)
    rows = Rows(batch // parallel.dp, new, cached, keep_cache=True)
    tp = TensorParallel(parallel.tp, False)
    plain = replace(parallel, zero_stage=0)
    low = _Lowering(model, plain, Sharding(0, "", 1), False, "fp32", "adam")
    _forward_blocks(low, tp, rows, 0)
    bodies, layers = _pipeline_bodies(low, rows.tokens * model.hidden)
    stages = len(layers)
    order = tuple(
        tuple(_with_communication([Action(stage, "F", 0)], stages)) for stage in range(stages)
    )
    if stages > 1:
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
    return _program(low, bodies, order, info)


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

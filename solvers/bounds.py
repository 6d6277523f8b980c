"""Lower bounds on a training step's time and memory, cheap enough for a whole lattice.

One layer, the embedding and the head are lowered and priced once per way to shard them; a stage is
so many of them. Time: every stream of a rank does all its work one piece after the other, and the
busiest stage waits for the first microbatch to come and for the last to go back (Narayanan et al.
2021, section 2.2). Memory: what stays for the whole step, and what the microbatches in flight keep
for their backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from hwmodels.cost import ClusterCost
from simcore.costs import transfer_seconds
from simcore.errors import InputError
from simcore.liveness import SHARES_STORAGE
from simcore.lower import lower_training
from simcore.lowering.units import layer_unit
from simcore.models import LINEAR, ModelSpec
from simcore.moe import EXPERTS, LAYER
from simcore.ops import COMPUTE, Op
from simcore.program import PERSISTENT, Call, Program
from simcore.strategy import ParallelStrategy, microbatches, stage_layers
from simcore.templates import HOST, Template, Workbench
from simcore.workloads import TrainStep

Streams = dict[str, float]  # seconds that pass on each stream
THREADS = (COMPUTE, HOST)
UNITS = ("embed", "layer", "head")
OWNERS = {"layer": ("layer", LAYER, EXPERTS, LINEAR)}  # whose weights a unit keeps
COMPUTING = (".F", ".R", ".B")  # ends of the blocks that data parallelism leaves as they are
CostOf = Callable[[ParallelStrategy], ClusterCost]


class Bounds(Protocol):
    """What the search asks before it prices a strategy exactly."""

    def memory_bytes(self, parallel: ParallelStrategy) -> float:
        """Return bytes that the worst rank needs at least."""
        ...

    def seconds(self, parallel: ParallelStrategy) -> float:
        """Return seconds that the strategy takes at least."""
        ...


@dataclass(frozen=True, slots=True)
class Backward:
    """Seconds of one layer's backward between what comes in, what goes out, and a thread.

    ``into``: from the gradient's arrival to the end of the thread's work; ``out``: from the
    thread's start to the gradient that is passed on; ``across``: from gradient to gradient.
    """

    into: Streams
    out: Streams
    across: float


@dataclass(frozen=True, slots=True)
class Units:
    """What the embedding, one layer and the head take: seconds per block, bytes per unit."""

    blocks: Mapping[str, Streams]
    backward: Backward
    resident_bytes: Mapping[str, float]
    saved_bytes: Mapping[str, float]
    boundary_bytes: float


@dataclass(frozen=True, slots=True)
class Sharded:
    """The part of `Units` that depends on data parallelism."""

    blocks: Mapping[str, Streams]
    resident_bytes: Mapping[str, float]


def lay_block(bench: Workbench, name: str) -> Streams:
    """Return the seconds that pass on each stream while a block runs."""
    return passing(bench.lay(bench.steps([Call(name, 0)]), (), ()))


def passing(template: Template) -> Streams:
    """Return, per stream, by how much later a body leaves it than it found it."""
    found = {}
    for entry, row in template.after:
        if isinstance(entry, str):
            delays = {template.inputs[i]: float(delay) for i, delay in template.rows[row]}
            found[entry] = delays.get(entry, 0.0)
    return found


def gradient_delays(bench: Workbench, program: Program) -> Backward:
    """Return how long a gradient takes through a layer."""
    inside, outside = program.key("d.h", 0, 0), program.key("d.h+", 0, 0)
    template = bench.lay(bench.steps([Call("layer.B", 0)]), (outside,), (inside,))
    delays = {
        entry: {template.inputs[i]: float(delay) for i, delay in template.rows[row]}
        for entry, row in template.after
    }
    return Backward(
        {thread: delays[thread].get(outside, 0.0) for thread in THREADS if thread in delays},
        {thread: delays[inside].get(thread, 0.0) for thread in THREADS},
        delays[inside].get(outside, 0.0),
    )


def total(parts: Iterable[tuple[float, Streams]]) -> Streams:
    """Return the sum of streams, each part so many times."""
    found: Streams = {}
    for times, part in parts:
        for stream, seconds in part.items():
            found[stream] = found.get(stream, 0.0) + times * seconds
    return found


def critical(streams: Streams) -> float:
    """Return the seconds of the thread that computes."""
    return max(streams.get(COMPUTE, 0.0), streams.get(HOST, 0.0))


def busiest(streams: Streams) -> float:
    """Return the seconds of the busiest stream."""
    return max(streams.values(), default=0.0)


# ---------------------------------------------------------------- bytes of a unit


def _root(program: Program, name: str) -> str:
    buffer = program.buffer(name)
    return buffer.base or name.removesuffix("+")


def _touched(ops: Iterable[Op]) -> set[str]:
    return {name for op in ops for name in (*op.reads, *op.writes) if not name.endswith("+")}


def resident_bytes(program: Program, unit: str) -> float:
    """Return what a unit keeps for the whole step: weights, gradients, optimizer states."""
    blocks = [block for name, block in program.blocks.items() if name.startswith(f"{unit}.")]
    names = {_root(program, name) for block in blocks for name in _touched(block.ops)}
    own = {name for name in names if name.split(".")[0] in OWNERS.get(unit, (unit,))}
    return sum(
        float(program.buffers[n].size_bytes) for n in own if program.buffers[n].scope in PERSISTENT
    )


def saved_bytes(program: Program, unit: str) -> float:
    """Return what a unit's forward leaves for its backward, storage that is shared once."""
    forward = program.blocks[f"{unit}.F"].ops
    storage: dict[str, str] = {}
    for op in forward:
        if op.kind in SHARES_STORAGE and op.writes:
            storage[op.writes[0]] = storage.get(op.reads[0], op.reads[0])
    later = _touched(program.blocks[f"{unit}.B"].ops) if f"{unit}.B" in program.blocks else set()
    kept = {storage.get(name, name) for name in _touched(forward) & later}
    found = (program.buffers[n] for n in kept if not n.endswith("+"))
    return sum(float(b.size_bytes) for b in found if b.scope == "act" and not b.base)


# ---------------------------------------------------------------- stages


@dataclass(frozen=True, slots=True)
class Stage:
    """Seconds of a stage's forward, backward, last backward and optimizer, by stream.

    ``drain_s``: from the last gradient's arrival until it is passed on (or, on the first stage,
    used); ``tail_s``: what the last backward still computes after it has passed its gradient on.
    """

    forward: Streams
    backward: Streams
    last: Streams
    optimizer: Streams
    drain_s: float
    tail_s: float


def make_stage(
    units: Units, layers: int, ends: tuple[bool, bool], parallel: ParallelStrategy
) -> Stage:
    """Return the stage of so many layers; ``ends``: whether it has the embedding and the head."""
    counts = {"embed": float(ends[0]), "layer": float(layers), "head": float(ends[1])}

    def of(*kinds: str) -> Streams:
        return total(
            (counts[unit], units.blocks.get(f"{unit}.{kind}", {}))
            for unit in UNITS
            for kind in kinds
        )

    again = units.blocks["layer.F"] if parallel.recompute == "full" else {}
    again = {} if parallel.recompute_layers else again  # a bound from below
    back = total([(1.0, of("unshard", "clear", "B")), (float(layers), again)])
    reduced = total([(1.0, back), (1.0, of("reduce"))])
    always = parallel.zero >= 2 and parallel.dp > 1
    tail = total(
        [
            (1.0, units.blocks["layer.B"]),
            (-1.0, units.backward.out),
            (1.0, units.blocks.get("layer.reduce", {})),
        ]
    )
    tail_s = max(tail.get(COMPUTE, 0.0), tail.get(HOST, 0.0), 0.0)
    return Stage(
        of("unshard", "F"),
        reduced if always else back,
        reduced,
        of("step"),
        _drain(units, layers, ends[0], again),
        tail_s,
    )


def _drain(units: Units, layers: int, first: bool, again: Streams) -> float:
    """Return the seconds of the last gradient through a stage, by its busiest thread."""
    blocks, through = units.blocks, units.backward
    before = total([(1.0, blocks.get("layer.clear", {})), (1.0, again)])
    each = total([(1.0, before), (1.0, blocks["layer.B"]), (1.0, blocks.get("layer.reduce", {}))])
    found = [0.0 if first else layers * through.across]
    for thread in THREADS:
        if thread not in through.into:
            continue
        start = through.into[thread] + blocks.get("layer.reduce", {}).get(thread, 0.0)
        if first:
            embedding = blocks.get("embed.B", {}).get(thread, 0.0)
            found.append(start + (layers - 1) * each.get(thread, 0.0) + embedding)
        elif layers > 1:
            last = before.get(thread, 0.0) + through.out[thread]
            found.append(start + (layers - 2) * each.get(thread, 0.0) + last)
    return max(found)


@dataclass(slots=True)
class TrainBounds:
    """Bounds of training steps; what strategies share is worked out once."""

    model: ModelSpec
    workload: TrainStep
    cost_of: CostOf
    units: dict[ParallelStrategy, Units] = field(default_factory=dict)
    computing: dict[ParallelStrategy, Units] = field(default_factory=dict)
    sharding: dict[ParallelStrategy, Sharded] = field(default_factory=dict)
    stages: dict[tuple[ParallelStrategy, int, tuple[bool, bool]], Stage] = field(
        default_factory=dict
    )
    hops: dict[tuple[ParallelStrategy, int], float] = field(default_factory=dict)

    def unit(self, parallel: ParallelStrategy) -> Units:
        """Return the units of a strategy, whatever its pipeline, schedule and recomputation."""
        plain = replace(parallel, recompute="none", recompute_layers=(), recompute_modules=())
        key = replace(plain, pp=1, schedule="1f1b", layers_per_stage=())
        if key not in self.units:
            self.units[key] = self._unit(key)
        return self.units[key]

    def _unit(self, key: ParallelStrategy) -> Units:
        """Return compute as without data parallelism, sharding as of the smallest microbatch."""
        alone = replace(key, dp_replicate=1, dp_shard=1, zero_stage=None)
        if alone not in self.computing:
            self.computing[alone] = self._compute(alone)
        even = self.workload.seq_len % key.tp == 0
        sharded = replace(key, microbatch=1) if even else key
        if sharded not in self.sharding:
            self.sharding[sharded] = self._shard(sharded)
        computing, sharding = self.computing[alone], self.sharding[sharded]
        return replace(
            computing,
            blocks={**computing.blocks, **sharding.blocks},
            resident_bytes=sharding.resident_bytes,
        )

    def _bench(self, parallel: ParallelStrategy) -> tuple[Program, Workbench]:
        """Return one layer with its embedding and head, and a bench to lay their blocks on.

        A layer of another kind goes by the name of a plain one: all layers are of one kind.
        """
        if {layer_unit(self.model, layer) for layer in range(self.model.layers)} > {LINEAR}:
            raise InputError(
                f"model {self.model.name!r} mixes linear and softmax layers, which the planner "
                "does not bound in this version: give the strategy in [parallel]."
            )
        model = replace(self.model, layers=1, mixers=self.model.mixers[:1])
        work = replace(self.workload, global_batch=parallel.dp * parallel.microbatch)
        program = lower_training(model, parallel, work)
        blocks = {
            f"layer.{what}" if unit in (LAYER, LINEAR) else name: block
            for name, block in program.blocks.items()
            for unit, _, what in [name.partition(".")]
        }
        program = replace(program, blocks=blocks)
        return program, Workbench(program, self.cost_of(parallel))

    def _compute(self, parallel: ParallelStrategy) -> Units:
        program, bench = self._bench(parallel)
        return Units(
            {name: lay_block(bench, name) for name in program.blocks if name.endswith(COMPUTING)},
            gradient_delays(bench, program),
            {},
            {unit: saved_bytes(program, unit) for unit in UNITS},
            float(program.buffers["h"].size_bytes),
        )

    def _shard(self, parallel: ParallelStrategy) -> Sharded:
        program, bench = self._bench(parallel)
        names = [name for name in program.blocks if not name.endswith(COMPUTING)]
        return Sharded(
            {name: lay_block(bench, name) for name in names},
            {unit: resident_bytes(program, unit) for unit in UNITS},
        )

    def memory_bytes(self, parallel: ParallelStrategy) -> float:
        """Return the larger need of the first and the last stage."""
        units, layers = self.unit(parallel), stage_layers(self.model, parallel)
        count, last = microbatches(parallel, self.workload), len(layers) - 1
        each = units.saved_bytes["layer"] if parallel.recompute == "none" else units.boundary_bytes
        found = []
        for stage in {0, last}:
            flying = count if parallel.schedule == "gpipe" else min(last + 1 - stage, count)
            need = layers[stage] * (units.resident_bytes["layer"] + flying * each)
            if stage == 0:
                need += units.resident_bytes["embed"]
            if stage == last:
                need += units.resident_bytes["head"] + units.saved_bytes["head"]
            found.append(need)
        return max(found)

    def _stage(self, parallel: ParallelStrategy, layers: int, ends: tuple[bool, bool]) -> Stage:
        key = replace(parallel, pp=1, schedule="1f1b", layers_per_stage=()), layers, ends
        if key not in self.stages:
            self.stages[key] = make_stage(self.unit(parallel), layers, ends, parallel)
        return self.stages[key]

    def _hop(self, parallel: ParallelStrategy) -> float:
        """Return the seconds of a message between neighbouring stages."""
        units = self.unit(parallel)
        plain = replace(parallel, recompute="none", recompute_layers=(), recompute_modules=())
        key = replace(plain, schedule="1f1b"), parallel.pp
        if key not in self.hops:
            cost = self.cost_of(parallel)
            self.hops[key] = transfer_seconds(
                cost, 0, parallel.world // parallel.pp, units.boundary_bytes
            )
        return self.hops[key]

    def seconds(self, parallel: ParallelStrategy) -> float:
        """Return the longest of the stages' paths: fill, work, drain, optimizer."""
        layers, count = stage_layers(self.model, parallel), microbatches(parallel, self.workload)
        last = len(layers) - 1
        hop = self._hop(parallel) if last else 0.0
        filled, drained, best, first = 0.0, 0.0, 0.0, 0.0
        for number, amount in enumerate(layers):
            stage = self._stage(parallel, amount, (number == 0, number == last))
            first = critical(stage.optimizer) if number == 0 else first
            best = max(best, filled + rank_seconds(stage, count, drained, first))
            filled += critical(stage.forward) + hop
            drained += stage.drain_s + hop
        return best


def rank_seconds(stage: Stage, count: int, drained: float, first: float) -> float:
    """Return the seconds from a rank's first forward to the end of the step.

    Either the rank's own optimizer ends it or that of the first stage, ``drained`` later.
    """
    before = total(
        [(count - 1.0, stage.forward), (count - 1.0, stage.backward), (1.0, stage.forward)]
    )
    whole = total([(1.0, before), (1.0, stage.last)])
    own = critical(stage.optimizer)
    return max(
        busiest(total([(1.0, whole), (1.0, stage.optimizer)])),
        critical(before) + busiest(stage.last) + own,
        critical(whole) - stage.tail_s + drained + first if drained else 0.0,
    )

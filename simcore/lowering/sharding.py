"""Flat buffers of weights and gradients: how ranks shard, sum and update them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from simcore.codecs import CodedSum, coded_sum
from simcore.models import ModelSpec
from simcore.moe import EXPERTS, LAYER, ExpertGrid
from simcore.ops import Buffer, Op, Size
from simcore.quorum import quorum_reduce
from simcore.strategy import ParallelStrategy
from simcore.streaming import Chunk

PARTS = {LAYER: (LAYER, EXPERTS)}  # units of which several flat buffers hold the weights
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
class Lowering:
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

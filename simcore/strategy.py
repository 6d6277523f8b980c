"""How work is laid over ranks: mesh degrees and the switches that change the program."""

from __future__ import annotations

import math
from dataclasses import dataclass

from simcore.errors import InputError, unknown
from simcore.models import LINEAR, ModelSpec, shared_width
from simcore.sequence import LAYOUTS, SequenceSplit
from simcore.workloads import TrainStep

# Outermost first: neighbouring ranks differ in tp, then cp, then dp, then pp (Megatron-LM's order).
MESH_AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
# cp_kind of networks with linear attention -> how its softmax layers get their keys and values,
# and its linear layers the state before their run of tokens (`simcore.linear`)
STATE_KINDS = {
    "lasp": ("keys", "scan"),
    "lasp2": ("gathered", "gather"),
    "zeco": ("gathered", "scan"),
}
DEFAULT_SLICES = 4


@dataclass(frozen=True, slots=True)
class ParallelStrategy:
    """Degrees of the device mesh and the options of the parallel strategy.

    World size = pp x dp_replicate x dp_shard x cp x tp.
    """

    dp_replicate: int = 1
    dp_shard: int = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int | None = None  # None: `default_etp`
    capacity_factor: float | None = None  # None: every row is kept where ep is 1, else 1.0
    microbatch: int = 1
    schedule: str = "1f1b"
    update_every: int = 0  # microbatches of an update, where weights change without a flush
    virtual_stages: int = 1
    layers_per_stage: tuple[int, ...] = ()
    zero_stage: int | None = None  # None: 3 where dp_shard > 1, else 0
    sequence_parallel: bool = False
    backup_workers: int = 0  # data ranks whose gradients a step does not wait for
    grad_codec: str = "none"  # how gradients are coded where data ranks sum them
    error_feedback: bool = False
    act_codec: str = "none"  # how activations and their gradients are coded between stages
    recompute: str = "none"  # or another of `simcore.recompute.POLICIES`
    recompute_modules: tuple[str, ...] = ()  # selective: what is computed again; (): attention
    recompute_layers: tuple[int, ...] = ()  # of every stage, or of each; (): all
    swap_fraction: float | None = None  # of tokens swapped to the host: `simcore.swapping`
    stream_chunks: int = 1  # chunks of a sequence that layers go through: `simcore.streaming`
    loss_chunks: int = 0  # chunks of rows that the loss goes through; 0: stream_chunks
    cp_kind: str = "ring"  # or another of `CP_KINDS`
    cp_layout: str = "zigzag"  # which rows a place on the ring holds
    cp_ring: int = 1  # usp: cp = cp_ring x cp_ulysses
    cp_ulysses: int = 1
    task_rows: int = 0  # servers: most query rows of a task; 0: an eighth of a rank's
    ping_pong: bool = False  # servers: halves of a microbatch take turns: `simcore.ping_pong`
    cp_window: int = 0  # double ring: ranks of an inner ring
    cp_slices: int = 0  # zeco: slices of a state; 0: DEFAULT_SLICES
    balance: str | None = None  # of unequal lengths: one of `simcore.balance.BALANCERS`

    @property
    def split(self) -> SequenceSplit:
        """How a sequence is split over the cp ranks."""
        if self.cp_kind in STATE_KINDS:
            travels, states = STATE_KINDS[self.cp_kind]
            slices = (self.cp_slices or DEFAULT_SLICES) if self.cp_kind == "zeco" else 1
            return SequenceSplit(self.cp, 1, "contiguous", travels, 0, states, slices)
        ring = {"ulysses": 1, "usp": self.cp_ring}.get(self.cp_kind, self.cp)
        travels = TRAVELS.get(self.cp_kind, "keys")
        layout = "contiguous" if travels in ("both", "nothing", "tasks") else self.cp_layout
        return SequenceSplit(ring, self.cp // ring, layout, travels, self.cp_window)

    @property
    def mesh(self) -> dict[str, int]:
        """Degrees by axis, outermost first; cp stands as two axes where it is used as two."""
        found: dict[str, int] = {}
        for axis in MESH_AXES:
            found |= self.split.axes if axis == "cp" else {axis: getattr(self, axis)}
        return found

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.pp * self.dp_replicate * self.dp_shard * self.cp * self.tp

    @property
    def dp(self) -> int:
        """Number of ranks that see different sequences."""
        return self.dp_replicate * self.dp_shard

    @property
    def zero(self) -> int:
        """The sharding stage in force."""
        if self.zero_stage is not None:
            return self.zero_stage
        return 3 if self.dp_shard > 1 else 0

    def coordinates(self, rank: int) -> dict[str, int]:
        """Return the rank's index along every mesh axis."""
        found: dict[str, int] = {}
        for axis in reversed(MESH_AXES):
            rank, found[axis] = divmod(rank, getattr(self, axis))
        return {axis: found[axis] for axis in MESH_AXES}


def microbatches(parallel: ParallelStrategy, workload: TrainStep) -> int:
    """Return the microbatches per replica and step: global_batch / (dp x microbatch)."""
    count, rest = divmod(workload.global_batch, parallel.dp * parallel.microbatch)
    if rest or count == 0:
        raise InputError(
            f"global_batch {workload.global_batch} is not a multiple of dp {parallel.dp} x "
            f"microbatch {parallel.microbatch}: change [workload].global_batch or "
            "[parallel].microbatch."
        )
    return count


def stage_layers(model: ModelSpec, parallel: ParallelStrategy) -> tuple[int, ...]:
    """Return the layers of every (virtual) stage, split as evenly as can be, earlier ones first."""
    stages = parallel.pp * parallel.virtual_stages
    if parallel.layers_per_stage:
        if (
            len(parallel.layers_per_stage) != stages
            or sum(parallel.layers_per_stage) != model.layers
        ):
            raise InputError(
                f"[parallel].layers_per_stage {list(parallel.layers_per_stage)} must list {stages} "
                f"stages that sum to the model's {model.layers} layers."
            )
        return parallel.layers_per_stage
    if stages > model.layers:
        raise InputError(
            f"pp {parallel.pp} x virtual_stages {parallel.virtual_stages} exceeds the model's "
            f"{model.layers} layers: lower [parallel].pp or virtual_stages."
        )
    each, extra = divmod(model.layers, stages)
    return tuple(each + (stage < extra) for stage in range(stages))


def default_etp(parallel: ParallelStrategy) -> int:
    """Return how many ranks split an expert: as dense layers, unless tp ranks have own tokens."""
    return 1 if parallel.sequence_parallel else parallel.tp


def check_experts(model: ModelSpec, parallel: ParallelStrategy) -> None:
    """Raise `InputError` where experts cannot be laid over the ranks."""
    if not model.experts:
        for key, default in (("ep", 1), ("etp", None), ("capacity_factor", None)):
            if getattr(parallel, key) not in (default, 1):
                raise InputError(
                    f"[parallel].{key} needs a mixture of experts, which model {model.name!r} is "
                    "not: drop the key."
                )
        return
    etp, ranks = default_etp(parallel), parallel.dp * parallel.cp * parallel.tp
    if parallel.etp not in (None, etp):
        raise InputError(
            f"[parallel].etp = {parallel.etp} is not available with tp {parallel.tp}: experts are "
            f"split over all tp ranks, or with sequence_parallel over none; set etp = {etp}."
        )
    if model.experts % parallel.ep:
        raise InputError(
            f"[parallel].ep = {parallel.ep} does not divide the model's {model.experts} experts: "
            f"ep = {math.gcd(model.experts, parallel.ep)} does."
        )
    if ranks % (parallel.ep * etp):
        raise InputError(
            f"[parallel].ep = {parallel.ep} x etp {etp} does not divide dp x cp x tp = {ranks}: "
            f"ep = {math.gcd(ranks // etp, parallel.ep)} does."
        )
    if model.moe_ffn % etp or shared_width(model) % parallel.tp:
        raise InputError(
            f"tp {parallel.tp} does not divide the width {model.moe_ffn} of an expert or "
            f"{shared_width(model)} of the shared ones: lower [parallel].tp."
        )


def check_strategy(model: ModelSpec, parallel: ParallelStrategy, world: int) -> None:
    """Raise `InputError` where the strategy cannot be laid over ``world`` ranks."""
    if parallel.world != world:
        degrees = " x ".join(f"{a} {getattr(parallel, a)}" for a in MESH_AXES)
        raise InputError(
            f"the mesh {degrees} = {parallel.world} ranks but the cluster has {world}: make "
            "[parallel] and [cluster] agree."
        )
    for what, size in (("heads", model.heads), ("ffn", model.ffn), ("vocab", model.vocab)):
        if what != "vocab" and size % parallel.tp:
            near = math.gcd(size, parallel.tp)
            raise InputError(
                f"tp {parallel.tp} does not divide the model's {what} {size}: "
                f"[parallel].tp = {near} does."
            )
    check_split(model, parallel)
    check_experts(model, parallel)
    stage_layers(model, parallel)


# Keys travel, queries do, either does, rows are traded for heads, for another axis of a grid, tasks
# are shipped; usp: ring and ulysses.
CP_KINDS = ("ring", "token_ring", "lightseq", "ulysses", "dsp", "servers", "usp", *STATE_KINDS)
TRAVELS = {  # else keys
    "token_ring": "queries",
    "lightseq": "both",
    "dsp": "nothing",
    "servers": "tasks",
}


def _check_states(model: ModelSpec, parallel: ParallelStrategy) -> None:
    """Raise `InputError` where states of linear attention cannot get from rank to rank so."""
    kind, linear = parallel.cp_kind, LINEAR in model.mixers
    if parallel.cp_slices and kind != "zeco":
        raise InputError(
            f"[parallel].cp_slices {parallel.cp_slices} needs cp_kind = 'zeco', not {kind!r}: "
            "leave it out, or change it."
        )
    if parallel.cp == 1:
        return
    if linear and kind not in STATE_KINDS:
        raise InputError(
            f"[parallel].cp_kind {kind!r} splits softmax attention, but model {model.name!r} has "
            f"linear layers: choose one of {', '.join(STATE_KINDS)}."
        )
    if kind in STATE_KINDS and not linear:
        raise InputError(
            f"[parallel].cp_kind {kind!r} hands on states of linear layers, which model "
            f"{model.name!r} has not: choose 'ring' or 'ulysses'."
        )
    if model.head_dim % parallel.split.slices:
        raise InputError(
            f"[parallel].cp_slices {parallel.split.slices} does not divide the model's head_dim "
            f"{model.head_dim}: cp_slices = {math.gcd(model.head_dim, parallel.split.slices)} does."
        )


def check_split(model: ModelSpec, parallel: ParallelStrategy, seq_len: int = 0) -> None:
    """Raise `InputError` where sequences (of ``seq_len`` tokens, if known) cannot be split so."""
    if parallel.cp_kind not in CP_KINDS:
        raise unknown("cp_kind", parallel.cp_kind, CP_KINDS)
    if parallel.cp_layout not in LAYOUTS:
        raise unknown("cp_layout", parallel.cp_layout, LAYOUTS)
    _check_states(model, parallel)
    ring, ulysses = parallel.cp_ring, parallel.cp_ulysses
    if parallel.cp_kind == "usp" and ring * ulysses != parallel.cp:
        raise InputError(
            f"[parallel].cp {parallel.cp} is not cp_ring {ring} x cp_ulysses {ulysses}: make them "
            "agree."
        )
    if parallel.cp_kind == "lightseq" and not model.causal:
        raise InputError(
            f"[parallel].cp_kind = 'lightseq' balances a causal mask, which model {model.name!r} "
            "has not: choose 'ring'."
        )
    split = parallel.split
    fits = ring in (1, split.ring) and ulysses in (1, split.ulysses)
    if parallel.cp_kind != "usp" and not fits:
        raise InputError(
            f"[parallel].cp_ring {ring} and cp_ulysses {ulysses} do not go with cp_kind "
            f"{parallel.cp_kind!r} and cp {parallel.cp}: leave them out, or set cp_kind = 'usp'."
        )
    window = parallel.cp_window
    if window and (parallel.cp_kind != "ring" or parallel.cp % window):
        raise InputError(
            f"[parallel].cp_window {window} needs cp_kind = 'ring' and a cp that it divides, not "
            f"{parallel.cp_kind!r} and {parallel.cp}: leave it out, or change them."
        )
    for what in ("heads", "kv_heads") if split.ulysses > 1 else ():
        each = -(-getattr(model, what) // parallel.tp)
        if each % split.ulysses:
            raise InputError(
                f"Ulysses over {split.ulysses} ranks does not divide the {each} {what} of a tensor "
                f"rank: {math.gcd(each, split.ulysses)} ranks do; use a ring for the others."
            )
    if split.degree > 1 and seq_len % split.unit:
        near = max(seq_len // split.unit, 1) * split.unit
        raise InputError(
            f"seq_len {seq_len} is not a multiple of {split.unit}, which cp {parallel.cp} needs "
            f"with layout {split.layout!r}: [workload].seq_len = {near} is."
        )

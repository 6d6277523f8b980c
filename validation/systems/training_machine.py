"""What checks of training systems share: predicted steps, real ranks, seconds of long sequences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

from hwmodels.collectives import GroupLayout, collective_seconds
from hwmodels.cost import ClusterCost
from hwmodels.families.family import matrix_peak
from hwmodels.hardware import Cluster
from simcore.accounting import step_totals
from simcore.catalogue import load_model
from simcore.estimate import estimate
from simcore.lower import lower_training
from simcore.metrics import Metrics, model_flops_per_token, train_metrics
from simcore.models import ModelSpec
from simcore.program import Program, coordinates
from simcore.strategy import ParallelStrategy
from simcore.workloads import TrainStep
from validation.systems.frame import need_torch
from validation.systems.training_cells import CELLS

if TYPE_CHECKING:
    from backends.launch import RunResult

RESERVE_SHARE = 0.1  # of a device's memory, left to the driver and to fragmentation


def gpt(name: str, layers: int, hidden: int, heads: int, ffn: int = 0) -> ModelSpec:
    """Return a GPT-like network with a vocabulary of 51200 (Megatron-LM's padding)."""
    width = hidden // heads
    return ModelSpec(
        name, layers, hidden, heads, heads, width, ffn or 4 * hidden, 51200,
        ffn_kind="mlp", activation="gelu_tanh", norm="layernorm", qkv_bias=True, out_bias=True,
        ffn_bias=True, position="learned", max_positions=2048, tied_embeddings=True,
    )  # fmt: skip


def step(
    model: ModelSpec, cluster: Cluster, parallel: ParallelStrategy, work: TrainStep
) -> Metrics:
    """Return the estimated metrics of a training step; kernels are issued ahead at no cost."""
    program = lower_training(model, parallel, work)
    cost = ClusterCost(cluster, program.mesh)
    return train_metrics(
        model,
        parallel,
        work,
        program,
        estimate(program, cost, cost),
        chip_peak_flops_per_s=matrix_peak(cluster.chip, model.compute_dtype),
        memory_bytes=cluster.chip.hbm.size_bytes,
        reserve_bytes=RESERVE_SHARE * cluster.chip.hbm.size_bytes,
    )


# ---------------------------------------------------------------- real ranks

SMALL = ModelSpec(
    "llama-like", 8, 16, 4, 2, 4, 24, 29,
    weights_dtype="fp32", compute_dtype="fp32", kv_dtype="fp32",
)  # fmt: skip
SMALL_MOE = replace(SMALL, name="moe-like", layers=2, experts=4, experts_per_token=2, moe_ffn=12)
SMALL_LINEAR = replace(
    SMALL, name="linear-like", layers=2, mixers=("linear",) * 2, linear_decay="retnet"
)
SMALL_GRID = replace(
    SMALL, name="grid-like", position="none", causal=False, frames=2, mixers=("space", "time") * 4
)
SMALL_STEP = TrainStep(global_batch=4, seq_len=8)
EVERY_ROW = SMALL_MOE.experts / SMALL_MOE.experts_per_token  # a capacity that drops none
PLANS: dict[str, tuple[ModelSpec, ParallelStrategy]] = {
    "tensor + pipeline": (SMALL, ParallelStrategy(tp=2, pp=2)),
    "tensor + sequence + ZeRO-3": (
        SMALL,
        ParallelStrategy(dp_shard=2, tp=2, sequence_parallel=True),
    ),
    "unequal pipeline + ZeRO-1 + recomputation": (
        SMALL,
        ParallelStrategy(pp=2, layers_per_stage=(3, 5), dp_shard=2, zero_stage=1, recompute="full"),
    ),
    "interleaved + tensor": (
        SMALL,
        ParallelStrategy(pp=2, virtual_stages=2, schedule="interleaved", tp=2),
    ),
    "breadth-first + ZeRO-3": (
        SMALL,
        ParallelStrategy(pp=2, virtual_stages=2, schedule="looped_bfs", dp_shard=2),
    ),
    "waves": (SMALL, ParallelStrategy(pp=4, virtual_stages=2, schedule="hanayo")),
    "opposite vees": (SMALL, ParallelStrategy(pp=4, virtual_stages=2, schedule="bitpipe")),
    "all-to-all + ZeRO-3": (SMALL, ParallelStrategy(cp=2, cp_kind="ulysses", dp_shard=2)),
    "all-to-all x ring": (
        SMALL,
        ParallelStrategy(cp=4, cp_kind="usp", cp_ring=2, cp_ulysses=2),
    ),
    "states by chain": (SMALL_LINEAR, ParallelStrategy(cp=4, cp_kind="lasp", zero_stage=3)),
    "states gathered": (SMALL_LINEAR, ParallelStrategy(cp=4, cp_kind="lasp2", zero_stage=1)),
    "states in slices": (SMALL_LINEAR, ParallelStrategy(cp=4, cp_kind="zeco", cp_slices=2)),
    "dynamic axes": (
        SMALL_GRID,
        ParallelStrategy(cp=2, cp_kind="dsp", dp_shard=2, zero_stage=1),
    ),
    "folded experts": (
        SMALL_MOE,
        ParallelStrategy(
            tp=2, dp_replicate=2, sequence_parallel=True, ep=4, capacity_factor=EVERY_ROW
        ),
    ),
}


@dataclass(frozen=True, slots=True)
class Ran:
    """Losses of two steps on four ranks against one rank's, FLOPs, and bytes sent.

    ``payload_bytes``: of the first rank, by (kind, group); ``as_predicted``: whether every rank's
    FLOPs and bytes are those of its program.
    """

    error: float  # largest difference of a loss, over it
    flops: tuple[float, ...]  # per rank
    dense_flops: float  # of one rank that does all
    payload_bytes: Mapping[tuple[str, str], float]
    as_predicted: bool


FLOAT64_OVER_FLOAT32 = 2.0  # the programs say fp32, the ranks compute and send in fp64


def _as_predicted(program: Program, found: RunResult) -> bool:
    """Whether torch's FLOPs and bytes on every rank are the program's."""
    for number, rank in enumerate(found.ranks):
        told = step_totals(program, coordinates(program.mesh, number)["pp"], number)
        payload = {k: FLOAT64_OVER_FLOAT32 * size for k, size in told.payload_bytes.items()}
        if rank.flops != told.flops or dict(rank.payload_bytes) != payload:
            return False
    return True


@cache
def on_four_ranks() -> dict[str, Ran]:
    """Run all of `PLANS` and `CELLS` on four gloo ranks, and one rank alone, in two launches."""
    need_torch()
    from backends.launch import Job, RunOptions, run_many

    options = RunOptions(
        5, repeats=1, warmup=1, dtype="fp64", dump=("losses",), count_flops=True, timeout_s=120
    )
    plans = {name: (model, plan, SMALL_STEP) for name, (model, plan) in PLANS.items()}
    plans |= {name: (cell.model, cell.parallel, cell.work) for name, cell in CELLS.items()}
    bare = {(m.name, w): lower_training(m, ParallelStrategy(), w) for m, _, w in plans.values()}
    alone = run_many([Job(program, options) for program in bare.values()])
    wanted = dict(zip(bare, alone, strict=True))
    programs = {name: lower_training(*plan) for name, plan in plans.items()}
    ran = run_many([Job(program, options) for program in programs.values()])
    found = {}
    for (name, program), run in zip(programs.items(), ran, strict=True):
        model, _, work = plans[name]
        one = wanted[model.name, work]
        found[name] = Ran(
            max(abs(a / b - 1) for a, b in zip(run.losses, one.losses, strict=True)),
            tuple(float(rank.flops or 0) for rank in run.ranks),
            float(one.ranks[0].flops or 0),
            run.ranks[0].payload_bytes,
            _as_predicted(program, run),
        )
    return found


EXACT = 1e-9  # relative difference of losses in float64 after two steps
ON_RANKS = (
    "executed on four gloo ranks in float64: losses of two steps against one rank's, FLOPs and "
    "bytes against the program's"
)


def exact(*plans: str, loss_scale: float = 1.0) -> tuple[bool, float]:
    """Return whether the executed plans equal one rank, and the largest difference of a loss."""
    found = [on_four_ranks()[name] for name in plans]
    worst = max(ran.error for ran in found) + abs(loss_scale - 1)
    return worst < EXACT and all(ran.as_predicted for ran in found), worst


MEMORY_PLANS = {
    "streamed": ParallelStrategy(stream_chunks=4),
    "swapped": ParallelStrategy(swap_fraction=0.5),
}


@cache
def exact_on_one_rank() -> dict[str, float]:
    """Run `MEMORY_PLANS` and a plain step in float64; return how far their gradients are apart.

    The largest difference over the largest gradient.
    """
    need_torch()
    from backends.launch import Job, RunOptions, run_many

    options = RunOptions(
        5, repeats=1, warmup=1, dtype="fp64", dump=("losses", "gradients"), timeout_s=60
    )
    plans = [ParallelStrategy(), *MEMORY_PLANS.values()]
    jobs = [Job(lower_training(SMALL, plan, SMALL_STEP), options) for plan in plans]
    plain, *others = (found.ranks[0].arrays for found in run_many(jobs))
    size = max(float(abs(gradient).max()) for gradient in plain.values())
    return {
        name: max(float(abs(found[key] - plain[key]).max()) for key in plain) / size
        for name, found in zip(MEMORY_PLANS, others, strict=True)
    }


# ---------------------------------------------------------------- long sequences


@dataclass(frozen=True, slots=True)
class LayerSeconds:
    """Seconds of one layer's forward and backward on a whole sequence, by what computes."""

    attention_forward: float
    attention_backward: float
    linear_forward: float
    linear_backward: float
    head: float  # embedding, output and loss, both passes

    @property
    def both(self) -> float:
        """Forward and backward of a layer."""
        return (
            self.attention_forward
            + self.attention_backward
            + self.linear_forward
            + self.linear_backward
        )


@cache
def layer_seconds(name: str, chip: str, seq_len: int) -> LayerSeconds:
    """Return what a model's kernels take on one chip for one sequence, by their curves."""
    from hwmodels.catalogue import make_cluster

    model = load_model(name)
    program = lower_training(model, ParallelStrategy(), TrainStep(1, seq_len))
    cost = ClusterCost(make_cluster(chip, 1), program.mesh)
    found = dict.fromkeys(("af", "ab", "lf", "lb", "head"), 0.0)
    for block in program.blocks.values():
        for op in block.ops:
            part = "a" if op.kind.startswith("attention") else "l"
            if block.name in ("layer.F", "layer.B"):
                found[part + block.name[-1].lower()] += float(cost.seconds(op))
            elif block.name in ("head.F", "head.B", "embed.F", "embed.B"):
                found["head"] += float(cost.seconds(op))
    return LayerSeconds(*found.values())


def exchange_seconds(op: str, size_bytes: float, ranks: int, cluster: Cluster) -> float:
    """Return the seconds of a collective over the first ``ranks`` ranks of a cluster."""
    if ranks <= 1 or not size_bytes:
        return 0.0
    here = min(ranks, cluster.gpus_per_node)
    layout = GroupLayout(ranks, here, cluster.scale_up, cluster.scale_out)
    return float(collective_seconds(op, size_bytes, layout))


def utilisation(
    name: str, tokens: float, seq_len: int, seconds: float, ranks: int, peak: float, *, causal: bool
) -> float:
    """Return model FLOPs over what ``ranks`` could have done in ``seconds``."""
    each = model_flops_per_token(load_model(name), seq_len, causal=causal)
    return tokens * each / (seconds * ranks * peak)


def with_link(cluster: Cluster, share: float) -> Cluster:
    """Return the cluster with its links inside a node at a share of their bandwidth."""
    link = cluster.scale_up
    peer = link.peer_bytes_per_s
    slower = replace(
        link,
        bytes_per_s=link.bytes_per_s * share,
        peer_bytes_per_s=None if peer is None else peer * share,
    )
    return replace(cluster, scale_up=slower)

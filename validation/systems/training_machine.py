"""What checks of training systems share: predicted steps, real ranks, seconds of long sequences."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

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
from simcore.program import coordinates
from simcore.strategy import ParallelStrategy
from simcore.workloads import TrainStep
from validation.systems.frame import need_torch

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
    "llama-like", 4, 16, 4, 2, 4, 24, 29,
    weights_dtype="fp32", compute_dtype="fp32", kv_dtype="fp32",
)  # fmt: skip
SMALL_STEP = TrainStep(global_batch=8, seq_len=8)
PLANS = {
    "tensor + pipeline": ParallelStrategy(tp=2, pp=2),
    "tensor + sequence + ZeRO-3": ParallelStrategy(dp_shard=2, tp=2, sequence_parallel=True),
    "unequal pipeline + ZeRO-1 + recomputation": ParallelStrategy(
        pp=2, layers_per_stage=(1, 3), dp_shard=2, zero_stage=1, recompute="full"
    ),
    "HSDP": ParallelStrategy(dp_replicate=2, dp_shard=2),
}


@dataclass(frozen=True, slots=True)
class Ran:
    """Losses of three steps on four ranks against one rank's, executed and predicted FLOPs."""

    error: float  # largest difference of a loss, over it
    flops: tuple[float, ...]  # per rank
    predicted_flops: tuple[float, ...]
    dense_flops: float  # of one rank that does all


@cache
def on_four_ranks() -> dict[str, Ran]:
    """Run every plan of `PLANS` on four gloo ranks, and one rank alone, in two launches."""
    need_torch()
    from backends.launch import Job, RunOptions, run_many

    options = RunOptions(
        5, repeats=2, warmup=1, dtype="fp64", dump=("losses",), count_flops=True, timeout_s=60
    )
    (one,) = run_many([Job(lower_training(SMALL, ParallelStrategy(), SMALL_STEP), options)])
    programs = {name: lower_training(SMALL, plan, SMALL_STEP) for name, plan in PLANS.items()}
    ran = run_many([Job(program, options) for program in programs.values()])
    return {
        name: Ran(
            max(abs(a / b - 1) for a, b in zip(found.losses, one.losses, strict=True)),
            tuple(float(rank.flops or 0) for rank in found.ranks),
            tuple(
                step_totals(program, coordinates(program.mesh, rank)["pp"]).flops
                for rank in range(program.world)
            ),
            float(one.ranks[0].flops or 0),
        )
        for (name, program), found in zip(programs.items(), ran, strict=True)
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

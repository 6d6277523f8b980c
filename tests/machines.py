"""Small networks and made-up machines that several test files share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hwmodels.catalogue import load_chip, load_link
from hwmodels.cost import ClusterCost
from hwmodels.hardware import Cluster
from simcore.models import ModelSpec
from simcore.ops import Op
from simcore.program import Program
from simcore.strategy import ParallelStrategy

LLAMA = ModelSpec(
    "small-llama", layers=4, hidden=256, heads=4, kv_heads=2, head_dim=64, ffn=512, vocab=1024
)
GPT2 = ModelSpec(
    "small-gpt2",
    layers=4,
    hidden=256,
    heads=4,
    kv_heads=4,
    head_dim=64,
    ffn=1024,
    vocab=1000,
    ffn_kind="mlp",
    activation="gelu",
    norm="layernorm",
    qkv_bias=True,
    out_bias=True,
    ffn_bias=True,
    position="learned",
    max_positions=512,
    tied_embeddings=True,
)

STRATEGIES: dict[str, dict[str, Any]] = {
    "one": {},
    "dp": {"dp_replicate": 2},
    "zero1": {"dp_shard": 2, "zero_stage": 1},
    "zero2": {"dp_shard": 2, "zero_stage": 2},
    "zero3": {"dp_shard": 2, "zero_stage": 3},
    "hsdp": {"dp_replicate": 2, "dp_shard": 2},
    "tp": {"tp": 2},
    "tp+sp": {"tp": 2, "sequence_parallel": True},
    "pp": {"pp": 2},
    "pp4": {"pp": 4},
    "pp+recompute": {"pp": 2, "recompute": "full"},
    "dp x tp": {"dp_replicate": 2, "tp": 2},
    "zero2 x pp": {"dp_shard": 2, "zero_stage": 2, "pp": 2},
    "zero3 x tp+sp x pp": {"dp_shard": 2, "tp": 2, "pp": 2, "sequence_parallel": True},
    "zero1 x tp+sp x pp": {
        "dp_replicate": 2,
        "zero_stage": 1,
        "tp": 2,
        "pp": 2,
        "sequence_parallel": True,
    },
}


def cluster(
    world: int,
    *,
    speed: float = 1.0,
    bandwidth: float = 1.0,
    latency: float = 1.0,
    per_node: int = 4,
    nics: int = 0,
) -> Cluster:
    """Return a cluster slow enough that a small model's compute and communication both count."""
    chip = load_chip("h100-sxm-80gb")
    peaks = {dtype: peak * speed / 100 for dtype, peak in chip.peak_flops_per_s.items()}
    chip = replace(chip, peak_flops_per_s=peaks, vector_flops_per_s=chip.vector_flops_per_s * speed)
    up, out = (
        replace(
            link, bytes_per_s=link.bytes_per_s * bandwidth / 10, latency_s=link.latency_s * latency
        )
        for link in (load_link("nvlink4"), load_link("ib-ndr-400"))
    )
    ranks = min(world, per_node)
    return Cluster(
        "made-up",
        chip,
        ranks,
        -(-world // ranks),
        up,
        replace(out, nics_per_node=nics).shared(ranks),
    )


def cluster_cost(program: Program, **options: Any) -> ClusterCost:
    """Return the cost model of a made-up cluster of the program's size."""
    return ClusterCost(cluster(program.world, **options), program.mesh)


def strategy(name: str, **options: Any) -> ParallelStrategy:
    """Return the strategy of that name, with further options."""
    return ParallelStrategy(**{**STRATEGIES[name], **options})


@dataclass(frozen=True)
class Constant:
    """Every kind takes so many seconds, others none."""

    seconds_of: Mapping[str, float] = field(default_factory=dict)
    synchronous: bool = False
    issue_s: float = 0.0
    blocking: float = 0.0
    beside: float = 1.0  # slowdown of compute while a collective runs

    def seconds(self, op: Op) -> float:
        return self.seconds_of.get(op.kind, 0.0)

    def issue_seconds(self, op: Op) -> float:
        return self.issue_s if op.kind in ("send", "recv") else 0.0

    def blocking_share(self, op: Op) -> float:
        return self.blocking

    def slowdown(self, op: Op, beside: Op) -> float:
        return self.beside

    def pass_overhead_seconds(self, sequences: float) -> float:
        return 0.0


@dataclass(frozen=True)
class Wires:
    """A network with a wire of its own from every rank to every other: nothing contends."""

    latency_s: float = 0.0
    bytes_per_s: float = float("inf")

    def path(self, src: int, dst: int) -> Sequence[int]:
        return () if src == dst else (src * 10_000 + dst,)

    def latency(self, path: Sequence[int]) -> float:
        return self.latency_s

    def rates(self, paths: Sequence[Sequence[int]]) -> Sequence[float]:
        return [self.bytes_per_s] * len(paths)


@dataclass(frozen=True)
class Bus:
    """A network that is one link, shared fairly."""

    latency_s: float = 0.0
    bytes_per_s: float = 1.0

    def path(self, src: int, dst: int) -> Sequence[int]:
        return () if src == dst else (0,)

    def latency(self, path: Sequence[int]) -> float:
        return self.latency_s

    def rates(self, paths: Sequence[Sequence[int]]) -> Sequence[float]:
        return [self.bytes_per_s / len(paths)] * len(paths)

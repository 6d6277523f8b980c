"""Sequence parallelism of softmax attention: volumes and times of lowered programs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from hwmodels.catalogue import load_cluster
from hwmodels.cost import ClusterCost
from simcore.catalogue import load_model
from simcore.errors import InputError
from simcore.estimate import estimate
from simcore.lower import lower_training
from simcore.models import ModelSpec
from simcore.ops import work
from simcore.program import Program
from simcore.sequence import SequenceSplit, lightseq_bytes, ulysses_bytes
from simcore.strategy import ParallelStrategy
from simcore.workloads import TrainStep
from validation.systems.frame import Finding, check


def _lowered(model: ModelSpec, length: int, **parallel: object) -> Program:
    strategy = ParallelStrategy(**parallel)  # type: ignore[arg-type]
    return lower_training(model, strategy, TrainStep(strategy.dp, length))


def _payload(program: Program, kinds: tuple[str, ...], block: str) -> float:
    ops = program.blocks[block].ops
    return sum(float(work(op).payload_bytes) for op in ops if op.kind in kinds)


@check("G3.2", mutant={"length_growth": 1})
def ulysses_volume(
    *, model: str = "gpt2-xl", tokens: int = 2560, length_growth: int = 2
) -> Finding:
    """Bytes per rank stay when length and ranks double together; ranks beyond heads are refused.

    The model lends its width; its heads are set to 16.
    """
    network = replace(load_model(model), heads=16, kv_heads=16, position="rope", layers=1)
    found, length = [], tokens
    for ranks in (2, 4, 8, 16):
        program = _lowered(network, length, cp=ranks, cp_kind="ulysses")
        found.append(_payload(program, ("all_to_all",), "layer.F"))
        length *= length_growth
    try:
        _lowered(network, tokens, cp=32, cp_kind="ulysses")
        refused = False
    except InputError:
        refused = True
    return Finding(
        len(set(found)) == 1 and refused,
        f"{found[0] / 1e6:.2f} MB per rank and layer at 2 to 16 ranks; 32 of 16 heads refused",
        "each rank exchanges its own rows, whose number is length / ranks",
        ("the payload of the lowered program's all-to-alls",),
    )


@check("D40", mutant={"exchanges": 3})
def ulysses_exchanges(*, exchanges: int = 4, tokens: float = 8192, width: float = 4096) -> Finding:
    """Four exchanges of S h e / P bytes per layer pass: queries, keys, values, outputs."""
    size = 2
    found = [
        ulysses_bytes(SequenceSplit(1, n), tokens * n, width, width, size) for n in (1, 2, 4, 8)
    ]
    each = tokens * width * size
    return Finding(
        found[1:] == [exchanges * each] * 3 and found[0] == 0.0,
        f"{found[1] / each:.0f} S h e / P at 2, 4 and 8 ranks, S / P fixed",
        "the all-to-all of queries, keys and values together is three of the four",
    )


@check("D41", mutant={"regathered": 0})
def lightseq_volume(*, places: int = 4096, regathered: int = 2, published: float = 4.7) -> Finding:
    """Megatron-LM's collectives of one layer against what LightSeq fetches and sends.

    Megatron with sequence parallelism: four collectives in forward, four again when it is
    recomputed, four in backward, and ``regathered`` inputs gathered anew for weight gradients.
    """
    tokens, width = 32768.0, 4096.0
    unit = tokens * width
    megatron = (4 + 4 + 4 + regathered) * unit
    lightseq = sum(lightseq_bytes(tokens, width, 1.0, places))
    ratio = megatron / lightseq
    return Finding(
        abs(ratio / published - 1) < 0.01,
        f"{megatron / unit:.0f} S h over {lightseq / unit:.2f} S h: {ratio:.2f}",
        "a causal mask needs half of all keys and values, twice, and their gradients once",
        ("many places on the ring", "Megatron gathers two inputs again in backward"),
    )


@check("G3.4", mutant={"links": "switch"})
def two_ways_of_a_ring(*, links: str = "mesh", length: int = 16384, ranks: int = 8) -> Finding:
    """A ring of queries against one of keys and values over links with wires each way.

    With as many KV heads as heads it is never slower, and equally fast where compute hides all;
    with grouped KV heads it may lose. The links are an H100 node's, slowed to show both ends.
    """
    node = load_cluster("dgx-h100")
    many = replace(load_model("llama-2-7b"), layers=2)
    few = replace(many, kv_heads=4)
    ratio: dict[tuple[str, float], float] = {}
    for name, network in (("many", many), ("few", few)):
        for slower in (1.0, 200.0):
            up = replace(node.scale_up, kind=links, bytes_per_s=node.scale_up.bytes_per_s / slower)
            cluster = replace(node, scale_up=up)
            seconds = []
            for kind in ("token_ring", "ring"):
                program = _lowered(network, length, cp=ranks, cp_kind=kind)
                cost = ClusterCost(cluster, program.mesh)
                seconds.append(estimate(program, cost, cost).step_s)
            ratio[name, slower] = seconds[0] / seconds[1]
    holds = (
        ratio["many", 200.0] < 1
        and abs(ratio["many", 1.0] - 1) < 0.05
        and ratio["few", 200.0] > 1
        and bool(np.all(np.isfinite(list(ratio.values()))))
    )
    text = ", ".join(f"{k[0]} KV heads, links 1/{k[1]:.0f}: {v:.3f}" for k, v in ratio.items())
    return Finding(
        holds,
        f"seconds over a one-way ring's: {text}",
        "queries and outputs leave by different wires; grouped keys and values are smaller",
        ("8 ranks, 16384 tokens, zigzag, a training step", "equally fast: within 5 %"),
    )

"""Checks of sequence parallelism of softmax attention: rings, all-to-alls, meshes, axes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from hwmodels.catalogue import load_chip, load_link, make_cluster
from hwmodels.families.family import matrix_peak
from simcore.accounting import block_totals
from simcore.axes import axis_plan
from simcore.catalogue import load_model
from simcore.lightseq import lightseq_bytes
from simcore.lower import lower_training
from simcore.sequence import SequenceSplit, ring_bytes
from simcore.strategy import ParallelStrategy
from simcore.workloads import TrainStep
from validation.systems.frame import Finding, check
from validation.systems.training_machine import (
    ON_RANKS,
    SMALL_GRID,
    exact,
    exchange_seconds,
    layer_seconds,
)

# ------------------------------------------------------------------ G3.1


def bert_bytes(batch: float, tokens: float, layers: int, width: int, heads: int, ranks: float,
               how: str) -> float:  # fmt: skip
    """Return a rank's bytes of a BERT in single precision with Adam, by Korthikanti's counting.

    Per token and layer: 18 h bytes that tensor parallelism replicates, 48 h that it divides, and
    9 bytes per score. Sequence parallelism divides all, and replicates the weights.
    """
    params = layers * 12 * width**2 + 30522 * width
    scores = 9 * heads * tokens
    if how == "sequence":
        return 16 * params + batch * tokens * layers * (66 * width + scores) / ranks
    return 16 * params / ranks + batch * tokens * layers * (
        18 * width + (48 * width + scores) / ranks
    )


Bert = tuple[int, int, int]  # layers, width, heads


def largest(fits: Callable[[float], bool], start: float = 1.0) -> float:
    """Return the largest value that fits, by doubling and bisection."""
    if not fits(start):
        return 0.0
    low, high = start, 2 * start
    while fits(high):
        low, high = high, 2 * high
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


@check("G3.1", mutant={"replicated_scores": 64.0})
def ring_sequence_parallelism(*, ranks: int = 64, replicated_scores: float = 1.0) -> Finding:
    """Largest batch and length of sequence over tensor parallelism on 64 P100, and ring outputs.

    ``replicated_scores``: by how much the sequence ranks' activations are multiplied.
    """
    same, error = exact("full ring contiguous 16/4")
    memory = 0.9 * load_chip("p100").hbm.size_bytes
    batches, lengths = [], []
    for shape in ((12, 768, 12), (24, 1024, 16)):
        degrees = {"sequence": ranks / replicated_scores, "tensor": float(shape[2])}

        def fits(batch: float, tokens: float, how: str, shape: Bert, degree: float) -> bool:
            return bert_bytes(batch, tokens, *shape, degree, how) <= memory

        def room(tokens: float | None, shape: Bert, degrees: dict[str, float]) -> float:
            """Return sequence over tensor: batch at ``tokens``, or length at batch 64."""
            found = [
                largest(
                    lambda x, how=how, d=d: (  # type: ignore[misc]
                        fits(64, x, how, shape, d)
                        if tokens is None
                        else fits(x, tokens, how, shape, d)
                    )
                )
                for how, d in degrees.items()
            ]
            return found[0] / found[1] if found[1] else math.inf

        batches += [room(t, shape, degrees) for t in (128, 256, 512, 1024)]
        lengths.append(room(None, shape, degrees))
    return Finding(
        same
        and max(batches) >= 13.7
        and max(lengths) >= 3.0,
        f"batch {min(batches):.1f}x to {max(batches):.1f}x, length {min(lengths):.1f}x to "
        f"{max(lengths):.1f}x; losses differ by {error:.1e}",
        "tensor ranks are at most the heads and replicate norms and residuals; sequence ranks split"
        " everything but the weights",
        ("BERT-base and -large, batch at 128 to 1024 tokens, length at batch 64", "tensor degree = "
         "heads", "single precision, Adam, 10 % of memory in reserve", ON_RANKS),
        "cpu",
    )  # fmt: skip


# ------------------------------------------------------------------ G3.4, G3.5


def token_ring_step(ranks: int, kv_share: float, rate: float, flops_per_s: float,
                    tokens: int = 65536, width: int = 4096) -> dict[str, float]:  # fmt: skip
    """Return a step's seconds: compute, one-way ring, and both directions of TokenRing."""
    shard = tokens / ranks
    compute = 4 * shard**2 * width / flops_per_s
    wide = shard * width * 2 / rate
    return {
        "compute": compute,
        "ring": max(compute, 2 * wide * kv_share),
        "duplex": max(compute, wide),  # queries one way, outputs the other
        "bytes": 2 * wide,
    }


@check("G3.4", mutant={"duplex_share": 0.4})
def token_ring(*, duplex_share: float = 1.0) -> Finding:
    """Queries and outputs both ways against keys one way: equal heads, and shared ones.

    ``duplex_share``: of the rate that each direction keeps while both are used.
    """
    same, error = exact("causal token_ring zigzag 16/4")
    found, order, law = {}, True, True
    flops = 0.5 * matrix_peak(load_chip("a100-sxm-80gb"), "bf16")
    for link in ("nvlink3", "pcie4x16", "ib-hdr-200"):
        rate = load_link(link).bytes_per_s
        crossing, before = 0, None
        for ranks in (2, 4, 8, 16, 32, 64, 128):
            here = token_ring_step(ranks, 1.0, rate, flops)
            here["duplex"] = max(here["compute"], here["bytes"] / 2 / duplex_share)
            order &= here["duplex"] <= here["ring"]
            if here["bytes"] < here["compute"]:
                order &= here["duplex"] == here["ring"]
            elif not crossing:
                crossing = ranks
            if before is not None:
                law &= math.isclose(before["compute"] / here["compute"], 4)
                law &= math.isclose(before["bytes"] / here["bytes"], 2)
            before = here
        found[link] = crossing
    shared = token_ring_step(128, 1 / 8, load_link("ib-hdr-200").bytes_per_s, flops)
    loses = shared["duplex"] > shared["ring"]
    return Finding(
        same and order and law and loses,
        "one-way ring exposed from "
        + ", ".join(f"P = {p or '>128'} on {name}" for name, p in found.items())
        + f"; with 8 queries per key TokenRing takes {shared['duplex'] / shared['ring']:.1f}x; "
        f"losses differ by {error:.1e}",
        "both directions at once carry queries and outputs; shared keys are fewer bytes"
        if order
        else "two directions that share the link's rate lose",
        ("65536 tokens of width 4096 on A100 at half of its peak", ON_RANKS),
        "cpu",
    )


@check("G3.5", mutant={"gathers_per_layer": 7.0})
def lightseq(*, gathers_per_layer: float = 14.0) -> Finding:
    """Volumes per layer counted on the ranks, and the step's speedup over Megatron-LM.

    ``gathers_per_layer`` of Megatron-LM with full recomputation, in S h elements: 4 forward, 4
    again, 4 backward and 2 gathers of the inputs for weight gradients.
    """
    ranks, model = 8, load_model("llama-2-7b")
    same, error = exact("causal lightseq 16/4")
    width = model.heads * model.head_dim
    sent = lightseq_bytes(SequenceSplit(ranks), 1, (width, width), model.heads, 2)
    volume = sum(sent) / (2 * width) / ((ranks - 1) / ranks)  # in S h
    speedups = []
    cluster = make_cluster("a100-sxm-80gb", 8, 2)
    for length in (32768, 65536, 131072, 262144, 524288):
        found = layer_seconds("llama-2-7b", "a100-sxm-80gb", length)
        compute = found.both / 16
        again = (found.attention_forward + found.linear_forward) / 16
        whole = length * 4096 * 2
        gather = exchange_seconds("all_gather", whole, 16, cluster)
        theirs = compute + again + gathers_per_layer * gather
        hidden = 3 * whole / 2 / cluster.scale_out.bytes_per_s / 16 * 2
        mine = max(compute, hidden) + found.linear_forward / 16
        speedups.append(theirs / mine)
    ratio = gathers_per_layer / volume
    inside = min(speedups) >= 1.24 and max(speedups) < 2.015
    return Finding(
        same and abs(ratio - 4.7) < 0.05 and inside,
        f"{gathers_per_layer:g} S h against {volume:.2f}: {ratio:.2f}x; faster by "
        f"{', '.join(f'{s:.3f}' for s in speedups)} at 32K to 512K; losses differ by {error:.1e}",
        "a causal rank fetches only earlier keys; saved outputs spare the recomputed attention"
        if inside
        else "a speedup leaves the published range: Megatron-LM's overlap is not modelled",
        ("Llama-2-7B on 2 nodes of 8 A100, volumes per rank over (P-1)/P", ON_RANKS),
        "cpu",
    )  # fmt: skip


# ------------------------------------------------------------------ G3.6


@check("G3.6", mutant={"switches_per_pair": 4})
def dynamic_axes(*, switches_per_pair: int = 2) -> Finding:
    """Switching the sharded axis of a spatio-temporal network: outputs, bytes and plans."""
    ranks, tokens = 4, 64
    same, error = exact("dynamic axes")
    model = replace(SMALL_GRID, frames=8, kv_heads=SMALL_GRID.heads)
    sent = {}
    for kind in ("dsp", "ulysses"):
        parallel = ParallelStrategy(cp=ranks, cp_kind=kind)
        blocks = block_totals(lower_training(model, parallel, TrainStep(1, tokens)))
        names = ("to_time.F", "to_space.F") if kind == "dsp" else ("space.F", "time.F")
        found = (blocks[name].payload_bytes["all_to_all", "cp"] for name in names)
        sent[kind] = sum(found) * (ranks - 1) / ranks
    size, width = 4, model.heads * model.head_dim
    mine = sent["dsp"] * switches_per_pair / 2
    gathered = tokens * model.hidden * size * (ranks - 1) / ranks
    ratios = {
        "Ulysses": mine / sent["ulysses"],
        "ring": mine / (2 * ring_bytes(SequenceSplit(ranks), tokens, width, size)),
        "Megatron-LM": mine / (2 * 4 * gathered),
    }
    random = np.random.default_rng(6)
    plans = True
    for _ in range(30):
        needs = [{int(a)} for a in random.integers(0, 3, 6)]
        brute = min(
            (
                sum(a != b for a, b in itertools.pairwise(path))
                for path in itertools.product(range(3), repeat=6)
                if all(a not in used for a, used in zip(path, needs, strict=True))
            ),
        )
        free = [[str(a) for a in range(3) if a not in used] for used in needs]
        path = axis_plan(free, lambda i, a, b: 1.0)
        plans &= sum(a != b for a, b in itertools.pairwise(path)) == brute
    return Finding(
        same and plans and max(ratios.values()) <= 0.25,
        ", ".join(f"{r:.3f} of {name}" for name, r in ratios.items())
        + f"'s volume; losses differ by {error:.1e}",
        "two all-to-alls per spatial and temporal pair; embedded methods exchange inside each"
        " attention",
        ("4 ranks", "an embedded all-to-all exchanges q, k, v and the output in both attentions",
         ON_RANKS),
        "cpu",
    )  # fmt: skip

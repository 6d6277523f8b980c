"""Check of mixtures of experts whose attention and expert layers have grids of their own."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache

from hwmodels.catalogue import load_cluster
from simcore.catalogue import load_model
from simcore.errors import InputError
from simcore.strategy import ParallelStrategy
from simcore.workloads import TrainStep
from validation.systems.frame import Finding, check
from validation.systems.training_machine import ON_RANKS, exact, step

# Runs of Liu et al. 2025 (arXiv 2504.14960), table 3, as repeated by a public validation of another
# simulator: 256 sequences of 4096 tokens on DGX H100. Name: GPUs, pipeline ranks, published MFU.
SETTINGS = {
    "mixtral-8x22b": (128, (4, 8), 0.493),
    "qwen2-57b-a14b": (64, (2, 4), 0.390),
}
BATCH, TOKENS = 256, 4096


def is_single(plan: ParallelStrategy) -> bool:
    """Whether one grid serves both kinds of layer: experts over data ranks, split as the rest."""
    return plan.dp % plan.ep == 0 and (plan.tp == 1 or not plan.sequence_parallel)


def grids(world: int, depths: tuple[int, ...]) -> list[ParallelStrategy]:
    """Return plans that fill ``world`` ranks; experts lie over data ranks or tensor ranks too."""
    return [
        ParallelStrategy(
            tp=tp, pp=pp, dp_replicate=world // tp // pp, zero_stage=1, ep=ep,
            sequence_parallel=apart,
        )
        for tp, pp, ep in itertools.product((1, 2, 4), depths, (4, 8))
        for apart in ((False, True) if tp > 1 else (False,))
    ]  # fmt: skip


@cache
def priced(name: str) -> dict[ParallelStrategy, float]:
    """Return the utilisation (attention counted in full) of every plan that can run and fits."""
    world, depths, _ = SETTINGS[name]
    model = replace(load_model(name), shared_gate=False)  # one row of numbers per layer
    found = {}
    for plan in grids(world, depths):
        try:
            metrics = step(model, load_cluster("dgx-h100", world // 8), plan,
                           TrainStep(BATCH, TOKENS))  # fmt: skip
        except InputError:
            continue
        if metrics["fits"]:
            found[plan] = metrics["mfu"]
    return found


@check("G1.5", mutant={"single_only": True})
def folding(*, single_only: bool = False) -> Finding:
    """The best pair of grids against the best single grid, at the published sizes on H100.

    ``single_only``: plans with grids of their own are left out.
    """
    best, gains = {}, {}
    for name in SETTINGS:
        plans = {p: mfu for p, mfu in priced(name).items() if not single_only or is_single(p)}
        best[name] = max(plans, key=lambda p: plans[p])
        gains[name] = plans[best[name]] / max(m for p, m in plans.items() if is_single(p))
    same, error = exact("folded experts")
    mfu = {name: priced(name)[plan] for name, plan in best.items()}
    order = mfu["mixtral-8x22b"] > mfu["qwen2-57b-a14b"]
    gained = max(gains.values()) > 1
    return Finding(
        same and order and gained and min(gains.values()) >= 1,
        "; ".join(
            f"{name} {mfu[name]:.1%} (published {SETTINGS[name][2]:.1%}) with tensor {plan.tp}, "
            f"pipeline {plan.pp}, experts {plan.ep}: {gains[name]:.2f}x the best single grid"
            for name, plan in best.items()
        )
        + f"; losses differ by {error:.1e}",
        "every single grid is one of the pairs; exchanges of many narrow experts cost more"
        if order and gained
        else "one grid alone gains nothing"
        if not gained
        else "the order does not follow: what many narrow experts cost a dispatcher is missing",
        ("128 and 64 H100, 256 sequences of 4096 tokens, balanced routing at capacity 1, ZeRO-1",
         "the shared expert's gate is left out; a single grid splits experts over tensor ranks, "
         "whose tokens are alike", "uneven routing, sorting of rows and the host's "
         "wait for their counts are not modelled: the narrow experts come out too fast", ON_RANKS),
        "cpu",
    )  # fmt: skip

"""Check of mixtures of experts whose attention and expert layers have grids of their own."""

from __future__ import annotations

import itertools
import math

from hwmodels.catalogue import make_cluster
from simcore.catalogue import load_model
from simcore.models import ModelSpec, active_parameter_count, parameter_count
from validation.systems.frame import Finding, check, need_torch
from validation.systems.training_machine import exchange_seconds

ON_CPU = "executed in float64 on the CPU; ranks in one process exchange their parts"


def folded_seconds(
    model: ModelSpec, tokens: int, world: int, grid: tuple[int, int], batch: int, pp: int
) -> float:
    """Return a step's seconds for ``grid`` = (tensor ranks of attention, expert ranks).

    Kernels at 0.6 of the peak, grouped products of few rows by a half-saturation of 256 rows;
    exchanges are exposed, gradients hide. A rank that cannot hold its states takes for ever.
    """
    tp, ep = grid
    cluster = make_cluster("h100-sxm-80gb", 8, world // 8)
    peak, layers = 989e12 * 0.6, model.layers
    total, active = parameter_count(model), active_parameter_count(model)
    expert = 3 * model.hidden * (model.moe_ffn or model.ffn)
    routed = expert * model.experts * layers
    if 6 * (total - routed) / tp / pp + 6 * routed / ep / pp + 12 * total / world > 70e9:
        return math.inf
    microbatches = max(1, batch // (world // pp // tp))
    local = tokens / tp  # tokens per rank and microbatch
    dense = active - expert * model.experts_per_token * layers
    rows = tokens * model.experts_per_token * ep / tp / model.experts
    sat = rows / (rows + 256)
    compute = 6 * local * (dense + expert * model.experts_per_token * layers / sat) / pp / peak
    score = 6 * layers * model.heads * model.head_dim * tokens * local / pp / peak
    gather = 6 * exchange_seconds("all_gather", tokens * model.hidden * 2, tp, cluster)
    send = local * model.experts_per_token * model.hidden * 2
    spread = 4 * exchange_seconds("all_to_all", send, ep, cluster)
    each = compute + score + (gather + spread) * layers / pp
    return each * (microbatches + pp - 1)


@check("G1.5", mutant={"single_only": True})
def folding(*, world: int = 128, batch: int = 256, single_only: bool = False) -> Finding:
    """The best pair of grids against one grid for both kinds of layer, and expert outputs.

    One grid ties the expert ranks to the tensor ranks or a multiple along data ranks only.
    """
    need_torch()
    from backends.references.exchange import folded_experts_agree

    same = folded_experts_agree()
    mfu, gains = {}, {}
    for name in ("mixtral-8x22b", "qwen2-57b-a14b"):
        model = load_model(name)
        folded, tied = math.inf, math.inf
        for pp, tp, ep in itertools.product((1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8, 16)):
            if model.experts % ep or ep > world // pp:
                continue
            seconds = folded_seconds(model, 4096, world, (tp, ep), batch, pp)
            if ep == 1 or (ep % tp == 0 and tp == 1):
                tied = min(tied, seconds)
            if not single_only or tp == 1:
                folded = min(folded, seconds)
        flops = (
            batch
            * 4096
            * (
                6 * active_parameter_count(model)
                + 12 * model.layers * model.heads * model.head_dim * 4096
            )
        )
        mfu[name], gains[name] = flops / folded / world / 989e12, tied / folded
    order = mfu["mixtral-8x22b"] > mfu["qwen2-57b-a14b"]
    gained = max(gains.values()) > 1
    return Finding(
        same and order and gained and min(gains.values()) >= 1,
        ", ".join(f"{name} {m:.1%}" for name, m in mfu.items())
        + f"; folded {', '.join(f'{g:.2f}x' for g in gains.values())} of the single grid",
        "every single grid is one of the pairs; many small experts leave few rows to each product"
        if order and gained
        else "one grid alone gains nothing"
        if not gained
        else "the order does not follow: permutation, uneven routing and the kernels of many "
        "narrow experts are not modelled",
        ("128 H100, 256 sequences of 4096 tokens, kernels at 0.6 of the peak", ON_CPU),
        "cpu",
    )

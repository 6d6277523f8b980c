"""Small distributed steps: sharded embeddings, folded experts, codecs, live paths, lost updates."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from backends.references.wire import Wire


def sharded_embeddings(tables: Tensor, index: Tensor, wire: Wire) -> Tensor:
    """Look up [tables, rows, dim] tables that ranks hold in turn, then exchange to batch layout.

    ``index``: [batch, tables]. Returns [batch, tables, dim] (Naumov et al. 2019, DLRM).
    """
    count, ranks = tables.shape[0], wire.ranks
    mine = [range(r * count // ranks, (r + 1) * count // ranks) for r in range(ranks)]
    looked = [
        torch.stack([tables[t, index[:, t]] for t in mine[r]], 1).chunk(ranks, 0)
        for r in range(ranks)
    ]
    return torch.cat([torch.cat(got, 1) for got in wire.all_to_all(looked, range(ranks))], 0)


def experts_dense(x: Tensor, gate: Tensor, experts: Tensor, top: int) -> Tensor:
    """Return a mixture of [experts, width, width] layers on [tokens, width]."""
    weight, chosen = (x @ gate.mT).softmax(-1).topk(top, -1)
    return sum(
        (weight[:, i, None] * torch.einsum("tw,two->to", x, experts[chosen[:, i]])
         for i in range(top)), torch.zeros_like(x),
    )  # fmt: skip


def experts_folded(x: Tensor, gate: Tensor, experts: Tensor, top: int, wire: Wire) -> Tensor:
    """The same with tokens sharded over all ranks and experts over the same ranks, dropless."""
    ranks, each = wire.ranks, len(experts) // wire.ranks
    shards, done = x.chunk(ranks, 0), []
    outs = [torch.zeros_like(shard) for shard in shards]
    for r, shard in enumerate(shards):
        weight, chosen = (shard @ gate.mT).softmax(-1).topk(top, -1)
        for dst in range(ranks):
            token, place = ((chosen // each) == dst).nonzero(as_tuple=True)
            rows = wire.move(r, dst, shard[token])
            expert = chosen[token, place]
            got = torch.einsum("tw,two->to", rows, experts[expert])
            back = wire.move(dst, r, got)
            outs[r] = outs[r].index_add(0, token, back * weight[token, place, None])
        done.append(outs[r])
    return torch.cat(done, 0)


def eight_bit(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return a tensor as int8 and the scale of its largest magnitude."""
    scale = x.abs().max() / 127
    return (x / scale).round().to(torch.int8), scale


def coded_mean(gradients: Sequence[Tensor], wire: Wire, *, coded: bool) -> Tensor:
    """Return the mean of the ranks' gradients after each sent its own to all others."""
    if not coded:
        return torch.stack(wire.all_gather(list(gradients))[0]).mean(0)
    codes = [eight_bit(g) for g in gradients]
    got = wire.all_gather([code for code, _ in codes])[0]
    return torch.stack(
        [code.to(gradients[0].dtype) * scale for code, (_, scale) in zip(got, codes, strict=True)]
    ).mean(0)


def live_paths(inputs: Tensor, servers: int, churn: float, seed: int) -> tuple[Tensor, int, int]:
    """Send microbatches along random live servers of each stage, some of which vanish.

    Returns the summed gradient of every stage's weight, the microbatches done, and the repeated
    stage passes. A server that is gone is replaced by another of its stage (SWARM).
    """
    random = np.random.default_rng(seed)
    torch.manual_seed(0)
    stages = [torch.randn(4, 4, dtype=torch.float64).div(2).requires_grad_() for _ in range(3)]
    alive = np.ones((3, servers), dtype=bool)
    repeated = done = 0
    for sample in inputs:
        x = sample
        for stage, weight in enumerate(stages):
            while True:
                server = random.choice(np.flatnonzero(alive[stage]))
                if random.random() >= churn:
                    break
                repeated += 1
                if alive[stage].sum() > 1:
                    alive[stage, server] = False
            x = torch.tanh(F.linear(x, weight))
        (x * x).sum().backward()
        done += 1
        alive |= random.random(alive.shape) < churn  # newcomers take a stage
    return torch.stack([w.grad for w in stages if w.grad is not None]), done, repeated


def steps_to_loss(batch: int, width: int, noise: float, seed: int, target: float = 0.1) -> int:
    """Return the SGD steps that a noisy quadratic needs to fall to ``target``, at its best rate.

    Gradients carry noise of variance ``noise`` / batch in each of ``width`` directions.
    """
    best = 10**6
    for rate in (0.5, 0.25, 0.12, 0.06, 0.03, 0.015, 0.008):
        random = torch.Generator().manual_seed(seed)
        w = torch.ones(256, width, dtype=torch.float64)  # 256 runs at once
        for step in range(1, min(best, 2000)):
            g = w + (noise / batch) ** 0.5 * torch.randn(w.shape, generator=random, dtype=w.dtype)
            w = w - rate * g
            if float((w * w).mean()) < target:
                best = step
                break
    return best

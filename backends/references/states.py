"""Causal linear attention over sequence shards: states passed by chain, gather or sliced scan.

Tensors are [batch, heads, tokens, width]; a state is the sum of k v' over the tokens before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from backends.references.wire import Wire


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return causal linear attention without normalisation, on one rank."""
    return (q @ k.mT).tril() @ v


def chain(states: list[Tensor], wire: Wire) -> list[Tensor]:
    """Each rank adds its own state to what came and passes it on (LASP, Sun et al. 2024)."""
    found = [torch.zeros_like(states[0])]
    for r in range(wire.ranks - 1):
        wire.hops += 1
        found.append(wire.move(r, r + 1, found[r] + states[r]))
    return found


def gather(states: list[Tensor], wire: Wire) -> list[Tensor]:
    """One all-gather of all states, summed where they arrive (LASP-2, Sun et al. 2025)."""
    zero = torch.zeros_like(states[0])
    return [sum(got[:r], zero) for r, got in enumerate(wire.all_gather(states))]


def all_scan(states: list[Tensor], wire: Wire, slices: int = 4) -> list[Tensor]:
    """The chain cut into slices that follow one another: P - 2 + slices rounds of one slice."""
    cut = [list(state.chunk(slices, -1)) for state in states]
    ranks, rounds = wire.ranks, wire.ranks - 2 + slices
    found = [[torch.zeros_like(part) for part in cut[0]] for _ in range(ranks)]
    for step in range(rounds):
        wire.hops += 1
        for r in reversed(range(ranks - 1)):
            part = step - r
            if 0 <= part < slices:
                found[r + 1][part] = wire.move(r, r + 1, found[r][part] + cut[r][part])
    return [torch.cat(parts, -1) for parts in found]


EXCHANGES = {"chain": chain, "gather": gather, "all_scan": all_scan}


def sharded(q: Tensor, k: Tensor, v: Tensor, wire: Wire, exchange: str, lag: int = 0) -> Tensor:
    """Return linear attention with a shard of the tokens per rank.

    ``lag`` shifts the states by so many ranks, the mutant of an off-by-one.
    """
    shards = [list(t.chunk(wire.ranks, 2)) for t in (q, k, v)]
    qs, ks, vs = shards
    states = [kk.mT @ vv for kk, vv in zip(ks, vs, strict=True)]
    before = EXCHANGES[exchange](states, wire)
    before = before[-lag:] + before[:-lag] if lag else before
    return torch.cat(
        [dense(a, b, c) + a @ s for a, b, c, s in zip(qs, ks, vs, before, strict=True)], 2
    )

"""Softmax attention over sequence shards: rings, all-to-alls, their mesh, and moving queries.

Tensors are [batch, heads, tokens, width]. Blocks of attention are merged by their log-sum-exp
(Liu et al. 2023, Ring Attention), so each algorithm equals dense attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from backends.references.wire import Wire

Layout = Callable[[int, int], list[Tensor]]  # (tokens, ranks) -> each rank's positions


def contiguous(tokens: int, ranks: int) -> list[Tensor]:
    """Equal runs of tokens."""
    return list(torch.arange(tokens).chunk(ranks))


def zigzag(tokens: int, ranks: int) -> list[Tensor]:
    """Of 2 P runs, rank r holds the r-th from each end."""
    runs = torch.arange(tokens).chunk(2 * ranks)
    return [torch.cat((runs[r], runs[2 * ranks - 1 - r])) for r in range(ranks)]


def striped(tokens: int, ranks: int) -> list[Tensor]:
    """Every P-th token (Brandon et al. 2023, Striped Attention)."""
    return [torch.arange(r, tokens, ranks) for r in range(ranks)]


LAYOUTS: dict[str, Layout] = {"contiguous": contiguous, "zigzag": zigzag, "striped": striped}


def mask_of(queries: Tensor, keys: Tensor, causal: bool) -> Tensor:
    """Return which query sees which key, from their positions."""
    if not causal:
        return torch.ones(len(queries), len(keys), dtype=torch.bool)
    return queries[:, None] >= keys[None]


def block(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Return a block's output and log-sum-exp; rows that see nothing give 0 and -inf."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~seen, -torch.inf)
    lse = scores.logsumexp(-1, keepdim=True)
    safe = lse.masked_fill(lse == -torch.inf, 0.0)
    return (scores - safe).exp() @ v, lse


def merge(one: tuple[Tensor, Tensor], two: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the attention over two disjoint sets of keys."""
    lse = torch.logaddexp(one[1], two[1])
    safe = lse.masked_fill(lse == -torch.inf, 0.0)
    return one[0] * (one[1] - safe).exp() + two[0] * (two[1] - safe).exp(), lse


def dense(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Return attention on one rank."""
    at = torch.arange(q.shape[2])
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    seen = mask_of(at, at, causal)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, seen)


def unmasked_pairs(
    layout: str, tokens: int, ranks: int, *, causal: bool, shift: int = 0
) -> list[int]:
    """Return how many pairs of a query and a key each rank's queries see.

    ``shift``: by how many positions the diagonal is off, a mutant.
    """
    at = torch.arange(tokens)
    seen = mask_of(at + shift, at, causal)
    return [int(seen[place].sum()) for place in LAYOUTS[layout](tokens, ranks)]


def restore(parts: Sequence[Tensor], places: Sequence[Tensor]) -> Tensor:
    """Return the shards in the order of tokens."""
    whole = torch.cat(list(parts), 2)
    return whole[:, :, torch.cat(list(places)).argsort()]


def ring(
    q: Tensor, k: Tensor, v: Tensor, wire: Wire, *, layout: str, causal: bool, skip_hop: int = -1
) -> tuple[Tensor, list[list[int]]]:
    """Return the output, and the unmasked pairs of every rank in every step.

    ``skip_hop``: the step in which the keys do not move, the mutant of an off-by-one.
    """
    ranks, places = wire.ranks, LAYOUTS[layout](q.shape[2], wire.ranks)
    queries = [q[:, :, p] for p in places]
    keys, values, at = [k[:, :, p] for p in places], [v[:, :, p] for p in places], list(places)
    found: list[tuple[Tensor, Tensor]] = []
    pairs: list[list[int]] = [[] for _ in range(ranks)]
    for step in range(ranks):
        for r in range(ranks):
            seen = mask_of(places[r], at[r], causal)
            pairs[r].append(int(seen.sum()))
            part = block(queries[r], keys[r], values[r], seen)
            if step == 0:
                found.append(part)
            else:
                found[r] = merge(found[r], part)
        if step < ranks - 1 and step != skip_hop:
            keys, values = wire.shift(keys), wire.shift(values)
            at = [at[(r - 1) % ranks] for r in range(ranks)]
    return restore([out for out, _ in found], places), pairs

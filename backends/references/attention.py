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


def token_ring(q: Tensor, k: Tensor, v: Tensor, wire: Wire, *, causal: bool) -> Tensor:
    """Keys stay; queries go round, and each block's output goes straight back to its owner."""
    ranks, places = wire.ranks, contiguous(q.shape[2], wire.ranks)
    queries, owner = [q[:, :, p] for p in places], list(range(ranks))
    found: list[tuple[Tensor, Tensor] | None] = [None] * ranks
    for step in range(ranks):
        for r in range(ranks):
            mine = owner[r]
            out, lse = block(
                queries[r], k[:, :, places[r]], v[:, :, places[r]],
                mask_of(places[mine], places[r], causal),
            )  # fmt: skip
            back = wire.move(r, mine, out), wire.move(r, mine, lse)
            before = found[mine]
            found[mine] = back if before is None else merge(before, back)
        if step < ranks - 1:
            queries = wire.shift(queries)
            owner = [owner[(r - 1) % ranks] for r in range(ranks)]
    return restore([part[0] for part in found if part is not None], places)


def _heads_for_tokens(held: list[Tensor], wire: Wire, ranks: Sequence[int]) -> list[Tensor]:
    parts = [list(t.chunk(len(ranks), 1)) for t in held]
    return [torch.cat(got, 2) for got in wire.all_to_all(parts, ranks)]


def _tokens_for_heads(held: list[Tensor], wire: Wire, ranks: Sequence[int]) -> list[Tensor]:
    parts = [list(t.chunk(len(ranks), 2)) for t in held]
    return [torch.cat(got, 1) for got in wire.all_to_all(parts, ranks)]


def mesh(q: Tensor, k: Tensor, v: Tensor, wire: Wire, *, ulysses: int, causal: bool) -> Tensor:
    """All-to-all inside groups of ``ulysses`` neighbours, a ring across them (Fang, Zhao 2024).

    With ``ulysses`` equal to the ranks this is DeepSpeed-Ulysses. Raises ValueError where the
    heads do not divide.
    """
    if min(q.shape[1], k.shape[1]) % ulysses:
        raise ValueError(f"{min(q.shape[1], k.shape[1])} heads over {ulysses} ranks")
    groups, tokens = wire.ranks // ulysses, q.shape[2]
    shards = [list(t.chunk(wire.ranks, 2)) for t in (q, k, v)]
    members = [range(g * ulysses, (g + 1) * ulysses) for g in range(groups)]
    mine = [
        [_heads_for_tokens([s[r] for r in group], wire, group) for group in members] for s in shards
    ]
    places = contiguous(tokens, groups)
    done: list[list[Tensor]] = [[] for _ in range(groups)]
    for u in range(ulysses):
        column = [group[u] for group in members]
        held = [(mine[1][g][u], mine[2][g][u], places[g]) for g in range(groups)]
        found: list[tuple[Tensor, Tensor] | None] = [None] * groups
        for step in range(groups):
            for g in range(groups):
                kk, vv, at = held[g]
                part = block(mine[0][g][u], kk, vv, mask_of(places[g], at, causal))
                before = found[g]
                found[g] = part if before is None else merge(before, part)
            if step < groups - 1:
                held = [
                    (
                        wire.move(column[g - 1], column[g], held[g - 1][0]),
                        wire.move(column[g - 1], column[g], held[g - 1][1]),
                        held[g - 1][2],
                    )
                    for g in range(groups)
                ]
        for g in range(groups):
            part_g = found[g]
            assert part_g is not None
            done[g].append(part_g[0])
    back = [_tokens_for_heads(done[g], wire, members[g]) for g in range(groups)]
    return torch.cat([shard for group in back for shard in group], 2)

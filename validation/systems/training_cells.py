"""The grid of split attention: ways x masks x layouts x lengths x ranks, and each rank's pairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simcore.models import ModelSpec
from simcore.program import Program, group_ranks
from simcore.sequence import rank_positions, visible
from simcore.strategy import ParallelStrategy
from simcore.workloads import TrainStep

Mask = NDArray[np.bool_]  # [queries, keys] of a sequence: what is seen
WORLD = 4
SIZES = ((8, 2), (16, 4))  # tokens and ranks of a sequence


def _network(name: str, causal: bool) -> ModelSpec:
    return ModelSpec(
        name, 1, 16, 4, 4, 4, 24, 29, causal=causal,
        weights_dtype="fp32", compute_dtype="fp32", kv_dtype="fp32",
    )  # fmt: skip


CAUSAL, FULL = _network("causal", True), _network("full", False)
LAYOUTS = ("contiguous", "zigzag", "striped")
# masks of which ways of sharing attention out; where the layout is the way's own none is named
WAYS: dict[str, tuple[tuple[str, str], ...]] = {
    "causal": (
        *(("ring", layout) for layout in LAYOUTS),
        *(("token_ring", layout) for layout in LAYOUTS),
        *(("lightseq", ""), ("ulysses", ""), ("servers", "")),
    ),
    "full": (("ring", "contiguous"), ("token_ring", ""), ("ulysses", "")),  # layouts are alike
    "documents": (("servers", ""),),
}


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell: a mask over sequences of ``tokens``, shared out over ``ranks`` in some way."""

    mask: str
    kind: str
    layout: str
    tokens: int
    ranks: int

    @property
    def model(self) -> ModelSpec:
        """A network of one layer."""
        return FULL if self.mask == "full" else CAUSAL

    @property
    def parallel(self) -> ParallelStrategy:
        """Ranks that are left over are replicas."""
        return ParallelStrategy(
            cp=self.ranks, cp_kind=self.kind, cp_layout=self.layout or "zigzag",
            dp_replicate=WORLD // self.ranks,
        )  # fmt: skip

    @property
    def documents(self) -> tuple[int, ...]:
        """Lengths of what is packed, of which the ranks' borders cut one."""
        return (self.tokens - 3, 3) if self.mask == "documents" else ()

    @property
    def work(self) -> TrainStep:
        """One microbatch of one sequence on every replica."""
        return TrainStep(WORLD // self.ranks, self.tokens, documents=self.documents)

    def seen(self, shift: int = 0) -> Mask:
        """Return which query sees which key; ``shift``: how far the diagonal is off."""
        spots = np.arange(self.tokens)
        if self.mask == "full":
            return np.ones((self.tokens, self.tokens), dtype=bool)
        seen: Mask = spots[:, None] + shift >= spots
        if self.documents:
            owner = np.repeat(np.arange(len(self.documents)), self.documents)
            seen &= owner[:, None] == owner
        return seen


CELLS: dict[str, Cell] = {
    " ".join(filter(None, (mask, kind, layout, f"{tokens}/{ranks}"))): Cell(
        mask, kind, layout, tokens, ranks
    )
    for mask, ways in WAYS.items()
    for kind, layout in ways
    for tokens, ranks in SIZES
}


def rank_pairs(program: Program, rank: int) -> float:
    """Return the (query, key) pairs of all heads that a rank multiplies in the layer's forward."""
    found = 0.0
    for op in program.blocks["layer.F"].ops:
        if not op.kind.startswith("attention") or op.kind == "attention_merge":
            continue
        dims, attrs = op.dims, op.attrs
        if op.kind == "attention":
            pairs = visible((0, dims["s"], 0, dims["kv"], attrs["causal"])) * dims["b"]
        else:
            place = group_ranks(program.mesh, attrs["axis"], rank).index(rank)
            if op.kind == "attention_tasks":
                sizes = [(q1 - q0, sum(b - a for a, b in k)) for q0, q1, k in attrs["tasks"][place]]
                pairs = sum(q * k - q * (q - 1) / 2 for q, k in sizes)
            else:
                pairs = visible(attrs["tiles"][place]) * dims["b"]
        found += float(pairs * dims["h"])
    return found


# kind -> the pairs of a head that a rank with some rows has to do: those of its queries, of its
# keys, or an equal share; others give work away, so that only the sum is told
AREAS: dict[str, Callable[[Mask, NDArray[np.int64], int], float]] = {
    "ring": lambda seen, mine, ranks: float(seen[mine].sum()),
    "token_ring": lambda seen, mine, ranks: float(seen[:, mine].sum()),
    "ulysses": lambda seen, mine, ranks: float(seen.sum() / ranks),
}


def loads(cell: Cell, program: Program, shift: int = 0) -> tuple[list[float], bool]:
    """Return the ranks' pairs, and whether they are the areas of the mask."""
    seen, heads = cell.seen(shift), cell.model.heads
    found = [rank_pairs(program, rank) for rank in range(cell.ranks)]
    same = sum(found) == seen.sum() * heads
    if cell.kind in AREAS:
        area = AREAS[cell.kind]
        mine = [rank_positions(program, rank) for rank in range(cell.ranks)]
        same &= found == [area(seen, rows, cell.ranks) * heads for rows in mine]
    return found, bool(same)

"""Mixture-of-experts layers: where the experts lie, and the forward ops of their feed-forward.

A token goes to its ``experts_per_token`` likeliest experts, weighted by the softmax over their
logits (Jiang et al. 2024, Mixtral). Two ways to bring rows to experts, both of known size:

- without a capacity, every chosen row is kept: t x k rows on a rank, sorted by expert;
- with capacity factor c, an expert takes at most C = ceil(c t k / experts) rows of a rank's t
  tokens, at most t; further ones are dropped, second choices first, then later tokens (Lepikhin et
  al. 2021, GShard; Fedus et al. 2022, Switch). Buffers hold C rows an expert, zeros where fewer
  came, and all of them are multiplied. c = experts / experts_per_token drops nothing.

Expert parallelism exchanges whole buffers and so needs a capacity. No auxiliary loss is added.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from simcore.models import ModelSpec, shared_width
from simcore.network import Builder, Rows, TensorParallel, _linear, layer_block
from simcore.ops import Buffer, Op, Size
from simcore.program import fold
from simcore.strategy import ParallelStrategy, default_etp

LAYER, EXPERTS = "moe", "experts"  # units: what all data-parallel ranks hold, and the experts


@dataclass(frozen=True, slots=True)
class ExpertGrid:
    """The grid of a MoE layer over the ranks of a pipeline stage: etp innermost, then ep, edp.

    ``edp`` ranks hold copies of the same experts.
    """

    etp: int = 1
    ep: int = 1
    edp: int = 1
    capacity_factor: float = 0.0  # 0: every row is kept

    @classmethod
    def of(cls, parallel: ParallelStrategy) -> ExpertGrid:
        """Return the grid of a strategy, whose ep and etp `check_experts` accepts."""
        etp = parallel.etp or default_etp(parallel)
        ranks = parallel.dp * parallel.cp * parallel.tp
        factor = parallel.capacity_factor or (1.0 if parallel.ep > 1 else 0.0)
        return cls(etp, parallel.ep, ranks // (etp * parallel.ep), factor)

    @property
    def group(self) -> str:
        """The ranks that share out the experts."""
        return fold("ep", self.etp, self.ep)

    def copies(self, replicas: int) -> tuple[str, int, str, int]:
        """Return group and degree of the ranks that shard an expert's states, and of replicas.

        The copies are divided as ``replicas`` of dense weights are, as far as they can be.
        """
        outer = math.gcd(self.edp, replicas)
        inner, own = self.edp // outer, self.etp * self.ep
        return fold("edp", own, inner), inner, fold("edp", own * inner, outer), outer

    def capacity(self, model: ModelSpec, tokens: Size) -> Size:
        """Return the rows that an expert takes of a rank's ``tokens``; 0: as many as come."""
        if not self.capacity_factor:
            return 0
        rows = np.ceil(self.capacity_factor * tokens * model.experts_per_token / model.experts)
        least = np.minimum(rows, tokens)
        return int(least) if np.ndim(least) == 0 else least


def touched_experts(model: ModelSpec, tokens: Size) -> Size:
    """Return how many experts some token is expected to choose, where all are equally likely."""
    missed = 1 - model.experts_per_token / model.experts
    return model.experts * (1 - missed**tokens)


def moe_block(
    model: ModelSpec,
    tp: TensorParallel,
    rows: Rows,
    buffers: dict[str, Buffer],
    grid: ExpertGrid,
) -> list[Op]:
    """Return the forward ops of one layer with experts: h -> h+."""
    ffn = partial(_feed_forward, grid=grid)
    return layer_block(model, tp, rows, buffers, prefix=LAYER, ffn=ffn)


def _feed_forward(
    b: Builder, model: ModelSpec, tp: TensorParallel, tokens: Size, x: str, grid: ExpertGrid
) -> str:
    """Append the experts, and the shared ones, on normed ``x``; return the summed result."""
    split = tp.present and not tp.shards_tokens  # every expert over the tp ranks
    local, hidden = tp.local(tokens), model.hidden
    whole = tp.enter(b, x, tokens, hidden) if split or shared_width(model) else x
    routed = _experts(
        b, model, tp if split else TensorParallel(), local, whole if split else x, grid
    )
    if not shared_width(model):
        return tp.leave(b, routed, tokens, hidden) if split else routed
    shared = _shared(b, model, tp, tokens, whole)
    if not split:
        shared = tp.leave(b, shared, tokens, hidden) if tp.present else shared
    both = b.op("add", (routed, shared), (b.act("both", local, hidden),), t=local, n=hidden)
    return tp.leave(b, both, tokens, hidden) if split else both


def _shared(b: Builder, model: ModelSpec, tp: TensorParallel, tokens: Size, x: str) -> str:
    """Append the experts that every token goes to, as one of their summed width."""
    width, hidden = shared_width(model), model.hidden
    pieces = (width, width) if model.ffn_kind == "gated" else (width,)
    ffn = tp.split(width)
    up = _linear(
        b, model, x, "shared.up", tokens, ffn * len(pieces), hidden, pieces=pieces, shard_dim=0
    )
    act = _activation(b, model, up, "shared.act", tokens, ffn)
    return _linear(b, model, act, "shared.z", tokens, hidden, ffn, shard_dim=1)


def _activation(b: Builder, model: ModelSpec, up: str, name: str, rows: Size, ffn: Size) -> str:
    gated = model.ffn_kind == "gated"
    kind = "swiglu" if gated else ("relu" if model.activation == "relu" else "gelu")
    attrs = {"activation": model.activation}
    return b.op(kind, (up,), (b.act(name, rows, ffn),), t=rows, n=ffn, attrs=attrs)


@dataclass(frozen=True, slots=True)
class _Dispatch:
    """How a rank's tokens reach its experts: sizes of the buffers and what a product is given."""

    tokens: Size
    top: int
    experts: int  # of the layer
    held: int  # by this rank
    capacity: Size  # rows of each of them from each rank; 0: as many as come
    touched: Size  # experts of this rank that have rows
    group: str  # the ranks that share out the experts

    @property
    def rows(self) -> Size:
        """Rows of the buffer of chosen rows, before and after an exchange."""
        return self.experts * self.capacity if self._padded else self.tokens * self.top

    @property
    def _padded(self) -> bool:
        return not (np.ndim(self.capacity) == 0 and self.capacity == 0)

    @property
    def counted(self) -> tuple[str, ...]:
        """Name the rows of every expert where they are not all alike."""
        return () if self._padded else ("counts",)


def _experts(
    b: Builder, model: ModelSpec, tp: TensorParallel, tokens: Size, x: str, grid: ExpertGrid
) -> str:
    """Append routing, dispatch, the experts' products and the weighted sum of their results."""
    held, hidden = model.experts // grid.ep, model.hidden
    capacity = grid.capacity(model, tokens)
    dropless = not grid.capacity_factor
    touched = touched_experts(model, tokens) if dropless else held
    top, experts = model.experts_per_token, model.experts
    way = _Dispatch(tokens, top, experts, held, capacity, touched, grid.group)
    sorted_rows = b.act("sorted", way.rows, hidden)
    _route(b, model, tp, x, way)
    dims = {"t": tokens, "rows": way.rows, "n": hidden}
    b.op("permute", (x, "slots"), (sorted_rows,), **dims, attrs={"top": top})
    sent = _exchange(b, sorted_rows, way, hidden, grid, inward=True)
    done = _products(b, model, tp, sent, way)
    back = _exchange(b, done, way, hidden, grid, inward=False)
    out = b.act("combined", tokens, hidden)
    return b.op("combine", (back, "gates", "slots"), (out,), **dims, attrs={"top": top})


def _route(b: Builder, model: ModelSpec, tp: TensorParallel, x: str, way: _Dispatch) -> None:
    """Append the choice of experts; with every expert split, a rank has a part of its gradient."""
    scores = _linear(
        b,
        model,
        x,
        "router",
        way.tokens,
        way.experts,
        model.hidden,
        bias=model.router_bias,
    )
    for name in b.ops[-1].reads[1:]:
        b.buffers[name] = replace(b.buffers[name], partial=tp.present)
    chosen = b.act("chosen", way.tokens, way.top, dtype="int64")
    slots = b.act("slots", way.tokens, way.top, dtype="int64")
    gates = b.act("gates", way.tokens, way.top)
    writes: tuple[str, ...] = (gates, chosen, slots)
    if way.counted:
        writes += (b.act("counts", way.experts, dtype="int64"),)
    attrs = {"top": way.top, "capacity": way.capacity}
    b.op("route", (scores,), writes, t=way.tokens, n=way.experts, attrs=attrs)


def _exchange(
    b: Builder, x: str, way: _Dispatch, hidden: Size, grid: ExpertGrid, *, inward: bool
) -> str:
    """Append the exchange between the ranks' tokens and the ranks' experts.

    Rows arrive by source rank and then by expert, and are multiplied by expert.
    """
    if grid.ep == 1:
        return x
    rows, size = way.rows, way.rows * hidden

    def swapped(x: str, name: str, outer: int, inner: int) -> str:
        out = b.act(name, rows, hidden)
        attrs = {"outer": outer, "inner": inner}
        return b.op("swap_blocks", (x,), (out,), t=rows, n=hidden, attrs=attrs)

    def moved(x: str, name: str) -> str:
        out = b.act(name, rows, hidden)
        return b.op("all_to_all", (x,), (out,), n=size, group=grid.group, stream="ep")

    if inward:
        return swapped(moved(x, "arrived"), "by_expert", grid.ep, way.held)
    return moved(swapped(x, "by_source", way.held, grid.ep), "returned")


def _products(b: Builder, model: ModelSpec, tp: TensorParallel, x: str, way: _Dispatch) -> str:
    """Append the experts' feed-forward on rows in the order of experts."""
    ffn = tp.split(model.moe_ffn)
    pieces = (model.moe_ffn,) * (2 if model.ffn_kind == "gated" else 1)
    columns, rows = (0, 1) if tp.present else (-1, -1)
    up = _grouped(b, model, x, "up", way, ffn * len(pieces), model.hidden, pieces, columns)
    act = _activation(b, model, up, "expert.act", way.rows, ffn)
    return _grouped(b, model, act, "z", way, model.hidden, ffn, (), rows)


def _grouped(
    b: Builder,
    model: ModelSpec,
    x: str,
    name: str,
    way: _Dispatch,
    n: Size,
    k: Size,
    pieces: tuple[Size, ...],
    shard_dim: int,
) -> str:
    """Append y = x W^T with every row multiplied by the weight of its expert."""
    dtype = model.weights_dtype
    own = Builder(EXPERTS, b.dtype, b.buffers, b.ops)
    weight = own.weight(f"w{name}", way.held, n, k, dtype=dtype, pieces=pieces, shard_dim=shard_dim)
    b.buffers[weight] = replace(b.buffers[weight], experts=way.experts, expert_group=way.group)
    out = b.act(f"expert.{name}", way.rows, n)
    return b.op(
        "grouped_matmul",
        (x, weight, *way.counted),
        (out,),
        e=way.held,
        touched=way.touched,
        m=way.rows,
        n=n,
        k=k,
        attrs={"layout": "nt", "weight_dtype": dtype},
    )

"""The torch functions of the op kinds of a mixture of experts; `MOE_OPS` is their registry.

``slots`` [tokens, top] names the row of the experts' buffer that each of a token's copies goes to;
one past the last row means that the copy was dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from simcore.ops import Op

Results = Sequence[Tensor]
Outs = Sequence[Tensor | None]


def _route(ctx: Any, op: Op, reads: Results, outs: Outs) -> Results:
    """Choose experts; first choices get their rows before second ones, earlier tokens first."""
    (scores,) = reads
    top, capacity = int(op.attrs["top"]), int(op.attrs["capacity"])
    tokens, experts = scores.shape
    best, chosen = scores.topk(top, -1)
    wide = best if best.dtype == torch.float64 else best.float()
    gates = wide.softmax(-1).to(scores.dtype)
    wanted = chosen.t().reshape(-1)
    counts = torch.bincount(wanted, minlength=experts)
    starts = counts.cumsum(0) - counts
    order = wanted.argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(order.numel(), device=order.device) - starts[wanted[order]]
    if capacity:
        dropped = experts * capacity
        rows = torch.where(place < capacity, wanted * capacity + place, dropped)
    else:
        rows = starts[wanted] + place
    slots = rows.view(top, tokens).t().contiguous()
    return (gates, chosen, slots, counts)[: len(outs)]


def _route_backward(ctx: Any, op: Op, reads: Results, outs: Outs) -> Results:
    dgates, gates, chosen = reads
    result = dgates.new_zeros(dgates.shape[0], int(op.dims["n"]))
    inside = gates * (dgates - (gates * dgates).sum(-1, keepdim=True))
    return (result.scatter_(1, chosen, inside),)


def _kept(slots: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Return which copies were kept, and a row for each: any one for those that were not."""
    return slots < rows, slots.clamp(max=rows - 1)


def _scatter(op: Op, copies: Tensor, slots: Tensor) -> Tensor:
    """Return the experts' rows from the tokens' copies [tokens, top, n]."""
    rows = copies.new_zeros(int(op.dims["rows"]), copies.shape[-1])
    kept, _ = _kept(slots, rows.shape[0])
    rows[slots[kept]] = copies[kept]
    return rows


def _gather(rows: Tensor, slots: Tensor) -> Tensor:
    """Return the tokens' copies [tokens, top, n] from the experts' rows, zeros where dropped."""
    kept, where = _kept(slots, rows.shape[0])
    return rows[where] * kept[..., None]


def _permute(ctx: Any, op: Op, reads: Results, outs: Outs) -> Results:
    x, slots = reads
    return (_scatter(op, x[:, None].expand(-1, slots.shape[1], -1), slots),)


def _permute_backward(ctx: Any, op: Op, reads: Results, outs: Outs) -> Results:
    return (_gather(*reads).sum(1),)


def _combine(ctx: Any, op: Op, reads: Results, outs: Outs) -> Results:
    rows, gates, slots = reads
    return ((_gather(rows, slots) * gates[..., None]).sum(1),)


def _combine_backward(ctx: Any, op: Op, reads: Results, outs: Outs) -> Results:
    dy, rows, gates, slots = reads
    drows = _scatter(op, dy[:, None] * gates[..., None], slots)
    return (drows, (_gather(rows, slots) * dy[:, None]).sum(-1))


def _swap_blocks(ctx: Any, op: Op, reads: Results, outs: Outs) -> Results:
    """Reorder blocks [outer, inner] of rows as [inner, outer], in each of a batch of them."""
    (x,) = reads
    batch, outer, inner = op.attrs.get("batch", 1), op.attrs["outer"], op.attrs["inner"]
    result = torch.empty_like(x)
    turned = x.view(batch, outer, inner, -1).transpose(1, 2)
    result.view(batch, inner, outer, -1).copy_(turned)
    return (result,)


def _by_expert(counts: Sequence[Tensor]) -> Iterator[tuple[int, slice]]:
    """Yield every expert that has rows, with its rows."""
    first = 0
    for expert, count in enumerate(counts[0].tolist()):
        if count:
            yield expert, slice(first, first + count)
        first += count


def _grouped_matmul(ctx: Any, op: Op, reads: Results, outs: Outs) -> Results:
    """Multiply rows by the matrices of their experts; equal shares of rows go in one batch."""
    x, weight, *counts = reads
    experts = int(op.dims["e"])
    if op.attrs["layout"] == "tn":
        return (_grouped_gradient(op, x, weight, counts, outs[0]),)
    matrices = weight.transpose(1, 2) if op.attrs["layout"] == "nt" else weight
    if not counts:
        each = torch.bmm(x.view(experts, -1, x.shape[-1]), matrices)
        return (each.view(x.shape[0], -1),)
    result = x.new_empty(x.shape[0], matrices.shape[-1])
    for expert, rows in _by_expert(counts):
        result[rows] = torch.mm(x[rows], matrices[expert])
    return (result,)


def _grouped_gradient(
    op: Op, dy: Tensor, x: Tensor, counts: Sequence[Tensor], out: Tensor | None
) -> Tensor:
    """Add every expert's dy^T x to the gradient of its matrix."""
    assert out is not None
    if not counts:
        experts = int(op.dims["e"])
        left, right = (part.view(experts, -1, part.shape[-1]) for part in (dy, x))
        out += torch.bmm(left.transpose(1, 2), right)
    for expert, rows in _by_expert(counts) if counts else ():
        out[expert] += torch.mm(dy[rows].t(), x[rows])
    return out


MOE_OPS: dict[str, Callable[..., Results]] = {
    "route": _route,
    "route_backward": _route_backward,
    "permute": _permute,
    "permute_backward": _permute_backward,
    "combine": _combine,
    "combine_backward": _combine_backward,
    "swap_blocks": _swap_blocks,
    "grouped_matmul": _grouped_matmul,
}

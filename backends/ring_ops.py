"""The torch functions of attention over split sequences: tiles of blocks, merges, exchanges."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from simcore.ops import Op

Results = Sequence[Tensor]
Outs = Sequence[Tensor | None]


class Place(Protocol):
    """What these ops ask about their rank."""

    @property
    def index(self) -> Callable[[str], int]:
        """Gives its place in a group."""

    @property
    def fused(self) -> bool:
        """Whether it runs torch's fused attention."""


def _heads(x: Tensor, batch: int, d: int) -> Tensor:
    """Return rows [b s, h d] as [b, h, s, d], a view."""
    return x.view(batch, -1, x.shape[1] // d, d).transpose(1, 2)


def _operands(
    ctx: Place, op: Op, qkv: Tensor, block: Tensor
) -> tuple[slice, slice, bool, Tensor, Tensor, Tensor]:
    """Return the rows of queries and of keys, the mask, and this rank's tile of q, k and v.

    Every head of k and v serves a group of heads of q.
    """
    q0, q1, k0, k1, masked = op.attrs["tiles"][ctx.index(op.attrs["axis"])]
    d, batch = op.dims["d"], op.dims["b"]
    heads, kv_heads = op.dims["h"], op.dims["hkv"]
    q = _heads(qkv, batch, d)[:, :heads, q0:q1]
    k, v = (
        part[:, :, k0:k1].repeat_interleave(heads // kv_heads, 1)
        for part in _heads(block, batch, d).split(kv_heads, 1)
    )
    return slice(q0, q1), slice(k0, k1), masked, q, k, v


def takes_part(ctx: Place, op: Op) -> bool:
    """Return whether the second part of a sum counts on this rank."""
    return "places" not in op.attrs or bool(op.attrs["places"][ctx.index(op.attrs["axis"])])


def _own(ctx: Place, op: Op, reads: Results) -> Results:
    """Return the operands that this rank works on: the second half of them where it helps."""
    if "helps" not in op.attrs:
        return reads
    half = len(reads) // 2
    return reads[half:] if op.attrs["helps"][ctx.index(op.attrs["axis"])] else reads[:half]


def _scores(q: Tensor, k: Tensor, masked: bool) -> Tensor:
    scores = torch.matmul(q, k.transpose(-1, -2)) * float(q.shape[-1] ** -0.5)
    if masked:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores.masked_fill_(later, -math.inf)
    return scores


def _block(ctx: Place, op: Op, reads: Results, outs: Outs) -> Results:
    """Return the output and the lse of all rows: zero and -inf where the tile has none."""
    qkv, block = _own(ctx, op, reads)
    rows, _, masked, q, k, v = _operands(ctx, op, qkv, block)
    batch, heads, d = op.dims["b"], op.dims["h"], op.dims["d"]
    out = qkv.new_zeros(qkv.shape[0], heads * d)
    wide = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    lse = qkv.new_full((batch, heads, op.attrs["rows"]), -math.inf, dtype=wide)
    if not q.shape[2]:
        return (out, lse)
    if ctx.fused and q.device.type == "cpu":
        o, found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, masked)
    elif ctx.fused and q.dtype in (torch.bfloat16, torch.float16):
        o, found = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, masked)[:2]
    else:
        scores = _scores(q, k, masked)
        found = scores.logsumexp(-1)
        o = torch.matmul((scores - found[..., None]).exp(), v)
    _heads(out, batch, d)[:, :, rows] = o
    lse[:, :, rows] = found
    return (out, lse)


def _block_backward(ctx: Place, op: Op, reads: Results, outs: Outs) -> Results:
    """Return the gradients of the queries and of the block, from the merged output and lse."""
    dy, qkv, block, y, lse = _own(ctx, op, reads)
    rows, keys, masked, q, k, v = _operands(ctx, op, qkv, block)
    batch, d = op.dims["b"], op.dims["d"]
    dq, dkv = torch.zeros_like(dy), torch.zeros_like(block)
    if not q.shape[2]:
        return (dq, dkv)
    do, o = (_heads(x, batch, d)[:, :, rows] for x in (dy, y))
    part = lse[:, :, rows]
    if ctx.fused and q.device.type == "cpu":
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            do, q, k, v, o, part.contiguous(), 0.0, masked
        )
    elif ctx.fused and q.dtype in (torch.bfloat16, torch.float16):
        seed = torch.zeros((), dtype=torch.int64, device=q.device)
        found = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            *(do, q, k, v, o, part.contiguous(), None, None, q.shape[2], k.shape[2]),
            *(0.0, masked, seed, seed),
        )[:3]
    else:
        p = (_scores(q, k, masked) - part[..., None]).exp()
        ds = p * (torch.matmul(do, v.transpose(-1, -2)) - (do * o).sum(-1, keepdim=True))
        ds = ds * float(d**-0.5)
        dv = torch.matmul(p.transpose(-1, -2), do)
        found = torch.matmul(ds, k), torch.matmul(ds.transpose(-1, -2), q), dv
    _heads(dq, batch, d)[:, :, rows] = found[0]
    shape = batch, op.dims["hkv"], -1, keys.stop - keys.start, d
    for target, grad in zip(_heads(dkv, batch, d).split(op.dims["hkv"], 1), found[1:], strict=True):
        target[:, :, keys] = grad.reshape(shape).sum(2)
    return (dq, dkv)


def _merge(ctx: Place, op: Op, reads: Results, outs: Outs) -> Results:
    """Return the output and lse over the keys of both parts."""
    left, left_lse, right, right_lse = reads
    if not takes_part(ctx, op):
        return (left.clone(), left_lse.clone())
    lse = torch.logaddexp(left_lse, right_lse)
    batch, heads, rows = lse.shape
    shape = batch, rows, heads, -1

    def share(part: Tensor) -> Tensor:
        return (part - lse).exp().transpose(1, 2)[..., None].to(left.dtype)

    total = left.view(shape) * share(left_lse) + right.view(shape) * share(right_lse)
    return (total.view(left.shape), lse)


def _take_columns(ctx: Place, op: Op, reads: Results, outs: Outs) -> Results:
    first = op.attrs["first"]
    return (_copied(reads[0][:, first : first + op.dims["n"]]),)


def _join_columns(ctx: Place, op: Op, reads: Results, outs: Outs) -> Results:
    return (torch.cat((reads[0], reads[1]), 1),)


def _copied(x: Tensor) -> Tensor:
    """Return a tensor of its own even where the order of elements does not change."""
    return x.clone(memory_format=torch.contiguous_format)


def _regroup(ctx: Place, op: Op, reads: Results, outs: Outs) -> Results:
    """Divide rows or columns over the ranks of an all-to-all, or put them together again.

    By columns [t, w] <-> [parts, t, w / parts], each piece divided alone; by rows
    [b parts s, w] <-> [parts, b s, w].
    """
    x, a = reads[0], op.attrs
    parts, inverse = a["parts"], a["inverse"]
    if a["by"] == "rows":
        if inverse:
            each = x.view(parts, a["batch"], -1, x.shape[-1]).transpose(0, 1)
            return (_copied(each).view(-1, x.shape[-1]),)
        each = x.view(a["batch"], parts, -1, x.shape[-1]).transpose(0, 1)
        return (_copied(each).view(parts, -1, x.shape[-1]),)
    if inverse:
        shares = x.split([piece // parts for piece in a["pieces"]], -1)
        return (torch.cat([s.transpose(0, 1).reshape(x.shape[1], -1) for s in shares], -1),)
    shares = x.split(list(a["pieces"]), -1)
    turned = [s.reshape(x.shape[0], parts, -1).transpose(0, 1) for s in shares]
    return (torch.cat(turned, -1).contiguous(),)


RING_OPS: dict[str, Callable[..., Results]] = {
    "attention_block": _block,
    "attention_block_backward": _block_backward,
    "attention_merge": _merge,
    "take_columns": _take_columns,
    "join_columns": _join_columns,
    "regroup": _regroup,
}

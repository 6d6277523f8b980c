"""The torch functions of attention served in tasks: rows picked and put back, tasks run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from backends.ring_ops import Outs, Place, Results
from simcore.ops import Op

Pair = tuple[Tensor, Tensor]


def _mine(ctx: Place, op: Op, name: str) -> Sequence[tuple[int, ...]]:
    """Return this rank's entry of a table in the op's attributes."""
    return op.attrs[name][ctx.index(op.attrs["axis"])]  # type: ignore[no-any-return]


def _split_columns(ctx: Place, op: Op, reads: Results, outs: Outs) -> Results:
    first = op.attrs["first"]
    parts = reads[0][:, :first], reads[0][:, first:]
    return tuple(part.clone(memory_format=torch.contiguous_format) for part in parts)


def _gather_rows(ctx: Place, op: Op, reads: Results, outs: Outs) -> Results:
    """Return this rank's runs of rows one after another; what is left over is zero."""
    out, at = reads[0].new_zeros(op.dims["t"], op.dims["n"]), 0
    for first, end in _mine(ctx, op, "runs"):
        out[at : at + end - first] = reads[0][first:end]
        at += end - first
    return (out,)


def _scatter_rows(ctx: Place, op: Op, reads: Results, outs: Outs) -> Results:
    """Add rows to the places that `_gather_rows` took them from."""
    out, at = reads[0].new_zeros(op.dims["t"], op.dims["n"]), 0
    for first, end in _mine(ctx, op, "runs"):
        out[first:end] += reads[0][at : at + end - first]
        at += end - first
    return (out,)


def _tasks(ctx: Place, op: Op) -> Iterator[tuple[slice, Tensor]]:
    """Yield the rows of every task's queries and of its keys."""
    for q0, q1, runs in op.attrs["tasks"][ctx.index(op.attrs["axis"])]:
        yield slice(q0, q1), torch.cat([torch.arange(k0, k1) for k0, k1 in runs])


def _heads(x: Tensor, d: int) -> Tensor:
    """Return rows [t, h d] as [h, t, d], a view."""
    return x.view(x.shape[0], -1, d).transpose(0, 1)


def _operands(op: Op, q: Tensor, kv: Tensor, rows: slice, keys: Tensor) -> tuple[Tensor, Pair]:
    """Return a task's queries, and keys and values once for each head of queries."""
    d, group = op.dims["d"], op.dims["h"] // op.dims["hkv"]
    found = _heads(kv[keys.to(kv.device)], d).split(op.dims["hkv"])
    k, v = (part.repeat_interleave(group, 0) for part in found)
    return _heads(q[rows], d), (k, v)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """Return scaled products; the last keys are the queries' own rows."""
    scores = torch.matmul(q, k.transpose(-1, -2)) * float(q.shape[-1] ** -0.5)
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device)
    return scores.masked_fill_(later.triu(1 + k.shape[1] - q.shape[1]), -math.inf)


def _attention_tasks(ctx: Place, op: Op, reads: Results, outs: Outs) -> Results:
    """Return outputs [t, h d] and lse [h, t] of the queries that tasks name; zero elsewhere."""
    q, kv = reads
    out = torch.zeros_like(q)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = q.new_zeros(op.dims["h"], q.shape[0], dtype=wide)
    for rows, keys in _tasks(ctx, op):
        mine, (k, v) = _operands(op, q, kv, rows, keys)
        scores = _scores(mine, k)
        lse[:, rows] = found = scores.logsumexp(-1)
        _heads(out[rows], op.dims["d"])[:] = torch.matmul((scores - found[..., None]).exp(), v)
    return (out, lse)


def _attention_tasks_backward(ctx: Place, op: Op, reads: Results, outs: Outs) -> Results:
    """Return the gradients of queries and of keys and values, from the output and lse."""
    dy, q, kv, y, lse = reads
    d, group = op.dims["d"], op.dims["h"] // op.dims["hkv"]
    dq, dkv = torch.zeros_like(q), torch.zeros_like(kv)
    for rows, keys in _tasks(ctx, op):
        mine, (k, v) = _operands(op, q, kv, rows, keys)
        do, o = _heads(dy[rows], d), _heads(y[rows], d)
        p = (_scores(mine, k) - lse[:, rows, None]).exp().to(q.dtype)
        ds = p * (torch.matmul(do, v.transpose(-1, -2)) - (do * o).sum(-1, keepdim=True))
        ds = ds * float(d**-0.5)
        _heads(dq[rows], d)[:] = torch.matmul(ds, k)
        grads = torch.matmul(ds.transpose(-1, -2), mine), torch.matmul(p.transpose(-1, -2), do)
        whole = [g.view(-1, group, *g.shape[1:]).sum(1).transpose(0, 1).flatten(1) for g in grads]
        dkv.index_add_(0, keys.to(dkv.device), torch.cat(whole, 1))
    return (dq, dkv)


SERVER_OPS: dict[str, Callable[..., Results]] = {
    "split_columns": _split_columns,
    "gather_rows": _gather_rows,
    "scatter_rows": _scatter_rows,
    "attention_tasks": _attention_tasks,
    "attention_tasks_backward": _attention_tasks_backward,
}

"""The torch functions of recommendation models: rows of tables, and dot products of all pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from simcore.ops import Op

Results = Sequence[Tensor]
Outs = Sequence[Tensor | None]
TABLE_RATE = 0.1  # of plain descent on the rows of tables


def _places(tables: Tensor, index: Tensor) -> Tensor:
    """Return, sample by sample, the rows in all tables laid one after the other."""
    first = torch.arange(tables.shape[0], device=index.device) * tables.shape[1]
    return (index + first).reshape(-1)


def _lookup(ctx: Any, op: Op, reads: Results, outs: Outs) -> Results:
    tables, index = reads
    return (F.embedding(_places(tables, index), tables.view(-1, tables.shape[2])),)


def _descend_rows(ctx: Any, op: Op, reads: Results, outs: Outs) -> Results:
    """Subtract the gradients of looked-up rows, times the rate, from their tables."""
    dy, index, tables = reads
    rows = tables.view(-1, tables.shape[2])
    rows.index_add_(0, _places(tables, index), dy.to(rows.dtype), alpha=-TABLE_RATE)
    return (tables,)


def _rows(op: Op, z: Tensor, found: Tensor) -> Tensor:
    """Return the rows of every sample, [samples, rows, n]."""
    samples, n = int(op.dims["t"]), int(op.dims["n"])
    return torch.cat((z.view(samples, 1, n), found.view(samples, -1, n)), 1)


def _upper(op: Op, device: torch.device) -> Tensor:
    rows = int(op.dims["rows"])
    return torch.triu_indices(rows, rows, 1, device=device)


def _pairs(ctx: Any, op: Op, reads: Results, outs: Outs) -> Results:
    """Join the dense row and the dot products of all pairs of rows."""
    rows = _rows(op, *reads)
    i, j = _upper(op, rows.device)
    return (torch.cat((reads[0], torch.bmm(rows, rows.mT)[:, i, j]), 1),)


def _pairs_backward(ctx: Any, op: Op, reads: Results, outs: Outs) -> Results:
    dy, z, found = reads
    rows, n = _rows(op, z, found), int(op.dims["n"])
    i, j = _upper(op, rows.device)
    weights = dy.new_zeros(rows.shape[0], rows.shape[1], rows.shape[1])
    weights[:, i, j] = weights[:, j, i] = dy[:, n:]
    grad = torch.bmm(weights, rows)
    return (grad[:, 0] + dy[:, :n], grad[:, 1:].reshape(found.shape))


RECOMMEND_OPS: dict[str, Callable[..., Results]] = {
    "lookup": _lookup,
    "descend_rows": _descend_rows,
    "pairs": _pairs,
    "pairs_backward": _pairs_backward,
}

"""Attention along places, then along frames, with the sharded axis switched between the two."""

from __future__ import annotations

import torch
from torch import Tensor

from backends.references.attention import dense
from backends.references.compare import same
from backends.references.wire import Wire

SHAPE = (4, 8, 8, 6)  # heads, frames, places, width


def spatial(x: Tensor) -> Tensor:
    """Attend over the places of every frame."""
    y = x.transpose(0, 1)
    return dense(y, y, y, False).transpose(0, 1)


def temporal(x: Tensor) -> Tensor:
    """Attend over the frames of every place."""
    y = x.permute(2, 0, 1, 3)
    return dense(y, y, y, False).permute(1, 2, 0, 3)


def switched(ranks: int) -> tuple[bool, list[int], int]:
    """Run a spatial and a temporal layer, each on shards of the other axis (DSP, Zhao 2024).

    Returns whether the result is that of one rank, bytes sent by every rank, and bytes of the
    whole tensor.
    """
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wire = Wire(ranks)
    shards = [spatial(t) for t in x.chunk(ranks, 1)]  # frames sharded, places whole
    for old, new, work in ((1, 2, temporal), (2, 1, None)):
        got = wire.all_to_all([list(t.chunk(ranks, new)) for t in shards], range(ranks))
        shards = [torch.cat(parts, old) for parts in got]
        shards = [work(t) for t in shards] if work else shards
    agree = same([torch.cat(shards, 1)], [temporal(spatial(x))])
    return agree, wire.sent_bytes, x.numel() * x.element_size()

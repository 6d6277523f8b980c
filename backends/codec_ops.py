"""The torch functions of codecs: values to numbers of levels and back, block by block."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from simcore.codecs import BLOCK, CODECS
from simcore.ops import Op

Results = Sequence[Tensor]
Outs = Sequence[Tensor | None]


@cache
def _levels(codec: str, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return a codec's levels and the borders between them."""
    levels = torch.tensor(CODECS[codec].levels, device=device, dtype=torch.float64)
    return levels.to(dtype), ((levels[1:] + levels[:-1]) / 2).to(dtype)


def encode(codec: str, rows: Tensor) -> Tensor:
    """Return [pieces, n] values as [pieces, bytes]: codes, then the fp32 scales of the blocks."""
    pieces, n = rows.shape
    blocks = F.pad(rows, (0, -n % BLOCK)).view(pieces, -1, BLOCK)
    scale = blocks.abs().amax(-1).to(torch.float32)
    divisor = torch.where(scale > 0, scale, 1.0).to(rows.dtype)[..., None]
    _, borders = _levels(codec, rows.device, rows.dtype)
    codes = torch.bucketize(blocks / divisor, borders).to(torch.uint8).view(pieces, -1)[:, :n]
    return torch.cat((codes, scale.view(torch.uint8).view(pieces, -1)), 1)


def decode(codec: str, coded: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    """Return the [pieces, n] values of [pieces, bytes]."""
    pieces = coded.shape[0]
    levels, _ = _levels(codec, coded.device, dtype)
    scale = coded[:, n:].contiguous().view(torch.float32).to(dtype)
    codes = F.pad(coded[:, :n], (0, -n % BLOCK)).view(pieces, -1, BLOCK)
    return (levels[codes.int()] * scale[..., None]).view(pieces, -1)[:, :n]


def _encode(ctx: Any, op: Op, reads: Results, outs: Outs) -> Results:
    """Code a tensor in pieces; with a second one, what former steps lost is added and kept anew."""
    x = reads[0].reshape(-1)
    pieces, n, codec = int(op.dims["t"]), int(op.dims["n"]), op.attrs["codec"]
    if len(reads) > 1:
        x = x + reads[1]
    coded = encode(codec, F.pad(x, (0, pieces * n - x.numel())).view(pieces, n))
    if len(reads) == 1:
        return (coded.view(-1),)
    sent = decode(codec, coded, n, x.dtype).reshape(-1)[: x.numel()]
    return (coded.view(-1), reads[1].copy_(x - sent))


def _decode(ctx: Any, op: Op, reads: Results, outs: Outs) -> Results:
    """Return the values of coded pieces, joined or summed."""
    pieces, n = int(op.dims["t"]), int(op.dims["n"])
    coded = reads[0].view(pieces, -1)
    values = decode(op.attrs["codec"], coded, n, ctx.float_dtype(op.dtype))
    flat = values.sum(0) if op.attrs["summed"] else values.reshape(-1)
    shape = [int(dim) for dim in op.attrs["shape"]]
    found = flat[: math.prod(shape)].view(shape)
    return (found.clone() if outs[0] is None else outs[0].copy_(found),)


CODEC_OPS: dict[str, Callable[..., Results]] = {"encode": _encode, "decode": _decode}

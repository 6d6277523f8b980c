"""The torch functions of streamed layers: rows taken and put, attention of a chunk of rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from simcore.ops import Op

Results = Sequence[Tensor]
Outs = Sequence[Tensor | None]
aten = torch.ops.aten


class Place(Protocol):
    """What these ops ask about their rank."""

    fused: bool
    device: torch.device


def _runs(op: Op, whole: Tensor) -> Tensor:
    """Return the rows of a chunk, [parts, rows, ...], a view."""
    a = op.attrs
    first, rows = a["first"], op.dims["t"] // a["parts"]
    return whole.view(a["parts"], -1, *whole.shape[1:])[:, first : first + rows]


def _take_rows(ctx: Place, op: Op, reads: Results, outs: Outs) -> Results:
    chosen = _runs(op, reads[0])
    return (chosen.reshape(-1, *reads[0].shape[1:]).clone(),)


def _put_rows(ctx: Place, op: Op, reads: Results, outs: Outs) -> Results:
    """Write the rows of the last operand into the first, or into a new buffer."""
    part = reads[-1]
    whole = reads[0] if len(reads) > 1 else part.new_empty(op.attrs["total"], *part.shape[1:])
    target = _runs(op, whole)
    target.copy_(part.view(target.shape))
    return (whole,)


def _operands(op: Op, packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return q [b, h, s, d] of the chunk, k and v [b, hkv, kv, d] of all up to it, as views."""
    d, first = op.dims, op.attrs["first"]
    each = packed.view(d["b"], -1, d["h"] + 2 * d["hkv"], d["d"]).transpose(1, 2)
    q, keys = each[:, : d["h"], first : first + d["s"]], each[:, d["h"] :, : first + d["s"]]
    return q, keys[:, : d["hkv"]], keys[:, d["hkv"] :]


def _tiles(op: Op) -> list[tuple[slice, bool]]:
    """Return the keys of earlier chunks, all seen, and the chunk's own, masked."""
    first, last = op.attrs["first"], op.dims["kv"]
    own = [(slice(first, last), True)]
    return [(slice(0, first), False), *own] if first else own


def _repeated(x: Tensor, op: Op) -> Tensor:
    times = op.dims["h"] // op.dims["hkv"]
    return x if times == 1 else x.repeat_interleave(times, 1)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(-1, -2)) * float(q.shape[-1] ** -0.5)
    rows, keys = scores.shape[-2:]
    later = torch.ones(rows, keys, dtype=torch.bool, device=q.device).triu(keys - rows + 1)
    return scores.masked_fill_(later, -math.inf)


def _flat(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(x.shape[0] * x.shape[2], -1)


def _kernel(ctx: Place, q: Tensor) -> bool:
    return ctx.fused and (q.device.type == "cpu" or q.dtype in (torch.bfloat16, torch.float16))


def _attention_rows(ctx: Place, op: Op, reads: Results, outs: Outs) -> Results:
    q, k, v = _operands(op, reads[0])
    k, v = _repeated(k, op), _repeated(v, op)
    if not _kernel(ctx, q):
        scores = _scores(q, k)
        lse = scores.logsumexp(-1)
        return (_flat(torch.matmul((scores - lse[..., None]).exp(), v)), lse)
    parts = [_flash(q, k[:, :, keys], v[:, :, keys], masked) for keys, masked in _tiles(op)]
    lse = torch.stack([part[1] for part in parts]).logsumexp(0)
    shares = [(part[1] - lse).exp()[..., None].to(q.dtype) for part in parts]
    out = sum(part[0] * share for part, share in zip(parts, shares, strict=True))
    assert isinstance(out, Tensor)
    return (_flat(out), lse)


def _flash(q: Tensor, k: Tensor, v: Tensor, masked: bool) -> tuple[Tensor, Tensor]:
    if q.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, masked)
    else:
        out, lse = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, masked)[:2]
    return out, lse


def _flash_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, masked: bool
) -> Sequence[Tensor]:
    if q.device.type == "cpu":
        found = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            do, q, k, v, o, lse, 0.0, masked
        )
    else:
        seed = torch.zeros((), dtype=torch.int64, device=q.device)
        found = aten._scaled_dot_product_flash_attention_backward(
            *(do, q, k, v, o, lse, None, None, q.shape[2], k.shape[2], 0.0, masked, seed, seed)
        )[:3]
    return tuple(found)


def _attention_rows_backward(ctx: Place, op: Op, reads: Results, outs: Outs) -> Results:
    """Add the gradients of the chunk's queries and of the keys and values that it read."""
    dy, packed, y, lse = reads[-4:]
    whole = reads[0] if len(reads) > 4 else torch.zeros_like(packed)
    q, k0, v0 = _operands(op, packed)
    k, v = _repeated(k0, op), _repeated(v0, op)
    shape = op.dims["b"], op.dims["s"], op.dims["h"], op.dims["d"]
    do, o = (x.view(shape).transpose(1, 2) for x in (dy, y))
    dq, dk, dv = _operands(op, whole)

    def add(target: Tensor, grad: Tensor) -> None:
        """Sum over the query heads that share a head of keys or values."""
        target += grad.reshape(*target.shape[:2], -1, *target.shape[2:]).sum(2)

    if not _kernel(ctx, q):
        p = (_scores(q, k) - lse[..., None]).exp()
        ds = p * (torch.matmul(do, v.transpose(-1, -2)) - (do * o).sum(-1, keepdim=True))
        ds = ds * float(q.shape[-1] ** -0.5)
        dq += torch.matmul(ds, k)
        add(dk, torch.matmul(ds.transpose(-1, -2), q))
        add(dv, torch.matmul(p.transpose(-1, -2), do))
        return (whole,)
    for keys, masked in _tiles(op):
        part = _flash_backward(do, q, k[:, :, keys], v[:, :, keys], o, lse, masked)
        dq += part[0]
        add(dk[:, :, keys], part[1])
        add(dv[:, :, keys], part[2])
    return (whole,)


def _offload(ctx: Place, op: Op, reads: Results, outs: Outs) -> Results:
    """Copy the first rows to the host's memory: a second buffer, where that is the device's."""
    rows = reads[0][: op.dims["t"]]
    return (torch.empty(rows.shape, dtype=rows.dtype, device="cpu").copy_(rows),)


def _fetch(ctx: Place, op: Op, reads: Results, outs: Outs) -> Results:
    """Copy rows from the host's memory into the first rows of a new buffer."""
    rows = reads[0]
    whole = torch.empty(
        (int(op.attrs["total"]), *rows.shape[1:]), dtype=rows.dtype, device=ctx.device
    )
    whole[: rows.shape[0]].copy_(rows)
    return (whole,)


def _release(ctx: Place, op: Op, reads: Results, outs: Outs) -> Results:
    return ()


STREAM_OPS: dict[str, Callable[..., Results]] = {
    "offload": _offload,
    "fetch": _fetch,
    "release": _release,
    "take_rows": _take_rows,
    "put_rows": _put_rows,
    "attention_rows": _attention_rows,
    "attention_rows_backward": _attention_rows_backward,
}

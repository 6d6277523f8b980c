"""The torch functions of linear attention: chunks, states, and what a state adds to a rank's rows.

The formulas are those of `simcore.linear`. Heads that share a KV head are stacked along the rows of
its products, so that gradients of keys and values come out summed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from simcore.linear import DECAYS
from simcore.ops import Op

Results = Sequence[Tensor]
Outs = Sequence[Tensor | None]


class Place(Protocol):
    """What these ops ask about their rank."""

    index: Callable[[str], int]


def _decay(ctx: Place, op: Op, like: Tensor) -> Tensor:
    """Return the decay of each of this tensor rank's KV heads, [hkv, 1, 1], in fp64."""
    heads, law = op.dims["hkv"], DECAYS[op.attrs["decay"]]
    first = ctx.index("tp") * heads
    found = [law(head) for head in range(first, first + heads)]
    return torch.tensor(found, dtype=torch.float64, device=like.device)[:, None, None]


def _wide(like: Tensor) -> torch.dtype:
    return torch.float64 if like.dtype == torch.float64 else torch.float32


def _powers(decay: Tensor, exponents: Tensor, like: Tensor) -> Tensor:
    """Return decay^exponents, [hkv, *exponents], in the dtype of ``like``."""
    return (decay.view(-1, *[1] * exponents.dim()) ** exponents).to(like.dtype)


def _split(op: Op, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return q [b, hkv, group, s, d], k and v [b, hkv, 1, s, d] of packed rows."""
    s = op.dims
    each = qkv.view(s["b"], s["s"], -1, s["d"]).transpose(1, 2)
    q, k, v = each.split([s["h"], s["hkv"], s["hkv"]], 1)
    q, k, v = (x.unflatten(1, (s["hkv"], -1)) for x in (q, k, v))
    return q, k, v


def _rows(x: Tensor) -> Tensor:
    """Return [b, hkv, group, s, d] as [b s, heads d]."""
    return x.flatten(1, 2).transpose(1, 2).flatten(2).flatten(0, 1).contiguous()


def _outputs(op: Op, y: Tensor) -> Tensor:
    """Return rows [b s, heads d] as [b, hkv, group, s, d]."""
    s = op.dims
    return y.view(s["b"], s["s"], s["hkv"], -1, s["d"]).permute(0, 2, 3, 1, 4)


def _chunks(op: Op, x: Tensor) -> Tensor:
    """Return [b, hkv, group, s, d] as [b, hkv, chunks, group c, d], the last chunk filled up."""
    c = op.dims["c"]
    x = functional.pad(x, (0, 0, 0, -x.shape[3] % c)).unflatten(3, (-1, c))
    return x.transpose(2, 3).flatten(3, 4)


def _unchunked(op: Op, x: Tensor) -> Tensor:
    """Return [b, hkv, chunks, group c, d] as [b, hkv, group, s, d]."""
    x = x.unflatten(3, (-1, op.dims["c"])).transpose(2, 3).flatten(3, 4)
    return x[:, :, :, : op.dims["s"]]


class _Decays:
    """Powers of the decay inside a chunk: before a row, behind a row, between two, and of all."""

    def __init__(self, ctx: Place, op: Op, like: Tensor) -> None:
        c, group = op.dims["c"], op.dims["h"] // op.dims["hkv"]
        decay = _decay(ctx, op, like)
        place = torch.arange(c, device=like.device)
        gaps = place[:, None] - place
        self.scale = float(op.dims["d"] ** -0.5)
        mask = _powers(decay, gaps.clamp(min=0), like).tril() * self.scale
        self.mask = mask.repeat(1, group, 1)[:, None]  # [hkv, 1, group c, c]
        before = _powers(decay, place + 1, like) * self.scale
        self.before = before.repeat(1, group)[:, None, :, None]
        self.behind = _powers(decay, c - 1 - place, like)[:, None, :, None]
        self.all = (decay**c).to(_wide(like))


def _states(added: Tensor, fade: Tensor, *, reverse: bool) -> Tensor:
    """Return for each chunk the faded sum of what those before it (or behind it) added.

    ``added``: [b, hkv, chunks, d, d] in the wide dtype.
    """
    found, total = torch.empty_like(added), torch.zeros_like(added[:, :, 0])
    chunks = range(added.shape[2])
    for i in reversed(chunks) if reverse else chunks:
        found[:, :, i] = total
        total = fade * total + added[:, :, i]
    return found


def _attention(ctx: Place, op: Op, reads: Results, outs: Outs) -> Results:
    """Return the outputs of a rank's rows as if none came before them."""
    q, k, v = (_chunks(op, x) for x in _split(op, reads[0]))
    decays = _Decays(ctx, op, q)
    added = torch.matmul((k * decays.behind).mT, v).to(_wide(q))
    state = _states(added, decays.all, reverse=False).to(q.dtype)
    within = torch.matmul(torch.matmul(q, k.mT) * decays.mask, v)
    return (_rows(_unchunked(op, within + torch.matmul(q * decays.before, state))),)


def _attention_backward(ctx: Place, op: Op, reads: Results, outs: Outs) -> Results:
    """Return the gradient of packed rows; states are computed again."""
    dy, qkv = _outputs(op, reads[0]), reads[1]
    q, k, v, do = (_chunks(op, x) for x in (*_split(op, qkv), dy))
    decays, wide = _Decays(ctx, op, q), _wide(q)
    faded_k, faded_q = k * decays.behind, q * decays.before
    added = torch.matmul(faded_k.mT, v).to(wide)
    state = _states(added, decays.all, reverse=False).to(q.dtype)
    wanted = torch.matmul(faded_q.mT, do).to(wide)
    ahead = _states(wanted, decays.all, reverse=True).to(q.dtype)
    scores = torch.matmul(q, k.mT) * decays.mask
    gradient = torch.matmul(do, v.mT) * decays.mask
    dq = torch.matmul(gradient, k) + torch.matmul(do, state.mT) * decays.before
    dk = torch.matmul(gradient.mT, q) + torch.matmul(v, ahead.mT) * decays.behind
    dv = torch.matmul(scores.mT, do) + torch.matmul(faded_k, ahead)
    return (torch.cat([_rows(_unchunked(op, x)) for x in (dq, dk, dv)], 1),)


def _behind(ctx: Place, op: Op, like: Tensor) -> Tensor:
    """Return g^(rows - 1 - j), [hkv, 1, s, 1]."""
    rows = torch.arange(op.dims["s"], device=like.device)
    return _powers(_decay(ctx, op, like), rows.flip(0), like)[:, None, :, None]


def _before(ctx: Place, op: Op, like: Tensor) -> Tensor:
    """Return d^(-1/2) g^(i + 1), [hkv, 1, s, 1]."""
    rows = torch.arange(op.dims["s"], device=like.device)
    found = _powers(_decay(ctx, op, like), rows + 1, like)[:, None, :, None]
    return found * float(op.dims["d"] ** -0.5)


def _state(ctx: Place, op: Op, reads: Results, outs: Outs) -> Results:
    """Return what a rank's rows add to the state, and by how much they fade what came."""
    _, k, v = _split(op, reads[0])
    state = torch.matmul((k * _behind(ctx, op, k)).mT, v).squeeze(2)
    fade = _decay(ctx, op, k).flatten() ** op.dims["s"]
    return (state.to(_wide(k)), fade.to(_wide(k)))


def _state_backward(ctx: Place, op: Op, reads: Results, outs: Outs) -> Results:
    """Return the gradients of keys and values from that of the state that they add to."""
    _, k, v = _split(op, reads[0])
    grad, behind = reads[1].to(k.dtype).unsqueeze(2), _behind(ctx, op, k)
    dk = torch.matmul(v, grad.mT) * behind
    dv = torch.matmul(k * behind, grad)
    return (torch.cat((_rows(dk), _rows(dv)), 1),)


def _carry(ctx: Place, op: Op, reads: Results, outs: Outs) -> Results:
    """Return the outputs with what the state before the rows adds."""
    local, qkv, state = reads
    q = _split(op, qkv)[0]
    stacked = (q * _before(ctx, op, q)).flatten(2, 3)
    added = torch.matmul(stacked, state.to(q.dtype)).view(q.shape)
    return (local + _rows(added),)


def _carry_backward(ctx: Place, op: Op, reads: Results, outs: Outs) -> Results:
    """Return the gradients of the state before the rows, and of the queries through it."""
    dy, qkv, state = reads
    q, do, before = _split(op, qkv)[0], _outputs(op, dy), _before(ctx, op, qkv)
    grad = torch.matmul((q * before).flatten(2, 3).mT, do.flatten(2, 3))
    dq = torch.matmul(do.flatten(2, 3), state.to(q.dtype).mT).view(q.shape) * before
    return (grad.to(_wide(q)), _rows(dq))


def _prefix(ctx: Place, op: Op, reads: Results, outs: Outs) -> Results:
    """Return the faded sum of the states of the ranks before this one, or behind it."""
    every, fade = reads
    states = every.unflatten(0, (op.dims["parts"], -1))
    place = ctx.index(op.attrs["axis"])
    nearer = range(op.dims["parts"] - 1, place, -1) if op.attrs["reverse"] else range(place)
    total = torch.zeros_like(states[0])
    for rank in nearer:
        total = fade[None, :, None, None] * total + states[rank]
    return (total,)


LINEAR_OPS: dict[str, Callable[..., Results]] = {
    "linear_attention": _attention,
    "linear_attention_backward": _attention_backward,
    "linear_state": _state,
    "linear_state_backward": _state_backward,
    "linear_carry": _carry,
    "linear_carry_backward": _carry_backward,
    "state_prefix": _prefix,
}

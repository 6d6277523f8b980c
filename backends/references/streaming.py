"""Backward of a layer and of the loss chunk by chunk of the sequence, with exact gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from backends.references.compare import same

Weights = dict[str, Tensor]


@dataclass(slots=True)
class Saved:
    """Bytes that autograd keeps, now and at most."""

    now: int = 0
    most: int = 0

    def pack(self, tensor: Tensor) -> tuple[Tensor, _Ticket]:
        """Count a tensor that is kept for a backward."""
        return tensor, _Ticket(self, tensor.numel() * tensor.element_size())

    @staticmethod
    def unpack(kept: tuple[Tensor, _Ticket]) -> Tensor:
        """Return what was kept."""
        return kept[0]


class _Ticket:
    """Counted from its making to its end."""

    def __init__(self, saved: Saved, size_bytes: int) -> None:
        self.saved, self.size_bytes = saved, size_bytes
        saved.now += size_bytes
        saved.most = max(saved.most, saved.now)

    def __del__(self) -> None:
        self.saved.now -= self.size_bytes


def weights(width: int, wide: int, vocab: int, seed: int = 0) -> Weights:
    """Return the weights of one layer and a head in float64."""
    random = torch.Generator().manual_seed(seed)
    shapes = {
        "q": (width, width), "k": (width, width), "v": (width, width), "o": (width, width),
        "up": (wide, width), "down": (width, wide), "head": (vocab, width),
    }  # fmt: skip
    return {
        name: (torch.randn(s, generator=random, dtype=torch.float64) / 4).requires_grad_()
        for name, s in shapes.items()
    }


def _rest(w: Weights, x: Tensor, k: Tensor, v: Tensor, targets: Tensor, start: int) -> Tensor:
    """Return the summed loss of the rows from ``start`` on, given all keys and values so far."""
    q = F.linear(x, w["q"])
    at = torch.arange(start, start + len(x))
    seen = at[:, None] >= torch.arange(len(k))[None]
    scores = (q @ k.mT / math.sqrt(k.shape[-1])).masked_fill(~seen, -torch.inf)
    h = x + F.linear(scores.softmax(-1) @ v, w["o"])
    h = h + F.linear(F.gelu(F.linear(h, w["up"])), w["down"])
    return F.cross_entropy(F.linear(h, w["head"]), targets, reduction="sum")


def _run(w: Weights, body: Callable[[], None]) -> tuple[dict[str, Tensor], int]:
    for tensor in w.values():
        tensor.grad = None
    saved = Saved()
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
        body()
    return {name: t.grad.clone() for name, t in w.items() if t.grad is not None}, saved.most


def whole(w: Weights, x: Tensor, targets: Tensor) -> tuple[dict[str, Tensor], int]:
    """Return gradients and peak saved bytes of one backward over all rows."""

    def body() -> None:
        k, v = F.linear(x, w["k"]), F.linear(x, w["v"])
        _rest(w, x, k, v, targets, 0).backward()

    return _run(w, body)


def streamed(
    w: Weights, x: Tensor, targets: Tensor, chunks: int, drop: int = 0
) -> tuple[dict[str, Tensor], int]:
    """Return the same from one backward per chunk (StreamBP, Luo et al. 2025).

    A chunk's rows read only keys up to their own; gradients of keys and values add up over the
    chunks. ``drop``: chunks left out at the end, the mutant.
    """
    with torch.no_grad():
        keys, values = F.linear(x, w["k"]), F.linear(x, w["v"])
    k, v = keys.requires_grad_(), values.requires_grad_()

    def body() -> None:
        size = len(x) // chunks
        for c in range(chunks - drop):
            rows = slice(c * size, (c + 1) * size)
            upto = (c + 1) * size
            _rest(w, x[rows], k[:upto], v[:upto], targets[rows], c * size).backward()
        assert k.grad is not None
        assert v.grad is not None
        F.linear(x, w["k"]).backward(k.grad)
        F.linear(x, w["v"]).backward(v.grad)

    return _run(w, body)


def streamed_equals_whole(chunks: int, drop: int = 0) -> tuple[bool, int, int]:
    """Return whether chunked gradients are exact, and peak saved bytes of whole and chunked."""
    random = torch.Generator().manual_seed(3)
    w = weights(8, 32, 64)
    x = torch.randn(64, 8, generator=random, dtype=torch.float64)
    targets = torch.randint(0, 64, (64,), generator=random)
    exact, most = whole(w, x, targets)
    found, least = streamed(w, x, targets, chunks, drop)
    return same([found[n] for n in exact], list(exact.values())), most, least


def swapped_equals_kept(share: float) -> bool:
    """Return whether gradients stay exact where a share of tokens is kept, the rest recomputed."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(16, 6, generator=random, dtype=torch.float64)
    w = torch.randn(6, 6, generator=random, dtype=torch.float64).requires_grad_()

    def part(rows: Tensor) -> Tensor:
        return F.gelu(rows @ w)

    cut = int(share * len(x))
    mixed = torch.cat((part(x[:cut]), checkpoint(part, x[cut:], use_reentrant=False)))
    grads = [torch.autograd.grad((y * y).sum(), w)[0] for y in (mixed, part(x))]
    return same(grads[:1], grads[1:])


def last_row_is_enough() -> bool:
    """Return whether the head on the last token gives the last row of all logits."""
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 8, generator=random, dtype=torch.float64)
    head = torch.randn(11, 8, generator=random, dtype=torch.float64)
    return same([hidden[-1] @ head.mT], [(hidden @ head.mT)[-1]])

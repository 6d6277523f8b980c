"""Associative scans over the first axis of tuples of tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch

from backends.mixers.count import Steps

Elements = tuple[torch.Tensor, ...]
Combine = Callable[[Elements, Elements], Elements]  # (earlier, later)


def doubling_scan(combine: Combine, elements: Elements, steps: Steps) -> Elements:
    """Return all prefixes by log2 n levels, each reaching twice as far back."""
    length = elements[0].shape[0]
    reach = 1
    while reach < length:
        steps.tick()
        merged = combine(tuple(e[:-reach] for e in elements), tuple(e[reach:] for e in elements))
        elements = tuple(torch.cat((e[:reach], m)) for e, m in zip(elements, merged, strict=True))
        reach *= 2
    return elements


def tree_scan(combine: Combine, elements: Elements, steps: Steps) -> Elements:
    """Return all prefixes with about two combines per element: pairs first, then the gaps."""
    length = elements[0].shape[0]
    if length == 1:
        return elements
    steps.tick()
    even, odd = (tuple(e[start::2] for e in elements) for start in (0, 1))
    pairs = combine(tuple(e[: length // 2] for e in even), odd)
    scanned = tree_scan(combine, pairs, steps)
    out = tuple(torch.empty_like(e) for e in elements)
    for target, first, done in zip(out, elements, scanned, strict=True):
        target[0] = first[0]
        target[1::2] = done
    gaps = (length - 1) // 2
    if gaps:
        steps.tick()
        filled = combine(tuple(s[:gaps] for s in scanned), tuple(e[1:] for e in even))
        for target, value in zip(out, filled, strict=True):
            target[2::2] = value
    return out


def affine(first: Elements, second: Elements) -> Elements:
    """Compose h -> a h + b with numbers ``a`` per element: (a2 a1, a2 b1 + b2)."""
    (a1, b1), (a2, b2) = first, second
    return a2 * a1, a2 * b1 + b2


def affine_matrix(first: Elements, second: Elements) -> Elements:
    """Compose h -> A h + b with matrices [..., n, n] and vectors [..., n]."""
    (a1, b1), (a2, b2) = first, second
    return a2 @ a1, (a2 @ b1.unsqueeze(-1)).squeeze(-1) + b2

"""Whether two ways of computing one function agree in outputs and in every gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

ABSOLUTE = 1e-9  # float64 sums of some hundred terms of order one, in another order


def tensors(
    heads: int = 4, kv_heads: int = 4, tokens: int = 16, width: int = 4
) -> tuple[Tensor, Tensor, Tensor]:
    """Return random queries, keys and values, [2, heads, tokens, width] in float64."""
    random = torch.Generator().manual_seed(2)
    q, k, v = (
        torch.randn(2, h, tokens, width, generator=random, dtype=torch.float64)
        for h in (heads, kv_heads, kv_heads)
    )
    return q, k, v


def same(found: Sequence[Tensor], wanted: Sequence[Tensor], atol: float = ABSOLUTE) -> bool:
    """Return whether two lists of tensors agree to ``atol``, one by one."""
    return all(torch.allclose(a, b, rtol=0, atol=atol) for a, b in zip(found, wanted, strict=True))


def gradients_agree(
    run: Callable[..., Tensor], reference: Callable[..., Tensor], leaves: Sequence[Tensor]
) -> bool:
    """Return whether ``run`` equals ``reference`` in its output and in the leaves' gradients."""
    found: list[tuple[Tensor, ...]] = []
    for function in (run, reference):
        inputs = [t.clone().requires_grad_() for t in leaves]
        out = function(*inputs)
        grads = torch.autograd.grad((out * out.detach().cos()).sum(), inputs)
        found.append((out.detach(), *grads))
    return same(found[0], found[1])

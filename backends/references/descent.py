"""Noisy descent."""

from __future__ import annotations

import torch


def steps_to_loss(batch: int, width: int, noise: float, seed: int, target: float = 0.1) -> int:
    """Return the SGD steps that a noisy quadratic needs to fall to ``target``, at its best rate.

    Gradients carry noise of variance ``noise`` / batch in each of ``width`` directions.
    """
    best = 10**6
    for rate in (0.5, 0.25, 0.12, 0.06, 0.03, 0.015, 0.008):
        random = torch.Generator().manual_seed(seed)
        w = torch.ones(256, width, dtype=torch.float64)  # 256 runs at once
        for step in range(1, min(best, 2000)):
            g = w + (noise / batch) ** 0.5 * torch.randn(w.shape, generator=random, dtype=w.dtype)
            w = w - rate * g
            if float((w * w).mean()) < target:
                best = step
                break
    return best

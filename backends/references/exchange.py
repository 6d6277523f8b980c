"""Small distributed steps: live paths, noisy descent."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from backends.references.compare import same


def batches(count: int, rows: int, width: int, seed: int = 1) -> Tensor:
    """Return ``count`` microbatches of inputs."""
    return torch.randn(
        count, rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def live_paths(inputs: Tensor, servers: int, churn: float, seed: int) -> tuple[Tensor, int, int]:
    """Send microbatches along random live servers of each stage, some of which vanish.

    Returns the summed gradient of every stage's weight, the microbatches done, and the repeated
    stage passes. A server that is gone is replaced by another of its stage (SWARM).
    """
    random = np.random.default_rng(seed)
    torch.manual_seed(0)
    stages = [torch.randn(4, 4, dtype=torch.float64).div(2).requires_grad_() for _ in range(3)]
    alive = np.ones((3, servers), dtype=bool)
    repeated = done = 0
    for sample in inputs:
        x = sample
        for stage, weight in enumerate(stages):
            while True:
                server = random.choice(np.flatnonzero(alive[stage]))
                if random.random() >= churn:
                    break
                repeated += 1
                if alive[stage].sum() > 1:
                    alive[stage, server] = False
            x = torch.tanh(F.linear(x, weight))
        (x * x).sum().backward()
        done += 1
        alive |= random.random(alive.shape) < churn  # newcomers take a stage
    return torch.stack([w.grad for w in stages if w.grad is not None]), done, repeated


def churn_changes_nothing(microbatches: int, servers: int, churn: float) -> tuple[bool, int, int]:
    """Return whether gradients under churn equal the calm ones, microbatches done, and repeats."""
    inputs = batches(microbatches, 3, 4)
    still, done, _ = live_paths(inputs, servers, 0.0, 0)
    lost, finished, repeated = live_paths(inputs, servers, churn, 0)
    return same([still], [lost]) and done == finished, finished, repeated


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

"""Loops around a network: reservoirs, step caches, and updates that come too late."""

from __future__ import annotations

import math

import torch


def reservoir_rate(
    produce: int, link: int, consume: int, *, places: int = 64, rounds: int = 50
) -> float:
    """Return samples per round that a consumer gets from a reservoir fed over a link.

    A round makes at most ``produce`` samples and moves at most ``link`` of them to free places;
    then ``consume`` random ones are drawn (and leave).
    """
    reservoir, done, made = torch.zeros(0), 0, 0
    for _ in range(rounds):
        fresh = min(produce, link, places - len(reservoir))
        reservoir = torch.cat((reservoir, torch.arange(made, made + fresh).float()))
        made += fresh
        take = min(consume, len(reservoir))
        order = torch.randperm(len(reservoir), generator=torch.Generator().manual_seed(made))
        reservoir, done = reservoir[order[take:]], done + take
    return done / rounds


def cached_denoising(skipped: float, steps: int = 50) -> tuple[float, bool]:
    """Return all steps over those computed, and whether a cache that skips none is exact.

    A skipped step adds the residual of the last computed one.
    """
    random = torch.Generator().manual_seed(0)
    w = torch.randn(8, 8, generator=random, dtype=torch.float64) / 8
    start = torch.randn(4, 8, generator=random, dtype=torch.float64)

    def run(share: float) -> tuple[torch.Tensor, int]:
        x, kept, full = start, torch.zeros_like(start), 0
        for i in range(steps):
            before, after = (math.floor(j * (1 - share) + 1e-9) for j in (i, i + 1))
            if after > before or not i:
                kept, full = torch.tanh(x @ w), full + 1
            x = x + kept / steps
        return x, full

    plain = start
    for _ in range(steps):
        plain = plain + torch.tanh(plain @ w) / steps
    exact, every = run(0.0)
    return every / run(skipped)[1], torch.equal(exact, plain)

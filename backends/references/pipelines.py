"""A pipeline's actions executed in a given order on a small network, with autograd."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from backends.references.compare import same


@dataclass(frozen=True, slots=True)
class Played:
    """Gradients by parameter, the summed loss, and the most activations alive at once."""

    loss: float
    gradients: tuple[Tensor, ...]
    most_alive: int
    boundary_bytes: int


def network(stages: int, width: int, seed: int = 0) -> nn.ModuleList:
    """Return the stages of a small network in float64."""
    torch.manual_seed(seed)
    return nn.ModuleList(
        nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(stages)
    ).double()


def batches(count: int, rows: int, width: int, seed: int = 1) -> Tensor:
    """Return ``count`` microbatches of inputs."""
    return torch.randn(
        count, rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def undivided(stages: nn.ModuleList, inputs: Tensor) -> Played:
    """Return loss and gradients of the whole network on the whole batch."""
    stages.zero_grad()
    x = inputs
    for stage in stages:
        x = stage(x)
    loss = (x * x).sum()
    loss.backward()
    return Played(float(loss.detach()), _gradients(stages), 0, 0)


def _gradients(stages: nn.ModuleList) -> tuple[Tensor, ...]:
    return tuple(p.grad.clone() for p in stages.parameters() if p.grad is not None)


def play(
    stages: nn.ModuleList,
    inputs: Tensor,
    actions: Iterable[tuple[int, str, int]],
    home: Mapping[tuple[int, int], int],
) -> Played:
    """Run (stage, "F" or "B", microbatch) in the given order; ``home``: the rank of each stage.

    Only the detached boundary passes between stages; it counts where two ranks hold them. An
    action whose input is not there raises KeyError: the order is not legal.
    """
    stages.zero_grad()
    arrived = {(0, m): x.clone() for m, x in enumerate(inputs)}
    gradients: dict[tuple[int, int], Tensor] = {}
    alive: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    loss, most, moved = 0.0, 0, 0
    last = len(stages) - 1
    for stage, kind, m in actions:
        if kind == "F":
            x = arrived.pop((stage, m)).requires_grad_()
            y = stages[stage](x)
            alive[stage, m] = x, y
            most = max(most, len(alive))
            if stage < last:
                arrived[stage + 1, m] = y.detach().clone()
                crossing = home[stage, m] != home[stage + 1, m]
                moved += crossing * y.numel() * y.element_size()
        else:
            x, y = alive.pop((stage, m))
            if stage == last:
                value = (y * y).sum()
                loss += float(value.detach())
                value.backward()
            else:
                y.backward(gradients.pop((stage, m)))
            if stage:
                assert x.grad is not None
                gradients[stage - 1, m] = x.grad
                crossing = home[stage, m] != home[stage - 1, m]
                moved += crossing * x.numel() * x.element_size()
    return Played(loss, _gradients(stages), most, moved)


@dataclass(frozen=True, slots=True)
class Streamed:
    """Flush-free training: updates between a sample's forward and backward, and busy ticks."""

    delays: tuple[tuple[int, ...], ...]  # per stage, per sample
    utilisation: float  # busy slots over all slots
    steady_utilisation: float  # while no stage fills or drains
    gradients: tuple[Tensor, ...]  # summed


def flush_free(stages: nn.ModuleList, inputs: Tensor, rate: float, lag: int = 0) -> Streamed:
    """Pipelined backpropagation: in a tick every stage does one forward and one backward.

    Stage s of P runs sample i forward in tick i + s and backward in tick i + 2 (P - 1) - s, then
    updates by ``rate`` times the gradient. ``lag``: ticks by which backwards come late.
    """
    count, samples = len(stages), len(inputs)
    versions = [0] * count
    seen: list[dict[int, int]] = [{} for _ in range(count)]
    delays: list[list[int]] = [[] for _ in range(count)]
    alive: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    arrived = {(0, m): x.clone() for m, x in enumerate(inputs)}
    gradients: dict[tuple[int, int], Tensor] = {}
    sums = [torch.zeros_like(p) for p in stages.parameters()]
    first = [sum(1 for _ in stages[:s].parameters()) for s in range(count)]
    ticks = samples + 2 * (count - 1) + lag
    busy, steady, window = 0, 0, range(2 * (count - 1) + lag, samples)
    for tick in range(ticks):
        for s in range(count):  # forwards see the weights before this tick's updates
            m = tick - s
            if 0 <= m < samples:
                x = arrived.pop((s, m)).requires_grad_()
                weights = [p.detach().clone().requires_grad_() for p in stages[s].parameters()]
                y = torch.tanh(nn.functional.linear(x, *weights))
                alive[s, m] = x, y
                seen[s][m] = versions[s]
                if s < count - 1:
                    arrived[s + 1, m] = y.detach().clone()
                busy += 1
                steady += tick in window
                arrived[-1 - s, m] = weights[0]  # the stashed version that its backward needs
                arrived[-1 - s - count, m] = weights[1]
        for s in reversed(range(count)):
            m = tick - 2 * (count - 1) + s - (lag if s < count - 1 else 0)
            if 0 <= m < samples:
                x, y = alive.pop((s, m))
                weights = [arrived.pop((-1 - s, m)), arrived.pop((-1 - s - count, m))]
                out = 2 * y.detach() if s == count - 1 else gradients.pop((s, m))
                found = torch.autograd.grad(y, (x, *weights), out)
                gradients[s - 1, m] = found[0]
                delays[s].append(versions[s] - seen[s][m])
                versions[s] += 1
                with torch.no_grad():
                    for i, (p, g) in enumerate(zip(stages[s].parameters(), found[1:], strict=True)):
                        sums[first[s] + i] += g
                        p.sub_(rate * g)
                busy += 1
                steady += tick in window
    slots = 2 * count
    return Streamed(
        tuple(tuple(d) for d in delays),
        busy / (slots * ticks),
        steady / (slots * len(window)) if window else 0.0,
        tuple(sums),
    )


def unhurried_equals_undivided(stages: int, width: int, samples: int = 16) -> bool:
    """Return whether flush-free gradients at rate nought are the undivided network's."""
    fixed, inputs = network(stages, width), batches(samples, 1, width)
    whole = undivided(fixed, inputs)
    return same(flush_free(fixed, inputs, 0.0).gradients, whole.gradients)

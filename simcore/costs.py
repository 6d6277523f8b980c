"""What the estimator and the engine ask of hardware: two protocols that `hwmodels` implements."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from simcore.ops import Op, Size


class CostModel(Protocol):
    """Seconds of ops on one rank of a mesh."""

    @property
    def synchronous(self) -> bool:
        """Whether the host runs compute itself (a CPU) rather than launching it ahead."""
        ...

    def seconds(self, op: Op) -> Size:
        """Return how long ``op`` occupies its stream; never negative, vectorised over dims.

        Not asked of ``send`` and ``recv``, whose time belongs to the `Network`.
        """
        ...

    def issue_seconds(self, op: Op) -> Size:
        """Return how long the host is busy to start ``op``."""
        ...

    def blocking_share(self, op: Op) -> float:
        """Return the share of a communication's time in which its rank cannot compute, 0 to 1."""
        ...

    def slowdown(self, op: Op, beside: Op) -> Size:
        """Return how many times longer ``op`` takes while the collective ``beside`` runs, 1 up."""
        ...

    def pass_overhead_seconds(self, sequences: Size) -> Size:
        """Return the seconds of software that a pass over ``sequences`` adds to its ops."""
        ...

    def uncertainty(self, op: Op) -> tuple[str, Size]:
        """Return which measurements ``op``'s seconds rest on and their standard deviation.

        The deviation is that of log(real / predicted).
        """
        ...


class Network(Protocol):
    """Flows between ranks."""

    def path(self, src: int, dst: int) -> Sequence[int]:
        """Return the links that a message crosses."""
        ...

    def latency(self, path: Sequence[int]) -> float:
        """Return the seconds before the first byte arrives, software included."""
        ...

    def rates(self, paths: Sequence[Sequence[int]]) -> Sequence[float]:
        """Return the bytes per second of every flow when all run together."""
        ...


def transfer_seconds(network: Network, src: int, dst: int, size_bytes: float) -> float:
    """Return the seconds of one message that has every link to itself."""
    path = network.path(src, dst)
    if not path:
        return 0.0
    return network.latency(path) + size_bytes / float(network.rates([path])[0])


class Pricing(CostModel, Network, Protocol):
    """Both, for one mesh."""


CostOf = Callable[[Mapping[str, int]], Pricing]  # mesh -> what prices it

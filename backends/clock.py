"""When things happened on a device: marks are taken while running and turned to seconds after."""

from __future__ import annotations

import time
from typing import Any

import torch

Mark = Any


class HostClock:
    """A device that computes in the thread that issues: the host's own clock."""

    def mark(self) -> Mark:
        """Return a mark of now."""
        return time.perf_counter()

    def seconds(self, start: Mark, end: Mark) -> float:
        """Return the seconds between two marks."""
        return float(end - start)

    def settle(self) -> None:
        """Return once the device is idle."""


class CudaClock:
    """A device that computes behind the host: events on its current stream."""

    def mark(self) -> Mark:
        """Return a mark of now."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Mark, end: Mark) -> float:
        """Return the seconds between two marks; the device must be idle."""
        return float(start.elapsed_time(end)) / 1e3

    def settle(self) -> None:
        """Return once the device is idle."""
        torch.cuda.synchronize()


Clock = HostClock | CudaClock


def clock_of(device: torch.device) -> Clock:
    """Return the clock of ``device``."""
    return CudaClock() if device.type == "cuda" else HostClock()

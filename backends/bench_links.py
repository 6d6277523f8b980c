"""What ranks do to one another: collectives, messages, the processor time they take, and peaks.

All ranks of the machine communicate at the same time, in groups of every size that divides their
number, as they do in a step.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from backends.transport import Distributed, Handle

SIZES = tuple(4**i for i in range(4, 13))  # bytes
OVERLAPPED = 2**20  # bytes
SAMPLE_S = 0.02
TOGETHER = "tp"  # the axis of the groups that are measured


def groups(rank: int, ranks: int, degree: int) -> Distributed:
    """Return a transport whose groups hold ``degree`` neighbouring ranks each."""
    mesh = {"pp": 1, "dp_replicate": ranks // degree, "dp_shard": 1, "cp": 1, TOGETHER: degree}
    return Distributed(mesh, rank, {TOGETHER})


def degrees(ranks: int) -> list[int]:
    """Return the sizes above 1 of equal groups of so many ranks."""
    return [degree for degree in range(2, ranks + 1) if ranks % degree == 0]


def _calls(transport: Distributed, size: int, degree: int) -> dict[str, Callable[[], Handle]]:
    """Return every collective on ``size`` bytes, by the name that prices it."""
    whole, other = torch.ones(size // 4), torch.empty(size // 4)
    part = torch.ones(size // 4 // degree)
    return {
        "all_reduce": partial(transport.all_reduce, whole, TOGETHER),
        "all_gather": partial(transport.all_gather, whole, part, TOGETHER),
        "reduce_scatter": partial(transport.reduce_scatter, part, whole, TOGETHER),
        "all_to_all": partial(transport.all_to_all, other, whole, TOGETHER),
        "send_recv": partial(transport.ring_shift, other, whole, TOGETHER),
    }


def measure_collectives(rank: int, ranks: int) -> list[dict[str, Any]]:
    """Return seconds of every collective by size; each is waited for at once."""
    found = []
    for degree in degrees(ranks):
        transport = groups(rank, ranks, degree)
        for size in SIZES:
            for kind, call in _calls(transport, size, degree).items():
                seconds = _time_rounds(partial(_complete, call), rounds_of(size), samples=1)
                found.append({"op": kind, "bytes": size, "ranks": degree, "samples": seconds})
        transport.close()
    return found


def rounds_of(size: int) -> int:
    """Return how often a communication of so many bytes is repeated."""
    return max(3, min(50, int(SAMPLE_S / (2e-4 + size / 1e9))))


def _complete(call: Callable[[], Handle]) -> None:
    call().wait()


def _time_rounds(call: Callable[[], Any], rounds: int, samples: int = 5) -> list[float]:
    call()
    found = []
    for _ in range(samples):
        dist.barrier()
        start = time.perf_counter()
        for _ in range(rounds):
            call()
        found.append((time.perf_counter() - start) / rounds)
    return found


def measure_messages(rank: int) -> list[dict[str, Any]]:
    """Return seconds of one message between neighbouring ranks, from ping-pongs of all pairs."""
    found = []
    peer = rank ^ 1
    for size in SIZES:
        buffer = torch.ones(size // 4)

        def ping_pong(buffer: torch.Tensor = buffer) -> None:
            for turn in (0, 1):
                if rank % 2 == turn:
                    dist.send(buffer, peer)
                else:
                    dist.recv(buffer, peer)

        samples = [s / 2 for s in _time_rounds(ping_pong, rounds_of(size), samples=1)]
        found.append({"bytes": size, "samples": samples})
    return found


def measure_overlap(rank: int, ranks: int) -> dict[str, float]:
    """Return the seconds of an all-reduce, and the processor time that all its threads take."""
    transport = groups(rank, ranks, ranks)
    payload = torch.ones(OVERLAPPED // 4)
    call = partial(_complete, partial(transport.all_reduce, payload, TOGETHER))
    seconds, busy, rounds = [], [], rounds_of(OVERLAPPED)
    for _ in range(5):
        before = time.process_time()
        seconds += _time_rounds(call, rounds, samples=1)
        busy.append((time.process_time() - before) / (rounds + 1))
    transport.close()
    return {"seconds": min(seconds), "processor_s": min(busy)}


def measure_issue(rank: int, ranks: int) -> float:
    """Return the host's seconds to start a communication."""
    payload, transport = torch.ones(256), groups(rank, ranks, ranks)
    found = []
    for _ in range(50):
        start = time.perf_counter()
        handle = transport.all_reduce(payload, TOGETHER)
        found.append(time.perf_counter() - start)
        handle.wait()
    transport.close()
    return statistics.median(found)


def measure_peaks(meet: Callable[[], None]) -> dict[str, float]:
    """Return the best rate of a large product (FLOP/s) and of a large copy (bytes/s)."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    source = torch.randn(1 << 24)
    target = torch.empty_like(source)

    def best(call: Callable[[], Any]) -> float:
        meet()
        seconds = []
        for _ in range(5):
            start = time.thread_time()
            call()
            seconds.append(time.thread_time() - start)
        return min(seconds)

    return {
        "flops_per_s": 2 * 1024**3 / best(lambda: torch.mm(a, b)),
        "bytes_per_s": 2 * source.numel() * 4 / best(lambda: target.copy_(source)),
    }

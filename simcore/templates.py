"""The time inside an action: its ops laid on streams once, then reused wherever it runs.

An op starts when the host has issued it, its stream is free, and the buffers that it reads have
been written. This is the longest path through the body, in issue order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from simcore.costs import CostModel
from simcore.liveness import positions
from simcore.ops import COMPUTE, Op, Size, work
from simcore.program import Key, Program
from simcore.timeline import Span, length, uncovered, union

WAITS = ("send", "recv")


@dataclass(frozen=True, slots=True)
class Template:
    """A body laid on streams, relative to its start.

    ``ends``: when each stream is done; ``compute_end_s``: when the next action may compute.
    ``compute_s`` and ``exposed_s``: seconds of compute, and of communication that none hides.
    """

    compute_end_s: Size
    ends: dict[str, Size]
    compute_s: Size
    serial_s: Size  # every op after the other
    exposed_s: float
    spans: tuple[Span, ...]


def lay(program: Program, body: str, cost: CostModel, *, spans: bool = True) -> Template:
    """Return the template of a body without sends and receives.

    With ``spans`` false the dims may be arrays: every time is then an array over candidates.
    """
    host: Size = 0.0
    free: dict[str, Size] = {COMPUTE: 0.0}
    ready: dict[Key, Size] = {}
    laid: list[Span] = []
    computing: Size = 0.0
    serial: Size = 0.0
    prices: dict[tuple[str, int], tuple[Size, Size, float]] = {}
    for (number, index), layer, op in positions(program, body):
        block = program.bodies[body][number].block
        if (block, index) not in prices:
            prices[block, index] = price(op, cost)
        seconds, issue, blocking = prices[block, index]
        host = host + issue
        start = np.maximum(host, free.get(op.stream, 0.0)) if not spans else max(
            host, free.get(op.stream, 0.0)
        )
        for name in op.reads:
            known = ready.get(program.key(name, layer, 0))
            if known is not None:
                start = max(start, known) if spans else np.maximum(start, known)
        end = start + seconds
        free[op.stream] = end
        serial = serial + issue + seconds
        if op.stream == COMPUTE:
            computing = computing + seconds
            host = end if cost.synchronous else host
        elif blocking:
            host = start + blocking * seconds
            free[COMPUTE] = host if not spans else max(free[COMPUTE], host)
        for name in op.writes:
            ready[program.key(name, layer, 0)] = end
        if spans and op.kind != "alias":
            done = work(op)
            laid.append(Span(0, op.stream, op.kind, float(start), float(end), body,
                             float(done.payload_bytes), float(done.flops)))
    compute_end = host if cost.synchronous else free[COMPUTE]
    return Template(compute_end, free, computing, serial,
                    _exposed(laid) if spans else 0.0, tuple(laid))


def price(op: Op, cost: CostModel) -> tuple[Size, Size, float]:
    """Return (seconds, issue seconds, blocking share) of an op that is not a message."""
    if op.kind in WAITS:
        return 0.0, cost.issue_seconds(op), 0.0
    return cost.seconds(op), cost.issue_seconds(op), (
        cost.blocking_share(op) if op.is_communication else 0.0
    )


def _exposed(spans: list[Span]) -> float:
    busy = union((s.start_s, s.end_s) for s in spans if s.stream == COMPUTE)
    talk = union((s.start_s, s.end_s) for s in spans if s.stream != COMPUTE)
    return uncovered(talk, busy) if length(talk) else 0.0

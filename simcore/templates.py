"""The time inside an action: its ops laid on streams once, then reused wherever it runs.

An op starts when the host has issued it, its stream is free, and the buffers that it reads have
been written. Only maxima and sums occur, so whatever an action does to its rank is linear in the
max-plus algebra (Baccelli et al. 1992, Synchronization and Linearity, chapter 2): each time after
it is the largest of the times before it, each plus a delay. A `Template` is that matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce

import numpy as np

from simcore.costs import CostModel
from simcore.linear import SCAN, behind
from simcore.ops import COMPUTE, Op, Size
from simcore.program import Action, Call, Key, Program
from simcore.ring import STREAM
from simcore.timeline import RankTimes, uncovered, union

HOST = "host"
MESSAGES = ("send", "recv")
Entry = str | Key  # what has a time: the host, a stream that gets free, a buffer that is written
Row = dict[Entry, Size]  # the largest of these entries' times plus their delays
Larger = Callable[[Size, Size], Size]


@dataclass(frozen=True, slots=True)
class Template:
    """What a body does to its rank, whenever it starts.

    Row r is the largest of inputs[i] + delay over its (i, delay). All else names rows by number.
    ``after``: for each stream that it uses and each buffer that others wait for, the time after.
    ``segments``: start, end and seconds of runs of compute that wait for nothing from outside once
    they have started. ``leads``: stream, start and end of communication issued before any compute.
    ``busy``: seconds of work per stream. ``layer`` is added to the layers of all buffers.
    """

    inputs: tuple[Entry, ...]
    rows: tuple[tuple[tuple[int, Size], ...], ...]
    after: tuple[tuple[Entry, int], ...]
    segments: tuple[tuple[int, int, Size], ...]
    leads: tuple[tuple[str, int, int], ...]
    busy: dict[str, Size]
    compute_s: Size
    communication_s: Size  # hidden or not
    serial_s: Size  # every op after the other
    layer: int = 0

    @property
    def issue_s(self) -> float | None:
        """Seconds of the host on it; None where the host waits for anything."""
        row = next((row for entry, row in self.after if entry == HOST), None)
        parts = [] if row is None else self.rows[row]
        if any(self.inputs[number] != HOST for number, _ in parts):
            return None
        return sum(float(delay) for _, delay in parts)

    @property
    def elapsed_s(self) -> Size:
        """Seconds until everything is done, on a rank that was idle."""
        delays = (delay for _, row in self.after for _, delay in self.rows[row])
        return reduce(np.maximum, delays, 0.0)


@dataclass(frozen=True, slots=True)
class _Step:
    """An op of a body with its price."""

    stream: str
    seconds: Size
    issue: Size
    blocking: float
    reads: tuple[Key, ...]
    writes: tuple[Key, ...]
    op: Op


def price(op: Op, cost: CostModel) -> tuple[Size, Size, float]:
    """Return (seconds, issue seconds, blocking share) of an op; a message's seconds are 0."""
    if op.kind in MESSAGES:
        return 0.0, cost.issue_seconds(op), 0.0
    return (
        cost.seconds(op),
        cost.issue_seconds(op),
        (cost.blocking_share(op) if op.is_communication else 0.0),
    )


class Workbench:
    """Lays the bodies of one program; every op of a block is priced once.

    Compute issued behind a collective, and before anything that reads its result, runs beside it
    for as long as the collective takes, and more slowly: the two share the chip's units and memory.
    """

    def __init__(self, program: Program, cost: CostModel) -> None:
        self.program, self.cost = program, cost
        self.priced: dict[str, list[_Step]] = {}
        self.placed: dict[Call, list[_Step]] = {}
        self.factors: dict[tuple[int, int], Size] = {}
        self.host: Row = {HOST: 0.0} if _host_matters(program, cost) else {}

    def steps(self, calls: Iterable[Call]) -> list[_Step]:
        """Return the ops of ``calls`` in issue order, for microbatch 0."""
        found: list[_Step] = []
        for call in calls:
            if call not in self.placed:
                self.placed[call] = self._place(call)
            found += self.placed[call]
        return self._shared(self._staggered(found))

    def _staggered(self, steps: list[_Step]) -> list[_Step]:
        """Return the steps with scans short that follow others the same way.

        The first one staggers the ranks, until they meet again.
        """
        group, way, found = "", None, []
        for step in steps:
            if step.op.kind == SCAN:
                mine = step.op.group, step.op.attrs["reverse"]
                if mine == (group, way):
                    step = replace(  # noqa: PLW2901
                        step, seconds=_plain(self.cost.seconds(behind(step.op)))
                    )
                group, way = mine
            elif group in step.op.group.split("*") and (
                self.cost.synchronous or step.stream == STREAM
            ):  # a host that launches ahead waits for nothing but what the layer itself reads
                group = ""
            found.append(step)
        return found

    def _shared(self, steps: list[_Step]) -> list[_Step]:
        """Return the steps with compute stretched where collectives run beside it."""
        beside: dict[str, tuple[_Step, Size]] = {}  # stream -> its collective, seconds still to run
        found = []
        for step in steps:
            if step.stream != COMPUTE:
                if step.op.is_communication and step.op.kind not in MESSAGES:
                    beside[step.stream] = step, step.seconds
                found.append(step)
                continue
            for stream, (other, left) in list(beside.items()):
                if not set(step.reads).isdisjoint(other.writes):
                    del beside[stream]
                    continue
                factor = self._factor(step.op, other.op)
                if isinstance(factor, float) and factor == 1.0:
                    continue
                longer = _plain(
                    np.minimum(factor * step.seconds, step.seconds + left * (1 - 1 / factor))
                )
                beside[stream] = other, _plain(np.maximum(left - longer, 0.0))
                step = replace(step, seconds=longer)  # noqa: PLW2901
            found.append(step)
        return found

    def _factor(self, op: Op, beside: Op) -> Size:
        key = id(op), id(beside)
        if key not in self.factors:
            self.factors[key] = _plain(self.cost.slowdown(op, beside))
        return self.factors[key]

    def _place(self, call: Call) -> list[_Step]:
        def keys(relative: tuple[Key, ...]) -> tuple[Key, ...]:
            return tuple((n, x if x < 0 else x + call.layer, m) for n, x, m in relative)

        if call.block not in self.priced:
            self.priced[call.block] = [self._step(op) for op in self.program.blocks[call.block].ops]
        return [
            replace(s, reads=keys(s.reads), writes=keys(s.writes)) for s in self.priced[call.block]
        ]

    def _step(self, op: Op) -> _Step:
        reads, writes = (
            tuple(self.program.key(name, 0, 0) for name in names) for names in (op.reads, op.writes)
        )
        seconds, issue, blocking = price(op, self.cost)
        return _Step(op.stream, _plain(seconds), _plain(issue), blocking, reads, writes, op)

    def lay(self, steps: Sequence[_Step], waits: Iterable[Key], told: Iterable[Key]) -> Template:
        """Return the template of ``steps``, which waits for ``waits`` and whose ``told`` matter."""
        larger: Larger = max if all(isinstance(s.seconds, float) for s in steps) else np.maximum
        host = self.host
        free: dict[str, Row] = {}
        ready: dict[Key, tuple[str, Row]] = {key: ("", {key: 0.0}) for key in waits}
        outside = set(ready)
        segments: list[tuple[Row, Row, Size]] = []
        leads: list[tuple[str, Row, Row]] = []
        busy: dict[str, Size] = {}
        serial: Size = 0.0
        for step in steps:
            stream, seconds = step.stream, step.seconds
            if not isinstance(step.issue, float) or step.issue:
                host = _later(host, step.issue)
            start = _latest(host, free.get(stream) or {stream: 0.0}, larger)
            for key in step.reads:
                known = ready.get(key)
                if known is not None and known[0] != stream:
                    start = _latest(start, known[1], larger)
            end = free[stream] = _later(start, seconds)
            busy[stream] = busy.get(stream, 0.0) + seconds
            serial = serial + step.issue + seconds
            if stream == COMPUTE:
                host = end if self.cost.synchronous else host
                if segments and outside.isdisjoint(step.reads):
                    segments[-1] = segments[-1][0], end, segments[-1][2] + seconds
                else:
                    segments.append((start, end, seconds))
                outside.difference_update(step.reads)
            else:
                if not segments:
                    leads.append((stream, start, end))
                if step.blocking:
                    host = _later(start, step.blocking * seconds)
            for key in step.writes:
                ready[key] = stream, end
                outside.discard(key)
        after: dict[Entry, Row] = {}
        after.update(free)
        after.update((key, ready[key][1]) for key in told)
        if host:
            after[HOST] = host
        return _numbered(after, segments, leads, busy, serial)


def _numbered(
    after: Mapping[Entry, Row],
    segments: Sequence[tuple[Row, Row, Size]],
    leads: Sequence[tuple[str, Row, Row]],
    busy: dict[str, Size],
    serial: Size,
) -> Template:
    """Return the template with its inputs and its rows, each once, by number."""
    inputs: dict[Entry, int] = {}
    rows: dict[int, tuple[int, Row]] = {}

    def number(row: Row) -> int:
        for entry in row:
            inputs.setdefault(entry, len(inputs))
        return rows.setdefault(id(row), (len(rows), row))[0]

    ends = tuple((entry, number(row)) for entry, row in after.items())
    parts = tuple((number(a), number(b), seconds) for a, b, seconds in segments)
    ahead = tuple((stream, number(a), number(b)) for stream, a, b in leads)
    listed = tuple(
        tuple((inputs[e], delay) for e, delay in row.items()) for _, row in rows.values()
    )
    compute = busy.get(COMPUTE, 0.0)
    talk: Size = sum(seconds for stream, seconds in busy.items() if stream != COMPUTE)
    return Template(tuple(inputs), listed, ends, parts, ahead, busy, compute, talk, serial)


def _host_matters(program: Program, cost: CostModel) -> bool:
    """Return whether the host is ever busy; one that never is issues everything at once."""
    return cost.synchronous or any(
        np.any(cost.issue_seconds(op)) or (op.is_communication and cost.blocking_share(op))
        for block in program.blocks.values()
        for op in block.ops
    )


def _plain(size: Size) -> Size:
    """Return a scalar as a Python number, which adds faster than numpy's."""
    return float(size) if np.ndim(size) == 0 else size


def _later(row: Row, seconds: Size) -> Row:
    return {entry: delay + seconds for entry, delay in row.items()}


def _latest(left: Row, right: Row, larger: Larger) -> Row:
    found = dict(left)
    for entry, delay in right.items():
        found[entry] = larger(found[entry], delay) if entry in found else delay
    return found


def lay(program: Program, body: str, cost: CostModel) -> Template:
    """Return the template of one body on its own.

    The dims of its ops may be arrays: every time is then an array over candidates.
    """
    bench = Workbench(program, cost)
    return bench.lay(bench.steps(program.bodies[body]), (), ())


# -- what crosses from one action to another -------------------------------------------------------


def _crossings(steps: Iterable[_Step]) -> tuple[dict[Key, set[str]], dict[Key, set[str]]]:
    """Return the streams that read a buffer from before, and those that know of one written."""
    before: dict[Key, set[str]] = {}
    written: dict[Key, set[str]] = {}
    for step in steps:
        for key in step.reads:
            (written if key in written else before).setdefault(key, set()).add(step.stream)
        for key in step.writes:
            written[key] = {step.stream}
    return before, written


Shape = tuple[tuple[str, tuple[Call, ...], tuple[str, ...]], ...]


def _shape(program: Program, stage: int, actions: Sequence[Action]) -> tuple[int, Shape]:
    """Return a stage's first layer, and per kind its calls from there and the kinds before it."""
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for index, action in enumerate(actions):
        if action.stage == stage:
            first.setdefault(action.kind, index)
            last[action.kind] = index
    bodies = {kind: program.bodies[f"{stage}{kind}"] for kind in first}
    low = min((call.layer for calls in bodies.values() for call in calls), default=0)
    return low, tuple(
        (
            kind,
            tuple(Call(call.block, call.layer - low) for call in calls),
            tuple(other for other in first if first[other] < last[kind]),
        )
        for kind, calls in bodies.items()
    )


def _lay_stage(bench: Workbench, shape: Shape) -> dict[str, Template]:
    """Return the templates of a stage's kinds.

    A buffer is followed where a stream reads it that did not come after its writer in an earlier
    action.
    """
    steps = {kind: bench.steps(calls) for kind, calls, _ in shape}
    crossing = {kind: _crossings(found) for kind, found in steps.items()}
    waits: dict[str, dict[Key, None]] = {kind: {} for kind in steps}
    told: dict[str, dict[Key, None]] = {kind: {} for kind in steps}
    for kind, _, earlier in shape:
        for key, streams in crossing[kind][0].items():
            for other in earlier:
                known = crossing[other][1].get(key)
                if known is not None and streams - known:
                    waits[kind][key] = told[other][key] = None
    return {kind: bench.lay(steps[kind], waits[kind], told[kind]) for kind in steps}


def templates(program: Program, cost: CostModel) -> dict[str, Template]:
    """Return the template of every body in the order; stages of one shape are laid once."""
    bench = Workbench(program, cost)
    laid: dict[Shape, dict[str, Template]] = {}
    found: dict[str, Template] = {}
    for stage, rank in enumerate(program.stage_rank):
        low, shape = _shape(program, stage, program.order[rank])
        if shape not in laid:
            laid[shape] = _lay_stage(bench, shape)
        found |= {f"{stage}{kind}": replace(t, layer=low) for kind, t in laid[shape].items()}
    return found


# -- running actions -------------------------------------------------------------------------------


@dataclass(slots=True)
class Clock:
    """How far one rank has come: a time for every entry, `math.inf` while it is unknown."""

    at: dict[Entry, float] = field(default_factory=lambda: {HOST: 0.0})
    position: int = 0
    compute_s: float = 0.0
    stalled_s: float = 0.0  # inside actions, while communication goes on
    acting: list[tuple[float, float]] = field(default_factory=list)
    talking: list[tuple[float, float]] = field(default_factory=list)

    def unknown(self, template: Template, microbatch: int) -> Key:
        """Return a buffer that the action needs and whose time is not known yet."""
        keys = (e for e in template.inputs if not isinstance(e, str))
        found = (_instance(key, template.layer, microbatch) for key in keys)
        return next(key for key in found if self.at.get(key) == math.inf)

    def act(self, template: Template, microbatch: int) -> list[tuple[str, float, float]] | None:
        """Run an action; return stream, start and end of its compute and of what that may not hide.

        That is communication before its first compute op and after its last one. None where a time
        that it needs is not known yet.
        """
        at, layer = self.at, template.layer
        known = [
            at.get(e if isinstance(e, str) else _instance(e, layer, microbatch), 0.0)
            for e in template.inputs
        ]
        if math.inf in known:
            return None
        times = [max([known[i] + delay for i, delay in row]) for row in template.rows]
        self.compute_s += template.compute_s
        found, end, stalled = [], math.inf, 0.0
        for a, b, seconds in template.segments:
            start, end = times[a], times[b]
            found.append((COMPUTE, start, end))
            self.acting.append((start, end))
            stalled += max(0.0, end - start - seconds)
        self.stalled_s += min(stalled, template.communication_s)
        rest = [(stream, times[a], times[b]) for stream, a, b in template.leads]
        for entry, row in template.after:
            if not isinstance(entry, str):
                entry = _instance(entry, layer, microbatch)  # noqa: PLW2901
            elif times[row] > end and entry != HOST:
                rest.append((entry, end, times[row]))
            at[entry] = times[row]
        self.talking += [(start, end) for _, start, end in rest]
        return found + rest

    def times(self, step_s: float) -> RankTimes:
        """Return how the rank spent a step of ``step_s``."""
        exposed = self.stalled_s + uncovered(union(self.talking), union(self.acting))
        return RankTimes(self.compute_s, exposed, max(0.0, step_s - self.compute_s - exposed))


def _instance(key: Key, layer: int, microbatch: int) -> Key:
    """Return what a template's key means in an action."""
    name, above, each = key
    return name, above if above < 0 else above + layer, each if each < 0 else microbatch

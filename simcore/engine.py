"""The discrete-event engine (simpy): ranks, their streams, rendezvous and fluid links.

Every followed rank is a process that issues its actions in order. Work is queued on streams;
messages and collectives start when all their ranks have come; flows share links max-min fairly
and their finish is planned anew whenever the set of flows changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import simpy

from simcore.costs import CostModel, Network
from simcore.estimate import is_message, is_tie, only_op, representative
from simcore.linear import SCAN, hops
from simcore.liveness import positions
from simcore.mixed import Piece, Variant, is_ending
from simcore.ops import COMPUTE, FREE, Op, work
from simcore.program import Action, Key, Program, coordinates, group_ranks
from simcore.sequence import UNEQUAL, on_rank
from simcore.templates import HOST, Clock, Entry, Template, Workbench, price, templates
from simcore.timeline import Span, Timeline, timeline

Paths = tuple[tuple[int, ...], ...]
Process = Generator[simpy.Event, Any, None]
DETAIL_LIMIT = 25_000  # ops in a step (about two seconds) up to which each is an event of its own


@dataclass(slots=True, eq=False)
class _Flow:
    """A message under way: its links, the bytes left at ``since``, and its bytes per second."""

    path: tuple[int, ...]
    left: float
    done: simpy.Event
    since: float
    rate: float = 0.0
    plan: tuple[_Flow, ...] = ()  # the flows that it was last planned with


class FluidLinks:
    """Flows that share links; finish times are re-planned when the set of flows changes.

    Flows that share no link, not even through others, do not slow one another: a change re-plans
    only those that it can reach.
    """

    def __init__(self, env: simpy.Environment, network: Network) -> None:
        self.env, self.network = env, network
        self.users: dict[int, dict[_Flow, None]] = {}  # link -> flows, in order of arrival
        self.rates: Callable[[Paths], list[float]] = lru_cache(maxsize=4096)(self._rates)

    def _rates(self, paths: Paths) -> list[float]:
        return [float(rate) for rate in self.network.rates(paths)]

    def send(self, src: int, dst: int, size: float) -> Process:
        """Complete when the last byte of ``size`` has arrived."""
        path = tuple(self.network.path(src, dst))
        if not path:
            return
        yield self.env.timeout(self.network.latency(path))
        if size > 0:
            flow = _Flow(path, size, self.env.event(), self.env.now)
            for link in path:
                self.users.setdefault(link, {})[flow] = None
            self._plan(self._reachable(flow))
            yield flow.done

    def _reachable(self, flow: _Flow) -> tuple[_Flow, ...]:
        """Return the flows that share a link with ``flow``, directly or through others."""
        found, waiting = {flow: None}, [flow]
        while waiting:
            for link in waiting.pop().path:
                for other in self.users[link]:
                    if other not in found:
                        found[other] = None
                        waiting.append(other)
        return tuple(found)

    def _plan(self, flows: tuple[_Flow, ...]) -> None:
        """Give flows their rates from now on, and wait for the first of them to finish."""
        now = self.env.now
        first, soonest = flows[0], math.inf
        for flow, rate in zip(flows, self.rates(tuple(f.path for f in flows)), strict=True):
            flow.left -= (now - flow.since) * flow.rate
            flow.since, flow.rate, flow.plan = now, rate, flows
            wait = max(0.0, flow.left / rate)
            if wait < soonest:
                first, soonest = flow, wait
        alarm = self.env.timeout(soonest, (first, flows))
        assert alarm.callbacks is not None
        alarm.callbacks.append(self._finish)

    def _finish(self, event: simpy.Event) -> None:
        planned: Any = event.value
        done, plan = planned
        if done.plan is not plan:  # planned anew since
            return
        for link in done.path:
            self.users[link].pop(done, None)
        done.done.succeed()
        left = dict.fromkeys(flow for flow in plan if flow is not done)
        while left:
            together = self._reachable(next(iter(left)))
            for flow in together:
                del left[flow]
            self._plan(together)


@dataclass(frozen=True, slots=True)
class Processors:
    """Ranks that take turns on fewer processors, as flows of seconds through one link.

    Prices are those of a time when all ranks compute; where some wait, the others are faster.
    """

    ranks: int
    cores: int

    def path(self, src: int, dst: int) -> Sequence[int]:
        """Return the one link."""
        return (0,)

    def latency(self, path: Sequence[int]) -> float:
        """Return zero: a rank that wakes finds a processor at once."""
        return 0.0

    def rates(self, paths: Sequence[Sequence[int]]) -> Sequence[float]:
        """Return the rates of ranks that compute at once, each at most one processor's."""
        return [self.ranks / max(self.cores, len(paths))] * len(paths)


@dataclass(slots=True)
class _Meeting:
    """Ranks that come to the same collective, or the two ends of a message."""

    expected: int
    ready: simpy.Event
    done: simpy.Event
    late: int = 0  # ranks that come after it has begun
    arrived: int = 0


@dataclass(slots=True)
class _Rank:
    """What the engine keeps per followed rank."""

    number: int
    stage_rank: int
    tails: dict[str, simpy.Event] = field(default_factory=dict)  # last work queued per stream
    ready: dict[Entry, simpy.Event] = field(default_factory=dict)
    counts: dict[tuple[str, str], int] = field(default_factory=dict)  # by group and stream
    clock: Clock = field(default_factory=Clock)
    pipeline: list[int] = field(default_factory=list)  # ranks of its pipeline, once asked for


@dataclass(slots=True)
class Engine:
    """One simulated step."""

    program: Program
    cost: CostModel
    network: Network
    ranks: Sequence[int]
    detail: bool
    slowdown: Mapping[int, float] = field(default_factory=dict)  # rank -> compute time factor
    cores: int = 0  # processors that the ranks share; 0: each has its own
    env: simpy.Environment = field(default_factory=simpy.Environment)
    links: FluidLinks = field(init=False)
    processors: FluidLinks | None = None
    meetings: dict[Any, _Meeting] = field(default_factory=dict)
    passed: dict[Any, simpy.Event] = field(default_factory=dict)  # scans: (ready, came) of a rank
    spans: list[Span] = field(default_factory=list)
    laid: Mapping[str, Template] = field(default_factory=dict)
    bench: Workbench = field(init=False)
    prices: dict[str, list[tuple[float, float, float]]] = field(default_factory=dict)
    states: dict[int, _Rank] = field(default_factory=dict)
    finished: list[float] = field(default_factory=list)  # when each rank was, one after the other

    def __post_init__(self) -> None:
        self.links = FluidLinks(self.env, self.network)
        if 0 < self.cores < len(self.ranks):
            self.processors = FluidLinks(self.env, Processors(len(self.ranks), self.cores))
        self.bench = Workbench(self.program, self.cost)
        for rank in self.ranks:
            stage = coordinates(self.program.mesh, rank)["pp"]
            self.states[rank] = _Rank(rank, stage)
        if not self.detail and not self.laid:
            self.laid = templates(self.program, self.cost)

    def run(self) -> Timeline:
        """Return the timeline once every rank has finished."""
        running = [self.env.process(self._rank(state)) for state in self.states.values()]
        everything = self.env.all_of(running)
        self.env.run()
        if not everything.triggered:
            raise RuntimeError("the order deadlocks: some ranks wait for messages never sent")
        if self.detail:
            return timeline(self.spans, self._ends())
        step = max(max(state.clock.at.values()) for state in self.states.values())
        return Timeline(
            step,
            tuple(self.spans),
            {rank: state.clock.times(step) for rank, state in self.states.items()},
        )

    def _ends(self) -> float:
        """Return when the step ends: with the last rank, or with the last that it waits for."""
        backups = int(self.program.info.get("backups", 0))
        spared = backups if len(self.finished) == self.program.world else 0
        return self.finished[len(self.finished) - 1 - spared]

    # -- ranks ---------------------------------------------------------------------------------

    def _rank(self, state: _Rank) -> Process:
        actions = self.program.order[state.stage_rank]
        if self.detail:
            for action in actions:
                yield from self._ops(state, action)
        else:
            yield from self._pieces(state, actions)
        yield from list(state.tails.values())
        self.finished.append(float(self.env.now))

    def _pieces(self, state: _Rank, actions: Sequence[Action]) -> Process:
        """Run actions as wholes. A host that launches ahead has posted every receive before."""
        issued = self._ahead(state, actions)
        for action in filter(is_message, issued):
            if action.kind.startswith("RECV"):
                self._post(state, action, issued[action])
        state.clock.at[HOST] = 0.0
        for action in actions:
            if not is_message(action):
                if self._waits(action):
                    self._settle(state)
                yield from (self._tie if is_tie(action) else self._whole)(state, action)
            elif action in issued:
                state.clock.at[HOST] = issued[action]
                if action.kind.startswith("SEND"):
                    self._post(state, action, issued[action])
            else:
                yield from self._in_turn(state, action)

    def _ahead(self, state: _Rank, actions: Sequence[Action]) -> dict[Action, float]:
        """Return when a host that waits for nothing issues its messages; none where it waits."""
        at = state.clock.at
        issued: dict[Action, float] = {}
        for action in actions:
            issue_s = None if self._waits(action) else self.template(action).issue_s
            if issue_s is None:
                return {}
            at[HOST] += issue_s
            if is_message(action):
                issued[action] = at[HOST]
        return issued

    def _waits(self, action: Action) -> bool:
        """Whether the host waits for its device before a microbatch, or at a message."""
        if is_message(action):
            return bool(self.message(action).attrs.get("waits"))
        return action.kind == "F" and bool(self.program.info.get("waits"))

    def _settle(self, state: _Rank) -> None:
        """Let the host wait until its device is done."""
        at = state.clock.at
        at[HOST] = max(at[HOST], at.get(COMPUTE, 0.0))

    def _in_turn(self, state: _Rank, action: Action) -> Process:
        """Post a message when its host comes to it, which may wait for what it says."""
        sends = action.kind.startswith("SEND")
        if sends and self._waits(action):
            self._settle(state)
        state.clock.at[HOST] += float(self.cost.issue_seconds(self.message(action)))
        done = self._post(state, action, state.clock.at[HOST])
        if not sends and self._waits(action):
            yield done
            state.clock.at[HOST] = max(state.clock.at[HOST], float(self.env.now))

    def _buffer(self, action: Action) -> Key:
        """Return the buffer that a message is sent from or received in."""
        op, layer = self.message(action), self.program.bodies[action.body][0].layer
        return self.program.key((op.reads or op.writes)[0], layer, action.microbatch)

    def _ops(self, state: _Rank, action: Action) -> Process:
        """Issue an action op by op, as the executor does."""
        body = self.program.bodies[action.body]
        if action.body not in self.prices:
            steps = self.bench.steps(body)
            self.prices[action.body] = [
                (float(s.seconds), float(s.issue), s.blocking) for s in steps
            ]
        priced, every = self.prices[action.body], len(self.states) == self.program.world
        ops = positions(self.program, action.body)
        waits = self._waits(action)
        if waits and not action.kind.startswith("RECV") and COMPUTE in state.tails:
            yield state.tails[COMPUTE]
        for (_, layer, op), (seconds, issue, blocking) in zip(ops, priced, strict=True):
            if every and not UNEQUAL.isdisjoint(op.attrs):
                op, seconds = self._own(state, op, seconds)  # noqa: PLW2901
            if issue:
                yield self.env.timeout(issue)
            needs = [state.ready[key] for key in self._keys(op.reads, layer, action, state)]
            begun, done = self.env.event(), self.env.event()
            for name in op.writes:
                state.ready[self.program.key(name, layer, action.microbatch)] = done
            before = state.tails.get(op.stream)
            state.tails[op.stream] = done
            self.env.process(
                self._work(state, op, action, layer, seconds, needs, before, begun, done)
            )
            if op.stream == COMPUTE:
                if self.cost.synchronous:
                    yield done
            elif waits and op.kind == "recv":
                yield done
            elif blocking:
                yield begun
                yield self.env.timeout(blocking * seconds)

    def _own(self, state: _Rank, op: Op, seconds: float) -> tuple[Op, float]:
        """Return an op and its seconds on a rank whose part of it may be smaller than others'."""
        mine, whole = on_rank(self.program, op, state.number), float(self.cost.seconds(op))
        if not mine.dims["s"] or not whole:
            return mine, 0.0
        return mine, seconds * float(self.cost.seconds(mine)) / whole

    def _keys(self, names: Sequence[str], layer: int, action: Action, state: _Rank) -> list[Key]:
        keys = (self.program.key(name, layer, action.microbatch) for name in names)
        return [key for key in keys if key in state.ready]

    def _work(
        self,
        state: _Rank,
        op: Op,
        action: Action,
        layer: int,
        seconds: float,
        needs: list[simpy.Event],
        before: simpy.Event | None,
        begun: simpy.Event,
        done: simpy.Event,
    ) -> Process:
        for event in (*needs, *((before,) if before is not None else ())):
            if not event.processed:
                yield event
        if op.kind in ("send", "recv"):
            start = yield from self._message(state, op, action, layer)
        elif op.is_communication:
            start = yield from self._collective(state, op, seconds, begun)
        else:
            start = self.env.now
            seconds *= self.slowdown.get(state.number, 1.0)
            if self.processors is None:
                yield self.env.timeout(seconds)
            else:
                yield from self.processors.send(state.number, state.number, seconds)
        if not begun.triggered:
            begun.succeed()
        done.succeed()
        if op.kind not in FREE:
            spent = work(op)
            self.spans.append(
                Span(
                    state.number,
                    op.stream,
                    op.kind,
                    start,
                    self.env.now,
                    str(action),
                    float(spent.payload_bytes),
                    float(spent.flops),
                )
            )

    def _meet(self, key: Any, expected: int, late: int = 0) -> _Meeting:
        """Join a meeting that begins when ``expected`` have come; ``late`` more come then."""
        if key not in self.meetings:
            self.meetings[key] = _Meeting(expected, self.env.event(), self.env.event(), late)
        meeting = self.meetings[key]
        meeting.arrived += 1
        if meeting.arrived == meeting.expected:
            meeting.ready.succeed()
        if meeting.arrived == meeting.expected + meeting.late:
            del self.meetings[key]
        return meeting

    def _collective(
        self, state: _Rank, op: Op, seconds: float, begun: simpy.Event
    ) -> Generator[simpy.Event, Any, float]:
        """Start when every followed member has come; last as long as the cost model says."""
        members = group_ranks(self.program.mesh, op.group, state.number)
        present = [rank for rank in members if rank in self.states]
        call = op.group, op.stream  # ranks come to the calls of one stream in one order
        number = state.counts[call] = state.counts.get(call, 0) + 1
        if op.kind == SCAN and len(present) > 1:
            return (yield from self._scan(state, op, members, number, begun))
        if len(present) > 1:
            late = op.attrs.get("backups", 0) if len(present) == len(members) else 0
            meeting = self._meet((*call, members[0], number), len(present) - late, late)
            yield meeting.ready
        begun.succeed()
        start = float(self.env.now)
        yield self.env.timeout(seconds)
        return start

    def _scan(
        self, state: _Rank, op: Op, members: list[int], number: int, begun: simpy.Event
    ) -> Generator[simpy.Event, Any, float]:
        """Wait for the rank before, and for the hops between; the next rank waits for this one.

        A rank passes on a slice when it has come, or all of them once its own state is there.
        """
        ranks = [r for r in members[:: -1 if op.attrs["reverse"] else 1] if r in self.states]
        place, start = ranks.index(state.number), float(self.env.now)

        def passed(index: int) -> simpy.Event:
            key = op.group, members[0], number, ranks[index]
            return self.passed.setdefault(key, self.env.event())

        begun.succeed()
        if place:
            where = members.index(ranks[place - 1]), members.index(ranks[place])
            last, whole = (float(self.cost.seconds(each)) for each in hops(op, *where))
            before: Any = yield passed(place - 1)
            came = max(before[1] + last, before[0] + whole, self.env.now)
            yield self.env.timeout(came - self.env.now)
        passed(place).succeed((start, float(self.env.now)))
        return start

    def _message(
        self, state: _Rank, op: Op, action: Action, layer: int
    ) -> Generator[simpy.Event, Any, float]:
        """Start when both ends have come; share the links with other flows."""
        if not state.pipeline:
            state.pipeline = group_ranks(self.program.mesh, "pp", state.number)
        peer = state.pipeline[state.stage_rank + op.attrs["peer"]]
        ends = (state.number, peer) if op.kind == "send" else (peer, state.number)
        meeting = self._meet((ends, op.attrs["channel"], layer, action.microbatch), 2)
        yield meeting.ready
        start = float(self.env.now)
        if op.kind == "send":
            yield from self.links.send(ends[0], ends[1], float(work(op).payload_bytes))
            meeting.done.succeed()
        else:
            yield meeting.done
        return start

    # -- actions as one piece ------------------------------------------------------------------

    def template(self, action: Action) -> Template:
        """Return what an action does to its rank."""
        return self.laid[action.body]

    def message(self, action: Action) -> Op:
        """Return the op of an action that sends or receives."""
        return only_op(self.program, action)

    def _post(self, state: _Rank, action: Action, issued: float) -> simpy.Event:
        """Queue a message on its stream, to be sent once its buffer is written.

        A stage without layers sends on what it receives, maybe before that has come.
        """
        op, at, key = self.message(action), state.clock.at, self._buffer(action)
        layer = self.program.bodies[action.body][0].layer
        needs = [state.tails[op.stream]] if op.stream in state.tails else []
        if op.kind == "recv":
            at[key] = math.inf
        elif at.get(key) == math.inf:
            needs.append(state.ready[key])
        else:
            issued = max(issued, at.get(key, 0.0))
        done = state.tails[op.stream] = state.ready[key] = self.env.event()
        self.env.process(self._transfer(state, op, action, layer, issued, needs, done))
        return done

    def _transfer(
        self,
        state: _Rank,
        op: Op,
        action: Action,
        layer: int,
        issued: float,
        needs: Sequence[simpy.Event],
        done: simpy.Event,
    ) -> Process:
        if issued > self.env.now:
            yield self.env.timeout(issued - self.env.now)
        for event in needs:
            if not event.processed:
                yield event
        start = yield from self._message(state, op, action, layer)
        now = float(self.env.now)
        for name in op.writes:
            state.clock.at[self.program.key(name, layer, action.microbatch)] = now
        state.clock.at[op.stream] = now
        state.clock.talking.append((start, now))
        self.spans.append(
            Span(
                state.number,
                op.stream,
                op.kind,
                start,
                now,
                str(action),
                float(work(op).payload_bytes),
            )
        )
        done.succeed()

    def _whole(self, state: _Rank, action: Action) -> Process:
        """Run an action as one piece, from its template, once its messages have arrived."""
        template = self.template(action)
        while (done := state.clock.act(template, action.microbatch)) is None:
            yield state.ready[state.clock.unknown(template, action.microbatch)]
        self.spans += [
            Span(state.number, stream, action.body, start, end, str(action))
            for stream, start, end in done
        ]

    def _tie(self, state: _Rank, action: Action) -> Process:
        """Run a collective of several pipeline ranks."""
        op, at = only_op(self.program, action), state.clock.at
        layer = self.program.bodies[action.body][0].layer
        seconds, issue, blocking = price(op, self.cost)
        at[HOST] += float(issue)
        read, written = (
            self.program.key(names[0], layer, action.microbatch) for names in (op.reads, op.writes)
        )
        own = max(at[HOST], at.get(op.stream, 0.0), at.get(read, 0.0))
        yield self.env.timeout(max(0.0, own - self.env.now))
        start = yield from self._collective(state, op, float(seconds), self.env.event())
        at[op.stream] = at[written] = float(self.env.now)
        if blocking:
            at[HOST] = max(at[HOST], start + blocking * float(seconds))
        state.clock.talking.append((start, float(self.env.now)))
        self.spans.append(
            Span(
                state.number,
                op.stream,
                op.kind,
                start,
                float(self.env.now),
                str(action),
                float(work(op).payload_bytes),
            )
        )


@dataclass(slots=True)
class LaneEngine(Engine):
    """Lanes of a step over unequal lengths, each with actions of its own (`simcore.mixed`)."""

    variants: Mapping[Variant, tuple[Program, Mapping[str, Template]]] = field(default_factory=dict)
    pieces: Sequence[Piece] = ()
    plans: Mapping[int, Sequence[Action]] = field(default_factory=dict)  # followed rank -> actions
    sharing: Mapping[int, int] = field(default_factory=dict)  # piece -> followed lanes that run it

    def _rank(self, state: _Rank) -> Process:
        yield from self._pieces(state, self.plans[state.number])
        yield from list(state.tails.values())

    def _kind(self, action: Action) -> tuple[Program, Mapping[str, Template]]:
        """Return the variant that an action runs; after the pieces all are alike."""
        if is_ending(action):
            return self.program, self.laid
        return self.variants[self.pieces[action.microbatch].variant]

    def template(self, action: Action) -> Template:
        """Return what an action does to its rank, at the length of its piece."""
        return self._kind(action)[1][action.body]

    def message(self, action: Action) -> Op:
        """Return the op of a message, at the length of its piece."""
        return only_op(self._kind(action)[0], action)

    def _whole(self, state: _Rank, action: Action) -> Process:
        if action.kind == "F" and self.sharing[action.microbatch] > 1:
            yield from self._assemble(state, action)
        yield from Engine._whole(self, state, action)

    def _assemble(self, state: _Rank, action: Action) -> Process:
        """Wait until every lane of the piece's group is done with what came before."""
        at = state.clock.at
        yield self.env.timeout(max(0.0, at.get(COMPUTE, 0.0) - float(self.env.now)))
        key = "piece", action.stage, action.microbatch
        meeting = self._meet(key, self.sharing[action.microbatch])
        yield meeting.ready
        at[COMPUTE] = max(at.get(COMPUTE, 0.0), float(self.env.now))


def count_ops(program: Program) -> int:
    """Return the ops of one step over the pipeline ranks."""
    sizes = {
        body: sum(len(program.blocks[call.block].ops) for call in calls)
        for body, calls in program.bodies.items()
    }
    return sum(sizes[action.body] for actions in program.order for action in actions)


def simulate(
    program: Program,
    cost: CostModel,
    network: Network,
    *,
    detail: bool | None = None,
    every_rank: bool = False,
    slowdown: Mapping[int, float] | None = None,
    cores: int = 0,
) -> Timeline:
    """Return the simulated timeline of one step.

    Ranks with equal stages are folded into one unless ``every_rank``; ``slowdown`` (rank to
    factor on its compute) makes stragglers and needs ``every_rank`` and ``detail``, and so do
    ``cores``, the processors on which all ranks take turns (0: each has its own). With ``detail``
    every op is an event of its own; by default where the step has at most ``DETAIL_LIMIT`` ops.
    """
    ranks = (
        range(program.world)
        if every_rank
        else [representative(program, rank) for rank in range(len(program.order))]
    )
    if detail is None:
        detail = every_rank or count_ops(program) <= DETAIL_LIMIT
    if slowdown and not (detail and every_rank):
        raise ValueError("slowdown needs every_rank and detail: folded ranks are all alike")
    if cores and not (detail and every_rank):
        raise ValueError("cores need every_rank and detail: folded ranks take no turns")
    return Engine(program, cost, network, list(ranks), detail, slowdown or {}, cores).run()

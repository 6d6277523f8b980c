"""The estimator: distinct actions priced once, then the longest path of the action graph.

Where every stage takes the same time and messages are free, the path's length is the closed form
of the schedule: (m + p - 1)(t_F + t_B) for GPipe and 1F1B (Narayanan et al. 2021, section 2.2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from simcore.costs import CostModel, Network, transfer_seconds
from simcore.ops import COMPUTE, work
from simcore.program import Action, Key, Program, rank_at
from simcore.templates import Template, lay
from simcore.timeline import RankTimes, Span, Timeline


def representative(program: Program, pipeline_rank: int) -> int:
    """Return the rank that stands for all that hold the same stages."""
    where = dict.fromkeys(program.mesh, 0)
    where["pp"] = pipeline_rank
    return rank_at(program.mesh, where)


@dataclass(slots=True)
class Clock:
    """How far a rank has come in its list of actions."""

    position: int = 0
    now: float = 0.0
    streams: dict[str, float] = field(default_factory=dict)
    compute_s: float = 0.0
    exposed_s: float = 0.0


@dataclass(slots=True)
class Message:
    """A send and the matching receive: posted times, then the arrival."""

    sent: float | None = None
    posted: float | None = None
    arrived: float | None = None


def message_key(action: Action) -> tuple[str, int, int]:
    """Return what a send and its receive have in common: channel, lower stage, microbatch."""
    channel = action.kind[-1]
    lower = action.stage if action.kind in ("SEND_F", "RECV_B") else action.stage - 1
    return channel, lower, action.microbatch


def is_message(action: Action) -> bool:
    """Whether the action sends or receives."""
    return action.kind.startswith(("SEND", "RECV"))


def needs(program: Program) -> dict[str, tuple[str, ...]]:
    """Return, for every body, the receive kinds whose buffers it reads."""
    received: dict[str, dict[str, Key]] = {}
    for body, calls in program.bodies.items():
        for kind in ("RECV_F", "RECV_B"):
            if body.endswith(kind):
                op = program.blocks[calls[0].block].ops[0]
                key = program.key(op.writes[0], calls[0].layer, 0)
                received.setdefault(body.removesuffix(kind), {})[kind] = key
    found: dict[str, tuple[str, ...]] = {}
    for body in program.bodies:
        stage = body.rstrip("ABCDEFGHIJKLMNOPQRSTUVWXYZ_")
        read = {program.key(name, call.layer, 0) for call, _, op in program.ops(body)
                for name in op.reads}
        found[body] = tuple(k for k, key in received.get(stage, {}).items()
                            if key in read and not body.startswith(f"{stage}SEND"))
    return found


def templates(program: Program, cost: CostModel) -> dict[str, Template]:
    """Return the template of every body that is not a message."""
    return {body: lay(program, body, cost) for body in program.bodies
            if not body.endswith(("SEND_F", "SEND_B", "RECV_F", "RECV_B"))}


@dataclass(slots=True)
class _Path:
    """The longest-path computation over the action graph."""

    program: Program
    cost: CostModel
    network: Network
    laid: Mapping[str, Template]
    waits: Mapping[str, tuple[str, ...]]
    clocks: list[Clock]
    messages: dict[tuple[str, int, int], Message] = field(default_factory=dict)
    spans: list[Span] = field(default_factory=list)
    flow_s: dict[tuple[str, int], float] = field(default_factory=dict)

    def message(self, key: tuple[str, int, int]) -> Message:
        return self.messages.setdefault(key, Message())

    def advance(self, rank: int) -> bool:
        """Run the rank's actions until one waits for a message that is not posted yet."""
        clock, moved = self.clocks[rank], False
        actions = self.program.order[rank]
        while clock.position < len(actions):
            action = actions[clock.position]
            if is_message(action):
                self.post(rank, clock, action)
            elif not self.compute(rank, clock, action):
                return moved
            clock.position += 1
            moved = True
        return moved

    def post(self, rank: int, clock: Clock, action: Action) -> None:
        key = message_key(action)
        message = self.message(key)
        op = self.program.blocks[self.program.bodies[action.body][0].block].ops[0]
        clock.now += float(self.cost.issue_seconds(op))
        if op.kind == "send":
            message.sent = clock.now
        else:
            message.posted = clock.now
        if message.sent is not None and message.posted is not None:
            self.deliver(key, message, float(work(op).payload_bytes))

    def deliver(self, key: tuple[str, int, int], message: Message, size: float) -> None:
        channel, lower, _ = key
        ends = (lower, lower + 1) if channel == "F" else (lower + 1, lower)
        src, dst = (self.clocks[end] for end in ends)
        if (channel, lower) not in self.flow_s:
            ranks = [representative(self.program, end) for end in ends]
            self.flow_s[channel, lower] = transfer_seconds(self.network, *ranks, size)
        out, into = f"send_{channel.lower()}", f"recv_{channel.lower()}"
        assert message.sent is not None and message.posted is not None
        start = max(message.sent, message.posted, src.streams.get(out, 0.0),
                    dst.streams.get(into, 0.0))
        message.arrived = src.streams[out] = dst.streams[into] = start + self.flow_s[channel, lower]
        for end, stream in zip(ends, (out, into), strict=True):
            self.spans.append(Span(end, stream, stream, start, message.arrived, "", size))

    def compute(self, rank: int, clock: Clock, action: Action) -> bool:
        template = self.laid[action.body]
        start = clock.now
        for kind in self.waits[action.body]:
            message = self.message(message_key(action._replace(kind=kind)))
            if message.arrived is None:
                return False
            start = max(start, message.arrived)
        for stream in template.ends:
            if stream != COMPUTE:
                start = max(start, clock.streams.get(stream, 0.0))
        if action.kind == "O":
            start = max(start, *clock.streams.values(), start)
        for stream, end in template.ends.items():
            if stream != COMPUTE:
                clock.streams[stream] = start + float(end)
        clock.now = start + float(template.compute_end_s)
        clock.compute_s += float(template.compute_s)
        clock.exposed_s += template.exposed_s
        self.spans.append(Span(rank, COMPUTE, action.body, start, clock.now, str(action)))
        return True


def estimate(program: Program, cost: CostModel, network: Network) -> Timeline:
    """Return the timeline of the program's pipeline ranks, one span per action and message.

    Ranks that share their stages are one. Raises RuntimeError where the order deadlocks.
    """
    path = _Path(program, cost, network, templates(program, cost), needs(program),
                 [Clock() for _ in program.order])
    while any([path.advance(rank) for rank in range(len(path.clocks))]):
        pass
    stuck = [r for r, c in enumerate(path.clocks) if c.position < len(program.order[r])]
    if stuck:
        raise RuntimeError(f"the order deadlocks on pipeline ranks {stuck}")
    step = max(max(c.now, *c.streams.values(), c.now) for c in path.clocks)
    return Timeline(step, tuple(path.spans), _times(path, step))


def _times(path: _Path, step: float) -> dict[int, RankTimes]:
    """Add the messages that no action hides to what the templates expose."""
    from simcore.timeline import uncovered, union

    found = {}
    for rank, clock in enumerate(path.clocks):
        mine = [s for s in path.spans if s.rank == rank]
        acting = union((s.start_s, s.end_s) for s in mine if s.stream == COMPUTE)
        flowing = union((s.start_s, s.end_s) for s in mine if s.stream != COMPUTE)
        exposed = clock.exposed_s + uncovered(flowing, acting)
        found[rank] = RankTimes(clock.compute_s, exposed,
                                max(0.0, step - clock.compute_s - exposed))
    return found


def lower_bound(program: Program, cost: CostModel) -> float:
    """Return the seconds of the busiest stream of the busiest rank: no order can beat it."""
    laid = templates(program, cost)
    best = 0.0
    for actions in program.order:
        streams: dict[str, float] = {}
        for action in actions:
            if is_message(action):
                continue
            for span in laid[action.body].spans:
                streams[span.stream] = streams.get(span.stream, 0.0) + span.end_s - span.start_s
        best = max(best, *streams.values())
    return best


def serial_sum(program: Program, cost: CostModel, network: Network) -> float:
    """Return the seconds of all pipeline ranks' ops and messages, one after the other."""
    laid = templates(program, cost)
    total = 0.0
    for rank, actions in enumerate(program.order):
        for action in actions:
            op = program.blocks[program.bodies[action.body][0].block].ops[0]
            if not is_message(action):
                total += float(laid[action.body].serial_s)
                continue
            total += float(cost.issue_seconds(op))
            if op.kind == "send":
                peer = representative(program, rank + op.attrs["peer"])
                total += transfer_seconds(network, representative(program, rank), peer,
                                          float(work(op).payload_bytes))
    return total

"""The estimator: distinct actions priced once, then the longest path of the action graph.

Where every stage takes the same time and messages are free, the path's length is the closed form
of the schedule: (m + p - 1)(t_F + t_B) for GPipe and 1F1B (Narayanan et al. 2021, section 2.2).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from simcore.costs import CostModel, Network, transfer_seconds
from simcore.ops import COMPUTE, Op, work
from simcore.program import Action, Call, Key, Program, group_ranks, rank_at
from simcore.templates import HOST, Clock, Template, price, templates
from simcore.timeline import Span, Timeline


def representative(program: Program, pipeline_rank: int) -> int:
    """Return the rank that stands for all that hold the same stages."""
    where = dict.fromkeys(program.mesh, 0)
    where["pp"] = pipeline_rank
    return rank_at(program.mesh, where)


def is_message(action: Action) -> bool:
    """Whether the action sends or receives."""
    return action.kind.startswith(("SEND", "RECV"))


def is_tie(action: Action) -> bool:
    """Whether the action is a collective of several pipeline ranks."""
    return action.kind.startswith("TIE")


def only_op(program: Program, action: Action) -> Op:
    """Return the op of a message or tie."""
    return program.blocks[program.bodies[action.body][0].block].ops[0]


def message_seconds(
    program: Program, network: Network, src: int, dst: int, size_bytes: float
) -> float:
    """Return the seconds of a message between pipeline ranks that has every link to itself."""
    return transfer_seconds(
        network, representative(program, src), representative(program, dst), size_bytes
    )


@dataclass(slots=True)
class Channel:
    """Messages in one direction between two pipeline ranks: first posted, first delivered."""

    src: int
    dst: int
    seconds: float
    size_bytes: float
    streams: list[str] = field(default_factory=lambda: ["", ""])  # of the two ends
    waits: bool = False  # the hosts wait: the sender's to send, the receiver's for what comes
    sent: deque[tuple[float, tuple[int, int]]] = field(default_factory=deque)  # when, what
    posted: deque[tuple[float, tuple[int, int], Key]] = field(default_factory=deque)


@dataclass(slots=True)
class _Path:
    """The longest-path computation over the action graph."""

    program: Program
    cost: CostModel
    network: Network
    laid: Mapping[str, Template]
    clocks: list[Clock]
    ports: dict[tuple[int, str], tuple[Channel, Key, float]] = field(default_factory=dict)
    channels: dict[tuple[int, int, str], Channel] = field(default_factory=dict)
    ties: dict[tuple[Call, int], dict[int, float]] = field(default_factory=dict)
    spans: list[Span] = field(default_factory=list)

    def advance(self, rank: int) -> bool:
        """Run the rank's actions until one waits for a message that has not arrived."""
        clock, first = self.clocks[rank], self.clocks[rank].position
        actions = self.program.order[rank]
        while clock.position < len(actions):
            action = actions[clock.position]
            if not self.step_of(action)(rank, clock, action):
                break
            clock.position += 1
        return clock.position > first

    def step_of(self, action: Action) -> Callable[[int, Clock, Action], bool]:
        """Return what runs an action; it answers False where a time is not known yet."""
        if is_message(action):
            return self.post
        return self.tie if is_tie(action) else self.compute

    def post(self, rank: int, clock: Clock, action: Action) -> bool:
        """Post a send or a receive; deliver what has both.

        A stage without layers sends on what it receives, once that has come.
        """
        channel, (name, layer, each), issue = self.port(rank, action)
        key = name, layer, each if each < 0 else action.microbatch
        if rank == channel.src and clock.at.get(key) == math.inf:
            return False
        if channel.waits and rank == channel.src:
            clock.at[HOST] = max(clock.at[HOST], clock.at.get(COMPUTE, 0.0))
        clock.at[HOST] = posted = clock.at[HOST] + issue
        if rank == channel.src:
            channel.sent.append((max(posted, clock.at.get(key, 0.0)), (layer, action.microbatch)))
        else:
            clock.at[key] = math.inf
            channel.posted.append((posted, (layer, action.microbatch), key))
        while channel.sent and channel.posted:
            self.deliver(channel)
        return True

    def port(self, rank: int, action: Action) -> tuple[Channel, Key, float]:
        """Return a message's channel, its buffer, and the host's seconds."""
        kind = action.stage, action.kind
        if kind not in self.ports:
            op = only_op(self.program, action)
            issue, size = float(self.cost.issue_seconds(op)), float(work(op).payload_bytes)
            layer = self.program.bodies[action.body][0].layer
            key = self.program.key((*op.reads, *op.writes)[0], layer, action.microbatch)
            peer = rank + op.attrs["peer"]
            src, dst = (rank, peer) if op.kind == "send" else (peer, rank)
            channel = self.channels.get((src, dst, op.attrs["channel"]))
            if channel is None:
                seconds = message_seconds(self.program, self.network, src, dst, size)
                channel = Channel(src, dst, seconds, size, waits=op.attrs.get("waits", False))
                self.channels[src, dst, op.attrs["channel"]] = channel
            channel.streams[op.kind == "recv"] = op.stream
            self.ports[kind] = channel, key, issue
        return self.ports[kind]

    def deliver(self, channel: Channel) -> None:
        """Let the first message go as soon as both ends and their streams are free."""
        (sent, number), (posted, expected, key) = channel.sent.popleft(), channel.posted.popleft()
        if number != expected:
            raise RuntimeError(f"the order deadlocks: {number} is sent, {expected} expected")
        src, dst, (out, into) = self.clocks[channel.src], self.clocks[channel.dst], channel.streams
        start = max(sent, posted, src.at.get(out, 0.0), dst.at.get(into, 0.0))
        arrived = start + channel.seconds
        dst.at[key] = dst.at[into] = src.at[out] = arrived
        if channel.waits:
            dst.at[HOST] = max(dst.at[HOST], arrived)
        for clock, end, stream in ((src, channel.src, out), (dst, channel.dst, into)):
            clock.talking.append((start, arrived))
            self.spans.append(Span(end, stream, stream, start, arrived, "", channel.size_bytes))

    def tie(self, rank: int, clock: Clock, action: Action) -> bool:
        """Run a collective of several pipeline ranks once all have come."""
        op, call = only_op(self.program, action), self.program.bodies[action.body][0]
        seconds, issue, blocking = price(op, self.cost)
        read = self.program.key(op.reads[0], call.layer, action.microbatch)
        here = representative(self.program, rank)
        members = group_ranks(self.program.mesh, op.group, here)
        came = self.ties.setdefault((call, members[0]), {})
        came[here] = max(
            clock.at[HOST] + float(issue), clock.at.get(op.stream, 0.0), clock.at.get(read, 0.0)
        )
        if len(came) < len(members):
            return False
        start = max(came.values())
        end = start + float(seconds)
        clock.at[HOST] = max(
            clock.at[HOST] + float(issue), start + blocking * float(seconds) if blocking else 0.0
        )
        clock.at[op.stream] = end
        clock.at[self.program.key(op.writes[0], call.layer, action.microbatch)] = end
        clock.talking.append((start, end))
        self.spans.append(
            Span(rank, op.stream, op.kind, start, end, str(action), float(work(op).payload_bytes))
        )
        return True

    def compute(self, rank: int, clock: Clock, action: Action) -> bool:
        """Run an action from its template, unless it needs a message that is under way."""
        body = action.body
        if action.kind == "F" and self.program.info.get("waits"):
            clock.at[HOST] = max(clock.at[HOST], clock.at.get(COMPUTE, 0.0))
        done = clock.act(self.laid[body], action.microbatch)
        if done is None:
            return False
        name = f"{body}{action.microbatch}"
        self.spans += [Span(rank, stream, body, start, end, name) for stream, start, end in done]
        return True


def estimate(
    program: Program,
    cost: CostModel,
    network: Network,
    laid: Mapping[str, Template] | None = None,
) -> Timeline:
    """Return the timeline of the program's pipeline ranks, one span per action and message.

    Ranks that share their stages are one. ``laid``: templates of a program that differs in its
    microbatches alone. Raises RuntimeError where the order deadlocks.
    """
    laid = laid or templates(program, cost)
    path = _Path(program, cost, network, laid, [Clock() for _ in program.order])
    moving = True
    while moving:
        moving = False
        for rank in range(len(path.clocks)):
            moving = path.advance(rank) or moving
    stuck = [r for r, c in enumerate(path.clocks) if c.position < len(program.order[r])]
    step = max(max(clock.at.values()) for clock in path.clocks)
    if stuck or any(channel.sent or channel.posted for channel in path.channels.values()):
        raise RuntimeError(f"the order deadlocks on pipeline ranks {stuck}: a message lacks an end")
    return Timeline(
        step, tuple(path.spans), {rank: clock.times(step) for rank, clock in enumerate(path.clocks)}
    )


def lower_bound(program: Program, cost: CostModel) -> float:
    """Return the seconds of the busiest stream of the busiest rank: no order can beat it."""
    laid = templates(program, cost)
    best = 0.0
    for actions in program.order:
        streams: dict[str, float] = {}
        for action in actions:
            for stream, seconds in laid[action.body].busy.items():
                streams[stream] = streams.get(stream, 0.0) + float(seconds)
        best = max(best, *streams.values())
    return best


def serial_sum(program: Program, cost: CostModel, network: Network) -> float:
    """Return the seconds of all pipeline ranks' ops and messages, one after the other."""
    laid = templates(program, cost)
    total = 0.0
    for rank, actions in enumerate(program.order):
        for action in actions:
            total += float(laid[action.body].serial_s)
            if is_message(action) and (op := only_op(program, action)).kind == "send":
                size = float(work(op).payload_bytes)
                total += message_seconds(program, network, rank, rank + op.attrs["peer"], size)
    return total

"""Swarms: every microbatch takes a random live server of each stage, on machines that come and go.

SWARM (Ryabinin et al. 2023): trainers send microbatches from stage to stage, to servers drawn with
chances that follow their speed. They keep what stages exchange, so that work on a server that
vanishes, and the gradients that it held, are taken again by others of its stage. Servers move from
the stage with the least work in line to that with the most. A server computes a forward again
before its backward, so any of the stage can take that.

`Trainer` decides who does what; `simulate_swarm` plays it on a clock, `backends.swarm` with
processes and tensors.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from simcore.costs import CostModel
from simcore.errors import InputError
from simcore.estimate import only_op
from simcore.ops import work
from simcore.program import Program
from simcore.templates import lay

GONE = -1


class Task(NamedTuple):
    """The forward "F" or backward "B" of a microbatch on a stage."""

    kind: str
    stage: int
    microbatch: int


class Ticket(NamedTuple):
    """A task given to a server; it may be given again, under another number."""

    number: int
    server: int
    task: Task


@dataclass(frozen=True, slots=True)
class Server:
    """A machine: its first stage, its speed over that of the cost model, and when it is there."""

    stage: int
    speed: float = 1.0
    joins_s: float = 0.0
    leaves_s: float = math.inf


@dataclass(frozen=True, slots=True)
class StageWork:
    """Seconds of every stage's passes on a server of speed 1, bytes between two stages."""

    forward_s: tuple[float, ...]
    backward_s: tuple[float, ...]
    boundary_bytes: float

    def seconds(self, task: Task) -> float:
        """Return the seconds of a task; a backward starts from the stage's input."""
        forward = self.forward_s[task.stage]
        return forward if task.kind == "F" else forward + self.backward_s[task.stage]

    def inbound_bytes(self, task: Task) -> float:
        """Return what a server receives: the stage's input, and for a backward the gradient too."""
        last = task.stage == len(self.forward_s) - 1
        boundaries = (task.stage > 0) + (task.kind == "B" and not last)
        return boundaries * self.boundary_bytes


def stage_work(program: Program, cost: CostModel) -> StageWork:
    """Return the work of the stages of a lowered pipeline, one on each rank."""
    forward, backward, sent = [], [], 0.0
    for actions in program.order:
        first = {action.kind: action for action in reversed(actions)}
        forward.append(float(lay(program, first["F"].body, cost).elapsed_s))
        kind = "B" if "B" in first else "BR"
        backward.append(float(lay(program, first[kind].body, cost).elapsed_s))
        for action in actions:
            if action.kind.startswith("SEND"):
                sent = max(sent, float(np.max(work(only_op(program, action)).payload_bytes)))
    return StageWork(tuple(forward), tuple(backward), sent)


class Trainer:
    """Who does what in a step: tasks that are ready, given, done, lost and taken again."""

    def __init__(
        self, stages: int, microbatches: int, servers: Sequence[Server], in_flight: int, seed: int
    ) -> None:
        if stages < 1 or microbatches < 1 or in_flight < 1:
            raise InputError("a swarm needs a stage, a microbatch and one in flight: give 1 each.")
        for number, server in enumerate(servers):
            if not 0 <= server.stage < stages or server.speed <= 0:
                raise InputError(
                    f"server {number} of the swarm (stage {server.stage}, speed {server.speed}) "
                    f"needs one of the {stages} stages, from 0, and a speed above 0."
                )
        self.stages, self.microbatches, self.servers = stages, microbatches, servers
        self.place = [GONE] * len(servers)
        self.given: dict[int, Ticket] = {}
        self.summed: dict[int, Ticket] = {}  # backwards whose gradients servers hold
        self.repeated = self.moves = 0
        self._passed: set[Task] = set()  # tasks whose result went on
        self._fresh = iter(range(microbatches))
        self._numbers = itertools.count()
        self._draw = np.random.default_rng([seed, 0x5A])
        self.ready = [Task("F", 0, m) for m in itertools.islice(self._fresh, in_flight)]

    @property
    def done(self) -> bool:
        """Whether the gradient of every microbatch is held on every stage."""
        return len(self.summed) == self.stages * self.microbatches

    def of_stage(self, stage: int) -> list[int]:
        """Return the live servers of a stage."""
        return [server for server, place in enumerate(self.place) if place == stage]

    def dispatch(self) -> Iterator[Ticket]:
        """Yield ready tasks with the servers that they were given to; some may have to wait."""
        tasks, self.ready = self.ready, []
        for task in tasks:
            live = self.of_stage(task.stage)
            if not live:
                self.ready.append(task)
                continue
            speeds = np.array([self.servers[server].speed for server in live])
            server = live[int(self._draw.choice(len(live), p=speeds / speeds.sum()))]
            ticket = Ticket(next(self._numbers), server, task)
            self.given[ticket.number] = ticket
            yield ticket

    def finish(self, number: int) -> bool:
        """Take a result; returns whether it counts, which one taken back meanwhile does not."""
        ticket = self.given.pop(number, None)
        if ticket is None:
            return False
        task = ticket.task
        if task.kind == "B":
            self.summed[number] = ticket
        if task not in self._passed:
            self._passed.add(task)
            self.ready += self._after(task)
        return True

    def _after(self, task: Task) -> list[Task]:
        """Return what a task's first result makes ready."""
        kind, stage, microbatch = task
        if kind == "F":
            last = stage == self.stages - 1
            return [Task("B" if last else "F", stage if last else stage + 1, microbatch)]
        if stage:
            return [Task("B", stage - 1, microbatch)]
        return [Task("F", 0, m) for m in itertools.islice(self._fresh, 1)]

    def join(self, server: int) -> None:
        """Let a server take up its stage."""
        self.place[server] = self.servers[server].stage

    def leave(self, server: int) -> None:
        """Take again what a server had in line and what it had summed."""
        stage, self.place[server] = self.place[server], GONE
        for held in (self.given, self.summed):
            self.repeated += self._retake(held, server)
        if stage != GONE and not self.of_stage(stage):
            counts = [len(self.of_stage(s)) for s in range(self.stages)]
            richest = int(np.argmax(counts))
            if counts[richest] > 1:
                self._move(self.of_stage(richest)[0], stage)

    def _retake(self, held: dict[int, Ticket], server: int) -> int:
        lost = [ticket for ticket in held.values() if ticket.server == server]
        for ticket in lost:
            del held[ticket.number]
            self.ready.append(ticket.task)
        return len(lost)

    def _move(self, server: int, stage: int) -> None:
        """Move a server, which keeps the gradients that it summed; its line goes to others."""
        self.place[server] = stage
        self._retake(self.given, server)
        self.moves += 1

    def level(self) -> None:
        """Move a server from the stage with the shortest line to the one with the longest.

        A line is tasks over the speed of a stage's servers; it must stay the longer one.
        """
        tasks, speed = np.zeros(self.stages), np.zeros(self.stages)
        for ticket in self.given.values():
            tasks[ticket.task.stage] += 1
        for task in self.ready:
            tasks[task.stage] += 1
        for server, stage in enumerate(self.place):
            if stage != GONE:
                speed[stage] += self.servers[server].speed
        line = tasks / np.maximum(speed, 1e-12)
        full, empty = int(line.argmax()), int(line.argmin())
        movable = self.of_stage(empty)
        if full == empty or len(movable) < 2:
            return
        server = min(movable, key=lambda s: (self._in_line(s), s))
        moved = self.servers[server].speed
        if tasks[full] / (speed[full] + moved) >= tasks[empty] / (speed[empty] - moved):
            self._move(server, full)

    def _in_line(self, server: int) -> int:
        return sum(ticket.server == server for ticket in self.given.values())


@dataclass(frozen=True, slots=True)
class SwarmRun:
    """What a step took: seconds, passes taken again, moves, and who holds which gradients.

    ``busy``: useful seconds of compute over those that servers were there.
    """

    step_s: float
    repeated: int
    moves: int
    busy: float
    summed: tuple[Ticket, ...]


def simulate_swarm(
    stages: StageWork,
    servers: Sequence[Server],
    microbatches: int,
    *,
    in_flight: int,
    link_bytes_per_s: float,
    latency_s: float = 0.0,
    level_s: float = math.inf,
    seed: int = 0,
) -> SwarmRun:
    """Return a step in which ``in_flight`` microbatches are under way at once.

    A server receives one message at a time over a link of its own, beside computing, and takes
    tasks in turn. Every ``level_s`` seconds a server may move. Raises `InputError` where a stage
    is left without a server for good.
    """
    count = len(stages.forward_s)
    trainer = Trainer(count, microbatches, servers, in_flight, seed)
    numbers = itertools.count()
    events: list[tuple[float, int, str, int]] = []

    def at(seconds: float, what: str, which: int) -> None:
        if seconds < math.inf:
            heapq.heappush(events, (seconds, next(numbers), what, which))

    for number, server in enumerate(servers):
        at(server.joins_s, "join", number)
        at(server.leaves_s, "leave", number)
    at(level_s, "level", 0)
    link, chip = [0.0] * len(servers), [0.0] * len(servers)
    now = 0.0
    while not trainer.done:
        if not events or (events[0][2] == "level" and len(events) == 1):
            lost = sorted({task.stage for task in trainer.ready})
            raise InputError(f"stage {lost[0]} of the swarm has no server left: add servers.")
        now, _, what, which = heapq.heappop(events)
        if what == "finish":
            trainer.finish(which)
        elif what == "level":
            trainer.level()
            at(now + level_s, "level", 0)
        elif what == "join":
            trainer.join(which)
        else:
            trainer.leave(which)
        for number, who, task in trainer.dispatch():
            link[who] = max(now, link[who]) + stages.inbound_bytes(task) / link_bytes_per_s
            start = max(link[who] + latency_s, chip[who])
            chip[who] = start + stages.seconds(task) / servers[who].speed
            at(chip[who], "finish", number)
    return _outcome(trainer, stages, servers, now)


def _outcome(
    trainer: Trainer, stages: StageWork, servers: Sequence[Server], now: float
) -> SwarmRun:
    each = (stages.seconds(Task(k, s, 0)) for k in "FB" for s in range(len(stages.forward_s)))
    there = sum(max(0.0, min(now, s.leaves_s) - s.joins_s) * s.speed for s in servers)
    busy = trainer.microbatches * sum(each) / there
    return SwarmRun(now, trainer.repeated, trainer.moves, busy, tuple(trainer.summed.values()))

"""A swarm of processes: servers hold a stage each, one of them is killed, the step completes.

`simcore.swarm.Trainer` gives out tasks. A stage is x + tanh(x A) B; its weights follow from the
seed, so that a server that moves has them. Boundaries are coded as `codec` says.
"""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from torch import Tensor

from backends.codec_ops import decode, encode
from simcore.errors import RunError
from simcore.swarm import Server, Task, Trainer

WAIT_S = 60.0


@dataclass(frozen=True, slots=True)
class SwarmJob:
    """A step: stages of width ``width``, microbatches of ``rows`` rows, the codec, the seed.

    ``killed``: a server that is killed as soon as it holds a gradient.
    """

    stages: int
    width: int
    rows: int
    microbatches: int
    codec: str = "none"
    seed: int = 0
    killed: int | None = None


@dataclass(frozen=True, slots=True)
class SwarmResult:
    """Gradients of every stage's weights [stages, 2, width, width], and what happened.

    ``given``: every task that a server was given, repeated ones too; ``sent``: bytes of the
    boundaries that went with them.
    """

    gradients: Tensor
    repeated: int
    given: tuple[Task, ...]
    sent: int


def stage_weights(stage: int, width: int, seed: int) -> Tensor:
    """Return the weights [2, width, width] of a stage."""
    draw = torch.Generator().manual_seed(1000 * seed + stage)
    weights = torch.randn(2, width, width, generator=draw, dtype=torch.float64)
    return weights / math.sqrt(width)


def inputs_of(job: SwarmJob) -> Tensor:
    """Return the microbatches [microbatches, rows, width]."""
    draw = torch.Generator().manual_seed(1000 * job.seed + 999)
    return torch.randn(job.microbatches, job.rows, job.width, generator=draw, dtype=torch.float64)


def stage_forward(x: Tensor, weights: Tensor) -> Tensor:
    """Return what a stage makes of its input."""
    return x + torch.tanh(x @ weights[0]) @ weights[1]


def packed(codec: str, values: Tensor) -> Tensor:
    """Return what travels of a boundary."""
    return values if codec == "none" else encode(codec, values.reshape(1, -1))


def unpacked(codec: str, sent: Tensor, rows: int, width: int) -> Tensor:
    """Return a boundary's values."""
    if codec == "none":
        return sent
    return decode(codec, sent, rows * width, torch.float64).view(rows, width)


def _serve(pipe: Connection, job: SwarmJob) -> None:
    """Compute tasks until asked for the sum of the gradients of some of them."""
    torch.set_num_threads(1)
    held: dict[int, tuple[int, Tensor]] = {}

    def plain(sent: Any) -> Tensor:
        return unpacked(job.codec, torch.from_numpy(sent), job.rows, job.width)

    while True:
        number, task, *sent = pipe.recv()
        if task is None:
            total = torch.zeros(job.stages, 2, job.width, job.width, dtype=torch.float64)
            for ticket in number:
                stage, gradient = held[ticket]
                total[stage] += gradient
            pipe.send((-1, total.numpy()))
            continue
        weights = stage_weights(task.stage, job.width, job.seed).requires_grad_()
        x = (plain(sent[0]) if task.stage else torch.from_numpy(sent[0])).requires_grad_()
        y = stage_forward(x, weights)
        if task.kind == "F":
            pipe.send((number, packed(job.codec, y.detach()).numpy()))
            continue
        if task.stage == job.stages - 1:
            (y * y).sum().backward()
        else:
            y.backward(plain(sent[1]))
        assert x.grad is not None
        assert weights.grad is not None
        held[number] = task.stage, weights.grad
        pipe.send((number, packed(job.codec, x.grad).numpy()))


class _Run:
    """The trainer's side: what stages exchange, the servers' pipes, results as they come."""

    def __init__(self, job: SwarmJob, servers: Sequence[Server], in_flight: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "backends.swarm"])
        self.job = job
        self.trainer = Trainer(job.stages, job.microbatches, servers, in_flight, job.seed)
        self.results: dict[Task, Any] = {}
        self.inputs = inputs_of(job)
        self.sent = 0
        self.given: list[Task] = []
        self.pipes: dict[int, Connection] = {}
        self.processes = []
        for number in range(len(servers)):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, job), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes[number] = mine
            self.trainer.join(number)

    def operands(self, task: Task) -> list[Any]:
        """Return the stage's input, and for a backward before the last stage the gradient."""
        stage, microbatch = task.stage, task.microbatch
        found = [
            self.results[Task("F", stage - 1, microbatch)]
            if stage
            else self.inputs[microbatch].numpy()
        ]
        if task.kind == "B" and stage < self.job.stages - 1:
            found.append(self.results[Task("B", stage + 1, microbatch)])
        self.sent += sum(each.nbytes for each in (found if stage else found[1:]))
        return found

    def give(self) -> None:
        """Send the tasks that are ready; those of a server found dead are taken again."""
        while tickets := list(self.trainer.dispatch()):
            for ticket in tickets:
                message = (ticket.number, ticket.task, *self.operands(ticket.task))
                self.given.append(ticket.task)
                try:
                    self.pipes[ticket.server].send(message)
                except (OSError, KeyError):
                    self.lose(ticket.server)

    def lose(self, server: int) -> None:
        """Go on without a server."""
        pipe = self.pipes.pop(server, None)
        if pipe is not None:
            pipe.close()
            self.trainer.leave(server)

    def take(self) -> None:
        """Wait for results and take them; a closed pipe is a server that left."""
        ready = wait(list(self.pipes.values()), WAIT_S)
        if not ready:
            raise RunError(f"the swarm's servers said nothing for {WAIT_S:.0f} s.")
        for server, pipe in list(self.pipes.items()):
            if pipe not in ready:
                continue
            try:
                number, result = pipe.recv()
            except (EOFError, OSError):
                self.lose(server)
                continue
            ticket = self.trainer.given.get(number)
            if self.trainer.finish(number) and ticket is not None:
                self.results.setdefault(ticket.task, result)
            if server == self.job.killed and number in self.trainer.summed:
                self.processes[server].kill()

    def step(self) -> Tensor:
        """Return the summed gradients once every microbatch's are held on every stage."""
        while True:
            self.give()
            if self.trainer.done:
                total = self.sum_up()
                if total is not None:
                    return total
            elif self.trainer.given:
                self.take()
            else:
                raise RunError("a stage of the swarm has no server left.")

    def sum_up(self) -> Tensor | None:
        """Return the gradients that servers hold, each ticket's once; None where one has left."""
        total = torch.zeros(self.job.stages, 2, self.job.width, self.job.width, dtype=torch.float64)
        for server, pipe in list(self.pipes.items()):
            mine = [t.number for t in self.trainer.summed.values() if t.server == server]
            try:
                pipe.send((mine, None))
                number, result = pipe.recv()
                while number != -1:  # of a task that was taken back
                    number, result = pipe.recv()
            except (EOFError, OSError):
                self.lose(server)
                return None
            total += torch.from_numpy(result)
        return total


def run_swarm(job: SwarmJob, servers: Sequence[Server], in_flight: int) -> SwarmResult:
    """Run a step on one process per server. Raises `RunError` where a stage has none left."""
    run = _Run(job, servers, in_flight)
    try:
        total = run.step()
        return SwarmResult(total, run.trainer.repeated, tuple(run.given), run.sent)
    finally:
        for process in run.processes:
            process.kill()
            process.join()
        for pipe in run.pipes.values():
            pipe.close()


def dense_gradients(job: SwarmJob) -> Tensor:
    """Return the summed gradients [stages, 2, width, width] of the whole network on one device.

    What crosses a boundary passes through the codec both ways, as a swarm's does.
    """
    weights = [stage_weights(s, job.width, job.seed).requires_grad_() for s in range(job.stages)]
    for microbatch in inputs_of(job):
        y = stage_forward(microbatch, weights[0])
        for weight in weights[1:]:
            y = stage_forward(_coded(y, job), weight)
        (y * y).sum().backward()
    return torch.stack([weight.grad for weight in weights if weight.grad is not None])


def _coded(x: Tensor, job: SwarmJob) -> Tensor:
    found: Tensor = _Coded.apply(x, job)  # type: ignore[no-untyped-call]
    return found


class _Coded(torch.autograd.Function):
    """Codes values on their way forward, and gradients on their way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, job: SwarmJob) -> Tensor:
        ctx.job = job
        return unpacked(job.codec, packed(job.codec, x), job.rows, job.width).clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        job = ctx.job
        return unpacked(job.codec, packed(job.codec, dy), job.rows, job.width).clone(), None

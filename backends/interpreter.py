"""Runs a program on one rank: real tensors, real collectives.

The interpreter knows ops and buffers only. It runs the actions of its rank in order, starts
communication when its op comes up, waits for it when another op needs the buffer, and frees every
buffer after its last reader.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from backends.clock import Clock, Mark, clock_of
from backends.torch_ops import OPS, TORCH_DTYPES, Context
from backends.transport import Handle, Transport
from backends.weights import drawn_weights, flat_weights
from simcore.errors import RunError
from simcore.liveness import drops
from simcore.ops import Op
from simcore.program import (
    PERSISTENT,
    Action,
    Key,
    Program,
    axis_degree,
    coordinates,
    group_ranks,
)

# attributes of an op that its communication takes
HOW = ("distance", "senders", "counts", "backups", "slices", "reverse")


class Watcher(Protocol):
    """Sees every op of a step: what it reads before it runs, and the rank after it ran."""

    def before(self, op: Op, layer: int, reads: Sequence[Tensor]) -> None:
        """Look at an op that is about to run."""

    def after(self, interpreter: Interpreter, written: Sequence[Tensor]) -> None:
        """Look at the rank after an op, before what it replaces or ends is dropped."""


@dataclass(slots=True)
class RawSpan:
    """A span whose ends are still marks of the clock."""

    stream: str
    name: str
    start: Mark
    end: Mark
    action: str


@dataclass(slots=True)
class Flight:
    """Communication that was started and not waited for."""

    handle: Handle
    span: RawSpan | None

    def finished_at(self, clock: Clock) -> None:
        """Have the span end when the communication does, where the backend can tell."""
        span = self.span
        assert span is not None

        def stamp(_: object) -> None:
            span.end = clock.mark()

        try:
            self.handle.get_future().add_done_callback(stamp)  # type: ignore[attr-defined]
        except (AttributeError, RuntimeError):  # messages over gloo have no future
            return


@dataclass(slots=True)
class Interpreter:
    """State of one rank: tensors by key, communication in flight, and what was recorded."""

    program: Program
    rank: int
    transport: Transport
    device: torch.device
    seed: int = 0
    fused: bool = True
    local_weights: bool = False  # draw shards directly: for shapes too large to draw whole
    record: bool = False
    dtype: torch.dtype | None = None  # overrides every float dtype (exact tests use float64)
    watcher: Watcher | None = None
    tensors: dict[Key, Tensor] = field(default_factory=dict)
    views: dict[tuple[str, int, int], Tensor] = field(default_factory=dict)
    pending: dict[Key, Flight] = field(default_factory=dict)
    spans: list[RawSpan] = field(default_factory=list)
    results: dict[str, list[Tensor]] = field(default_factory=dict)
    step: int = 0
    places: tuple[int, int] = (-1, -1)  # where the running action reads and writes weights
    clock: Clock = field(init=False)
    where: dict[str, int] = field(init=False)
    context: Context = field(init=False)
    dying: Mapping[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        mesh = self.program.mesh
        self.clock = clock_of(self.device)
        self.where = coordinates(mesh, self.rank)
        self.context = Context(
            self.index,
            lambda axis: axis_degree(mesh, axis),
            self.device,
            self.fused,
            dtype=self.dtype,
        )
        self.dying = drops(self.program, self.where["pp"])

    def index(self, group: str) -> int:
        """Return this rank's place in its group along ``group``."""
        return group_ranks(self.program.mesh, group, self.rank).index(self.rank)

    @property
    def actions(self) -> tuple[Action, ...]:
        """The actions of this rank."""
        return self.program.order[self.where["pp"]]

    def torch_dtype(self, dtype: str) -> torch.dtype:
        """Return the torch dtype in which ``dtype`` is kept in this run."""
        if dtype not in TORCH_DTYPES:
            raise RunError(
                f"dtype {dtype!r} is priced but not executed: run with one of "
                f"{', '.join(TORCH_DTYPES)}."
            )
        found = TORCH_DTYPES[dtype]
        return self.dtype if self.dtype is not None and found.is_floating_point else found

    # -- persistent buffers ------------------------------------------------------------------

    def prepare(self, cache_rows: int = 0) -> None:
        """Create what this rank keeps: weights, gradients, optimizer states, key-value caches.

        A cache is made for ``cache_rows`` rows per sequence.
        """
        for stage, body in dict.fromkeys((action.stage, action.body) for action in self.actions):
            held = self.program.versions.get(stage)
            for place in range(held.kept) if held else (-1,):
                self.places = place, place
                for call, _, op in self.program.ops(body):
                    for name in (*op.reads, *op.writes):
                        self._create(name, call.layer, cache_rows)

    def _create(self, name: str, layer: int, cache_rows: int = 0) -> None:
        key = self._key(name, layer, 0)
        root = self.program.buffers[key[0]]
        if root.scope not in PERSISTENT or key in self.tensors:
            return
        if root.scope == "weight":
            tensor = self._weights(key)
        elif root.init == "copy":
            unit = key[0].removesuffix(".master")
            source = f"{unit}.ws" if f"{unit}.ws" in self.program.buffers else f"{unit}.w"
            self._create(source, layer)
            tensor = self.read(source, layer, 0).to(self.torch_dtype(root.dtype), copy=True)
        else:
            dims = [int(dim) for dim in root.dims]
            if root.scope == "cache":
                dims[3] = cache_rows
            tensor = torch.zeros(dims, device=self.device, dtype=self.torch_dtype(root.dtype))
        self.tensors[key] = tensor

    def _weights(self, key: Key) -> Tensor:
        """Return a unit's flat weights, or this rank's part of them where they are sharded."""
        name, layer, _ = key
        unit, program = name.rsplit(".", 1)[0], self.program
        dtype = self.torch_dtype(program.buffers[name].dtype)
        if self.local_weights:
            whole = drawn_weights(program, unit, dtype, self.device)
        else:
            whole = flat_weights(program, unit, layer, self.index, self.seed, dtype)
        size = int(program.buffers[name].elements)
        if size < whole.numel():
            whole = whole[self.index(self._gather_group(f"{unit}.w")) * size :][:size].clone()
        return whole.to(self.device)

    def _gather_group(self, name: str) -> str:
        """Return the group over which the buffer ``name`` is put together."""
        ops = (op for block in self.program.blocks.values() for op in block.ops)
        return next(op.group for op in ops if op.kind == "all_gather" and name in op.writes)

    # -- access --------------------------------------------------------------------------------

    def _key(self, name: str, layer: int, microbatch: int, *, written: bool = False) -> Key:
        """Return the instance that ``name`` means in the running action, its version included."""
        key = self.program.key(name, layer, microbatch)
        if self.program.buffers[key[0]].scope != "weight":
            return key
        return key[0], key[1], self.places[written]

    def read(self, name: str, layer: int, microbatch: int, *, written: bool = False) -> Tensor:
        """Return the tensor that ``name`` means, waiting for its communication if need be.

        ``written``: of the version of the weights that the running action writes.
        """
        key = self._key(name, layer, microbatch, written=written)
        if key in self.pending:
            self._wait(key)
        buffer = self.program.buffer(name)
        if not buffer.base:
            return self.tensors[key]
        place = self.places[written]
        view = self.views.get((name, layer, place))
        if view is None:
            size = int(buffer.elements)
            offset = self.index(buffer.part) * size if buffer.part else int(buffer.offset)
            flat = self.tensors[key][offset : offset + size]
            view = flat.view([int(dim) for dim in buffer.dims])
            if self.program.buffers[key[0]].scope in PERSISTENT:
                self.views[name, layer, place] = view
        return view

    def _wait(self, key: Key) -> None:
        flight = self.pending.pop(key)
        flight.handle.wait()
        if flight.span is not None and flight.span.end is None:
            flight.span.end = self.clock.mark()

    def _bind(self, name: str, layer: int, microbatch: int, tensor: Tensor) -> None:
        self.tensors[self._key(name, layer, microbatch, written=True)] = tensor

    # -- running ---------------------------------------------------------------------------------

    def run_step(
        self, data: Mapping[tuple[str, int], Tensor], *, cached: int = 0, rows: int = 0
    ) -> None:
        """Run every action of this rank once; ``data`` maps (buffer, microbatch) to a tensor.

        ``cached``: rows in the key-value cache before this pass; ``rows``: longest sequence,
        those included.
        """
        self.begin(cached=cached, rows=rows)
        self.give(data)
        for action in self.actions:
            self.run_action(action)
        self.drain()

    def begin(self, *, cached: int = 0, rows: int = 0) -> None:
        """Start a step: `run_step` says what ``cached`` and ``rows`` are."""
        self.step += 1
        self.context.step = self.step
        self.context.cached = cached
        self.context.rows = rows or int(self.program.info["seq_len"])
        self.results = {}

    def give(self, data: Mapping[tuple[str, int], Tensor]) -> None:
        """Bind what a step reads, by (buffer, microbatch)."""
        for (name, microbatch), tensor in data.items():
            if tensor.is_floating_point():
                tensor = tensor.to(self.torch_dtype(self.program.buffers[name].dtype))  # noqa: PLW2901
            self._bind(name, -1, microbatch, tensor)

    def drain(self) -> None:
        """Wait for all communication and move what the step gives to ``results``."""
        for key in list(self.pending):
            self._wait(key)
        for name in self.program.info["keep"]:
            kept = [key for key in self.tensors if key[0] == name]
            self.results[name] = [self.tensors.pop(key) for key in sorted(kept)]

    def run_action(self, action: Action) -> None:
        """Run one action's ops in issue order."""
        dying = self.dying.get(action.body, {})
        program, microbatch = self.program, action.microbatch
        self.places = program.places(action)
        if action.kind == "O":
            made = (self.step - 1) * int(program.info.get("updates", 1))
            self.context.step = made + microbatch + 1
        for number, call in enumerate(program.bodies[action.body]):
            for index, op in enumerate(program.blocks[call.block].ops):
                if op.is_communication:
                    self._communicate(op, call.layer, microbatch, action)
                else:
                    self._compute(op, call.layer, microbatch, action)
                for key in dying.get((number, index), ()):
                    self._drop(key, microbatch)

    def _drop(self, key: Key, microbatch: int) -> None:
        name, layer, mine = key
        self.tensors.pop((name, layer, microbatch if mine >= 0 else -1), None)

    def _existing(self, name: str, layer: int, microbatch: int) -> Tensor | None:
        """Return the tensor to write into, where the buffer outlives its writer and exists."""
        key = self._key(name, layer, microbatch, written=True)
        scope = self.program.buffers[key[0]].scope
        if (scope in PERSISTENT or scope == "work") and key in self.tensors:
            return self.read(name, layer, microbatch, written=True)
        return None

    def _inputs(self, op: Op, layer: int, microbatch: int) -> list[Tensor]:
        reads = [self.read(name, layer, microbatch) for name in op.reads]
        if self.watcher is not None:
            self.watcher.before(op, layer, reads)
        return reads

    def _compute(self, op: Op, layer: int, microbatch: int, action: Action) -> None:
        reads = self._inputs(op, layer, microbatch)
        outs = [self._existing(name, layer, microbatch) for name in op.writes]
        start = self.clock.mark() if self.record else None
        written = OPS[op.kind](self.context, op, reads, outs)
        if self.record:
            self.spans.append(RawSpan(op.stream, op.kind, start, self.clock.mark(), str(action)))
        if self.watcher is not None:
            here = zip(op.writes, written, strict=True)
            buffer = self.program.buffer
            self.watcher.after(self, [t for name, t in here if buffer(name).scope != "host"])
        for name, out, tensor in zip(op.writes, outs, written, strict=True):
            if out is None:
                self._bind(name, layer, microbatch, tensor)

    def _empty(self, name: str) -> Tensor:
        buffer = self.program.buffer(name)
        return torch.empty(
            [int(dim) for dim in buffer.dims],
            device=self.device,
            dtype=self.torch_dtype(buffer.dtype),
        )

    def _communicate(self, op: Op, layer: int, microbatch: int, action: Action) -> None:
        reads = self._inputs(op, layer, microbatch)
        if op.writes:
            key = self._key(op.writes[0], layer, microbatch, written=True)
            found = self._existing(op.writes[0], layer, microbatch)
        else:
            key, found = (op.stream, layer, microbatch), None
        if op.kind in ("send", "all_reduce", "quorum_reduce"):
            target = reads[0].contiguous()
        else:
            target = found if found is not None else self._empty(op.writes[0])
        if key in self.pending:
            self._wait(key)
        start = self.clock.mark() if self.record else None
        flight = Flight(self._start(op, target, reads, layer, microbatch), None)
        if self.record:
            flight.span = RawSpan(op.stream, op.kind, start, None, str(action))
            self.spans.append(flight.span)
            flight.finished_at(self.clock)
        self.pending[key] = flight
        if self.watcher is not None:
            self.watcher.after(self, [target])
        if op.writes and found is None:
            self._bind(op.writes[0], layer, microbatch, target)

    def _start(
        self, op: Op, target: Tensor, reads: Sequence[Tensor], layer: int, microbatch: int
    ) -> Handle:
        """Start the communication of ``op`` into (or, sending, from) ``target``."""
        if op.kind in ("send", "recv"):
            call = getattr(self.transport, op.kind)
            tag = microbatch * 10007 + layer
            return call(target, op.group, op.attrs["channel"], op.attrs["peer"], tag)  # type: ignore[no-any-return]
        if op.kind == "all_reduce":
            return self.transport.all_reduce(target, op.group)
        if op.kind == "quorum_reduce":
            return self.transport.quorum_reduce(target, reads[1], op.group)
        call = getattr(self.transport, op.kind)
        how = {name: op.attrs[name] for name in HOW if name in op.attrs}
        sent = (read.contiguous() for read in reads)
        return call(target, *sent, op.group, **how)  # type: ignore[no-any-return]

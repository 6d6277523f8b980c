"""Runs a program on one rank: real tensors, real collectives.

The interpreter knows ops and buffers only. It runs the actions of its rank in order, starts
communication when its op comes up, waits for it when another op needs the buffer, and frees every
buffer after its last reader.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from backends.torch_ops import OPS, TORCH_DTYPES, Context
from backends.transport import Handle, Transport
from simcore.liveness import drops
from simcore.ops import COMPUTE, Buffer, Op
from simcore.program import (
    PERSISTENT,
    Action,
    Key,
    Program,
    axis_degree,
    coordinates,
    group_ranks,
)

WEIGHT_STD = 0.02


def seeded(*parts: object) -> torch.Generator:
    """Return a CPU generator whose seed is a checksum of ``parts``."""
    text = "/".join(map(str, parts))
    return torch.Generator().manual_seed(zlib.crc32(text.encode()))


def dense_weight(
    name: str, layer: int, buffer: Buffer, tp: int, seed: int, dtype: torch.dtype
) -> Tensor:
    """Return the whole weight of which ranks hold shards; the same on every rank."""
    dims = list(buffer.dims)
    if buffer.shard_dim == 0:
        dims[0] = sum(buffer.pieces)
    elif buffer.shard_dim == 1:
        dims[1] *= tp
    if buffer.init in ("ones", "zeros"):
        return torch.full(dims, float(buffer.init == "ones"), dtype=dtype)
    noise = torch.randn(dims, generator=seeded(seed, name, layer), dtype=torch.float32)
    return noise.mul_(WEIGHT_STD).to(dtype)


def shard_weight(whole: Tensor, buffer: Buffer, index: int, tp: int) -> Tensor:
    """Return the part of ``whole`` that tensor rank ``index`` holds, zero-padded where it ends."""
    if buffer.shard_dim < 0 or tp == 1:
        return whole
    if buffer.shard_dim == 1:
        return whole.chunk(tp, 1)[index]
    parts, first = [], 0
    for piece in buffer.pieces:
        rows = -(-piece // tp)
        part = whole[first : first + piece][index * rows : (index + 1) * rows]
        if part.shape[0] < rows:
            part = torch.cat((part, part.new_zeros(rows - part.shape[0], *part.shape[1:])))
        parts.append(part)
        first += piece
    return torch.cat(parts)


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
    tensors: dict[Key, Tensor] = field(default_factory=dict)
    views: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    pending: dict[Key, tuple[Handle, tuple[Any, ...]]] = field(default_factory=dict)
    spans: list[tuple[str, str, float, float, str]] = field(default_factory=list)
    results: dict[str, list[Tensor]] = field(default_factory=dict)
    step: int = 0
    where: dict[str, int] = field(init=False)
    context: Context = field(init=False)
    dying: Mapping[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        mesh = self.program.mesh
        self.where = coordinates(mesh, self.rank)
        self.context = Context(self.index, lambda axis: axis_degree(mesh, axis), self.device,
                               self.fused)
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
        found = TORCH_DTYPES[dtype]
        return self.dtype if self.dtype is not None and found.is_floating_point else found

    # -- persistent buffers ------------------------------------------------------------------

    def prepare(self) -> None:
        """Create weights, gradients and optimizer states of this rank."""
        for action in dict.fromkeys((a.stage, a.kind) for a in self.actions):
            for call, _, op in self.program.ops(f"{action[0]}{action[1]}"):
                for name in (*op.reads, *op.writes):
                    self._create(name, call.layer)

    def _create(self, name: str, layer: int) -> None:
        buffer = self.program.buffer(name)
        root = self.program.buffers[buffer.base] if buffer.base else buffer
        key = self.program.key(name, layer, 0)
        if root.scope not in PERSISTENT or key in self.tensors or root.scope == "cache":
            return
        if root.scope == "weight":
            tensor = self._flat_weights(key)
        elif root.init == "copy":
            source = key[0].replace(".master", ".ws")
            source = source if source in self.program.buffers else key[0].replace(".master", ".w")
            self._create(source, layer)
            tensor = self.read(source, layer, 0).to(self.torch_dtype(root.dtype)).clone()
        else:
            tensor = torch.zeros([int(d) for d in root.dims], device=self.device,
                                 dtype=self.torch_dtype(root.dtype))
        self.tensors[key] = tensor

    def _flat_weights(self, key: Key) -> Tensor:
        """Return a unit's flat weights, or this rank's part of them where they are sharded."""
        name, layer, _ = key
        unit = name.split(".")[0]
        flat = self.program.buffers[f"{unit}.w"]
        dtype = self.torch_dtype(flat.dtype)
        whole = torch.zeros(int(flat.elements), dtype=dtype)
        tp = self.program.mesh["tp"]
        for member, buffer in self.program.buffers.items():
            if buffer.base != f"{unit}.w" or buffer.part:
                continue
            span = slice(int(buffer.offset), int(buffer.offset + buffer.elements))
            if self.local_weights:
                local = torch.empty(int(buffer.elements), dtype=dtype).normal_(0, WEIGHT_STD)
            else:
                full = dense_weight(member, layer, buffer, tp, self.seed, dtype)
                local = shard_weight(full, buffer, self.where["tp"], tp)
            whole[span] = local.reshape(-1)
        if name == f"{unit}.ws":
            part = int(self.program.buffers[name].elements)
            index = int(flat.elements) // part
            axis = self._shard_axis(unit)
            assert index == axis_degree(self.program.mesh, axis)
            whole = whole[self.index(axis) * part :][:part].clone()
        return whole.to(self.device)

    def _shard_axis(self, unit: str) -> str:
        for op in self.program.blocks[f"{unit}.unshard"].ops:
            return op.group
        raise AssertionError(unit)

    # -- access --------------------------------------------------------------------------------

    def read(self, name: str, layer: int, microbatch: int) -> Tensor:
        """Return the tensor that ``name`` means, waiting for its communication if need be."""
        key = self.program.key(name, layer, microbatch)
        if key in self.pending:
            self._wait(key)
        buffer = self.program.buffer(name)
        if not buffer.base:
            return self.tensors[key]
        base = self.tensors[key]
        cached = (name, layer)
        view = self.views.get(cached)
        if view is None or view.untyped_storage().data_ptr() != base.untyped_storage().data_ptr():
            size = int(buffer.elements)
            offset = self.index(buffer.part) * size if buffer.part else int(buffer.offset)
            view = base[offset : offset + size].view([int(d) for d in buffer.dims])
            self.views[cached] = view
        return view

    def _wait(self, key: Key) -> None:
        handle, (stream, label, start) = self.pending.pop(key)
        handle.wait()
        self._span(stream, label, start, self._finished(handle))

    def _finished(self, handle: Handle) -> float:
        return time.perf_counter()

    def _span(self, stream: str, label: str, start: float, end: float) -> None:
        if self.record:
            self.spans.append((stream, label, start, end, ""))

    def _bind(self, name: str, layer: int, microbatch: int, tensor: Tensor) -> None:
        key = self.program.key(name, layer, microbatch)
        self.tensors[key] = tensor

    # -- running ---------------------------------------------------------------------------------

    def run_step(self, data: Mapping[tuple[str, int], Tensor]) -> None:
        """Run every action of this rank once; ``data`` maps (buffer, microbatch) to a tensor."""
        self.step += 1
        self.context.step = self.step
        self.context.rows = int(self.program.info["seq_len"])
        self.results = {}
        for (name, microbatch), tensor in data.items():
            self._bind(name, -1, microbatch, tensor)
        for action in self.actions:
            self.run_action(action)
        self.drain()

    def drain(self) -> None:
        """Wait for all communication and drop what the step leaves behind."""
        for key in list(self.pending):
            self._wait(key)
        for name in self.program.info["keep"]:
            kept = [key for key in self.tensors if key[0] == name]
            self.results[name] = [self.tensors.pop(key) for key in sorted(kept)]

    def run_action(self, action: Action) -> None:
        """Run one action's ops in issue order."""
        dying = self.dying.get(action.body, {})
        program, microbatch = self.program, action.microbatch
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

    def _outlives(self, name: str) -> bool:
        buffer = self.program.buffer(name)
        scope = self.program.buffers[buffer.base].scope if buffer.base else buffer.scope
        return scope in PERSISTENT or scope == "work"

    def _outs(self, op: Op, layer: int, microbatch: int) -> list[Tensor | None]:
        found: list[Tensor | None] = []
        for name in op.writes:
            key = self.program.key(name, layer, microbatch)
            exists = self._outlives(name) and key in self.tensors
            found.append(self.read(name, layer, microbatch) if exists else None)
        return found

    def _compute(self, op: Op, layer: int, microbatch: int, action: Action) -> None:
        reads = [self.read(name, layer, microbatch) for name in op.reads]
        outs = self._outs(op, layer, microbatch)
        start = time.perf_counter()
        written = OPS[op.kind](self.context, op, reads, outs)
        if self.record:
            self.spans.append((COMPUTE, op.kind, start, time.perf_counter(), str(action)))
        for name, out, tensor in zip(op.writes, outs, written, strict=True):
            if out is None:
                self._bind(name, layer, microbatch, tensor)

    def _empty(self, name: str) -> Tensor:
        buffer = self.program.buffer(name)
        return torch.empty([int(d) for d in buffer.dims], device=self.device,
                           dtype=self.torch_dtype(buffer.dtype))

    def _communicate(self, op: Op, layer: int, microbatch: int, action: Action) -> None:
        reads = [self.read(name, layer, microbatch) for name in op.reads]
        outs = self._outs(op, layer, microbatch)
        start = time.perf_counter()
        if op.kind == "all_reduce":
            target = reads[0].contiguous()
            handle = self.transport.all_reduce(target, op.group)
            if outs[0] is None:
                self._bind(op.writes[0], layer, microbatch, target)
        elif op.kind in ("send", "recv"):
            tag = _tag(op, layer, microbatch)
            if op.kind == "send":
                handle = self.transport.send(reads[0].contiguous(), op.group, op.attrs["peer"], tag)
                key = ("send", layer, tag)
                self.pending[key] = (handle, (op.stream, str(action), start))
                return
            target = self._empty(op.writes[0])
            handle = self.transport.recv(target, op.group, op.attrs["peer"], tag)
            self._bind(op.writes[0], layer, microbatch, target)
        else:
            target = outs[0] if outs[0] is not None else self._empty(op.writes[0])
            call = getattr(self.transport, op.kind)
            handle = call(target, reads[0].contiguous(), op.group)
            if outs[0] is None:
                self._bind(op.writes[0], layer, microbatch, target)
        key = self.program.key(op.writes[0], layer, microbatch)
        label = f"{op.kind}.{op.group}"
        self.pending[key] = (handle, (op.stream, label, start))


def _tag(op: Op, layer: int, microbatch: int) -> int:
    """Return a number that both ends of a message compute alike."""
    return (microbatch * 100003 + layer) * 2 + (op.attrs["channel"] == "B")

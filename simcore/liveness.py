"""When buffers come to life and die: what an executor frees, and the peak of memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from simcore.ops import Buffer, Op
from simcore.program import PERSISTENT, Action, Key, Program
from simcore.streaming import IN_PLACE

Position = tuple[int, int]  # (index of call in body, index of op in block)
Drops = Mapping[str, Mapping[Position, tuple[Key, ...]]]  # body -> position -> keys, microbatch 0


def positions(program: Program, body: str) -> Iterator[tuple[Position, int, Op]]:
    """Yield ((call index, op index), layer, op) of a body in issue order."""
    for number, call in enumerate(program.bodies[body]):
        for index, op in enumerate(program.blocks[call.block].ops):
            yield (number, index), call.layer, op


def sequences(program: Program, rank: int) -> list[tuple[str, ...]]:
    """Return the distinct chains of bodies that a microbatch passes on pipeline rank ``rank``."""
    chains: dict[int, list[str]] = {}
    for action in program.order[rank]:
        chains.setdefault(action.microbatch, []).append(action.body)
    return list(dict.fromkeys(tuple(chain) for chain in chains.values()))


def drops(program: Program, rank: int) -> dict[str, dict[Position, tuple[Key, ...]]]:
    """Return which buffers die after which op, for every body of pipeline rank ``rank``.

    A value lives from the op that defines it to its last use before the next definition: an op
    that writes a buffer whole, without reading it.
    """
    keep = set(program.info.get("keep", ()))
    bodies = {action.body for action in program.order[rank]}
    used = {call.block for body in bodies for call in program.bodies[body]}
    touched = {name: _touches(program, program.blocks[name].ops) for name in used}
    found: dict[str, dict[Position, tuple[Key, ...]]] = {}
    for chain in sequences(program, rank):
        last: dict[Key, tuple[str, Position]] = {}
        for body in chain:
            inside: dict[Key, tuple[str, Position]] = {}
            for number, call in enumerate(program.bodies[body]):
                for index, touches in enumerate(touched[call.block]):
                    where = number, index
                    for name, above, each, _, fresh in touches:
                        key = name, call.layer + above if above >= 0 else -1, each
                        for table in (last, inside) if fresh else ():
                            if key in table:
                                _collect(found, {key: table[key]})
                    for name, above, each, scope, _ in touches:
                        key = name, call.layer + above if above >= 0 else -1, each
                        if scope in ("act", "host") and name not in keep:
                            last[key] = (body, where)
                        elif scope == "work":
                            inside[key] = (body, where)
            _collect(found, inside)
        _collect(found, last)
    return found


# What an op touches: the buffer's name, its layer from the call's (-1: none), its microbatch (-1:
# none), its scope, and whether the op defines it anew.
Touch = tuple[str, int, int, str, bool]


def _touches(program: Program, ops: Sequence[Op]) -> list[list[Touch]]:
    """Return what each op of a block touches, every buffer once."""
    found = []
    for op in ops:
        read = {program.key(name, 0, 0) for name in op.reads}
        touches: dict[Key, Touch] = {}
        for name in (*op.reads, *op.writes):
            key = program.key(name, 0, 0)
            fresh = name in op.writes and key not in read and not program.buffer(name).base
            touches[key] = (*key, program.buffers[key[0]].scope, fresh)
        found.append(list(touches.values()))
    return found


def _scope(program: Program, name: str) -> str:
    """Return the scope of the storage behind ``name``."""
    buffer = program.buffer(name)
    return program.buffers[buffer.base].scope if buffer.base else buffer.scope


def _collect(
    found: dict[str, dict[Position, tuple[Key, ...]]], last: Mapping[Key, tuple[str, Position]]
) -> None:
    for key, (body, where) in last.items():
        table = found.setdefault(body, {})
        if key not in table.get(where, ()):
            table[where] = (*table.get(where, ()), key)


@dataclass(frozen=True, slots=True)
class Residents:
    """Bytes that a pipeline rank keeps for the whole step, by part."""

    parts: Mapping[str, float]

    @property
    def total(self) -> float:
        """Sum over the parts."""
        return sum(self.parts.values())


PARTS = {"weight": "weights", "grad": "gradients", "state": "optimizer", "cache": "kv_cache"}


def residents(program: Program, rank: int) -> Residents:
    """Return the persistent bytes of pipeline rank ``rank``, each storage once."""
    seen: dict[Key, tuple[Buffer, int]] = {}
    for stage, body in {(action.stage, action.body) for action in program.order[rank]}:
        held = program.versions.get(stage)
        for _, layer, op in positions(program, body):
            for name in (*op.reads, *op.writes):
                if _scope(program, name) in PERSISTENT:
                    key = program.key(name, layer, 0)
                    buffer = program.buffers[key[0]]
                    seen[key] = buffer, held.kept if held and buffer.scope == "weight" else 1
    parts = dict.fromkeys((*PARTS.values(), "stashes"), 0.0)
    for buffer, copies in seen.values():
        parts[PARTS[buffer.scope]] += float(buffer.held_bytes)
        parts["stashes"] += float(buffer.held_bytes) * (copies - 1)
    return Residents(parts)


@dataclass(slots=True)
class _Heap:
    """Live storages with reference counts, since an alias shares its source's storage."""

    program: Program
    host: bool = False  # whether to count what lies in the host's memory instead
    owner: dict[Key, int] = field(default_factory=dict)
    refs: dict[int, int] = field(default_factory=dict)
    sizes: dict[int, float] = field(default_factory=dict)
    now: float = 0.0
    peak: float = 0.0
    logits: float = 0.0  # of these bytes, those of logits and their gradients
    logits_at_peak: float = 0.0
    fresh: int = 0

    def bind(self, key: Key, storage: int | None) -> None:
        """Make ``key`` name ``storage``, or a new one where it is None."""
        if storage is None:
            storage = self.fresh = self.fresh + 1
            buffer = self.program.buffers[key[0]]
            size = float(buffer.held_bytes) * ((buffer.scope == "host") == self.host)
            self.sizes[storage], self.refs[storage] = size, 0
            self.now += size
            if _is_logits(key):
                self.logits += size
            if self.now > self.peak:
                self.peak, self.logits_at_peak = self.now, self.logits
        self.refs[storage] += 1
        self.release(key)
        self.owner[key] = storage

    def release(self, key: Key) -> None:
        """Forget ``key``; its storage dies with its last name."""
        storage = self.owner.pop(key, None)
        if storage is None:
            return
        self.refs[storage] -= 1
        if not self.refs[storage]:
            self.now -= self.sizes[storage]
            if _is_logits(key):
                self.logits -= self.sizes[storage]

    def run(self, op: Op, layer: int, microbatch: int) -> None:
        """Bind what an op writes."""
        program = self.program
        for name in op.writes:
            if _scope(program, name) in PERSISTENT or program.buffer(name).base:
                continue
            key = program.key(name, layer, microbatch)
            source: int | None = None
            if op.kind in SHARES_STORAGE or (op.kind in IN_PLACE and op.reads[0] == name):
                source = self.owner.get(program.key(op.reads[0], layer, microbatch))
            self.bind(key, source)


def _is_logits(key: Key) -> bool:
    return key[0].removeprefix("d.").startswith("logits")


@dataclass(frozen=True, slots=True)
class _Profile:
    """By how much a body changes the level of one microbatch, and its peak above that level."""

    change: float
    peak: float
    logits_change: float
    logits_at_peak: float


def _profile(program: Program, rank: int, host: bool = False) -> dict[str, _Profile]:
    """Return the profile of every body of pipeline rank ``rank``."""
    dying = drops(program, rank)
    profile: dict[str, _Profile] = {}
    for chain in sequences(program, rank):
        if all(body in profile for body in chain):
            continue
        heap = _Heap(program, host)
        for body in chain:
            before, logits = heap.now, heap.logits
            heap.peak, heap.logits_at_peak = before, logits
            for where, layer, op in positions(program, body):
                heap.run(op, layer, 0)
                for key in dying.get(body, {}).get(where, ()):
                    heap.release(key)
            profile[body] = _Profile(
                heap.now - before,
                heap.peak - before,
                heap.logits - logits,
                heap.logits_at_peak - logits,
            )
    return profile


SHARES_STORAGE = frozenset({"alias", "all_reduce"})


def activation_peaks(program: Program, rank: int) -> tuple[float, list[tuple[Action, float]]]:
    """Return the peak bytes of buffers that come and go, and the level after every action."""
    peak, _, levels = _levels(program, rank)
    return peak, levels


def activation_parts(program: Program, rank: int) -> dict[str, float]:
    """Return what makes up the peak of `activation_peaks`: logits, and all else."""
    peak, logits, _ = _levels(program, rank)
    return {"activations": peak - logits, "logits": logits}


def swaps(program: Program) -> bool:
    """Whether any activation goes to the host's memory."""
    return any(buffer.scope == "host" for buffer in program.buffers.values())


def host_peak(program: Program, rank: int) -> float:
    """Return the most bytes that the rank's activations take of its host's memory at once."""
    return _levels(program, rank, host=True)[0]


def _levels(
    program: Program, rank: int, *, host: bool = False
) -> tuple[float, float, list[tuple[Action, float]]]:
    """Return the peak, the logits in it, and the level after every action."""
    profile = _profile(program, rank, host)
    level = logits = peak = logits_at_peak = 0.0
    levels = []
    for action in program.order[rank]:
        body = profile[action.body]
        if level + body.peak > peak:
            peak, logits_at_peak = level + body.peak, logits + body.logits_at_peak
        level += body.change
        logits += body.logits_change
        levels.append((action, level))
    return peak, logits_at_peak, levels

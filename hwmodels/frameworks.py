"""What a training framework runs where the program says one op, and what its host spends on it.

A program says what is computed. A framework decides by how many kernels: attention in one fused
kernel, or as two batched products with softmax and dropout between them; a bias added by the
kernel that follows; logits copied to fp32. It also decides whether gradients are reduced beside
the backward pass or after it. `FrameworkCost` prices a program's ops as a framework runs them, on
top of any cost model; `arranged` moves a program's reductions where the framework has them.

What may be fitted to measured steps is a handful of numbers: host seconds per kernel and per
collective, and the share of its benchmarked speed that a family of kernels keeps in a real step
(clocks under sustained power, cold caches, a library's older kernels).
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from hwmodels.cost import ATTENTION_KINDS, ClusterCost
from simcore.errors import InputError, unknown
from simcore.ops import COMMUNICATION, COMPUTE, FREE, WORK, Op, Size
from simcore.program import Action, Block, Program

DATA = Path(__file__).parent / "data" / "frameworks.toml"
RINGS = ("all_gather", "reduce_scatter")
ATTENTIONS = ("fused", "unfused")
WAITING = ("1f1b", "gpipe", "interleaved")  # schedules whose hosts may wait for each message
_MASK_BYTES = 0.5  # of a dropout's mask, in elements of 16 bits


@dataclass(frozen=True, slots=True)
class Framework:
    """How a framework runs ops, and its constants in seconds.

    ``kernels``: launches for one op of a kind, 1 where it is not named; ``passes``: traffic of an
    elementwise kind over that of the program, 0 where another kernel does it on its way.
    ``issue_s``: host time per kernel; ``call_s``: per collective or message, and ``call_rank_s``
    more for every rank of its group. ``skew_s``: mean delay of the ranks that a collective waits
    for. ``hop_s``: what a message between nodes takes besides its bytes, in a ring that passes on
    one of every other rank (gathers and scatters; reductions take trees). ``*_share``: part of
    their benchmarked speed that kernels of a family keep. ``aliases``: further names;
    ``keeps``: its name in `hwmodels.training_memory.KEEPING`, "" where it keeps nothing beside a
    program's buffers.
    """

    name: str
    attention: str = "fused"
    overlaps_gradients: bool = True
    waits_for_messages: bool = False
    waits_for_batches: bool = False
    issue_s: float = 0.0
    call_s: float = 0.0
    call_rank_s: float = 0.0
    skew_s: float = 0.0
    hop_s: float = 0.0
    matmul_share: float = 1.0
    attention_share: float = 1.0
    memory_share: float = 1.0
    aliases: tuple[str, ...] = ()
    keeps: str = ""
    kernels: Mapping[str, float] = field(default_factory=dict)
    passes: Mapping[str, float] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.attention not in ATTENTIONS:
            raise unknown(f"attention of framework {self.name!r}", self.attention, ATTENTIONS)
        for kind in (*self.kernels, *self.passes):
            if kind not in WORK:
                raise unknown(f"op kind of framework {self.name!r}", kind, WORK)
        for share in ("matmul_share", "attention_share", "memory_share"):
            if not 0 < getattr(self, share) <= 1:
                raise InputError(
                    f"{share} {getattr(self, share)} of framework {self.name!r} must be above 0 "
                    "and at most 1."
                )
        if min(self.issue_s, self.call_s, self.call_rank_s, self.skew_s, self.hop_s) < 0:
            raise InputError(f"seconds of framework {self.name!r} must be 0 or above.")


@lru_cache(maxsize=1)
def frameworks() -> dict[str, Framework]:
    """Return every known framework, by name."""
    table = tomllib.loads(DATA.read_text(encoding="utf-8"))
    return {
        name: Framework(name, **{**row, "aliases": tuple(row.get("aliases", ()))})
        for name, row in table.items()
    }


def load_framework(name: str) -> Framework:
    """Return the framework of that name or alias. Raises `InputError` for an unknown one."""
    named = {alias: it for it in frameworks().values() for alias in (it.name, *it.aliases)}
    if name not in named:
        raise unknown("framework", name, named)
    return named[name]


def arranged(program: Program, framework: Framework) -> Program:
    """Return the program as the framework orders it.

    Where reductions do not overlap they are in line with compute. Where hosts wait for messages,
    each message is received right before the action that needs it, and its op says so. Where they
    wait for batches, no host starts a microbatch before its device is done with what came before.
    Raises `InputError` for a schedule whose messages cannot be waited for one by one.
    """
    if not framework.overlaps_gradients:
        blocks = {name: Block(name, _in_line(block.ops)) for name, block in program.blocks.items()}
        program = replace(program, blocks=blocks)
    if framework.waits_for_batches:
        program = replace(program, info={**program.info, "waits": True})
    if not framework.waits_for_messages:
        return program
    schedule = program.info.get("schedule", WAITING[0])
    if schedule not in WAITING:
        raise InputError(
            f"the framework {framework.name!r} waits for every message and has no schedule "
            f"{schedule!r}: set [parallel].schedule to one of {', '.join(WAITING)}."
        )
    blocks = {
        name: Block(name, tuple(_waiting(op) for op in block.ops))
        for name, block in program.blocks.items()
    }
    order = tuple(_received_late(actions) for actions in program.order)
    return replace(program, blocks=blocks, order=order)


def _in_line(ops: Sequence[Op]) -> tuple[Op, ...]:
    return tuple(replace(op, stream=COMPUTE) if op.stream == "dp" else op for op in ops)


def _waiting(op: Op) -> Op:
    messages = op.kind in ("send", "recv")
    return replace(op, attrs={**op.attrs, "waits": True}) if messages else op


def _received_late(actions: Sequence[Action]) -> tuple[Action, ...]:
    """Return the actions with every receive moved to just before the action that it feeds."""
    held: dict[tuple[int, int, str], Action] = {}
    found: list[Action] = []
    for action in actions:
        if action.kind.startswith("RECV"):
            held[action.stage, action.microbatch, action.kind[-1]] = action
            continue
        wanted = held.pop((action.stage, action.microbatch, action.kind[0]), None)
        found += [action] if wanted is None else [wanted, action]
    return tuple(found)


def attention_parts(op: Op) -> tuple[Op, ...]:
    """Return the kernels of unfused attention: products, softmax and dropout over all pairs.

    A batched product of b h matrices is priced as one with b h times the rows. Backward: dP, dV,
    dropout, softmax, dQ, dK; the probabilities were kept, so no scores again.
    """
    d = op.dims
    calls = d["b"] * d["h"]
    queries, keys = calls * d["s"], calls * d["kv"]

    def product(m: Size, n: Size, k: Size) -> Op:
        attrs = {"layout": "nt"}
        return Op("matmul", {"m": m, "n": n, "k": k}, op.dtype, (), (), attrs=attrs)

    def pairs(kind: str, passes: float) -> Op:
        return Op(kind, {"t": queries * passes, "n": d["kv"]}, op.dtype, (), ())

    if op.kind == "attention":
        return (
            product(queries, d["kv"], d["d"]),
            pairs("gelu", 1.0),  # scale, mask and softmax: read and write
            pairs("gelu", 1.0 + _MASK_BYTES / 2),
            product(queries, d["dv"], d["kv"]),
        )
    return (
        product(queries, d["kv"], d["dv"]),
        product(keys, d["dv"], d["s"]),
        pairs("gelu", 1.0 + _MASK_BYTES / 2),
        pairs("gelu_backward", 1.0),
        product(queries, d["d"], d["kv"]),
        product(keys, d["d"], d["s"]),
    )


def harmonic(ranks: int) -> float:
    """Return 1 + 1/2 + ... + 1/n: the mean of the largest of n exponential delays of mean 1."""
    return sum(1 / number for number in range(1, ranks + 1))


@dataclass(frozen=True, slots=True)
class FrameworkCost:
    """A cluster's cost model as a framework uses it; also its network."""

    base: ClusterCost
    framework: Framework

    @property
    def synchronous(self) -> bool:
        """Whether the host computes itself."""
        return self.base.synchronous

    def seconds(self, op: Op) -> Size:
        """Return the seconds of all kernels that the framework runs for ``op``."""
        framework = self.framework
        if op.is_communication:
            return self.base.seconds(op) + self._waiting_seconds(op)
        if op.kind in ATTENTION_KINDS:
            unfused = framework.attention == "unfused"
            parts = attention_parts(op) if unfused else (op,)
            return sum(self.base.seconds(part) for part in parts) / framework.attention_share
        if op.kind == "matmul":
            return self.base.seconds(op) / framework.matmul_share
        passes = framework.passes.get(op.kind, 1.0)
        if not passes:
            return 0.0
        if passes != 1.0:
            op = replace(op, dims={**op.dims, "t": op.dims["t"] * passes})
        return self.base.seconds(op) / framework.memory_share

    def _waiting_seconds(self, op: Op) -> float:
        """Return what a collective takes besides its bytes: late ranks, messages between nodes."""
        layout = self.base.layout(op.group)
        ranks = int(np.max(layout.ranks))
        if ranks == 1:
            return 0.0
        wait = self.framework.skew_s * harmonic(ranks)
        if op.kind in RINGS and np.max(layout.ranks_per_node) < ranks:
            wait += self.framework.hop_s * (ranks - 1)
        return wait

    def issue_seconds(self, op: Op) -> Size:
        """Return the host's time to issue all kernels of ``op``."""
        framework = self.framework
        if op.kind in FREE or framework.passes.get(op.kind) == 0:
            return 0.0
        if op.kind in COMMUNICATION:
            grouped = op.group not in ("", "pp")
            ranks = np.asarray(self.base.layout(op.group).ranks if grouped else 2)
            return framework.call_s + framework.call_rank_s * ranks.astype(np.float64)
        return framework.issue_s * framework.kernels.get(op.kind, 1.0)

    def slowdown(self, op: Op, beside: Op) -> Size:
        """Return how many times longer ``op`` takes beside a collective."""
        return 1.0 if op.is_communication else self.base.slowdown(op, beside)

    def blocking_share(self, op: Op) -> float:
        """Return the share of a communication in which its rank cannot compute."""
        return self.base.blocking_share(op)

    def pass_overhead_seconds(self, sequences: Size) -> Size:
        """Return the seconds of a step that belong to no op: none are known."""
        return 0.0

    def uncertainty(self, op: Op) -> tuple[str, Size]:
        """Return what ``op``'s seconds rest on and the deviation of their logarithm."""
        return self.base.uncertainty(op)

    def path(self, src: int, dst: int) -> Sequence[int]:
        """Return the links between two ranks."""
        return self.base.path(src, dst)

    def latency(self, path: Sequence[int]) -> float:
        """Return the latency of a message along ``path``."""
        return self.base.latency(path)

    def rates(self, paths: Sequence[Sequence[int]]) -> Sequence[float]:
        """Return max-min fair rates, in bytes per second."""
        return self.base.rates(paths)

"""What a training framework holds on a rank beside the tensors of a program.

A program says what is kept for the backward pass and for how long (`simcore.liveness`). A framework
keeps more beside some of it: masks of dropout beside what they were drawn for, 32-bit copies of
logits, what unfused kernels leave. Each of these lives as long as the buffer beside which it is
named, so that schedules, recomputation and sharding need no second formula.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from simcore.errors import unknown
from simcore.ops import Buffer
from simcore.program import Program

# Of Megatron-LM's unfused attention: the softmax's result in 16 bits and, where there is dropout,
# its mask of one byte and its result (Korthikanti et al. 2022, section 4.1: 5 a s per token).
PAIR_BYTES = {True: 5.0, False: 2.0}
# Workspaces of the product library and small buffers of a process; observed in allocations of
# Megatron-LM at rest, beside the states.
WORKSPACE_BYTES = 7.0e7


@dataclass(frozen=True, slots=True)
class Keeping:
    """What a framework keeps: bytes per element beside a buffer, by the buffer's name.

    ``masks``: of these bytes, those that only dropout makes. ``gradients``: bytes per element
    beside the flat buffer of gradients. ``in_place``: sharded gradients are reduced within that
    buffer. ``modules``: what it recomputes on its own (`simcore.recompute.MODULES`).
    """

    beside: Mapping[str, float] = field(default_factory=dict)
    masks: Mapping[str, float] = field(default_factory=dict)
    gradients: float = 0.0
    in_place: bool = True
    modules: tuple[str, ...] = ()


KEEPING: dict[str, Keeping] = {
    # The gradient of the logits in fp32; a mask of one byte for each of the two dropouts of the
    # residual stream; inputs of column-parallel products gathered again (Korthikanti et al. 2022,
    # sections 4.1 and 4.2.2).
    "megatron-lm": Keeping({"d.logits": 2.0}, {"n1": 1.0, "n2": 1.0}, modules=("gathers",)),
    # Nothing is fused: the gate's result and vectors before rotation stay; logits in fp32, their
    # distance from the maximum and its exponential as well, all beside their gradient in 16 bits;
    # gradients in 16 bits beside those in fp32 (nanotron's modules, read with its reserved memory).
    "nanotron": Keeping({"act": 2.0, "qkv.rope": 2.0, "d.logits": 10.0}, gradients=2.0),
}


def find_keeping(name: str) -> Keeping:
    """Return what a framework keeps. Raises `InputError` for an unknown name."""
    if name not in KEEPING:
        raise unknown("framework", name, KEEPING)
    return KEEPING[name]


def as_kept(
    program: Program, keeping: Keeping, *, unfused: bool = False, dropout: bool = True
) -> Program:
    """Return the program with what a framework keeps beside its buffers.

    ``unfused``: attention keeps its pairs; ``dropout``: of the residual stream and, unfused, of
    attention.
    """
    beside = dict(keeping.beside)
    if dropout:
        beside |= keeping.masks
    if unfused:
        beside["lse"] = PAIR_BYTES[dropout] * float(program.info["seq_len"])

    def extra(name: str, buffer: Buffer) -> float:
        if buffer.scope == "grad" and name.endswith(".g"):
            return keeping.gradients
        if buffer.scope == "grad" and name.endswith(".gs") and _within(program, name):
            return -buffer.size_bytes / buffer.elements if keeping.in_place else 0.0
        return beside.get(name, 0.0)

    buffers = {
        name: replace(buffer, beside_bytes=extra(name, buffer) * buffer.elements)
        for name, buffer in program.buffers.items()
    }
    return replace(program, buffers=buffers)


def _within(program: Program, shard: str) -> bool:
    """Whether the whole gradient that a shard is cut from is kept too."""
    return program.buffers[shard.removesuffix("s")].scope == "grad"

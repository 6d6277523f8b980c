"""What a program says that a rank will do in one step: FLOPs, traffic and payload."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from simcore.mixed import MixedProgram, Variant
from simcore.ops import work
from simcore.program import Action, Program
from simcore.sequence import on_rank


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over the ops of a rank in one step; ``payload_bytes`` by (kind, group)."""

    flops: float
    vector_flops: float
    read_bytes: float
    write_bytes: float
    payload_bytes: Mapping[tuple[str, str], float]


def block_totals(program: Program, rank: int | None = None) -> dict[str, Totals]:
    """Return the sums over every block's ops, as ``rank`` runs them or one with most to do."""
    found = {}
    for name, block in program.blocks.items():
        payload: dict[tuple[str, str], float] = {}
        flops = vector = read = write = 0.0
        for op in block.ops:
            done = work(op if rank is None else on_rank(program, op, rank))
            flops += done.flops
            vector += done.vector_flops
            read += done.read_bytes
            write += done.write_bytes
            if op.is_communication:
                key = op.kind, op.group
                payload[key] = payload.get(key, 0.0) + done.payload_bytes
        found[name] = Totals(flops, vector, read, write, payload)
    return found


def step_totals(program: Program, pp_rank: int, rank: int | None = None) -> Totals:
    """Return the sums over the actions of pipeline rank ``pp_rank``.

    Where its ranks have unequal parts of a sequence's work, those of ``rank``, or of one with most.
    """
    return action_totals(program, program.order[pp_rank], rank)


def action_totals(program: Program, actions: Iterable[Action], rank: int | None = None) -> Totals:
    """Return the sums over some actions of the program."""
    blocks = block_totals(program, rank)
    uses = Counter(call.block for action in actions for call in program.bodies[action.body])
    payload: dict[tuple[str, str], float] = {}
    for name, times in uses.items():
        for key, size in blocks[name].payload_bytes.items():
            payload[key] = payload.get(key, 0.0) + times * size
    flops, vector, read, write = (
        sum(times * getattr(blocks[name], what) for name, times in uses.items())
        for what in ("flops", "vector_flops", "read_bytes", "write_bytes")
    )
    return Totals(flops, vector, read, write, payload)


def mixed_totals(mixed: MixedProgram, rank: int) -> Totals:
    """Return the sums over a rank's actions in a step over unequal lengths."""
    by_variant: dict[Variant, list[Action]] = {}
    for variant, action in mixed.actions(rank):
        by_variant.setdefault(variant, []).append(action)
    found = [action_totals(mixed.variants[v], a, rank) for v, a in by_variant.items()]
    payload: Counter[tuple[str, str]] = Counter()
    for each in found:
        payload.update(each.payload_bytes)
    flops, vector, read, write = (
        sum(getattr(each, what) for each in found)
        for what in ("flops", "vector_flops", "read_bytes", "write_bytes")
    )
    return Totals(flops, vector, read, write, payload)

"""A step over sequences of unequal length: groups of ranks, each with sequences of its own.

A *lane* is a data-parallel rank or one of the ranks that share a sequence: lanes = dp x cp. A
`Piece` runs some sequences of about one length on a group of neighbouring lanes, their context-
parallel degree; an `Assignment` lists the pieces of a step in the order in which lanes run theirs.
Every kind of piece is a `Program` of its own (a `Variant`), lowered for its degree, length and
batch. All variants share weights, gradients and optimizer states: whatever the degree, gradients
are summed, or sharded, over all lanes, and the loss is the mean over the step's real tokens.
Sources: FlexSP (Wang et al. 2025), ByteScale's hybrid data parallelism (Ge et al. 2025).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from simcore.errors import InputError
from simcore.lower import lower_training
from simcore.models import ModelSpec
from simcore.program import Action, Program, coordinates
from simcore.schedules import find_schedule
from simcore.sequence import SequenceSplit
from simcore.strategy import ParallelStrategy
from simcore.workloads import TrainStep

ENDS_REDUCING = ("BR", "WR")  # kinds of the actions that also reduce gradients


class Variant(NamedTuple):
    """What a program is lowered for: padded tokens of a sequence, sequences, lanes that share."""

    tokens: int
    batch: int
    degree: int


IDLE = Variant(0, 0, 1)  # of lanes without pieces, which only take part in the reductions


class Piece(NamedTuple):
    """Sequences, by number, that a group of lanes runs at once, each padded to ``tokens``."""

    sequences: tuple[int, ...]
    tokens: int
    first: int  # lane of the group
    degree: int

    @property
    def variant(self) -> Variant:
        """The program that the piece runs."""
        return Variant(self.tokens, len(self.sequences), self.degree)

    @property
    def lanes(self) -> range:
        """The lanes of its group."""
        return range(self.first, self.first + self.degree)


@dataclass(frozen=True, slots=True)
class Assignment:
    """Which lanes run which sequences: pieces in the order in which lanes run theirs."""

    lanes: int
    pieces: tuple[Piece, ...]

    def of_lanes(self) -> tuple[tuple[int, ...], ...]:
        """Return per lane the numbers of its pieces, in order."""
        found: list[list[int]] = [[] for _ in range(self.lanes)]
        for number, piece in enumerate(self.pieces):
            for lane in piece.lanes:
                found[lane].append(number)
        return tuple(map(tuple, found))

    def check(self, lengths: Sequence[int]) -> None:
        """Raise `InputError` unless every sequence is run once, by a group that exists."""
        seen = sorted(number for piece in self.pieces for number in piece.sequences)
        if seen != list(range(len(lengths))):
            raise InputError(
                f"the assignment runs {len(seen)} sequences, not each of the step's "
                f"{len(lengths)} once."
            )
        for piece in self.pieces:
            inside = 0 <= piece.first <= self.lanes - piece.degree
            if self.lanes % piece.degree or piece.first % piece.degree or not inside:
                raise InputError(
                    f"a group of {piece.degree} lanes from lane {piece.first} does not lie on a "
                    f"multiple of its size among {self.lanes} lanes."
                )
            longest = max(lengths[number] for number in piece.sequences)
            if longest > piece.tokens:
                raise InputError(
                    f"a sequence of {longest} tokens does not fit a piece of {piece.tokens}."
                )


def lanes_of(parallel: ParallelStrategy) -> int:
    """Return the lanes of a strategy: ranks that see different tokens, pipeline stages apart."""
    return parallel.dp * parallel.cp


def lane_of(mesh: Mapping[str, int], rank: int) -> int:
    """Return the lane of a rank of any variant's mesh."""
    lanes = 1
    for axis, degree in mesh.items():
        lanes *= 1 if axis in ("pp", "tp") else degree
    return rank // mesh["tp"] % lanes


def for_variant(parallel: ParallelStrategy, variant: Variant) -> ParallelStrategy:
    """Return the strategy of a variant: its degree as cp, the other lanes as replicas."""
    degree = variant.degree
    ulysses = min(parallel.cp_ulysses, degree)
    kind = parallel.cp_kind
    if kind == "usp" and ulysses in (1, degree):
        kind, ulysses = ("ring" if ulysses == 1 else "ulysses"), 1
    window = parallel.cp_window
    return replace(
        parallel,
        dp_replicate=lanes_of(parallel) // degree,
        dp_shard=1,
        cp=degree,
        zero_stage=parallel.zero,
        microbatch=variant.batch,
        cp_kind=kind,
        cp_ring=degree // ulysses if kind == "usp" else 1,
        cp_ulysses=ulysses if kind == "usp" else 1,
        cp_window=window if window < degree and not degree % max(window, 1) else 0,
    )


def unit_of(parallel: ParallelStrategy, degree: int) -> int:
    """Return what the padded tokens of a sequence over ``degree`` lanes must be a multiple of."""
    split: SequenceSplit = for_variant(parallel, Variant(1, 1, degree)).split
    shards = parallel.tp * degree if parallel.sequence_parallel else 1
    unit = split.unit
    while unit % shards:
        unit += split.unit
    return unit


_PLAIN: dict[str, tuple[object, ...]] = {  # keys that serve sequences of one length alone
    "stream_chunks": (1,),
    "ping_pong": (False,),
    "loss_chunks": (0, 1),
    "backup_workers": (0,),
    "grad_codec": ("none",),
}


def check_mixed(model: ModelSpec, parallel: ParallelStrategy) -> None:
    """Raise `InputError` where groups of different degree cannot share a step."""
    if parallel.zero >= 2:
        raise InputError(
            f"zero_stage {parallel.zero} gathers or reduces with every microbatch, of which ranks "
            "with lengths of their own run different numbers: set [parallel].zero_stage to 0 or 1."
        )
    if parallel.ep > 1:
        raise InputError(
            f"ep {parallel.ep} exchanges rows in every layer among ranks that here run different "
            "sequences: set [parallel].ep to 1."
        )
    if model.experts and parallel.capacity_factor is not None:
        raise InputError(
            "a capacity_factor would let padding take the place of tokens: leave "
            "[parallel].capacity_factor out where lengths differ."
        )
    for key, plain in _PLAIN.items():
        if getattr(parallel, key) not in plain:
            raise InputError(
                f"[parallel].{key} needs sequences of one length: leave it out where they differ."
            )
    schedule = find_schedule(parallel.schedule)
    if schedule.copies > 1:
        raise InputError(
            f"the schedule {parallel.schedule!r} sends microbatches of one shape from both "
            "ends, which lengths that differ do not give: set [parallel].schedule to '1f1b'."
        )
    if schedule.updates:
        raise InputError(
            f"the schedule {parallel.schedule!r} updates weights within a step, which lengths that "
            "differ do not allow: set [parallel].schedule to '1f1b'."
        )
    if not model.causal:
        raise InputError(
            "padding would be attended to by a network that is not causal: give sequences of one "
            "length."
        )


@dataclass(frozen=True, slots=True)
class MixedProgram:
    """One step: a program per variant, and what every lane runs.

    ``orders``: pieces of a lane -> actions per pipeline rank, whose microbatch counts its pieces.
    """

    variants: Mapping[Variant, Program]
    pieces: tuple[Piece, ...]
    lengths: tuple[int, ...]
    lanes: tuple[tuple[int, ...], ...]  # numbers of the pieces of each lane
    orders: Mapping[int, tuple[tuple[Action, ...], ...]]

    @property
    def mesh(self) -> Mapping[str, int]:
        """The mesh of one of the variants: all have the same ranks, and lanes."""
        return next(iter(self.variants.values())).mesh

    @property
    def world(self) -> int:
        """Number of ranks."""
        return next(iter(self.variants.values())).world

    def actions(self, rank: int) -> list[tuple[Variant, Action]]:
        """Return a rank's actions and their variants; a microbatch is the number of a piece."""
        mine = self.lanes[lane_of(self.mesh, rank)]
        order = self.orders[len(mine)][coordinates(self.mesh, rank)["pp"]]
        last = self.pieces[mine[-1]].variant if mine else IDLE
        return [
            (last, action)
            if is_ending(action) or not mine
            else (
                self.pieces[mine[action.microbatch]].variant,
                action._replace(microbatch=mine[action.microbatch]),
            )
            for action in order
        ]


def is_ending(action: Action) -> bool:
    """Whether an action comes after all pieces."""
    return action.kind == "O" or action.kind.startswith("TIE")


def lower_variant(
    model: ModelSpec,
    parallel: ParallelStrategy,
    variant: Variant,
    work: TrainStep,
    pieces: int = 2,
) -> Program:
    """Return the program of one variant; its order is that of a lane with ``pieces`` pieces."""
    strategy = for_variant(parallel, variant)
    count = pieces * strategy.dp * variant.batch
    step = replace(
        work, global_batch=count, seq_len=variant.tokens, lengths=(), loss_tokens=work.tokens
    )
    return lower_training(model, strategy, step)


def _idle(program: Program) -> Program:
    """Return the program of lanes that only take part in reductions and in the optimizer."""
    bodies = dict(program.bodies)
    order: list[tuple[Action, ...]] = []
    for actions in program.order:
        mine = [a for a in actions if a.kind in ENDS_REDUCING]
        for stage, kind, _ in mine:
            bodies[f"{stage}R"] = tuple(
                call for call in program.bodies[f"{stage}{kind}"] if call.block.endswith(".reduce")
            )
        ends = [a for a in actions if is_ending(a)]
        order.append((*(Action(a.stage, "R", 0) for a in mine), *ends))
    used = {action.body for actions in order for action in actions}
    return replace(
        program,
        bodies={name: calls for name, calls in bodies.items() if name in used},
        order=tuple(order),
    )


def lower_mixed(
    model: ModelSpec, parallel: ParallelStrategy, work: TrainStep, assignment: Assignment
) -> MixedProgram:
    """Return the programs of a step over ``work.lengths``, assigned to lanes.

    Raises `InputError` where the strategy, or the assignment, does not go with such a step.
    """
    check_mixed(model, parallel)
    assignment.check(work.lengths)
    lanes = assignment.of_lanes()
    if parallel.pp > 1:
        _check_apart(assignment, lanes)
    kinds = dict.fromkeys(piece.variant for piece in assignment.pieces)
    variants = {kind: lower_variant(model, parallel, kind, work) for kind in kinds}
    some = next(iter(kinds))
    orders = {
        count: lower_variant(model, parallel, some, work, count).order
        for count in sorted({len(mine) for mine in lanes} - {0})
    }
    if not all(lanes):
        variants[IDLE] = _idle(variants[some])
        orders[0] = variants[IDLE].order
    return MixedProgram(variants, assignment.pieces, tuple(work.lengths), lanes, orders)


def _check_apart(assignment: Assignment, lanes: tuple[tuple[int, ...], ...]) -> None:
    """Raise where the lanes of a group are at different microbatches of their pipelines."""
    for piece in assignment.pieces:
        if len({lanes[lane] for lane in piece.lanes}) > 1:
            raise InputError(
                "pp > 1 needs groups of lanes that stay together for the whole step: set "
                "[parallel].balance to 'static' or 'flexsp', or pp to 1."
            )

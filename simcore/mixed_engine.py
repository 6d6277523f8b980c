"""The event engine on a step over sequences of unequal length.

Lanes that share pieces, directly or through others, are simulated together: a piece starts when
all lanes of its group are free. Sets of lanes with equal pieces are simulated once, and in a set
lanes with the same pieces are followed once. All lanes meet in the collectives of the gradients,
so the step ends with the slowest; what others wait there is theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from simcore.costs import CostOf, Pricing
from simcore.mixed import IDLE, MixedProgram, Variant
from simcore.program import Program
from simcore.templates import Template, templates
from simcore.timeline import RankTimes, Span, Timeline

if TYPE_CHECKING:
    from simcore.engine import LaneEngine

Laid = Mapping[Variant, tuple[Program, Mapping[str, Template]]]


@dataclass(frozen=True, slots=True)
class LaneSet:
    """Lanes that share pieces, and the numbers of these pieces, in order."""

    lanes: tuple[int, ...]
    pieces: tuple[int, ...]

    def shape(self, mixed: MixedProgram) -> tuple[tuple[Variant, int], ...]:
        """Return what makes two sets alike: variants and places of their pieces, in order."""
        base = self.lanes[0]
        return tuple(
            (p.variant, p.first - base) for p in map(mixed.pieces.__getitem__, self.pieces)
        )


def lane_sets(mixed: MixedProgram) -> list[LaneSet]:
    """Return the sets of lanes that share pieces, idle lanes apart."""
    owner = list(range(len(mixed.lanes)))

    def root(lane: int) -> int:
        while owner[lane] != lane:
            owner[lane] = owner[owner[lane]]
            lane = owner[lane]
        return lane

    for piece in mixed.pieces:
        for lane in piece.lanes[1:]:
            owner[root(lane)] = root(piece.first)
    lanes: dict[int, list[int]] = {}
    pieces: dict[int, list[int]] = {}
    for lane, mine in enumerate(mixed.lanes):
        if mine:
            lanes.setdefault(root(lane), []).append(lane)
    for number, piece in enumerate(mixed.pieces):
        pieces.setdefault(root(piece.first), []).append(number)
    return [LaneSet(tuple(lanes[key]), tuple(pieces[key])) for key in lanes]


def lay_variants(mixed: MixedProgram, cost_of: CostOf) -> Laid:
    """Return every variant's program and templates; idle lanes end no later than others."""
    return {
        kind: (program, templates(program, cost_of(program.mesh)))
        for kind, program in mixed.variants.items()
        if kind != IDLE
    }


def _simulate_set(
    mixed: MixedProgram, lanes: LaneSet, variants: Laid, cost: Pricing
) -> tuple[LaneEngine, dict[int, int], float]:
    """Return the engine after its run, the lane that stands for each lane, and the seconds."""
    from simcore.engine import LaneEngine

    program, laid = next(iter(variants.values()))
    stands: dict[tuple[int, ...], int] = {}
    for lane in lanes.lanes:
        stands.setdefault(mixed.lanes[lane], lane)
    tp, depth = program.mesh["tp"], program.mesh["pp"]
    plans = {}
    for lane in stands.values():
        for stage in range(depth):
            rank = (stage * len(mixed.lanes) + lane) * tp
            plans[rank] = [action for _, action in mixed.actions(rank)]
    sharing = {number: sum(number in mine for mine in stands) for number in lanes.pieces}
    engine = LaneEngine(
        program,
        cost,
        cost,
        list(plans),
        detail=False,
        laid=laid,
        variants=variants,
        pieces=mixed.pieces,
        plans=plans,
        sharing=sharing,
    )
    step = engine.run().step_s
    return engine, {lane: stands[mixed.lanes[lane]] for lane in lanes.lanes}, step


def simulate_mixed(mixed: MixedProgram, cost_of: CostOf, variants: Laid | None = None) -> Timeline:
    """Return the simulated timeline of a step: times of every lane, spans of those followed.

    ``variants``: from `lay_variants`, where they are known already.
    """
    variants = variants or lay_variants(mixed, cost_of)
    cost = cost_of(mixed.mesh)
    tp, depth, count = mixed.mesh["tp"], mixed.mesh["pp"], len(mixed.lanes)
    alike: dict[tuple[tuple[Variant, int], ...], list[LaneSet]] = {}
    for lanes in lane_sets(mixed):
        alike.setdefault(lanes.shape(mixed), []).append(lanes)
    runs = [(sets, *_simulate_set(mixed, sets[0], variants, cost)) for sets in alike.values()]
    step = max(seconds for *_, seconds in runs)
    idle = RankTimes(0.0, 0.0, step)
    times = {rank * tp: idle for rank in range(count * depth)}
    spans: list[Span] = []
    for sets, engine, stands, _ in runs:
        spans += engine.spans
        for lane, standing in stands.items():
            for stage in range(depth):
                found = engine.states[(stage * count + standing) * tp].clock.times(step)
                for each in sets:
                    there = lane - sets[0].lanes[0] + each.lanes[0]
                    times[(stage * count + there) * tp] = found
    return Timeline(step, tuple(spans), times)

"""Processor time of a run, predicted and measured: what other work on the machine cannot disturb.

It is the seconds for which the ranks' own threads occupy a core, whether others wait for it or not:
all compute, and the host's part in communication, which the prediction leaves out.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from backends.launch import RunResult
from hwmodels.cost import ClusterCost
from simcore.program import Program, coordinates
from simcore.sequence import on_rank


def predicted_processor_seconds(programs: Sequence[Program], cost: ClusterCost) -> float:
    """Return the seconds of all ranks' compute, over the programs of one run."""
    total = 0.0
    for program in programs:
        for rank in range(program.world):
            for action in program.order[coordinates(program.mesh, rank)["pp"]]:
                for _, _, op in program.ops(action.body):
                    if not op.is_communication:
                        mine = on_rank(program, op, rank)
                        total += float(cost.seconds(mine)) if all(mine.dims.values()) else 0.0
    return total / cost.crowding


def measured_processor_seconds(results: Sequence[RunResult]) -> float:
    """Return the median over repeats of what all ranks' threads took; 0 where it was not told."""
    repeats = [
        sum(each)
        for result in results
        for each in zip(*(rank.processor_seconds for rank in result.ranks), strict=True)
    ]
    return statistics.median(repeats) if repeats else 0.0

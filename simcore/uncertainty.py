"""How far a predicted time may be off: the errors of its parts, carried to the whole.

Kernels that share measurements err together, those that do not err independently. With w_f the
share of a program's work that rests on measurements f and s_f the standard deviation of
log(real / predicted) there, the whole has s^2 = sum_f (w_f s_f)^2 to first order.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping

import numpy as np

from simcore.costs import CostModel
from simcore.program import Program

Z_80 = 1.2816  # a normal variable lies within so many standard deviations with 80 %


def program_deviation(program: Program, cost: CostModel) -> float:
    """Return the standard deviation of log(real / predicted) of a program's time.

    Work that overlaps counts in full, which errs to the wide side.
    """
    seconds: dict[str, float] = defaultdict(float)
    weighted: dict[str, float] = defaultdict(float)
    uses = Counter(
        call.block
        for actions in program.order
        for action in actions
        for call in program.bodies[action.body]
    )
    for block, times in uses.items():
        for op in program.blocks[block].ops:
            if op.kind in ("send", "recv"):
                continue
            source, deviation = cost.uncertainty(op)
            spent = times * float(np.mean(cost.seconds(op)))
            seconds[source] += spent
            weighted[source] += spent * float(np.mean(deviation))
    return combined(seconds, weighted)


def combined(seconds: Mapping[str, float], weighted: Mapping[str, float]) -> float:
    """Return the deviation of a sum from each source's seconds and seconds x deviation."""
    total = sum(seconds.values())
    return math.sqrt(sum(value**2 for value in weighted.values())) / total if total else 0.0


def interval(seconds: float, deviation: float) -> list[float]:
    """Return the 80 % interval of a time, log-normal about its prediction."""
    return [seconds * math.exp(-Z_80 * deviation), seconds * math.exp(Z_80 * deviation)]

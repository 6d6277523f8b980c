"""Steps to a loss as the batch grows, and the batch that reaches it soonest.

steps(B) = S_min (1 + B_crit / B) (McCandlish et al. 2018, An Empirical Model of Large-Batch
Training, equation 2.11): below B_crit twice the batch halves the steps, above it does little.
B_crit follows the tokens trained on, not the network's size (Zhang et al. 2024, How Does Critical
Batch Size Scale in Pre-training?). No loss curve is assumed: a user attaches measured ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simcore.errors import InputError

Array = NDArray[np.float64]
DATA_EXPONENT = 0.47  # of the power law in tokens that Zhang et al. (2024) fitted on C4
OVERHEAD = 0.2  # extra steps over linear scaling at what Zhang et al. call the critical batch


@dataclass(frozen=True, slots=True)
class StepsToLoss:
    """How many steps reach a loss; batches in any unit, the same for both."""

    least_steps: float  # S_min, with a batch without bound
    critical_batch: float  # B_crit, where twice the least steps are needed

    def __post_init__(self) -> None:
        if not (self.least_steps > 0 and self.critical_batch > 0):
            raise InputError("steps to a loss need least_steps and critical_batch above 0.")

    def steps(self, batch: float | Array) -> float | Array:
        """Return S_min (1 + B_crit / B)."""
        return self.least_steps * (1 + self.critical_batch / batch)

    def samples(self, batch: float | Array) -> float | Array:
        """Return steps x batch = S_min (B + B_crit), in the batch's unit."""
        return self.least_steps * (batch + self.critical_batch)

    def overhead(self, batch: float | Array) -> float | Array:
        """Return the extra steps over linear scaling from small batches: B / B_crit."""
        return batch / self.critical_batch

    def largest_batch(self, overhead: float = OVERHEAD) -> float:
        """Return the batch at which so large an overhead is reached."""
        return overhead * self.critical_batch


def fit_steps(batches: Sequence[float], steps: Sequence[float]) -> StepsToLoss:
    """Return the law through measured steps: least squares of relative errors in (1, 1 / B).

    Raises `InputError` for fewer than two batches, or steps that do not fall with the batch.
    """
    x, y = np.asarray(batches, dtype=float), np.asarray(steps, dtype=float)
    if x.size != y.size or np.unique(x).size < 2 or not (np.all(x > 0) and np.all(y > 0)):
        raise InputError("a fit needs as many steps as batches, of two sizes at least, above 0.")
    design = np.column_stack([1 / y, 1 / (x * y)])
    (least, slope), *_ = np.linalg.lstsq(design, np.ones_like(y), rcond=None)
    if not (least > 0 and slope > 0):
        raise InputError("these steps do not fall towards a least number as the batch grows.")
    return StepsToLoss(float(least), float(slope / least))


def critical_batch(
    tokens: float, known_batch: float, known_tokens: float, exponent: float = DATA_EXPONENT
) -> float:
    """Return the critical batch for ``tokens`` of training from one that was measured.

    known_batch (tokens / known_tokens) ** exponent, whatever the size of the network.
    """
    if not (tokens > 0 and known_batch > 0 and known_tokens > 0):
        raise InputError("a critical batch needs tokens, known_batch and known_tokens above 0.")
    return float(known_batch * (tokens / known_tokens) ** exponent)


@dataclass(frozen=True, slots=True)
class LossCurve:
    """Loss = floor + a / N^alpha + b / D^beta (Hoffmann et al. 2022), coefficients from a fit."""

    floor: float
    a: float
    alpha: float
    b: float
    beta: float

    def loss(self, parameters: float, tokens: float) -> float:
        """Return the loss of a network of ``parameters`` after ``tokens``."""
        return float(self.floor + self.a / parameters**self.alpha + self.b / tokens**self.beta)

    def tokens(self, parameters: float, loss: float) -> float:
        """Return the tokens to a loss; infinite where the network never reaches it."""
        left = loss - self.floor - self.a / parameters**self.alpha
        return float((self.b / left) ** (1 / self.beta)) if left > 0 else math.inf


def seconds_to_loss(law: StepsToLoss, batch: float, step_s: float) -> float:
    """Return steps(batch) x the seconds of a step."""
    return float(law.steps(batch)) * step_s


def best_batch(
    law: StepsToLoss, batches: Sequence[float], step_s: Callable[[float], float]
) -> float:
    """Return the batch, one of ``batches``, that reaches the loss soonest.

    On fixed devices, where a step takes fixed + B x each, it lies beside
    sqrt(B_crit fixed / each).
    """
    return min(batches, key=lambda batch: seconds_to_loss(law, batch, step_s(batch)))


def best_degree(
    law: StepsToLoss,
    degrees: Sequence[int],
    samples_per_rank: float,
    step_s: Callable[[int], float],
    *,
    device_seconds: float = math.inf,
    devices_per_replica: int = 1,
) -> int | None:
    """Return the data-parallel degree that reaches the loss soonest, or None.

    Each replica takes ``samples_per_rank``, so that the batch grows with the degree; ``step_s``
    gives the seconds of a step with its all-reduce. Degrees that spend more than
    ``device_seconds`` in total are left out; None where all do.
    """
    times = {}
    for degree in degrees:
        seconds = seconds_to_loss(law, degree * samples_per_rank, step_s(degree))
        if seconds * degree * devices_per_replica <= device_seconds:
            times[degree] = seconds
    return min(times, key=lambda degree: times[degree]) if times else None

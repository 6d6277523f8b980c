"""Steps that wait for the slowest: slow ranks and links, backup workers, shrinking on failure.

A synchronous step ends with its last rank. Where b of n ranks may be left behind (Chen et al. 2016,
Revisiting distributed synchronous SGD), it ends with the (n - b)-th fastest: an order statistic.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simcore.errors import InputError

Array = NDArray[np.float64]
Quantile = Callable[[Array], Array]  # chance that a rank takes longer, in (0, 1) -> its seconds
POINTS = 20_001


def harmonic(n: int) -> float:
    """Return 1 + 1/2 + ... + 1/n."""
    return float(np.sum(1.0 / np.arange(1, n + 1)))


def _check(n: int, backups: int) -> None:
    if not 0 <= backups < n:
        raise InputError(f"backups = {backups} must be 0 or more and below the {n} workers.")


def exponential_kth_s(n: int, backups: int, mean_s: float) -> float:
    """Return the expected seconds of the (n - b)-th of n exponential workers: mean (H_n - H_b)."""
    _check(n, backups)
    return mean_s * (harmonic(n) - harmonic(backups))


def expected_kth_s(n: int, backups: int, upper_quantile: Quantile) -> float:
    """Return the expected seconds of the (n - b)-th fastest of n independent workers.

    ``upper_quantile`` gives the seconds that a worker exceeds with a chance (of shape (points,)).
    By Renyi's form the chance that the k-th exceeds is exp(-T), T the k-th of n unit exponentials,
    whose density is integrated numerically.
    """
    _check(n, backups)
    k = n - backups
    terms = 1.0 / np.arange(backups + 1, n + 1)
    mean, deviation = float(terms.sum()), float(np.sqrt((terms**2).sum()))
    low = max(mean - 12 * deviation, mean * 1e-9)
    t = np.linspace(low, mean + 12 * deviation + 40 / (backups + 1), POINTS)
    log_density = (
        math.lgamma(n + 1)
        - math.lgamma(k)
        - math.lgamma(backups + 1)
        + (k - 1) * np.log(-np.expm1(-t))
        - (backups + 1) * t
    )
    density = np.exp(log_density)
    return float(np.trapezoid(density * upper_quantile(np.exp(-t)), t) / np.trapezoid(density, t))


def best_backups(n: int, iteration_s: Callable[[int], float], gain: Callable[[int], float]) -> int:
    """Return the number of backups whose progress per second is largest.

    ``iteration_s(b)``: seconds of a step that leaves b behind; ``gain(b)``: progress of such a
    step, (n - b) / n where every gradient counts alike.
    """
    return max(range(n), key=lambda b: gain(b) / iteration_s(b))


@dataclass(frozen=True, slots=True)
class Slow:
    """Slow parts: the chance that one is slow in a step, and how many times longer it then takes.

    ``rank`` factors stretch compute, ``link`` factors stretch communication that nothing hides.
    ``spared``: slow ranks that a step does not wait for.
    """

    rank_chance: float = 0.0
    rank_factor: float = 1.0
    link_chance: float = 0.0
    link_factor: float = 1.0
    spared: int = 0

    def __post_init__(self) -> None:
        for name in ("rank", "link"):
            chance, factor = getattr(self, f"{name}_chance"), getattr(self, f"{name}_factor")
            if not 0 <= chance <= 1 or not factor >= 1:
                raise InputError(
                    f"a slow {name} needs a chance of 0 to 1 and a factor of 1 or more."
                )


def chance_of_any(chance: float, count: int) -> float:
    """Return the chance that at least one of ``count`` independent parts is slow."""
    return 1.0 if chance >= 1 else -math.expm1(count * math.log1p(-chance))


def chance_of_more(chance: float, count: int, spared: int) -> float:
    """Return the chance that more than ``spared`` of ``count`` independent parts are slow."""
    if spared == 0 or chance in (0, 1):
        return chance_of_any(chance, count) if count > spared else 0.0
    terms = (
        math.lgamma(count + 1)
        - math.lgamma(k + 1)
        - math.lgamma(count - k + 1)
        + k * math.log(chance)
        + (count - k) * math.log1p(-chance)
        for k in range(spared + 1, count + 1)
    )
    return min(1.0, math.fsum(map(math.exp, terms)))


def slowed_step_s(
    step_s: float, compute_s: float, exposed_s: float, devices: int, slow: Slow
) -> float:
    """Return the expected seconds of a step that waits for its slowest rank and link.

    ``compute_s``: compute of the busiest rank; ``exposed_s``: its communication that nothing hides.
    A slow rank delays the step by all that its compute takes longer, as it does where no slack
    hides it: an upper bound in pipelines.
    """
    waits = chance_of_more(slow.rank_chance, devices, slow.spared)
    ranks = waits * (slow.rank_factor - 1) * compute_s
    links = chance_of_any(slow.link_chance, devices) * (slow.link_factor - 1) * exposed_s
    return step_s + ranks + links


def shrink_share(rate_per_s: float, repair_s: float) -> float:
    """Return the share of replicas at work where a run goes on without those under repair.

    A replica works for 1 / rate and is away for ``repair_s``, whatever the others do: by renewal
    1 / (1 + rate x repair), which holds for every law of repair.
    """
    return 1.0 / (1.0 + rate_per_s * repair_s)

"""A training step whose sequences differ in length: every replica draws its own.

Lengths are rounded up to a few classes; the actions of a class are priced once. Replicas whose
microbatches are of the same classes in the same order do the same and are simulated once, by
the event engine. Replicas meet in the collectives of the gradients, so the step ends with the
slowest; what others wait there is theirs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simcore.costs import CostModel, Network
from simcore.errors import InputError
from simcore.estimate import representative
from simcore.lower import lower_training
from simcore.models import ModelSpec
from simcore.program import Program
from simcore.strategy import ParallelStrategy
from simcore.templates import Template, templates
from simcore.workloads import TrainStep

Lengths = NDArray[np.int64]
Variant = tuple[Program, Mapping[str, Template]]


def lognormal_lengths(
    count: int, median: float, sigma: float, longest: int, seed: int = 0
) -> Lengths:
    """Return ``count`` lengths in tokens from a log-normal law, at least 1 and at most longest."""
    if not (count > 0 and median > 0 and sigma >= 0 and longest > 0):
        raise InputError("lengths need count, median and longest above 0, and sigma of 0 or more.")
    drawn = np.random.default_rng(seed).lognormal(math.log(median), sigma, count)
    return np.clip(np.ceil(drawn), 1, longest).astype(np.int64)


def length_classes(lengths: Lengths, classes: int, unit: int = 1) -> Lengths:
    """Return every length rounded up to one of at most ``classes`` lengths, multiples of ``unit``.

    Classes lie at even steps of the logarithm between the shortest and the longest; lengths that
    are few already stay as they are, but for the unit.
    """
    whole = -(-np.asarray(lengths, dtype=np.int64) // unit) * unit
    distinct = np.unique(whole)
    if distinct.size <= classes:
        return whole
    edges = np.geomspace(distinct[0], distinct[-1], classes)
    edges = np.unique(-(-np.floor(edges + 1e-6).astype(np.int64) // unit) * unit)
    edges[-1] = distinct[-1]
    found: Lengths = edges[np.searchsorted(edges, whole)]
    return found


@dataclass(frozen=True, slots=True)
class LengthsStep:
    """A simulated step over sequences of different lengths."""

    step_s: float
    replica_s: NDArray[np.float64]  # seconds that each replica would take alone, (dp,)
    tokens: int
    classes: tuple[int, ...]
    replicas_simulated: int
    padding_fraction: float  # tokens that the classes and the microbatches add

    @property
    def tokens_per_s(self) -> float:
        """Real tokens per second, over all replicas."""
        return self.tokens / self.step_s

    @property
    def imbalance(self) -> float:
        """Slowest replica over the mean: 1 where all are alike."""
        return float(self.replica_s.max() / self.replica_s.mean())


def _variants(
    model: ModelSpec,
    parallel: ParallelStrategy,
    sequences: int,
    lengths: Sequence[int],
    cost: CostModel,
) -> dict[int, Variant]:
    found: dict[int, Variant] = {}
    for length in lengths:
        program = lower_training(model, parallel, TrainStep(sequences, int(length)))
        found[int(length)] = program, templates(program, cost)
    return found


def simulate_lengths(
    model: ModelSpec,
    parallel: ParallelStrategy,
    lengths: Lengths,
    cost: CostModel,
    network: Network,
    *,
    classes: int = 16,
    longest_first: bool = True,
) -> LengthsStep:
    """Return the simulated step over sequences of ``lengths``, shape (global_batch,).

    Replica r takes the r-th run of global_batch / dp sequences, microbatch by microbatch; a
    microbatch is padded to its longest. With ``longest_first`` a replica runs its longest
    microbatches first, which also folds replicas that differ in order alone. Raises `InputError`
    where the batch does not divide.
    """
    from simcore.engine import MixedEngine

    lengths = np.asarray(lengths, dtype=np.int64)
    if lengths.ndim != 1 or lengths.size == 0 or lengths.min() < 1 or classes < 1:
        raise InputError("lengths must be a list of tokens, 1 or more each, and classes 1 or more.")
    if lengths.size % (parallel.dp * parallel.microbatch):
        raise InputError(
            f"{lengths.size} lengths are not a multiple of dp {parallel.dp} x microbatch "
            f"{parallel.microbatch}: draw another number."
        )
    unit = parallel.tp if parallel.sequence_parallel else 1
    each = lengths.reshape(parallel.dp, -1, parallel.microbatch)
    rounded = length_classes(each.max(axis=2).ravel(), classes, unit).reshape(parallel.dp, -1)
    if longest_first:
        rounded = -np.sort(-rounded, axis=1)
    known = np.unique(rounded)
    variants = _variants(model, parallel, lengths.size, known.tolist(), cost)
    rows, which = np.unique(rounded, axis=0, return_inverse=True)
    program, laid = next(iter(variants.values()))
    ranks = [representative(program, rank) for rank in range(len(program.order))]
    seconds = np.array(
        [
            MixedEngine(
                program, cost, network, ranks, False,
                laid=laid, variants=variants, lengths=row.tolist(),
            ).run().step_s
            for row in rows
        ]
    )  # fmt: skip
    replicas = seconds[which.ravel()]
    return LengthsStep(
        float(replicas.max()),
        replicas,
        int(lengths.sum()),
        tuple(known.tolist()),
        len(rows),
        float(rounded.sum() * parallel.microbatch / lengths.sum() - 1),
    )

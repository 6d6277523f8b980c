"""Checks of steps over sequences of unequal length."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cache

import numpy as np

from hwmodels.catalogue import make_cluster
from hwmodels.cost import ClusterCost
from simcore.balance import (
    BALANCERS,
    Menu,
    Pieces,
    ends_of,
    make_menu,
    one_degree,
)
from simcore.balance import flexsp as mixed_groups
from simcore.catalogue import load_model
from simcore.costs import CostOf
from simcore.lengths import length_classes, lognormal_lengths
from simcore.mixed import Assignment, Piece, lower_mixed
from simcore.models import ModelSpec
from simcore.strategy import ParallelStrategy
from simcore.workloads import TrainStep
from validation.systems.frame import Finding, check, need_torch

CHIP = "a100-sxm-80gb"
MODEL = "llama-2-7b"
ROOM = 80e9, 8e9  # bytes of a rank, and those in reserve
MEDIAN = 2048
EXECUTED = "executed on 2 gloo ranks: losses equal those of one rank with every sequence alone"
SMALL = ModelSpec(
    "small", 2, 16, 4, 2, 4, 24, 29, weights_dtype="fp32", compute_dtype="fp32", kv_dtype="fp32"
)
SMALL_LENGTHS = (24, 4, 6, 3, 10, 5, 2, 8)


def on_cluster(ranks: int) -> CostOf:
    """Return what prices meshes over nodes of 8 A100."""
    per_node = min(8, ranks)
    cluster = make_cluster(CHIP, per_node, ranks // per_node, None, None)
    made = cache(lambda mesh: ClusterCost(cluster, dict(mesh)))
    return lambda mesh: made(tuple(mesh.items()))


def step_of(lengths: Sequence[int]) -> TrainStep:
    """Return one step over sequences of these lengths."""
    return TrainStep(len(lengths), max(lengths), lengths=tuple(lengths))


def drawn_together(
    sigmas: Sequence[float], count: int, longest: int, classes: int
) -> dict[tuple[float, int], list[int]]:
    """Return by (sigma, seed) log-normal lengths, rounded up to classes of all of them."""
    found = {
        (sigma, seed): lognormal_lengths(count, MEDIAN, sigma, longest, seed)
        for sigma in sigmas
        for seed in range(3)
    }
    whole = length_classes(np.concatenate(list(found.values())), classes, 256)
    parts = np.split(whole, len(found))
    return {key: part.tolist() for key, part in zip(found, parts, strict=True)}


@cache
def runs_exactly() -> bool:
    """Return whether every strategy's step on 2 gloo ranks has the losses of one rank alone."""
    need_torch()
    from backends.launch import Job, RunOptions, run_many

    work = step_of(SMALL_LENGTHS)
    options = RunOptions(repeats=1, warmup=1, dtype="fp64", dump=("losses",), timeout_s=60)
    alone = Assignment(1, tuple(Piece((i,), n, 0, 1) for i, n in enumerate(SMALL_LENGTHS)))
    whole = Job(lower_mixed(SMALL, ParallelStrategy(), work, alone), options)
    pair = ParallelStrategy(dp_replicate=2, zero_stage=1)
    menu = make_menu(Pieces(SMALL, pair, work, on_cluster(2)))
    # Of sequences this short none is worth splitting: the longest one is made to be.
    menu.seconds[-1, 0] = np.inf
    jobs = [
        Job(lower_mixed(SMALL, pair, work, BALANCERS[name](menu)), options)
        for name in ("hdp", "zeppelin")
    ]
    halves = [Piece((0,), 24, 0, 2), *(Piece((i,), n, i % 2, 1) for i, n in
              enumerate(SMALL_LENGTHS) if i)]  # fmt: skip
    jobs.append(Job(lower_mixed(SMALL, pair, work, Assignment(2, tuple(halves))), options))
    expected = run_many([whole])[0].losses
    return all(np.allclose(run.losses, expected, rtol=1e-9) for run in run_many(jobs))


def best_single(menu: Menu) -> float:
    """Return the seconds of the best single degree."""
    found = (one_degree(menu, degree) for degree in menu.degrees)
    return min(float(ends_of(menu, each).max()) for each in found if each is not None)


@check("G3.7", mutant={"plans": "largest"})
def flexsp(*, ranks: int = 8, plans: str = "all") -> Finding:
    """Mixed groups against the best single degree, long-tailed and equal lengths.

    ``plans``: "all" partitions, or only the "largest" group.
    """
    exact = runs_exactly()
    parallel = ParallelStrategy(
        dp_replicate=ranks, zero_stage=1, recompute="full", cp_kind="ulysses"
    )
    every = drawn_together((0.0, 0.5, 1.0, 1.5), 128, 65536, 8)
    pieces = Pieces(load_model(MODEL), parallel, step_of([1]), on_cluster(ranks), *ROOM)
    gains: dict[float, list[float]] = {}
    for (sigma, _), lengths in every.items():
        pieces.work = step_of(lengths)
        menu = make_menu(pieces)
        if plans == "all":
            ends = ends_of(menu, mixed_groups(menu))
        else:
            wide = make_menu(pieces, degrees=(ranks,))
            ends = ends_of(wide, mixed_groups(wide))
        gains.setdefault(sigma, []).append(best_single(menu) / float(ends.max()))
    mean = {sigma: float(np.mean(found)) for sigma, found in gains.items()}
    never = min(itertools.chain(*gains.values())) >= 1 - 1e-12
    return Finding(
        exact and never and abs(mean[0.0] - 1) < 0.01 and max(mean.values()) <= 1.98 * 1.25,
        ", ".join(f"{g:.2f}x at sigma {s:g}" for s, g in mean.items()),
        "every single degree is one of the plans; only a long tail needs different ones"
        if never
        else "a fixed group pays its exchanges for short sequences too",
        ("128 log-normal sequences around 2048 tokens per step", f"{ranks} A100 of one node, "
         "Ulysses, ZeRO 1, layers recomputed", "solving is overlapped with the step before",
         EXECUTED),
        "cpu",
    )  # fmt: skip

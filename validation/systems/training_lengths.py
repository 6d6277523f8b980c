"""Checks of steps over sequences of unequal length."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np

from hwmodels.catalogue import make_cluster
from hwmodels.cost import ClusterCost
from hwmodels.hardware import Cluster
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
from validation.systems.training_machine import exchange_seconds

CHIP = "a100-sxm-80gb"
MODEL = "llama-2-7b"
ROOM = 80e9, 8e9  # bytes of a rank, and those in reserve
MEDIAN = 2048
EXECUTED = "executed on 2 gloo ranks: losses equal those of one rank with every sequence alone"
SMALL = ModelSpec(
    "small", 2, 16, 4, 2, 4, 24, 29, weights_dtype="fp32", compute_dtype="fp32", kv_dtype="fp32"
)
SMALL_LENGTHS = (24, 4, 6, 3, 10, 5, 2, 8)


def cluster_of(ranks: int) -> Cluster:
    """Return nodes of 8 A100."""
    per_node = min(8, ranks)
    return make_cluster(CHIP, per_node, ranks // per_node, None, None)


def on_cluster(ranks: int) -> CostOf:
    """Return what prices meshes over nodes of 8 A100."""
    cluster = cluster_of(ranks)
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


@cache
def ring_pieces(ranks: int) -> Pieces:
    """Return the pieces of a 7B network on A100: zigzag rings, ZeRO 1, layers recomputed.

    Without recomputing all of a layer 256 ranks do not hold a sequence of 2M tokens.
    """
    parallel = ParallelStrategy(dp_replicate=ranks, zero_stage=1, recompute="full")
    return Pieces(load_model(MODEL), parallel, step_of([1]), on_cluster(ranks), *ROOM)


PACKED = 64  # short sequences of one pass of a group with one degree for all


def one_degree_s(menu: Menu, degree: int, pieces: Pieces) -> float:
    """Return the seconds of the step with one degree for all, short sequences packed or not."""
    packed = replace(pieces, parallel=replace(pieces.parallel, microbatch=PACKED))
    menus = menu, make_menu(packed, degrees=(degree,))
    found = [one_degree(each, degree) for each in menus]
    return min(float(ends_of(m, a).max()) for m, a in zip(menus, found, strict=True) if a)


TAILS = (0.5, 1.0, 1.5, 2.0, 2.5)
LONGEST = 2**21
WIDEST = 128  # a larger group is not priced


@check("G3.8", mutant={"dynamic": False})
def bytescale(*, ranks: int = 256, sequences: int = 2048, dynamic: bool = True) -> Finding:
    """Ranks by sequence against one degree for all, as the tail of lengths grows heavier.

    ``dynamic``: whether groups of different degree may be formed.
    """
    exact = runs_exactly()
    pieces = ring_pieces(ranks)
    degrees = tuple(2**i for i in range(WIDEST.bit_length()))
    ratios, names, static = [], [], []
    for sigma in TAILS:
        drawn = lognormal_lengths(sequences, MEDIAN, sigma, LONGEST, 8)
        pieces.work = step_of((2 ** np.ceil(np.log2(np.maximum(drawn, 256)))).astype(int).tolist())
        menu = make_menu(pieces, degrees=degrees)
        need = menu.degrees[int(np.isfinite(menu.seconds[-1]).argmax())]
        if not dynamic:
            menu = make_menu(pieces, degrees=(need,))
        menu = replace(menu, degree=need)
        ends = {name: float(ends_of(menu, give(menu)).max()) for name, give in BALANCERS.items()}
        names.append(min(ends, key=lambda name: ends[name]))
        static.append(need)
        ratios.append(one_degree_s(menu, need, pieces) / ends[names[-1]])
    rises = all(a < b for a, b in itertools.pairwise(ratios))
    return Finding(
        exact and rises and max(ratios) >= 7.89,
        ", ".join(
            f"{ratio:.2f}x at sigma {sigma:g} ({name}; {need} ranks for all)"
            for ratio, sigma, name, need in zip(ratios, TAILS, names, static, strict=True)
        ),
        "one degree for all makes short sequences pay for the longest"
        if rises
        else "with layers recomputed 32 ranks hold 2M tokens, and under the heaviest tails most "
        "work is in sequences that need such rings anyway; missing: activations that are kept, "
        "and offloaded for long sequences alone, for which one degree for all is far wider",
        (f"{sequences} log-normal sequences around 2048 tokens, at most 2M, padded to powers of "
         "two", f"{ranks} A100 in nodes of 8, zigzag rings of at most {WIDEST}, ZeRO 1, layers "
         "recomputed", f"one degree for all packs up to {PACKED} short sequences", EXECUTED),
        "cpu",
    )  # fmt: skip


@check("G3.9", mutant={"split": False})
def zeppelin(*, ranks: int = 32, split: bool = True) -> Finding:
    """Sequences split by level and short ones kept local against one group for all of them.

    ``split``: whether sequences are split further than memory asks.
    """
    exact = runs_exactly()
    pieces = ring_pieces(ranks)
    model, cluster = pieces.model, cluster_of(ranks)
    loads, gains, shares = [], [], []
    for lengths in drawn_together((0.5, 1.0, 1.5), 256, 262144, 8).values():
        pieces.work = step_of(lengths)
        menu = make_menu(pieces)
        found = BALANCERS["zeppelin" if split else "hdp"](menu)
        end = float(ends_of(menu, found).max())
        work = sum(
            menu.seconds[menu.kind[p.sequences[0]], menu.column(p.degree)]
            * p.degree
            * len(p.sequences)
            for p in found.pieces
        )
        moved = sum(p.tokens * len(p.sequences) for p in found.pieces if p.degree > 1)
        # To the linear parts' layout and back in every layer, in both passes.
        sent = moved / ranks * model.hidden * 2
        remap = 4 * model.layers * exchange_seconds("all_to_all", sent, ranks, cluster)
        loads.append(end / (work / ranks))
        shares.append(remap / (end + remap))
        gains.append(one_degree_s(menu, ranks, pieces) / (end + remap))
    mean = float(np.mean(gains))
    return Finding(
        exact and max(loads) < 1.1 and min(gains) <= 2.80 <= max(gains),
        f"busiest rank {min(loads):.3f} to {max(loads):.3f} of the mean; {min(gains):.2f}x to "
        f"{max(gains):.2f}x (mean {mean:.2f}) over one context-parallel group; remapping "
        f"{max(shares):.1%} of a step",
        "a sequence is split until its part is within a share of the step"
        if max(loads) < 1.1 and min(gains) <= 2.80
        else "keys and values of short sequences go round a ring over four nodes, and no product "
        "hides them, so one group for all loses more than published: what its systems merge or "
        "hide is not known; groups are powers of two and run whole sequences, so loads differ",
        (f"256 log-normal sequences around 2048 tokens on {ranks} A100 in nodes of 8", "zigzag "
         "rings, ZeRO 1, layers recomputed; the group of all packs short sequences",
         "every split sequence is remapped over the network in each layer and pass", EXECUTED),
        "cpu",
    )  # fmt: skip

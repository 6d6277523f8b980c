"""Seconds of measured training steps as the estimator predicts them, and fits of a framework."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from hwmodels.catalogue import make_cluster
from hwmodels.cost import ClusterCost
from hwmodels.frameworks import Framework, FrameworkCost, arranged
from simcore.estimate import estimate
from simcore.lower import lower_training
from simcore.templates import Template, templates
from validation.accuracy.scores import Array
from validation.importers.training import Run


@lru_cache(maxsize=4096)
def base_cost(
    chip: str,
    gpus_per_node: int,
    nodes: int,
    link: str,
    link_bytes_per_s: float,
    mesh: tuple[tuple[str, int], ...],
    groups: frozenset[str],
) -> ClusterCost:
    """Return the cost model of a mesh, one for all runs on it: it keeps what it has priced.

    ``link_bytes_per_s``: what was measured over all nodes holds for the groups on all of them.
    """
    cluster = make_cluster(chip, gpus_per_node, nodes, scale_out=link or None)
    cost = ClusterCost(cluster, dict(mesh))
    if link_bytes_per_s:
        measured = replace(cluster.scale_out, bytes_per_s=link_bytes_per_s)
        for group in groups:
            layout = cost.layout(group)
            if np.all(np.equal(layout.ranks, np.multiply(layout.ranks_per_node, nodes))):
                cost.layouts[group] = replace(layout, scale_out=measured)
    return cost


Laid = dict[Hashable, Mapping[str, Template]]


def step_seconds(run: Run, framework: Framework, laid: Laid | None = None) -> float:
    """Return the predicted seconds of a run's step.

    ``laid`` keeps what runs have in common that differ in their number of microbatches alone.
    """
    program = lower_training(run.model, run.parallel, run.step)
    mesh = tuple(program.mesh.items())
    groups = frozenset(
        op.group for block in program.blocks.values() for op in block.ops if op.is_communication
    )
    base = base_cost(
        run.chip, run.gpus_per_node, run.nodes, run.link, run.link_bytes_per_s, mesh, groups
    )
    cost, program = FrameworkCost(base, framework), arranged(program, framework)
    laid = {} if laid is None else laid
    # The order of a stage's first and last actions settles once its pipeline is full.
    filled = min(program.info["microbatches"], 2 * run.parallel.pp)
    alike = id(base), run.model, run.parallel, replace(run.step, global_batch=0), filled
    if alike not in laid:
        laid[alike] = templates(program, cost)
    return estimate(program, cost, cost, laid[alike]).step_s


def predictions(runs: Sequence[Run], framework: Framework) -> Array:
    """Return the predicted seconds of all runs."""
    laid: Laid = {}
    return np.array([step_seconds(run, framework, laid) for run in runs])


BOUNDS = {
    "issue_s": (1e-6, 2e-4),
    "call_s": (1e-6, 1e-3),
    "call_rank_s": (1e-7, 1e-3),
    "skew_s": (1e-7, 1e-3),
    "hop_s": (1e-7, 1e-3),
    "matmul_share": (0.5, 1.0),
    "attention_share": (0.2, 1.0),
    "memory_share": (0.2, 1.0),
}
_INSIDE = 0.15  # how far from its bounds, in logarithms, a search starts
_MOST_FITTED = 30  # runs, evenly spread: more of a regular sweep tell nothing new


def fitted(framework: Framework, runs: Sequence[Run], names: Sequence[str]) -> Framework:
    """Return the framework with the constants ``names`` that minimise |log(predicted / measured)|.

    A soft absolute loss; the search starts from the framework's own values, within `BOUNDS`.
    """
    chosen = list(runs)[:: max(1, -(-len(runs) // _MOST_FITTED))]
    measured = np.log([run.seconds for run in chosen])
    low, high = np.log([BOUNDS[name] for name in names]).T
    start = np.log([getattr(framework, name) for name in names])

    def with_constants(logs: Array) -> Framework:
        constants: dict[str, Any] = dict(zip(names, np.exp(logs).tolist(), strict=True))
        return replace(framework, **constants)

    def residuals(logs: Array) -> Array:
        return np.log(predictions(chosen, with_constants(logs))) - measured

    found = least_squares(
        residuals,
        np.clip(start, low + _INSIDE, high - _INSIDE),
        bounds=(low, high),
        loss="soft_l1",
        f_scale=0.05,
        diff_step=0.02,
        max_nfev=10,
        xtol=3e-3,
        ftol=3e-3,
    )
    return with_constants(found.x)

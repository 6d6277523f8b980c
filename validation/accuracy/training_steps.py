"""Seconds of measured training steps as the estimator predicts them, and fits of a framework."""

from __future__ import annotations

from collections.abc import Sequence
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
) -> ClusterCost:
    """Return the cost model of a mesh, one for all runs on it: it keeps what it has priced."""
    cluster = make_cluster(chip, gpus_per_node, nodes, scale_out=link or None)
    if link_bytes_per_s:
        measured = replace(cluster.scale_out, bytes_per_s=link_bytes_per_s)
        cluster = replace(cluster, scale_out=measured)
    return ClusterCost(cluster, dict(mesh))


def step_seconds(run: Run, framework: Framework) -> float:
    """Return the predicted seconds of a run's step."""
    program = lower_training(run.model, run.parallel, run.step)
    mesh = tuple(program.mesh.items())
    base = base_cost(run.chip, run.gpus_per_node, run.nodes, run.link, run.link_bytes_per_s, mesh)
    cost = FrameworkCost(base, framework)
    return estimate(arranged(program, framework), cost, cost).step_s + framework.step_s


def predictions(runs: Sequence[Run], framework: Framework) -> Array:
    """Return the predicted seconds of all runs."""
    return np.array([step_seconds(run, framework) for run in runs])


BOUNDS = {
    "issue_s": (1e-6, 2e-4),
    "call_s": (1e-6, 1e-3),
    "call_rank_s": (1e-7, 1e-3),
    "skew_s": (1e-7, 1e-3),
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
        max_nfev=15,
        xtol=1e-3,
        ftol=1e-3,
    )
    return with_constants(found.x)

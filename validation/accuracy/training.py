"""Accuracy of training steps: kernels, links and a framework's host against measured sweeps."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from hwmodels.catalogue import make_cluster
from hwmodels.cost import ClusterCost
from hwmodels.frameworks import Framework, FrameworkCost, arranged
from hwmodels.hardware import Cluster
from simcore.estimate import estimate
from simcore.lower import lower_training
from validation.accuracy.scores import Array
from validation.importers.training import Run


@lru_cache(maxsize=64)
def cluster_of(chip: str, gpus_per_node: int, nodes: int, link: str) -> Cluster:
    """Return a run's cluster."""
    return make_cluster(chip, gpus_per_node, nodes, scale_out=link or None)


def step_seconds(run: Run, framework: Framework, priced: dict[object, dict] | None = None) -> float:
    """Return the predicted seconds of a run's step."""
    program = lower_training(run.model, run.parallel, run.step)
    cluster = cluster_of(run.chip, run.gpus_per_node, run.nodes, run.link)
    base = ClusterCost(cluster, program.mesh)
    if priced is not None:
        key = (cluster.name, cluster.world, tuple(program.mesh.items()))
        base = priced.setdefault(key, base)
    cost = FrameworkCost(base, framework)
    return estimate(arranged(program, framework), cost, cost).step_s + framework.step_s


def predictions(runs: Sequence[Run], framework: Framework) -> Array:
    """Return the predicted seconds of all runs."""
    priced: dict[object, dict] = {}
    return np.array([step_seconds(run, framework, priced) for run in runs])

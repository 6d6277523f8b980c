"""Backup workers: a step takes the gradients of the fastest n - b of n data ranks.

Whoever is ready with its gradients joins; the first n - b are counted (Chen et al. 2016, Revisiting
distributed synchronous SGD). Their mean goes to all, also to those that come later, whose own
gradients are dropped. One `quorum` op decides who counts, so that every weight's gradient is the
mean over the same ranks; a `quorum_reduce` per unit of weights follows.
"""

from __future__ import annotations

from simcore.errors import InputError
from simcore.models import ModelSpec
from simcore.ops import Buffer, Op
from simcore.strategy import ParallelStrategy

COUNTED = "counted"  # 1 for every data rank that is counted, 0 for the others


def check_backups(model: ModelSpec, parallel: ParallelStrategy, *, streams: bool) -> None:
    """Raise `InputError` where backup workers do not fit; ``streams``: a schedule not flushed."""
    backups = parallel.backup_workers
    if not backups:
        return
    if not 0 < backups < parallel.dp:
        raise InputError(
            f"[parallel].backup_workers = {backups} must be below the {parallel.dp} data ranks."
        )
    others = {
        "tp": parallel.tp,
        "cp": parallel.cp,
        "pp": parallel.pp,
        "zero_stage": 1 + parallel.zero,
        "grad_codec": 1 + (parallel.grad_codec != "none"),
    }
    wrong = next((key for key, value in others.items() if value > 1), None)
    if wrong or model.experts or streams:
        what = f"[parallel].{wrong}" if wrong else "a mixture of experts, or a pipeline schedule"
        raise InputError(
            "[parallel].backup_workers needs ranks that each hold the whole network and update it "
            f"once in a step: {what} does not go with it; leave one of them out."
        )


def quorum(buffers: dict[str, Buffer], unit: str, group: str, ranks: int, backups: int) -> Op:
    """Return the op that finds who counts, once the gradients of ``unit``, the last, are there."""
    buffers[COUNTED] = Buffer((ranks,), "fp32", "work", layered=False)
    attrs = {"backups": backups}
    return Op("quorum", {"n": ranks}, "fp32", (f"{unit}.g",), (COUNTED,), "dp", group, attrs)


def quorum_reduce(buffers: dict[str, Buffer], unit: str, group: str, backups: int) -> Op:
    """Return the op that gives every rank n / (n - b) times the counted ranks' sum."""
    name, grads = f"{unit}.g", buffers[f"{unit}.g"]
    dims, attrs = {"n": grads.elements}, {"backups": backups}
    return Op("quorum_reduce", dims, grads.dtype, (name, COUNTED), (name,), "dp", group, attrs)

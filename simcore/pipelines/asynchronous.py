"""Pipelines that never drain: each stage updates its weights while microbatches are under way.

Their actions are those of 1F1B over a stream of microbatches as long as the training. What they
save in idle time they pay for with copies of the weights, or with gradients of old ones; both are
counted here by walking through the actions. They are estimated, not lowered to programs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from simcore.errors import InputError, unknown
from simcore.pipelines.orders import Order
from simcore.program import Action
from simcore.schedules import one_f_one_b


@dataclass(frozen=True, slots=True)
class Asynchronous:
    """A way to train without flushes.

    ``version``: (updates that the stage has made, number of the microbatch's group) to the
    version of the weights that its forward uses. ``grouped``: gradients of several microbatches
    make one update. ``stash``: the backward uses the version of its forward, which is kept.
    """

    version: Callable[[int, int], int]
    grouped: bool = False
    stash: bool = True

    def order(self, ranks: int, microbatches: int) -> Order:
        """Return each rank's actions over a stream of ``microbatches``; no flush anywhere."""
        return one_f_one_b(ranks, microbatches)


ASYNCHRONOUS: dict[str, Asynchronous] = {
    # Narayanan et al. 2019: the newest weights that the stage has, stashed until the backward.
    "pipedream": Asynchronous(lambda made, group: made),
    # Narayanan et al. 2021 (PipeDream-2BW): the weights of one update before, two versions kept.
    "pipedream_2bw": Asynchronous(lambda made, group: max(0, group - 1), grouped=True),
    # Kosson et al. 2021 (pipelined backpropagation): nothing stashed, backward on new weights.
    "pipelined_backprop": Asynchronous(lambda made, group: made, stash=False),
}


@dataclass(frozen=True, slots=True)
class Staleness:
    """What a stage of an asynchronous pipeline has at most.

    ``versions``: of its weights, the newest included. ``delay``: updates between the weights that
    a gradient was computed with and those that it changes. ``mismatch``: updates between a
    microbatch's forward and its backward that nothing hides from it. ``in_flight``: microbatches.
    """

    versions: int
    delay: int
    mismatch: int
    in_flight: int


def staleness(
    name: str, order: Sequence[Sequence[Action]], group: int = 1
) -> tuple[Staleness, ...]:
    """Return what every stage of ``order`` (one per rank) keeps and how old its gradients are.

    ``group``: microbatches of an update. Raises `InputError` for a name that is not in
    `ASYNCHRONOUS`, and for a group whose weights would not be there in time.
    """
    if name not in ASYNCHRONOUS:
        raise unknown("asynchronous schedule", name, ASYNCHRONOUS)
    method = ASYNCHRONOUS[name]
    return tuple(_walk(method, actions, group if method.grouped else 1) for actions in order)


def _walk(method: Asynchronous, actions: Sequence[Action], group: int) -> Staleness:
    used: dict[int, int] = {}  # microbatch under way -> version of its forward
    done = versions = delay = mismatch = flying = 0
    for action in actions:
        made, number = done // group, action.microbatch // group
        if action.kind == "F":
            used[action.microbatch] = method.version(made, number)
            if used[action.microbatch] > made:
                raise InputError(
                    f"groups of {group} microbatches end too late for {action}: its weights are "
                    "not there yet; make groups at least as long as the pipeline."
                )
            kept = {*used.values(), made} if method.stash else {made}
            versions, flying = max(versions, len(kept)), max(flying, len(used))
        else:
            version = used.pop(action.microbatch)
            delay = max(delay, number - version)
            mismatch = max(mismatch, 0 if method.stash else made - version)
            done += 1
    return Staleness(versions, delay, mismatch, flying)

"""Pipelines that never drain: each stage updates its weights while microbatches are under way.

Their actions are those of 1F1B over a stream of microbatches, with an optimizer action after each
group of them. What they save in idle time they pay for with copies of the weights, or with
gradients of old ones. Which version of its weights a stage uses when follows from its actions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from simcore.errors import InputError, unknown
from simcore.models import ModelSpec
from simcore.program import Action, Versions
from simcore.strategy import ParallelStrategy


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


ASYNCHRONOUS: dict[str, Asynchronous] = {
    # Narayanan et al. 2019: the newest weights that the stage has, stashed until the backward.
    "pipedream": Asynchronous(lambda made, group: made),
    # Narayanan et al. 2021 (PipeDream-2BW): the weights of one update before, two versions kept.
    "pipedream_2bw": Asynchronous(lambda made, group: max(0, group - 1), grouped=True),
    # Kosson et al. 2021 (pipelined backpropagation): nothing stashed, backward on new weights.
    "pipelined_backprop": Asynchronous(lambda made, group: made, stash=False),
}


def update_group(
    updates: Asynchronous | None,
    model: ModelSpec,
    parallel: ParallelStrategy,
    count: int,
    *,
    sharded: bool,
) -> int:
    """Return the microbatches of an update, out of ``count``; all where the pipeline is flushed.

    Raises `InputError` where weights cannot change while microbatches are under way.
    """
    name, given = parallel.schedule, parallel.update_every
    if updates is None:
        if given:
            raise InputError(
                f"the schedule {name!r} updates once, at its end: leave [parallel].update_every "
                "out, or choose 'pipedream_2bw'."
            )
        return count
    if model.tied_embeddings and parallel.pp > 1:
        raise InputError(
            f"the schedule {name!r} updates the first and the last stage at different times, "
            "which tied embeddings do not allow: choose '1f1b'."
        )
    if sharded:
        raise InputError(
            f"the schedule {name!r} keeps versions of whole weights: set [parallel].zero_stage = 0."
        )
    if given > 1 and not updates.grouped:
        raise InputError(
            f"the schedule {name!r} updates after every microbatch, not after {given}: leave "
            "[parallel].update_every out, or choose 'pipedream_2bw'."
        )
    group = given or (parallel.pp if updates.grouped else 1)
    if count % group:
        raise InputError(
            f"{count} microbatches do not divide into updates of {group}: change "
            "[parallel].update_every or [workload].global_batch."
        )
    return group


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
            used[action.microbatch] = _version(method, made, action, group)
            kept = {*used.values(), made} if method.stash else {made}
            versions, flying = max(versions, len(kept)), max(flying, len(used))
        else:
            version = used.pop(action.microbatch)
            delay = max(delay, number - version)
            mismatch = max(mismatch, 0 if method.stash else made - version)
            done += 1
    return Staleness(versions, delay, mismatch, flying)


def _version(method: Asynchronous, made: int, action: Action, group: int) -> int:
    version = method.version(made, action.microbatch // group)
    if version > made:
        raise InputError(
            f"groups of {group} microbatches end too late for {action}: its weights are not there "
            "yet; make groups ([parallel].update_every) at least as long as the pipeline."
        )
    return version


def versions_of(method: Asynchronous, actions: Sequence[Action], group: int) -> Versions:
    """Return where a stage keeps the weights that its actions (``F`` and ``B``) use.

    A version is kept until its last use; a new one takes the first place that is free then. As
    everything is used up at the end, the last version comes to lie where the first one was.
    """
    forward: dict[int, int] = {}  # microbatch -> version
    last: dict[int, int] = {}  # version -> index of the action that uses it last
    updates: list[int] = []  # index of the action after which each is made
    done = 0
    for index, action in enumerate(actions):
        if action.kind == "F":
            forward[action.microbatch] = _version(method, done // group, action, group)
            last[forward[action.microbatch]] = index
        else:
            last[forward[action.microbatch]] = index
            done += 1
            if done % group == 0:
                last[len(updates)] = max(index, last.get(len(updates), 0))
                updates.append(index)
    if not method.stash:  # one place, changed under the microbatches on their way
        return Versions(1, (0,) * len(forward), ((0, 0),) * len(updates))
    place = {0: 0}
    for made, index in enumerate(updates):
        taken = {place[version] for version in place if last.get(version, -1) > index}
        place[made + 1] = next(p for p in range(len(place) + 1) if p not in taken)
    return Versions(
        1 + max(place.values()),
        tuple(place[forward[m]] for m in sorted(forward)),
        tuple((place[made], place[made + 1]) for made in range(len(updates))),
    )


def group_reduces(actions: Sequence[Action], group: int) -> list[Action]:
    """Mark the last backward of every group, which also reduces its gradients."""
    found: list[Action] = []
    done = 0
    for action in actions:
        done += action.kind == "B"
        ends = action.kind == "B" and done % group == 0
        found.append(action._replace(kind="BR") if ends else action)
    return found


def with_updates(actions: Sequence[Action]) -> list[Action]:
    """Add an optimizer action after every group, once its last gradient is sent on."""
    found: list[Action] = []
    made, due = 0, None
    for action in actions:
        if due is not None and not action.kind.startswith("SEND"):
            found.append(Action(due.stage, "O", made))
            made, due = made + 1, None
        found.append(action)
        due = action if action.kind == "BR" else due
    return found if due is None else [*found, Action(due.stage, "O", made)]

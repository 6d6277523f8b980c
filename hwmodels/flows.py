"""Many messages at once on a fabric: fluid flows that share links max-min fairly until all end.

A flow waits for its path's latency, then drains at its fair rate, which is planned anew whenever a
flow starts or ends. Flows that cannot be told apart are followed once: classes are those of the
coarsest equitable partition of flows and links (colour refinement; McKay and Piperno 2014), where
every flow of a class crosses as many links of each class and every link of a class carries as many
flows of each class. Progressive filling then treats the members of a class alike, so the result is
that of the single flows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hwmodels.fabric import Array, Fabric, Ints
from hwmodels.topology import fair_rates
from simcore.errors import InputError

Words = NDArray[np.uint64]
SAME = 1e-9  # finish times nearer than this share of a step are one event


@dataclass(frozen=True, slots=True)
class Flows:
    """Messages as arrays of one length: source and destination ranks, bytes."""

    srcs: Ints
    dsts: Ints
    sizes_bytes: Array

    def __add__(self, other: Flows) -> Flows:
        return Flows(
            np.concatenate([self.srcs, other.srcs]),
            np.concatenate([self.dsts, other.dsts]),
            np.concatenate([self.sizes_bytes, other.sizes_bytes]),
        )


def make_flows(srcs: ArrayLike, dsts: ArrayLike, sizes_bytes: ArrayLike) -> Flows:
    """Return flows; the arguments broadcast. Raises `InputError` for bytes below 0."""
    src, dst, size = np.broadcast_arrays(
        np.asarray(srcs, dtype=np.int64).ravel(),
        np.asarray(dsts, dtype=np.int64).ravel(),
        np.asarray(sizes_bytes, dtype=np.float64).ravel(),
    )
    if size.size and not (np.isfinite(size).all() and size.min() >= 0):
        raise InputError("sizes_bytes of flows must be finite numbers, 0 or above.")
    return Flows(src, dst, size)


@dataclass(frozen=True, slots=True)
class Crossings:
    """Classes of flows on classes of links: entry i says that a flow of class ``owner[i]`` at rate
    r takes ``weight[i]`` x r of every link of class ``link[i]``."""

    owner: Ints
    link: Ints
    weight: Array
    capacities: Array  # per link class, bytes per second


def simulate_flows(fabric: Fabric, flows: Flows, aggregate: bool = True) -> Array:
    """Return the seconds at which each flow's last byte arrives, all starting at 0.

    A message of a rank to itself takes none. ``aggregate`` follows one flow per class.
    """
    paths = fabric.paths(flows.srcs, flows.dsts)
    starts = fabric.path_latencies(paths)
    if aggregate:
        flow_class, link_class = path_classes(
            paths, np.stack([starts, flows.sizes_bytes]), fabric.capacities
        )
    else:
        flow_class, link_class = np.arange(len(paths)), np.arange(fabric.capacities.size)
    one = np.unique(flow_class, return_index=True)[1]
    crossings = _crossings(paths, flow_class, link_class, one, fabric.capacities)
    return _drain(crossings, starts[one], flows.sizes_bytes[one])[flow_class]


def flow_classes(fabric: Fabric, flows: Flows) -> int:
    """Return how many classes `simulate_flows` follows."""
    paths = fabric.paths(flows.srcs, flows.dsts)
    keys = np.stack([fabric.path_latencies(paths), flows.sizes_bytes])
    return int(path_classes(paths, keys, fabric.capacities)[0].max(initial=-1)) + 1


# -- classes -------------------------------------------------------------------------------------


def path_classes(paths: Ints, flow_keys: ArrayLike, link_keys: ArrayLike) -> tuple[Ints, Ints]:
    """Return the class of every flow and of every link in the coarsest equitable partition.

    ``paths``: links per flow, padded with -1; keys ([flows] or [keys, flows]; the same of links)
    tell members apart from the start. Colours are refined by 64-bit sums of random words over
    neighbours, so that two classes are taken for one with a chance of about flows^2 / 2^64.
    """
    flow, link = _numbered(flow_keys), _numbered(link_keys)
    rng, count = np.random.default_rng(0), 0
    while (now := _colours(flow) + _colours(link)) > count:
        count = now
        words = np.append(_words(rng, link), np.uint64(0))
        own = _words(rng, flow)
        flow = _numbered(_row_sums(words, paths) + own)
        own, sums = _words(rng, flow), np.zeros(link.size + 1, dtype=np.uint64)
        for hop in paths.T:
            np.add.at(sums, hop, own)
        link = _numbered(sums[:-1] + _words(rng, link))
    return flow, link


def _numbered(keys: ArrayLike) -> Ints:
    """Return the number of each distinct key."""
    array = np.asarray(keys)
    if array.ndim == 1:
        return np.unique(array, return_inverse=True)[1].astype(np.int64)
    found = np.zeros(array.shape[1], dtype=np.int64)
    for row in array:
        values, inverse = np.unique(row, return_inverse=True)
        found = np.unique(found * values.size + inverse, return_inverse=True)[1]
    return found


def _colours(classes: Ints) -> int:
    return int(classes.max(initial=-1)) + 1


def _words(rng: np.random.Generator, classes: Ints) -> Words:
    """Return a random word per member, the same within a class."""
    return rng.integers(2**64, size=_colours(classes), dtype=np.uint64)[classes]


def _row_sums(words: Words, paths: Ints) -> Words:
    total = np.zeros(len(paths), dtype=np.uint64)
    for hop in paths.T:
        total += words[hop]
    return total


def _crossings(
    paths: Ints, flow_class: Ints, link_class: Ints, one: Ints, capacities: Array
) -> Crossings:
    """Return what a flow of each class takes of each link class, read from one flow per class.

    A class of m flows that cross c links each of a class of n links puts m c / n flows on each.
    """
    members, sizes = np.bincount(flow_class), np.bincount(link_class)
    owner, hop = np.nonzero(paths[one] >= 0)
    link = link_class[paths[one][owner, hop]]
    keys, times = np.unique(owner * sizes.size + link, return_counts=True)
    owner, link = np.divmod(keys, sizes.size)
    first = np.unique(link_class, return_index=True)[1]
    return Crossings(owner, link, times * members[owner] / sizes[link], capacities[first])


# -- time ----------------------------------------------------------------------------------------


def _drain(crossings: Crossings, starts: Array, sizes_bytes: Array) -> Array:
    """Return when each class has drained."""
    finish, left = starts.copy(), sizes_bytes.copy()
    waiting = np.zeros(starts.size, dtype=np.bool_)
    waiting[crossings.owner] = True
    waiting &= sizes_bytes > 0
    now = 0.0
    while waiting.any():
        now = max(now, float(starts[waiting].min()))
        active = waiting & (starts <= now)
        rates = np.minimum(_rates(crossings, active), np.finfo(np.float64).max)
        spans = np.divide(left, rates, out=np.full(left.size, np.inf), where=active)
        step = float(spans.min())
        later = starts[waiting & ~active]
        if later.size and later.min() - now < step:
            step = float(later.min()) - now
            left[active] -= rates[active] * step
            now = float(later.min())
            continue
        now += step
        left[active] -= rates[active] * step
        ended = active & (spans <= step * (1 + SAME))
        finish[ended] = now
        waiting &= ~ended
    return finish


def _rates(crossings: Crossings, active: NDArray[np.bool_]) -> Array:
    here = active[crossings.owner]
    return fair_rates(
        crossings.owner[here],
        crossings.link[here],
        crossings.weight[here],
        active.size,
        crossings.capacities,
    )

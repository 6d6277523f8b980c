"""Mesh axes on a fabric: which ranks form groups, and what links the groups see together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from hwmodels.collectives import GroupLayout
from hwmodels.fabric import Fabric, Ints
from hwmodels.flows import Flows, make_flows
from hwmodels.hardware import Link
from hwmodels.topology import max_min_rates
from simcore.errors import InputError, unknown


def axis_groups(
    mesh: Mapping[str, int], axes: str | Sequence[str], order: Sequence[str] | None = None
) -> Ints:
    """Return the ranks of every group along ``axes``, as [groups, members].

    ``mesh``: degree of each axis. ``order``: the axes as they are laid on the ranks, the last one
    varying fastest; by default the mesh's own. Members follow the axes as named.
    """
    along = [axes] if isinstance(axes, str) else list(axes)
    laid = list(mesh if order is None else order)
    if sorted(laid) != sorted(mesh):
        raise InputError(f"order {laid} must name every axis of the mesh once: {list(mesh)}.")
    for axis in along:
        if axis not in mesh:
            raise unknown("mesh axis", axis, mesh)
    ranks = np.arange(math.prod(mesh.values())).reshape([mesh[axis] for axis in laid])
    others = [axis for axis in mesh if axis not in along]
    moved = ranks.transpose([laid.index(axis) for axis in (*others, *along)])
    return moved.reshape(-1, math.prod(mesh[axis] for axis in along))


def _neighbours(groups: Ints) -> Flows:
    """Return a byte from every member to the next, round each group."""
    return make_flows(groups, np.roll(groups, -1, axis=1), 1.0)


def group_bandwidth(fabric: Fabric, groups: Ints) -> float:
    """Return the bytes per second of the slowest rank when all groups run their rings at once.

    Infinite for groups of one.
    """
    flows = _neighbours(np.atleast_2d(groups))
    paths = fabric.paths(flows.srcs, flows.dsts)
    rates = max_min_rates([path[path >= 0] for path in paths], fabric.capacities)
    return float(rates.min(initial=math.inf))


def group_link(fabric: Fabric, groups: Ints) -> Link:
    """Return the switch that the groups seem to hang on: `group_bandwidth`, greatest latency."""
    flows = _neighbours(np.atleast_2d(groups))
    delays = fabric.path_latencies(fabric.paths(flows.srcs, flows.dsts))
    return Link(fabric.name, group_bandwidth(fabric, groups), float(delays.max(initial=0.0)))


def group_layout(fabric: Fabric, groups: Ints) -> GroupLayout:
    """Return the groups' layout on nodes for the closed forms of collectives.

    The link inside nodes is that of the members that share one, the link between nodes that of
    members in equal places, all groups at once. Groups that nodes cut unevenly count as one member
    per node.
    """
    groups = np.atleast_2d(groups)
    node = groups // fabric.ranks_per_node
    shared = int((node[:, :1] == node).sum(axis=1).min())
    blocks = node.reshape(-1, shared) if groups.shape[1] % shared == 0 else node[:, :0]
    if not blocks.size or (blocks != blocks[:, :1]).any():
        shared = 1
    inside = groups.reshape(-1, shared)
    places = groups.reshape(len(groups), -1, shared).swapaxes(1, 2)
    between = places.reshape(-1, groups.shape[1] // shared)
    up, out = group_link(fabric, inside), group_link(fabric, between)
    if shared == 1:
        up = out
    if shared == groups.shape[1]:
        out = up
    return GroupLayout(groups.shape[1], shared, up, out)

"""Paths, fair shares and the placing of groups on nodes."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwmodels.catalogue import load_cluster, make_cluster
from hwmodels.hardware import Cluster
from hwmodels.topology import (
    AXIS_GROUPS,
    Topology,
    make_topology,
    max_min_rates,
    members_per_node,
    place_group,
)
from simcore.errors import InputError
from simcore.strategy import MESH_AXES, ParallelStrategy

CLUSTERS = {
    "switch": make_cluster("h100", 8, 3),
    "mesh": make_cluster("mi300x", 8, 2),
    "few-adapters": make_cluster("h100", 8, 2, scale_out="ib-ndr-400x2"),
    "one-adapter": make_cluster("h100", 8, 2, scale_out="ethernet-100g"),
    "half-duplex": make_cluster("generic-cpu", 2, 2),
    "one-rank-nodes": make_cluster("a100", 1, 4),
}


@pytest.fixture(params=[(name, over) for name in CLUSTERS for over in (1.0, 2.0)])
def topology(request: pytest.FixtureRequest) -> Topology:
    name, over = request.param
    return make_topology(CLUSTERS[name], over)


def test_paths(topology: Topology) -> None:
    """Every pair has its own way; all links exist; ends of unlike ranks differ."""
    world = topology.cluster.world
    used: set[int] = set()
    for src, dst in itertools.product(range(world), repeat=2):
        path = topology.path(src, dst)
        used |= set(path)
        assert (path == ()) == (src == dst)
        assert len(set(path)) == len(path)
        assert all(0 <= link < topology.capacities.size for link in path)
    assert len(topology.capacities) == len(topology.latencies)
    spare = set(range(topology.capacities.size)) - used
    half = not topology.cluster.scale_up.duplex or not topology.cluster.scale_out.duplex
    alone = topology.cluster.gpus_per_node == 1
    assert not spare or half or alone


def test_latency_of_a_path_is_the_links(topology: Topology) -> None:
    cluster = topology.cluster
    if cluster.gpus_per_node > 1:
        assert topology.latency(topology.path(0, 1)) == pytest.approx(cluster.scale_up.latency_s)
    far = topology.path(0, cluster.world - 1)
    assert topology.latency(far) == pytest.approx(cluster.scale_out.latency_s)
    assert topology.latency(()) == 0.0


def test_lone_flow_gets_the_link(topology: Topology) -> None:
    cluster = topology.cluster
    if cluster.gpus_per_node > 1:
        (rate,) = max_min_rates([topology.path(0, 1)], topology.capacities)
        up = cluster.scale_up
        assert rate == pytest.approx(up.peer_rate_bytes_per_s * up.efficiency)


def test_all_adapters_together(topology: Topology) -> None:
    """Every rank of node 0 sends to its twin on node 1: each gets its share of the adapters."""
    cluster, ranks = topology.cluster, topology.cluster.gpus_per_node
    flows = [topology.path(i, ranks + i) for i in range(ranks)]
    rates = max_min_rates(flows, topology.capacities)
    out = cluster.scale_out
    share = out.bytes_per_s * out.efficiency / topology.oversubscription
    assert rates == pytest.approx([share] * ranks)


def test_unknown_rank() -> None:
    with pytest.raises(InputError, match="rank 24"):
        make_topology(CLUSTERS["switch"]).path(0, 24)
    with pytest.raises(InputError, match="oversubscription"):
        make_topology(CLUSTERS["switch"], 0.5)


# -- fair shares -----------------------------------------------------------------------------------

LINKS = 5
flows_of = st.lists(
    st.lists(st.integers(0, LINKS - 1), max_size=3, unique=True), min_size=1, max_size=6
)
capacities_of = st.lists(st.integers(1, 12), min_size=LINKS, max_size=LINKS)


def filled(flows: list[list[int]], capacities: list[int]) -> list[Fraction | None]:
    """Progressive filling in exact fractions, one link at a time."""
    rates: list[Fraction | None] = [None] * len(flows)
    room = [Fraction(c) for c in capacities]
    todo = {i for i, flow in enumerate(flows) if flow}
    while todo:
        users = {x: [i for i in todo if x in flows[i]] for x in range(LINKS)}
        tight = min((x for x in users if users[x]), key=lambda x: room[x] / len(users[x]))
        rate = room[tight] / len(users[tight])
        for i in users[tight]:
            rates[i] = rate
            todo.discard(i)
            for x in flows[i]:
                room[x] -= rate
    return rates


@given(flows_of, capacities_of)
def test_rates_equal_exact_filling(flows: list[list[int]], capacities: list[int]) -> None:
    found = max_min_rates(flows, capacities)
    for rate, exact in zip(found, filled(flows, capacities), strict=True):
        assert rate == (np.inf if exact is None else pytest.approx(float(exact), rel=1e-9))


@given(flows_of, capacities_of)
def test_rates_are_feasible_and_bottlenecked(flows: list[list[int]], capacities: list[int]) -> None:
    """No link is over its capacity; every flow has a full link on which no flow is faster."""
    rates = max_min_rates(flows, capacities)
    load = [sum(r for r, f in zip(rates, flows, strict=True) if x in f) for x in range(LINKS)]
    assert all(load[x] <= capacities[x] * (1 + 1e-9) for x in range(LINKS))
    for rate, flow in zip(rates, flows, strict=True):
        assert not flow or any(
            load[x] >= capacities[x] * (1 - 1e-9)
            and all(r <= rate * (1 + 1e-9) for r, f in zip(rates, flows, strict=True) if x in f)
            for x in flow
        )


def test_rates_by_hand() -> None:
    """The textbook line network: one long flow, a short one on each link."""
    rates = max_min_rates([[0, 1], [0], [1]], [1.0, 2.0])
    assert rates == pytest.approx([0.5, 0.5, 1.5])
    assert max_min_rates([], [1.0]).shape == (0,)
    assert max_min_rates([[0, 0]], [1.0]) == pytest.approx([0.5])


# -- groups on nodes -------------------------------------------------------------------------------


def groups_along(axes: tuple[str, ...], strategy: ParallelStrategy) -> list[list[int]]:
    found: dict[tuple[int, ...], list[int]] = {}
    for rank in range(strategy.world):
        at = strategy.coordinates(rank)
        key = tuple(at[axis] for axis in MESH_AXES if axis not in axes)
        found.setdefault(key, []).append(rank)
    return list(found.values())


def fewest_sharing(groups: list[list[int]], gpus_per_node: int) -> int:
    return min(
        sum(1 for r in group if r // gpus_per_node == node)
        for group in groups
        for node in {r // gpus_per_node for r in group}
    )


degree = st.sampled_from([1, 2, 3, 4, 8])


@given(degree, degree, degree, degree, st.sampled_from([1, 2, 3, 4, 6, 8]))
def test_members_per_node_against_ranks(tp: int, cp: int, dp: int, pp: int, gpus: int) -> None:
    strategy = ParallelStrategy(tp=tp, cp=cp, dp_shard=dp, pp=pp)
    cluster = Cluster("test", CLUSTERS["switch"].chip, gpus, 1, *_links())
    for name, axes in AXIS_GROUPS.items():
        if name == "dp_shard_cp" and strategy.dp_replicate > 1:
            continue
        layout = place_group(name, strategy, cluster)
        groups = groups_along(axes, strategy)
        assert layout.ranks == len(groups[0])
        fewest = fewest_sharing(groups, gpus)
        span = max(group[-1] for group in groups[:1]) + 1
        assert 1 <= int(np.asarray(layout.ranks_per_node)) <= fewest
        if gpus % span == 0 or all(d in (1, 2, 4, 8) for d in (tp, cp, dp, pp, gpus)):
            assert layout.ranks_per_node == fewest


def _links() -> tuple[object, object]:
    cluster = CLUSTERS["switch"]
    return cluster.scale_up, cluster.scale_out


def test_members_per_node_is_vectorised() -> None:
    inner = np.array([1, 1, 8, 4, 2, 16])
    degrees = np.array([8, 16, 4, 4, 2, 2])
    assert list(members_per_node(inner, degrees, 8)) == [8, 8, 1, 2, 2, 1]


def test_place_expert_group() -> None:
    strategy = ParallelStrategy(tp=2, dp_shard=8, ep=16)
    layout = place_group("ep", strategy, load_cluster("dgx-h100", 2))
    assert (layout.ranks, layout.ranks_per_node) == (16, 8)


def test_unknown_axis() -> None:
    with pytest.raises(InputError, match="unknown mesh axis 'tq'"):
        place_group("tq", ParallelStrategy(), CLUSTERS["switch"])

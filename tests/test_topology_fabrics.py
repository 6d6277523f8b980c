"""Fabrics: every generator's contract, known wirings, routes, groups of ranks on them."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse
from scipy.sparse import csgraph
from small_fabrics import SMALL

from hwmodels.catalogue import load_cluster, make_cluster
from hwmodels.fabric import Fabric, Wire, make_fabric
from hwmodels.fabrics import (
    DGX1_LINKS,
    FRONTIER_LINKS,
    TOPOLOGIES,
    dragonfly,
    edge_hub,
    frontier,
    mixed_nodes,
    nvl72_racks,
    pcie_tree,
    rail_fat_tree,
    site_matrices,
    torus,
    two_level,
    wide_area,
)
from hwmodels.hardware import Cluster
from hwmodels.placement import axis_groups, group_bandwidth, group_layout
from hwmodels.topology import make_topology, max_min_rates, place_group
from simcore.errors import InputError
from simcore.program import group_ranks
from simcore.strategy import ParallelStrategy


@pytest.fixture(params=SMALL, scope="module")
def fabric(request: pytest.FixtureRequest) -> Fabric:
    return SMALL[request.param]()


def ends_of(fabric: Fabric, path: tuple[int, ...], src: int) -> list[int]:
    """Return the nodes of a path, following its links from ``src``."""
    nodes = [src]
    for link in path:
        (head,) = {
            int(h)
            for t, h, x in zip(fabric.tails, fabric.heads, fabric.links, strict=True)
            if x == link and t == nodes[-1]
        }
        nodes.append(head)
    return nodes


def wires_between_ranks(fabric: Fabric) -> np.ndarray:
    """Return the least count of wires between ranks, [world, world].

    Where ranks pass nothing on, arriving is at a copy of the rank that has no way out."""
    nodes, ends = len(fabric.nodes), fabric.heads.copy()
    if not fabric.forwarding:
        ends[ends < fabric.world] += nodes
    shape = (nodes + fabric.world,) * 2
    graph = sparse.csr_array((np.ones(ends.size), (fabric.tails, ends)), shape=shape)
    found = csgraph.dijkstra(graph, indices=range(fabric.world), unweighted=True)
    return found[:, : fabric.world] if fabric.forwarding else found[:, nodes:]


def test_paths_are_shortest_ways_that_pass_no_rank(fabric: Fabric) -> None:
    """Against scipy: the ways are connected, as short as can be, and cross ranks only if told.

    Latencies and rates follow from the links."""
    hops = wires_between_ranks(fabric)
    for src, dst in itertools.islice(itertools.permutations(range(fabric.world), 2), 0, None, 7):
        path = fabric.path(src, dst)
        nodes = ends_of(fabric, path, src)
        passed = nodes[1:-1]
        assert nodes[-1] == dst
        assert fabric.forwarding or min(passed, default=fabric.world) >= fabric.world
        assert len(path) == hops[src, dst]
        assert fabric.latency(path) == pytest.approx(sum(fabric.latencies[x] for x in path))
        (rate,) = fabric.rates([path])
        assert rate == pytest.approx(min(fabric.capacities[x] for x in path))
        assert 0 < rate < np.inf
    assert fabric.path(0, 0) == ()


def test_many_paths_are_the_single_ones(fabric: Fabric) -> None:
    ranks = np.arange(fabric.world)
    rows = fabric.paths(ranks, ranks[::-1])
    delays = fabric.path_latencies(rows)
    for src, row, delay in zip(ranks, rows, delays, strict=True):
        path = fabric.path(int(src), int(ranks[::-1][src]))
        assert tuple(row[row >= 0]) == path
        assert delay == pytest.approx(fabric.latency(path))


CLUSTERS = {
    "switch": make_cluster("h100", 8, 3),
    "mesh": make_cluster("mi300x", 8, 2),
    "few-adapters": make_cluster("h100", 8, 2, scale_out="ib-ndr-400x2"),
    "half-duplex": make_cluster("generic-cpu", 2, 2),
    "one-rank-nodes": make_cluster("a100", 1, 4),
}


@pytest.mark.parametrize("over", [1.0, 2.0])
@pytest.mark.parametrize("cluster", CLUSTERS.values(), ids=CLUSTERS)
def test_two_level_is_the_graph_of_the_closed_form(cluster: Cluster, over: float) -> None:
    """The same latencies, and the same rates for whatever runs together."""
    fabric, topology = two_level(cluster, over), make_topology(cluster, over)
    rng = np.random.default_rng(0)
    pairs = [tuple(rng.choice(cluster.world, 2, replace=False)) for _ in range(20)]
    for src, dst in pairs:
        assert fabric.latency(fabric.path(src, dst)) == pytest.approx(
            topology.latency(topology.path(src, dst))
        )
    found = max_min_rates([fabric.path(*pair) for pair in pairs], fabric.capacities)
    exact = max_min_rates([topology.path(*pair) for pair in pairs], topology.capacities)
    assert found == pytest.approx(exact)


def test_the_guide_lists_every_generator() -> None:
    guide = (Path(__file__).parents[1] / "docs" / "topologies.md").read_text()
    for name, make in TOPOLOGIES.items():
        assert f"| `{name}` | `{make.__name__}(" in guide


@pytest.mark.parametrize("nodes", [3, 12, 24, 31])
def test_spines_are_loaded_evenly(nodes: int) -> None:
    """Whatever the count of nodes, 1:1 leaves every adapter its rate across rails."""
    tree = rail_fat_tree(nodes, 2)
    flows = [tree.path(2 * a, 2 * ((a + 1) % nodes) + 1) for a in range(nodes)]
    assert tree.rates(flows) == pytest.approx([50e9] * nodes)


# -- known wirings ---------------------------------------------------------------------------------


def test_dgx1_gives_every_gpu_six_nvlinks() -> None:
    total = Counter()
    for pair, count in DGX1_LINKS.items():
        total.update(dict.fromkeys(pair, count))
    assert total == dict.fromkeys(range(8), 6)


def test_frontier_dies_use_all_their_links() -> None:
    """Seven of a die's links lead to dies or, on odd dies, one of them to the adapter."""
    total = Counter(dict.fromkeys(range(1, 8, 2), 1))
    for pair, count in FRONTIER_LINKS.items():
        total.update(dict.fromkeys(pair, count))
    assert total == dict.fromkeys(range(8), 7)


def test_frontier_rates_are_unequal() -> None:
    node = frontier(2)
    rates = [node.rates([node.path(0, peer)])[0] for peer in (1, 6, 2, 8)]
    assert rates == pytest.approx([200e9, 100e9, 50e9, 25e9])


def test_pcie_tree_has_numa() -> None:
    """Under one switch, one socket, or over both: farther is later; sockets are the bottleneck."""
    tree = pcie_tree()
    assert len(tree.path(0, 1)) < len(tree.path(0, 2)) < len(tree.path(0, 4))
    flows = [tree.path(i, i + 4) for i in range(4)]
    assert sum(tree.rates(flows)) == pytest.approx(16e9)


def test_rails_stay_below_the_spines() -> None:
    """Equal positions meet at a leaf; unlike ones cross a spine, and 1:1 loses nothing."""
    tree = rail_fat_tree(8)
    assert len(tree.path(0, 8)) == 4
    assert len(tree.path(0, 9)) == 6
    shifted = [
        tree.path(8 * a + i, 8 * ((a + 1) % 8) + (i + 1) % 8) for a in range(8) for i in range(8)
    ]
    assert tree.rates(shifted) == pytest.approx([50e9] * 64)
    narrow = rail_fat_tree(8, oversubscription=2.0)
    shifted = [
        narrow.path(8 * a + i, 8 * ((a + 1) % 8) + (i + 1) % 8) for a in range(8) for i in range(8)
    ]
    assert narrow.rates(shifted) == pytest.approx([25e9] * 64)


def test_four_thousand_ranks_in_one_ring() -> None:
    """Paths are found as they are asked for; node after node, the adapters are the limit."""
    fabric = rail_fat_tree(512)
    assert fabric.world == 4096
    assert group_bandwidth(fabric, np.arange(4096)) == pytest.approx(50e9)


def test_hashed_routes_collide_where_spread_ones_do_not() -> None:
    """ECMP puts some of many equal flows on one spine (balls into bins)."""
    slowest = {}
    for routing in ("spread", "hash"):
        tree = rail_fat_tree(16, 8, routing=routing)
        flows = [tree.path(8 * a, 8 * ((a + 1) % 16) + 1) for a in range(16)]
        slowest[routing] = min(tree.rates(flows))
    assert slowest["spread"] == pytest.approx(50e9)
    assert slowest["hash"] <= 25e9 * (1 + 1e-9)


def test_nvl72_keeps_a_rack_on_nvlink() -> None:
    racks = nvl72_racks(2)
    assert racks.world == 144
    assert len(racks.path(0, 71)) == 2
    assert racks.rates([racks.path(0, 71)])[0] > 10 * racks.rates([racks.path(0, 72)])[0]


@pytest.mark.parametrize(("a", "p", "h"), [(4, 2, 2), (2, 1, 1), (3, 2, 2)])
def test_dragonfly_is_balanced(a: int, p: int, h: int) -> None:
    """a h + 1 groups; every pair has one link; at most three links between routers (Kim 2008)."""
    fabric = dragonfly(a, p, h)
    groups = a * h + 1
    assert fabric.world == groups * a * p
    between = Counter()
    router = {i: int(str(node)[6:]) // a for i, node in enumerate(fabric.nodes[fabric.world :])}
    for tail, head in zip(fabric.tails, fabric.heads, strict=True):
        if min(tail, head) >= fabric.world:
            ends = router[int(tail) - fabric.world], router[int(head) - fabric.world]
            between[ends] += ends[0] != ends[1]
    assert all(between[pair] == 1 for pair in itertools.permutations(range(groups), 2))
    assert max(len(fabric.path(0, dst)) for dst in range(fabric.world)) <= 5


@given(st.lists(st.integers(1, 4), min_size=1, max_size=3).filter(lambda s: np.prod(s) > 1))
def test_torus_distances(shape: list[int]) -> None:
    """Hops are the sum over dimensions of the shorter way round."""
    fabric = torus(shape)
    where = list(np.ndindex(*shape))
    for src, dst in itertools.product(range(0, fabric.world, 3), range(fabric.world)):
        gaps = [abs(x - y) for x, y in zip(where[src], where[dst], strict=True)]
        hops = sum(min(g, n - g) for g, n in zip(gaps, shape, strict=True))
        assert len(fabric.path(src, dst)) == hops


@pytest.mark.parametrize("shape", [(4,), (8,), (4, 4), (4, 4, 4)])
def test_torus_loads_links_evenly(shape: tuple[int, ...]) -> None:
    """Everyone to everyone in dimension order: every link of an even torus carries as much."""
    fabric = torus(shape)
    src, dst = np.divmod(np.arange(fabric.world**2), fabric.world)
    paths = fabric.paths(src, dst)
    load = np.bincount(paths[paths >= 0], minlength=fabric.capacities.size)
    assert set(load) == {fabric.world * shape[0] // 8}


def test_sites_go_at_the_slower_line() -> None:
    rates, delays = site_matrices(["wan-1g", "wan-200m"])
    assert rates.tolist() == [[1.25e8, 2.5e7], [2.5e7, 2.5e7]]
    assert (delays == delays.T).all()


def test_wide_area_matrix_and_access_lines() -> None:
    rates = [[0, 4.0, 2.0], [4.0, 0, 1.0], [8.0, 1.0, 0]]
    delays = np.arange(9).reshape(3, 3) / 10
    free = wide_area(rates, delays)
    for i, j in itertools.permutations(range(3), 2):
        assert free.rates([free.path(i, j)]) == pytest.approx([rates[i][j]])
        assert free.latency(free.path(i, j)) == pytest.approx(delays[i, j])
    tied = wide_area(rates, delays, [3.0, 9.0, 9.0])
    assert tied.rates([tied.path(0, 1), tied.path(0, 2)]) == pytest.approx([1.5, 1.5])


def test_wireless_devices_share_their_rate() -> None:
    for link, rate in (("ethernet-1g", 1.25e8), ("wifi6", 1.5e8 * 0.6 / 2)):
        hub = edge_hub([link, link])
        assert hub.rates([hub.path(0, 1), hub.path(1, 0)]) == pytest.approx([rate, rate])


def test_mixed_nodes_go_at_the_slower_end() -> None:
    fabric = mixed_nodes((((2, "nvlink4", "ib-ndr-400", 2)), (2, "pcie4x16", "ethernet-100g", 1)))
    assert fabric.rates([fabric.path(0, 2)]) == pytest.approx([12.5e9])


@pytest.mark.parametrize(
    ("wires", "words"),
    [
        ([Wire(0, 2, 1.0)], "number the ranks"),
        ([Wire(0, 1, 0.0)], "above 0"),
        ([Wire(0, 0, 1.0)], "itself"),
        ([Wire(0, 1, 1.0, kind="duplexx")], "did you mean 'duplex'"),
    ],
)
def test_bad_wires(wires: list[Wire], words: str) -> None:
    with pytest.raises(InputError, match=words):
        make_fabric("bad", wires)


def test_bad_ranks_and_ways() -> None:
    one_way = make_fabric("one-way", [Wire(0, 1, 1.0, kind="one-way")])
    assert len(one_way.path(0, 1)) == 1
    with pytest.raises(InputError, match="no way leads from rank 1 to rank 0"):
        one_way.path(1, 0)
    with pytest.raises(InputError, match="rank 2"):
        one_way.path(0, 2)
    with pytest.raises(InputError, match="unknown routing"):
        make_fabric("bad", [Wire(0, 1, 1.0)], routing="hashed")
    with pytest.raises(InputError, match="multiple"):
        pcie_tree(gpus=6)
    with pytest.raises(InputError, match="square"):
        wide_area([[0, 1]], [[0, 1]])


# -- groups ----------------------------------------------------------------------------------------


def test_groups_are_those_of_the_program() -> None:
    mesh = {"pp": 2, "dp_shard": 3, "tp": 4}
    for axes in (["tp"], ["pp"], ["dp_shard", "tp"], ["pp", "tp"]):
        found = {tuple(group) for group in axis_groups(mesh, axes).tolist()}
        assert found == {tuple(group_ranks(mesh, "*".join(axes), rank)) for rank in range(24)}


def test_order_of_axes_decides_what_a_group_sees() -> None:
    """Tensor ranks next to one another use NVLink; laid out first, they meet over adapters."""
    fabric, mesh = rail_fat_tree(2), {"dp_shard": 2, "tp": 8}
    near = group_bandwidth(fabric, axis_groups(mesh, "tp"))
    far = group_bandwidth(fabric, axis_groups(mesh, "tp", order=("tp", "dp_shard")))
    assert near == pytest.approx(450e9 * 0.824)
    assert far < near / 4
    assert group_bandwidth(fabric, np.array([[3]])) == np.inf
    with pytest.raises(InputError, match="every axis"):
        axis_groups(mesh, "tp", order=("tp",))
    with pytest.raises(InputError, match="unknown mesh axis"):
        axis_groups(mesh, "tq")


@pytest.mark.parametrize("axis", ["tp", "dp_shard", "pp", "cp"])
@pytest.mark.parametrize("gpu", ["h100", "a100-sxm-80gb"])
def test_layout_agrees_with_the_closed_form(axis: str, gpu: str) -> None:
    """On a switched cluster the links that groups see are the cluster's own."""
    cluster = make_cluster(gpu, 8, 4)
    strategy = ParallelStrategy(tp=2, cp=2, dp_shard=4, pp=2)
    mesh = {name: getattr(strategy, name) for name in ("pp", "dp_shard", "cp", "tp")}
    known = place_group(axis, strategy, cluster)
    found = group_layout(two_level(cluster), axis_groups(mesh, axis))
    assert (found.ranks, found.ranks_per_node) == (known.ranks, known.ranks_per_node)
    n, m = int(np.asarray(known.ranks)), int(np.asarray(known.ranks_per_node))
    pairs = [(found.scale_up, known.scale_up)] if m > 1 else []
    pairs += [(found.scale_out, known.scale_out)] if m < n else []
    for seen, link in pairs:
        assert seen.bytes_per_s == pytest.approx(link.bytes_per_s * link.efficiency)
        assert seen.latency_s == pytest.approx(link.latency_s)


def test_layout_of_groups_that_nodes_cut() -> None:
    """12 ranks on nodes of 8 split into fours; 3 on nodes of 2 do not split."""
    layout = group_layout(two_level(load_cluster("dgx-h100", 3)), np.arange(24).reshape(2, 12))
    assert (layout.ranks, layout.ranks_per_node) == (12, 4)
    pairs = two_level(make_cluster("h100", 2, 3))
    assert group_layout(pairs, np.arange(6).reshape(2, 3)).ranks_per_node == 1

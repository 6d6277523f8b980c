"""Lower bounds on collectives: textbook values, cuts by brute force, no algorithm below."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_fabrics import SMALL

from hwmodels.exchanges import (
    EXCHANGES,
    channel_flows,
    collective_flows,
    hierarchical_flows,
    steps_seconds,
)
from hwmodels.fabric import Fabric, Wire, make_fabric
from hwmodels.fabrics import dragonfly, rail_fat_tree, torus, wide_area
from hwmodels.flows import make_flows, simulate_flows
from simcore.errors import InputError
from solvers.flow_bound import (
    COLLECTIVES,
    all_reduce_bound,
    flow_bound,
    gather_bound,
    traffic_bound,
    traffic_cuts,
)

TIGHT = 1 - 1e-6  # the programmes are solved to 1e-7
SIZE = 1e9


def star(rates: list[float]) -> Fabric:
    return make_fabric("star", [Wire(i, "hub", rate) for i, rate in enumerate(rates)])


def one_way_ring(n: int, rate: float) -> Fabric:
    wires = [Wire(i, (i + 1) % n, rate, kind="one-way") for i in range(n)]
    return make_fabric("ring", wires, forwarding=True)


# -- textbook values -------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 4, 7])
def test_one_way_ring(n: int) -> None:
    """all_gather (n-1)/n S/B, attained by the ring; all_to_all n (n-1)/2 S/n hops over n links."""
    ring = one_way_ring(n, 2e9)
    for op in ("all_gather", "reduce_scatter"):
        found = flow_bound(op, ring, range(n), SIZE).seconds
        assert found == pytest.approx((n - 1) / n * SIZE / 2e9)
        assert steps_seconds(ring, collective_flows(op, "ring", range(n), SIZE)) == pytest.approx(
            found
        )
    hops = n * (n - 1) / 2
    assert flow_bound("all_to_all", ring, range(n), SIZE).seconds == pytest.approx(
        hops * SIZE / n / 2e9
    )
    assert flow_bound("broadcast", ring, range(n), SIZE).seconds == pytest.approx(SIZE / 2e9)


@pytest.mark.parametrize("n", [2, 5, 8])
def test_star(n: int) -> None:
    """A switch: (n-1)/n S/B, twice for all_reduce (Patarasuk and Yuan), S/B for one message."""
    hub = star([4e9] * n)
    factor = {"all_reduce": 2 * (n - 1) / n, "broadcast": 1.0, "send_recv": 1.0}
    for op in COLLECTIVES:
        found = flow_bound(op, hub, range(n), SIZE)
        assert found.seconds == pytest.approx(factor.get(op, (n - 1) / n) * SIZE / 4e9, rel=1e-6)
        assert found.method != "latency"


def test_uneven_star_waits_for_its_slowest() -> None:
    """all_gather: what the slowest must receive; a matrix: what each sends and receives."""
    hub = star([4e9, 4e9, 1e9])
    assert flow_bound("all_gather", hub, range(3), SIZE).seconds == pytest.approx(
        2 / 3 * SIZE / 1e9
    )
    found = traffic_bound(hub, range(3), [[0, 8e9, 0], [0, 0, 1e9], [0, 0, 0]])
    assert found.seconds == pytest.approx(2.0)


@pytest.mark.parametrize("shape", [(4,), (8,), (4, 4)])
def test_torus_bisection(shape: tuple[int, ...]) -> None:
    """all_to_all: half of the bytes cross 2 n / k links each way (Dally and Towles 2004, 3.2.2).

    k is the length of a side; dimension order attains it."""
    fabric, n = torus(shape), int(np.prod(shape))
    links = 2 * n / shape[0]
    found = flow_bound("all_to_all", fabric, range(n), SIZE).seconds
    assert found == pytest.approx((n / 2) ** 2 * SIZE / n / (links * 4.5e10))
    steps = collective_flows("all_to_all", "direct", range(n), SIZE)
    assert steps_seconds(fabric, steps) == pytest.approx(found, rel=1e-3)  # and its latency


def test_latency_is_a_bound_too() -> None:
    """A byte over a wide area: the farthest pair's wait, by whatever way."""
    wan = wide_area(np.ones((3, 3)) * 1e9, [[0, 1, 9], [1, 0, 2], [9, 2, 0]])
    found = flow_bound("all_gather", wan, range(3), 3.0)
    assert (found.seconds, found.method) == (pytest.approx(3.0), "latency")


# -- brute force -----------------------------------------------------------------------------------

rates_of = st.sampled_from([1.0, 2.0, 3.0, 5.0])


@st.composite
def fabrics(draw: st.DrawFn) -> Fabric:
    """A random connected fabric of 2 to 4 ranks and up to 2 switches."""
    ranks, switches = draw(st.integers(2, 4)), draw(st.integers(0, 2))
    nodes: list[int | str] = [*range(ranks), *(f"s{i}" for i in range(switches))]
    pairs = [(draw(st.integers(0, i - 1)), i) for i in range(1, len(nodes))]
    more = st.tuples(st.integers(0, len(nodes) - 1), st.integers(0, len(nodes) - 1))
    pairs += [pair for pair in draw(st.lists(more, max_size=4)) if pair[0] != pair[1]]
    wires = [
        Wire(nodes[a], nodes[b], draw(rates_of), draw(st.sampled_from([0.0, 0.01])))
        for a, b in pairs
    ]
    return make_fabric("random", wires, forwarding=True)


def cuts(fabric: Fabric) -> list[tuple[set[int], float]]:
    """Return every set of nodes with the bandwidth out of it."""
    found = []
    for size in range(1, len(fabric.nodes)):
        for chosen in itertools.combinations(range(len(fabric.nodes)), size):
            inside = np.isin(fabric.tails, chosen) & ~np.isin(fabric.heads, chosen)
            found.append((set(chosen), float(fabric.capacities[fabric.links[inside]].sum())))
    return found


@settings(max_examples=40)
@given(fabrics())
def test_gathers_are_the_worst_cut(fabric: Fabric) -> None:
    """ForestColl's cut: shards inside a set that lacks a rank must leave it (and the reverse)."""
    n = fabric.world
    worst = {"out": 0.0, "into": 0.0, "both": 0.0}
    for chosen, rate in cuts(fabric):
        inside = len(chosen & set(range(n)))
        if 0 < inside < n:
            worst["out"] = max(worst["out"], inside / n / rate)
            worst["into"] = max(worst["into"], (n - inside) / n / rate)
            worst["both"] = max(worst["both"], 1 / rate)
    ranks = np.arange(n)
    assert gather_bound(fabric, ranks, 1.0) == pytest.approx(worst["out"], rel=1e-6)
    assert gather_bound(fabric, ranks, 1.0, reverse=True) == pytest.approx(worst["into"], rel=1e-6)
    assert all_reduce_bound(fabric, ranks, 1.0) >= worst["both"] * TIGHT


@settings(max_examples=40)
@given(fabrics())
def test_broadcast_and_one_message_are_the_least_cut(fabric: Fabric) -> None:
    n = fabric.world
    ways = {
        dst: min(rate for chosen, rate in cuts(fabric) if 0 in chosen and dst not in chosen)
        for dst in range(1, n)
    }
    bytes_ = 1e6  # so that latency is no part of it
    found = flow_bound("broadcast", fabric, range(n), bytes_).seconds
    assert found == pytest.approx(bytes_ / min(ways.values()), rel=1e-6)
    demand = np.zeros((n, n))
    demand[0, n - 1] = bytes_
    found = traffic_bound(fabric, range(n), demand).seconds
    assert found == pytest.approx(bytes_ / ways[n - 1], rel=1e-6)


@settings(max_examples=40)
@given(fabrics(), st.integers(0, 2**32 - 1))
def test_traffic_is_between_its_cuts_and_its_flows(fabric: Fabric, seed: int) -> None:
    """Every cut's crossing bytes <= the programme <= flows on shortest paths."""
    n = fabric.world
    demand = np.random.default_rng(seed).integers(0, 9, (n, n)) * 1e3
    np.fill_diagonal(demand, 0)
    found = traffic_bound(fabric, range(n), demand).seconds
    for chosen, rate in cuts(fabric):
        inside = np.isin(np.arange(n), list(chosen))
        assert found >= demand[inside][:, ~inside].sum() / rate * TIGHT
    assert found >= traffic_cuts(fabric, np.arange(n), demand) * TIGHT
    src, dst = np.divmod(np.arange(n * n), n)
    finish = simulate_flows(fabric, make_flows(src, dst, demand))
    assert finish.max() >= found * TIGHT


# -- the law ---------------------------------------------------------------------------------------

CASES = [(name, op) for name, ops in EXCHANGES.items() for op in ops]


@settings(max_examples=60)
@given(fabrics(), st.sampled_from(CASES), st.sampled_from([1e-2, 1.0, 1e4]), st.randoms())
def test_no_algorithm_beats_the_bound_anywhere(
    fabric: Fabric, case: tuple[str, str], size: float, random: object
) -> None:
    """Any algorithm, in any order of ranks, on any fabric."""
    algorithm, op = case
    ranks = list(range(fabric.world))
    random.shuffle(ranks)  # type: ignore[attr-defined]
    if algorithm == "halving-doubling" and len(ranks) == 3:
        ranks = ranks[:2]
    taken = steps_seconds(fabric, collective_flows(op, algorithm, ranks, size))
    assert taken >= flow_bound(op, fabric, ranks, size).seconds * TIGHT


@pytest.mark.parametrize("op", COLLECTIVES)
@pytest.mark.parametrize("name", SMALL)
def test_no_algorithm_beats_the_bound_on_real_fabrics(name: str, op: str) -> None:
    """Over up to eight ranks, neighbours and far apart."""
    fabric = SMALL[name]()
    spread = np.unique(np.linspace(0, fabric.world - 1, 8).astype(int))
    for ranks in (np.arange(min(8, fabric.world)), spread):
        bound = flow_bound(op, fabric, ranks, SIZE)
        assert bound.seconds > 0
        for algorithm, ops in EXCHANGES.items():
            if op in ops and not (
                algorithm == "halving-doubling" and ranks.size & (ranks.size - 1)
            ):
                steps = collective_flows(op, algorithm, ranks, SIZE)
                assert steps_seconds(fabric, steps) >= bound.seconds * TIGHT


@pytest.mark.parametrize("op", ["all_reduce", "all_gather", "reduce_scatter", "all_to_all"])
def test_levels_and_channels_come_near_on_rails(op: str) -> None:
    """Channels within a tenth, levels within twice: they use the links in turn."""
    fabric = rail_fat_tree(2)
    bound = flow_bound(op, fabric, range(16), SIZE).seconds
    nodes = np.arange(16).reshape(2, 8)
    taken = steps_seconds(fabric, hierarchical_flows(op, nodes, SIZE))
    assert bound * TIGHT <= taken < 2 * bound
    if op != "all_to_all":
        assert bound * TIGHT <= steps_seconds(fabric, channel_flows(op, nodes, SIZE)) < 1.1 * bound


@pytest.mark.parametrize("op", COLLECTIVES)
def test_cuts_are_below_the_programmes(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And equal to them where the adapters of nodes, or single links, are the limit."""
    for fabric in (rail_fat_tree(2), torus((4, 4))):
        exact = flow_bound(op, fabric, range(16), SIZE).seconds
        with monkeypatch.context() as patch:
            patch.setattr("solvers.flow_bound.VARIABLES", 0)
            cuts_ = flow_bound(op, fabric, range(16), SIZE)
        assert cuts_.method == ("broadcast" if op == "broadcast" else "cuts")
        assert cuts_.seconds <= exact / TIGHT
        if fabric.name == "rail-fat-tree" and op == "all_to_all":
            assert cuts_.seconds == pytest.approx(exact)


@pytest.mark.parametrize("op", ["all_reduce", "all_gather", "reduce_scatter"])
def test_cuts_bound_gathers_of_512_ranks(op: str) -> None:
    fabric, grid = rail_fat_tree(64), np.arange(512).reshape(64, 8)
    bound = flow_bound(op, fabric, range(512), SIZE)
    assert bound.method == "cuts"
    assert bound.seconds <= steps_seconds(fabric, hierarchical_flows(op, grid, SIZE))


def test_cuts_bound_a_thousand_ranks() -> None:
    """Too large for the programme; the adapters' cut is within 0.1 % of what is simulated."""
    fabric = rail_fat_tree(128)
    found = flow_bound("all_to_all", fabric, range(1024), 1.024e9)
    (step,) = collective_flows("all_to_all", "direct", range(1024), 1.024e9)
    taken = simulate_flows(fabric, step.flows).max()
    assert found.method == "cuts"
    assert found.seconds <= taken < found.seconds * 1.001


def test_minimal_routes_of_a_dragonfly_leave_room() -> None:
    """The programme may go around: direct all_to_all is far from it (Valiant routes exist)."""
    fabric = dragonfly()
    bound = flow_bound("all_to_all", fabric, range(fabric.world), SIZE).seconds
    steps = collective_flows("all_to_all", "direct", range(fabric.world), SIZE)
    assert 1.5 * bound < steps_seconds(fabric, steps) < 2.5 * bound


def test_bad_questions() -> None:
    hub = star([1.0, 1.0])
    with pytest.raises(InputError, match="unknown collective 'all_gathers'"):
        flow_bound("all_gathers", hub, range(2), 1.0)
    with pytest.raises(InputError, match="different"):
        flow_bound("all_gather", hub, [0, 0], 1.0)
    with pytest.raises(InputError, match="finite"):
        traffic_bound(hub, range(2), [[0, -1], [0, 0]])
    with pytest.raises(InputError, match="row and a column"):
        traffic_bound(hub, range(2), [[0]])
    with pytest.raises(InputError, match="rank 2 is not in star"):
        flow_bound("all_gather", hub, [0, 2], 1.0)
    with pytest.raises(InputError, match="size_bytes nan"):
        flow_bound("all_gather", hub, [0, 1], float("nan"))
    apart = make_fabric("apart", [Wire(0, 1, 1.0, kind="one-way")])
    for op in ("all_gather", "broadcast"):
        with pytest.raises(InputError, match="reached"):
            flow_bound(op, apart, [1, 0], 1.0)
    assert flow_bound("all_reduce", hub, [1], 1.0).seconds == 0.0
    assert traffic_bound(hub, range(2), np.zeros((2, 2))).seconds == 0.0

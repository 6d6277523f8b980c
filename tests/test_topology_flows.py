"""Flows on fabrics: classes against single flows, the event engine, and closed forms."""

from __future__ import annotations

import time

import numpy as np
import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st
from small_fabrics import SMALL

from hwmodels.collectives import traffic, wire_bytes
from hwmodels.exchanges import (
    EXCHANGES,
    channel_flows,
    collective_flows,
    hierarchical_flows,
    steps_seconds,
    together,
)
from hwmodels.fabric import Fabric, Wire, make_fabric
from hwmodels.fabrics import nvswitch_node, pcie_tree, rail_fat_tree, torus
from hwmodels.flows import Flows, flow_classes, make_flows, simulate_flows
from simcore.engine import FluidLinks
from simcore.errors import InputError

EXACT = {"rel": 1e-9, "abs": 1e-15}


def everyone(fabric: Fabric, size: float) -> Flows:
    src, dst = np.divmod(np.arange(fabric.world**2), fabric.world)
    return make_flows(src, dst, size)


def engine_finish(fabric: Fabric, flows: Flows) -> list[float]:
    """Return when each flow ends in the event engine's links."""
    env = simpy.Environment()
    links, found = FluidLinks(env, fabric), [0.0] * flows.srcs.size

    def send(i: int) -> object:
        size = float(flows.sizes_bytes[i])
        yield from links.send(int(flows.srcs[i]), int(flows.dsts[i]), size)
        found[i] = env.now

    for i in range(flows.srcs.size):
        env.process(send(i))
    env.run()
    return found


# -- classes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in SMALL if n not in ("dragonfly", "frontier")])
def test_classes_end_when_single_flows_do(name: str) -> None:
    """Everyone to everyone on every fabric."""
    fabric = SMALL[name]()
    flows = everyone(fabric, 1e6)
    alone = simulate_flows(fabric, flows, aggregate=False)
    assert simulate_flows(fabric, flows) == pytest.approx(alone, **EXACT)
    assert flow_classes(fabric, flows) <= flows.srcs.size


@st.composite
def random_flows(draw: st.DrawFn) -> tuple[Fabric, Flows]:
    """A small fabric with few distinct rates, so that classes form, and flows of few sizes."""
    leaves, width = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    rates = st.sampled_from([1.0, 2.0, 3.0])
    wires = [Wire(i, f"leaf{i % leaves}", draw(rates), draw(rates)) for i in range(leaves * width)]
    wires += [
        Wire(f"leaf{i}", f"spine{k}", draw(rates))
        for i in range(leaves)
        for k in range(draw(st.just(2)))
    ]
    routing = draw(st.sampled_from(["spread", "hash"]))
    fabric = make_fabric("random", wires, routing=routing)
    rank = st.integers(0, fabric.world - 1)
    sizes = st.sampled_from([0.0, 1.0, 2.0, 5.0])
    rows = draw(st.lists(st.tuples(rank, rank, sizes), min_size=1, max_size=12))
    return fabric, make_flows(*zip(*rows, strict=True))


@given(random_flows())
def test_finish_times_are_the_engines(case: tuple[Fabric, Flows]) -> None:
    fabric, flows = case
    found = simulate_flows(fabric, flows)
    assert found == pytest.approx(simulate_flows(fabric, flows, aggregate=False), **EXACT)
    assert found == pytest.approx(engine_finish(fabric, flows), rel=1e-7, abs=1e-12)


@given(random_flows())
def test_no_flow_beats_its_path_nor_all_of_them_a_link(case: tuple[Fabric, Flows]) -> None:
    fabric, flows = case
    finish = simulate_flows(fabric, flows)
    load = np.zeros(fabric.capacities.size)
    for src, dst, size, end in zip(flows.srcs, flows.dsts, flows.sizes_bytes, finish, strict=True):
        path = list(fabric.path(int(src), int(dst)))
        alone = size / fabric.capacities[path].min() if path else 0.0
        assert end >= (fabric.latency(path) + alone) * (1 - 1e-9)
        load[path] += size
    assert finish.max() >= (load / fabric.capacities).max() * (1 - 1e-9)


def test_two_flows_by_hand() -> None:
    """3 and 1 bytes share a link of 2: both at 1 until the short one ends, then 2."""
    line = make_fabric("line", [Wire(0, "s", 2.0), Wire(1, "s", 9.0), Wire(2, "s", 9.0)])
    flows = make_flows([0, 0, 1], [1, 2, 1], [3.0, 1.0, 7.0])
    assert simulate_flows(line, flows) == pytest.approx([2.0, 1.0, 0.0])


def test_a_thousand_ranks_all_to_all_in_seconds() -> None:
    """1,047,552 flows on rails: the adapters are the limit, and a handful of classes is followed.

    S/n to each of 1,016 ranks of other nodes through one adapter, 7 over NVLink."""
    fabric, size = rail_fat_tree(128), 1024e6
    (step,) = collective_flows("all_to_all", "direct", range(1024), size)
    begun = time.process_time()
    finish = simulate_flows(fabric, step.flows)
    assert time.process_time() - begun < 5.0
    assert finish.size == 1_047_552
    assert np.unique(finish) == pytest.approx(
        [6e-7 + 7e6 / (450e9 * 0.824), 2.7e-6 + 1016e6 / 50e9]
    )
    assert np.unique(finish).size == 2


def test_unbounded_wires_take_no_time() -> None:
    free = make_fabric("free", [Wire(0, "s", np.inf), Wire(1, "s", np.inf), Wire(2, "s", 1.0)])
    assert simulate_flows(free, make_flows([0, 0], [1, 2], 5.0)) == pytest.approx([0.0, 5.0])


def test_bad_sizes() -> None:
    with pytest.raises(InputError, match="finite"):
        make_flows([0], [1], [-1.0])


# -- collectives -----------------------------------------------------------------------------------

CASES = [(name, op) for name, ops in EXCHANGES.items() for op in ops]


@pytest.mark.parametrize(("algorithm", "op"), [c for c in CASES if c[0] != "tree"])
def test_busiest_rank_sends_what_the_closed_form_counts(algorithm: str, op: str) -> None:
    size, n = 4096.0, 16
    sent = np.zeros(n)
    for step in collective_flows(op, algorithm, range(n), size):
        np.add.at(sent, step.flows.srcs, step.repeats * step.flows.sizes_bytes)
    assert sent.max() == pytest.approx(float(wire_bytes(op, size, n, algorithm)))


@pytest.mark.parametrize("n", [2, 3, 5, 8, 13])
def test_trees_reach_everyone_once(n: int) -> None:
    """Only ranks that have the buffer send it, everyone gets it once, in ceil(log2 n) steps."""
    steps = collective_flows("broadcast", "tree", range(n), 1.0)
    have = {0}
    for step in steps:
        assert set(step.flows.srcs) <= have
        assert not have & set(step.flows.dsts)
        have |= set(step.flows.dsts.tolist())
    assert have == set(range(n))
    assert len(steps) == (n - 1).bit_length()
    both = collective_flows("all_reduce", "tree", range(n), 1.0)
    assert sum(step.flows.srcs.size for step in both) == 2 * (n - 1)
    assert set(both[0].flows.dsts) <= set(both[-1].flows.srcs)


@pytest.mark.parametrize(("algorithm", "op"), CASES)
def test_every_pair_of_ranks_is_connected_by_the_steps(algorithm: str, op: str) -> None:
    """What a rank has at the start reaches every rank (from the root only, for broadcast)."""
    n = 8
    knows = np.eye(n, dtype=bool)
    for step in collective_flows(op, algorithm, range(n), 8.0):
        for _ in range(step.repeats):
            before = knows.copy()
            for src, dst in zip(step.flows.srcs, step.flows.dsts, strict=True):
                knows[dst] |= before[src]
    if op == "send_recv":
        assert (knows == np.eye(n, dtype=bool) | np.roll(np.eye(n, dtype=bool), -1, 1)).all()
    else:
        assert (knows[:, 0] if op == "broadcast" else knows).all()


@given(st.sampled_from([2, 4, 8]), st.floats(1e3, 1e9))
def test_ring_on_a_switch_is_alpha_beta(n: int, size: float) -> None:
    node = nvswitch_node(n)
    rate = 450e9 * 0.824
    for op, laps in (("all_gather", 1), ("all_reduce", 2)):
        found = steps_seconds(node, collective_flows(op, "ring", range(n), size))
        assert found == pytest.approx(laps * (n - 1) * (6e-7 + size / n / rate))


@pytest.mark.parametrize("op", ["all_reduce", "all_gather", "reduce_scatter", "all_to_all"])
def test_hierarchical_is_the_sum_of_its_levels(op: str) -> None:
    """Rings in the nodes and between equal positions on rails: (m-1)/m S at NVLink speed, then
    (k-1)/k S/m (all_to_all: S) at the adapter's."""
    k, m, size = 4, 8, 1e9
    fabric, grid = rail_fat_tree(k), np.arange(k * m).reshape(k, m)
    found = steps_seconds(fabric, hierarchical_flows(op, grid, size))
    laps = 2 if op == "all_reduce" else 1
    up_steps, out_steps = (1, 1) if op == "all_to_all" else (m - 1, k - 1)
    outside = (k - 1) / k * size / (1 if op == "all_to_all" else m)
    up = up_steps * 6e-7 + (m - 1) / m * size / (450e9 * 0.824)
    out = out_steps * 2.7e-6 + outside / 50e9
    assert found == pytest.approx(laps * (up + out))


@pytest.mark.parametrize("op", ["all_reduce", "all_gather", "reduce_scatter"])
@pytest.mark.parametrize("k", [2, 4])
def test_channels_load_every_adapter_as_the_closed_form_counts(op: str, k: int) -> None:
    """m rings at once: each adapter carries 1/m of a ring, and is the limit (`traffic`, ring)."""
    m, size = 8, 1e12  # so large that latencies do not count
    fabric, grid = rail_fat_tree(k), np.arange(k * m).reshape(k, m)
    found = steps_seconds(fabric, channel_flows(op, grid, size))
    share = float(traffic(op, k * m, "ring", m).out_share)
    assert found == pytest.approx(share * size / 50e9, rel=1e-3)
    single = steps_seconds(fabric, collective_flows(op, "ring", range(k * m), size))
    assert single == pytest.approx(m * found, rel=1e-3)


def test_groups_at_once_share_the_socket() -> None:
    """Four pairs over one link between sockets take four times as long as one of them."""
    tree, size = pcie_tree(), 1e9
    groups = [collective_flows("send_recv", "point-to-point", [i, i + 4], size) for i in range(4)]
    delay = tree.latency(tree.path(0, 4))
    alone = steps_seconds(tree, groups[0]) - delay
    assert steps_seconds(tree, together(groups)) - delay == pytest.approx(4 * alone)


@settings(max_examples=20)
@given(st.sampled_from([(4,), (8,), (4, 4), (6, 4)]), st.floats(1.0, 1e9))
def test_aggregation_does_not_change_a_torus(shape: tuple[int, ...], size: float) -> None:
    fabric = torus(shape)
    steps = collective_flows("all_to_all", "direct", range(fabric.world), size)
    assert steps_seconds(fabric, steps) == pytest.approx(
        steps_seconds(fabric, steps, aggregate=False), **EXACT
    )


def test_bad_collectives() -> None:
    with pytest.raises(InputError, match="unknown algorithm 'rings'"):
        collective_flows("all_reduce", "rings", range(4), 1.0)
    with pytest.raises(InputError, match="cannot do broadcast: use one of tree, direct"):
        collective_flows("broadcast", "ring", range(4), 1.0)
    with pytest.raises(InputError, match="unknown collective"):
        collective_flows("scan", "ring", range(4), 1.0)
    with pytest.raises(InputError, match="power of two"):
        collective_flows("all_reduce", "halving-doubling", range(6), 1.0)
    with pytest.raises(InputError, match="different"):
        collective_flows("all_reduce", "ring", [0, 0], 1.0)
    with pytest.raises(InputError, match="same collective"):
        together([collective_flows("all_gather", "ring", range(n), 1.0) for n in (2, 3)])
    with pytest.raises(InputError, match="table of ranks"):
        hierarchical_flows("all_reduce", [0, 1], 1.0)
    assert collective_flows("all_reduce", "ring", [3], 1.0) == []

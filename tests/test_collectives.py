"""Closed forms of collectives against step-by-step simulations that move and count blocks."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moves import SIMULATIONS

from hwmodels.catalogue import load_link
from hwmodels.collectives import (
    ALGORITHMS,
    BUS_FACTORS,
    LIBRARIES,
    CollectiveFit,
    GroupLayout,
    bus_bytes_per_s,
    choose,
    collective_seconds,
    double_tree_share,
    fit_seconds,
    hops,
    read_fit,
    traffic,
    wire_bytes,
)
from hwmodels.hardware import Link
from simcore.errors import InputError

UP = Link("up", 100e9, 1e-6)
OUT = Link("out", 10e9, 5e-6, kind="nic")


def one_node(n: int) -> GroupLayout:
    return GroupLayout(n, n, UP, OUT)


@pytest.mark.parametrize(("op", "algorithm"), SIMULATIONS)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 16])
def test_counts_equal_a_simulation(op: str, algorithm: str, n: int) -> None:
    if ALGORITHMS[algorithm].power_of_two and n & (n - 1):
        pytest.skip("needs a power of two")
    rounds, share = SIMULATIONS[op, algorithm](n)
    assert int(hops(op, n, algorithm)) == rounds
    size = 840 * 16  # divisible by every n
    assert float(wire_bytes(op, size, n, algorithm)) == pytest.approx(
        float(size * share), rel=1e-14
    )


def tree_parents(n: int) -> list[int | None]:
    """NCCL's binary tree: a rank's parent clears its lowest set bit and sets the next one."""
    parents: list[int | None] = [None] * n
    for rank in range(1, n):
        bit = rank & -rank
        up = (rank ^ bit) | (bit << 1)
        parents[rank] = up if up < n else rank ^ bit
    return parents


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 33, 64])
def test_double_tree_counts(n: int) -> None:
    """Bytes of the busiest rank and depth, from the two trees drawn out."""
    first = tree_parents(n)
    mirror = [(n - 1 - r) if n % 2 == 0 else (r - 1) % n for r in range(n)]
    back = {role: rank for rank, role in enumerate(mirror)}
    sent: Counter[int] = Counter()
    for role, parent in enumerate(first):
        if parent is None:
            continue
        for child_rank, parent_rank in ((role, parent), (back[role], back[parent])):
            sent[child_rank] += 1  # up, half of the bytes
            sent[parent_rank] += 1  # down
    assert float(double_tree_share(np.asarray(n))) == max(sent.values(), default=0) / 2

    def depth(role: int) -> int:
        parent = first[role]
        return 0 if parent is None else 1 + depth(parent)

    assert int(hops("all_reduce", n, "tree")) == 2 * max(depth(role) for role in range(n))


@pytest.mark.parametrize(("n", "m"), [(8, 4), (8, 2), (16, 4), (6, 3), (6, 2), (4, 1), (12, 4)])
def test_ring_over_nodes(n: int, m: int) -> None:
    """m rings, the i-th leaving each node at its i-th rank; ranks i..i-1 of a node in between."""
    k = n // m
    out: Counter[int] = Counter()
    up: Counter[int] = Counter()
    worst = 0
    for ring in range(m):
        order = [node * m + (ring + 1 + i) % m for node in range(k) for i in range(m)]
        edges = [(order[i], order[(i + 1) % n]) for i in range(n)]
        crosses = [a // m != b // m for a, b in edges]
        for (a, _), far in zip(edges, crosses, strict=True):
            (out if far else up)[a] += n - 1  # blocks of S / (m n) that the rank sends in a lap
        for start in range(n):
            worst = max(worst, sum(crosses[(start + i) % n] for i in range(n - 1)))
    found = traffic("all_gather", n, "ring", m)
    assert float(found.out_share) == pytest.approx(max(out.values()) / (m * n))
    assert float(found.up_share) == pytest.approx(max(up.values(), default=0) / (m * n))
    assert int(found.out_hops) == worst
    assert int(found.up_hops + found.out_hops) == n - 1


@pytest.mark.parametrize(("n", "m"), [(8, 4), (8, 2), (16, 4), (16, 16), (4, 1)])
def test_doubling_over_nodes(n: int, m: int) -> None:
    held, distance = [{rank} for rank in range(n)], n // 2
    count: Counter[tuple[bool, int]] = Counter()
    while distance:
        before = [set(blocks) for blocks in held]
        for rank in range(n):
            peer = rank ^ distance
            held[peer] |= before[rank]
            count[rank // m != peer // m, rank] += len(before[rank])
        distance //= 2
    found = traffic("all_gather", n, "halving-doubling", m)
    assert float(found.out_share) == pytest.approx(count[True, 0] / n)
    assert float(found.up_share) == pytest.approx(count[False, 0] / n)


@pytest.mark.parametrize(("n", "m"), [(8, 4), (6, 3), (16, 8), (4, 1), (4, 4)])
def test_hierarchical_all_reduce_counts(n: int, m: int) -> None:
    """Reduce-scatter in the node, ring between nodes over S/m, all-gather in the node."""
    k = n // m
    up = 2 * Fraction(m - 1, m)
    out = 2 * Fraction(k - 1, k) / m
    found = traffic("all_reduce", n, "hierarchical", m)
    assert float(found.up_share) == pytest.approx(float(up))
    assert float(found.out_share) == pytest.approx(float(out))
    assert (int(found.up_hops), int(found.out_hops)) == (2 * (m - 1), 2 * (k - 1))


# -- laws over every algorithm ---------------------------------------------------------------------

PAIRS = [(op, name) for name, a in ALGORITHMS.items() for op in a.ops]


@pytest.mark.parametrize(("op", "algorithm"), PAIRS)
def test_one_rank_is_free(op: str, algorithm: str) -> None:
    assert collective_seconds(op, 1e9, one_node(1), algorithm) == 0.0
    assert wire_bytes(op, 1e9, 1, algorithm) == 0.0
    assert hops(op, 1, algorithm) == 0.0


@pytest.mark.parametrize(("op", "algorithm"), PAIRS)
@pytest.mark.parametrize(("n", "m"), [(2, 2), (8, 8), (16, 8), (16, 1), (32, 4)])
def test_no_algorithm_beats_the_bandwidth_bound(op: str, algorithm: str, n: int, m: int) -> None:
    """Whoever is busiest sends no less than the bytes that must leave a rank on average.

    A switch that adds up spares all but one sending of a rank's own buffer.
    """
    rooted = ("broadcast", "reduce", "exclusive_scan")
    least = {op: Fraction(n - 1, n) for op in rooted}.get(op)
    bound = float(least) if least is not None else float(BUS_FACTORS[op](np.asarray(float(n))))
    if ALGORITHMS[algorithm].in_switch:
        bound = 1.0
    moved = traffic(op, n, algorithm, m)
    assert float(moved.up_share + moved.out_share) >= bound * (1 - 1e-12)


@pytest.mark.parametrize(("op", "algorithm"), PAIRS)
@settings(max_examples=25)
@given(
    log_n=st.integers(1, 6),
    log_m=st.integers(0, 6),
    size=st.floats(1, 1e10),
    more=st.floats(1, 10),
)
def test_monotone(
    op: str, algorithm: str, log_n: int, log_m: int, size: float, more: float
) -> None:
    n, m = 2**log_n, 2 ** min(log_m, log_n)
    layout = GroupLayout(n, m, UP, OUT)
    faster = GroupLayout(n, m, Link("u", 100e9 * more, 1e-6), Link("o", 10e9 * more, 5e-6))
    base = collective_seconds(op, size, layout, algorithm)
    assert base > 0
    assert collective_seconds(op, size * more, layout, algorithm) >= base
    assert collective_seconds(op, size, faster, algorithm) <= base * (1 + 1e-12)
    if not ALGORITHMS[algorithm].in_switch:
        assert collective_seconds(op, size, layout) <= base


@pytest.mark.parametrize("op", BUS_FACTORS)
def test_arrays_equal_scalars(op: str) -> None:
    sizes = np.array([[1e3], [1e6], [1e9]])
    ranks, shared = np.array([1, 2, 3, 8, 16, 64]), np.array([1, 2, 1, 4, 8, 8])
    together = collective_seconds(op, sizes, GroupLayout(ranks, shared, UP, OUT))
    assert together.shape == (3, 6)
    for i, size in enumerate(sizes[:, 0]):
        for j, (n, m) in enumerate(zip(ranks, shared, strict=True)):
            alone = collective_seconds(op, size, GroupLayout(int(n), int(m), UP, OUT))
            assert together[i, j] == alone


def test_alpha_beta_by_hand() -> None:
    """8 ranks, 80 MB ring all_reduce at 100 GB/s: 14 hops of 1 us + 140 MB / 100 GB/s."""
    assert float(collective_seconds("all_reduce", 80e6, one_node(8), "ring")) == pytest.approx(
        14e-6 + 1.4e-3
    )


def test_over_nodes_by_hand() -> None:
    """2 x 4 ranks, S = 80 MB: 120 MB at 100 GB/s, then 20 MB at 10 GB/s; hops 6 + 2."""
    seconds = collective_seconds("all_reduce", 80e6, GroupLayout(8, 4, UP, OUT), "hierarchical")
    assert float(seconds) == pytest.approx(1.2e-3 + 2e-3 + 6e-6 + 10e-6)


def test_ring_over_nodes_uses_every_adapter() -> None:
    """Bus bandwidth of a large all_reduce is min(rank's port, m x adapter)."""
    size = 64e9
    for m, expected in ((8, 80e9), (16, 100e9), (1, 10e9)):
        seconds = collective_seconds("all_reduce", size, GroupLayout(64, m, UP, OUT), "ring")
        rate = bus_bytes_per_s("all_reduce", size, 64, seconds)
        # the ports inside a node carry (m-1)/m of the bytes
        wall = min(m * 10e9, 100e9 * m / max(m - 1, 1e-9))
        assert float(rate) == pytest.approx(wall, rel=0.01)
        assert float(rate) >= expected * 0.99


def test_mesh_reaches_full_rate_only_with_all_peers() -> None:
    mesh = load_link("infinity-fabric-mi300x")
    for n in (2, 4, 8):
        group = GroupLayout(n, n, mesh, OUT)
        rate = bus_bytes_per_s(
            "all_reduce", 8e9, n, collective_seconds("all_reduce", 8e9, group, "ring")
        )
        assert float(rate) == pytest.approx((n - 1) * 64e9, rel=0.01)
    pair = collective_seconds("send_recv", 8e9, GroupLayout(2, 2, mesh, OUT), "point-to-point")
    assert float(pair) == pytest.approx(8e9 / 64e9, rel=0.01)


def test_half_duplex_halves_exchanges() -> None:
    half = Link("h", 100e9, 0.0, duplex=False)
    full = Link("f", 100e9, 0.0)
    seconds = [
        float(collective_seconds("all_reduce", 1e9, GroupLayout(4, 4, link, OUT), "ring"))
        for link in (half, full)
    ]
    assert seconds[0] == pytest.approx(2 * seconds[1])


def test_auto_is_the_fastest_and_named() -> None:
    small, name = choose("all_reduce", 1e3, one_node(8))
    assert str(name) == "direct"
    large, name = choose("all_reduce", 1e9, one_node(8))
    assert str(name) in {"ring", "two-shot", "halving-doubling"}
    assert small < large
    in_turn, name = choose("all_reduce", 1e3, one_node(8), "ring")
    assert str(name) == "ring"
    assert in_turn > small


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("op", BUS_FACTORS)
def test_libraries_hold_known_algorithms(library: str, op: str) -> None:
    assert all(op in ALGORITHMS[name].ops for name in LIBRARIES[library][op])
    assert np.isfinite(collective_seconds(op, 1e6, one_node(6), library))


def test_bad_names() -> None:
    with pytest.raises(InputError, match="did you mean 'all_reduce'"):
        collective_seconds("allreduce", 1, one_node(2))
    with pytest.raises(InputError, match="did you mean 'ring'"):
        collective_seconds("all_reduce", 1, one_node(2), "rings")
    with pytest.raises(InputError, match="cannot do send_recv"):
        collective_seconds("send_recv", 1, one_node(2), "ring")
    with pytest.raises(InputError, match="power of two"):
        collective_seconds("all_reduce", 1, one_node(6), "halving-doubling")
    with pytest.raises(InputError, match="at least 1 rank"):
        collective_seconds("all_reduce", 1, one_node(0))


# -- measured collectives --------------------------------------------------------------------------


def test_fit_overrides_datasheet_links() -> None:
    fit = read_fit(
        [
            {"op": "all_reduce", "ranks": 2, "points": [[1024, 1e-4], [1048576, 1e-3]]},
            {"op": "all_gather", "ranks": 4, "alpha_s": 1e-4, "beta_s_per_byte": 1e-9},
        ]
    )
    sizes = np.array([1.0, 1024, 32768, 1048576, 4194304])
    seconds, names = choose("all_reduce", sizes, one_node(2), fit=fit)
    assert list(names) == ["measured"] * 5
    middle = np.sqrt(1e-4 * 1e-3)  # 32768 is halfway in log bytes
    assert seconds == pytest.approx([1e-4, 1e-4, middle, 1e-3, 4e-3])
    gathered = collective_seconds("all_gather", 4e6, one_node(4), fit=fit)
    assert float(gathered) == pytest.approx(1e-4 + 3e6 * 1e-9)
    for op, n, m in (("all_reduce", 3, 3), ("broadcast", 2, 2), ("all_reduce", 2, 1)):
        group = GroupLayout(n, m, UP, OUT)
        assert collective_seconds(op, 1e6, group, fit=fit) == collective_seconds(op, 1e6, group)


def test_fit_of_mixed_groups() -> None:
    fit = CollectiveFit(coefficients={("all_reduce", 2): (1e-3, 0.0)})
    found = fit_seconds(fit, "all_reduce", 1e6, np.array([1, 2, 4]))
    assert found[0] == 0.0
    assert found[1] == 1e-3
    assert np.isnan(found[2])
    group = GroupLayout(np.array([1, 2, 4]), np.array([1, 2, 4]), UP, OUT)
    seconds = collective_seconds("all_reduce", 1e6, group, fit=fit)
    assert seconds[2] == collective_seconds("all_reduce", 1e6, one_node(4))


@pytest.mark.parametrize(
    "row",
    [
        {"op": "all_reduce", "ranks": 2},
        {"op": "all_reduce", "ranks": 2, "points": [[2, 1.0], [1, 2.0]]},
        {"op": "all_reduce", "ranks": 2, "points": [[0, 1.0]]},
        {"op": "all_reduce", "ranks": 2, "points": []},
        {"op": "rotate", "ranks": 2, "alpha_s": 1, "beta_s_per_byte": 1},
    ],
)
def test_bad_fit_rows(row: dict[str, object]) -> None:
    with pytest.raises(InputError, match=r"collectives\[0\]"):
        read_fit([row])

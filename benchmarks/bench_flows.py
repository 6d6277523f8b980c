"""How fast flows on a fabric are simulated, followed by classes and one by one.

The case: all_to_all, direct, each rank to every other one. Classes are timed at 1,024 ranks on a
rail-optimised fat tree of nodes of eight; single flows at 256 ranks, there and on Frontier nodes,
whose unequal links let flows end at many times.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from hwmodels.exchanges import Steps, collective_flows, steps_seconds
from hwmodels.fabric import Fabric
from hwmodels.fabrics import frontier, rail_fat_tree
from solvers.flow_bound import flow_bound

pytestmark = pytest.mark.benchmark

RANKS = 1024
SIZE_BYTES = 1.024e9


def case(fabric: Fabric) -> tuple[Fabric, Steps]:
    return fabric, collective_flows("all_to_all", "direct", range(fabric.world), SIZE_BYTES)


def test_classes_of_a_million_flows(benchmark: BenchmarkFixture) -> None:
    assert benchmark.pedantic(steps_seconds, case(rail_fat_tree(RANKS // 8)), rounds=3) > 0
    if benchmark.stats:
        assert benchmark.stats.stats.min < 5.0
        benchmark.extra_info["flows_per_s"] = RANKS * (RANKS - 1) / benchmark.stats.stats.min


@pytest.mark.parametrize("make", [rail_fat_tree, frontier])
def test_single_flows_of_fewer_ranks(
    benchmark: BenchmarkFixture, make: Callable[[int], Fabric]
) -> None:
    fabric, steps = case(make(32))
    begun = time.perf_counter()
    together = steps_seconds(fabric, steps)
    classes_s = time.perf_counter() - begun
    alone = benchmark.pedantic(steps_seconds, (fabric, steps, False), rounds=3)
    assert alone == pytest.approx(together)
    if benchmark.stats:
        benchmark.extra_info["ratio_to_classes"] = benchmark.stats.stats.min / classes_s


def test_single_flows_that_end_apart(benchmark: BenchmarkFixture) -> None:
    """Hashed routes at 64 ranks: collisions break the symmetry, so every event counts."""
    fabric = rail_fat_tree(8, routing="hash")
    steps = collective_flows("all_to_all", "direct", range(64), SIZE_BYTES)
    assert benchmark.pedantic(steps_seconds, (fabric, steps), rounds=3) > 0


def test_bound_of_64_ranks(benchmark: BenchmarkFixture) -> None:
    fabric = rail_fat_tree(8)
    found = benchmark.pedantic(flow_bound, ("all_to_all", fabric, range(64), SIZE_BYTES), rounds=1)
    assert found.method == "programme"

"""How fast steps are estimated and simulated, and ops priced.

The case: Llama-3.1-70B on 512 H100, tp 8, pp 8, dp 8, 1F1B, 128 microbatches of 4096 tokens.
"""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from hwmodels.catalogue import make_cluster
from hwmodels.cost import ClusterCost
from simcore.catalogue import load_model
from simcore.engine import simulate
from simcore.estimate import estimate
from simcore.lower import lower_training
from simcore.program import Program
from simcore.strategy import ParallelStrategy
from simcore.templates import price
from simcore.workloads import TrainStep

pytestmark = pytest.mark.benchmark

CLUSTER = make_cluster("h100-sxm-80gb", 8, 64)
PARALLEL = ParallelStrategy(dp_replicate=8, tp=8, pp=8)
WORKLOAD = TrainStep(8 * 128, 4096)


@pytest.fixture(scope="module")
def program() -> Program:
    return lower_training(load_model("llama-3.1-70b"), PARALLEL, WORKLOAD)


def test_lower(benchmark: BenchmarkFixture) -> None:
    model = load_model("llama-3.1-70b")
    benchmark(lower_training, model, PARALLEL, WORKLOAD)


def test_estimate(benchmark: BenchmarkFixture, program: Program) -> None:
    def run() -> float:
        cost = ClusterCost(CLUSTER, program.mesh)
        return estimate(program, cost, cost).step_s

    assert benchmark(run) > 0


def test_simulate(benchmark: BenchmarkFixture, program: Program) -> None:
    cost = ClusterCost(CLUSTER, program.mesh)
    timeline = benchmark.pedantic(simulate, (program, cost, cost), rounds=3)
    assert timeline.step_s > 0


def test_price_ops(benchmark: BenchmarkFixture, program: Program) -> None:
    cost = ClusterCost(CLUSTER, program.mesh)
    ops = [op for block in program.blocks.values() for op in block.ops]

    def run() -> None:
        for op in ops:
            price(op, cost)

    benchmark(run)
    if benchmark.stats:
        benchmark.extra_info["ops_per_s"] = len(ops) / benchmark.stats.stats.mean

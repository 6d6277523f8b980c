"""Compute that runs beside a collective takes longer, and no longer than the collective allows."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from machines import LLAMA, Constant, Wires, cluster_cost, strategy

from simcore.engine import simulate
from simcore.estimate import estimate, serial_sum
from simcore.lower import lower_training
from simcore.ops import COMMUNICATION, COMPUTE, WORK, Buffer, Op
from simcore.program import Action, Call, Program
from simcore.workloads import TrainStep

NETWORK = Wires(2e-6, 20e9)
TIMES = {kind: 1e-6 * (3 + i % 7) for i, kind in enumerate(WORK) if kind != "alias"}


def lowered(name: str) -> Program:
    parallel = strategy(name)
    return lower_training(LLAMA, parallel, TrainStep(2 * parallel.dp, 256))


@pytest.mark.parametrize("name", ["zero2", "zero3", "dp x tp", "zero3 x tp+sp x pp"])
def test_sharing_costs_time_but_never_more_than_taking_turns(name: str) -> None:
    program = lowered(name)
    alone, beside = Constant(TIMES), Constant(TIMES, beside=1.5)
    quick, slow = (estimate(program, cost, NETWORK).step_s for cost in (alone, beside))
    assert quick < slow <= serial_sum(program, alone, NETWORK)
    for detail in (True, False):
        found = simulate(program, beside, NETWORK, detail=detail).step_s
        assert found == pytest.approx(slow, rel=1e-9)


@given(st.floats(1, 100), st.floats(1, 100), st.floats(1, 4))
def test_two_streams_by_hand(compute_s: float, collective_s: float, factor: float) -> None:
    """A collective, and compute behind it that does not read its result."""
    program = lowered("zero2")
    reduce = next(
        op
        for block in program.blocks.values()
        for op in block.ops
        if op.kind in COMMUNICATION and op.stream != COMPUTE
    )
    free = Op("fill", {"n": 1}, "fp32", (), ("elsewhere",))
    step = _alone(program, (reduce, free))
    times = {reduce.kind: collective_s, "fill": compute_s}
    cost = Constant(times, beside=factor)
    expected = min(factor * compute_s, compute_s + collective_s * (1 - 1 / factor))
    found = estimate(step, cost, NETWORK).step_s
    assert found == pytest.approx(max(collective_s, expected))


def _alone(program: Program, ops: tuple[Op, ...]) -> Program:
    """Return a program of one rank kind that runs nothing but ``ops``."""
    name = next(iter(program.blocks))
    block = replace(program.blocks[name], ops=ops)
    body = program.order[0][0].body
    return replace(
        program,
        blocks={name: block},
        buffers={**program.buffers, "elsewhere": Buffer((1,), "fp32", layered=False)},
        bodies={body: (Call(name, 0),)},
        order=((Action(program.order[0][0].stage, program.order[0][0].kind, 0),),),
    )


def test_a_cluster_shares_units_and_memory() -> None:
    program = lowered("zero2")
    cost = cluster_cost(program)
    ops = [op for block in program.blocks.values() for op in block.ops]
    reduce = next(op for op in ops if op.kind == "reduce_scatter")
    product = next(op for op in ops if op.kind == "matmul")
    assert 1.0 < float(cost.slowdown(product, reduce)) < 2.0
    alias = next((op for op in ops if op.kind == "alias"), None)
    assert alias is None or cost.slowdown(alias, reduce) == 1.0

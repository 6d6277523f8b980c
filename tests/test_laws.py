"""Laws that hold for every schedule and strategy: bounds, agreement of the machines, monotony."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from machines import GPT2, LLAMA, STRATEGIES, Bus, Constant, Wires, cluster_cost, strategy

from hwmodels.frameworks import Framework, FrameworkCost, arranged, frameworks, load_framework
from simcore.engine import simulate
from simcore.estimate import estimate, lower_bound, serial_sum
from simcore.lower import lower_pass, lower_training
from simcore.models import ModelSpec
from simcore.ops import WORK, work
from simcore.program import Program
from simcore.workloads import TrainStep

CLOSE = 1 + 1e-9
WITHOUT_SHRINKING = (Phase.explicit, Phase.generate)
SCHEDULES = ("1f1b", "gpipe")
CASES = [
    (name, schedule)
    for name in STRATEGIES
    for schedule in (*SCHEDULES, "zb_h1")
    if STRATEGIES[name].get("pp", 1) > 1 or schedule == "1f1b"
    if schedule != "zb_h1" or not name.startswith(("zero2", "zero3"))  # refused
]


def lowered(
    name: str, schedule: str = "1f1b", microbatches: int = 6, model: ModelSpec = LLAMA
) -> Program:
    parallel = strategy(name, schedule=schedule)
    return lower_training(model, parallel, TrainStep(microbatches * parallel.dp, 256))


def agree(program: Program, cost: object, network: object, shares: float = 0.02) -> None:
    """Check that estimate, both engines and the bounds fit together.

    Step times must be equal. How waiting divides into bubble and exposed communication is exact
    for ops, near for whole actions: within ``shares`` of the step.
    """
    whole = estimate(program, cost, network)
    detail = simulate(program, cost, network, detail=True)
    folded = simulate(program, cost, network, detail=False)
    every = simulate(program, cost, network, every_rank=True)
    for other in (whole, folded, every):
        assert other.step_s == pytest.approx(detail.step_s, rel=1e-9)
    assert lower_bound(program, cost) <= detail.step_s * CLOSE
    assert detail.step_s <= serial_sum(program, cost, network) * CLOSE
    for other in (whole, folded):
        assert other.bubble_fraction == pytest.approx(detail.bubble_fraction, abs=shares)
        assert other.exposed_communication_fraction == pytest.approx(
            detail.exposed_communication_fraction, abs=shares
        )


@pytest.mark.parametrize(("name", "schedule"), CASES)
def test_machines_agree_and_bounds_hold(name: str, schedule: str) -> None:
    program = lowered(name, schedule)
    cost = cluster_cost(program)
    agree(program, cost, Wires(2e-6, 20e9))
    detail = simulate(program, cost, cost, detail=True)
    assert lower_bound(program, cost) <= detail.step_s * CLOSE
    assert detail.step_s <= serial_sum(program, cost, cost) * CLOSE


@pytest.mark.parametrize(("name", "schedule"), CASES)
def test_machines_agree_where_the_host_computes(name: str, schedule: str) -> None:
    kinds = {kind: 1e-6 * (3 + i % 7) for i, kind in enumerate(WORK) if kind != "alias"}
    cost = Constant(kinds, synchronous=True, issue_s=2e-6, blocking=0.4)
    agree(lowered(name, schedule), cost, Wires(2e-6, 20e9))


@pytest.mark.parametrize("name", ["pp4", "zero3 x tp+sp x pp"])
def test_machines_agree_where_the_host_issues_messages_ahead(name: str) -> None:
    cost = Constant(dict.fromkeys(WORK.keys() - {"alias"}, 1e-6), issue_s=5e-6)
    agree(lowered(name), cost, Wires(2e-6, 20e9))


@pytest.mark.parametrize("framework", sorted(frameworks()))
@pytest.mark.parametrize("name", ["one", "pp4", "zero1 x tp+sp x pp"])
def test_machines_agree_on_how_a_framework_runs_a_program(framework: str, name: str) -> None:
    known = load_framework(framework)
    program = arranged(lowered(name), known)
    agree(program, FrameworkCost(cluster_cost(program), known), Wires(2e-6, 20e9), shares=0.05)


@pytest.mark.parametrize("layers", [(2, 0, 2, 0), (4, 0, 0, 0)])
def test_a_stage_without_layers_passes_on_what_comes(layers: tuple[int, ...]) -> None:
    parallel = strategy("pp4", layers_per_stage=layers)
    program = lower_training(LLAMA, parallel, TrainStep(6, 256))
    assert program.bodies["1F"] == ()
    agree(program, cluster_cost(program), Wires(2e-6, 20e9))
    waiting = Framework("waiting", issue_s=1e-6, waits_for_messages=True, waits_for_batches=True)
    program = arranged(program, waiting)
    agree(program, FrameworkCost(cluster_cost(program), waiting), Wires(2e-6, 20e9))


@pytest.mark.parametrize("name", ["one", "dp", "pp4", "zero1 x tp+sp x pp"])
def test_tied_embeddings_agree(name: str) -> None:
    program = lowered(name, model=GPT2)
    agree(program, cluster_cost(program), Wires(2e-6, 20e9))
    kinds = dict.fromkeys(WORK.keys() - {"alias"}, 1e-5)
    agree(program, Constant(kinds, synchronous=True, blocking=1.0), Wires())


@pytest.mark.parametrize("name", ["one", "tp", "pp", "pp4", "dp x tp"])
@pytest.mark.parametrize("new", [1, 64])
def test_passes_of_generation_agree(name: str, new: int) -> None:
    program = lower_pass(LLAMA, strategy(name), 4, new, 300)
    agree(program, cluster_cost(program), Wires(2e-6, 20e9))
    cost = Constant({"matmul": 1e-5}, synchronous=True, issue_s=2e-6, blocking=0.4)
    agree(program, cost, Wires(2e-6, 20e9))


@settings(max_examples=15, phases=WITHOUT_SHRINKING)
@given(
    name=st.sampled_from(sorted(STRATEGIES)),
    schedule=st.sampled_from(sorted(SCHEDULES)),
    microbatches=st.integers(1, 7),
    speed=st.floats(0.03, 30),
    bandwidth=st.floats(0.003, 30),
    latency=st.floats(0, 100),
)
def test_machines_agree_on_any_hardware(
    name: str, schedule: str, microbatches: int, speed: float, bandwidth: float, latency: float
) -> None:
    program = lowered(name, schedule, microbatches)
    cost = cluster_cost(program, speed=speed, bandwidth=bandwidth, latency=latency)
    agree(program, cost, Wires(2e-6 * latency, 20e9 * bandwidth), shares=0.05)


@pytest.mark.parametrize("name", ["pp4", "zero3 x tp+sp x pp"])
@settings(max_examples=5, phases=WITHOUT_SHRINKING)
@given(speed=st.floats(0.1, 10), bandwidth=st.floats(0.01, 10), factor=st.floats(1, 5))
def test_better_hardware_is_never_slower(
    name: str, speed: float, bandwidth: float, factor: float
) -> None:
    program = lowered(name, microbatches=4)

    def step_s(speed: float, bandwidth: float) -> list[float]:
        cost = cluster_cost(program, speed=speed, bandwidth=bandwidth)
        network = Wires(2e-6, 20e9 * bandwidth)
        return [
            estimate(program, cost, network).step_s,
            simulate(program, cost, network, detail=True).step_s,
        ]

    base = step_s(speed, bandwidth)
    for better in (step_s(speed * factor, bandwidth), step_s(speed, bandwidth * factor)):
        assert all(b <= a * CLOSE for a, b in zip(base, better, strict=True))


@pytest.mark.parametrize("name", ["dp", "zero3", "tp", "pp4", "zero1 x tp+sp x pp"])
def test_stragglers_never_help(name: str) -> None:
    program = lowered(name, microbatches=4)
    cost = cluster_cost(program)
    steps = [
        simulate(program, cost, cost, every_rank=True, slowdown={program.world - 1: factor}).step_s
        for factor in (1.0, 1.3, 2.0)
    ]
    assert steps == sorted(steps)
    assert steps[0] == pytest.approx(simulate(program, cost, cost).step_s, rel=1e-9)
    assert steps[-1] > steps[0] * 1.2


def test_a_straggler_needs_every_rank() -> None:
    program = lowered("dp")
    cost = cluster_cost(program)
    with pytest.raises(ValueError, match="every_rank"):
        simulate(program, cost, cost, slowdown={0: 2.0})


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
@pytest.mark.parametrize("name", ["zero2", "pp4"])
def test_more_microbatches_take_longer(name: str, schedule: str) -> None:
    steps = []
    for count in (1, 2, 3, 5, 8):
        program = lowered(name, schedule, count)
        cost = cluster_cost(program)
        steps.append(estimate(program, cost, cost).step_s)
    assert steps == sorted(set(steps))


@pytest.mark.parametrize("detail", [False, True])
def test_runs_are_deterministic(detail: bool) -> None:
    program = lowered("zero3 x tp+sp x pp")
    cost = cluster_cost(program)
    first, second = (simulate(program, cost, cost, detail=detail) for _ in range(2))
    assert first == second
    assert estimate(program, cost, cost) == estimate(program, cost, cost)


@pytest.mark.parametrize("name", ["one", "zero3", "tp", "pp4", "pp+recompute"])
def test_spans_hold_the_work_of_the_program(name: str) -> None:
    program = lowered(name)
    cost = cluster_cost(program)
    spans = simulate(program, cost, cost, detail=True).spans
    done = [
        (work(op).flops, work(op).payload_bytes)
        for actions in program.order
        for action in actions
        for _, _, op in program.ops(action.body)
    ]
    assert sum(s.flops for s in spans) == pytest.approx(sum(f for f, _ in done), rel=1e-12)
    assert sum(s.size_bytes for s in spans) == pytest.approx(sum(b for _, b in done), rel=1e-12)
    every = simulate(program, cost, cost, every_rank=True).spans
    copies = program.world / len(program.order)
    assert sum(s.flops for s in every) == pytest.approx(copies * sum(f for f, _ in done), rel=1e-12)


@pytest.mark.parametrize("name", ["pp4", "zero1 x tp+sp x pp"])
@pytest.mark.parametrize("detail", [False, True])
def test_contention_costs_time_but_less_than_running_in_turn(name: str, detail: bool) -> None:
    program = lowered(name, "gpipe")
    cost = cluster_cost(program)
    narrow = Bus(2e-6, 2e9)
    alone = estimate(program, cost, narrow).step_s
    shared = simulate(program, cost, narrow, every_rank=True, detail=detail).step_s
    assert shared > alone * 1.02
    folded = simulate(program, cost, narrow, detail=detail).step_s
    assert alone <= folded * CLOSE
    assert folded <= serial_sum(program, cost, narrow) * CLOSE


def test_shared_adapters_slow_messages_between_nodes() -> None:
    program = lowered("zero1 x tp+sp x pp")
    own, shared = (cluster_cost(program, nics=nics, bandwidth=0.02) for nics in (4, 1))
    free = replace(own.cluster, scale_out=replace(own.cluster.scale_out, bytes_per_s=1e15))
    assert free.scale_out.bytes_per_s > own.cluster.scale_out.bytes_per_s
    first, second = (simulate(program, own, net, every_rank=True).step_s for net in (own, shared))
    assert first < second


@pytest.mark.parametrize("detail", [False, True])
@pytest.mark.parametrize("synchronous", [False, True])
def test_an_order_that_deadlocks_is_an_error(detail: bool, synchronous: bool) -> None:
    program = lowered("pp", microbatches=2)
    first = list(program.order[0])
    sends = [i for i, action in enumerate(first) if action.kind == "SEND_F"]
    first[sends[0]], first[sends[1]] = first[sends[1]], first[sends[0]]
    missing = [action for action in program.order[0] if action.kind != "SEND_F"]
    cost = Constant({"matmul": 1.0}, synchronous=synchronous)
    for order in (first, missing):
        bad = replace(program, order=(tuple(order), program.order[1]))
        with pytest.raises(RuntimeError, match="deadlock"):
            estimate(bad, cost, Wires())
        with pytest.raises(RuntimeError, match="deadlock"):
            simulate(bad, cost, Wires(), detail=detail)

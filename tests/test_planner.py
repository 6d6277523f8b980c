"""The planner against brute force, its bounds against exact prices, and its reasons."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from hwmodels.catalogue import make_cluster
from simcore.errors import InputError
from simcore.metrics import Metrics
from simcore.models import ModelSpec
from simcore.strategy import ParallelStrategy
from simcore.workloads import Generation, TrainStep
from solvers.search import (
    Plan,
    Question,
    data_layouts,
    divisors,
    lattice,
    make_bounds,
    price,
    search,
)

SMALL = ModelSpec(
    name="small", layers=4, hidden=512, heads=8, kv_heads=4, head_dim=64, ffn=1408, vocab=4096
)


def question(world: int = 4, memory_bytes: float = 80e9, **changes: Any) -> Question:
    cluster = make_cluster("h100-sxm-80gb", min(world, 8), max(1, world // 8))
    base = Question(SMALL, TrainStep(8, 512), cluster, None, memory_bytes, 0.0, 989.4e12)
    return replace(base, **changes)


PRICED: dict[str, list[tuple[Metrics, ParallelStrategy]]] = {}


def exact(asked: Question) -> list[tuple[Metrics, ParallelStrategy]]:
    """Return every strategy that can be laid out, exactly priced, once per question."""
    key = repr(asked)
    if key not in PRICED:
        sound, _ = lattice(asked, asked.cluster.world)
        PRICED[key] = [(price(asked, each), each) for each in sound]
    return PRICED[key]


def brute_force(asked: Question, metric: str = "step_s") -> list[tuple[float, ParallelStrategy]]:
    """Return every strategy that fits, exactly priced, best first."""
    priced = exact(replace(asked, memory_bytes=80e9, goal=None))
    room = asked.memory_bytes
    found = [(m[metric], each) for m, each in priced if m["peak_memory_bytes"] <= room]
    return sorted(found, key=lambda item: item[0])


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_ranking_is_brute_force_s(world: int) -> None:
    asked = question(world)
    plan = search(asked, top=5)
    best = [seconds for seconds, _ in brute_force(asked)[:5]]
    assert [each.metrics["step_s"] for each in plan.candidates] == best
    assert plan.report.status == "optimal"
    assert plan.report.gap == 0.0
    assert plan.report.objective == plan.report.bound == best[0]


def test_the_ranking_is_brute_force_s_under_little_memory() -> None:
    need = sorted(metrics["peak_memory_bytes"] for metrics, _ in exact(question(4)))
    asked = question(4, memory_bytes=need[len(need) // 4])
    plan, fitting = search(asked, top=3), brute_force(asked)
    assert [each.metrics["step_s"] for each in plan.candidates] == [s for s, _ in fitting[:3]]
    assert len(fitting) + sum(each.kind == "memory" for each in plan.infeasible) <= len(need)
    assert plan.reasons["memory"] > 0


@pytest.mark.parametrize(
    "goal",
    [("minimise", "peak_memory_bytes"), ("maximise", "hfu"), ("minimise", "bubble_fraction")],
)
def test_other_goals_price_everything(goal: tuple[str, str]) -> None:
    asked = question(2, goal=goal)
    plan = search(asked, top=1)
    values = [value for value, _ in brute_force(asked, goal[1])]
    best = max(values) if goal[0] == "maximise" else min(values)
    assert plan.candidates[0].metrics[goal[1]] == best
    assert plan.report.priced == plan.report.strategies - plan.report.infeasible


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("chip", ["h100-sxm-80gb", "rtx-4090"])
def test_bounds_are_below_exact_prices(world: int, chip: str) -> None:
    asked = question(world, cluster=make_cluster(chip, world))
    bounds = make_bounds(asked)
    for metrics, parallel in exact(asked):
        assert bounds.seconds(parallel) <= metrics["step_s"] * (1 + 1e-9), parallel
        assert bounds.memory_bytes(parallel) <= metrics["peak_memory_bytes"] * (1 + 1e-9), parallel


def test_few_strategies_are_priced() -> None:
    plan = search(question(8), top=1)
    assert plan.report.strategies > 150
    assert plan.report.priced < 20


def test_what_does_not_fit_is_told_with_its_bytes() -> None:
    plan = search(question(2, memory_bytes=1e6))
    assert plan.candidates == ()
    assert plan.report.status == "infeasible"
    assert plan.report.objective is None
    assert plan.reasons == {"memory": len(plan.infeasible)}
    assert all("GB more than" in each.reason for each in plan.infeasible)
    closest = min(plan.infeasible, key=lambda each: each.excess_bytes)
    assert plan.least_memory == closest.strategy
    assert json.loads(json.dumps(plan.to_dict()))["candidates"] == []


def test_divisibility_is_told() -> None:
    odd = replace(SMALL, heads=7, kv_heads=7, ffn=7 * 11)
    plan = search(question(4, model=odd))
    reasons = {each.reason for each in plan.infeasible if each.kind == "divisibility"}
    assert any("does not divide the model's heads 7" in text for text in reasons)
    plan = search(question(4, workload=TrainStep(2, 512)))
    assert any("global_batch 2 is not a multiple of dp 4" in e.reason for e in plan.infeasible)


def test_the_scenario_s_microbatch_is_kept() -> None:
    plan = search(question(4, microbatch=2), top=50)
    assert {each.strategy.microbatch for each in plan.candidates} == {2}


def test_no_strategy_comes_twice() -> None:
    sound, out = lattice(question(8), 8)
    assert len(set(sound)) == len(sound)
    assert all(each.world == 8 for each in sound)
    assert not any(each.pp == 1 and each.schedule != "1f1b" for each in sound)
    assert not any(each.tp == 1 and each.sequence_parallel for each in sound)
    assert out == []
    keys = [
        (
            e.tp,
            e.pp,
            e.dp_replicate,
            e.dp_shard,
            e.zero,
            e.microbatch,
            e.schedule,
            e.recompute,
            e.sequence_parallel,
        )
        for e in sound
    ]
    assert len(set(keys)) == len(keys)


def test_data_layouts_by_hand() -> None:
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    assert data_layouts(1) == [(1, 1, None)]
    assert data_layouts(4) == [(4, 1, None), (4, 1, 1), (4, 1, 2), (2, 2, None), (1, 4, None)]


def test_tp_crosses_nodes_only_in_need() -> None:
    wide = replace(SMALL, heads=16, kv_heads=16, hidden=1024)
    cluster = make_cluster("h100-sxm-80gb", 2, 2)
    plan = search(question(4, model=wide, cluster=cluster), top=500)
    assert {each.strategy.tp for each in plan.candidates} == {1, 2}
    need = min(
        price(question(4, model=wide, cluster=cluster), each.strategy)["peak_memory_bytes"]
        for each in plan.candidates
    )
    tight = search(question(4, model=wide, cluster=cluster, memory_bytes=need * 0.999), top=500)
    assert {each.strategy.tp for each in tight.candidates} <= {4}


def test_generation_is_planned_over_its_meshes() -> None:
    asked = question(4, workload=Generation(8, 128, 16))
    plan = search(asked, top=100)
    assert plan.report.priced == len(plan.candidates) == plan.report.strategies
    times = [each.metrics["seconds"] for each in plan.candidates]
    assert times == sorted(times)
    odd = search(question(4, workload=Generation(3, 128, 16)), top=100)
    assert any("batch 3" in each.reason for each in odd.infeasible)


def test_progress_is_heard_and_top_is_checked() -> None:
    heard: list[tuple[int, int]] = []
    search(question(2), top=2, progress=lambda done, total: heard.append((done, total)))
    assert [done for done, _ in heard] == list(range(1, len(heard) + 1))
    with pytest.raises(InputError, match="top = 0"):
        search(question(2), top=0)


def test_a_model_that_cannot_be_lowered_is_refused_with_its_reason() -> None:
    plan: Plan = search(question(2, model=replace(SMALL, position="alibi")))
    assert plan.candidates == ()
    assert set(plan.reasons) == {"not lowered"}


def test_layers_of_two_kinds_are_priced_as_the_machines_do() -> None:
    """They have no bounds: every strategy that can be laid out is priced."""
    model = replace(SMALL, experts=4, experts_per_token=2, moe_ffn=64, dense_layers=1)
    asked = question(2, model=model)
    plan = search(asked)
    assert len(plan.candidates) > 1
    best = plan.candidates[0]
    assert best.metrics["step_s"] == price(asked, best.strategy)["step_s"]


def test_bounds_of_layers_with_experts_are_below_exact_prices() -> None:
    asked = question(4, model=replace(SMALL, experts=4, experts_per_token=2, moe_ffn=64))
    bounds, found = make_bounds(asked), search(asked, top=10**6).candidates
    assert found
    for each in found:
        seconds = bounds.seconds(each.strategy)
        assert 0 < seconds <= each.metrics["step_s"] * (1 + 1e-9), each.strategy
        need = bounds.memory_bytes(each.strategy)
        assert 0 < need <= each.metrics["peak_memory_bytes"] * (1 + 1e-9), each.strategy

"""Attention along the axes of a grid: plans by brute force, volumes, times, refusals."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from machines import GPT2, LLAMA, Wires, cluster, cluster_cost

from simcore.accounting import block_totals, step_totals
from simcore.axes import axis_plan, turns
from simcore.engine import simulate
from simcore.errors import InputError
from simcore.estimate import estimate
from simcore.lower import lower_pass, lower_training
from simcore.metrics import executed_flops
from simcore.models import ModelSpec, forward_flops
from simcore.program import Program
from simcore.sequence import rank_positions
from simcore.strategy import ParallelStrategy
from simcore.workloads import TrainStep
from solvers.search import Question, check

GRID = replace(
    GPT2, causal=False, frames=8, mixers=("space", "time") * 2, tied_embeddings=False,
    max_positions=4096,
)  # fmt: skip
SEQ = 512


def lowered(model: ModelSpec = GRID, length: int = SEQ, **parallel: object) -> Program:
    strategy = ParallelStrategy(**parallel)  # type: ignore[arg-type]
    return lower_training(model, strategy, TrainStep(2 * strategy.dp, length))


AXES = st.sets(st.sampled_from("abc"), min_size=1).map(sorted)


@given(st.lists(AXES, min_size=1, max_size=5), st.integers(0, 9))
def test_a_plan_of_axes_is_a_shortest_path(allowed: list[list[str]], seed: int) -> None:
    costs = np.random.default_rng(seed).integers(1, 9, (len(allowed), 3, 3))

    def cost(stage: int, before: str, after: str) -> float:
        return float(costs[stage]["abc".index(before)]["abc".index(after)])

    def total(path: tuple[str, ...]) -> float:
        steps = enumerate(itertools.pairwise(path), 1)
        return sum(cost(i, a, b) for i, (a, b) in steps if a != b)

    found = axis_plan(allowed, cost)
    assert all(axis in axes for axis, axes in zip(found, allowed, strict=True))
    assert total(found) == min(map(total, itertools.product(*allowed)))


@pytest.mark.parametrize("mixers", [("space", "time") * 2, ("time", "time", "space", "space")])
def test_only_switches_move_anything(mixers: tuple[str, ...]) -> None:
    """One all-to-all of the residual stream per switch, forward and backward."""
    model = replace(GRID, mixers=mixers)
    program = lowered(model, cp=4, cp_kind="dsp")
    switches = sum(a != b for a, b in itertools.pairwise(mixers))
    assert len(turns(model, ParallelStrategy(cp=4, cp_kind="dsp"))) == switches
    payload = step_totals(program, 0).payload_bytes["all_to_all", "cp"]
    assert payload == 2 * 2 * switches * SEQ // 4 * model.hidden * 2
    found = executed_flops(program)
    again = executed_flops(lowered(model))
    assert found == pytest.approx(again, rel=1e-12)


def test_switches_move_a_quarter_of_what_all_to_alls_inside_attention_do() -> None:
    """Queries, keys, values and outputs, in both kinds of layer, against the stream once each."""
    sent = {
        kind: block_totals(lowered(cp=4, cp_kind=kind))[block].payload_bytes["all_to_all", "cp"]
        for kind, block in (("dsp", "to_time.F"), ("ulysses", "space.F"))
    }
    assert GRID.heads == GRID.kv_heads
    assert sent["ulysses"] == 4 * sent["dsp"]


def test_flops_of_attention_along_an_axis() -> None:
    """A query sees a frame of 64 places, or 8 frames."""
    whole = executed_flops(lowered()) / 2
    scores = sum(4 * SEQ * GRID.hidden * keys for keys in (SEQ // 8, 8) * 2)
    weights = forward_flops(GRID, 1, SEQ) - scores
    assert whole == pytest.approx(3 * weights + 3.5 * scores, rel=1e-12)


@pytest.mark.parametrize("mixers", [("space", "time") * 2, ("time", "space") * 2])
def test_every_token_is_embedded_and_judged_once(mixers: tuple[str, ...]) -> None:
    program = lowered(replace(GRID, mixers=mixers), cp=4, cp_kind="dsp")
    for last in (False, True):
        held = np.concatenate([rank_positions(program, rank, last=last) for rank in range(4)])
        assert sorted(held) == list(range(SEQ))
    first, end = (rank_positions(program, 0, last=last) for last in (False, True))
    assert not np.array_equal(first, end)


@pytest.mark.parametrize("kind", ["dsp", "ulysses"])
def test_machines_agree_on_a_grid(kind: str) -> None:
    program = lowered(length=4096, cp=4, cp_kind=kind)
    cost, wires = cluster_cost(program), Wires(2e-6, 20e9)
    whole, detail = estimate(program, cost, wires), simulate(program, cost, wires, detail=True)
    assert whole.step_s == pytest.approx(detail.step_s, rel=1e-9)


@pytest.mark.parametrize(
    ("model", "length", "parallel", "words"),
    [
        (GRID, SEQ, {"cp": 2}, ("'dsp' or 'ulysses'",)),
        (LLAMA, SEQ, {"cp": 2, "cp_kind": "dsp"}, ("'ring'", "frames")),
        (GRID, SEQ + 1, {}, ("multiple of the model's 8 frames", "512")),
        (GRID, SEQ, {"cp": 16, "cp_kind": "dsp"}, ("8 frames", "cp = 8")),
        (replace(GRID, position="rope"), SEQ, {}, ("positions",)),
        (replace(GRID, mixers=("space", "mha") * 2), SEQ, {}, ("'space' or 'time'",)),
        (
            GRID, SEQ, {"cp": 2, "tp": 2, "sequence_parallel": True, "cp_kind": "dsp"},
            ("sequence_parallel",),
        ),
    ],
)  # fmt: skip
def test_grids_that_do_not_fit_are_refused(
    model: ModelSpec, length: int, parallel: dict[str, object], words: tuple[str, ...]
) -> None:
    with pytest.raises(InputError) as caught:
        lowered(model, length, **parallel)
    assert all(word in str(caught.value) for word in words)


def test_no_plan_is_searched_for_a_grid() -> None:
    question = Question(GRID, TrainStep(8, SEQ), cluster(8), None, 80e9, 0.0, 1e15)
    with pytest.raises(InputError, match=r"give the strategy in \[parallel\]"):
        check(question, ParallelStrategy(dp_replicate=8))


def test_grids_are_not_generated() -> None:
    with pytest.raises(InputError, match="without frames"):
        lower_pass(GRID, ParallelStrategy(), 2, 8, 0)

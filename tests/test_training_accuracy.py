"""Frameworks, the memory of training in closed form, and both against measured steps."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.catalogue import make_cluster
from hwmodels.cost import ClusterCost
from hwmodels.frameworks import (
    Framework,
    FrameworkCost,
    arranged,
    attention_parts,
    frameworks,
    harmonic,
    load_framework,
)
from hwmodels.training_memory import as_kept, find_keeping
from simcore.errors import InputError
from simcore.estimate import estimate
from simcore.liveness import activation_peaks, residents
from simcore.lower import lower_training
from simcore.models import parameter_count
from simcore.ops import Op, work
from simcore.program import Program
from simcore.strategy import ParallelStrategy
from simcore.workloads import TrainStep
from validation.accuracy.scores import score
from validation.accuracy.training import kendall_tau, regrets
from validation.accuracy.training_memory import out_of_memory_table, test_errors
from validation.accuracy.training_steps import fitted, predictions
from validation.importers.training import (
    Run,
    fsdp_runs,
    gpt,
    layers_by_cost,
    megatron_runs,
    nanotron_runs,
    padded_vocab,
    without_outliers,
)

test_errors.__test__ = False  # type: ignore[attr-defined]  # a function of the report, no test

SMALL = gpt(4, 1024, 16, padded_vocab(1), 1024)
FOLDER = Path(os.environ.get("MESHWISE_DATA", Path(__file__).parents[2] / "shared" / "data"))


def measured(name: str) -> Path:
    """Return a file of measured steps; skip where it is not there."""
    path = FOLDER / "training" / name
    if not path.is_file():
        pytest.skip(f"{path} is not there: set MESHWISE_DATA to the calibration data")
    return path


def program_of(**degrees: int) -> Program:
    world = int(np.prod([v for k, v in degrees.items() if k != "microbatch"]))
    parallel = ParallelStrategy(recompute="full", **degrees)
    return lower_training(SMALL, parallel, TrainStep(8 * max(1, world), 1024))


def seconds(program: Program, framework: Framework) -> float:
    cluster = make_cluster("a100-sxm-80gb", program.world)
    cost = FrameworkCost(ClusterCost(cluster, program.mesh), framework)
    return estimate(arranged(program, framework), cost, cost).step_s


# -- frameworks --------------------------------------------------------------------------------


def test_every_framework_says_where_its_settings_come_from() -> None:
    for framework in frameworks().values():
        told = set(framework.sources)
        used = {n for n in ("kernels", "passes") if getattr(framework, n)}
        assert used <= told, framework.name


def test_ill_formed_frameworks_are_refused() -> None:
    with pytest.raises(InputError, match="attention of framework"):
        Framework("x", attention="fussed")
    with pytest.raises(InputError, match="op kind"):
        Framework("x", kernels={"matmull": 2})
    with pytest.raises(InputError, match="share"):
        Framework("x", memory_share=0.0)
    with pytest.raises(InputError, match="seconds"):
        Framework("x", issue_s=-1.0)
    with pytest.raises(InputError, match="megatron"):
        load_framework("megatron-202")


def test_a_framework_that_adds_nothing_costs_what_the_cluster_does() -> None:
    program = program_of(dp_replicate=2, tp=2, pp=2)
    cluster = make_cluster("a100-sxm-80gb", program.world)
    plain = ClusterCost(cluster, program.mesh)
    assert seconds(program, Framework("plain")) == pytest.approx(
        estimate(program, plain, plain).step_s, rel=1e-12
    )


@settings(max_examples=6, deadline=None)
@given(
    name=st.sampled_from(["issue_s", "call_s", "call_rank_s", "skew_s"]),
    low=st.floats(0, 1e-4),
    more=st.floats(0, 1e-4),
)
def test_slower_hosts_never_shorten_a_step(name: str, low: float, more: float) -> None:
    program = program_of(tp=2, pp=2)
    base = load_framework("megatron-2022")
    times = [seconds(program, replace(base, **{name: value})) for value in (low, low + more)]
    assert times[1] >= times[0] * (1 - 1e-12)


@pytest.mark.parametrize("share", ["matmul_share", "attention_share", "memory_share"])
def test_slower_kernels_lengthen_a_step(share: str) -> None:
    program = program_of(dp_replicate=2)
    slow = seconds(program, Framework("slow", **{share: 0.5}))  # type: ignore[arg-type]
    assert slow > 1.02 * seconds(program, Framework("fast"))


def test_reductions_in_line_and_waits_for_messages_cost_time() -> None:
    for degrees, change in (
        ({"dp_replicate": 4}, {"overlaps_gradients": False}),
        ({"pp": 4}, {"waits_for_messages": True, "issue_s": 4e-5}),
        ({"tp": 1}, {"waits_for_batches": True, "issue_s": 4e-5}),
    ):
        program = program_of(**degrees)
        free = Framework("free", issue_s=change.get("issue_s", 0.0))
        assert seconds(program, replace(free, **change)) > seconds(program, free)  # type: ignore[arg-type]


def test_unfused_attention_has_the_flops_of_fused_without_its_second_scores() -> None:
    dims = {"b": 2, "h": 4, "hkv": 4, "s": 64, "kv": 64, "d": 32, "dv": 32}
    forward = Op("attention", dims, "bf16", (), ())
    backward = Op("attention_backward", dims, "bf16", (), ())
    products = [sum(work(part).flops for part in attention_parts(op)) for op in (forward, backward)]
    assert products[0] == work(forward).flops
    assert products[1] == pytest.approx(work(backward).flops * 4 / 5)


def test_largest_of_exponential_delays() -> None:
    draws = np.random.default_rng(0).exponential(size=(200_000, 8)).max(axis=1)
    assert harmonic(8) == pytest.approx(float(draws.mean()), rel=0.01)


# -- memory ------------------------------------------------------------------------------------


@settings(max_examples=4, deadline=None)
@given(heads=st.sampled_from([8, 16]), each=st.sampled_from([64, 128]), tp=st.sampled_from([1, 8]))
def test_activations_of_a_layer_are_the_published_formula(heads: int, each: int, tp: int) -> None:
    """s b h (10 + 24 / t + 5 a s / (h t)), all over t with the sequence sharded (eq. 2, 4).

    And one fp32 number per row and head, which a fused kernel keeps.
    """
    h, s, b = heads * each, 1024, 4
    megatron = find_keeping("megatron-lm")

    def layer(unfused: bool, **how: object) -> float:
        """Return what two layers leave for the backward pass beyond what one does."""
        parallel = ParallelStrategy(tp=tp, microbatch=b, **how)  # type: ignore[arg-type]
        left = []
        for layers in (1, 2):
            model = replace(gpt(layers, h, heads, padded_vocab(tp), s), head_dim=each)
            program = lower_training(model, parallel, TrainStep(b, s))
            kept = as_kept(program, megatron, unfused=unfused)
            left.append(activation_peaks(kept, 0)[1][0][1])
        return left[1] - left[0] - 4 * s * b * heads / tp

    formula = s * b * h * (10 + 24 / tp + 5 * heads * s / (h * tp))
    assert layer(True) == pytest.approx(formula, rel=1e-12)
    if tp > 1:
        again = {"recompute": "selective", "recompute_modules": megatron.modules}
        found = layer(False, sequence_parallel=True, **again)
        assert found == pytest.approx(s * b * h * 34 / tp, rel=1e-12)


def test_gradients_that_are_reduced_in_place_have_no_second_buffer() -> None:
    plan = ParallelStrategy(dp_replicate=4, zero_stage=1)
    program = lower_training(SMALL, plan, TrainStep(4, 1024))
    kept = as_kept(program, find_keeping("megatron-lm"))
    plain, shared = residents(program, 0).parts, residents(kept, 0).parts
    assert plain["gradients"] == pytest.approx(1.25 * shared["gradients"], rel=1e-3)
    assert shared["gradients"] == pytest.approx(4 * parameter_count(SMALL), rel=1e-3)
    assert plain["optimizer"] == shared["optimizer"]
    both = residents(as_kept(program, find_keeping("nanotron")), 0).parts
    assert both["gradients"] == pytest.approx(6 * parameter_count(SMALL), rel=1e-3)
    with pytest.raises(InputError, match="nanotron"):
        find_keeping("nanotrn")


# -- scores and readers ------------------------------------------------------------------------


def _run(seconds: float, batch: int = 8) -> Run:
    step = TrainStep(batch, 1024)
    return Run(SMALL, ParallelStrategy(), step, "a100-sxm-80gb", 1, 1, seconds, "")


def test_order_and_regret() -> None:
    runs = [_run(1.0), _run(2.0), _run(2.05), _run(4.0)]
    truth = np.array([1.0, 2.0, 2.05, 4.0])

    def one(run: Run) -> int:
        return 0

    assert kendall_tau(runs, truth, one) == 1.0
    assert kendall_tau(runs, -truth + 5, one) == -1.0
    assert regrets(runs, truth, one) == [0.0]
    assert regrets(runs, -truth + 5, one) == [3.0]


def test_outliers_are_told_by_their_peers_alone() -> None:
    runs = [_run(t) for t in (1.0, 1.1, 1.2, 9.0)]
    assert without_outliers(runs) == runs[:3]
    assert without_outliers([runs[0], runs[3]]) == [runs[0], runs[3]]


def test_layers_by_cost_cover_the_network() -> None:
    for pp in (1, 2, 4, 8, 16, 32):
        layers = layers_by_cost(replace(SMALL, layers=28, vocab=131072), pp)
        assert len(layers) == pp
        assert sum(layers) == 28


# -- against measurements ----------------------------------------------------------------------


def test_megatron_steps_unseen() -> None:
    """The host's seconds per kernel, chosen on one hidden size, hold on the other."""
    runs = [
        r for r in megatron_runs(measured("megatron_a100_single_node.csv")) if r.parallel.pp < 4
    ]
    small = [r for r in runs if r.model.layers == 12]
    seen = [r for r in small if r.model.hidden == 2048][::15]
    unseen = [r for r in small if r.model.hidden == 1024][::24]
    start = load_framework("megatron-2022")

    def median_error(runs: list[Run], issue_s: float) -> float:
        predicted = predictions(runs, replace(start, issue_s=issue_s))
        return score(predicted, np.array([run.seconds for run in runs])).median

    best = min((1e-5, 2e-5, 4e-5), key=lambda issue_s: median_error(seen, issue_s))
    assert median_error(unseen, best) < 0.15
    assert median_error(unseen, best) < median_error(unseen, start.issue_s)


def test_a_fit_finds_the_constant_that_made_the_runs() -> None:
    truth = replace(load_framework("megatron-2022"), issue_s=6e-5)
    blank = [_run(1.0, batch) for batch in (2, 4)]
    made = predictions(blank, truth).tolist()
    runs = [replace(run, seconds=s) for run, s in zip(blank, made, strict=True)]
    found = fitted(replace(truth, issue_s=3e-5), runs, ("issue_s",))
    assert found.issue_s == pytest.approx(6e-5, rel=0.01)


def test_fsdp_tokens_become_seconds() -> None:
    run = next(r for r in fsdp_runs(measured("fsdp_a100.csv")) if r.model.name == "MPT-1b")
    assert 0.9 < parameter_count(run.model) / 1.3e9 < 1.2
    assert run.seconds > 0


def test_memory_of_tests() -> None:
    errors = test_errors(measured("megatron_memory.csv"))
    dense = [error for family, _, error in errors.values() if family == "dense"]
    assert len(dense) > 100
    assert np.median(dense) < 0.06


@pytest.mark.slow
def test_failures_for_want_of_memory() -> None:
    table = out_of_memory_table(measured("nanotron_h100_3.6b.csv"))
    assert not table.missed
    assert len(nanotron_runs(measured("nanotron_h100_3.6b.csv"))) == 595

"""Frameworks, the memory of training in closed form, and both against measured steps."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import meshwise as mw
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
from hwmodels.training_memory import KEEPING, as_kept, find_keeping
from simcore.catalogue import load_model
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
from validation.accuracy.training import kendall_tau, regrets, training_tables
from validation.accuracy.training_memory import out_of_memory_table, test_errors
from validation.accuracy.training_steps import fitted, predictions, step_seconds
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
        assert framework.keeps in {"", *KEEPING}


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
    program = lower_training(SMALL, ParallelStrategy(pp=2, schedule="zb_h1"), TrainStep(8, 1024))
    with pytest.raises(InputError, match="no schedule 'zb_h1'"):
        arranged(program, load_framework("megatron"))


SCENARIO = {
    "model": {"name": "llama-3.1-8b"},
    "cluster": {"gpu": "h100-sxm-80gb", "gpus_per_node": 8, "nodes": 2},
    "parallel": {"tp": 16, "microbatch": 1},
    "workload": {"kind": "train", "global_batch": 4, "seq_len": 2048},
    "run": {"framework": "nanotron"},
}


def test_a_scenario_is_predicted_by_the_code_that_is_scored() -> None:
    found = mw.predict(SCENARIO).metrics["step_s"]
    parallel = ParallelStrategy(tp=16)
    model, step = load_model("llama-3.1-8b"), TrainStep(4, 2048)
    run = Run(model, parallel, step, "h100-sxm-80gb", 8, 2, 1.0, "")
    assert found == pytest.approx(step_seconds(run, load_framework("nanotron-2024")), rel=1e-12)
    assert found == pytest.approx(
        mw.predict(SCENARIO, engine="simulate").metrics["step_s"], rel=1e-6
    )
    assert found > 1.3 * mw.predict({**SCENARIO, "run": {}}).metrics["step_s"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"run": {"framework": "nanotrom"}}, "did you mean 'nanotron'"),
        ({"run": {"framework": "nanotron", "launch": "graph"}}, "remove .run..launch"),
        ({"workload": {"kind": "generate", "batch": 1, "input_tokens": 8, "output_tokens": 2}},
         "for training"),
        ({"cluster": {"gpu": "this-cpu", "gpus_per_node": 16}}, "is none"),
    ],
)  # fmt: skip
def test_frameworks_that_cannot_run_a_scenario_are_refused(
    change: dict[str, object], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        mw.predict({**SCENARIO, **change})


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


def test_layers_by_cost_fill_a_stage_until_it_has_its_share() -> None:
    """The head counts as 3.6 layers; nanotron's own loop gives these stages."""
    model = replace(SMALL, layers=28, vocab=131072, hidden=3072, ffn=8192)
    expected = {1: (28,), 2: (16, 12), 4: (8, 8, 8, 4), 8: (4,) * 7 + (0,)}
    for pp, layers in expected.items():
        assert layers_by_cost(model, pp) == layers
    assert layers_by_cost(model, 16) == (2,) * 14 + (0, 0)
    assert layers_by_cost(model, 32) == (1,) * 28 + (0,) * 4


def test_rings_between_nodes_pay_for_every_message() -> None:
    cluster = make_cluster("h100-sxm-80gb", 8, 2)
    dims = {"n": 1024.0}
    for tp, hops in ((8, 0), (16, 15)):
        mesh = {"pp": 1, "dp_replicate": 16 // tp, "dp_shard": 1, "cp": 1, "tp": tp}
        plain = FrameworkCost(ClusterCost(cluster, mesh), Framework("plain"))
        slow = FrameworkCost(plain.base, Framework("slow", hop_s=1e-3))
        for kind, times in (("all_gather", hops), ("all_reduce", 0)):
            op = Op(kind, dims, "bf16", (), (), "tp", "tp")
            assert slow.seconds(op) - plain.seconds(op) == pytest.approx(times * 1e-3)


def test_measured_links_hold_for_groups_on_all_nodes() -> None:
    parallel = ParallelStrategy(tp=16, dp_replicate=4)
    step = TrainStep(4, 1024)
    wide = Run(SMALL, parallel, step, "h100-sxm-80gb", 8, 8, 1.0, "")
    slow = replace(wide, link_bytes_per_s=1e9)
    framework = load_framework("ideal")
    data = replace(parallel, tp=1, dp_replicate=64)
    assert step_seconds(slow, framework) == pytest.approx(step_seconds(wide, framework))
    everywhere = [replace(r, parallel=data, step=TrainStep(64, 1024)) for r in (wide, slow)]
    assert step_seconds(everywhere[1], framework) > 1.5 * step_seconds(everywhere[0], framework)


def test_runs_that_share_their_templates_take_what_they_take_alone() -> None:
    framework = load_framework("megatron")
    parallel = ParallelStrategy(pp=2)
    some = replace(_run(1.0), parallel=parallel, gpus_per_node=2)
    runs = [replace(some, step=TrainStep(batch, 1024)) for batch in (1, 2, 3, 4, 8, 16)]
    alone = [step_seconds(run, framework) for run in runs]
    assert predictions(runs, framework).tolist() == alone


def test_a_folder_with_one_sweep_is_scored_without_a_fit(tmp_path: Path) -> None:
    (tmp_path / "training").mkdir()
    with pytest.raises(InputError, match="holds none of"):
        training_tables(tmp_path)
    columns = "model,parallel,batch_or_concurrency,seq_len,value,source"
    rows = [
        f"GPT h=4096 L=8 heads=32,TP{tp} DP1 PP1 mbs1,global_batch={batch},1024,{batch * 90},mine"
        for tp, batch in ((1, 2), (1, 8), (1, 16))
    ]
    file = tmp_path / "training" / "megatron_a100_single_node.csv"
    file.write_text("\n".join([columns, *rows]) + "\n")
    (table,) = training_tables(tmp_path)
    assert [row[:3] for row in table.rows] == [("nothing", "all", 3)]


# -- against measurements ----------------------------------------------------------------------


def test_megatron_steps_unseen() -> None:
    """The shipped constants, fitted on one hidden size, hold on the other."""
    runs = [
        r
        for r in megatron_runs(measured("megatron_a100_single_node.csv"))
        if r.model.hidden == 2048 and r.model.layers == 12 and r.parallel.pp < 4
    ]
    unseen, known = runs[::7], load_framework("megatron-2022")

    def median_error(framework: Framework) -> float:
        truth = np.array([run.seconds for run in unseen])
        return score(predictions(unseen, framework), truth).median

    assert median_error(known) < 0.12
    assert median_error(known) < 0.5 * median_error(replace(known, issue_s=0.0, skew_s=0.0))


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

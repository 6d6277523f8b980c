"""What the microbenchmarks measure, what a profile makes of it, and ranks that share processors."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from comparisons import PROFILE
from machines import GPT2, LLAMA, STRATEGIES, Constant, Wires, strategy

torch = pytest.importorskip("torch")

from dataclasses import replace  # noqa: E402

from backends import microbench  # noqa: E402
from backends.bench_cases import Case  # noqa: E402
from backends.launch import run_benchmarks  # noqa: E402
from backends.microbench import CASES, Pool, time_case  # noqa: E402
from hwmodels.catalogue import make_cluster  # noqa: E402
from hwmodels.cost import ClusterCost  # noqa: E402
from hwmodels.kernels import BY_ROOFLINE, FORMS, OTHERS, family  # noqa: E402
from hwmodels.profile import read_profile  # noqa: E402
from simcore.engine import simulate  # noqa: E402
from simcore.lower import lower_training  # noqa: E402
from simcore.ops import COMMUNICATION, WORK, Op, work  # noqa: E402
from simcore.program import Program  # noqa: E402
from simcore.scenario import load_scenario  # noqa: E402
from simcore.schedules import SCHEDULES  # noqa: E402
from simcore.strategy import CP_KINDS, STATE_KINDS, ParallelStrategy  # noqa: E402
from simcore.workloads import TrainStep  # noqa: E402
from validation.calibrate import FITTED, fit_kernels, fit_profile  # noqa: E402
from validation.compare import validate_cases  # noqa: E402
from validation.grid import Case as GridCase  # noqa: E402

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NAMES = ("ring_attention", "lightseq", "frames", "experts", "zero_bubble", "dualpipev")
MIXTRAL = replace(LLAMA, name="mixtral-like", experts=4, experts_per_token=2, moe_ffn=64, ffn=0)
FRAMES = replace(GPT2, causal=False, frames=4, mixers=("space", "time") * 2, tied_embeddings=False)
HYBRID = replace(LLAMA, name="hybrid", mixers=("linear", "mha") * 2)
STEP = TrainStep(global_batch=8, seq_len=32)


@cache
def cases() -> tuple[Case, ...]:
    return tuple(case for make in CASES.values() for case in make())


# ---------------------------------------------------------------- contract


def test_every_kind_is_measured_or_named_as_one_that_is_not() -> None:
    """Add a case to `backends.microbench.CASES`, or name the kind in `kernels.BY_ROOFLINE`."""
    measured = {case.op.kind for case in cases()}
    missing = set(WORK) - COMMUNICATION - measured - BY_ROOFLINE
    assert not missing, f"no microbenchmark of {sorted(missing)}: {__doc__}"
    assert not measured & BY_ROOFLINE
    assert set(FORMS) <= set(WORK)


def lowered() -> Iterator[Program]:
    """Yield programs of every kind of strategy that the registries hold."""
    for name in STRATEGIES:
        yield lower_training(LLAMA, strategy(name), STEP)
    for name, schedule in SCHEDULES.items():
        stages = schedule.stages_per_rank or 2
        found = ParallelStrategy(pp=2, schedule=name, virtual_stages=stages)
        yield lower_training(LLAMA, found, STEP)
    for kind in CP_KINDS:
        parts = {"cp_ring": 2, "cp_ulysses": 2} if kind == "usp" else {}
        cp = 4 if parts else 2
        model = {"dsp": FRAMES}.get(kind, HYBRID if kind in STATE_KINDS else LLAMA)
        yield lower_training(model, ParallelStrategy(cp=cp, cp_kind=kind, **parts), STEP)
    yield lower_training(HYBRID, ParallelStrategy(), STEP)
    for coded in ({}, {"error_feedback": True}, {"zero_stage": 2}):
        found = ParallelStrategy(dp_replicate=2, grad_codec="int8", **coded)
        yield lower_training(LLAMA, found, STEP)
    yield lower_training(LLAMA, ParallelStrategy(stream_chunks=2), STEP)
    for options in ({}, {"capacity_factor": 2.0}, {"ep": 2, "dp_replicate": 2}):
        yield lower_training(MIXTRAL, ParallelStrategy(**options), STEP)


def test_every_form_that_a_strategy_runs_is_measured() -> None:
    measured = {family(case.op) for case in cases()}
    assert set(FITTED) <= measured
    ops = (op for p in lowered() for block in p.blocks.values() for op in block.ops)
    run = {family(op) for op in ops if not op.is_communication and op.kind not in BY_ROOFLINE}
    assert run <= measured
    assert {"attention_block.masked", "grouped_matmul.tn.sorted", "regroup.rows.back"} <= run


def test_a_case_of_every_family_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(microbench, "MAX_COPIES", 2)
    monkeypatch.setattr(microbench, "MIN_SAMPLE_S", 0.0)
    smallest: dict[str, Case] = {}
    for case in cases():
        size = float(work(case.op).read_bytes) + float(work(case.op).write_bytes)
        kept = smallest.setdefault(family(case.op), case)
        if size < float(work(kept.op).read_bytes) + float(work(kept.op).write_bytes):
            smallest[family(case.op)] = case
    pool = Pool()
    for case in smallest.values():
        assert 0 < time_case(case, pool, lambda: None) < 0.5


# ---------------------------------------------------------------- fits


def truth(op: Op) -> float:
    """Return the seconds of a machine that is a roofline with a start-up."""
    done = work(op)
    traffic = 1e-10 * float(done.read_bytes + done.write_bytes)
    return 2e-5 + 1e-11 * float(done.flops) + traffic


def records(ranks: int, noise: float = 0.0) -> list[dict[str, Any]]:
    """Return what ranks of such a machine would record; every third sample is disturbed."""
    draw = np.random.default_rng(0)
    links = [
        {"op": op, "bytes": size, "ranks": n, "samples": [1e-4 * n + size * 1e-9]}
        for n in (2, 4)
        if n <= ranks
        for op in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_recv")
        for size in (1024, 1048576)
    ]
    return [
        {
            "rank": rank,
            "ranks": ranks,
            "seconds": 1.0,
            "ops": [
                {
                    "kind": case.op.kind,
                    "dims": dict(case.op.dims),
                    "attrs": dict(case.op.attrs),
                    "reads": list(case.op.reads),
                    "samples": [truth(case.op), truth(case.op) * (1 + noise * draw.random())],
                }
                for case in (cases() if ranks == 2 else ())
            ],
            "collectives": links,
            "messages": [{"bytes": b, "samples": [1e-4 + b * 5e-10]} for b in (256, 65536, 2**24)],
            "overlap": {"seconds": 1.0, "processor_s": 0.6},
            "issue_s": 1e-5,
            "peaks": {"flops_per_s": 8e10, "bytes_per_s": 2e10},
            "alone": {"flops_per_s": 1e11, "bytes_per_s": 2e10},
            "fingerprint": {"cores": 2},
        }
        for rank in range(ranks)
    ]


def test_a_roofline_is_found_again_and_prices_what_was_not_measured() -> None:
    table = fit_kernels(records(2, noise=3.0))
    found = table[OTHERS]["coefficients"]
    assert found["one"] == pytest.approx(2e-5, rel=1e-3)
    assert found["bytes"] == pytest.approx(1e-10, rel=1e-3)
    assert found["flops"] == pytest.approx(1e-11, rel=1e-3)
    assert all(table[name]["residual"] < 1e-3 for name in FITTED)


def test_a_profile_knows_how_many_ranks_run_at_once(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(fit_profile([records(2), records(4)])))
    profile = read_profile(path)
    assert (profile.cores, set(profile.crowds)) == (2, {4})
    assert profile.among(2) is profile
    assert ("all_reduce", 4) not in profile.collectives.points
    assert ("all_reduce", 4) in profile.among(5).collectives.points
    assert profile.blocking == pytest.approx(0.6)
    assert profile.messages == pytest.approx((1e-4, 5e-10))

    program = lower_training(LLAMA, ParallelStrategy(tp=4), STEP)
    op = next(op for b in program.blocks.values() for op in b.ops if op.kind == "matmul")
    prices = [
        float(ClusterCost(make_cluster("this-cpu", n, 1), {"tp": n}, profile).seconds(op))
        for n in (1, 2, 4)
    ]
    assert prices == pytest.approx([0.8 * truth(op), truth(op), 2 * truth(op)], rel=1e-3)
    unknown = replace(profile, kernels={OTHERS: profile.kernels[OTHERS]})
    cost = ClusterCost(make_cluster("this-cpu", 2, 1), {"tp": 2}, unknown)
    assert float(cost.seconds(op)) == pytest.approx(truth(op), rel=1e-3)
    assert cost.uncertainty(op)[0] == OTHERS


# ---------------------------------------------------------------- ranks that share processors


def machine(program: Program) -> Constant:
    return Constant({"matmul": 1e-3, "attention": 2e-3, "adam": 1e-3}, synchronous=True)


def busy(program: Program) -> float:
    """Return the seconds of all ranks' compute."""
    cost = machine(program)
    return sum(
        float(cost.seconds(op))
        for actions in program.order
        for action in actions
        for _, _, op in program.ops(action.body)
        if not op.is_communication
    ) * (program.world / len(program.order))


@pytest.mark.parametrize(
    "options",
    [{"dp_replicate": 4}, {"pp": 4}, {"pp": 4, "schedule": "zb_h1"}, {"pp": 2, "tp": 2}],
    ids=str,
)
def test_ranks_take_turns_on_fewer_processors(options: Mapping[str, Any]) -> None:
    program = lower_training(LLAMA, ParallelStrategy(**options), STEP)
    cost = machine(program)
    own, two, one = (
        simulate(program, cost, Wires(), detail=True, every_rank=True, cores=cores).step_s
        for cores in (4, 2, 1)
    )
    # Prices are those of ranks that all compute at once.
    assert one == pytest.approx(busy(program) / 4, rel=1e-6)
    assert own >= two >= one * (1 - 1e-9)
    if options.get("pp", 1) == 1:
        assert own == pytest.approx(one)
    else:
        assert two < 0.95 * own  # a rank that waits leaves its processor to the others
    plain = simulate(program, cost, Wires(), detail=True, every_rank=True).step_s
    assert own == pytest.approx(plain)
    with pytest.raises(ValueError, match="folded"):
        simulate(program, cost, Wires(), cores=2)


# ---------------------------------------------------------------- real runs


@pytest.mark.distributed
def test_the_strategies_of_the_examples_really_run() -> None:
    """Predicted and executed on two gloo ranks, in one launch."""
    files = [EXAMPLES / f"cpu_{name}.toml" for name in NAMES]
    scenarios = [load_scenario(file) for file in files]
    cases = [GridCase(f.stem, "m", "g", s) for f, s in zip(files, scenarios, strict=True)]
    found = validate_cases("examples", cases, replace(PROFILE, cores=2))
    assert [each.name for each in found.cases] == [file.stem for file in files]
    for each in found.cases:
        assert 0 < each.measured_s < 60
        assert each.predicted_s > 0
        assert 0 < each.processor_s[1] <= 2 * each.measured_s * 1.5
        assert each.processor_error is not None
        assert {span.rank for span in each.measured.spans} == {0, 1}


@pytest.mark.distributed
@pytest.mark.slow
def test_four_ranks_measure_what_they_do_to_one_another() -> None:
    found = run_benchmarks(4, ops=False)
    assert len(found) == 4
    kinds = {(row["op"], row["ranks"]) for row in found[0]["collectives"]}
    assert {("all_to_all", 2), ("all_to_all", 4), ("send_recv", 4)} <= kinds
    samples = [s for r in found for row in r["collectives"] + r["messages"] for s in row["samples"]]
    assert all(0 < s < 10 and math.isfinite(s) for s in samples)

"""The largest size by bisection against trying every one, and runs of so many tokens."""

from __future__ import annotations

import json
from typing import Any

import pytest

import meshwise as mw
from hwmodels.catalogue import make_cluster
from hwmodels.cost import ClusterCost
from meshwise import cli
from meshwise.sizes import GROWTHS
from simcore.engine import simulate
from simcore.errors import InputError
from simcore.lower import lower_training
from simcore.models import ModelSpec
from simcore.stragglers import Slow, slowed_step_s
from simcore.strategy import ParallelStrategy
from simcore.workloads import TrainStep

FAULTS = {"mtbf_hours": 5e4, "restart_s": 600.0, "checkpoint_s": 30.0}
FITTING = {
    "global_batch": "gpipe",  # 1F1B bounds the microbatches in flight, GPipe holds them all
    "microbatch": "1f1b",
    "seq_len": "1f1b",
    "layers": "1f1b",
}


def scenario(schedule: str = "1f1b", **changes: Any) -> dict[str, Any]:
    base = {
        "model": {"name": "llama-3.1-8b"},
        "cluster": {"gpu": "h100-sxm-80gb", "gpus_per_node": 8},
        "parallel": {"tp": 2, "pp": 2, "dp_replicate": 2, "schedule": schedule, "zero_stage": 1},
        "workload": {"kind": "train", "global_batch": 8, "seq_len": 2048},
    }
    return {**base, **changes}


def grown(what: str, value: int) -> dict[str, Any]:
    """Return the scenario with ``what`` set by hand, as a user would."""
    tables = scenario(FITTING[what])
    work, parallel = dict(tables["workload"]), dict(tables["parallel"])
    if what == "layers":
        spec = mw.load_scenario(tables).model_spec()
        keys = ("hidden", "heads", "kv_heads", "head_dim", "ffn", "vocab", "ffn_kind")
        tables["model"] = {key: getattr(spec, key) for key in keys} | {"layers": value}
    elif what == "microbatch":
        parallel["microbatch"], work["global_batch"] = value, 8 * value
    else:
        work[what] = value
    return {**tables, "workload": work, "parallel": parallel}


@pytest.mark.parametrize("what", GROWTHS)
def test_the_largest_fits_and_the_next_does_not(what: str) -> None:
    found = mw.largest(scenario(FITTING[what]), what).metrics
    assert found["bounded"]
    assert found["monotone"]
    fits, over = (mw.predict(grown(what, found[key])).metrics for key in ("largest", "next"))
    assert fits["fits"]
    assert not over["fits"]
    assert fits["peak_memory_bytes"] == pytest.approx(found["peak_memory_bytes"], rel=1e-9)
    room = over["device_memory_bytes"] - over["reserve_bytes"]
    assert over["peak_memory_bytes"] - room == pytest.approx(found["lacking_bytes"], rel=1e-6)


SPLIT = {"tp": 2, "pp": 1, "dp_shard": 1, "dp_replicate": 1}
TECHNIQUES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "selective": {"recompute": "selective", "recompute_modules": ["attention", "norms"]},
    "keep_attention": {"recompute": "keep_attention"},
    "full": {"recompute": "full", "loss_chunks": 3},
    "one layer": {"recompute": "full", "recompute_layers": 1},
    "streamed": {"stream_chunks": 4, "loss_chunks": 6},
    "swapped": {"swap_fraction": 0.5},
    "gathered again": {
        "recompute": "selective",
        "recompute_modules": ["gathers"],
        "sequence_parallel": True,
    },
    "ring": {"tp": 1, "cp": 2, "recompute": "full"},
    "documents": {"recompute": "full"},
    "documents on servers": {"tp": 1, "cp": 2, "cp_kind": "servers"},
}


def squeezed(technique: str, length: int = 0) -> dict[str, Any]:
    """Return a step of two layers by this technique, of whole documents where it says so."""
    documents = [768, 1280] if "documents" in technique else []
    length = length or 2048 * 3
    work = {"kind": "train", "global_batch": 1, "seq_len": length}
    if documents:
        work["documents"] = documents * (length // sum(documents))
    keys = {"layers": 2, "hidden": 4096, "heads": 32, "kv_heads": 8, "head_dim": 128}
    return scenario(
        model={**keys, "ffn": 14336, "ffn_kind": "gated", "vocab": 32000},
        cluster={"gpu": "h100-sxm-80gb", "gpus_per_node": 2},
        parallel={**SPLIT, **TECHNIQUES[technique]},
        workload=work,
    )


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_the_longest_sequence_of_every_technique(technique: str) -> None:
    """Its steps keep chunks, shares and documents whole; it fits, and the next one does not."""
    found = mw.largest(squeezed(technique), "seq_len").metrics
    assert found["bounded"]
    assert found["monotone"]
    fits, over = (
        mw.predict(squeezed(technique, found[key])).metrics for key in ("largest", "next")
    )
    assert fits["fits"]
    assert not over["fits"]
    assert fits["peak_memory_bytes"] == pytest.approx(found["peak_memory_bytes"], rel=1e-9)
    assert fits.get("host_memory_bytes") == found.get("host_memory_bytes")
    assert (technique == "swapped") == ("host_memory_bytes" in found)


def test_bisection_equals_trying_every_value() -> None:
    found = mw.largest(scenario(), "microbatch").metrics
    value = 1
    while mw.predict(grown("microbatch", value + 1)).metrics["fits"]:
        value += 1
    assert found["largest"] == value


def test_nothing_fits_and_nothing_bounds() -> None:
    whole = {"tp": 1, "pp": 1, "dp_replicate": 8}
    found = mw.largest(scenario(model={"name": "llama-3.1-70b"}, parallel=whole), "seq_len")
    assert found.metrics["largest"] == 0
    assert found.metrics["next"] == 1
    assert found.metrics["lacking_bytes"] > 0
    free = mw.largest(scenario(), "global_batch")
    assert not free.metrics["bounded"]
    assert "does not bound" in free.warnings[-1]


def test_bad_questions_are_refused() -> None:
    with pytest.raises(InputError, match="did you mean 'seq_len'"):
        mw.largest(scenario(), "seq_length")
    generate = {"kind": "generate", "batch": 1, "input_tokens": 8, "output_tokens": 8}
    with pytest.raises(InputError, match="training step"):
        mw.largest(scenario(parallel={"tp": 8}, workload=generate), "layers")


def test_the_command_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    text = json.dumps(scenario())
    assert cli.main(["largest", text, "microbatch", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["metrics"] == mw.largest(text, "microbatch").metrics


# ---------------------------------------------------------------- runs of so many tokens


def long_run(**faults: Any) -> dict[str, Any]:
    work = {"kind": "train", "global_batch": 8, "seq_len": 2048, "tokens": 10**11}
    return scenario(workload=work, **({"faults": {**FAULTS, **faults}} if faults else {}))


def test_a_run_without_faults_is_its_steps() -> None:
    found = mw.predict(long_run()).metrics
    assert found["steps"] == -(-(10**11) // (8 * 2048))
    assert found["days"] * 86400 == pytest.approx(found["steps"] * found["step_s"])
    assert found["run_cost_usd"] == pytest.approx(found["steps"] * found["cost_usd"])
    assert "days" not in mw.predict(scenario()).metrics


def test_faults_lengthen_a_run_and_draws_agree() -> None:
    tables = long_run(mtbf_hours=40.0, straggler_fraction=0.01, straggler_factor=1.3)
    bare, found = mw.predict(long_run()).metrics, mw.predict(tables, "simulate").metrics
    assert found["days"] > bare["days"]
    assert found["goodput_fraction"] == pytest.approx(bare["days"] / found["days"])
    assert found["simulated_days"] == pytest.approx(found["days"], rel=0.01)
    low, high = found["simulated_days_interval"]
    assert low < found["simulated_days"] < high
    assert found["simulated_days"] == mw.predict(tables, "simulate").metrics["simulated_days"]


def test_a_run_that_never_ends_is_a_result() -> None:
    found = mw.predict(long_run(mtbf_hours=1.0, restart_s=3600.0))
    assert found.metrics["finishes"] is False
    assert found.metrics["days"] is None
    assert any("does not finish" in warning for warning in found.warnings)
    assert json.loads(found.to_json())["metrics"]["run_cost_usd"] is None


def test_records_know_nodes_and_devices() -> None:
    tables = long_run(rates="rsc-1")
    del tables["faults"]["mtbf_hours"]
    found = mw.predict(tables).metrics
    assert found["mtbf_s"] == pytest.approx(86400 / 0.0065)  # one node


# ---------------------------------------------------------------- stragglers in the event engine


@pytest.mark.parametrize("factor", [1.0, 1.5, 3.0])
def test_a_slow_rank_delays_the_step_as_stated(factor: float) -> None:
    """Four replicas without a pipeline: the step waits for all that the slow one takes longer."""
    parallel = ParallelStrategy(dp_replicate=4)
    model = ModelSpec("mine", 4, 2048, 16, 16, 128, 8192, 1000)
    program = lower_training(model, parallel, TrainStep(16, 2048))
    cluster = make_cluster("h100-sxm-80gb", 4, 1, None, None)
    cost = ClusterCost(cluster, program.mesh)
    plain = simulate(program, cost, cost, every_rank=True)
    found = simulate(program, cost, cost, every_rank=True, slowdown={2: factor})
    times = plain.times[2]
    stated = slowed_step_s(plain.step_s, times.compute_s, times.exposed_s, 4, Slow(1.0, factor))
    assert found.step_s == pytest.approx(stated, rel=0.02)
    assert found.step_s <= stated * (1 + 1e-9)


def test_in_a_pipeline_the_stated_delay_is_a_bound() -> None:
    parallel = ParallelStrategy(pp=4)
    model = ModelSpec("mine", 4, 2048, 16, 16, 128, 8192, 1000)
    program = lower_training(model, parallel, TrainStep(8, 2048))
    cost = ClusterCost(make_cluster("h100-sxm-80gb", 4, 1, None, None), program.mesh)
    plain = simulate(program, cost, cost, every_rank=True)
    for rank in range(4):
        found = simulate(program, cost, cost, every_rank=True, slowdown={rank: 1.5})
        bound = slowed_step_s(plain.step_s, plain.times[rank].compute_s, 0.0, 1, Slow(1.0, 1.5))
        assert plain.step_s < found.step_s <= bound * (1 + 1e-9)

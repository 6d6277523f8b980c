"""The public functions."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import meshwise as mw
from hwmodels.catalogue import load_chip
from hwmodels.families import VARIANTS
from meshwise.setting import find_profile, resolve
from simcore.errors import InputError
from simcore.scenario import load_scenario

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
MODEL = {"layers": 4, "hidden": 64, "heads": 4, "ffn": 128, "vocab": 256}
CLUSTER = {"gpu": "h100-sxm-80gb", "gpus_per_node": 4}
TRAIN = {"kind": "train", "global_batch": 8, "seq_len": 64}
ENGINES = ("estimate", "simulate")
KEYS = {"scenario_hash", "metrics", "assumptions", "warnings", "provenance"}
METRICS = {
    "train": {
        "step_s",
        "tokens_per_s",
        "tokens_per_s_per_gpu",
        "mfu",
        "hfu",
        "model_flops",
        "peak_memory_bytes",
        "fits",
        "bubble_fraction",
        "exposed_communication_fraction",
    },
    "generate": {
        "seconds",
        "tokens_per_s",
        "tpot_s",
        "passes",
        "committed_per_pass",
        "speedup_vs_autoregressive",
        "peak_memory_bytes",
    },
    "recommend": {
        "step_s",
        "samples_per_s",
        "samples_per_s_per_gpu",
        "hfu",
        "peak_memory_bytes",
        "fits",
        "bubble_fraction",
        "exposed_communication_fraction",
    },
    "collective": {"seconds", "algorithm_bytes_per_s", "bus_bytes_per_s", "algorithm"},
    "op": {"seconds", "flops_per_s", "bytes_per_s", "bound", "interval_s"},
}
NAMES = sorted(path.name for path in EXAMPLES.glob("*.toml") if "grid" not in path.name)


def scenario(**tables: Any) -> dict[str, Any]:
    """Return a training scenario, its tables replaced or, where None, left out."""
    base = {"model": MODEL, "cluster": CLUSTER, "parallel": {"tp": 2, "pp": 2}, "workload": TRAIN}
    return {name: table for name, table in (base | tables).items() if table is not None}


@pytest.mark.parametrize("engine", ["estimate", "simulate"])
@pytest.mark.parametrize("name", NAMES)
def test_every_example_has_all_metrics_of_its_kind(name: str, engine: str) -> None:
    result = mw.predict(EXAMPLES / name, engine)
    kind = load_scenario(EXAMPLES / name).workload.kind
    assert METRICS[kind] <= result.metrics.keys()
    table = json.loads(result.to_json())
    assert table.keys() == KEYS
    assert table["provenance"]["engine"] == engine
    assert table["assumptions"]


def test_a_path_a_dict_and_a_scenario_mean_the_same() -> None:
    raw = scenario()
    loaded = load_scenario(raw)
    assert mw.predict(raw) == mw.predict(loaded)


@pytest.mark.parametrize("degrees", [{"tp": 4}, {"pp": 4}, {"dp_replicate": 4}, {"dp_shard": 4}])
def test_engines_agree(degrees: dict[str, int]) -> None:
    raw = scenario(parallel=degrees)
    guess, truth = (mw.predict(raw, engine).metrics["step_s"] for engine in ENGINES)
    assert guess == pytest.approx(truth, rel=0.02)


def test_generation_engines_agree() -> None:
    raw = scenario(
        workload={"kind": "generate", "batch": 2, "input_tokens": 16, "output_tokens": 40},
        parallel={"tp": 2, "pp": 2},
    )
    guess, truth = (mw.predict(raw, engine).metrics["seconds"] for engine in ENGINES)
    assert guess == pytest.approx(truth, rel=0.02)


def test_the_planner_fills_in_a_missing_strategy() -> None:
    result = mw.predict(scenario(parallel=None))
    assert result.provenance["strategy"]["tp"] >= 1
    assert any("planner chose" in text for text in result.assumptions)
    best = mw.plan(scenario(parallel=None), top=1).metrics["candidates"][0]
    assert result.metrics["step_s"] == best["step_s"]


def test_too_large_a_plan_is_a_result() -> None:
    raw = scenario(model={"name": "llama-3.1-405b"}, parallel={"tp": 4})
    result = mw.predict(raw)
    assert result.metrics["fits"] is False
    assert result.metrics["step_s"] > 0
    assert "does not fit" in result.warnings[-1]
    planned = mw.predict(scenario(model={"name": "llama-3.1-405b"}, parallel=None))
    assert planned.metrics["fits"] is False
    assert planned.metrics["step_s"] > 0


def test_no_strategy_at_all_is_a_result() -> None:
    raw = scenario(
        parallel=None,
        model={**MODEL, "heads": 1, "ffn": 127, "layers": 1},
        workload={**TRAIN, "global_batch": 1},
    )
    result = mw.predict(raw)
    assert result.metrics == {"fits": False, "plan_found": False}
    assert "no plan found" in result.warnings[-1]


GEMM: dict[str, Any] = {
    "cluster": {"gpu": "h100-sxm-80gb"},
    "workload": {"kind": "op", "op": "gemm", "m": 4096, "n": 4096, "k": 4096},
}


def op(**keys: Any) -> dict[str, Any]:
    return {**GEMM, "workload": {**GEMM["workload"], **keys}}


@pytest.mark.parametrize(
    ("gpu", "said"),
    [
        ("h100-sxm-80gb", "follow curves measured on h100-sxm-80gb"),
        ("l40s", "carried to l40s by its datasheet"),
        ("generic-cpu", "datasheet roofline"),
    ],
)
def test_the_origin_of_seconds_is_said(gpu: str, said: str) -> None:
    result = mw.predict({**GEMM, "cluster": {"gpu": gpu}})
    assert any(said in text for text in result.assumptions)
    assert result.provenance["profile"] is None


def test_an_uncalibrated_machine_is_warned_of() -> None:
    result = mw.predict(scenario(cluster={"gpu": "this-cpu", "gpus_per_node": 4}))
    assert any("NOT CALIBRATED" in text for text in result.warnings)


def test_a_profile_belongs_to_this_cpu_or_an_accelerator(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read the curves"):
        mw.predict(scenario(), profile=tmp_path / "p.json")
    with pytest.raises(InputError, match="--profile"):
        mw.predict({**GEMM, "cluster": {"gpu": "generic-cpu"}}, profile=tmp_path / "p.json")
    setting = resolve(load_scenario(scenario(cluster={"gpu": "this-cpu", "gpus_per_node": 4})))
    assert find_profile(setting.cluster, None) is None
    with pytest.raises(InputError, match="cannot read the profile"):
        find_profile(setting.cluster, tmp_path / "p.json")


def test_a_dtype_without_a_matrix_rate_is_warned_of() -> None:
    raw = scenario(
        cluster={"gpu": "a100-sxm-80gb", "gpus_per_node": 4},
        model={**MODEL, "compute_dtype": "fp8"},
    )
    assert any("multiplies fp8 in a wider format" in text for text in mw.predict(raw).warnings)
    raw = scenario(model={**MODEL, "compute_dtype": "bf16"}, cluster={"gpu": "p100"}, parallel={})
    assert any("no matrix rate for bf16" in text for text in mw.predict(raw).warnings)


def test_trace_is_written_whole(tmp_path: Path) -> None:
    target = tmp_path / "sub" / "trace.json"
    mw.simulate(scenario(), target)
    events = json.loads(target.read_text())["traceEvents"]
    assert {event["ph"] for event in events} >= {"X", "M"}
    with pytest.raises(InputError, match="no timeline"):
        mw.simulate(EXAMPLES / "gemm.toml", target)
    with pytest.raises(InputError, match="cannot write"):
        mw.simulate(scenario(), Path("/dev/null/trace.json"))


def test_unknown_engine() -> None:
    with pytest.raises(InputError, match="estimate"):
        mw.predict(scenario(), "estimat")


def test_records_pandas_and_html() -> None:
    result = mw.predict(scenario())
    (row,) = result.to_records()
    assert row["peak_memory_parts_bytes.weights"] > 0
    assert result.to_pandas()["step_s"][0] == result.metrics["step_s"]
    assert "<table>" in result._repr_html_()
    plan = mw.plan(scenario(parallel=None), top=3)
    assert [row["rank"] for row in plan.to_records()] == [1, 2, 3]
    assert "microbatch" in plan._repr_html_()


def test_a_large_gemm_runs_near_the_peak_and_never_above() -> None:
    result = mw.predict(EXAMPLES / "gemm.toml")
    assert result.metrics["bound"] == "compute"
    assert 0.6 * 989.4e12 < result.metrics["flops_per_s"] < 989.4e12
    low, high = result.metrics["interval_s"]
    assert low < result.metrics["seconds"] < high


def test_libraries_differ_and_an_unknown_one_is_refused() -> None:
    seconds = {
        name: mw.predict(op(implementation=name)).metrics["seconds"]
        for name in ("default", "trtllm", "vllm")
    }
    assert seconds["default"] ** 2 == pytest.approx(seconds["trtllm"] * seconds["vllm"])
    assert seconds["trtllm"] != seconds["vllm"]
    with pytest.raises(InputError, match="did you mean 'vllm'"):
        mw.predict(op(implementation="vlm"))
    other = mw.predict(op(implementation="sglang"))
    assert other.metrics["seconds"] == seconds["default"]
    assert any("no such kernel of sglang" in note for note in other.assumptions)


@pytest.mark.parametrize(
    ("op", "bound"),
    [
        ({"op": "gemm", "m": 1, "n": 8192, "k": 8192}, "memory"),
        ({"op": "gemm", "m": 16, "n": 16, "k": 16}, "latency"),
        (
            {
                "op": "attention_decode",
                "batch": 64,
                "kv_len": 8192,
                "heads": 32,
                "kv_heads": 8,
                "head_dim": 128,
                "kv_dtype": "fp8",
            },
            "memory",
        ),
        (
            {"op": "attention_prefill", "batch": 1, "seq_len": 8192, "heads": 32, "head_dim": 128},
            "compute",
        ),
        (
            {
                "op": "moe",
                "tokens": 4,
                "hidden": 4096,
                "ffn": 14336,
                "experts": 8,
                "experts_per_token": 2,
            },
            "memory",
        ),
    ],
)
def test_bounds_of_operators(op: dict[str, Any], bound: str) -> None:
    result = mw.predict({**GEMM, "workload": {"kind": "op", **op}})
    assert result.metrics["bound"] == bound


ROWS = {"rows": 8192, "columns": 8192}
GLA = {"batch": 4, "seq_len": 8192, "heads": 16, "d_k": 128, "d_v": 128, "chunk": 64}


@pytest.mark.parametrize("gpu", ["h100-sxm-80gb", "mi300x", "generic-cpu"])
@pytest.mark.parametrize("name", ["rmsnorm", "softmax_loss", "sample", "adam", "quantise", "copy"])
def test_rowwise_operators_wait_for_memory(gpu: str, name: str) -> None:
    raw = {"cluster": {"gpu": gpu}, "workload": {"kind": "op", "op": name, **ROWS}}
    metrics = mw.predict(raw).metrics
    fastest = max(tier.bytes_per_s for tier in load_chip(gpu).tiers)
    assert metrics["bytes_per_s"] <= fastest
    assert metrics["seconds"] * metrics["bytes_per_s"] >= 2 * 8192 * 8192


def test_a_mixer_is_an_operator_and_its_mistakes_are_sentences() -> None:
    table = {"kind": "op", "op": "mixer", "mixer": "gla", "form": "chunked", "sizes": GLA}
    raw = {**GEMM, "workload": table}
    assert 0 < mw.predict(raw).metrics["flops_per_s"] < 989.4e12
    for change, said in (
        ({"mixer": "glaa"}, "did you mean 'gla'"),
        ({"form": "chunk"}, "did you mean 'chunked'"),
        ({"sizes": {"batch": 4}}, "add it"),
    ):
        with pytest.raises(InputError, match=said):
            mw.predict({**GEMM, "workload": {**table, **change}})


def test_moe_counts_its_products_and_touched_experts() -> None:
    table = {
        "kind": "op",
        "op": "moe",
        "tokens": 4096,
        "hidden": 1024,
        "ffn": 512,
        "experts": 8,
        "experts_per_token": 2,
    }
    raw = {"cluster": {"gpu": "h100-sxm-80gb"}, "workload": table}
    metrics = mw.predict(raw).metrics
    flops = 2 * 3 * 4096 * 2 * 1024 * 512
    assert metrics["flops_per_s"] * metrics["seconds"] == pytest.approx(flops)
    shared = mw.predict({**raw, "workload": {**table, "ep": 2}}).metrics
    assert shared["flops_per_s"] * shared["seconds"] == pytest.approx(flops / 2)
    skewed = {**table, "ep": 2, "routing": "power_law", "alpha": 1.0}
    uneven = mw.predict({**raw, "workload": skewed}).metrics
    assert uneven["seconds"] > shared["seconds"]


def test_collective_ranks_are_checked_against_a_named_cluster() -> None:
    raw = {
        "cluster": {"cluster": "dgx-h100"},
        "workload": {"kind": "collective", "op": "all_reduce", "bytes": 1e6, "ranks": 16},
    }
    with pytest.raises(InputError, match="ranks"):
        mw.predict(raw)
    more = {**raw, "cluster": {"cluster": "dgx-h100", "nodes": 2}}
    assert mw.predict(more).metrics["seconds"] > 0


def test_named_cluster_knows_the_world() -> None:
    raw = scenario(cluster={"cluster": "dgx-h100"}, parallel={"tp": 4})
    with pytest.raises(InputError, match="8"):
        mw.predict(raw)
    assert mw.predict(scenario(cluster={"cluster": "dgx-h100"}, parallel={"tp": 4, "pp": 2}))


def test_catalogues() -> None:
    assert len(mw.models()) >= 50
    names = mw.hardware()
    assert {"h100-sxm-80gb", "nvlink4", "dgx-h100"} <= set(names)
    chip = mw.hardware("H100")
    assert isinstance(chip, dict)
    assert (chip["catalogue"], chip["kind"]) == ("chip", "accelerator")
    assert mw.schema()["title"] == "meshwise scenario"


def test_runs_are_refused_before_anything_starts() -> None:
    with pytest.raises(InputError, match="cannot be run"):
        mw.run(EXAMPLES / "gemm.toml")
    with pytest.raises(InputError, match="--rank"):
        mw.run(EXAMPLES / "llama70b_512xh100.toml")
    with pytest.raises(InputError, match="this CPU"):
        mw.validate(scenario())
    with pytest.raises(InputError, match="512 ranks"):
        mw.run(EXAMPLES / "llama70b_512xh100.toml", rank=512)


@pytest.mark.distributed
def test_validate_compares_a_real_run_with_its_prediction() -> None:
    raw = scenario(
        cluster={"gpu": "this-cpu"},
        parallel={"tp": 1},
        model={**MODEL, "weights_dtype": "fp32", "compute_dtype": "fp32"},
        run={"repeats": 2, "warmup": 1},
    )
    result = mw.validate(raw)
    metrics = result.metrics
    assert metrics["error"] == pytest.approx(
        metrics["predicted_step_s"] / metrics["measured_step_s"] - 1
    )
    assert len(metrics["repeats_s"]) == 2
    assert METRICS["train"] <= metrics.keys()
    assert result.provenance["engine"] == "execute"


@pytest.mark.distributed
def test_one_rank_of_a_larger_plan_runs_alone() -> None:
    raw = scenario(
        cluster={"gpu": "h100-sxm-80gb", "gpus_per_node": 4},
        run={"repeats": 1},
        model={**MODEL, "weights_dtype": "fp32", "compute_dtype": "fp32"},
    )
    result = mw.run(raw, rank=3)
    assert [each["rank"] for each in result.metrics["ranks"]] == [3]
    assert any("alone" in text for text in result.assumptions)


def test_import_is_lazy_and_names_are_there() -> None:
    code = "import sys, meshwise; print('numpy' in sys.modules, 'pydantic' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "False"]
    assert all(getattr(mw, name) is not None for name in mw.__all__)
    assert set(mw.__all__) <= set(dir(mw))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = mw.nothing  # type: ignore[attr-defined]


def test_a_window_leaves_fewer_pairs_and_takes_no_longer() -> None:
    shape = {"batch": 2, "heads": 8, "head_dim": 128, "seq_len": 64}
    call = {"kind": "op", "op": "attention_prefill", **shape}
    full, cut = (
        mw.predict({**GEMM, "workload": {**call, "window": window}}).metrics for window in (0, 16)
    )
    pairs = sum(min(i + 1, 16) for i in range(64))
    assert cut["flops_per_s"] * cut["seconds"] == pytest.approx(4 * 2 * 8 * 128 * pairs)
    assert full["flops_per_s"] * full["seconds"] == pytest.approx(4 * 2 * 8 * 128 * 64 * 65 / 2)
    assert cut["seconds"] <= full["seconds"]


HEADS = {"batch": 8, "kv_len": 4096, "heads": 32, "kv_heads": 8, "head_dim": 128}
VARIANT_SIZES: dict[str, dict[str, float]] = {
    "attention_backward": {**HEADS, "seq_len": 4096},
    "latent_attention_decode": {
        **{"batch": 64, "kv_len": 4096, "heads": 128, "latent_dim": 512, "rope_dim": 64}
    },
    "latent_attention_prefill": {
        **{"batch": 1, "seq_len": 4096, "kv_len": 4096, "heads": 128, "qk_dim": 192, "v_dim": 128}
    },
    "sparse_attention": {**HEADS, "seq_len": 4096, "density": 0.25},
    "verify_attention": {**HEADS, "seq_len": 16},
    "shared_prefix_attention": {**HEADS, "prefix_len": 2048},
    "paged_attention_decode": {**HEADS, "page": 16},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_kind_of_attention_is_an_operator(name: str) -> None:
    table = {"kind": "op", "op": name, "sizes": VARIANT_SIZES[name]}
    metrics = mw.predict({**GEMM, "workload": table}).metrics
    assert 0 < metrics["flops_per_s"] < 989.4e12
    assert 0 < metrics["bytes_per_s"] < max(t.bytes_per_s for t in load_chip("H100").tiers)
    with pytest.raises(InputError, match="accelerators alone"):
        mw.predict({"cluster": {"gpu": "generic-cpu"}, "workload": table})
    first, *rest = VARIANT_SIZES[name].items()
    with pytest.raises(InputError, match=f"lacks '{first[0]}'"):
        mw.predict({**GEMM, "workload": {**table, "sizes": dict(rest)}})
    with pytest.raises(InputError, match="did you mean 'batch'"):
        mw.predict({**GEMM, "workload": {**table, "sizes": {**dict(rest), "bach": 1}}})

"""A scenario is read from every source, resolves to core types, and is documented key by key.

`python tests/test_scenario.py` writes the tables of keys in docs/scenario.md.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest

from simcore.balance import BALANCERS
from simcore.errors import InputError
from simcore.models import ModelSpec
from simcore.scenario import (
    KINDS,
    TABLES,
    ModelTable,
    ParallelTable,
    check_scenario,
    load_scenario,
    make_scenario,
    parse_scenario,
    scenario_hash,
    scenario_schema,
    schedule_names,
)
from simcore.strategy import ParallelStrategy, microbatches
from simcore.workloads import CollectiveCall, Generation, OpCall, TrainStep

DOCUMENT = Path(__file__).parents[1] / "docs" / "scenario.md"
MARK = "<!-- keys -->\n"
MODEL = {"layers": 8, "hidden": 64, "heads": 8, "kv_heads": 2, "ffn": 256, "vocab": 1000}
REDUCE = {"kind": "collective", "op": "all_reduce", "ranks": 1}
TOML = """
[model]
layers = 8
hidden = 64
heads = 8
kv_heads = 2
ffn = 256
vocab = 1000
weights_dtype = "fp8"
[cluster]
gpu = "h100-sxm-80gb"
gpus_per_node = 2
nodes = 2
[parallel]
tp = 2
pp = 2
layers_per_stage = [5, 3]
[workload]
kind = "train"
global_batch = 16
seq_len = 128
microbatch = 4
"""


def tables(**changes: Any) -> dict[str, Any]:
    """Return the tables of a sound training scenario, whole tables replaced by ``changes``."""
    base = {
        "model": MODEL,
        "cluster": {"gpu": "h100-sxm-80gb", "gpus_per_node": 4},
        "workload": {"kind": "train", "global_batch": 16, "seq_len": 128},
    }
    return {**base, **changes}


def work(**workload: Any) -> Any:
    """Return what an op or a collective resolves to."""
    return make_scenario(cluster={"gpu": "x", "gpus_per_node": 8}, workload=workload).work()


def test_toml_resolves_to_core_types(tmp_path: Path) -> None:
    path = tmp_path / "scenario.toml"
    path.write_text(TOML)
    scenario = load_scenario(path)
    spec, strategy, step = scenario.model_spec(), scenario.strategy(), scenario.work()
    assert (spec.heads, spec.kv_heads, spec.head_dim, spec.weights_dtype) == (8, 2, 8, "fp8")
    assert strategy == ParallelStrategy(tp=2, pp=2, microbatch=4, layers_per_stage=(5, 3))
    assert step == TrainStep(global_batch=16, seq_len=128)
    assert isinstance(step, TrainStep)
    assert microbatches(strategy, step) == 4
    assert (scenario.world, scenario.folder) == (4, tmp_path)


def test_every_source_gives_the_same_scenario(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = tables()
    path = tmp_path / "scenario.json"
    path.write_text("\ufeff" + json.dumps(raw))
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(raw)))
    found = [load_scenario(source) for source in (raw, path, str(path), json.dumps(raw), "-")]
    found += [parse_scenario(json.dumps(raw)), make_scenario(**raw, parallel=None)]
    assert len({scenario_hash(scenario) for scenario in found}) == 1


def test_models_are_accepted_as_tables() -> None:
    scenario = make_scenario(**tables(model=ModelTable.model_validate(MODEL)))
    assert scenario == make_scenario(**tables())


def test_automatic_strategy() -> None:
    pinned = {"strategy": "auto", "microbatch": 2}
    assert make_scenario(**tables()).strategy() is None
    scenario = make_scenario(**tables(parallel=pinned))
    assert (scenario.strategy(), scenario.microbatch) == (None, 2)
    assert make_scenario(**tables()).microbatch is None


def test_a_named_cluster_leaves_the_world_open() -> None:
    scenario = make_scenario(**tables(cluster={"cluster": "a", "nodes": 2}, parallel={"tp": 8}))
    assert scenario.world is None
    assert scenario.strategy() == ParallelStrategy(tp=8)


def test_workloads() -> None:
    generate = {"kind": "generate", "batch": 2, "input_tokens": 8, "output_tokens": 4}
    assert make_scenario(**tables(workload=generate)).work() == Generation(2, 8, 4)
    call = work(kind="collective", op="all_gather", bytes=1024, ranks=8)
    assert call == CollectiveCall("all_gather", 1024.0, 8)
    assert work(kind="op", op="gemm", m=1, n=2, k=3) == OpCall("gemm", {"m": 1, "n": 2, "k": 3})


def test_attention_dims() -> None:
    shape = {"batch": 2, "heads": 8, "head_dim": 64, "kv_dtype": "fp8"}
    prefill = work(kind="op", op="attention_prefill", seq_len=16, **shape)
    assert prefill.dims == {
        **{"batch": 2, "heads": 8, "kv_heads": 8, "head_dim": 64, "kv_element_bytes": 1.0},
        **{"seq_len": 16, "kv_len": 16, "causal": 1.0, "window": 0.0},
    }
    decode = work(kind="op", op="attention_decode", kv_len=16, kv_heads=2, **shape)
    assert (decode.dims["kv_heads"], decode.dims["kv_len"]) == (2, 16)


def test_moe_dims() -> None:
    shape = {"tokens": 4, "hidden": 8, "ffn": 16, "experts": 8, "experts_per_token": 2}
    balanced = work(kind="op", op="moe", **shape)
    skewed = work(kind="op", op="moe", routing="power_law", alpha=1.2, **shape)
    assert (balanced.dims["alpha"], skewed.dims["alpha"]) == (0.0, 1.2)


def test_inline_defaults() -> None:
    moe = {"experts": 4, "experts_per_token": 2}
    spec = make_scenario(**tables(model={**MODEL, **moe, "name": "mine"})).model_spec()
    assert (spec.name, spec.moe_ffn, spec.ffn) == ("mine", 256, 256)
    mla = {"kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 4, "v_head_dim": 12}
    assert make_scenario(**tables(model={**MODEL, **mla})).model_spec().head_dim == 16


def test_fields_follow_the_core_types() -> None:
    own = {"name", "hf_config"}
    spec = {field.name: field for field in dataclasses.fields(ModelSpec)}
    assert set(ModelTable.model_fields) - own == set(spec) - {"name"}
    for name, field in ModelTable.model_fields.items():
        if name not in own and field.default is not None:
            assert spec[name].default == field.default, name
    strategy = {field.name: field for field in dataclasses.fields(ParallelStrategy)}
    assert set(ParallelTable.model_fields) - set(strategy) == {
        *("strategy",),
    }
    assert set(strategy) <= set(ParallelTable.model_fields)
    for name, part in strategy.items():
        assert ParallelTable.model_fields[name].default == part.default, name


def test_catalogue_and_config_are_resolved(tmp_path: Path) -> None:
    pytest.importorskip("simcore.catalogue")
    pytest.importorskip("simcore.hf_config")
    named = make_scenario(**tables(model={"name": "llama-2-7b", "kv_dtype": "fp8"}))
    assert (named.model_spec().layers, named.model_spec().kv_dtype) == (32, "fp8")
    config = {
        **{"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64},
        **{"num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 100},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    path = tmp_path / "scenario.json"
    path.write_text(json.dumps(tables(model={"hf_config": "config.json"})))
    assert load_scenario(path).model_spec().layers == 2


def test_hash_follows_the_meaning() -> None:
    base = scenario_hash(make_scenario(**tables(parallel={"tp": 4, "microbatch": 2})))
    workload = {"kind": "train", "global_batch": 16, "seq_len": 128, "microbatch": 2}
    alias = make_scenario(**tables(parallel={"tp": 4, "pp": 1}, workload=workload))
    assert scenario_hash(alias) == base
    assert re.fullmatch(r"[0-9a-f]{16}", base)
    assert scenario_hash(make_scenario(**tables(parallel={"tp": 4}))) != base
    calls = [
        {"cluster": {"gpu": "x"}, "workload": {**REDUCE, "bytes": size}} for size in (1000, 1000.0)
    ]
    assert scenario_hash(load_scenario(calls[0])) == scenario_hash(load_scenario(calls[1]))


def test_a_scenario_cannot_be_changed() -> None:
    scenario = make_scenario(**tables())
    with pytest.raises(ValueError, match="frozen"):
        scenario.run = None  # type: ignore[assignment]
    check_scenario(scenario)


def test_complaints_open_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(TOML.replace("tp = 2", "tp = 4"))
    with pytest.raises(InputError, match=r"bad\.toml: \[parallel\] makes pp 2 x tp 4 = 8 ranks"):
        load_scenario(path)


def test_format_is_known_without_a_suffix(tmp_path: Path) -> None:
    for text in (TOML, json.dumps(tables())):
        path = tmp_path / "scenario"
        path.write_text(text)
        assert load_scenario(path).work() == TrainStep(16, 128)


def test_schema_describes_every_key() -> None:
    schema = scenario_schema()
    assert tuple(schema["properties"]) == TABLES
    for name, table in schema["$defs"].items():
        assert table["additionalProperties"] is False, name
        for key, rule in table["properties"].items():
            assert rule["description"].endswith("."), (name, key)
    schedule = schema["$defs"]["ParallelTable"]["properties"]["schedule"]
    assert schedule["enum"] == sorted(schedule_names())
    json.dumps(schema, allow_nan=False)


TRAIN = {"kind": "train", "global_batch": 3, "seq_len": 128}


def test_lengths_come_from_a_list_a_law_or_a_file(tmp_path: Path) -> None:
    def lengths(given: Any, **more: Any) -> tuple[int, ...]:
        workload = {**TRAIN, "lengths": given, **more}
        table = tables(parallel={"dp_replicate": 4}, workload=workload)
        (tmp_path / "scenario.json").write_text(json.dumps(table))
        found = load_scenario(tmp_path / "scenario.json").work()
        assert isinstance(found, TrainStep)
        return found.lengths

    (tmp_path / "lengths.txt").write_text("7\n9, 4\n 5\n")
    assert lengths([7, 9, 4, 5]) == lengths("lengths.txt") == (7, 9, 4)
    drawn = lengths({"median": 20, "sigma": 1.0, "seed": 3}, seq_len=50)
    assert drawn == lengths({"median": 20, "sigma": 1.0, "seed": 3}, seq_len=50)
    assert len(set(drawn)) > 1
    assert max(drawn) <= 50
    (tmp_path / "words.txt").write_text("7 nine")
    for wrong, said in (
        ([7, 9], "holds 2 lengths but global_batch is 3"),
        ([7, 9, 10**6], "raise seq_len"),
        ([7, 0, 9], "holds 0: give whole numbers"),
        ([], "is not a file, a list"),
        (3, "is not a file, a list"),
        ({"median": 20}, "needs sigma, a number of 0 or more, not null"),
        ({"median": 0, "sigma": 1}, "needs median, a number above 0, not 0"),
        ({"median": 9, "sigma": 1, "mean": 2}, "has no key 'mean'"),
        ({"median": 9, "sigma": 1, "seed": 0.5}, "needs seed, a whole number"),
        ("absent.txt", "cannot read absent.txt"),
        ("words.txt", "words.txt holds 'nine'"),
    ):
        with pytest.raises(InputError, match=re.escape(said)):
            lengths(wrong)


def test_lengths_and_their_balance_stand_together() -> None:
    given = {**TRAIN, "lengths": [7, 9, 4]}
    for parallel, workload, said in (
        ({}, given, "[workload].lengths needs a strategy"),
        ({"balance": "hdp"}, {**TRAIN, "global_batch": 4}, "'hdp' has no meaning"),
        ({"balance": "flexps"}, given, "did you mean 'flexsp'"),
        ({"zero_stage": 3}, given, "zero_stage 3 gathers"),
    ):
        table = {"parallel": {"dp_replicate": 4, **parallel}} if parallel else {}
        with pytest.raises(InputError, match=re.escape(said)):
            make_scenario(**tables(workload=workload, **table))
    choices = ParallelTable.model_fields["balance"].annotation
    assert set(get_args(get_args(choices)[0])) == set(BALANCERS)


# ------------------------------------------------------------------------------------ documentation


def type_of(rule: dict[str, Any]) -> str:
    """Return the words for the type and range of a key of the schema."""
    if "anyOf" in rule:
        return " or ".join(type_of(p) for p in rule["anyOf"] if p.get("type") != "null")
    if "enum" in rule:
        return ", ".join(rule["enum"])
    if "const" in rule:
        return str(rule["const"])
    if rule["type"] == "array":
        return f"list of: {type_of(rule['items'])}"
    words = {"integer": "whole number", "boolean": "true or false", "object": "table"}
    words["number"] = "number"
    low = rule.get("minimum", rule.get("exclusiveMinimum"))
    span = "" if low is None else f" {low:g} to {rule['maximum']:g}"
    span = span.replace(" 0 to", " above 0 to") if "exclusiveMinimum" in rule else span
    return words.get(rule["type"], "text") + span


def default_of(key: str, rule: dict[str, Any], required: list[str]) -> str:
    """Return the words for a key's default."""
    if key in required:
        return "required"
    value = rule.get("default")
    return "-" if value is None or value == [] else json.dumps(value).strip('"')


def key_table(title: str, table: dict[str, Any]) -> str:
    """Return the Markdown section of one table of the schema."""
    lines = [f"### {title}", "", table["description"], ""]
    lines += ["| key | type | unit | default | meaning |", "|---|---|---|---|---|"]
    for key, rule in table["properties"].items():
        cells = (
            type_of(rule),
            rule.get("unit", "-"),
            default_of(key, rule, table.get("required", [])),
        )
        lines.append(f"| `{key}` | {' | '.join(cells)} | {rule['description']} |")
    return "\n".join(lines) + "\n"


def _op(rules: dict[str, Any]) -> str:
    """Return the operator of a table, or the first and last of several."""
    names = rules["op"].get("enum") or [rules["op"]["const"]]
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"


def reference() -> str:
    """Return the Markdown of every table and key of the schema."""
    parts = []
    for name, table in scenario_schema()["$defs"].items():
        rules = table["properties"]
        title = f"[{name.removesuffix('Table').lower()}]"
        if "kind" in rules:
            kind = rules["kind"]["const"]
            home = "workload" if name.endswith("Workload") else "model"
            title = f"[{home}] of kind {kind}"
            title += f", op {_op(rules)}" if kind == "op" else ""
        parts.append(key_table(title, table))
    return "\n".join(sorted(parts))


def test_document_holds_every_key() -> None:
    text = DOCUMENT.read_text()
    assert text.split(MARK)[1].strip() == reference().strip(), "run python tests/test_scenario.py"
    assert all(f"| {kind} |" in text for kind in KINDS)


BLOCKS = re.findall(r"```(toml|python)\n(.*?)```", DOCUMENT.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize(("language", "block"), BLOCKS)
def test_examples_of_the_document_run(language: str, block: str) -> None:
    if "name =" in block and importlib.util.find_spec("simcore.catalogue") is None:
        pytest.skip("needs simcore.catalogue")
    if language == "toml":
        parse_scenario(block)
    else:
        exec(compile(block, str(DOCUMENT), "exec"), {})


if __name__ == "__main__":
    head = DOCUMENT.read_text().split(MARK)[0]
    DOCUMENT.write_text(head + MARK + "\n" + reference())

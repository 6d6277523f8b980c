"""Every malformed scenario is refused in one clear sentence, and nothing else is ever raised."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from simcore.errors import InputError
from simcore.scenario import MAX_FILE_BYTES, Scenario, load_scenario, parse_scenario

Raw = dict[str, Any]
Case = tuple[str, Any, tuple[str, ...]]

MODEL = {"layers": 8, "hidden": 64, "heads": 8, "ffn": 256, "vocab": 1000}
CLUSTER = {"gpu": "h100-sxm-80gb", "gpus_per_node": 4}
TRAIN = {"kind": "train", "global_batch": 16, "seq_len": 128}
FAULTS = {"mtbf_hours": 5e4, "restart_s": 600.0, "checkpoint_s": 30.0}
BARE = {"restart_s": 600.0, "checkpoint_s": 30.0}
GENERATE = {"kind": "generate", "batch": 4, "input_tokens": 32, "output_tokens": 8}
GEMM = {"kind": "op", "op": "gemm", "m": 64, "n": 64, "k": 64}
REDUCE = {"kind": "collective", "op": "all_reduce", "bytes": 1024, "ranks": 4}
PREFILL = {
    **{"kind": "op", "op": "attention_prefill", "batch": 1, "seq_len": 128},
    **{"heads": 8, "head_dim": 64},
}
MOE = {
    **{"kind": "op", "op": "moe", "tokens": 64, "hidden": 64, "ffn": 128},
    **{"experts": 8, "experts_per_token": 2},
}


def train(**tables: Any) -> Raw:
    """Return a sound training scenario, its tables extended by ``tables``."""
    base: Raw = {
        **{"model": MODEL, "cluster": CLUSTER, "parallel": {"tp": 2, "pp": 2}},
        "workload": TRAIN,
    }
    for name, table in tables.items():
        both = isinstance(table, dict) and isinstance(base.get(name), dict)
        base[name] = {**base[name], **table} if both else table
    return base


def alone(workload: Raw, **extra: Any) -> Raw:
    """Return a scenario of an op or a collective, the workload extended by ``extra``."""
    return {"cluster": CLUSTER, "workload": {**workload, **extra}}


def without(raw: Raw, table: str, key: str = "") -> Raw:
    """Return the scenario less a table, or less one of its keys."""
    if not key:
        return {name: value for name, value in raw.items() if name != table}
    return {**raw, table: {name: value for name, value in raw[table].items() if name != key}}


TABLES: list[Case] = [
    ("not a table", [1, 2], ("a list of 2",)),
    ("no workload", without(train(), "workload"), ("[workload]", "train")),
    ("no cluster", without(train(), "cluster"), ("[cluster]", "gpu")),
    ("no model", without(train(), "model"), ("[model]", "train")),
    ("empty", {}, ("[cluster]", "1 more")),
    ("unknown table", train(paralel={}), ("[paralel]", "[parallel]")),
    ("key outside tables", train(tp=2), ("tp", "[parallel]")),
    ("table is a number", train(cluster=4), ("[cluster]", "4")),
    ("table is null", train(model=None), ("[model]", "null")),
    ("engine", train(engine={"profile": "vllm"}), ("[engine]", "serving", "generate")),
    ("faults", train(faults={}), ("[faults].restart_s", "is missing")),
    ("faults of one step", train(faults=FAULTS), ("[faults]", "[workload].tokens")),
    ("faults of a gemm", {**alone(GEMM), "faults": FAULTS}, ("[faults]", "'op'")),
    (
        "two rates",
        train(faults={**FAULTS, "rates": "rsc-1"}),
        ("[faults].rates", "mtbf_hours", "exclude each other"),
    ),
    ("no rate", train(faults=BARE), ("[faults]", "mtbf_hours", "rates")),
    ("unknown rates", train(faults={**BARE, "rates": "rsc"}), ("[faults].rates", "'rsc-2'")),
    (
        "checkpoint overlap",
        train(faults={**FAULTS, "checkpoint_interval_s": 1.0, "checkpoint_stall_s": 1.0}),
        ("[faults].checkpoint_interval_s", "at least 28"),
    ),
    (
        "wrong interval",
        train(faults={**FAULTS, "checkpoint_interval_s": "best"}),
        ("[faults].checkpoint_interval_s", "'optimal'"),
    ),
    (
        "tokens and steps",
        train(workload={**TRAIN, "tokens": 10, "steps": 10}),
        ("[workload].steps", "exclude each other"),
    ),
    ("serve", train(workload={"kind": "serve"}), ("serve", "generate", "collective")),
    ("unknown kind", train(workload={"kind": "trian"}), ("kind", "'train'")),
    ("kind is a list", train(workload={"kind": ["train"]}), ("[workload].kind", "a list")),
    ("kind is missing", without(train(), "workload", "kind"), ("[workload].kind",)),
    ("op is missing", without(alone(GEMM), "workload", "op"), ("[workload].op", "'gemm'")),
    ("unknown op", alone(GEMM, op="gem"), ("[workload].op", "'gemm'")),
    ("unknown collective", alone(REDUCE, op="allreduce"), ("[workload].op", "'all_reduce'")),
    ("collective with model", {**alone(REDUCE), "model": MODEL}, ("[model]", "collective")),
    ("op with parallel", {**alone(GEMM), "parallel": {"tp": 4}}, ("[parallel]", "'op'")),
    ("train with decoding", train(decoding={}), ("[decoding]", "train")),
]

KEYS: list[Case] = [
    ("misspelt key", train(parallel={"virtual_stage": 1}), ("virtual_stage", "virtual_stages")),
    ("misspelt model key", train(model={"layer": 8}), ("[model].layer", "did you mean layers")),
    ("key of another table", train(model={"tp": 2}), ("[model].tp", "[parallel]")),
    ("key of another kind", train(workload={"batch": 2}), ("[workload].batch", "generate")),
    ("nonsense key", train(run={"zzqqxx": 2}), ("zzqqxx", "seed")),
    ("long key", train(run={"s" * 5000: 2}), ("[run].sss",)),
    ("key of two lines", train(run={"a\nb": 2}), ("[run]", "seed")),
    ("key is a number", train(run={7: 2}), ("[run].7",)),
    ("key is a surrogate", train(run={"\ud800": 2}), ("[run]", "ud800")),
    ("missing key", without(train(), "workload", "seq_len"), ("[workload].seq_len",)),
    ("missing inline number", without(train(), "model", "vocab"), ("[model].vocab",)),
    ("later key", train(parallel={"offload": "host"}), ("offload", "not available")),
    ("later goal", train(goal={"minimise": "step_s", "subject_to": []}), ("subject_to",)),
]

VALUES: list[Case] = [
    ("zero degree", train(parallel={"tp": 0}), ("[parallel].tp", "at least 1")),
    ("negative degree", train(parallel={"pp": -2}), ("[parallel].pp", "-2")),
    ("huge degree", train(parallel={"tp": 10**7}), ("[parallel].tp", "1000000")),
    ("vast integer", train(parallel={"tp": 10**5000}), ("[parallel].tp", "5001 digits")),
    ("bool degree", train(parallel={"tp": True}), ("[parallel].tp", "true")),
    ("float degree", train(parallel={"tp": 8.0}), ("[parallel].tp", "write 8 instead of 8.0")),
    ("fraction", train(parallel={"tp": 2.5}), ("[parallel].tp", "2.5")),
    ("text degree", train(parallel={"tp": "8"}), ("[parallel].tp", "without quotes")),
    ("null degree", train(parallel={"tp": None}), ("[parallel].tp", "null")),
    ("nan", train(workload={"seq_len": math.nan}), ("[workload].seq_len", "nan")),
    ("nan bytes", alone(REDUCE, bytes=math.nan), ("[workload].bytes", "nan")),
    ("infinite bytes", alone(REDUCE, bytes=math.inf), ("[workload].bytes", "inf")),
    ("no bytes", alone(REDUCE, bytes=0), ("[workload].bytes", "0")),
    ("bytes in quotes", alone(REDUCE, bytes="1e9"), ("[workload].bytes", "without quotes")),
    ("bytes with a unit", alone(REDUCE, bytes="1 GB"), ("[workload].bytes", "1 GB")),
    ("vast bytes", alone(REDUCE, bytes=10**400), ("[workload].bytes", "401 digits")),
    ("bool bytes", alone(REDUCE, bytes=True), ("[workload].bytes", "true")),
    ("infinite timeout", train(run={"timeout_s": math.inf}), ("[run].timeout_s", "inf")),
    ("negative seed", train(run={"seed": -1}), ("[run].seed", "-1")),
    ("distribution", train(workload={"seq_len": {"mean": 9}}), ("seq_len", "distributions")),
    ("too many layers", train(model={"layers": 10**5}), ("[model].layers", "10000")),
    ("too wide", train(model={"hidden": 10**8}), ("[model].hidden", "10000000")),
    ("too many tokens", train(workload={"seq_len": 10**10}), ("seq_len", "1000000000")),
    ("unknown dtype", train(model={"weights_dtype": "fp88"}), ("weights_dtype", "'fp8'")),
    ("dtype is a number", train(model={"kv_dtype": 8}), ("[model].kv_dtype", "8")),
    ("unknown schedule", train(parallel={"schedule": "1b1f"}), ("schedule", "'1f1b'")),
    ("schedule is a list", train(parallel={"schedule": []}), ("[parallel].schedule", "a list")),
    ("flag is a number", train(parallel={"sequence_parallel": 1}), ("sequence_parallel", "1")),
    ("zero_stage", train(parallel={"zero_stage": 4}), ("[parallel].zero_stage", "at most 3")),
    ("cp kind", train(parallel={"cp_kind": "rings"}), ("[parallel].cp_kind", "'ring'")),
    ("cp layout", train(parallel={"cp_layout": "zig"}), ("[parallel].cp_layout", "'zigzag'")),
    ("virtual stages", train(parallel={"virtual_stages": 2}), ("virtual_stages = 1", "1 stages")),
    ("ep", train(parallel={"ep": 2}), ("[parallel].ep", "mixture of experts")),
    ("capacity", train(parallel={"capacity_factor": -1.0}), ("capacity_factor", "0")),
    (
        "modules of full",
        train(parallel={"recompute": "full", "recompute_modules": ["norms"]}),
        ("recompute_modules", "'selective'"),
    ),
    (
        "module",
        train(parallel={"recompute": "selective", "recompute_modules": ["norm"]}),
        ("recompute_modules", "'norms'"),
    ),
    ("chunks", train(parallel={"stream_chunks": 7}), ("stream_chunks", "does not divide")),
    ("layers of none", train(parallel={"recompute_layers": 2}), ("recompute_layers", "'full'")),
    (
        "more layers than a stage",
        train(parallel={"recompute": "full", "recompute_layers": [9, 1], "pp": 2}),
        ("recompute_layers", "stage 0"),
    ),
    ("recompute", train(parallel={"recompute": "ful"}), ("[parallel].recompute", "'full'")),
    ("name is a number", train(cluster={"gpu": 4}), ("[cluster].gpu", "4")),
    ("name is blank", train(cluster={"gpu": " "}), ("[cluster].gpu",)),
    ("name of two lines", train(cluster={"gpu": "a\nb"}), ("[cluster].gpu",)),
    ("long name", train(cluster={"gpu": "x" * 10**5}), ("[cluster].gpu", "500")),
    ("backend", train(run={"backend": "cpuu"}), ("[run].backend", "'cpu'")),
    ("optimizer", train(workload={"optimizer": "adan"}), ("optimizer", "'adam'")),
    (
        "speculative",
        {**train(), "workload": GENERATE, "decoding": {"method": "speculative"}},
        ("[decoding].method",),
    ),
    (
        "stage list of text",
        train(parallel={"layers_per_stage": [4, "4"]}),
        ("layers_per_stage[1]",),
    ),
    ("stage list is text", train(parallel={"layers_per_stage": "4,4"}), ("layers_per_stage",)),
    ("implementation", alone(GEMM, implementation=3), ("implementation",)),
]

CROSS: list[Case] = [
    ("mesh product", train(parallel={"tp": 8}), ("tp 8", "16", "4")),
    (
        "tp and heads",
        train(model={"heads": 6, "hidden": 66}, parallel={"tp": 4, "pp": 1}),
        ("tp 4",),
    ),
    ("tp and ffn", train(model={"ffn": 257}), ("tp 2", "ffn 257")),
    ("pp and layers", train(model={"layers": 1}), ("pp 2", "1 layers")),
    ("stages", train(parallel={"layers_per_stage": [8]}), ("layers_per_stage", "2")),
    ("stage sum", train(parallel={"layers_per_stage": [4, 5]}), ("layers_per_stage", "8")),
    ("batch", train(parallel={"microbatch": 3}), ("global_batch 16", "microbatch 3")),
    (
        "alias",
        train(parallel={"microbatch": 2}, workload={"microbatch": 4}),
        ("[workload].microbatch = 4", "[parallel].microbatch"),
    ),
    ("auto with degrees", train(parallel={"strategy": "auto"}), ("[parallel].strategy", "pp")),
    ("heads and hidden", train(model={"heads": 7}), ("[model].head_dim", "7")),
    ("kv_heads", train(model={"kv_heads": 3}), ("[model].kv_heads", "3")),
    ("two sources", train(model={"hf_config": "config.json"}), ("[model].hf_config",)),
    ("no source", train() | {"model": {"kv_dtype": "fp8"}}, ("[model]", "hf_config")),
    (
        "name and numbers",
        train() | {"model": {"name": "x", "layers": 4}},
        ("[model].name", "layers"),
    ),
    ("experts", train(model={"experts": 4, "experts_per_token": 8}), ("experts_per_token", "8")),
    ("mixers", train(model={"mixers": ["mha"]}), ("[model].mixers", "8")),
    ("gpu and cluster", train(cluster={"cluster": "dgx-h100"}), ("[cluster].gpu",)),
    ("no hardware", train() | {"cluster": {"nodes": 2}}, ("[cluster]", "gpu")),
    ("ranks", alone(REDUCE, ranks=8), ("[workload].ranks", "8", "4")),
    ("lonely sender", alone(REDUCE, op="send_recv", ranks=1), ("[workload].ranks", "send_recv")),
    ("kv_len", alone(PREFILL, kv_len=1), ("[workload].kv_len", "128")),
    ("op kv_heads", alone(PREFILL, kv_heads=3), ("[workload].kv_heads", "8")),
    ("power law", alone(MOE, routing="power_law"), ("[workload].alpha", "power_law")),
    ("op ep", alone(MOE, ep=3), ("[workload].ep", "8")),
    ("two goals", train(goal={"minimise": "step_s", "maximise": "mfu"}), ("[goal]",)),
    ("goal of another kind", train(goal={"minimise": "tpot_s"}), ("[goal].minimise", "tpot_s")),
    ("unknown goal", train(goal={"minimise": "steps"}), ("[goal].minimise", "'step_s'")),
    ("lost hf_config", train() | {"model": {"hf_config": "no/such.json"}}, ("such.json",)),
    ("unknown model", train() | {"model": {"name": "llama-2-7bb"}}, ("llama-2-7b",)),
]

CASES = TABLES + KEYS + VALUES + CROSS
TEXTS: list[tuple[str, bytes, tuple[str, ...]]] = [
    ("empty.toml", b"", ("empty",)),
    ("blank.json", b"  \n", ("empty",)),
    ("junk.toml", bytes(range(256)), ("UTF-8",)),
    ("junk.json", b"\xff\xfe\x00", ("UTF-8",)),
    ("nul.toml", b"\x00\x00", ("TOML",)),
    ("broken.toml", b"[model\nlayers = 3", ("TOML", "line 1")),
    ("twice.toml", b"[run]\nseed = 1\nseed = 2", ("TOML", "overwrite")),
    ("broken.json", b'{"model": {', ("JSON", "line 1")),
    ("twice.json", b'{"run": {"seed": 1, "seed": 2}}', ("seed", "twice")),
    ("nan.json", b'{"run": {"timeout_s": NaN}}', ("NaN",)),
    ("infinite.json", b'{"run": {"timeout_s": -Infinity}}', ("-Infinity",)),
    (
        "overflow.json",
        json.dumps(train(run={"timeout_s": 1.5})).replace("1.5", "1e999").encode(),
        (
            "[run].timeout_s",
            "inf",
        ),
    ),
    ("digits.json", b'{"run": {"seed": ' + b"9" * 5000 + b"}}", ("digits",)),
    ("digits.toml", b"[run]\nseed = " + b"9" * 5000, ("digits",)),
    ("deep.json", b'{"model": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", ("deep",)),
    ("deeper.json", b'{"a":' * 200_000, ("deep",)),
    ("deep.toml", b"a = " + b"[" * 100_000, ("deep",)),
    ("dots.toml", b"a" + b".a" * 200_000 + b" = 1", ("deep",)),
    ("quoted.toml", b'[x]\n"="' + b' . "b\\" c"' * 100_000 + b" = 1", ("deep",)),
    ("list.json", b"[1, 2]", ("a list of 2",)),
    ("text.json", b'"tp"', ("'tp'",)),
    ("number.json", b"3", ("3",)),
    ("date.toml", b"[workload]\nkind = 1979-05-27", ("[workload].kind", "date")),
    ("large.toml", b"#" * (MAX_FILE_BYTES + 1), ("10 MB",)),
]


def complaint(action: Callable[[], Scenario]) -> str:
    """Return the sentence that ``action`` is refused with, and check that it is one."""
    with pytest.raises(InputError) as caught:
        action()
    text = str(caught.value)
    assert "\n" not in text
    assert text.isprintable()
    assert 10 < len(text) < 300
    return text


def needs(name: str) -> None:
    """Skip the test where it needs a module that is not there."""
    for word, module in (
        ("hf_config", "simcore.hf_config"),
        ("unknown model", "simcore.catalogue"),
    ):
        if word in name and importlib.util.find_spec(module) is None:
            pytest.skip(f"needs {module}")


@pytest.mark.parametrize(("name", "raw", "words"), CASES, ids=[case[0] for case in CASES])
def test_malformed_scenario(name: str, raw: object, words: tuple[str, ...]) -> None:
    needs(name)
    text = complaint(lambda: load_scenario(raw))  # type: ignore[arg-type]
    assert all(word in text for word in words), text


@pytest.mark.parametrize(("name", "data", "words"), TEXTS, ids=[case[0] for case in TEXTS])
def test_malformed_file(name: str, data: bytes, words: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    text = complaint(lambda: load_scenario(path))
    assert name in text
    assert all(word in text for word in words), text


@pytest.mark.parametrize("name", ["", ".", "missing.toml", "a\0b.toml", "x" * 5000, "tp = 4"])
def test_unreadable_path(name: str, tmp_path: Path) -> None:
    complaint(lambda: load_scenario(str(tmp_path / name)))


def test_first_problem_is_told_and_others_are_counted() -> None:
    raw = train(parallel={"tp": 0, "pp": 0}, run={"sead": 1})
    assert complaint(lambda: load_scenario(raw)).endswith("(and 2 more problems)")


def test_sound_bases_are_accepted() -> None:
    for raw in (train(), train(workload=TRAIN), alone(GEMM), alone(REDUCE), alone(PREFILL)):
        assert isinstance(load_scenario(raw), Scenario)
    assert isinstance(load_scenario(alone(MOE)), Scenario)


LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=10**18)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["train", "op", "gemm", "auto", "fp8", "1f1b", "\ud800", "\x00", "-"])
)
ANYTHING = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)
PLACES = [
    (table, key)
    for table, keys in {**train(), "run": {"seed": 0}, "decoding": {}, "goal": {}}.items()
    for key in (*keys, "microbatch", "mixers", "layers_per_stage", "kind", "minimise", "zzz", "")
]


@given(place=st.sampled_from(PLACES), value=ANYTHING)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_value_in_any_place_is_sound_or_refused(place: tuple[str, str], value: object) -> None:
    table, key = place
    raw: Raw = {**train(), table: value} if not key else train(**{table: {key: value}})
    settles(lambda: load_scenario(raw))


@given(raw=ANYTHING)
@settings(max_examples=100, deadline=None)
def test_any_json_is_sound_or_refused(raw: object) -> None:
    settles(lambda: load_scenario(raw if isinstance(raw, dict) else {"workload": raw}))
    settles(lambda: parse_scenario(json.dumps(raw)))


@given(text=st.text(max_size=60) | st.text('{}[]"=.,:tp1\n ', max_size=60))
@settings(max_examples=200, deadline=None)
def test_any_text_is_sound_or_refused(text: str) -> None:
    settles(lambda: parse_scenario(text))


def settles(action: Callable[[], Scenario]) -> None:
    """Check that ``action`` gives a scenario or one sentence, and raises nothing else."""
    told = ""
    try:
        assert isinstance(action(), Scenario)
    except InputError as error:
        told = str(error)
    assert "\n" not in told
    assert len(told) < 300


@pytest.mark.parametrize(("name", "raw", "words"), CASES, ids=[case[0] for case in CASES])
def test_command_line_refuses(
    name: str,
    raw: object,
    words: tuple[str, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cli = pytest.importorskip("meshwise.cli")
    needs(name)
    path = tmp_path / "bad.json"
    try:
        path.write_text(json.dumps(raw, allow_nan=False))
    except ValueError:
        pytest.skip("JSON cannot hold it")
    assert cli.main(["predict", str(path)]) == 2
    told = capsys.readouterr().err.strip()
    assert "Traceback" not in told
    assert "bad.json" in told
    assert words[0] in told

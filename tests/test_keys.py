"""Keys of [parallel] two by two: a result that both engines agree on, or one sentence."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import meshwise as mw
from simcore.errors import InputError
from simcore.scenario import ParallelTable
from simcore.scenario.effect import TRAINING_ALONE

Raw = dict[str, Any]

SIZES = {"layers": 4, "hidden": 128, "heads": 8, "kv_heads": 8, "vocab": 512}
MODELS: dict[str, Raw] = {
    "dense": {**SIZES, "ffn": 256},
    "moe": {**SIZES, "moe_ffn": 256, "experts": 4, "experts_per_token": 2},
    "linear": {**SIZES, "ffn": 256, "mixers": ["linear", "linear", "mha", "linear"]},
    "grid": {
        **{**SIZES, "ffn": 256, "mixers": ["space", "time"] * 2, "frames": 16},
        **{"position": "none", "causal": False},
    },
}
TRAIN = {"kind": "train", "global_batch": 8, "seq_len": 128}
WORK: dict[str, Raw] = {
    "equal": {},
    "lengths": {"lengths": [64, 128, 32, 128, 64, 64, 64, 64]},
    "documents": {"documents": [32, 96]},
}
DEGREES: tuple[Raw, ...] = (
    *({}, {"dp_replicate": 2}, {"dp_shard": 2}, {"tp": 2}, {"pp": 2}, {"cp": 2}),
    *({"pp": 2, "virtual_stages": 2}, {"cp": 2, "cp_kind": "servers"}),
)
# One or more values of every key that do something somewhere; a new key is added here.
VALUES: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("dp_replicate", "dp_shard", "tp", "pp", "cp", "ep", "etp"), (2,)),
    "capacity_factor": (1.5,),
    "balance": ("drawn", "static", "flexsp", "hdp", "zeppelin"),
    "microbatch": (2,),
    "schedule": (
        *("gpipe", "zb_h1", "chimera", "dualpipe", "pipedream", "pipedream_2bw"),
        *("interleaved", "looped_bfs", "hanayo", "zbv", "dualpipev", "bitpipe"),
    ),
    "update_every": (4,),
    "virtual_stages": (2,),
    "layers_per_stage": ([3, 1], [1, 1, 1, 1]),
    "zero_stage": (0, 1, 2, 3),
    "sequence_parallel": (True,),
    "backup_workers": (1,),
    "grad_codec": ("int8", "dynamic8"),
    "error_feedback": (True,),
    "act_codec": ("fp8",),
    "recompute": ("selective", "keep_attention", "full"),
    "recompute_modules": (["norms"], ["attention", "gathers"]),
    "recompute_layers": ([1], [1, 0]),
    "swap_fraction": (0.0, 0.5),
    "stream_chunks": (4,),
    "loss_chunks": (2,),
    "cp_kind": (
        *("token_ring", "lightseq", "ulysses", "dsp", "servers", "usp"),
        *("lasp", "lasp2", "zeco"),
    ),
    "cp_layout": ("striped", "contiguous"),
    "cp_ring": (2,),
    "cp_ulysses": (2,),
    "cp_window": (2,),
    "cp_slices": (2,),
    "task_rows": (16,),
    "ping_pong": (True,),
}
DEGREE_KEYS = ("dp_replicate", "dp_shard", "tp", "pp", "cp")


def scenario(model: str, parallel: Raw, work: Raw) -> Raw:
    """Return a scenario on as many chips of one node as the degrees ask for."""
    world = 1
    for key in DEGREE_KEYS:
        world *= parallel.get(key, 1)
    cluster = {"gpu": "h100-sxm-80gb", "gpus_per_node": world}
    return {"model": MODELS[model], "cluster": cluster, "parallel": parallel, "workload": work}


def test_every_key_has_values() -> None:
    assert set(VALUES) == set(ParallelTable.model_fields) - {"strategy"}


@st.composite
def scenarios(draw: st.DrawFn) -> Raw:
    """A small scenario: degrees, a pair of keys with values, and one kind of sequences."""
    keys = draw(st.lists(st.sampled_from(sorted(VALUES)), min_size=1, max_size=2))
    pair = {key: draw(st.sampled_from(VALUES[key])) for key in keys}
    work = TRAIN | WORK[draw(st.sampled_from(sorted(WORK)))]
    model = draw(st.sampled_from(sorted(MODELS)))
    return scenario(model, draw(st.sampled_from(DEGREES)) | pair, work)


def answered(raw: Raw) -> bool:
    """Return whether the scenario has an answer, on which both engines must agree.

    Where it has none, the refusal must be one sentence that says what to change.
    """
    try:
        found = mw.predict(raw)
    except InputError as error:
        text = str(error)
        assert len(text) < 300
        assert text.endswith((".", ")"))
        assert "\n" not in text
        return False
    simulated = mw.predict(raw, "simulate").metrics
    assert simulated["step_s"] == pytest.approx(found.metrics["step_s"], rel=0.02)
    assert simulated["peak_memory_bytes"] == found.metrics["peak_memory_bytes"]
    return True


@settings(max_examples=40)
@given(scenarios())
def test_pairs_of_keys_are_answered_or_refused(raw: Raw) -> None:
    answered(raw)


@pytest.mark.slow
@settings(max_examples=2000)
@given(scenarios())
def test_many_pairs_of_keys_are_answered_or_refused(raw: Raw) -> None:
    answered(raw)


@pytest.mark.parametrize("key", sorted(VALUES))
def test_no_key_is_a_silent_no_op(key: str) -> None:
    """On one rank, a key changes a metric, is refused, or is told to have no effect."""
    plain = mw.predict(scenario("dense", {}, TRAIN)).metrics
    for value in VALUES[key]:
        try:
            found = mw.predict(scenario("dense", {key: value}, TRAIN))
        except InputError:
            continue
        told = any(f"[parallel].{key}" in warning for warning in found.warnings)
        off = (key, value) in {("zero_stage", 0), ("etp", 1)}
        ordering = key == "schedule"  # of one stage, whose actions may have one order alone
        assert found.metrics != plain or told or off or ordering


@pytest.mark.parametrize("key", TRAINING_ALONE)
def test_what_serves_training_alone_is_refused_for_generation(key: str) -> None:
    work = {"kind": "generate", "batch": 4, "input_tokens": 8, "output_tokens": 4}
    with pytest.raises(InputError, match=rf"\[parallel\]\.{key}\b"):
        mw.predict(scenario("dense", {key: VALUES[key][0]}, work))


@pytest.mark.parametrize(
    ("parallel", "work", "named"),
    [
        ({"cp": 2, "task_rows": 16}, {}, "servers"),
        ({"cp": 2, "cp_kind": "ulysses", "cp_layout": "striped"}, {}, "cp_layout"),
        ({"pp": 2, "schedule": "chimera"}, WORK["lengths"], "chimera"),
    ],
)
def test_keys_that_contradict_one_another_are_refused(parallel: Raw, work: Raw, named: str) -> None:
    with pytest.raises(InputError, match=named):
        mw.predict(scenario("dense", parallel, TRAIN | work))


@pytest.mark.parametrize(
    ("model", "parallel", "work", "unit"),
    [
        ("grid", {"cp": 2, "cp_kind": "dsp"}, {}, 2 * 16),
        ("dense", {"cp": 2, "cp_kind": "servers"}, WORK["documents"], 128),
    ],
)
def test_the_longest_sequence_keeps_frames_and_documents_whole(
    model: str, parallel: Raw, work: Raw, unit: int
) -> None:
    found = mw.largest(scenario(model, parallel, TRAIN | work), "seq_len").metrics
    assert found["largest"] > 128
    assert found["largest"] % unit == 0

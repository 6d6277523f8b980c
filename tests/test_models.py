"""Networks as numbers: layers, parameters, FLOPs, caches, the config importer, the catalogue."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simcore import catalogue
from simcore.errors import InputError
from simcore.hf_config import FAMILIES, from_hf_config, load_hf_config
from simcore.models import (
    ModelSpec,
    active_parameter_count,
    check_model,
    forward_flops,
    is_moe_layer,
    kv_bytes_per_token,
    layer_parameter_table,
    mixer_of,
    parameter_count,
    parameter_table,
    state_bytes_per_sequence,
)

DENSE = ModelSpec("dense", 4, 64, 8, 2, 8, 128, 1000)
MOE = replace(DENSE, experts=8, experts_per_token=2, moe_ffn=32, dense_layers=1, shared_experts=1)
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
}

# ---------------------------------------------------------------- ModelSpec


def test_mixer_and_moe_layers():
    assert [mixer_of(DENSE, i) for i in range(4)] == ["gqa"] * 4
    assert mixer_of(replace(DENSE, kv_heads=1), 0) == "mqa"
    assert mixer_of(replace(DENSE, kv_heads=8), 0) == "mha"
    assert [is_moe_layer(MOE, i) for i in range(4)] == [False, True, True, True]
    every = replace(MOE, dense_layers=0, moe_every=2)
    assert [is_moe_layer(every, i) for i in range(4)] == [False, True, False, True]
    assert not any(is_moe_layer(DENSE, i) for i in range(4))


def test_table_sums_over_layers():
    table = parameter_table(MOE)
    for part in ("attention_gqa", "ffn", "experts", "shared_experts", "router"):
        layers = [layer_parameter_table(MOE, i).get(part, 0) for i in range(MOE.layers)]
        assert table[part] == sum(layers) > 0
    assert parameter_count(MOE) == sum(table.values())
    assert table["experts"] == 3 * 8 * 3 * 64 * 32
    idle = 3 * 6 * 3 * 64 * 32
    assert active_parameter_count(MOE) == parameter_count(MOE) - idle


def test_tied_embeddings_count_once():
    tied = replace(DENSE, tied_embeddings=True)
    assert parameter_count(DENSE) - parameter_count(tied) == 64 * 1000
    assert active_parameter_count(tied) == parameter_count(tied)
    assert forward_flops(tied, 1, 16) == forward_flops(DENSE, 1, 16)


@pytest.mark.parametrize("name", ["llama-3.1-8b", "mixtral-8x7b", "deepseek-v3", "gpt2"])
def test_flops_are_two_per_active_weight_and_token(name):
    """Without attention scores, FLOPs per token are about twice the active matrix weights."""
    model = catalogue.load_model(name)
    matrices = active_parameter_count(model) - model.vocab * model.hidden
    if model.tied_embeddings:
        matrices += model.vocab * model.hidden
    assert forward_flops(model, 1, 1) == pytest.approx(2 * matrices, rel=0.02)


def test_flops_scale():
    full, causal = forward_flops(DENSE, 3, 128), forward_flops(DENSE, 3, 128, causal=True)
    scores = 4 * 3 * 128 * 128 * 64 * 4
    assert full - causal == scores // 2
    assert forward_flops(DENSE, 6, 128) == 2 * full
    either_way = replace(DENSE, causal=False)
    assert forward_flops(either_way, 3, 128, causal=True) == full


def test_sliding_layers_see_a_window():
    sliding = replace(DENSE, mixers=("sliding", "gqa") * 2, sliding_window=32)
    check_model(sliding)
    assert forward_flops(sliding, 1, 32) == forward_flops(DENSE, 1, 32)
    saved = forward_flops(DENSE, 1, 128) - forward_flops(sliding, 1, 128)
    assert saved == 2 * 4 * 64 * 128 * (128 - 32)
    assert parameter_count(sliding) == parameter_count(DENSE)
    assert kv_bytes_per_token(sliding) == kv_bytes_per_token(DENSE) == 4 * 2 * 2 * 8 * 2
    assert kv_bytes_per_token(sliding, 128) == kv_bytes_per_token(DENSE) * (1 + 32 / 128) / 2


def test_cache_of_latent_and_state_layers():
    deepseek = catalogue.load_model("deepseek-v3")
    assert kv_bytes_per_token(deepseek) == 61 * (512 + 64) * 2
    fp8 = replace(deepseek, kv_dtype="fp8")
    assert kv_bytes_per_token(fp8) == 61 * (512 + 64)
    mamba = catalogue.load_model("mamba2-2.7b")
    assert kv_bytes_per_token(mamba) == 0
    assert state_bytes_per_sequence(mamba) == 64 * (5120 * 128 + (5120 + 256) * 4) * 2
    assert state_bytes_per_sequence(DENSE) == 0


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"kv_heads": 3}, "not a multiple of kv_heads 3"),
        ({"layers": 0}, "layers is 0"),
        ({"layers": 10**12}, "at most"),
        ({"hidden": -1}, "hidden is -1"),
        ({"vocab": 2.5}, "vocab is 2.5"),
        ({"qk_norm": 1}, "qk_norm is 1"),
        ({"ffn": 0}, "ffn is 0"),
        ({"head_dim": 0}, "head_dim 0"),
        ({"experts": 4, "experts_per_token": 5, "moe_ffn": 8}, "between 1 and 4"),
        ({"experts": 4, "experts_per_token": 2}, "moe_ffn is 0"),
        ({"shared_experts": 1}, "experts is 0"),
        ({"dense_layers": 5}, "dense_layers 5 of 4"),
        ({"activation": "gellu"}, "did you mean 'gelu'"),
        ({"ffn_kind": "gate"}, "did you mean 'gated'"),
        ({"norm": "rms"}, "did you mean 'rmsnorm'"),
        ({"position": "ropes"}, "did you mean 'rope'"),
        ({"weights_dtype": "fp9"}, "did you mean"),
        ({"position": "learned"}, "max_positions"),
        ({"mixers": ("gqa",)}, "1 layers of 4"),
        ({"mixers": ("slide",) * 4}, "did you mean 'sliding'"),
        ({"mixers": ("sliding",) * 4}, "sliding_window"),
        ({"mixers": ("mla",) * 4}, "kv_lora_rank is 0"),
        ({"mixers": ("ssm",) * 4}, "ssm_state is 0"),
    ],
)
def test_impossible_numbers_are_refused(changes, told):
    check_model(DENSE)
    with pytest.raises(InputError, match=told.replace("(", r"\(")) as caught:
        check_model(replace(DENSE, **changes))
    assert "\n" not in str(caught.value)
    assert "dense" in str(caught.value)


# ---------------------------------------------------------------- Hugging Face configs


def test_llama_config():
    model = from_hf_config(LLAMA | {"torch_dtype": "float16"}, "dense")
    dtypes = {"weights_dtype": "fp16", "kv_dtype": "fp16", "compute_dtype": "fp16"}
    assert model == replace(DENSE, **dtypes)


@pytest.mark.parametrize(
    ("quantised", "expected"),
    [
        ({"quant_method": "fp8"}, ("fp8", "bf16", "fp8")),
        ({"quant_method": "gptq", "bits": 4}, ("int4", "bf16", "bf16")),
        ({"quant_method": "gptq", "bits": 8}, ("int8", "bf16", "bf16")),
        ({"quant_method": "awq", "bits": 4}, ("int4", "bf16", "bf16")),
        ({"quant_method": "mxfp4"}, ("mxfp4", "bf16", "bf16")),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, ("int4", "bf16", "bf16")),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, ("nvfp4", "bf16", "bf16")),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float"}}},
            },
            ("fp8", "bf16", "fp8"),
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int"}}},
            },
            ("int4", "bf16", "bf16"),
        ),
    ],
)
def test_quantised_configs(quantised, expected):
    config = LLAMA | {"dtype": "bfloat16", "quantization_config": quantised}
    model = from_hf_config(config, "q")
    assert (model.weights_dtype, model.kv_dtype, model.compute_dtype) == expected
    assert parameter_count(model) == parameter_count(DENSE)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model_type": "lama"}, "did you mean 'llama'"),
        ({"model_type": None}, "'model_type' is missing"),
        ({"model_type": 3}, "must be a text"),
        ({"hidden_size": None}, "'hidden_size' is missing"),
        ({"hidden_size": "64"}, "must be a whole number"),
        ({"hidden_size": True}, "must be a whole number"),
        ({"hidden_size": 65}, "not a multiple"),
        ({"num_attention_heads": 0}, "not a multiple of 0"),
        ({"num_key_value_heads": 3}, "not a multiple of kv_heads"),
        ({"num_hidden_layers": 10**9}, "at most"),
        ({"hidden_act": "silo"}, "did you mean 'silu'"),
        ({"tie_word_embeddings": "no"}, "true or false"),
        ({"torch_dtype": "float17"}, "did you mean 'float16'"),
        ({"quantization_config": {"quant_method": "gpqt"}}, "did you mean 'gptq'"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 3}}, "3-bit"),
        ({"quantization_config": [1]}, "must be a table"),
    ],
)
def test_wrong_configs_are_refused(changes, told):
    with pytest.raises(InputError, match=told) as caught:
        from_hf_config(LLAMA | changes, "mine")
    assert "'mine'" in str(caught.value)


def test_irregular_moe_layers_are_refused():
    moe = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    config = LLAMA | moe | {"model_type": "qwen3_moe"}
    assert from_hf_config(config | {"mlp_only_layers": [0, 1]}, "m").dense_layers == 2
    assert from_hf_config(config | {"decoder_sparse_step": 2}, "m").moe_every == 2
    with pytest.raises(InputError, match="mlp_only_layers"):
        from_hf_config(config | {"mlp_only_layers": [2]}, "m")


def test_load_hf_config(tmp_path):
    folder = tmp_path / "my-net"
    folder.mkdir()
    file = folder / "config.json"
    file.write_text(json.dumps(LLAMA))
    assert load_hf_config(file) == load_hf_config(folder) == replace(DENSE, name="my-net")
    file.write_text(json.dumps(LLAMA | {"_name_or_path": "me/net"}))
    assert load_hf_config(str(file)).name == "me/net"


@pytest.mark.parametrize("junk", [b"", b"{", b"[1]", b"\xff\xfe\x00", b"3", b"[" * 100_000])
def test_junk_files_are_refused(tmp_path, junk):
    file = tmp_path / "config.json"
    file.write_bytes(junk)
    with pytest.raises(InputError, match=r"config\.json"):
        load_hf_config(file)
    with pytest.raises(InputError, match="cannot read"):
        load_hf_config(tmp_path / "absent.json")


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 300), st.floats(), st.text(max_size=5),
    st.lists(st.integers(-1, 5), max_size=4), st.dictionaries(st.text(max_size=3), st.none()),
)  # fmt: skip
KEYS = sorted(
    set(LLAMA) - {"model_type"}
    | {"head_dim", "layer_types", "sliding_window", "quantization_config", "text_config", "d_model"}
    | {"n_heads", "n_layers", "attn_config", "moe_layers", "no_rope_layers", "num_experts"}
    | {"num_experts_per_tok", "moe_intermediate_size", "num_local_experts", "mlp_only_layers"}
    | {"n_embd", "n_head", "n_layer", "n_positions", "ssm_cfg", "num_heads", "torch_dtype"}
)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(FAMILIES)), st.dictionaries(st.sampled_from(KEYS), JUNK, max_size=4))
def test_any_config_is_read_or_refused(family, changes):
    try:
        model = from_hf_config(LLAMA | changes | {"model_type": family}, "fuzz")
    except InputError:
        return
    assert parameter_count(model) > 0
    assert forward_flops(model, 1, 7) > 0


# ---------------------------------------------------------------- catalogue

# published counts that are rounded, or that count a router buffer; all others are exact
ROUNDED = {"gpt3-175b", "gpt3-6.7b", "deepseek-v3", "deepseek-r1"}
# activated parameters as published; gpt-oss and DeepSeek-V2-Lite leave the input embedding out
ACTIVATED = {
    "mixtral-8x7b": (12.9e9, False),  # Jiang et al. 2024
    "mixtral-8x22b": (39e9, False),
    "qwen3-30b-a3b": (3.3e9, False),
    "qwen3-235b-a22b": (22e9, False),
    "deepseek-v3": (37e9, False),
    "deepseek-v2": (21e9, False),
    "deepseek-v2-lite": (2.4e9, True),
    "gpt-oss-20b": (3.6e9, True),
    "gpt-oss-120b": (5.1e9, True),
    "llama-4-scout": (17e9, False),
    "kimi-k2": (32e9, False),
}


def test_catalogue_size_and_names():
    names = catalogue.model_names()
    assert len(names) >= 50
    assert names == sorted(set(names))
    assert all(name == name.lower() for name in names)


@pytest.mark.parametrize("name", catalogue.model_names())
def test_every_entry(name):
    model, card = catalogue.load_model(name), catalogue.model_card(name)
    assert model.name == card.name == name
    check_model(model)
    assert card.source
    count = parameter_count(model)
    assert 0 < active_parameter_count(model) <= count
    if card.published_parameters:
        tolerance = 1e-3 if name in ROUNDED else 0
        assert count == pytest.approx(card.published_parameters, rel=tolerance, abs=0)
    for alias in card.aliases:
        assert catalogue.load_model(alias) is model


def test_no_alias_names_two_models():
    seen: dict[str, str] = {}
    for name in catalogue.model_names():
        for alias in {catalogue._key(a) for a in (name, *catalogue.model_card(name).aliases)}:
            assert seen.setdefault(alias, name) == name, alias


@pytest.mark.parametrize("name", ACTIVATED)
def test_activated_parameters(name):
    published, without_embedding = ACTIVATED[name]
    model = catalogue.load_model(name)
    active = active_parameter_count(model) - without_embedding * model.vocab * model.hidden
    assert active == pytest.approx(published, rel=0.03)


def test_lookup_forgives_spelling():
    wanted = catalogue.load_model("llama-3.1-8b")
    for name in ("LLaMA-3.1-8B", "meta-llama/Llama-3.1-8B-Instruct", " llama_3.1 8b "):
        assert catalogue.load_model(name) is wanted
    with pytest.raises(InputError, match=r"did you mean 'llama-3\.1-8b'"):
        catalogue.load_model("lama-3.1-8b")
    for junk in ("", "../models", "\0", "x" * 5000, "a/b/../c"):
        with pytest.raises(InputError, match="unknown model"):
            catalogue.load_model(junk)


# name in the table of other simulators' configs -> ours
SAME_MODEL = {
    "codellama-34b-instruct-hf": "codellama-34b",
    "deepseek-v2-lite": "deepseek-v2-lite",
    "llama-2-7b-hf": "llama-2-7b",
    "llama-3.1-70b-instruct": "llama-3.1-70b",
    "llama-3.1-8b-instruct": "llama-3.1-8b",
    "mistral-nemo-instruct-2407": "mistral-nemo-12b",
    "mixtral-8x7b-v0.1": "mixtral-8x7b",
    "qwen2.5-7b-instruct": "qwen2.5-7b",
    "qwen3-14b": "qwen3-14b",
    "qwen3-30b-a3b": "qwen3-30b-a3b",
    "yi-34b": "yi-34b",
    "deepseek_v3": "deepseek-v3",
    "qwen3-235B-A22B": "qwen3-235b-a22b",
    "qwen3-8B": "qwen3-8b",
    "Qwen3-32B": "qwen3-32b",
    "gpt3-175B": "gpt3-175b",
}


def test_numbers_agree_with_other_simulators(data_dir: Path):
    with (data_dir / "specs" / "model_configs.csv").open(encoding="utf-8") as file:
        rows = {row["model"]: row for row in csv.DictReader(file)}
    for theirs, ours in SAME_MODEL.items():
        model, row = catalogue.load_model(ours), rows[theirs]
        for key in ("layers", "hidden", "heads", "kv_heads", "ffn", "vocab"):
            if row[key]:
                assert getattr(model, key) == int(row[key]), (ours, key)
        if not model.kv_lora_rank:
            assert model.head_dim == int(row["head_dim"]), ours
        if row["topk"]:
            assert model.experts_per_token == int(row["topk"]), ours

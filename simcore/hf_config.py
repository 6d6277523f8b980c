"""Read a Hugging Face ``config.json`` into a `ModelSpec`, with nothing but the standard library.

`FAMILIES` maps a config's ``model_type`` to the function that reads it. Each returns the
`ModelSpec` fields of its architecture as `transformers` builds it; defaults are those of its
config class, for published configs leave keys out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from simcore.errors import InputError, unknown
from simcore.models import MAX_LAYERS, ModelSpec, check_model

Config = Mapping[str, Any]
Fields = dict[str, Any]

# ---------------------------------------------------------------- reading keys


def _find(config: Config, keys: str) -> tuple[str, Any]:
    """Return the first of the ``|``-separated keys that is there and not null, with its value."""
    names = keys.split("|")
    for name in names:
        if config.get(name) is not None:
            return name, config[name]
    return names[0], None


def _ill_typed(key: str, value: object, wanted: str) -> InputError:
    return InputError(f"key {key!r} is {str(value)[:40]!r}: it must be {wanted}.")


def _whole(config: Config, keys: str, default: int | None = None) -> int:
    """Return a whole number of at least 0."""
    key, value = _find(config, keys)
    if value is None:
        if default is None:
            raise InputError(f"key {key!r} is missing: add it.")
        return default
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise _ill_typed(key, value, "a whole number of at least 0")
    return value


def _flag(config: Config, keys: str, default: bool) -> bool:
    key, value = _find(config, keys)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise _ill_typed(key, value, "true or false")
    return value


def _text(config: Config, keys: str, default: str) -> str:
    key, value = _find(config, keys)
    if value is None:
        return default
    if not isinstance(value, str):
        raise _ill_typed(key, value, "a text")
    return value


def _table(config: Config, key: str) -> Config:
    value = config.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise _ill_typed(key, value, "a table")
    return value


def _list(config: Config, key: str) -> Sequence[Any]:
    value = config.get(key)
    if value is None:
        return ()
    if not isinstance(value, list | tuple):
        raise _ill_typed(key, value, "a list")
    return value


def _ratio(whole: int, parts: int, what: str) -> int:
    if parts < 1 or whole % parts:
        raise InputError(f"{what}: {whole} is not a multiple of {parts}: change either.")
    return whole // parts


# ---------------------------------------------------------------- shared pieces

ACTIVATION_NAMES = {
    "silu": "silu",
    "swish": "silu",
    "swiglu": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "relu": "relu",
}


def _activation(config: Config, keys: str, default: str) -> str:
    name = _text(config, keys, default)
    if name not in ACTIVATION_NAMES:
        raise unknown("activation", name, ACTIVATION_NAMES)
    return ACTIVATION_NAMES[name]


def _shape(config: Config, default_head_dim: int = 0) -> Fields:
    """The numbers that llama and most later families name alike."""
    heads = _whole(config, "num_attention_heads")
    hidden = _whole(config, "hidden_size")
    head_dim = _whole(config, "head_dim", default_head_dim)
    return {
        "layers": _whole(config, "num_hidden_layers"),
        "hidden": hidden,
        "heads": heads,
        "kv_heads": _whole(config, "num_key_value_heads", heads),
        "head_dim": head_dim or _ratio(hidden, heads, "hidden_size over num_attention_heads"),
        "ffn": _whole(config, "intermediate_size"),
        "vocab": _whole(config, "vocab_size"),
        "activation": _activation(config, "hidden_act", "silu"),
        "tied_embeddings": _flag(config, "tie_word_embeddings", False),
    }


def _full(fields: Fields) -> str:
    """The name of full attention with these heads."""
    if fields["kv_heads"] == fields["heads"]:
        return "mha"
    return "mqa" if fields["kv_heads"] == 1 else "gqa"


def _windowed(fields: Fields, window: int, sliding: Callable[[int], bool]) -> Fields:
    """The mixers of a network whose layer ``i`` slides where ``sliding(i)``."""
    if not window or fields["layers"] > MAX_LAYERS:
        return {}
    full = _full(fields)
    mixers = tuple("sliding" if sliding(i) else full for i in range(fields["layers"]))
    return {"mixers": mixers, "sliding_window": window} if "sliding" in mixers else {}


_LAYER_TYPES = {
    "full_attention": False,
    "sliding_attention": True,
    "chunked_attention": True,  # at most one chunk of keys per query
}


def _typed(config: Config, fields: Fields, window: int, sliding: Callable[[int], bool]) -> Fields:
    """The mixers that ``layer_types`` lists, or else those of ``sliding``."""
    kinds = _list(config, "layer_types")
    if not kinds:
        return _windowed(fields, window, sliding)
    if len(kinds) != fields["layers"]:
        raise InputError(
            f"key 'layer_types' lists {len(kinds)} layers of {fields['layers']}: list every layer."
        )
    for kind in kinds:
        if not isinstance(kind, str) or kind not in _LAYER_TYPES:
            raise unknown("layer type", str(kind), _LAYER_TYPES)
    return _windowed(fields, window, lambda i: _LAYER_TYPES[kinds[i]])


def _first_dense(config: Config, layers: int) -> int:
    """The dense layers named by ``mlp_only_layers``, which must be the first ones."""
    named = _list(config, "mlp_only_layers")
    if list(named) != list(range(len(named))) or len(named) > layers:
        raise InputError(
            "key 'mlp_only_layers' must name the first layers (0, 1, ...) or none: other dense "
            "layers among MoE ones are not covered."
        )
    return len(named)


def _every(config: Config, keys: str, dense: int) -> Fields:
    """The first ``dense`` layers and the stride of the MoE ones after them."""
    every = _whole(config, keys, 1)
    if dense and every != 1:
        raise InputError(f"key {keys!r} is {every}: only 1 is covered after first dense layers.")
    return {"dense_layers": dense, "moe_every": every}


# ---------------------------------------------------------------- families


def _llama(config: Config) -> Fields:
    bias = _flag(config, "attention_bias", False)
    return _shape(config) | {
        "qkv_bias": bias,
        "out_bias": bias,
        "ffn_bias": _flag(config, "mlp_bias", False),
    }


def _sliding(config: Config, default_window: int) -> Fields:
    """Llama's block; every layer slides where there is a window (null: none)."""
    fields = _shape(config)
    window = _whole({"sliding_window": default_window} | dict(config), "sliding_window", 0)
    return fields | _typed(config, fields, window, lambda _: True)


def _mistral(config: Config) -> Fields:
    return _sliding(config, default_window=4096)


def _phi3(config: Config) -> Fields:
    return _sliding(config, default_window=0)


def _mixtral(config: Config) -> Fields:
    fields = _sliding(config, default_window=0)
    return fields | {
        "experts": _whole(config, "num_local_experts", 8),
        "experts_per_token": _whole(config, "num_experts_per_tok", 2),
        "moe_ffn": fields["ffn"],
    }


def _qwen_window(config: Config, fields: Fields) -> Fields:
    if not _flag(config, "use_sliding_window", False):
        return {}
    first = _whole(config, "max_window_layers", 28)
    return _typed(config, fields, _whole(config, "sliding_window", 4096), lambda i: i >= first)


def _qwen2(config: Config) -> Fields:
    fields = _shape(config)
    return fields | {"qkv_bias": True} | _qwen_window(config, fields)


def _qwen3_attention(config: Config, default_head_dim: int) -> Fields:
    fields = _shape(config, default_head_dim)
    bias = _flag(config, "attention_bias", False)
    extra = {"qk_norm": True, "qkv_bias": bias, "out_bias": bias}
    return fields | extra | _qwen_window(config, fields)


def _qwen3(config: Config) -> Fields:
    return _qwen3_attention(config, default_head_dim=128)


def _qwen_experts(config: Config, layers: int) -> Fields:
    return {
        "experts": _whole(config, "num_experts|num_local_experts"),
        "experts_per_token": _whole(config, "num_experts_per_tok"),
        "moe_ffn": _whole(config, "moe_intermediate_size"),
    } | _every(config, "decoder_sparse_step", _first_dense(config, layers))


def _qwen2_moe(config: Config) -> Fields:
    fields = _qwen2(config) | {"qkv_bias": _flag(config, "qkv_bias", True)}
    shared = _whole(config, "shared_expert_intermediate_size", 5632)
    extra = {"shared_experts": int(shared > 0), "shared_ffn": shared, "shared_gate": shared > 0}
    return fields | _qwen_experts(config, fields["layers"]) | extra


def _qwen3_moe(config: Config) -> Fields:
    fields = _qwen3_attention(config, default_head_dim=0)
    return fields | _qwen_experts(config, fields["layers"])


def _deepseek(config: Config) -> Fields:
    """DeepSeek-V2, V3 and Kimi K2; MTP layers (``num_nextn_predict_layers``) are left out."""
    nope, rope = _whole(config, "qk_nope_head_dim"), _whole(config, "qk_rope_head_dim")
    fields = _shape(config, default_head_dim=nope + rope) | {"head_dim": nope + rope}
    bias = _flag(config, "attention_bias", False)
    experts = _whole(config, "n_routed_experts|num_local_experts", 0)
    fields |= {
        "q_lora_rank": _whole(config, "q_lora_rank", 0),
        "kv_lora_rank": _whole(config, "kv_lora_rank"),
        "qk_nope_head_dim": nope,
        "qk_rope_head_dim": rope,
        "v_head_dim": _whole(config, "v_head_dim"),
        "qkv_bias": bias,
        "out_bias": bias,
        "experts": experts,
    }
    if not experts:
        return fields
    moe = {
        "experts_per_token": _whole(config, "num_experts_per_tok"),
        "moe_ffn": _whole(config, "moe_intermediate_size"),
        "shared_experts": _whole(config, "n_shared_experts", 0),
    }
    dense = _whole(config, "first_k_dense_replace", 0)
    return fields | moe | _every(config, "moe_layer_freq", dense)


def _mlp_block(bias: bool) -> Fields:
    """What the two-matrix layernorm families share."""
    return {
        "ffn_kind": "mlp",
        "norm": "layernorm",
        "qkv_bias": bias,
        "out_bias": bias,
        "ffn_bias": bias,
    }


def _heads(hidden: int, heads: int, kv_heads: int = 0) -> Fields:
    head_dim = _ratio(hidden, heads, "hidden size over heads")
    return {"hidden": hidden, "heads": heads, "kv_heads": kv_heads or heads, "head_dim": head_dim}


def _gpt2(config: Config) -> Fields:
    hidden = _whole(config, "n_embd|hidden_size")
    shape = _heads(hidden, _whole(config, "n_head|num_attention_heads"))
    return (
        _mlp_block(True)
        | shape
        | {
            "layers": _whole(config, "n_layer|num_hidden_layers"),
            "ffn": _whole(config, "n_inner", 4 * hidden),
            "vocab": _whole(config, "vocab_size"),
            "activation": _activation(config, "activation_function", "gelu_new"),
            "position": "learned",
            "max_positions": _whole(config, "n_positions|n_ctx|max_position_embeddings"),
            "tied_embeddings": _flag(config, "tie_word_embeddings", True),
        }
    )


def _gpt_neox(config: Config) -> Fields:
    config = {"hidden_act": "gelu"} | dict(config)
    bias = _flag(config, "attention_bias", True)
    return (
        _shape(config)
        | _mlp_block(True)
        | {
            "qkv_bias": bias,
            "out_bias": bias,
            "parallel_block": _flag(config, "use_parallel_residual", True),
        }
    )


def _opt(config: Config) -> Fields:
    hidden = _whole(config, "hidden_size")
    width = _whole(config, "word_embed_proj_dim", hidden)
    before = _flag(config, "do_layer_norm_before", True)
    return _mlp_block(_flag(config, "enable_bias", True)) | {
        **_heads(hidden, _whole(config, "num_attention_heads")),
        "layers": _whole(config, "num_hidden_layers"),
        "ffn": _whole(config, "ffn_dim"),
        "vocab": _whole(config, "vocab_size"),
        "activation": _activation(config, "activation_function", "relu"),
        "position": "learned",
        "max_positions": _whole(config, "max_position_embeddings") + 2,  # two rows of padding
        "tied_embeddings": _flag(config, "tie_word_embeddings", True),
        "embedding_dim": 0 if width == hidden else width,
        "final_norm": before and not _flag(config, "_remove_final_layer_norm", False),
    }


def _bloom(config: Config) -> Fields:
    hidden = _whole(config, "hidden_size|n_embed")
    shape = _heads(hidden, _whole(config, "n_head|num_attention_heads"))
    return (
        _mlp_block(True)
        | shape
        | {
            "layers": _whole(config, "n_layer|num_hidden_layers"),
            "ffn": 4 * hidden,
            "vocab": _whole(config, "vocab_size"),
            "activation": "gelu_tanh",
            "position": "alibi",
            "embedding_norm": True,
            "tied_embeddings": _flag(config, "tie_word_embeddings", True),
        }
    )


def _falcon_kv_heads(config: Config, heads: int) -> int:
    if _flag(config, "new_decoder_architecture", False):
        return _whole(config, "num_kv_heads|n_head_kv", heads)
    return 1 if _flag(config, "multi_query", True) else heads


def _falcon_norms(config: Config) -> int:
    """7b shares one norm between attention and FFN; 40b and serial blocks have two."""
    if not _flag(config, "parallel_attn", True):
        return 2
    new = _flag(config, "new_decoder_architecture", False)
    return 2 if _whole(config, "num_ln_in_parallel_attn", 2 if new else 1) == 2 else 1


def _falcon(config: Config) -> Fields:
    hidden = _whole(config, "hidden_size")
    heads = _whole(config, "num_attention_heads|n_head")
    shape = _heads(hidden, heads, _falcon_kv_heads(config, heads))
    return (
        _mlp_block(_flag(config, "bias", False))
        | shape
        | {
            "layers": _whole(config, "num_hidden_layers|n_layer"),
            "ffn": _whole(config, "ffn_hidden_size", 4 * hidden),
            "vocab": _whole(config, "vocab_size"),
            "activation": _activation(config, "activation", "gelu"),
            "norms_per_layer": _falcon_norms(config),
            "parallel_block": _flag(config, "parallel_attn", True)
            or _flag(config, "new_decoder_architecture", False),
            "position": "alibi" if _flag(config, "alibi", False) else "rope",
            "tied_embeddings": _flag(config, "tie_word_embeddings", True),
        }
    )


def _mpt_position(config: Config, attention: Config) -> Fields:
    if _flag(attention, "alibi", True):
        return {"position": "alibi"}
    if not _flag(config, "learned_pos_emb", True):
        return {"position": "none"}
    return {"position": "learned", "max_positions": _whole(config, "max_seq_len", 2048)}


def _mpt(config: Config) -> Fields:
    attention = _table(config, "attn_config")
    if _flag(attention, "qk_ln", False):
        raise InputError("key 'qk_ln' is true: MPT with normed queries and keys is not covered.")
    hidden, heads = _whole(config, "d_model"), _whole(config, "n_heads")
    bias = not _flag(config, "no_bias", True)
    return (
        _mlp_block(bias)
        | _heads(hidden, heads, _whole(attention, "kv_n_heads", 0))
        | {
            "layers": _whole(config, "n_layers"),
            "ffn": _whole(config, "expansion_ratio", 4) * hidden,
            "vocab": _whole(config, "vocab_size"),
            "activation": "gelu",
            "norm_bias": bias,
            "tied_embeddings": _flag(config, "tie_word_embeddings", True),
        }
        | _mpt_position(config, attention)
    )


def _phi(config: Config) -> Fields:
    config = {"hidden_act": "gelu_new"} | dict(config)
    return (
        _shape(config)
        | _mlp_block(True)
        | {
            "norms_per_layer": 1,
            "parallel_block": True,
            "head_bias": True,
            "qk_norm": _flag(config, "qk_layernorm", False),
        }
    )


def _gemma(config: Config) -> Fields:
    """Gemma: the activation is tanh GELU whatever the old key ``hidden_act`` says."""
    act = _activation(config, "hidden_activation", "gelu_pytorch_tanh")
    fields = _shape(dict(config) | {"hidden_act": "silu"}, default_head_dim=256)
    bias = _flag(config, "attention_bias", False)
    return fields | {
        "activation": act,
        "tied_embeddings": _flag(config, "tie_word_embeddings", True),
        "qkv_bias": bias,
        "out_bias": bias,
    }


def _gemma2(config: Config) -> Fields:
    fields = _gemma(config) | {"norms_per_layer": 4}
    window = _whole(config, "sliding_window", 4096)
    return fields | _typed(config, fields, window, lambda i: i % 2 == 0)


# Defaults of transformers' Gemma3TextConfig: the hub's multimodal configs rely on them.
_GEMMA3_TEXT = {
    "vocab_size": 262_208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "sliding_window": 4096,
}


def _gemma3_text(config: Config) -> Fields:
    config = _GEMMA3_TEXT | {key: value for key, value in config.items() if value is not None}
    fields = _gemma(config) | {"norms_per_layer": 4, "qk_norm": True}
    window = _whole(config, "sliding_window")
    pattern = max(1, _whole(config, "sliding_window_pattern|_sliding_window_pattern", 6))
    return fields | _typed(config, fields, window, lambda i: (i + 1) % pattern > 0)


def _text_part(read: Callable[[Config], Fields]) -> Callable[[Config], Fields]:
    """Return a reader of the text network inside a multimodal config."""

    def text(config: Config) -> Fields:
        inner = _table(config, "text_config")
        if not inner:
            raise InputError("key 'text_config' is missing: add the table of the text network.")
        return read(inner)

    return text


def _mamba2(config: Config) -> Fields:
    hidden, heads = _whole(config, "hidden_size"), _whole(config, "num_heads", 128)
    head_dim = _whole(config, "head_dim", 64)
    if heads * head_dim != _whole(config, "expand", 2) * hidden:
        raise InputError(
            f"num_heads {heads} x head_dim {head_dim} must equal expand x hidden_size: change one."
        )
    if not _flag(config, "use_conv_bias", True):
        raise InputError("key 'use_conv_bias' is false: a convolution without bias is not covered.")
    bias = _flag(config, "use_bias", False)
    return _ssm_fields(hidden, heads, head_dim) | {
        "layers": _whole(config, "num_hidden_layers"),
        "vocab": _whole(config, "vocab_size"),
        "qkv_bias": bias,
        "out_bias": bias,
        "tied_embeddings": _flag(config, "tie_word_embeddings", False),
        "ssm_state": _whole(config, "state_size", 128),
        "ssm_groups": _whole(config, "n_groups", 8),
        "ssm_conv": _whole(config, "conv_kernel", 4),
    }


def _ssm_fields(hidden: int, heads: int, head_dim: int) -> Fields:
    return {
        "hidden": hidden,
        "heads": 0,
        "kv_heads": 0,
        "head_dim": 0,
        "ffn": 0,
        "norms_per_layer": 1,
        "position": "none",
        "ssm_heads": heads,
        "ssm_head_dim": head_dim,
    }


def _mamba_ssm(config: Config) -> Fields:
    """The format of the state-spaces/mamba2-* repositories, with the defaults of mamba_ssm 2."""
    options = _table(config, "ssm_cfg")
    if _text(options, "layer", "Mamba1") != "Mamba2" or _list(config, "attn_layer_idx"):
        raise InputError("key 'ssm_cfg' must name layer 'Mamba2' without attention layers.")
    hidden, head_dim = _whole(config, "d_model"), _whole(options, "headdim", 64)
    inner = _whole(options, "expand", 2) * hidden
    multiple = max(1, _whole(config, "pad_vocab_size_multiple", 8))
    return _ssm_fields(hidden, _ratio(inner, head_dim, "inner width over headdim"), head_dim) | {
        "layers": _whole(config, "n_layer"),
        "vocab": -(-_whole(config, "vocab_size") // multiple) * multiple,
        "tied_embeddings": _flag(config, "tie_embeddings", True),
        "ssm_state": _whole(options, "d_state", 128),
        "ssm_groups": _whole(options, "ngroups", 1),
        "ssm_conv": _whole(options, "d_conv", 4),
    }


def _llada(config: Config) -> Fields:
    """LLaDA keeps OLMo's key names; its blocks are llama's without a causal mask."""
    heads = _whole(config, "n_heads")
    shape = _heads(_whole(config, "d_model"), heads, _whole(config, "n_kv_heads", heads))
    bias = _flag(config, "include_bias", False)
    return shape | {
        "layers": _whole(config, "n_layers"),
        "ffn": _whole(config, "mlp_hidden_size"),
        "vocab": _whole(config, "embedding_size|vocab_size"),
        "activation": _activation(config, "activation_type", "silu"),
        "qkv_bias": bias or _flag(config, "include_qkv_bias", False),
        "out_bias": bias,
        "ffn_bias": bias,
        "tied_embeddings": _flag(config, "weight_tying", False),
        "causal": False,
    }


def _dream(config: Config) -> Fields:
    return _qwen2(config) | {"causal": False}


def _gpt_oss(config: Config) -> Fields:
    fields = _shape(config, default_head_dim=64)
    bias = _flag(config, "attention_bias", True)
    window = _whole(config, "sliding_window", 128)
    return (
        fields
        | {
            "qkv_bias": bias,
            "out_bias": bias,
            "ffn_bias": True,
            "attention_sinks": True,
            "experts": _whole(config, "num_local_experts"),
            "experts_per_token": _whole(config, "num_experts_per_tok|experts_per_token", 4),
            "moe_ffn": fields["ffn"],
            "router_bias": True,
        }
        | _typed(config, fields, window, lambda i: i % 2 == 0)
    )


def _llama4_every(config: Config, layers: int) -> int:
    """Every how many layers experts stand: ``moe_layers`` must agree with a fixed stride."""
    every = max(1, _whole(config, "interleave_moe_layer_step", 1))
    named = _list(config, "moe_layers")
    wanted = range(every - 1, layers, every)
    if named and (len(named) != len(wanted) or list(named) != list(wanted)):
        raise InputError("key 'moe_layers' must follow interleave_moe_layer_step: change either.")
    return every


def _llama4_text(config: Config) -> Fields:
    """Llama 4: its query and key norms have no weights; chunks count as a sliding window."""
    fields = _shape(config, default_head_dim=128)
    bias = _flag(config, "attention_bias", False)
    layers = fields["layers"]
    rope = _list(config, "no_rope_layers") or [(i + 1) % 4 for i in range(min(layers, MAX_LAYERS))]
    if len(rope) != layers:
        raise InputError(f"key 'no_rope_layers' lists {len(rope)} layers of {layers}.")
    window = _whole(config, "attention_chunk_size", 8192)
    mixers = _typed(config, fields, window, lambda i: bool(rope[i]))
    return (
        fields
        | {
            "ffn": _whole(config, "intermediate_size_mlp", 16_384),
            "moe_ffn": fields["ffn"],
            "experts": _whole(config, "num_local_experts", 16),
            "experts_per_token": _whole(config, "num_experts_per_tok", 1),
            "shared_experts": 1,
            "moe_every": _llama4_every(config, layers),
            "qkv_bias": bias,
            "out_bias": bias,
        }
        | mixers
    )


FAMILIES: dict[str, Callable[[Config], Fields]] = {
    "llama": _llama,
    "mistral": _mistral,
    "mixtral": _mixtral,
    "qwen2": _qwen2,
    "qwen2_moe": _qwen2_moe,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek,
    "kimi_k2": _deepseek,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "opt": _opt,
    "bloom": _bloom,
    "falcon": _falcon,
    "mpt": _mpt,
    "phi": _phi,
    "phi3": _phi3,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3": _text_part(_gemma3_text),
    "gemma3_text": _gemma3_text,
    "mamba2": _mamba2,
    "mamba_ssm": _mamba_ssm,
    "llada": _llada,
    "dream": _dream,
    "gpt_oss": _gpt_oss,
    "llama4": _text_part(_llama4_text),
    "llama4_text": _llama4_text,
}

# ---------------------------------------------------------------- dtypes

DTYPE_NAMES = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "half": "fp16",
    "float32": "fp32",
    "float": "fp32",
    "float8_e4m3fn": "fp8",
    "float8_e5m2": "fp8",
}


def _storage(config: Config) -> str:
    """The dtype that ``torch_dtype`` or ``dtype`` names; bf16 where the config is silent."""
    inner = _table(config, "text_config")
    name = _text(config, "torch_dtype|dtype", _text(inner, "torch_dtype|dtype", "bfloat16"))
    name = name.removeprefix("torch.")
    if name not in DTYPE_NAMES:
        raise unknown("torch_dtype", name, DTYPE_NAMES)
    return DTYPE_NAMES[name]


def _by_bits(table: Config, keys: str, default: int) -> str:
    bits = _whole(table, keys, default)
    formats = {4: "int4", 8: "int8"}
    if bits not in formats:
        raise InputError(f"{bits}-bit weights are not covered: 4 and 8 bits are.")
    return formats[bits]


def _compressed_tensors(table: Config) -> str:
    """The weight format of the first group of an llm-compressor checkpoint."""
    groups = _table(table, "config_groups")
    weights = _table(_table(groups, next(iter(groups))), "weights") if groups else {}
    if _text(weights, "type", "int") == "float":
        bits = _whole(weights, "num_bits", 8)
        size = _whole(weights, "group_size", 0)
        return "fp8" if bits == 8 else ("mxfp4" if size == 32 else "nvfp4")
    return _by_bits(weights, "num_bits", 8)


def _modelopt(table: Config) -> str:
    name = _text(table, "quant_algo", "FP8").upper()
    formats = {"FP8": "fp8", "NVFP4": "nvfp4", "MXFP4": "mxfp4", "W4A16_AWQ": "int4"}
    if name not in formats:
        raise unknown("quant_algo", name, formats)
    return formats[name]


QUANTISATIONS: dict[str, Callable[[Config], str]] = {
    "fp8": lambda _: "fp8",
    "fbgemm_fp8": lambda _: "fp8",
    "gptq": lambda table: _by_bits(table, "bits", 4),
    "awq": lambda table: _by_bits(table, "bits|w_bit", 4),
    "bitsandbytes": lambda t: "int4" if _flag(t, "load_in_4bit|_load_in_4bit", False) else "int8",
    "mxfp4": lambda _: "mxfp4",
    "compressed-tensors": _compressed_tensors,
    "modelopt": _modelopt,
}


def _dtypes(config: Config) -> Fields:
    """Weights as quantised; arithmetic in fp8 for fp8 weights, else in the unquantised dtype."""
    plain = _storage(config)
    quantised = _table(config, "quantization_config")
    weights = plain
    if quantised:
        method = _text(quantised, "quant_method", "")
        if method not in QUANTISATIONS:
            raise unknown("quant_method", method, QUANTISATIONS)
        weights = QUANTISATIONS[method](quantised)
    kv = "bf16" if plain == "fp8" else plain
    return {
        "weights_dtype": weights,
        "kv_dtype": kv,
        "compute_dtype": "fp8" if weights == "fp8" else kv,
    }


# ---------------------------------------------------------------- entry points


def _family(config: Config) -> str:
    if "model_type" not in config and "ssm_cfg" in config:
        return "mamba_ssm"
    kind = _text(config, "model_type", "")
    if not kind:
        raise InputError("key 'model_type' is missing: is this the config.json of a network?")
    if kind.lower() not in FAMILIES:
        raise unknown("model_type", kind, FAMILIES)
    return kind.lower()


def from_hf_config(config: Mapping[str, Any], name: str) -> ModelSpec:
    """Return the network that a Hugging Face config describes, under ``name``.

    Raises `InputError` where a key is missing or ill-typed, or the family is not known.
    """
    try:
        if not isinstance(config, Mapping):
            raise InputError(f"expected a table of keys, found {type(config).__name__}.")
        fields = FAMILIES[_family(config)](config) | _dtypes(config)
        model = ModelSpec(name=name, **fields)
        check_model(model)
    except InputError as error:
        text = str(error).removeprefix(f"model {name[:80]!r}: ")
        raise InputError(f"config of {name[:80]!r}: {text}") from None
    return model


def load_hf_config(path: str | Path) -> ModelSpec:
    """Return the network of a ``config.json`` (or of the folder that holds one).

    It is named after its ``_name_or_path``, else after the folder.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror or "not readable"
        raise InputError(f"cannot read {str(file)!r}: {reason}: check the path.") from None
    except (ValueError, RecursionError):
        raise InputError(f"{str(file)!r} is not JSON: pass a network's config.json.") from None
    if not isinstance(config, dict):
        raise InputError(f"{str(file)!r} holds no table of keys: pass a network's config.json.")
    given = config.get("_name_or_path")
    name = given if isinstance(given, str) and given else file.resolve().parent.name or file.stem
    return from_hf_config(config, name)

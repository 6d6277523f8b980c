"""Gemma, state-space models, diffusion language models, gpt-oss and Llama 4."""

from __future__ import annotations

from collections.abc import Callable

from simcore.errors import InputError
from simcore.hf_config.gpt import head_fields
from simcore.hf_config.keys import (
    Config,
    Fields,
    flag_of,
    list_of,
    ratio_of,
    table_of,
    text_of,
    whole_of,
)
from simcore.hf_config.llama import read_qwen2
from simcore.hf_config.pieces import activation_of, shape_fields, typed_layers
from simcore.models import MAX_LAYERS


def read_gemma(config: Config) -> Fields:
    """Gemma: the activation is tanh GELU whatever the old key ``hidden_act`` says."""
    act = activation_of(config, "hidden_activation", "gelu_pytorch_tanh")
    fields = shape_fields(dict(config) | {"hidden_act": "silu"}, default_head_dim=256)
    bias = flag_of(config, "attention_bias", False)
    return fields | {
        "activation": act,
        "tied_embeddings": flag_of(config, "tie_word_embeddings", True),
        "qkv_bias": bias,
        "out_bias": bias,
    }


def read_gemma2(config: Config) -> Fields:
    fields = read_gemma(config) | {"norms_per_layer": 4}
    window = whole_of(config, "sliding_window", 4096)
    return fields | typed_layers(config, fields, window, lambda i: i % 2 == 0)


# Defaults of transformers' Gemma3TextConfig: the hub's multimodal configs rely on them.
_GEMMA3_TEXT = {
    "vocab_size": 262_208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "sliding_window": 4096,
}


def read_gemma3_text(config: Config) -> Fields:
    config = _GEMMA3_TEXT | {key: value for key, value in config.items() if value is not None}
    fields = read_gemma(config) | {"norms_per_layer": 4, "qk_norm": True}
    window = whole_of(config, "sliding_window")
    pattern = max(1, whole_of(config, "sliding_window_pattern|_sliding_window_pattern", 6))
    return fields | typed_layers(config, fields, window, lambda i: (i + 1) % pattern > 0)


def text_part_of(read: Callable[[Config], Fields]) -> Callable[[Config], Fields]:
    """Return a reader of the text network inside a multimodal config."""

    def text(config: Config) -> Fields:
        inner = table_of(config, "text_config")
        if not inner:
            raise InputError("key 'text_config' is missing: add the table of the text network.")
        return read(inner)

    return text


def read_mamba2(config: Config) -> Fields:
    hidden, heads = whole_of(config, "hidden_size"), whole_of(config, "num_heads", 128)
    head_dim = whole_of(config, "head_dim", 64)
    if heads * head_dim != whole_of(config, "expand", 2) * hidden:
        raise InputError(
            f"num_heads {heads} x head_dim {head_dim} must equal expand x hidden_size: change one."
        )
    if not flag_of(config, "use_conv_bias", True):
        raise InputError("key 'use_conv_bias' is false: a convolution without bias is not covered.")
    bias = flag_of(config, "use_bias", False)
    return _ssm_fields(hidden, heads, head_dim) | {
        "layers": whole_of(config, "num_hidden_layers"),
        "vocab": whole_of(config, "vocab_size"),
        "qkv_bias": bias,
        "out_bias": bias,
        "tied_embeddings": flag_of(config, "tie_word_embeddings", False),
        "ssm_state": whole_of(config, "state_size", 128),
        "ssm_groups": whole_of(config, "n_groups", 8),
        "ssm_conv": whole_of(config, "conv_kernel", 4),
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


def read_mamba_ssm(config: Config) -> Fields:
    """The format of the state-spaces/mamba2-* repositories, with the defaults of mamba_ssm 2."""
    options = table_of(config, "ssm_cfg")
    if text_of(options, "layer", "Mamba1") != "Mamba2" or list_of(config, "attn_layer_idx"):
        raise InputError("key 'ssm_cfg' must name layer 'Mamba2' without attention layers.")
    hidden, head_dim = whole_of(config, "d_model"), whole_of(options, "headdim", 64)
    inner = whole_of(options, "expand", 2) * hidden
    multiple = max(1, whole_of(config, "pad_vocab_size_multiple", 8))
    return _ssm_fields(hidden, ratio_of(inner, head_dim, "inner width over headdim"), head_dim) | {
        "layers": whole_of(config, "n_layer"),
        "vocab": -(-whole_of(config, "vocab_size") // multiple) * multiple,
        "tied_embeddings": flag_of(config, "tie_embeddings", True),
        "ssm_state": whole_of(options, "d_state", 128),
        "ssm_groups": whole_of(options, "ngroups", 1),
        "ssm_conv": whole_of(options, "d_conv", 4),
    }


def read_llada(config: Config) -> Fields:
    """LLaDA keeps OLMo's key names; its blocks are llama's without a causal mask."""
    heads = whole_of(config, "n_heads")
    shape = head_fields(whole_of(config, "d_model"), heads, whole_of(config, "n_kv_heads", heads))
    bias = flag_of(config, "include_bias", False)
    return shape | {
        "layers": whole_of(config, "n_layers"),
        "ffn": whole_of(config, "mlp_hidden_size"),
        "vocab": whole_of(config, "embedding_size|vocab_size"),
        "activation": activation_of(config, "activation_type", "silu"),
        "qkv_bias": bias or flag_of(config, "include_qkv_bias", False),
        "out_bias": bias,
        "ffn_bias": bias,
        "tied_embeddings": flag_of(config, "weight_tying", False),
        "causal": False,
    }


def read_dream(config: Config) -> Fields:
    return read_qwen2(config) | {"causal": False}


def read_gpt_oss(config: Config) -> Fields:
    fields = shape_fields(config, default_head_dim=64)
    bias = flag_of(config, "attention_bias", True)
    window = whole_of(config, "sliding_window", 128)
    return (
        fields
        | {
            "qkv_bias": bias,
            "out_bias": bias,
            "ffn_bias": True,
            "attention_sinks": True,
            "experts": whole_of(config, "num_local_experts"),
            "experts_per_token": whole_of(config, "num_experts_per_tok|experts_per_token", 4),
            "moe_ffn": fields["ffn"],
            "router_bias": True,
        }
        | typed_layers(config, fields, window, lambda i: i % 2 == 0)
    )


def _llama4_every(config: Config, layers: int) -> int:
    """Every how many layers experts stand: ``moe_layers`` must agree with a fixed stride."""
    every = max(1, whole_of(config, "interleave_moe_layer_step", 1))
    named = list_of(config, "moe_layers")
    wanted = range(every - 1, layers, every)
    if named and (len(named) != len(wanted) or list(named) != list(wanted)):
        raise InputError("key 'moe_layers' must follow interleave_moe_layer_step: change either.")
    return every


def read_llama4_text(config: Config) -> Fields:
    """Llama 4: its query and key norms have no weights; chunks count as a sliding window."""
    fields = shape_fields(config, default_head_dim=128)
    bias = flag_of(config, "attention_bias", False)
    layers = fields["layers"]
    rope = list_of(config, "no_rope_layers") or [
        (i + 1) % 4 for i in range(min(layers, MAX_LAYERS))
    ]
    if len(rope) != layers:
        raise InputError(f"key 'no_rope_layers' lists {len(rope)} layers of {layers}.")
    window = whole_of(config, "attention_chunk_size", 8192)
    mixers = typed_layers(config, fields, window, lambda i: bool(rope[i]))
    return (
        fields
        | {
            "ffn": whole_of(config, "intermediate_size_mlp", 16_384),
            "moe_ffn": fields["ffn"],
            "experts": whole_of(config, "num_local_experts", 16),
            "experts_per_token": whole_of(config, "num_experts_per_tok", 1),
            "shared_experts": 1,
            "moe_every": _llama4_every(config, layers),
            "qkv_bias": bias,
            "out_bias": bias,
        }
        | mixers
    )

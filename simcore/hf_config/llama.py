"""Decoders after Llama: Mistral, Mixtral, Qwen, DeepSeek."""

from __future__ import annotations

from simcore.hf_config.keys import Config, Fields, flag_of, whole_of
from simcore.hf_config.pieces import every_moe, first_dense_layers, shape_fields, typed_layers


def read_llama(config: Config) -> Fields:
    bias = flag_of(config, "attention_bias", False)
    return shape_fields(config) | {
        "qkv_bias": bias,
        "out_bias": bias,
        "ffn_bias": flag_of(config, "mlp_bias", False),
    }


def _sliding(config: Config, default_window: int) -> Fields:
    """Llama's block; every layer slides where there is a window (null: none)."""
    fields = shape_fields(config)
    window = whole_of({"sliding_window": default_window} | dict(config), "sliding_window", 0)
    return fields | typed_layers(config, fields, window, lambda _: True)


def read_mistral(config: Config) -> Fields:
    return _sliding(config, default_window=4096)


def read_phi3(config: Config) -> Fields:
    return _sliding(config, default_window=0)


def read_mixtral(config: Config) -> Fields:
    fields = _sliding(config, default_window=0)
    return fields | {
        "experts": whole_of(config, "num_local_experts", 8),
        "experts_per_token": whole_of(config, "num_experts_per_tok", 2),
        "moe_ffn": fields["ffn"],
    }


def _qwen_window(config: Config, fields: Fields) -> Fields:
    if not flag_of(config, "use_sliding_window", False):
        return {}
    first = whole_of(config, "max_window_layers", 28)
    return typed_layers(
        config, fields, whole_of(config, "sliding_window", 4096), lambda i: i >= first
    )


def read_qwen2(config: Config) -> Fields:
    fields = shape_fields(config)
    return fields | {"qkv_bias": True} | _qwen_window(config, fields)


def _qwen3_attention(config: Config, default_head_dim: int) -> Fields:
    fields = shape_fields(config, default_head_dim)
    bias = flag_of(config, "attention_bias", False)
    extra = {"qk_norm": True, "qkv_bias": bias, "out_bias": bias}
    return fields | extra | _qwen_window(config, fields)


def read_qwen3(config: Config) -> Fields:
    return _qwen3_attention(config, default_head_dim=128)


def _qwen_experts(config: Config, layers: int) -> Fields:
    return {
        "experts": whole_of(config, "num_experts|num_local_experts"),
        "experts_per_token": whole_of(config, "num_experts_per_tok"),
        "moe_ffn": whole_of(config, "moe_intermediate_size"),
    } | every_moe(config, "decoder_sparse_step", first_dense_layers(config, layers))


def read_qwen2_moe(config: Config) -> Fields:
    fields = read_qwen2(config) | {"qkv_bias": flag_of(config, "qkv_bias", True)}
    shared = whole_of(config, "shared_expert_intermediate_size", 5632)
    extra = {"shared_experts": int(shared > 0), "shared_ffn": shared, "shared_gate": shared > 0}
    return fields | _qwen_experts(config, fields["layers"]) | extra


def read_qwen3_moe(config: Config) -> Fields:
    fields = _qwen3_attention(config, default_head_dim=0)
    return fields | _qwen_experts(config, fields["layers"])


def read_deepseek(config: Config) -> Fields:
    """DeepSeek-V2, V3 and Kimi K2; MTP layers (``num_nextn_predict_layers``) are left out."""
    nope, rope = whole_of(config, "qk_nope_head_dim"), whole_of(config, "qk_rope_head_dim")
    fields = shape_fields(config, default_head_dim=nope + rope) | {"head_dim": nope + rope}
    bias = flag_of(config, "attention_bias", False)
    experts = whole_of(config, "n_routed_experts|num_local_experts", 0)
    fields |= {
        "q_lora_rank": whole_of(config, "q_lora_rank", 0),
        "kv_lora_rank": whole_of(config, "kv_lora_rank"),
        "qk_nope_head_dim": nope,
        "qk_rope_head_dim": rope,
        "v_head_dim": whole_of(config, "v_head_dim"),
        "qkv_bias": bias,
        "out_bias": bias,
        "experts": experts,
    }
    if not experts:
        return fields
    moe = {
        "experts_per_token": whole_of(config, "num_experts_per_tok"),
        "moe_ffn": whole_of(config, "moe_intermediate_size"),
        "shared_experts": whole_of(config, "n_shared_experts", 0),
    }
    dense = whole_of(config, "first_k_dense_replace", 0)
    return fields | moe | every_moe(config, "moe_layer_freq", dense)

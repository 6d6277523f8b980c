"""Decoders after GPT: GPT-2, GPT-NeoX, OPT, BLOOM, Falcon, MPT, Phi."""

from __future__ import annotations

from simcore.errors import InputError
from simcore.hf_config.keys import Config, Fields, flag_of, ratio_of, table_of, whole_of
from simcore.hf_config.pieces import activation_of, shape_fields


def _mlp_block(bias: bool) -> Fields:
    """What the two-matrix layernorm families share."""
    return {
        "ffn_kind": "mlp",
        "norm": "layernorm",
        "qkv_bias": bias,
        "out_bias": bias,
        "ffn_bias": bias,
    }


def head_fields(hidden: int, heads: int, kv_heads: int = 0) -> Fields:
    head_dim = ratio_of(hidden, heads, "hidden size over heads")
    return {"hidden": hidden, "heads": heads, "kv_heads": kv_heads or heads, "head_dim": head_dim}


def read_gpt2(config: Config) -> Fields:
    hidden = whole_of(config, "n_embd|hidden_size")
    shape = head_fields(hidden, whole_of(config, "n_head|num_attention_heads"))
    return (
        _mlp_block(True)
        | shape
        | {
            "layers": whole_of(config, "n_layer|num_hidden_layers"),
            "ffn": whole_of(config, "n_inner", 4 * hidden),
            "vocab": whole_of(config, "vocab_size"),
            "activation": activation_of(config, "activation_function", "gelu_new"),
            "position": "learned",
            "max_positions": whole_of(config, "n_positions|n_ctx|max_position_embeddings"),
            "tied_embeddings": flag_of(config, "tie_word_embeddings", True),
        }
    )


def read_gpt_neox(config: Config) -> Fields:
    config = {"hidden_act": "gelu"} | dict(config)
    bias = flag_of(config, "attention_bias", True)
    return (
        shape_fields(config)
        | _mlp_block(True)
        | {
            "qkv_bias": bias,
            "out_bias": bias,
            "parallel_block": flag_of(config, "use_parallel_residual", True),
        }
    )


def read_opt(config: Config) -> Fields:
    hidden = whole_of(config, "hidden_size")
    width = whole_of(config, "word_embed_proj_dim", hidden)
    before = flag_of(config, "do_layer_norm_before", True)
    return _mlp_block(flag_of(config, "enable_bias", True)) | {
        **head_fields(hidden, whole_of(config, "num_attention_heads")),
        "layers": whole_of(config, "num_hidden_layers"),
        "ffn": whole_of(config, "ffn_dim"),
        "vocab": whole_of(config, "vocab_size"),
        "activation": activation_of(config, "activation_function", "relu"),
        "position": "learned",
        "max_positions": whole_of(config, "max_position_embeddings") + 2,  # two rows of padding
        "tied_embeddings": flag_of(config, "tie_word_embeddings", True),
        "embedding_dim": 0 if width == hidden else width,
        "final_norm": before and not flag_of(config, "_remove_final_layer_norm", False),
    }


def read_bloom(config: Config) -> Fields:
    hidden = whole_of(config, "hidden_size|n_embed")
    shape = head_fields(hidden, whole_of(config, "n_head|num_attention_heads"))
    return (
        _mlp_block(True)
        | shape
        | {
            "layers": whole_of(config, "n_layer|num_hidden_layers"),
            "ffn": 4 * hidden,
            "vocab": whole_of(config, "vocab_size"),
            "activation": "gelu_tanh",
            "position": "alibi",
            "embedding_norm": True,
            "tied_embeddings": flag_of(config, "tie_word_embeddings", True),
        }
    )


def _falcon_kv_heads(config: Config, heads: int) -> int:
    if flag_of(config, "new_decoder_architecture", False):
        return whole_of(config, "num_kv_heads|n_head_kv", heads)
    return 1 if flag_of(config, "multi_query", True) else heads


def _falcon_norms(config: Config) -> int:
    """7b shares one norm between attention and FFN; 40b and serial blocks have two."""
    if not flag_of(config, "parallel_attn", True):
        return 2
    new = flag_of(config, "new_decoder_architecture", False)
    return 2 if whole_of(config, "num_ln_in_parallel_attn", 2 if new else 1) == 2 else 1


def read_falcon(config: Config) -> Fields:
    hidden = whole_of(config, "hidden_size")
    heads = whole_of(config, "num_attention_heads|n_head")
    shape = head_fields(hidden, heads, _falcon_kv_heads(config, heads))
    return (
        _mlp_block(flag_of(config, "bias", False))
        | shape
        | {
            "layers": whole_of(config, "num_hidden_layers|n_layer"),
            "ffn": whole_of(config, "ffn_hidden_size", 4 * hidden),
            "vocab": whole_of(config, "vocab_size"),
            "activation": activation_of(config, "activation", "gelu"),
            "norms_per_layer": _falcon_norms(config),
            "parallel_block": flag_of(config, "parallel_attn", True)
            or flag_of(config, "new_decoder_architecture", False),
            "position": "alibi" if flag_of(config, "alibi", False) else "rope",
            "tied_embeddings": flag_of(config, "tie_word_embeddings", True),
        }
    )


def _mpt_position(config: Config, attention: Config) -> Fields:
    if flag_of(attention, "alibi", True):
        return {"position": "alibi"}
    if not flag_of(config, "learned_pos_emb", True):
        return {"position": "none"}
    return {"position": "learned", "max_positions": whole_of(config, "max_seq_len", 2048)}


def read_mpt(config: Config) -> Fields:
    attention = table_of(config, "attn_config")
    if flag_of(attention, "qk_ln", False):
        raise InputError("key 'qk_ln' is true: MPT with normed queries and keys is not covered.")
    hidden, heads = whole_of(config, "d_model"), whole_of(config, "n_heads")
    bias = not flag_of(config, "no_bias", True)
    return (
        _mlp_block(bias)
        | head_fields(hidden, heads, whole_of(attention, "kv_n_heads", 0))
        | {
            "layers": whole_of(config, "n_layers"),
            "ffn": whole_of(config, "expansion_ratio", 4) * hidden,
            "vocab": whole_of(config, "vocab_size"),
            "activation": "gelu",
            "norm_bias": bias,
            "tied_embeddings": flag_of(config, "tie_word_embeddings", True),
        }
        | _mpt_position(config, attention)
    )


def read_phi(config: Config) -> Fields:
    config = {"hidden_act": "gelu_new"} | dict(config)
    return (
        shape_fields(config)
        | _mlp_block(True)
        | {
            "norms_per_layer": 1,
            "parallel_block": True,
            "head_bias": True,
            "qk_norm": flag_of(config, "qk_layernorm", False),
        }
    )

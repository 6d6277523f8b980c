"""What families share: activations, head shapes, windows and layer types."""

from __future__ import annotations

from collections.abc import Callable

from simcore.errors import InputError, unknown
from simcore.hf_config.keys import Config, Fields, flag_of, list_of, ratio_of, text_of, whole_of
from simcore.models import MAX_LAYERS

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


def activation_of(config: Config, keys: str, default: str) -> str:
    name = text_of(config, keys, default)
    if name not in ACTIVATION_NAMES:
        raise unknown("activation", name, ACTIVATION_NAMES)
    return ACTIVATION_NAMES[name]


def shape_fields(config: Config, default_head_dim: int = 0) -> Fields:
    """The numbers that llama and most later families name alike."""
    heads = whole_of(config, "num_attention_heads")
    hidden = whole_of(config, "hidden_size")
    head_dim = whole_of(config, "head_dim", default_head_dim)
    return {
        "layers": whole_of(config, "num_hidden_layers"),
        "hidden": hidden,
        "heads": heads,
        "kv_heads": whole_of(config, "num_key_value_heads", heads),
        "head_dim": head_dim or ratio_of(hidden, heads, "hidden_size over num_attention_heads"),
        "ffn": whole_of(config, "intermediate_size"),
        "vocab": whole_of(config, "vocab_size"),
        "activation": activation_of(config, "hidden_act", "silu"),
        "tied_embeddings": flag_of(config, "tie_word_embeddings", False),
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


def typed_layers(
    config: Config, fields: Fields, window: int, sliding: Callable[[int], bool]
) -> Fields:
    """The mixers that ``layer_types`` lists, or else those of ``sliding``."""
    kinds = list_of(config, "layer_types")
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


def first_dense_layers(config: Config, layers: int) -> int:
    """The dense layers named by ``mlp_only_layers``, which must be the first ones."""
    named = list_of(config, "mlp_only_layers")
    if list(named) != list(range(len(named))) or len(named) > layers:
        raise InputError(
            "key 'mlp_only_layers' must name the first layers (0, 1, ...) or none: other dense "
            "layers among MoE ones are not covered."
        )
    return len(named)


def every_moe(config: Config, keys: str, dense: int) -> Fields:
    """The first ``dense`` layers and the stride of the MoE ones after them."""
    every = whole_of(config, keys, 1)
    if dense and every != 1:
        raise InputError(f"key {keys!r} is {every}: only 1 is covered after first dense layers.")
    return {"dense_layers": dense, "moe_every": every}

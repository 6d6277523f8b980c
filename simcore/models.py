"""Networks as numbers: `ModelSpec`, its parameter table and its matrix-product FLOPs.

Every count is exact for the architectures that `simcore.hf_config` reads: it equals the number of
elements of the weight tensors of the published implementation, tied tensors once. Extra heads
for multi-token prediction and vision towers are not counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from simcore.dtypes import DTYPE_BYTES, dtype_bytes
from simcore.errors import InputError, unknown
from simcore.linear import DECAYS

GRID = ("space", "time")  # mixers that attend along one axis of a grid: `simcore.axes`
LINEAR = "linear"
MIXERS = ("mha", "gqa", "mqa", "mla", "sliding", *GRID, LINEAR, "ssm")
STATEFUL = (LINEAR, "ssm")  # mixers with a state of fixed size in place of a cache
FFN_MATRICES = {"gated": 3, "mlp": 2}
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
NORMS = ("rmsnorm", "layernorm")
MAX_LAYERS = 10_000
POSITIONS = ("rope", "learned", "alibi", "none")


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A transformer (or SSM) as the numbers that decide its cost.

    Field names are those of the scenario's inline ``[model]`` table; zero or an empty value
    means "the network has none".
    """

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int  # MLA: width of a query or key head, qk_nope_head_dim + qk_rope_head_dim
    ffn: int
    vocab: int
    ffn_kind: str = "gated"  # "gated": three matrices, "mlp": two
    activation: str = "silu"  # silu, gelu, gelu_tanh, relu
    norm: str = "rmsnorm"  # or "layernorm"
    norm_bias: bool = True  # layernorm only
    norms_per_layer: int = 2  # gemma2, 3: 4 (also after attention and FFN); falcon-7b, phi: 1
    final_norm: bool = True
    embedding_norm: bool = False  # a norm right after the embedding (bloom)
    parallel_block: bool = False  # attention and FFN read the same normed input
    qkv_bias: bool = False  # mamba2: of the input projection
    out_bias: bool = False
    ffn_bias: bool = False  # experts too
    head_bias: bool = False
    qk_norm: bool = False  # one norm over each head's query and key (qwen3, gemma3)
    attention_sinks: bool = False  # one learned sink logit per head (gpt-oss)
    position: str = "rope"  # rope, learned, alibi, none
    max_positions: int = 0  # rows of the learned position table
    tied_embeddings: bool = False
    embedding_dim: int = 0  # width of the embedding where it differs from hidden (opt-350m)
    causal: bool = True  # False: bidirectional attention (llada, dream)
    # mixture of experts
    experts: int = 0
    experts_per_token: int = 0
    moe_ffn: int = 0
    shared_experts: int = 0
    shared_ffn: int = 0  # width of one shared expert; 0 means moe_ffn
    dense_layers: int = 0  # the first layers keep a dense FFN (deepseek)
    moe_every: int = 1  # an MoE FFN every so many layers after the dense ones
    router_bias: bool = False
    shared_gate: bool = False  # a scalar gate on the shared expert (qwen2-moe)
    # multi-head latent attention (deepseek): 0 ranks mean plain projections
    q_lora_rank: int = 0
    kv_lora_rank: int = 0
    qk_nope_head_dim: int = 0
    qk_rope_head_dim: int = 0
    v_head_dim: int = 0
    # mixers, one per layer, of MIXERS. Empty: full attention everywhere
    mixers: tuple[str, ...] = ()
    sliding_window: int = 0  # keys that a sliding layer sees, the query's own included
    frames: int = 0  # of a sequence, for layers that attend in space (a frame) or in time
    linear_decay: str = "none"  # law of the linear layers' decay, a key of `simcore.linear.DECAYS`
    # state-space layers (mamba2)
    ssm_state: int = 0
    ssm_heads: int = 0
    ssm_head_dim: int = 0
    ssm_groups: int = 0
    ssm_conv: int = 0
    # storage and arithmetic
    weights_dtype: str = "bf16"
    kv_dtype: str = "bf16"
    compute_dtype: str = "bf16"


# ---------------------------------------------------------------- layers


def default_mixer(model: ModelSpec) -> str:
    """Return the mixer of a layer that ``mixers`` does not name: full attention, or ssm."""
    if model.kv_lora_rank:
        return "mla"
    if model.ssm_heads and not model.heads:
        return "ssm"
    if model.kv_heads == model.heads:
        return "mha"
    return "mqa" if model.kv_heads == 1 else "gqa"


def mixer_of(model: ModelSpec, layer: int) -> str:
    """Return the mixer of ``layer`` (from 0), one of MIXERS."""
    return model.mixers[layer] if model.mixers else default_mixer(model)


def is_moe_layer(model: ModelSpec, layer: int) -> bool:
    """Return whether ``layer`` (from 0) has experts: each ``moe_every``-th after the dense ones."""
    past = layer - model.dense_layers
    return model.experts > 0 and past >= 0 and (past + 1) % model.moe_every == 0


def layer_kinds(model: ModelSpec) -> Counter[tuple[str, bool]]:
    """Return how many layers there are of each kind (mixer, has experts)."""
    return Counter(
        (mixer_of(model, layer), is_moe_layer(model, layer)) for layer in range(model.layers)
    )


def shared_width(model: ModelSpec) -> int:
    """Return the width of all shared experts together."""
    return model.shared_experts * (model.shared_ffn or model.moe_ffn)


# ---------------------------------------------------------------- parameters


def _norm(model: ModelSpec, width: int) -> int:
    has_bias = model.norm == "layernorm" and model.norm_bias
    return width * (2 if has_bias else 1)


def _attention(model: ModelSpec) -> int:
    """Query, key, value and output projections with their biases, and the sinks."""
    queries, keys = model.heads * model.head_dim, model.kv_heads * model.head_dim
    weights = model.hidden * (queries + 2 * keys) + queries * model.hidden
    biases = model.qkv_bias * (queries + 2 * keys) + model.out_bias * model.hidden
    return weights + biases + model.attention_sinks * model.heads


def _mla(model: ModelSpec) -> int:
    """Projections of multi-head latent attention (DeepSeek-V2 2024, eqs. 37-47)."""
    queries = model.heads * (model.qk_nope_head_dim + model.qk_rope_head_dim)
    latent = model.kv_lora_rank + model.qk_rope_head_dim
    expanded = model.heads * (model.qk_nope_head_dim + model.v_head_dim)
    rank = model.q_lora_rank
    query = (model.hidden + queries) * rank if rank else model.hidden * queries
    weights = query + model.hidden * latent + model.kv_lora_rank * expanded
    weights += model.heads * model.v_head_dim * model.hidden
    # a compressed query has its bias on the way down; a plain one has none
    return weights + model.qkv_bias * (rank + latent) + model.out_bias * model.hidden


def _ssm_widths(model: ModelSpec) -> tuple[int, int, int]:
    """Widths of a mamba2 mixer: inner, convolved (inner, B, C), projected (also gate and dt)."""
    inner = model.ssm_heads * model.ssm_head_dim
    convolved = inner + 2 * model.ssm_groups * model.ssm_state
    return inner, convolved, inner + convolved + model.ssm_heads


def _ssm(model: ModelSpec) -> int:
    """Parameters of a mamba2 mixer (Dao and Gu 2024), its gated norm included."""
    inner, convolved, projected = _ssm_widths(model)
    projections = model.hidden * projected + inner * model.hidden
    biases = model.qkv_bias * projected + model.out_bias * model.hidden
    convolution = convolved * (model.ssm_conv + 1)
    return projections + biases + convolution + 3 * model.ssm_heads + inner


_MIXER_PARAMETERS: dict[str, Callable[[ModelSpec], int]] = {
    "mha": _attention,
    "gqa": _attention,
    "mqa": _attention,
    "sliding": _attention,
    **dict.fromkeys(GRID, _attention),
    LINEAR: _attention,
    "mla": _mla,
    "ssm": _ssm,
}


def _feed_forward(model: ModelSpec, width: int) -> int:
    """One FFN of ``width``: two matrices, or three with a gate, and their biases."""
    matrices = FFN_MATRICES[model.ffn_kind]
    biases = model.ffn_bias * ((matrices - 1) * width + model.hidden)
    return matrices * model.hidden * width + biases


def _layer_norms(model: ModelSpec, mixer: str) -> int:
    """Norms of one layer: of the block, of queries and keys, of the MLA latents."""
    total = model.norms_per_layer * _norm(model, model.hidden)
    if mixer == "mla":
        return total + model.q_lora_rank + model.kv_lora_rank
    if model.qk_norm and mixer != "ssm":
        total += 2 * _norm(model, model.head_dim)
    return total


def _experts(model: ModelSpec, experts: int) -> dict[str, int]:
    shared = shared_width(model)
    return {
        "experts": experts * _feed_forward(model, model.moe_ffn),
        "shared_experts": _feed_forward(model, shared) if shared else 0,
        "router": (model.hidden + model.router_bias) * model.experts
        + model.shared_gate * model.hidden,
    }


def _block(model: ModelSpec, mixer: str, moe: bool, experts: int) -> dict[str, int]:
    table = {f"attention_{mixer}" if mixer != "ssm" else "ssm": _MIXER_PARAMETERS[mixer](model)}
    if moe:
        table |= _experts(model, experts)
    elif model.ffn:
        table["ffn"] = _feed_forward(model, model.ffn)
    table["norms"] = _layer_norms(model, mixer)
    return table


def layer_parameter_table(model: ModelSpec, layer: int) -> dict[str, int]:
    """Return the parameters of one layer by part; the keys are those of `parameter_table`."""
    table = _block(model, mixer_of(model, layer), is_moe_layer(model, layer), model.experts)
    return {part: count for part, count in table.items() if count}


def _embedding(model: ModelSpec) -> dict[str, int]:
    width = model.embedding_dim or model.hidden
    positions = model.max_positions * model.hidden if model.position == "learned" else 0
    return {
        "embedding": model.vocab * width,
        "positions": positions,
        "embedding_projections": 2 * width * model.hidden if width != model.hidden else 0,
    }


def _table(model: ModelSpec, experts: int) -> dict[str, int]:
    table: Counter[str] = Counter(_embedding(model))
    for (mixer, moe), layers in layer_kinds(model).items():
        for part, count in _block(model, mixer, moe, experts).items():
            table[part] += layers * count
    table["norms"] += (model.final_norm + model.embedding_norm) * _norm(model, model.hidden)
    head = 0 if model.tied_embeddings else model.vocab * (model.embedding_dim or model.hidden)
    table["head"] = head + model.head_bias * model.vocab
    return {part: count for part, count in table.items() if count}


def parameter_table(model: ModelSpec) -> dict[str, int]:
    """Return the number of parameters by part, parts that the network lacks left out.

    Parts: embedding, positions, embedding_projections, attention_<mixer>, ssm, ffn, experts,
    shared_experts, router, norms, head. A tied head is counted once, as the embedding.
    """
    return _table(model, model.experts)


def parameter_count(model: ModelSpec) -> int:
    """Return the number of parameters, tied embeddings once."""
    return sum(parameter_table(model).values())


def active_parameter_count(model: ModelSpec) -> int:
    """Return the parameters that one token meets: the whole embedding and head, its experts.

    Of the experts of a layer, ``experts_per_token`` and the shared ones count.
    """
    return sum(_table(model, model.experts_per_token).values())


# ---------------------------------------------------------------- FLOPs


def attended_pairs(seq_len: int, window: int = 0, causal: bool = False) -> float:
    """Return the (query, key) pairs of one sequence and head.

    Full: s * w with w = min(s, window); causal: s * w - w^2 / 2, hence s^2 / 2 without a window.
    """
    keys = min(seq_len, window) if window else seq_len
    return seq_len * keys - keys * keys / 2 if causal else float(seq_len * keys)


def _score_and_value_width(model: ModelSpec, mixer: str) -> int:
    """Summed width of the two products of one (query, key) pair over all heads."""
    if mixer == "mla":
        return model.heads * (model.qk_nope_head_dim + model.qk_rope_head_dim + model.v_head_dim)
    return 2 * model.heads * model.head_dim


def _mixer_weights(model: ModelSpec, mixer: str) -> int:
    """Elements of the matrices that every token is multiplied with."""
    if mixer == "mla":
        return (
            _mla(model)
            - model.qkv_bias * (model.q_lora_rank + model.kv_lora_rank + model.qk_rope_head_dim)
            - model.out_bias * model.hidden
        )
    if mixer == "ssm":
        inner, _, projected = _ssm_widths(model)
        return model.hidden * (projected + inner)
    return 2 * model.hidden * model.head_dim * (model.heads + model.kv_heads)


def _ffn_weights(model: ModelSpec, moe: bool) -> int:
    """Elements of the FFN, expert and router matrices that every token is multiplied with."""
    each = FFN_MATRICES[model.ffn_kind] * model.hidden
    if not moe:
        return each * model.ffn
    width = model.experts_per_token * model.moe_ffn + shared_width(model)
    return each * width + model.hidden * (model.experts + model.shared_gate)


def recurrence_flops(model: ModelSpec, mixer: str) -> int:
    """Return the products of one token with a layer's state: into it and out of it."""
    if mixer == LINEAR:
        return 2 * (model.heads + model.kv_heads) * model.head_dim**2
    return 4 * model.ssm_heads * model.ssm_head_dim * model.ssm_state


def _mixing_flops(model: ModelSpec, mixer: str, seq_len: int, causal: bool) -> int:
    """FLOPs of one sequence that depend on no weight: scores and values, or a recurrence."""
    if mixer in STATEFUL:
        return seq_len * recurrence_flops(model, mixer)
    window = model.sliding_window if mixer == "sliding" else 0
    rows = {"space": seq_len // max(model.frames, 1), "time": model.frames}.get(mixer, seq_len)
    pairs = seq_len / rows * attended_pairs(rows, window, causal and model.causal)
    return int(2 * pairs * _score_and_value_width(model, mixer))


def forward_flops(model: ModelSpec, batch: int, seq_len: int, causal: bool = False) -> int:
    """Return the matrix-product FLOPs, 2 m n k, of one forward pass of batch x seq_len tokens.

    Head on every token included; scores and values are counted fully, as a kernel without
    causal skipping does (Megatron-LM 2021, appendix), or halved with ``causal`` where the
    network is causal. A sliding layer counts at most ``sliding_window`` keys per query. MLA is
    counted expanded (keys and values rebuilt from the latent), linear attention and SSM as their
    recurrence: the products into the state and out of it. Look-ups, norms, convolutions are not
    products.
    """
    embedding = model.embedding_dim or model.hidden
    weights = model.vocab * embedding
    if embedding != model.hidden:
        weights += 2 * embedding * model.hidden
    mixing = 0
    for (mixer, moe), layers in layer_kinds(model).items():
        weights += layers * (_mixer_weights(model, mixer) + _ffn_weights(model, moe))
        mixing += layers * _mixing_flops(model, mixer, seq_len, causal)
    return batch * (2 * seq_len * weights + mixing)


# ---------------------------------------------------------------- cache


def layer_kv_elements(model: ModelSpec, mixer: str) -> int:
    """Return the cached elements per token of one layer; MLA keeps the latent and the rope key."""
    if mixer == "mla":
        return model.kv_lora_rank + model.qk_rope_head_dim
    return 0 if mixer in STATEFUL else 2 * model.kv_heads * model.head_dim


def kv_bytes_per_token(model: ModelSpec, context: int = 0) -> float:
    """Return the bytes of cache per token over all layers.

    With ``context`` tokens in the sequence, the mean per token: a sliding layer keeps at most
    ``sliding_window`` of them. Without, every layer keeps the token. A layer with a state keeps
    none.
    """
    elements = 0.0
    for (mixer, _), layers in layer_kinds(model).items():
        kept = 1.0
        if mixer == "sliding" and context:
            kept = min(1.0, model.sliding_window / context)
        elements += layers * layer_kv_elements(model, mixer) * kept
    return elements * dtype_bytes(model.kv_dtype)


def state_bytes_per_sequence(model: ModelSpec) -> float:
    """Return the bytes of recurrent state per sequence over all layers, whatever its length.

    A mamba2 layer keeps heads x head_dim x state values and the last ``ssm_conv`` inputs of its
    convolution, a linear layer head_dim x head_dim values per KV head.
    """
    inner, convolved, _ = _ssm_widths(model)
    each = {
        "ssm": inner * model.ssm_state + convolved * model.ssm_conv,
        LINEAR: model.kv_heads * model.head_dim**2,
    }
    kept = sum(n * each.get(mixer, 0) for (mixer, _), n in layer_kinds(model).items())
    return kept * dtype_bytes(model.kv_dtype)


# ---------------------------------------------------------------- checks


def _fail(model: ModelSpec, problem: str, remedy: str) -> InputError:
    return InputError(f"model {model.name[:80]!r}: {problem}: {remedy}.")


def _check_whole(model: ModelSpec) -> None:
    """Every number is a whole number of at least 0, and the basic ones of at least 1."""
    at_least_one = ("layers", "hidden", "vocab", "moe_every")
    for field in _NUMBERS:
        value = getattr(model, field)
        least = 1 if field in at_least_one else 0
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise _fail(
                model, f"{field} is {value!r}", f"set it to a whole number of at least {least}"
            )
    for field in _SWITCHES:
        if not isinstance(getattr(model, field), bool):
            problem = f"{field} is {getattr(model, field)!r}"
            raise _fail(model, problem, "set it to true or false")


def _check_layers(model: ModelSpec) -> None:
    if model.layers > MAX_LAYERS:
        raise _fail(model, f"layers is {model.layers}", f"at most {MAX_LAYERS} are covered")
    if model.dense_layers > model.layers:
        problem = f"dense_layers {model.dense_layers} of {model.layers} layers"
        raise _fail(model, problem, "lower dense_layers")


def _check_names(model: ModelSpec) -> None:
    """Every name is in its registry."""
    registries = {
        "ffn_kind": FFN_MATRICES,
        "activation": ACTIVATIONS,
        "norm": NORMS,
        "position": POSITIONS,
        "linear_decay": DECAYS,
        "weights_dtype": DTYPE_BYTES,
        "kv_dtype": DTYPE_BYTES,
        "compute_dtype": DTYPE_BYTES,
    }
    for field, registry in registries.items():
        if getattr(model, field) not in registry:
            raise unknown(f"{field} of model {model.name[:80]!r}", getattr(model, field), registry)
    for mixer in model.mixers:
        if mixer not in MIXERS:
            raise unknown(f"mixer of model {model.name[:80]!r}", mixer, MIXERS)


def _check_attention(model: ModelSpec) -> None:
    if min(model.heads, model.kv_heads, model.head_dim) < 1:
        problem = f"heads {model.heads}, kv_heads {model.kv_heads}, head_dim {model.head_dim}"
        raise _fail(model, problem, "attention layers need at least 1 of each")
    if model.heads % model.kv_heads:
        problem = f"heads {model.heads} is not a multiple of kv_heads {model.kv_heads}"
        raise _fail(model, problem, "change either so that every KV head serves as many heads")


def _check_mla(model: ModelSpec) -> None:
    fields = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    for field in fields:
        if getattr(model, field) < 1:
            raise _fail(model, f"{field} is 0", f"latent attention needs {', '.join(fields)}")


def _check_ssm(model: ModelSpec) -> None:
    fields = ("ssm_state", "ssm_heads", "ssm_head_dim", "ssm_groups", "ssm_conv")
    for field in fields:
        if getattr(model, field) < 1:
            raise _fail(model, f"{field} is 0", f"state-space layers need {', '.join(fields)}")
    if model.ssm_heads % model.ssm_groups:
        problem = f"ssm_heads {model.ssm_heads} is not a multiple of ssm_groups {model.ssm_groups}"
        raise _fail(model, problem, "change either")


def _check_mixers(model: ModelSpec) -> None:
    if model.mixers and len(model.mixers) != model.layers:
        problem = f"mixers names {len(model.mixers)} layers of {model.layers}"
        raise _fail(model, problem, "name one mixer per layer, or none")
    used = {mixer for mixer, _ in layer_kinds(model)}
    if used - {"ssm"}:
        _check_attention(model)
    if "mla" in used:
        _check_mla(model)
    if "ssm" in used:
        _check_ssm(model)
    if used.intersection(GRID) and model.frames < 1:
        raise _fail(model, "layers in space or time without frames", "set frames (of a sequence)")
    if "sliding" in used and model.sliding_window < 1:
        raise _fail(model, "sliding layers without a sliding_window", "set sliding_window (tokens)")


def _check_experts(model: ModelSpec) -> None:
    if not model.experts:
        if model.experts_per_token or model.shared_experts:
            raise _fail(model, "experts is 0", "set experts, or drop the other expert numbers")
        return
    if not 1 <= model.experts_per_token <= model.experts:
        problem = f"experts_per_token {model.experts_per_token} of {model.experts} experts"
        raise _fail(model, problem, f"set experts_per_token between 1 and {model.experts}")
    if model.moe_ffn < 1:
        raise _fail(model, "moe_ffn is 0", "set it to the width of one expert")


def _check_ffn(model: ModelSpec) -> None:
    """Attention layers without experts need an FFN; an SSM layer may do without."""
    dense = any(not moe and mixer != "ssm" for mixer, moe in layer_kinds(model))
    if dense and not model.ffn:
        raise _fail(model, "ffn is 0", "set it to the width of the feed-forward layer")


def check_model(model: ModelSpec) -> None:
    """Raise `InputError` where the numbers describe no network."""
    _check_whole(model)
    _check_layers(model)
    _check_names(model)
    _check_mixers(model)
    _check_experts(model)
    _check_ffn(model)
    if model.position == "learned" and not model.max_positions:
        raise _fail(model, "learned positions without max_positions", "set max_positions (rows)")


_FIELD_TYPES = {name: str(f.type) for name, f in ModelSpec.__dataclass_fields__.items()}
_NUMBERS = tuple(name for name, kind in _FIELD_TYPES.items() if kind == "int")
_SWITCHES = tuple(name for name, kind in _FIELD_TYPES.items() if kind == "bool")

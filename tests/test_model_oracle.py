"""Parameter counts against transformers on the meta device, FLOPs against torch's own counter.

No weight is allocated: a network on the meta device has shapes and nothing else.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from simcore import catalogue
from simcore.hf_config import FAMILIES, from_hf_config
from simcore.models import ModelSpec, forward_flops, parameter_count

torch = pytest.importorskip("torch", reason="needs torch")
from torch import nn  # noqa: E402


@pytest.fixture(scope="module")
def transformers():
    """The library, imported without its deprecation warnings and without a network."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library = pytest.importorskip("transformers", reason="needs transformers")
        library.logging.set_verbosity_error()
        return library


def built(library: Any, family: str, keys: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """The full config of a network of ``family``, and the elements of its weights."""
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        config = library.AutoConfig.for_model(family, **keys)
        network = library.AutoModelForCausalLM.from_config(config)
    return config.to_dict(), sum(weight.numel() for weight in network.parameters())


def compare(library: Any, family: str, keys: Mapping[str, Any]) -> ModelSpec:
    """Our count equals theirs for the full config, and for the short one that a hub file holds."""
    full, theirs = built(library, family, keys)
    model = from_hf_config(full, family)
    assert parameter_count(model) == theirs
    short = {"model_type": family, **keys, "torch_dtype": "bfloat16"}
    assert from_hf_config(short, family) == replace(model, **DTYPES)
    return model


DTYPES = {"weights_dtype": "bf16", "kv_dtype": "bf16", "compute_dtype": "bf16"}
SMALL = {
    "num_hidden_layers": 3,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 144,
    "vocab_size": 120,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WIDE = SMALL | {"head_dim": 32}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
NO_KV = {key: value for key, value in SMALL.items() if key != "num_key_value_heads"}
PLAIN = {key: SMALL[key] for key in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")}
NO_FFN = {key: value for key, value in NO_KV.items() if key != "intermediate_size"}
MLA = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "first_k_dense_replace": 1,
}
V3 = MLA | {"q_lora_rank": 28, "n_shared_experts": 1, "n_group": 2, "topk_group": 1}
GPT2 = {"n_layer": 3, "n_embd": 64, "n_head": 4, "n_positions": 40}
MAMBA = {"num_heads": 8, "head_dim": 16, "state_size": 24, "n_groups": 2}
OPT = {"ffn_dim": 144, "max_position_embeddings": 50}
NEW_FALCON = {"new_decoder_architecture": True, "num_kv_heads": 2}
OLD_FALCON = {"new_decoder_architecture": False, "multi_query": False, "parallel_attn": False}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", SMALL),
    "llama-bias": ("llama", WIDE | {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("llama", SMALL | {"tie_word_embeddings": True}),
    "mistral": ("mistral", SMALL | {"sliding_window": 16}),
    "mixtral": ("mixtral", SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": ("qwen2", SMALL),
    "qwen2-sliding": (
        "qwen2",
        SMALL | {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    ),
    "qwen2_moe": ("qwen2_moe", SMALL | EXPERTS | {"shared_expert_intermediate_size": 80}),
    "qwen3": ("qwen3", WIDE),
    "qwen3-default-head": ("qwen3", SMALL | {"attention_bias": True}),
    "qwen3_moe": ("qwen3_moe", WIDE | EXPERTS),
    "qwen3_moe-every-2": ("qwen3_moe", SMALL | EXPERTS | {"decoder_sparse_step": 2}),
    "qwen3_moe-dense": ("qwen3_moe", SMALL | EXPERTS | {"mlp_only_layers": [0, 1]}),
    "deepseek_v2": ("deepseek_v2", SMALL | MLA | {"q_lora_rank": None, "n_shared_experts": 2}),
    "deepseek_v3": ("deepseek_v3", SMALL | V3),
    "deepseek_v3-bias": ("deepseek_v3", SMALL | V3 | {"attention_bias": True}),
    "gpt2": ("gpt2", PLAIN | GPT2),
    "gpt2-inner": ("gpt2", PLAIN | GPT2 | {"n_inner": 100}),
    "gpt_neox": ("gpt_neox", NO_KV),
    "gpt_neox-serial": ("gpt_neox", NO_KV | {"use_parallel_residual": False}),
    "opt": ("opt", NO_FFN | OPT | {"word_embed_proj_dim": 64}),
    "opt-350m": (
        "opt",
        NO_FFN | OPT | {"word_embed_proj_dim": 32, "do_layer_norm_before": False},
    ),
    "bloom": ("bloom", PLAIN | {"n_layer": 3, "hidden_size": 64, "n_head": 4}),
    "falcon-7b": ("falcon", NO_FFN | {"multi_query": True, "parallel_attn": True}),
    "falcon-40b": ("falcon", NO_FFN | NEW_FALCON),
    "falcon-11b": ("falcon", NO_FFN | NEW_FALCON | {"num_ln_in_parallel_attn": 1}),
    "falcon-rw": ("falcon", NO_FFN | OLD_FALCON | {"bias": True, "alibi": True}),
    "mpt": ("mpt", PLAIN | {"n_layers": 3, "d_model": 64, "n_heads": 4, "expansion_ratio": 4}),
    "phi": ("phi", SMALL | {"num_key_value_heads": 4}),
    "phi-normed": ("phi", SMALL | {"num_key_value_heads": 4, "qk_layernorm": True}),
    "phi3": ("phi3", SMALL | {"sliding_window": 16}),
    "gemma": ("gemma", WIDE),
    "gemma2": ("gemma2", WIDE),
    "gemma3_text": ("gemma3_text", WIDE | {"num_hidden_layers": 7, "sliding_window": 16}),
    "mamba2": ("mamba2", PLAIN | MAMBA | {"num_hidden_layers": 3, "hidden_size": 64}),
    "mamba2-bias": (
        "mamba2",
        PLAIN
        | MAMBA
        | {"num_hidden_layers": 3, "hidden_size": 64, "use_bias": True}
        | {"tie_word_embeddings": True},
    ),
    "gpt_oss": ("gpt_oss", WIDE | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "llama4_text": (
        "llama4_text",
        WIDE
        | {"num_hidden_layers": 4, "intermediate_size_mlp": 200, "num_local_experts": 4}
        | {"interleave_moe_layer_step": 2},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_small_networks_of_every_family(transformers, case):
    compare(transformers, *CASES[case])


def test_every_family_has_an_oracle():
    """Those without are the same code under another name, or not in transformers (below)."""
    covered = {family for family, _ in CASES.values()}
    renamed = {"kimi_k2", "gemma3", "llama4"}
    outside = {"llada", "dream", "mamba_ssm"}
    assert covered | renamed | outside == set(FAMILIES)


def test_multimodal_configs_give_their_text_part(transformers):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for outer, inner in (("gemma3", "gemma3_text"), ("llama4", "llama4_text")):
            keys = CASES[inner][1]
            full = transformers.AutoConfig.for_model(outer, text_config=dict(keys)).to_dict()
            assert parameter_count(from_hf_config(full, outer)) == parameter_count(
                from_hf_config({"model_type": inner, **keys}, inner)
            )


# ---------------------------------------------------------------- full size


def hub_keys(model: ModelSpec) -> dict[str, Any]:
    """The keys that llama-like families share, for the numbers of a catalogue entry."""
    return {
        "num_hidden_layers": model.layers,
        "hidden_size": model.hidden,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "intermediate_size": model.ffn,
        "vocab_size": model.vocab,
        "tie_word_embeddings": model.tied_embeddings,
        "num_experts_per_tok": model.experts_per_token,
        "num_experts": model.experts,
        "moe_intermediate_size": model.moe_ffn,
    }


def deepseek_keys(model: ModelSpec) -> dict[str, Any]:
    return {
        "q_lora_rank": model.q_lora_rank or None,
        "kv_lora_rank": model.kv_lora_rank,
        "qk_nope_head_dim": model.qk_nope_head_dim,
        "qk_rope_head_dim": model.qk_rope_head_dim,
        "v_head_dim": model.v_head_dim,
        "n_routed_experts": model.experts,
        "n_shared_experts": model.shared_experts,
        "first_k_dense_replace": model.dense_layers,
    }


DENSE_KEYS = ("num_experts_per_tok", "num_experts", "moe_intermediate_size")
FULL = {
    "llama-3.1-8b": "llama",
    "llama-3.2-1b": "llama",
    "qwen2.5-7b": "qwen2",
    "qwen3-32b": "qwen3",
    "qwen3-30b-a3b": "qwen3_moe",
    "gemma2-9b": "gemma2",
}


@pytest.mark.parametrize("name", FULL)
def test_full_size(transformers, name):
    model, family = catalogue.load_model(name), FULL[name]
    keys = hub_keys(model)
    if not model.experts:
        keys = {key: value for key, value in keys.items() if key not in DENSE_KEYS}
    full, theirs = built(transformers, family, keys)
    assert parameter_count(model) == parameter_count(from_hf_config(full, name)) == theirs


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("deepseek-v2-lite", "deepseek_v2"),
        ("deepseek-v3", "deepseek_v3"),
        ("kimi-k2", "deepseek_v3"),
    ],
)
def test_real_widths_with_few_layers(transformers, name, family):
    model = catalogue.load_model(name)
    model = replace(model, layers=model.dense_layers + 2)
    keys = {k: v for k, v in hub_keys(model).items() if k not in ("num_experts", "head_dim")}
    _, theirs = built(transformers, family, keys | deepseek_keys(model))
    assert parameter_count(model) == theirs


def test_gpt_oss_and_llama4_with_few_layers(transformers):
    for name, family in (("gpt-oss-120b", "gpt_oss"), ("llama-4-scout", "llama4_text")):
        model = catalogue.load_model(name)
        model = replace(model, layers=2, mixers=model.mixers[:2])
        keys = {k: v for k, v in hub_keys(model).items() if k not in DENSE_KEYS}
        keys |= {"num_local_experts": model.experts}
        if family == "llama4_text":
            keys |= {"intermediate_size": model.moe_ffn, "intermediate_size_mlp": model.ffn}
        _, theirs = built(transformers, family, keys)
        assert parameter_count(model) == theirs


def test_networks_outside_transformers(transformers):
    """LLaDA, Dream and the mamba_ssm format, against the nearest class of the library."""
    llada = {"d_model": 64, "n_heads": 4, "n_kv_heads": 4, "n_layers": 3, "mlp_hidden_size": 144}
    llada |= {"model_type": "llada", "vocab_size": 120, "activation_type": "silu"}
    ours = from_hf_config(llada, "llada")
    _, theirs = built(transformers, "llama", NO_KV)
    assert parameter_count(ours) == theirs
    assert not ours.causal
    ours = from_hf_config(SMALL | {"model_type": "Dream"}, "dream")
    _, theirs = built(transformers, "qwen2", SMALL)
    assert parameter_count(ours) == theirs
    assert not ours.causal
    ours = from_hf_config(
        {"d_model": 256, "n_layer": 3, "vocab_size": 117, "pad_vocab_size_multiple": 16}
        | {"ssm_cfg": {"layer": "Mamba2"}, "tie_embeddings": True},
        "mamba2",
    )
    keys = {"num_heads": 8, "head_dim": 64, "state_size": 128, "n_groups": 1, "hidden_size": 256}
    keys |= {"num_hidden_layers": 3, "vocab_size": 128, "tie_word_embeddings": True}
    _, theirs = built(transformers, "mamba2", PLAIN | keys)
    assert parameter_count(ours) == theirs


# ---------------------------------------------------------------- FLOPs


def attend(x, queries, keys, values, heads):
    """Attention by explicit matrix products over (batch, tokens, heads x width) tensors."""
    batch, tokens, _ = x.shape
    split = [t.view(batch, tokens, -1, t.shape[-1] // n) for t, n in zip(
        (queries, keys, values), heads, strict=True)]  # fmt: skip
    q, k, v = (t.transpose(1, 2) for t in split)
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(q.shape[-1])
    mixed = torch.matmul(scores.softmax(-1), v)
    return mixed.transpose(1, 2).reshape(batch, tokens, -1)


class LlamaLike(nn.Module):
    """A dense llama written with explicit matrix products and no causal skipping."""

    def __init__(self, layers, hidden, heads, kv_heads, head_dim, ffn, vocab):
        super().__init__()
        self.heads = (heads, kv_heads, kv_heads)
        self.embedding = nn.Embedding(vocab, hidden)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "q": nn.Linear(hidden, heads * head_dim, bias=False),
                    "k": nn.Linear(hidden, kv_heads * head_dim, bias=False),
                    "v": nn.Linear(hidden, kv_heads * head_dim, bias=False),
                    "o": nn.Linear(heads * head_dim, hidden, bias=False),
                    "gate": nn.Linear(hidden, ffn, bias=False),
                    "up": nn.Linear(hidden, ffn, bias=False),
                    "down": nn.Linear(ffn, hidden, bias=False),
                    "norm1": nn.RMSNorm(hidden),
                    "norm2": nn.RMSNorm(hidden),
                }
            )
            for _ in range(layers)
        )
        self.norm = nn.RMSNorm(hidden)
        self.head = nn.Linear(hidden, vocab, bias=False)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            y = block["norm1"](x)
            mixed = attend(y, block["q"](y), block["k"](y), block["v"](y), self.heads)
            x = x + block["o"](mixed)
            y = block["norm2"](x)
            x = x + block["down"](nn.functional.silu(block["gate"](y)) * block["up"](y))
        return self.head(self.norm(x))


class GPT2Like(nn.Module):
    """GPT-2: one query, key and value matrix, biases, learned positions, tied head."""

    def __init__(self, layers, hidden, heads, vocab, positions):
        super().__init__()
        self.heads = (heads, heads, heads)
        self.embedding = nn.Embedding(vocab, hidden)
        self.positions = nn.Embedding(positions, hidden)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "qkv": nn.Linear(hidden, 3 * hidden),
                    "out": nn.Linear(hidden, hidden),
                    "up": nn.Linear(hidden, 4 * hidden),
                    "down": nn.Linear(4 * hidden, hidden),
                    "norm1": nn.LayerNorm(hidden),
                    "norm2": nn.LayerNorm(hidden),
                }
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(hidden)

    def forward(self, tokens):
        x = self.embedding(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            y = block["norm1"](x)
            x = x + block["out"](attend(y, *block["qkv"](y).chunk(3, -1), self.heads))
            x = x + block["down"](nn.functional.gelu(block["up"](block["norm2"](x))))
        return self.norm(x) @ self.embedding.weight.T


def counted_flops(network, tokens):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        network(tokens)
    return counter.get_total_flops()


def meta_tokens(batch, seq_len):
    return torch.zeros(batch, seq_len, dtype=torch.long, device="meta")


@pytest.mark.parametrize(("batch", "seq_len"), [(1, 16), (3, 40)])
def test_flops_of_a_llama(batch, seq_len):
    sizes = (3, 64, 8, 2, 16, 144, 200)
    with torch.device("meta"):
        network = LlamaLike(*sizes)
    model = ModelSpec("llama-like", *sizes)
    assert forward_flops(model, batch, seq_len) == counted_flops(
        network, meta_tokens(batch, seq_len)
    )
    assert parameter_count(model) == sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(("batch", "seq_len"), [(1, 16), (3, 40)])
def test_flops_of_a_gpt2(batch, seq_len):
    with torch.device("meta"):
        network = GPT2Like(layers=2, hidden=96, heads=6, vocab=200, positions=64)
    keys = {"n_layer": 2, "n_embd": 96, "n_head": 6, "vocab_size": 200, "n_positions": 64}
    model = from_hf_config({"model_type": "gpt2", **keys}, "gpt2-like")
    assert forward_flops(model, batch, seq_len) == counted_flops(
        network, meta_tokens(batch, seq_len)
    )
    assert parameter_count(model) == sum(p.numel() for p in network.parameters())


FORWARD = ("opt-350m", "phi", "bloom", "falcon-40b", "gpt_neox", "qwen3", "gemma2")
FORWARD += ("mixtral", "qwen2_moe", "qwen3_moe-every-2", "deepseek_v2", "deepseek_v3")


@pytest.mark.parametrize("case", FORWARD)
def test_flops_of_transformers(transformers, case):
    """The library's own forward pass with explicit ("eager") attention."""
    batch, seq_len = 2, 24
    family, keys = CASES[case]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = transformers.AutoConfig.for_model(family, **keys)
        config._attn_implementation = config._experts_implementation = "eager"
        network = transformers.AutoModelForCausalLM.from_config(config).eval()
        tokens = torch.zeros(batch, seq_len, dtype=torch.long)
        with torch.no_grad():
            theirs = counted_flops(lambda ids: network(input_ids=ids, use_cache=False), tokens)
    model = from_hf_config(config.to_dict(), case)
    assert forward_flops(model, batch, seq_len) == theirs

"""The table [model]: a name, a Hugging Face config or the numbers themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, Strict, model_validator

from simcore.models import ModelSpec
from simcore.scenario.fields import (
    AnyDtype,
    Flag,
    Layers,
    Mixer,
    OptionalLayers,
    OptionalWidth,
    StorageDtype,
    Table,
    Text,
    Width,
    key_of,
    refusal,
)
from simcore.scenario.words import shown_as

_MODEL_SOURCES = ("name", "hf_config")
MODEL_DTYPES = ("weights_dtype", "kv_dtype", "compute_dtype")


_INLINE_NEEDED = ("layers", "hidden", "heads", "ffn", "vocab")


class ModelTable(Table):
    """The network: a catalogue name, a Hugging Face config file, or its numbers inline."""

    name: Text | None = key_of("Catalogue name; beside inline numbers, only a label.", None)
    hf_config: Text | None = key_of(
        "Path of a Hugging Face config.json, relative to the scenario's folder.", None
    )
    layers: Layers | None = key_of("Transformer layers.", None, unit="layers")
    hidden: Width | None = key_of("Width of the residual stream.", None, unit="elements")
    heads: OptionalWidth | None = key_of("Query heads.", None, unit="heads")
    kv_heads: Width | None = key_of(
        "Key and value heads; by default as many as heads.", None, unit="heads"
    )
    head_dim: Width | None = key_of(
        "Width of one head; by default hidden / heads.", None, unit="elements"
    )
    ffn: OptionalWidth | None = key_of("Inner width of a dense FFN.", None, unit="elements")
    vocab: Width | None = key_of("Rows of the embedding.", None, unit="tokens")
    ffn_kind: Literal["gated", "mlp"] = key_of("Matrices of an FFN: gated has 3, mlp 2.", "gated")
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = key_of("FFN activation.", "silu")
    norm: Literal["rmsnorm", "layernorm"] = key_of("Kind of the norms.", "rmsnorm")
    norm_bias: Flag = key_of("Whether a layernorm has a bias.", True)
    norms_per_layer: Annotated[int, Strict(), Field(ge=0, le=16)] = key_of(
        "Norms in one layer.", 2, unit="norms"
    )
    final_norm: Flag = key_of("Whether a norm precedes the head.", True)
    embedding_norm: Flag = key_of("Whether a norm follows the embedding.", False)
    parallel_block: Flag = key_of("Whether attention and FFN read the same normed input.", False)
    qkv_bias: Flag = key_of("Whether the query, key and value projections have a bias.", False)
    out_bias: Flag = key_of("Whether the attention's output projection has a bias.", False)
    ffn_bias: Flag = key_of("Whether the FFN's matrices have a bias.", False)
    head_bias: Flag = key_of("Whether the head has a bias.", False)
    qk_norm: Flag = key_of("Whether each head's query and key are normed.", False)
    attention_sinks: Flag = key_of("Whether each head has a learned sink logit.", False)
    position: Literal["rope", "learned", "alibi", "none"] = key_of("Position encoding.", "rope")
    max_positions: OptionalWidth = key_of("Rows of a learned position table.", 0, unit="tokens")
    tied_embeddings: Flag = key_of("Whether the head shares the embedding's weights.", False)
    embedding_dim: OptionalWidth = key_of(
        "Width of the embedding where it differs from hidden.", 0, unit="elements"
    )
    causal: Flag = key_of("Whether attention is causal.", True)
    experts: OptionalWidth = key_of("Routed experts of an MoE layer; 0: dense.", 0, unit="experts")
    experts_per_token: OptionalWidth = key_of("Experts that a token visits.", 0, unit="experts")
    moe_ffn: OptionalWidth = key_of(
        "Inner width of one expert; by default ffn.", 0, unit="elements"
    )
    shared_experts: OptionalWidth = key_of("Experts that every token visits.", 0, unit="experts")
    shared_ffn: OptionalWidth = key_of(
        "Inner width of one shared expert; 0: moe_ffn.", 0, unit="elements"
    )
    dense_layers: OptionalLayers = key_of("First layers that keep a dense FFN.", 0, unit="layers")
    moe_every: Layers = key_of("An MoE FFN every so many layers after those.", 1, unit="layers")
    router_bias: Flag = key_of("Whether the router has a bias.", False)
    shared_gate: Flag = key_of("Whether the shared expert has a scalar gate.", False)
    q_lora_rank: OptionalWidth = key_of("MLA: rank of the queries; 0: full.", 0, unit="elements")
    kv_lora_rank: OptionalWidth = key_of("MLA: rank of keys and values.", 0, unit="elements")
    qk_nope_head_dim: OptionalWidth = key_of(
        "MLA: width of a head without position.", 0, unit="elements"
    )
    qk_rope_head_dim: OptionalWidth = key_of(
        "MLA: width of a head with position.", 0, unit="elements"
    )
    v_head_dim: OptionalWidth = key_of("MLA: width of a value head.", 0, unit="elements")
    mixers: Annotated[tuple[Mixer, ...], Field(max_length=10**4)] = key_of(
        "Mixer of each layer; empty: full attention everywhere.", ()
    )
    sliding_window: OptionalWidth = key_of("Window of the sliding layers.", 0, unit="tokens")
    frames: OptionalWidth = key_of(
        "Frames of a sequence, for layers that attend in space (within a frame) or in time (at one "
        "place, across frames).",
        0,
        unit="frames",
    )
    linear_decay: Literal["none", "retnet"] = key_of(
        "Law of the linear layers' decay per KV head: none, or RetNet's 1 - 2^(-5 - head).", "none"
    )
    ssm_state: OptionalWidth = key_of("SSM: size of the state.", 0, unit="elements")
    ssm_heads: OptionalWidth = key_of("SSM: heads.", 0, unit="heads")
    ssm_head_dim: OptionalWidth = key_of("SSM: width of one head.", 0, unit="elements")
    ssm_groups: OptionalWidth = key_of("SSM: groups.", 0, unit="groups")
    ssm_conv: OptionalWidth = key_of("SSM: taps of the convolution.", 0, unit="taps")
    weights_dtype: StorageDtype | None = key_of(
        "Format of stored weights; by default the model's own, or bf16.", None
    )
    kv_dtype: StorageDtype | None = key_of(
        "Format of the KV cache; by default the model's own, or bf16.", None
    )
    compute_dtype: AnyDtype | None = key_of(
        "Format of matrix products; by default the model's own, or bf16.", None
    )

    @property
    def inline(self) -> dict[str, Any]:
        """The inline numbers that the scenario gives."""
        skip = (*_MODEL_SOURCES, *MODEL_DTYPES)
        given = sorted(self.model_fields_set - set(skip))
        return {key: getattr(self, key) for key in given if getattr(self, key) is not None}

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        given = self.inline
        if self.hf_config is not None:
            if self.name is not None:
                raise refusal("and hf_config exclude each other: keep one of them.", "name")
            if given:
                raise refusal(f"gives the numbers: remove {next(iter(given))}.", "hf_config")
        elif given:
            self._check_inline(given)
        elif self.name is None:
            raise refusal("names no network: give name, hf_config or the numbers inline.")
        return self

    def _check_inline(self, given: Mapping[str, Any]) -> None:
        missing = [key for key in _INLINE_NEEDED if key not in given and not self._spared(key)]
        if missing and self.name is not None:
            raise refusal(
                f"{shown_as(self.name)} takes the numbers from the catalogue: remove "
                f"{next(iter(given))}, or give {', '.join(missing)} too to describe it inline.",
                "name",
            )
        if missing:
            raise refusal("is missing: an inline model needs it.", missing[0])
        for key, text in _model_faults(self):
            raise refusal(text, key)

    def _spared(self, key: str) -> bool:
        """Return whether the inline model can do without ``key``."""
        if key == "heads":
            return self.ssm_state > 0
        return key == "ffn" and (self.ssm_state > 0 or self.moe_ffn > 0)

    def inline_spec(self) -> ModelSpec:
        """Return the network that the inline numbers describe."""
        values = self.inline
        heads = values.setdefault("heads", 0)
        values.setdefault("kv_heads", heads)
        values.setdefault("head_dim", _head_dim(self))
        values.setdefault("ffn", 0)
        if self.experts:
            values["moe_ffn"] = self.moe_ffn or values["ffn"]
        return ModelSpec(name=self.name or "inline", **values)


def _head_dim(model: ModelTable) -> int:
    if model.kv_lora_rank:
        return model.qk_nope_head_dim + model.qk_rope_head_dim
    return (model.hidden or 0) // model.heads if model.heads else 0


def _model_faults(model: ModelTable) -> Iterator[tuple[str, str]]:
    """Yield (key, what is wrong) where inline numbers contradict one another."""
    heads, hidden, layers = model.heads or 0, model.hidden or 0, model.layers or 0
    if not heads and not model.ssm_state:
        yield "heads", "must be at least 1 in a model without SSM layers."
    if heads and heads % (model.kv_heads or heads):
        yield "kv_heads", f"= {model.kv_heads} does not divide heads = {heads}."
    if heads and model.head_dim is None and not model.kv_lora_rank and hidden % heads:
        yield "head_dim", f"is needed: heads = {heads} does not divide hidden = {hidden}."
    if not (model.ffn or model.moe_ffn or model.ssm_state):
        yield "ffn", "must be at least 1 in a model without experts or SSM layers."
    if model.experts and not 1 <= model.experts_per_token <= model.experts:
        yield (
            "experts_per_token",
            f"= {model.experts_per_token} must lie between 1 and experts = {model.experts}.",
        )
    if not model.experts and (model.experts_per_token or model.moe_ffn or model.shared_experts):
        yield "experts", "is missing: a model with other MoE numbers needs it."
    if model.dense_layers > layers:
        yield "dense_layers", f"= {model.dense_layers} exceeds layers = {layers}."
    if model.mixers and len(model.mixers) != layers:
        yield "mixers", f"lists {len(model.mixers)} layers but layers = {layers}."
    if "sliding" in model.mixers and not model.sliding_window:
        yield "sliding_window", "is missing: the sliding layers need it."
    if {"space", "time"}.intersection(model.mixers) and not model.frames:
        yield "frames", "is missing: layers in space or time need it."
    if "mla" in model.mixers and not model.kv_lora_rank:
        yield "kv_lora_rank", "is missing: the mla layers need it."
    if model.position == "learned" and not model.max_positions:
        yield "max_positions", "is missing: a learned position table needs it."

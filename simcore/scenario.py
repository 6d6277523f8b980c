"""The one input: a scenario's tables, how they are read, checked and turned into core types.

`load_scenario` reads a file, standard input or a dict; `parse_scenario` reads text;
`make_scenario` takes the tables as keyword arguments. Each raises `InputError` with one sentence.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import math
import re
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, NoReturn, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    Strict,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from simcore.dtypes import dtype_bytes
from simcore.errors import InputError, nearest
from simcore.models import ModelSpec
from simcore.strategy import MESH_AXES, ParallelStrategy, check_strategy, microbatches, stage_layers
from simcore.workloads import CollectiveCall, Generation, OpCall, TrainStep

MAX_FILE_BYTES = 10_000_000
MAX_SENTENCE = 290
SCHEDULE_NAMES = ("gpipe", "1f1b")  # until simcore.schedules.SCHEDULES says otherwise

# Words of the format that this version reads but cannot honour yet.
LATER_TABLES = {
    "engine": "serving",
    "slo": "serving",
    "fleet": "serving",
    "faults": "fault injection",
    "draft_model": "speculative decoding",
}
LATER_KEYS = {
    "parallel": ("cp_kind", "offload"),
    "goal": ("subject_to",),
    "decoding": (
        *("draft", "draft_tokens", "draft_steps", "draft_top_k", "acceptance", "accepted_length"),
    ),
}
LATER_VALUES = {
    ("workload", "kind"): ("serve",),
    ("parallel", "recompute"): ("selective",),
    ("parallel", "schedule"): ("interleaved", "zero_bubble", "zbv", "dualpipev"),
    ("decoding", "method"): (
        *("speculative", "tree", "multi_head", "jacobi", "lookahead", "diffusion"),
        *("block_diffusion", "masked", "wavefront", "next_scale", "fork_join"),
    ),
}

StorageDtype = Literal["bf16", "fp16", "fp32", "fp8", "int8", "int4", "nvfp4", "mxfp4"]
AnyDtype = Literal[StorageDtype, "fp64", "tf32", "int32", "int64"]
TrainMetric = Literal[
    "step_s",
    "tokens_per_s",
    "tokens_per_s_per_gpu",
    "mfu",
    "hfu",
    "peak_memory_bytes",
    "bubble_fraction",
    "exposed_communication_fraction",
]
GenerateMetric = Literal["seconds", "tokens_per_s", "tpot_s", "peak_memory_bytes"]
Metric = Literal[TrainMetric, GenerateMetric]


def schedule_names() -> tuple[str, ...]:
    """Return the names of the pipeline schedules that this version knows."""
    try:
        found = importlib.import_module("simcore.schedules").SCHEDULES
    except (ModuleNotFoundError, AttributeError):
        return SCHEDULE_NAMES
    return tuple(found)


def _refusal(text: str, key: str = "") -> PydanticCustomError:
    """Return the error that continues a sentence opened by the place of ``key``."""
    return PydanticCustomError("scenario", "{text}", {"text": text, "key": key})


def _known_schedule(name: str) -> str:
    names = schedule_names()
    if name in names:
        return name
    raise _refusal(_wrong_choice(("parallel", "schedule"), name, names))


def _only_one(degree: int) -> int:
    if degree > 1:
        raise _refusal(f"= {_shown(degree)} is not available in this version: set it to 1.")
    return degree


def _plain_text(text: str) -> str:
    if not text.strip() or not text.isprintable():
        raise _refusal(f"{_shown(text)} is not a name: give printable text.")
    return text


Degree = Annotated[int, Strict(), Field(ge=1, le=10**6)]
OneForNow = Annotated[int, Strict(), Field(ge=1, le=10**6), AfterValidator(_only_one)]
Layers = Annotated[int, Strict(), Field(ge=1, le=10**4)]
Width = Annotated[int, Strict(), Field(ge=1, le=10**7)]
OptionalWidth = Annotated[int, Strict(), Field(ge=0, le=10**7)]
OptionalLayers = Annotated[int, Strict(), Field(ge=0, le=10**4)]
Tokens = Annotated[int, Strict(), Field(ge=1, le=10**9)]
Bytes = Annotated[float, Strict(), Field(gt=0, le=1e18, allow_inf_nan=False)]
Seconds = Annotated[float, Strict(), Field(gt=0, le=1e6, allow_inf_nan=False)]
Exponent = Annotated[float, Strict(), Field(gt=0, le=100, allow_inf_nan=False)]
Flag = Annotated[bool, Strict()]
Text = Annotated[str, Strict(), Field(max_length=500), AfterValidator(_plain_text)]
Schedule = Annotated[str, Strict(), AfterValidator(_known_schedule)]
StageLayers = Annotated[tuple[Layers, ...], Field(max_length=10**4)]
Mixer = Literal["mha", "gqa", "mqa", "mla", "sliding", "ssm"]


def _key(meaning: str, default: Any = ..., *, unit: str = "") -> Any:
    """Return a field whose meaning and unit are published in the schema."""
    extra: dict[str, Any] = {"unit": unit} if unit else {}
    return Field(default, description=meaning, json_schema_extra=extra)


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


# ---------------------------------------------------------------------------------------- tables

_MODEL_SOURCES = ("name", "hf_config")
_MODEL_DTYPES = ("weights_dtype", "kv_dtype", "compute_dtype")
_INLINE_NEEDED = ("layers", "hidden", "heads", "ffn", "vocab")


class ModelTable(_Table):
    """The network: a catalogue name, a Hugging Face config file, or its numbers inline."""

    name: Text | None = _key("Catalogue name; beside inline numbers, only a label.", None)
    hf_config: Text | None = _key(
        "Path of a Hugging Face config.json, relative to the scenario's folder.", None
    )
    layers: Layers | None = _key("Transformer layers.", None, unit="layers")
    hidden: Width | None = _key("Width of the residual stream.", None, unit="elements")
    heads: OptionalWidth | None = _key("Query heads.", None, unit="heads")
    kv_heads: Width | None = _key(
        "Key and value heads; by default as many as heads.", None, unit="heads"
    )
    head_dim: Width | None = _key(
        "Width of one head; by default hidden / heads.", None, unit="elements"
    )
    ffn: OptionalWidth | None = _key("Inner width of a dense FFN.", None, unit="elements")
    vocab: Width | None = _key("Rows of the embedding.", None, unit="tokens")
    ffn_kind: Literal["gated", "mlp"] = _key("Matrices of an FFN: gated has 3, mlp 2.", "gated")
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = _key("FFN activation.", "silu")
    norm: Literal["rmsnorm", "layernorm"] = _key("Kind of the norms.", "rmsnorm")
    norm_bias: Flag = _key("Whether a layernorm has a bias.", True)
    norms_per_layer: Annotated[int, Strict(), Field(ge=0, le=16)] = _key(
        "Norms in one layer.", 2, unit="norms"
    )
    final_norm: Flag = _key("Whether a norm precedes the head.", True)
    embedding_norm: Flag = _key("Whether a norm follows the embedding.", False)
    parallel_block: Flag = _key("Whether attention and FFN read the same normed input.", False)
    qkv_bias: Flag = _key("Whether the query, key and value projections have a bias.", False)
    out_bias: Flag = _key("Whether the attention's output projection has a bias.", False)
    ffn_bias: Flag = _key("Whether the FFN's matrices have a bias.", False)
    head_bias: Flag = _key("Whether the head has a bias.", False)
    qk_norm: Flag = _key("Whether each head's query and key are normed.", False)
    attention_sinks: Flag = _key("Whether each head has a learned sink logit.", False)
    position: Literal["rope", "learned", "alibi", "none"] = _key("Position encoding.", "rope")
    max_positions: OptionalWidth = _key("Rows of a learned position table.", 0, unit="tokens")
    tied_embeddings: Flag = _key("Whether the head shares the embedding's weights.", False)
    embedding_dim: OptionalWidth = _key(
        "Width of the embedding where it differs from hidden.", 0, unit="elements"
    )
    causal: Flag = _key("Whether attention is causal.", True)
    experts: OptionalWidth = _key("Routed experts of an MoE layer; 0: dense.", 0, unit="experts")
    experts_per_token: OptionalWidth = _key("Experts that a token visits.", 0, unit="experts")
    moe_ffn: OptionalWidth = _key("Inner width of one expert; by default ffn.", 0, unit="elements")
    shared_experts: OptionalWidth = _key("Experts that every token visits.", 0, unit="experts")
    shared_ffn: OptionalWidth = _key(
        "Inner width of one shared expert; 0: moe_ffn.", 0, unit="elements"
    )
    dense_layers: OptionalLayers = _key("First layers that keep a dense FFN.", 0, unit="layers")
    moe_every: Layers = _key("An MoE FFN every so many layers after those.", 1, unit="layers")
    router_bias: Flag = _key("Whether the router has a bias.", False)
    shared_gate: Flag = _key("Whether the shared expert has a scalar gate.", False)
    q_lora_rank: OptionalWidth = _key("MLA: rank of the queries; 0: full.", 0, unit="elements")
    kv_lora_rank: OptionalWidth = _key("MLA: rank of keys and values.", 0, unit="elements")
    qk_nope_head_dim: OptionalWidth = _key(
        "MLA: width of a head without position.", 0, unit="elements"
    )
    qk_rope_head_dim: OptionalWidth = _key(
        "MLA: width of a head with position.", 0, unit="elements"
    )
    v_head_dim: OptionalWidth = _key("MLA: width of a value head.", 0, unit="elements")
    mixers: Annotated[tuple[Mixer, ...], Field(max_length=10**4)] = _key(
        "Mixer of each layer; empty: full attention everywhere.", ()
    )
    sliding_window: OptionalWidth = _key("Window of the sliding layers.", 0, unit="tokens")
    ssm_state: OptionalWidth = _key("SSM: size of the state.", 0, unit="elements")
    ssm_heads: OptionalWidth = _key("SSM: heads.", 0, unit="heads")
    ssm_head_dim: OptionalWidth = _key("SSM: width of one head.", 0, unit="elements")
    ssm_groups: OptionalWidth = _key("SSM: groups.", 0, unit="groups")
    ssm_conv: OptionalWidth = _key("SSM: taps of the convolution.", 0, unit="taps")
    weights_dtype: StorageDtype | None = _key(
        "Format of stored weights; by default the model's own, or bf16.", None
    )
    kv_dtype: StorageDtype | None = _key(
        "Format of the KV cache; by default the model's own, or bf16.", None
    )
    compute_dtype: AnyDtype | None = _key(
        "Format of matrix products; by default the model's own, or bf16.", None
    )

    @property
    def inline(self) -> dict[str, Any]:
        """The inline numbers that the scenario gives."""
        skip = (*_MODEL_SOURCES, *_MODEL_DTYPES)
        given = sorted(self.model_fields_set - set(skip))
        return {key: getattr(self, key) for key in given if getattr(self, key) is not None}

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        given = self.inline
        if self.hf_config is not None:
            if self.name is not None:
                raise _refusal("and hf_config exclude each other: keep one of them.", "name")
            if given:
                raise _refusal(f"gives the numbers: remove {next(iter(given))}.", "hf_config")
        elif given:
            self._check_inline(given)
        elif self.name is None:
            raise _refusal("names no network: give name, hf_config or the numbers inline.")
        return self

    def _check_inline(self, given: Mapping[str, Any]) -> None:
        missing = [key for key in _INLINE_NEEDED if key not in given and not self._spared(key)]
        if missing and self.name is not None:
            raise _refusal(
                f"{_shown(self.name)} takes the numbers from the catalogue: remove "
                f"{next(iter(given))}, or give {', '.join(missing)} too to describe it inline.",
                "name",
            )
        if missing:
            raise _refusal("is missing: an inline model needs it.", missing[0])
        for key, text in _model_faults(self):
            raise _refusal(text, key)

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
    if "mla" in model.mixers and not model.kv_lora_rank:
        yield "kv_lora_rank", "is missing: the mla layers need it."
    if model.position == "learned" and not model.max_positions:
        yield "max_positions", "is missing: a learned position table needs it."


class ClusterTable(_Table):
    """The hardware: a chip and how many, or a whole cluster by name or file."""

    gpu: Text | None = _key("Chip: a catalogue name.", None)
    gpus_per_node: Degree | None = _key(
        "Chips in one node; with gpu, 1 by default.", None, unit="chips"
    )
    nodes: Degree | None = _key("Nodes; with gpu, 1 by default.", None, unit="nodes")
    scale_up: Text | None = _key("Link inside a node; by default the chip's own.", None)
    scale_out: Text | None = _key("Link between nodes; by default the catalogue's.", None)
    cluster: Text | None = _key(
        "Cluster: a catalogue name, or a path relative to the scenario's folder; "
        "nodes may override its own.",
        None,
    )

    @property
    def world(self) -> int | None:
        """Number of ranks, or None where only the named cluster knows it."""
        if self.cluster is not None:
            return None
        return (self.gpus_per_node or 1) * (self.nodes or 1)

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if self.cluster is None and self.gpu is None:
            raise _refusal("names no hardware: give gpu, or cluster.")
        for key in ("gpu", "gpus_per_node", "scale_up", "scale_out"):
            if self.cluster is not None and getattr(self, key) is not None:
                raise _refusal("and cluster exclude each other: keep one of them.", key)
        if (self.world or 1) > 10**7:
            raise _refusal("x gpus_per_node is more than 10000000 ranks: lower one.", "nodes")
        return self


class ParallelTable(_Table):
    """The parallel strategy. World = pp x dp_replicate x dp_shard x cp x tp."""

    strategy: Literal["auto"] | None = _key(
        "auto lets the planner choose, as does leaving the table out.", None
    )
    dp_replicate: Degree = _key("Data-parallel replicas.", 1, unit="ranks")
    dp_shard: Degree = _key("Data-parallel ranks that share a replica.", 1, unit="ranks")
    tp: Degree = _key("Tensor-parallel degree.", 1, unit="ranks")
    pp: Degree = _key("Pipeline stages.", 1, unit="ranks")
    cp: OneForNow = _key("Context-parallel degree; only 1 in this version.", 1, unit="ranks")
    cp_ring: OneForNow = _key("Ring part of cp; only 1 in this version.", 1, unit="ranks")
    cp_ulysses: OneForNow = _key("Ulysses part of cp; only 1 in this version.", 1, unit="ranks")
    ep: OneForNow = _key("Expert-parallel degree; only 1 in this version.", 1, unit="ranks")
    etp: OneForNow = _key("Tensor parallelism of experts; only 1 in this version.", 1, unit="ranks")
    microbatch: Degree = _key("Sequences of one microbatch on one replica.", 1, unit="sequences")
    schedule: Schedule = _key("Pipeline schedule.", "1f1b")
    virtual_stages: OneForNow = _key(
        "Stages on one pipeline rank; only 1 in this version.", 1, unit="stages"
    )
    layers_per_stage: StageLayers = _key(
        "Layers of every stage; empty: split evenly.", (), unit="layers"
    )
    zero_stage: Annotated[int, Strict(), Field(ge=0, le=3)] | None = _key(
        "What data-parallel ranks shard: 0 nothing, 1 optimizer states, 2 also gradients, 3 also "
        "weights; by default 3 where dp_shard > 1, else 0.",
        None,
    )
    sequence_parallel: Flag = _key("Whether norms shard the sequence over tp ranks.", False)
    recompute: Literal["none", "full"] = _key("Activations computed again in backward.", "none")

    @model_validator(mode="after")
    def _check_auto(self) -> Self:
        given = sorted(self.model_fields_set - {"strategy", "microbatch"})
        if self.strategy == "auto" and given:
            raise _refusal(
                f'= "auto" leaves the choice to the planner: remove {given[0]}.', "strategy"
            )
        stages = self.pp * self.virtual_stages
        if self.layers_per_stage and len(self.layers_per_stage) != stages:
            raise _refusal(
                f"lists {len(self.layers_per_stage)} stages but pp x virtual_stages = {stages}: "
                "make them agree.",
                "layers_per_stage",
            )
        return self

    def resolve(self, microbatch: int | None) -> ParallelStrategy:
        """Return the strategy, with ``microbatch`` where it is known."""
        skip = ("strategy", "cp_ring", "cp_ulysses", "etp", "microbatch")
        values = {key: getattr(self, key) for key in type(self).model_fields if key not in skip}
        return ParallelStrategy(microbatch=microbatch or self.microbatch, **values)


class TrainWorkload(_Table):
    """One optimizer step."""

    kind: Literal["train"] = _key("What is to be run.")
    global_batch: Tokens = _key("Sequences of one step, over all replicas.", unit="sequences")
    seq_len: Tokens = _key("Length of a sequence.", unit="tokens")
    microbatch: Degree | None = _key("Alias of [parallel].microbatch.", None, unit="sequences")
    optimizer: Literal["adam"] = _key("Optimizer.", "adam")
    params_dtype: StorageDtype | None = _key(
        "Format of the parameters in training; by default weights_dtype.", None
    )
    grads_dtype: Literal["fp32", "bf16", "fp16"] = _key("Format of the gradients.", "fp32")


class GenerateWorkload(_Table):
    """A batch of prompts, each continued."""

    kind: Literal["generate"] = _key("What is to be run.")
    batch: Tokens = _key("Prompts.", unit="sequences")
    input_tokens: Tokens = _key("Length of a prompt.", unit="tokens")
    output_tokens: Tokens = _key("Tokens generated after each prompt.", unit="tokens")


class CollectiveWorkload(_Table):
    """One collective over the first ranks of the cluster."""

    kind: Literal["collective"] = _key("What is to be run.")
    op: Literal[
        "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send_recv"
    ] = _key("Collective.")
    bytes: Bytes = _key(
        "Size in nccl-tests' convention: the buffer of one rank, or the whole gathered one of "
        "all_gather and reduce_scatter.",
        unit="bytes",
    )
    ranks: Degree = _key("Ranks that take part, node by node.", unit="ranks")
    dtype: AnyDtype = _key("Format of the elements.", "bf16")
    implementation: Literal["default"] = _key("Library; only default in this version.", "default")

    @model_validator(mode="after")
    def _check_ranks(self) -> Self:
        if self.op == "send_recv" and self.ranks < 2:
            raise _refusal("= 1 is too few for send_recv: give at least 2.", "ranks")
        return self


class _OpTable(_Table):
    kind: Literal["op"] = _key("What is to be run.")
    dtype: AnyDtype = _key("Format of the operands.", "bf16")
    implementation: Literal["default"] = _key("Library; only default in this version.", "default")


class GemmWorkload(_OpTable):
    """The matrix product (m x k) (k x n)."""

    op: Literal["gemm"] = _key("Operator.")
    m: Tokens = _key("Rows of the left matrix.", unit="elements")
    n: Tokens = _key("Columns of the right matrix.", unit="elements")
    k: Tokens = _key("The dimension that both share.", unit="elements")

    def dims(self) -> dict[str, float]:
        """Return the operator's dimensions."""
        return {"m": self.m, "n": self.n, "k": self.k}


class _AttentionTable(_OpTable):
    batch: Tokens = _key("Sequences.", unit="sequences")
    heads: Width = _key("Query heads.", unit="heads")
    kv_heads: Width | None = _key(
        "Key and value heads; by default as many as heads.", None, unit="heads"
    )
    head_dim: Width = _key("Width of one head.", unit="elements")
    kv_dtype: AnyDtype | None = _key("Format of the KV cache; by default dtype.", None)

    @model_validator(mode="after")
    def _check_heads(self) -> Self:
        if self.heads % (self.kv_heads or self.heads):
            raise _refusal(f"= {self.kv_heads} does not divide heads = {self.heads}.", "kv_heads")
        return self

    def _shared_dims(self) -> dict[str, float]:
        return {
            "batch": self.batch,
            "heads": self.heads,
            "kv_heads": self.kv_heads or self.heads,
            "head_dim": self.head_dim,
            "kv_element_bytes": dtype_bytes(self.kv_dtype or self.dtype),
        }


class AttentionPrefillWorkload(_AttentionTable):
    """Attention of new rows over all rows."""

    op: Literal["attention_prefill"] = _key("Operator.")
    seq_len: Tokens = _key("New rows of each sequence.", unit="tokens")
    kv_len: Tokens | None = _key(
        "Rows attended to, the new ones included; by default seq_len.", None, unit="tokens"
    )
    causal: Flag = _key("Whether attention is causal.", True)

    @model_validator(mode="after")
    def _check_rows(self) -> Self:
        if self.kv_len is not None and self.kv_len < self.seq_len:
            raise _refusal(
                f"= {self.kv_len} is less than seq_len = {self.seq_len}: it counts new rows too.",
                "kv_len",
            )
        return self

    def dims(self) -> dict[str, float]:
        """Return the operator's dimensions."""
        own = {"seq_len": self.seq_len, "kv_len": self.kv_len or self.seq_len}
        return {**self._shared_dims(), **own, "causal": float(self.causal)}


class AttentionDecodeWorkload(_AttentionTable):
    """Attention of one new row over the cache."""

    op: Literal["attention_decode"] = _key("Operator.")
    kv_len: Tokens = _key("Rows attended to.", unit="tokens")

    def dims(self) -> dict[str, float]:
        """Return the operator's dimensions."""
        return {**self._shared_dims(), "kv_len": self.kv_len}


class MoeWorkload(_OpTable):
    """One fused MoE layer on one rank."""

    op: Literal["moe"] = _key("Operator.")
    tokens: Tokens = _key("Rows that enter the layer.", unit="tokens")
    hidden: Width = _key("Width of a row.", unit="elements")
    ffn: Width = _key("Inner width of one expert.", unit="elements")
    experts: Width = _key("Experts.", unit="experts")
    experts_per_token: Width = _key("Experts that a token visits.", unit="experts")
    tp: Degree = _key("Ranks that share each expert.", 1, unit="ranks")
    ep: Degree = _key("Ranks that share the set of experts.", 1, unit="ranks")
    routing: Literal["balanced", "power_law"] = _key("How tokens fall on experts.", "balanced")
    alpha: Exponent | None = _key("Exponent of power_law routing.", None)

    @model_validator(mode="after")
    def _check_routing(self) -> Self:
        if self.experts_per_token > self.experts:
            raise _refusal(
                f"= {self.experts_per_token} exceeds experts = {self.experts}.", "experts_per_token"
            )
        if self.experts % self.ep:
            raise _refusal(f"= {self.ep} does not divide experts = {self.experts}.", "ep")
        if self.ffn % self.tp:
            raise _refusal(f"= {self.tp} does not divide ffn = {self.ffn}.", "tp")
        if self.routing == "power_law" and self.alpha is None:
            raise _refusal("is missing: power_law routing needs it.", "alpha")
        if self.routing == "balanced" and self.alpha is not None:
            raise _refusal('belongs to routing = "power_law": remove it.', "alpha")
        return self

    def dims(self) -> dict[str, float]:
        """Return the operator's dimensions; ``alpha`` is 0 for balanced routing."""
        keys = ("tokens", "hidden", "ffn", "experts", "experts_per_token", "tp", "ep")
        return {**{key: getattr(self, key) for key in keys}, "alpha": self.alpha or 0.0}


OpWorkload = GemmWorkload | AttentionPrefillWorkload | AttentionDecodeWorkload | MoeWorkload
AnyWorkload = TrainWorkload | GenerateWorkload | CollectiveWorkload | OpWorkload


class DecodingTable(_Table):
    """How tokens are produced."""

    method: Literal["autoregressive"] = _key("Decoding method.", "autoregressive")


class GoalTable(_Table):
    """What a plan is to make small or large: one metric of the workload's kind."""

    minimise: Metric | None = _key("Metric to make small.", None)
    maximise: Metric | None = _key("Metric to make large.", None)

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        if (self.minimise is None) == (self.maximise is None):
            raise _refusal("needs exactly one of minimise and maximise.")
        return self


class RunTable(_Table):
    """How a real or simulated run is made."""

    seed: Annotated[int, Strict(), Field(ge=0, le=2**32 - 1)] = _key("Seed of every draw.", 0)
    backend: Literal["auto", "cpu", "gpu"] = _key("Where a real run takes place.", "auto")
    repeats: Annotated[int, Strict(), Field(ge=1, le=10**6)] = _key(
        "Measured repeats.", 5, unit="runs"
    )
    warmup: Annotated[int, Strict(), Field(ge=0, le=10**6)] = _key(
        "Repeats before the measured ones.", 2, unit="runs"
    )
    timeout_s: Seconds = _key("Time after which a real run is stopped.", 600.0, unit="seconds")


class Scenario(_Table):
    """One question: which model, on which cluster, laid out how, doing what."""

    model: ModelTable | None = _key("The network; train and generate need it.", None)
    cluster: ClusterTable = _key("The hardware.")
    parallel: ParallelTable | None = _key(
        "The parallel strategy; without it the planner chooses.", None
    )
    workload: Annotated[
        TrainWorkload
        | GenerateWorkload
        | CollectiveWorkload
        | Annotated[OpWorkload, Field(discriminator="op")],
        Field(discriminator="kind"),
    ] = _key("What is to be run; the other keys depend on kind, and on op.")
    decoding: DecodingTable | None = _key("How a generation produces tokens.", None)
    goal: GoalTable | None = _key("What a plan is to reach.", None)
    run: RunTable = _key("How a run is made.", RunTable())

    _folder: Path = PrivateAttr(default_factory=Path)

    @property
    def folder(self) -> Path:
        """The folder that relative paths start from."""
        return self._folder

    @property
    def world(self) -> int | None:
        """Number of ranks of the cluster, or None where only the named cluster knows it."""
        return self.cluster.world

    @property
    def microbatch(self) -> int | None:
        """Sequences of one microbatch, or None where the scenario leaves it open."""
        if self.parallel is not None and "microbatch" in self.parallel.model_fields_set:
            return self.parallel.microbatch
        return getattr(self.workload, "microbatch", None)

    def path(self, name: str) -> Path:
        """Return the file that a relative ``name`` in the scenario stands for."""
        return self._folder / name

    def model_spec(self) -> ModelSpec:
        """Return the network, its dtypes overridden where the scenario names them."""
        table = self.model
        if table is None:
            raise InputError("the table [model] is missing: give name, hf_config or the numbers.")
        if table.hf_config is not None:
            config = importlib.import_module("simcore.hf_config")
            spec: ModelSpec = config.load_hf_config(self.path(table.hf_config))
        elif table.inline:
            spec = table.inline_spec()
        else:
            spec = importlib.import_module("simcore.catalogue").load_model(table.name)
        dtypes = {key: getattr(table, key) for key in _MODEL_DTYPES if getattr(table, key)}
        return dataclasses.replace(spec, **dtypes)

    def strategy(self) -> ParallelStrategy | None:
        """Return the parallel strategy, or None where the planner is to choose."""
        if self.parallel is None or self.parallel.strategy == "auto":
            return None
        return self.parallel.resolve(self.microbatch)

    def work(self) -> TrainStep | Generation | CollectiveCall | OpCall:
        """Return what is to be run."""
        table = self.workload
        if isinstance(table, TrainWorkload):
            params = table.params_dtype or ""
            return TrainStep(
                table.global_batch, table.seq_len, table.optimizer, params, table.grads_dtype
            )
        if isinstance(table, GenerateWorkload):
            return Generation(table.batch, table.input_tokens, table.output_tokens)
        if isinstance(table, CollectiveWorkload):
            return CollectiveCall(table.op, float(table.bytes), table.ranks, table.dtype)
        return OpCall(table.op, table.dims(), table.dtype)


# ------------------------------------------------------------------------------- registry of keys

_KINDS: dict[str, type[_Table]] = {
    "train": TrainWorkload,
    "generate": GenerateWorkload,
    "collective": CollectiveWorkload,
}
_OPS: dict[str, type[_Table]] = {
    get_args(table.model_fields["op"].annotation)[0]: table for table in get_args(OpWorkload)
}
KINDS = (*_KINDS, "op")
_TABLES: dict[str, type[_Table]] = {
    "model": ModelTable,
    "cluster": ClusterTable,
    "parallel": ParallelTable,
    "decoding": DecodingTable,
    "goal": GoalTable,
    "run": RunTable,
}
TABLES = ("model", "cluster", "parallel", "workload", "decoding", "goal", "run")


def _homes(key: str) -> list[str]:
    """Return the tables, or kinds of workload, that have a key of this name."""
    found = [f"[{name}]" for name, table in _TABLES.items() if key in table.model_fields]
    found += [f"a {kind} [workload]" for kind, t in _KINDS.items() if key in t.model_fields]
    found += [f"a {op} [workload]" for op, table in _OPS.items() if key in table.model_fields]
    return found


# --------------------------------------------------------------------------- sentences of mistakes


def _shown(value: object) -> str:
    """Return a short, one-line picture of an offending value."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        digits = int(value.bit_length() * math.log10(2)) + 1
        return str(value) if digits <= 20 else f"a number of {digits} digits"
    if isinstance(value, str):
        return repr(value) if len(value) <= 40 else repr(value[:37] + "...")
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    return str(value)[:40] if isinstance(value, float) else f"a {type(value).__name__}"


def _named(key: object) -> str:
    """Return a key as it may stand in a sentence."""
    text = str(key) if isinstance(key, str) else _shown(key)
    text = text if text.isprintable() and text else repr(text)
    return text if len(text) <= 40 else text[:37] + "..."


def _is_later(place: tuple[str, str], value: object) -> bool:
    """Return whether a value is one of the format's that this version cannot honour yet."""
    if not isinstance(value, str):
        return False
    return place[1] == "implementation" or value in LATER_VALUES.get(place, ())


def _wrong_choice(place: tuple[str, str], value: object, choices: Iterable[str]) -> str:
    """Return the end of the sentence for a value that is none of ``choices``."""
    options = sorted(choices)
    if _is_later(place, value):
        return f"= {_shown(value)} is not available in this version: use {_either(options)}."
    near = nearest(value, options) if isinstance(value, str) and len(value) < 100 else None
    hint = f"did you mean {near!r}?" if near else f"give {_either(options)}."
    return f"= {_shown(value)} is not known: {hint}"


def _either(options: list[str]) -> str:
    quoted = [repr(option) for option in options]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} or {quoted[-1]}"


def _wrong_integer(value: object) -> str:
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return f"must be a whole number: write {int(value)} instead of {value}."
    if isinstance(value, str) and re.fullmatch(r"\d{1,15}", value):
        return f"must be a whole number: write {value} without quotes."
    hint = "; distributions are not available in this version" if isinstance(value, dict) else ""
    return f"must be a whole number, not {_shown(value)}{hint}."


def _wrong_number(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"= {_shown(value)} is out of range."
    if isinstance(value, str) and re.fullmatch(r"[0-9.eE+-]{1,20}", value):
        return f"must be a number: write {value} without quotes."
    return f"must be a number, not {_shown(value)}."


def _bounds(error: Mapping[str, Any]) -> str:
    context = error["ctx"]
    for bound, words in (("ge", "at least"), ("gt", "more than"), ("le", "at most")):
        if bound in context:
            limit = context[bound]
            limit = limit if isinstance(limit, int) else f"{limit:g}"
            return f"= {_shown(error['input'])} is out of range: it must be {words} {limit}."
    return "is out of range."


def _complaint(error: Mapping[str, Any], place: tuple[str, str]) -> str:
    """Return the end of the sentence for one of pydantic's errors."""
    kind, value = error["type"], error["input"]
    plain: dict[str, Callable[[], str]] = {
        "scenario": lambda: str(error["ctx"]["text"]),
        "missing": lambda: f"is missing: {_missing_hint(place)}",
        "literal_error": lambda: _wrong_choice(place, value, _expected(error)),
        "int_type": lambda: _wrong_integer(value),
        "int_from_float": lambda: _wrong_integer(value),
        "float_type": lambda: _wrong_number(value),
        "finite_number": lambda: f"must be a finite number, not {_shown(value)}.",
        "bool_type": lambda: f"must be true or false, not {_shown(value)}.",
        "string_type": lambda: f"must be text in quotes, not {_shown(value)}.",
        "string_too_long": lambda: f"= {_shown(value)} is too long: give at most 500 characters.",
        "tuple_type": lambda: f"must be a list, not {_shown(value)}.",
        "too_long": lambda: f"is {_shown(value)}: give at most 10000.",
    }
    for suffix in ("greater_than_equal", "greater_than", "less_than_equal"):
        plain[suffix] = lambda: _bounds(error)
    return plain[kind]() if kind in plain else f"= {_shown(value)} is not valid."


def _expected(error: Mapping[str, Any]) -> list[str]:
    return re.findall(r"'([^']*)'", error["ctx"]["expected"])


def _missing_hint(place: tuple[str, str]) -> str:
    table, key = place
    if not key:
        return {
            "workload": f"give its kind ({', '.join(KINDS)}) and the keys of that kind.",
            "cluster": "give gpu, gpus_per_node and nodes, or cluster.",
        }.get(table, "add it.")
    return f"this kind of [{table}] needs it."


def _place(loc: tuple[int | str, ...]) -> tuple[str, str, str]:
    """Return (table, key, index) of a pydantic location, less the tags of the workload's union."""
    table, rest = str(loc[0]), list(loc[1:])
    if table == "workload" and rest:
        rest = rest[2:] if rest[0] == "op" else rest[1:]
    index = "".join(f"[{part}]" for part in rest[1:] if isinstance(part, int))
    return table, str(rest[0]) if rest else "", index


def _sentence_of(error: Mapping[str, Any]) -> str:
    table, key, index = _place(error["loc"])
    key = key or error.get("ctx", {}).get("key", "")
    where = f"[{table}].{key}{index}" if key else f"[{table}]"
    where = f"the table {where}" if error["type"] == "missing" and not key else where
    return f"{where} {_complaint(error, (table, key))}"


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= MAX_SENTENCE else line[: MAX_SENTENCE - 3] + "..."


def _raise(problems: list[str]) -> NoReturn:
    more = len(problems) - 1
    tail = f" (and {more} more problem{'s' if more > 1 else ''})" if more else ""
    raise InputError(_one_line(problems[0])[: MAX_SENTENCE - len(tail)] + tail)


# ------------------------------------------------------------------------------ from raw to checked


def _workload_class(raw: object) -> tuple[type[_Table] | None, str]:
    """Return the class of a raw [workload] and "", or None and the sentence of what is wrong."""
    if not isinstance(raw, dict):
        return None, ""
    for key, table in (("kind", _KINDS), ("op", _OPS)):
        choices = KINDS if key == "kind" else tuple(_OPS)
        value = raw.get(key)
        if key not in raw:
            return None, f"[workload].{key} is missing: give {_either(sorted(choices))}."
        if not isinstance(value, str) or value not in choices:
            return None, _wrong_kind(key, value, choices)
        if value in table:
            return table[value], ""
    raise AssertionError("every kind has a class")


def _wrong_kind(key: str, value: object, choices: tuple[str, ...]) -> str:
    return f"[workload].{key} {_wrong_choice(('workload', key), value, choices)}"


def _unknown_table(name: object) -> str:
    if not isinstance(name, str):
        return f"{_named(name)} is not a table: the tables are {', '.join(TABLES)}."
    if name in LATER_TABLES:
        about = LATER_TABLES[name]
        return (
            f"[{name}] belongs to {about}, which this version does not offer: remove the table; "
            f"workload kinds are {', '.join(KINDS)}."
        )
    homes = _homes(name)
    if homes:
        return f"the key {_named(name)} stands outside any table: it belongs to {homes[0]}."
    near = nearest(name, TABLES) if len(name) < 100 else None
    hint = f"did you mean [{near}]?" if near else f"the tables are {', '.join(TABLES)}."
    return f"[{_named(name)}] is not a table: {hint}"


def _unknown_key(table: str, key: object, fields: Iterable[str], what: str) -> str:
    where = f"[{table}].{_named(key)}"
    name = key if isinstance(key, str) and len(key) < 100 else ""
    if name in LATER_KEYS.get(table, ()):
        return f"{where} is not available in this version: remove it."
    known = sorted(fields)
    homes = _homes(name)
    near = nearest(name, known) if name else None
    if homes:
        return f"{where} is not a key of {what}: it belongs to {homes[0]}."
    if near:
        return f"{where} is not a key of {what}: did you mean {near}?"
    listed = ", ".join(known[:14]) + (", ..." if len(known) > 14 else "")
    return f"{where} is not a key of {what}: its keys are {listed}."


def _structure(raw: Mapping[Any, Any]) -> tuple[list[str], dict[str, Any]]:
    """Return the faults of tables and keys, and the scenario less what is unknown."""
    problems: list[str] = []
    clean: dict[str, Any] = {}
    work, trouble = _workload_class(raw.get("workload"))
    if trouble:
        problems.append(trouble)
    for name, table in raw.items():
        if not isinstance(name, str) or name not in TABLES:
            problems.append(_unknown_table(name))
            continue
        if not isinstance(table, dict):
            problems.append(f"[{name}] must be a table of keys, not {_shown(table)}.")
            continue
        owner = work if name == "workload" else _TABLES[name]
        clean[name] = table if owner is None else _known_keys(name, table, owner, problems)
    return problems, clean


def _known_keys(
    name: str, table: dict[Any, Any], owner: type[_Table], problems: list[str]
) -> dict[str, Any]:
    """Return the table less unknown keys, which are added to ``problems``."""
    what = (
        f"a {table.get('op') if table['kind'] == 'op' else table['kind']} workload"
        if name == "workload"
        else f"[{name}]"
    )
    known = {key: value for key, value in table.items() if key in owner.model_fields}
    fields = owner.model_fields
    problems += [_unknown_key(name, key, fields, what) for key in table if key not in known]
    return known


# Faults that `_structure` has already put in words.
_STRUCTURAL = ("union_tag_invalid", "union_tag_not_found", "model_type", "model_attributes_type")


def _validate(raw: Mapping[Any, Any]) -> Scenario:
    """Return the checked scenario of a raw mapping."""
    problems, clean = _structure(raw)
    try:
        scenario = Scenario.model_validate(clean)
    except ValidationError as error:
        found = error.errors(include_url=False)
        absent = [e for e in found if e["type"] == "missing"]
        others = [e for e in found if e["type"] not in (*_STRUCTURAL, "missing")]
        named = [e for e in absent if not (len(e["loc"]) == 1 and e["loc"][0] in raw)]
        problems += [_sentence_of(e) for e in (*others, *named)]
        _raise(problems or ["the scenario is not valid."])
    if problems:
        _raise(problems)
    return scenario


def _check_tables(scenario: Scenario) -> None:
    """Raise where tables do not fit the workload's kind."""
    kind = scenario.workload.kind
    if kind in {"train", "generate"}:
        if scenario.model is None:
            raise InputError(f"the table [model] is missing: a {kind} workload needs it.")
    else:
        for name in ("model", "parallel", "goal"):
            if getattr(scenario, name) is not None:
                raise InputError(
                    f"[{name}] has no meaning for a workload of kind {kind!r}: remove it."
                )
    if scenario.decoding is not None and kind != "generate":
        raise InputError(f"[decoding] has no meaning for a workload of kind {kind!r}: remove it.")
    if scenario.goal is not None:
        _check_goal(scenario.goal, kind)
    if isinstance(scenario.workload, CollectiveWorkload):
        _check_ranks(scenario.workload.ranks, scenario.world)


def _check_goal(goal: GoalTable, kind: str) -> None:
    key = "minimise" if goal.minimise is not None else "maximise"
    metrics = get_args(TrainMetric if kind == "train" else GenerateMetric)
    metric = getattr(goal, key)
    if metric not in metrics:
        raise InputError(
            f"[goal].{key} = {metric!r} is no metric of a {kind} workload: "
            f"did you mean {nearest(metric, metrics) or metrics[0]!r}?"
        )


def _check_ranks(ranks: int, world: int | None) -> None:
    if world is not None and ranks > world:
        raise InputError(
            f"[workload].ranks = {ranks} exceeds the cluster's {world} ranks: lower it, or raise "
            "[cluster].gpus_per_node or nodes."
        )


def _check_microbatch(scenario: Scenario) -> None:
    alias = getattr(scenario.workload, "microbatch", None)
    if alias is not None and scenario.microbatch != alias:
        raise InputError(
            f"[workload].microbatch = {alias} disagrees with [parallel].microbatch = "
            f"{scenario.microbatch}: make them agree or drop one."
        )
    work = scenario.work()
    if isinstance(work, TrainStep) and alias and work.global_batch % alias:
        raise InputError(
            f"[workload].global_batch = {work.global_batch} is not a multiple of "
            f"microbatch = {alias}: change one."
        )


def _check_mesh(parallel: ParallelStrategy, world: int | None) -> None:
    """Raise where the mesh does not cover the cluster, in terms of the keys that are not 1."""
    if world is None or parallel.world == world:
        return
    degrees = [(axis, getattr(parallel, axis)) for axis in MESH_AXES]
    product = " x ".join(f"{axis} {degree}" for axis, degree in degrees if degree > 1) or "1"
    raise InputError(
        f"[parallel] makes {product} = {parallel.world} ranks but [cluster] has {world} "
        "(gpus_per_node x nodes): make them agree."
    )


def check_scenario(scenario: Scenario) -> None:
    """Raise `InputError` where tables contradict one another.

    Where only a named cluster knows the world, the caller checks that with `check_strategy`.
    """
    _check_tables(scenario)
    _check_microbatch(scenario)
    parallel = scenario.strategy()
    if parallel is not None:
        _check_mesh(parallel, scenario.world)
    if scenario.model is None:
        return
    spec = scenario.model_spec()
    if parallel is None:
        return
    stage_layers(spec, parallel)
    check_strategy(spec, parallel, parallel.world)
    work = scenario.work()
    if isinstance(work, TrainStep):
        microbatches(parallel, work)


# ------------------------------------------------------------------------------------------ reading


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise InputError(f"the key {_named(key)} stands twice in one table: keep one of them.")
        found[key] = value
    return found


def _no_constant(name: str) -> NoReturn:
    raise InputError(f"{name} is not a number that a scenario may hold: give a finite one.")


def _from_json(text: str) -> object:
    try:
        return json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise InputError(
            f"not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}."
        ) from None
    except ValueError:
        raise InputError("not valid JSON: a number has too many digits.") from None


# 64 key parts joined by dots: tomllib needs memory in the square of them.
_DEEP_KEY = re.compile(
    r"""(?<![\w-])(?:(?:[\w-]++|"(?:[^"\\\n]|\\.)*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+){64}"""
)


def _from_toml(text: str) -> object:
    if _DEEP_KEY.search(text):
        raise InputError("not valid TOML for a scenario: a dotted key is nested too deeply.")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"not valid TOML: {str(error)[:150]}.") from None
    except ValueError:
        raise InputError("not valid TOML: a number has too many digits.") from None


def _decode(data: bytes, suffix: str) -> object:
    """Return the raw value of a file's bytes; the suffix names the format, or the text does."""
    if len(data) > MAX_FILE_BYTES:
        raise InputError(f"is larger than {MAX_FILE_BYTES // 10**6} MB: a scenario is a few lines.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"not UTF-8 text (byte {error.start}): give a TOML or JSON scenario."
        ) from None
    if not text.strip():
        raise InputError("is empty: give the tables [model], [cluster] and [workload].")
    is_json = suffix == ".json" or (suffix != ".toml" and text.lstrip()[0] in '{["')
    return _from_json(text) if is_json and not _toml_header(text, suffix) else _from_toml(text)


def _toml_header(text: str, suffix: str) -> bool:
    """Return whether text of an unnamed format opens with a TOML table, as ``[model]``."""
    return suffix != ".json" and re.match(r"\s*\[\s*[A-Za-z_\"']", text) is not None


def _read_standard_input() -> bytes:
    if sys.stdin is None:
        raise InputError("is closed: pipe a TOML or JSON scenario into it.")
    if hasattr(sys.stdin, "buffer"):
        return sys.stdin.buffer.read(MAX_FILE_BYTES + 1)
    return sys.stdin.read(MAX_FILE_BYTES + 1).encode("utf-8", "surrogatepass")


def _read(source: str | Path) -> tuple[bytes, str]:
    """Return a file's bytes and its suffix; ``-`` is standard input."""
    if str(source) == "-":
        return _read_standard_input(), ""
    path = Path(source)
    try:
        if path.is_dir():
            raise InputError("is a folder: give a .toml or .json file.")
        with path.open("rb") as file:
            return file.read(MAX_FILE_BYTES + 1), path.suffix.lower()
    except FileNotFoundError:
        raise InputError("no such file: give the path of a .toml or .json scenario.") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a path"
        raise InputError(f"cannot be read: {reason}.") from None


def _origin(source: object) -> str:
    """Return the words that open a sentence about ``source``."""
    if not isinstance(source, str | Path):
        return ""
    if str(source) == "-":
        return "standard input: "
    text = str(source)
    text = text if text and text.isprintable() else repr(text)
    return (text if len(text) <= 60 else "..." + text[-57:]) + ": "


def _checked(raw: object, folder: Path) -> Scenario:
    """Return the scenario of a raw value, all its tables checked."""
    if not isinstance(raw, Mapping):
        raise InputError(f"a scenario is a table of tables, not {_shown(raw)}.")
    scenario = _validate(raw)
    scenario._folder = folder
    check_scenario(scenario)
    return scenario


def _guarded(make: Callable[[], Scenario], origin: str) -> Scenario:
    """Return ``make()``; open its complaints with ``origin``, and bound their length."""
    try:
        return make()
    except InputError as error:
        raise InputError(_one_line(origin + str(error))) from None
    except RecursionError:
        raise InputError(f"{origin}tables or lists are nested too deeply.") from None


def load_scenario(source: str | Path | Mapping[str, Any]) -> Scenario:
    """Return the scenario of a .toml or .json file, of ``-`` (standard input) or of a dict.

    Text that opens with a brace is read as JSON itself. Raises `InputError`.
    """
    if isinstance(source, str) and source.lstrip().startswith("{"):
        return parse_scenario(source)
    if isinstance(source, str | Path):
        path = source

        def read() -> Scenario:
            folder = Path() if str(path) == "-" else Path(path).parent
            return _checked(_decode(*_read(path)), folder)

        return _guarded(read, _origin(path))
    return _guarded(lambda: _checked(source, Path()), "")


def parse_scenario(text: str, folder: str | Path = ".") -> Scenario:
    """Return the scenario of JSON or TOML text, as one line of a JSON Lines file."""
    data = text.encode("utf-8", "surrogatepass")
    return _guarded(lambda: _checked(_decode(data, ""), Path(folder)), "")


def make_scenario(**tables: Any) -> Scenario:
    """Return the scenario of tables given as dicts or as this module's models."""
    raw = {
        name: table.model_dump(exclude_unset=True) if isinstance(table, BaseModel) else table
        for name, table in tables.items()
        if not isinstance(table, NoneType)
    }
    return load_scenario(raw)


# --------------------------------------------------------------------------------- schema and hash


def scenario_schema() -> dict[str, Any]:
    """Return the JSON Schema of a scenario, with the meaning and unit of every key."""
    schema = Scenario.model_json_schema()
    schema["title"] = "meshwise scenario"
    schema["$defs"]["ParallelTable"]["properties"]["schedule"]["enum"] = sorted(schedule_names())
    return schema


def scenario_hash(scenario: Scenario) -> str:
    """Return 16 hex digits that are equal for scenarios that mean the same."""
    data = scenario.model_dump(mode="json")
    strategy = scenario.strategy()
    data["parallel"] = "auto" if strategy is None else dataclasses.asdict(strategy)
    if "microbatch" in data["workload"]:
        data["workload"]["microbatch"] = scenario.microbatch
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]

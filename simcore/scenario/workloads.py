"""The table [workload], one class per kind and per operator."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from simcore.dtypes import dtype_bytes
from simcore.scenario.fields import (
    AnyDtype,
    Bytes,
    Degree,
    Documents,
    Exponent,
    Flag,
    Library,
    OpDtype,
    RunTokens,
    Size,
    StorageDtype,
    Table,
    Text,
    Tokens,
    Width,
    WindowLength,
    key_of,
    refusal,
)
from simcore.scenario.lengths import Lengths


class TrainWorkload(Table):
    """One optimizer step."""

    kind: Literal["train"] = key_of("What is to be run.")
    global_batch: Tokens = key_of("Sequences of one step, over all replicas.", unit="sequences")
    seq_len: Tokens = key_of("Length of a sequence, of the longest with lengths.", unit="tokens")
    lengths: Lengths | None = key_of(
        "Lengths of the sequences where they differ: a file with one a line, a list, or a "
        "log-normal law { median, sigma, seed } cut at seq_len.",
        None,
        unit="tokens",
    )
    documents: Documents = key_of(
        "Lengths of the documents that are packed in every sequence and do not see one another; "
        "empty: one.",
        (),
        unit="tokens",
    )
    microbatch: Degree | None = key_of("Alias of [parallel].microbatch.", None, unit="sequences")
    optimizer: Literal["adam"] = key_of("Optimizer.", "adam")
    params_dtype: StorageDtype | None = key_of(
        "Format of the parameters in training; by default weights_dtype.", None
    )
    grads_dtype: Literal["fp32", "bf16", "fp16"] = key_of("Format of the gradients.", "fp32")
    tokens: RunTokens | None = key_of(
        "Tokens of the whole run, whose days and cost are then told.", None, unit="tokens"
    )
    steps: Tokens | None = key_of("Steps of the whole run, in place of tokens.", None, unit="steps")

    @model_validator(mode="after")
    def _check_length(self) -> Self:
        if self.tokens is not None and self.steps is not None:
            raise refusal("and tokens exclude each other: keep one of them.", "steps")
        return self


class GenerateWorkload(Table):
    """A batch of prompts, each continued."""

    kind: Literal["generate"] = key_of("What is to be run.")
    batch: Tokens = key_of("Prompts.", unit="sequences")
    input_tokens: Tokens = key_of("Length of a prompt.", unit="tokens")
    output_tokens: Tokens = key_of("Tokens generated after each prompt.", unit="tokens")


class RecommendWorkload(Table):
    """One training step of a recommendation model, its tables shared out over all ranks."""

    kind: Literal["recommend"] = key_of("What is to be run.")
    global_batch: Tokens = key_of("Samples of one step, over all ranks.", unit="samples")


class CollectiveWorkload(Table):
    """One collective over the first ranks of the cluster."""

    kind: Literal["collective"] = key_of("What is to be run.")
    op: Literal[
        "all_reduce",
        "all_gather",
        "reduce_scatter",
        "all_to_all",
        "broadcast",
        "reduce",
        "gather",
        "scatter",
        "exclusive_scan",
        "send_recv",
    ] = key_of("Collective.")
    bytes: Bytes = key_of(
        "Size in nccl-tests' convention: the buffer of one rank, or the whole gathered one of "
        "all_gather and reduce_scatter.",
        unit="bytes",
    )
    ranks: Degree = key_of("Ranks that take part, node by node.", unit="ranks")
    dtype: AnyDtype = key_of("Format of the elements.", "bf16")
    implementation: Library = key_of("Library that runs it.", "default")

    @model_validator(mode="after")
    def _check_ranks(self) -> Self:
        if self.op == "send_recv" and self.ranks < 2:
            raise refusal("= 1 is too few for send_recv: give at least 2.", "ranks")
        return self


class _OpTable(Table):
    kind: Literal["op"] = key_of("What is to be run.")
    dtype: OpDtype = key_of(
        "Format of the operands; int4_wo, int8_wo: of the weights alone, the rest bf16.", "bf16"
    )
    implementation: Library = key_of(
        "Library that runs it; default: the mean of those that were measured.", "default"
    )


class GemmWorkload(_OpTable):
    """The matrix product (m x k) (k x n)."""

    op: Literal["gemm"] = key_of("Operator.")
    m: Tokens = key_of("Rows of the left matrix.", unit="elements")
    n: Tokens = key_of("Columns of the right matrix.", unit="elements")
    k: Tokens = key_of("The dimension that both share.", unit="elements")

    def dims(self) -> dict[str, float]:
        """Return the operator's dimensions."""
        return {"m": self.m, "n": self.n, "k": self.k}


class _AttentionTable(_OpTable):
    batch: Tokens = key_of("Sequences.", unit="sequences")
    heads: Width = key_of("Query heads.", unit="heads")
    kv_heads: Width | None = key_of(
        "Key and value heads; by default as many as heads.", None, unit="heads"
    )
    head_dim: Width = key_of("Width of one head.", unit="elements")
    kv_dtype: AnyDtype | None = key_of("Format of the KV cache; by default dtype.", None)
    window: WindowLength = key_of("Keys that a query sees at most; 0: all.", 0, unit="tokens")

    @model_validator(mode="after")
    def _check_heads(self) -> Self:
        if self.heads % (self.kv_heads or self.heads):
            raise refusal(f"= {self.kv_heads} does not divide heads = {self.heads}.", "kv_heads")
        return self

    def _shared_dims(self) -> dict[str, float]:
        return {
            "batch": self.batch,
            "heads": self.heads,
            "kv_heads": self.kv_heads or self.heads,
            "head_dim": self.head_dim,
            "kv_element_bytes": dtype_bytes(self.kv_dtype or self.dtype),
            "window": float(self.window),
        }


class AttentionPrefillWorkload(_AttentionTable):
    """Attention of new rows over all rows."""

    op: Literal["attention_prefill"] = key_of("Operator.")
    seq_len: Tokens = key_of("New rows of each sequence.", unit="tokens")
    kv_len: Tokens | None = key_of(
        "Rows attended to, the new ones included; by default seq_len.", None, unit="tokens"
    )
    causal: Flag = key_of("Whether attention is causal.", True)

    @model_validator(mode="after")
    def _check_rows(self) -> Self:
        if self.kv_len is not None and self.kv_len < self.seq_len:
            raise refusal(
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

    op: Literal["attention_decode"] = key_of("Operator.")
    kv_len: Tokens = key_of("Rows attended to.", unit="tokens")

    def dims(self) -> dict[str, float]:
        """Return the operator's dimensions."""
        return {**self._shared_dims(), "kv_len": self.kv_len}


class MoeWorkload(_OpTable):
    """One fused MoE layer on one rank."""

    op: Literal["moe"] = key_of("Operator.")
    tokens: Tokens = key_of("Rows that enter the layer.", unit="tokens")
    hidden: Width = key_of("Width of a row.", unit="elements")
    ffn: Width = key_of("Inner width of one expert.", unit="elements")
    experts: Width = key_of("Experts.", unit="experts")
    experts_per_token: Width = key_of("Experts that a token visits.", unit="experts")
    tp: Degree = key_of("Ranks that share each expert.", 1, unit="ranks")
    ep: Degree = key_of("Ranks that share the set of experts.", 1, unit="ranks")
    routing: Literal["balanced", "power_law"] = key_of("How tokens fall on experts.", "balanced")
    alpha: Exponent | None = key_of(
        "Exponent of power_law routing: experts draw their popularity x from a density x^-alpha.",
        None,
    )

    @model_validator(mode="after")
    def _check_routing(self) -> Self:
        if self.experts_per_token > self.experts:
            raise refusal(
                f"= {self.experts_per_token} exceeds experts = {self.experts}.", "experts_per_token"
            )
        if self.experts % self.ep:
            raise refusal(f"= {self.ep} does not divide experts = {self.experts}.", "ep")
        if self.ffn % self.tp:
            raise refusal(f"= {self.tp} does not divide ffn = {self.ffn}.", "tp")
        if self.routing == "power_law" and self.alpha is None:
            raise refusal("is missing: power_law routing needs it.", "alpha")
        if self.routing == "balanced" and self.alpha is not None:
            raise refusal('belongs to routing = "power_law": remove it.', "alpha")
        return self

    def dims(self) -> dict[str, float]:
        """Return the operator's dimensions; ``alpha`` is 0 for balanced routing."""
        keys = ("tokens", "hidden", "ffn", "experts", "experts_per_token", "tp", "ep")
        return {**{key: getattr(self, key) for key in keys}, "alpha": self.alpha or 0.0}


class RowwiseWorkload(_OpTable):
    """One pass over a matrix of rows: norms, activations, softmax, sampling, optimizer, copies."""

    op: Literal[
        "add", "adam", "copy", "embedding", "gelu", "layernorm", "quantise", "rmsnorm", "rope",
        "sample", "softmax_backward", "softmax_loss", "swiglu",
    ] = key_of("Operator.")  # fmt: skip
    rows: Tokens = key_of("Rows: tokens, or sequences.", unit="rows")
    columns: Tokens = key_of("Elements of a row: width, or vocabulary.", unit="elements")

    def dims(self) -> dict[str, float]:
        """Return the operator's dimensions."""
        return {"t": self.rows, "n": self.columns}


class MixerWorkload(_OpTable):
    """One form of a sequence mixer: linear attention, state spaces, recurrent networks."""

    op: Literal["mixer"] = key_of("Operator.")
    mixer: Text = key_of("Mixer, one of those that docs/systems.md lists.")
    form: Text = key_of("Form: parallel, chunked, recurrent, scan, newton, fused.")
    sizes: dict[Text, Size] = key_of("Sizes, column by column; they depend on the mixer.")

    def dims(self) -> dict[str, float]:
        """Return the sizes."""
        return dict(self.sizes)


class VariantWorkload(_OpTable):
    """A kind of attention priced from that of prefill or decode: docs/scenario.md has its sizes."""

    op: Literal[
        "attention_backward", "latent_attention_decode", "latent_attention_prefill",
        "paged_attention_decode", "shared_prefix_attention", "sparse_attention",
        "verify_attention",
    ] = key_of("Operator.")  # fmt: skip
    sizes: dict[Text, Size] = key_of("Sizes, column by column; they depend on the operator.")

    def dims(self) -> dict[str, float]:
        """Return the sizes."""
        return dict(self.sizes)


OpWorkload = (
    GemmWorkload
    | AttentionPrefillWorkload
    | AttentionDecodeWorkload
    | MoeWorkload
    | RowwiseWorkload
    | MixerWorkload
    | VariantWorkload
)
AnyWorkload = TrainWorkload | GenerateWorkload | RecommendWorkload | CollectiveWorkload | OpWorkload

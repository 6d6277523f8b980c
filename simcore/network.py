"""The forward op lists of a network's blocks under tensor parallelism.

Three kinds of block make a network: ``embed``, ``layer`` and ``head``. Residual stream ``h`` of
layer l is read as ``h`` and its result written as ``h+``, which is ``h`` of layer l + 1.
Tensor parallelism is Megatron-LM's (Shoeybi et al. 2019): column-parallel then row-parallel
products; with sequence parallelism (Korthikanti et al. 2022) the tokens between them are sharded
and all-reduce becomes all-gather before and reduce-scatter after.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from simcore.axes import attend, local_grid
from simcore.errors import InputError
from simcore.linear import linear_attention
from simcore.models import GRID, LINEAR, ModelSpec
from simcore.ops import Buffer, Op, Size
from simcore.ring import exchanged, split_attention
from simcore.sequence import WHOLE, SequenceSplit
from simcore.servers import serve


@dataclass(slots=True)
class Builder:
    """Collects the ops and buffers of one block."""

    prefix: str
    dtype: str
    buffers: dict[str, Buffer]
    ops: list[Op] = field(default_factory=list)
    layered: bool = True

    def act(self, name: str, *dims: Size, dtype: str = "", scope: str = "act") -> str:
        """Declare a buffer and return its name."""
        self.buffers[name.removesuffix("+")] = Buffer(dims, dtype or self.dtype, scope)
        return name

    def weight(
        self,
        name: str,
        *dims: Size,
        dtype: str,
        pieces: tuple[Size, ...] = (),
        shard_dim: int = -1,
        partial: bool = False,
        init: str = "normal",
    ) -> str:
        """Declare a weight of this block and return its full name."""
        full = f"{self.prefix}.{name}"
        self.buffers[full] = Buffer(
            dims,
            dtype,
            "weight",
            self.layered,
            pieces=pieces,
            shard_dim=shard_dim,
            partial=partial,
            init=init,
        )
        return full

    def op(
        self,
        kind: str,
        reads: tuple[str, ...],
        writes: tuple[str, ...],
        *,
        stream: str = "compute",
        group: str = "",
        dtype: str = "",
        attrs: dict[str, Any] | None = None,
        **dims: Size,
    ) -> str:
        """Append an op and return its first result."""
        self.ops.append(
            Op(kind, dims, dtype or self.dtype, reads, writes, stream, group, attrs or {})
        )
        return writes[0]


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of one pass: ``batch`` sequences of ``new`` rows over ``cached`` earlier ones."""

    batch: Size
    new: Size
    cached: Size = 0
    keep_cache: bool = False  # generation: keys and values go to a cache
    split: SequenceSplit = WHOLE  # how the ranks that share the sequences do so
    documents: tuple[int, ...] = ()  # packed in each sequence; empty: one
    task_rows: int = 0  # of attention in tasks; 0: as many as `servers` takes

    @property
    def tokens(self) -> Size:
        """New tokens of the pass."""
        return self.batch * self.new


@dataclass(frozen=True, slots=True)
class TensorParallel:
    """Degree of tensor parallelism (a number or an array) and whether tokens are sharded too."""

    degree: Size = 1
    sequence: bool = False

    @property
    def present(self) -> bool:
        """Whether collectives are emitted: always for arrays, where degree 1 costs nothing."""
        return not (np.ndim(self.degree) == 0 and self.degree == 1)

    @property
    def shards_tokens(self) -> bool:
        """Whether activations between products hold a part of the tokens."""
        return self.sequence and self.present

    def local(self, tokens: Size) -> Size:
        """Return the tokens held by a rank outside the parallel products."""
        return tokens // self.degree if self.shards_tokens else tokens

    def split(self, size: Size) -> Size:
        """Return the ceiling of ``size`` over the degree."""
        return -(-size // self.degree)

    def enter(self, b: Builder, x: str, tokens: Size, width: Size) -> str:
        """Make ``x`` whole before a column-parallel product."""
        if not self.present:
            return x
        kind = "all_gather" if self.shards_tokens else "alias"
        out = b.act(f"{x}.whole", tokens, width)
        return b.op(
            kind,
            (x,),
            (out,),
            n=tokens * width,
            group="tp",
            stream="tp" if self.shards_tokens else "compute",
        )

    def leave(self, b: Builder, y: str, tokens: Size, width: Size) -> str:
        """Sum the partial results of a row-parallel product."""
        if not self.present:
            return y
        kind = "reduce_scatter" if self.shards_tokens else "all_reduce"
        out = b.act(f"{y}.sum", self.local(tokens), width)
        return b.op(kind, (y,), (out,), n=tokens * width, group="tp", stream="tp")


def _norm(b: Builder, model: ModelSpec, x: str, name: str, tokens: Size, width: int = 0) -> str:
    """Append the model's norm of ``x``; return the result's name."""
    width = width or model.hidden
    dtype = model.weights_dtype if model.weights_dtype in TRAINABLE else b.dtype
    weights = [b.weight(f"{name}.scale", width, dtype=dtype, init="ones")]
    if model.norm == "layernorm" and model.norm_bias:
        weights.append(b.weight(f"{name}.shift", width, dtype=dtype, init="zeros"))
    out = b.act(name, tokens, width)
    return b.op(model.norm, (x, *weights), (out,), t=tokens, n=width)


TRAINABLE = ("bf16", "fp16", "fp32", "fp64")


def _linear(
    b: Builder,
    model: ModelSpec,
    x: str,
    name: str,
    m: Size,
    n: Size,
    k: Size,
    *,
    pieces: tuple[Size, ...] = (),
    bias: bool = False,
    shard_dim: int = -1,
) -> str:
    """Append y = x W^T; a bias of a row-parallel product is added by `_row_bias` instead."""
    dtype = model.weights_dtype
    weight = b.weight(f"w{name}", n, k, dtype=dtype, pieces=pieces, shard_dim=shard_dim)
    reads: tuple[str, ...] = (x, weight)
    if bias:
        row = b.weight(f"b{name}", n, dtype=dtype, pieces=pieces, shard_dim=shard_dim, init="zeros")
        reads += (row,)
    out = b.act(name, m, n)
    return b.op(
        "matmul", reads, (out,), m=m, n=n, k=k, attrs={"layout": "nt", "weight_dtype": dtype}
    )


def _row_bias(b: Builder, model: ModelSpec, y: str, name: str, tokens: Size) -> str:
    row = b.weight(f"b{name}", model.hidden, dtype=model.weights_dtype, init="zeros")
    out = b.act(f"{name}.biased", tokens, model.hidden)
    return b.op("bias", (y, row), (out,), t=tokens, n=model.hidden)


def _attention(
    b: Builder, model: ModelSpec, tp: TensorParallel, rows: Rows, x: str, mixer: str
) -> str:
    """Append grouped-query attention on normed, whole ``x``; return the summed result."""
    tokens, d = rows.tokens, model.head_dim
    heads = tp.split(model.heads)
    kv_heads = tp.split(model.kv_heads)
    width = (heads + 2 * kv_heads) * d
    full = (model.heads * d, model.kv_heads * d, model.kv_heads * d)
    qkv = _linear(
        b,
        model,
        x,
        "qkv",
        tokens,
        width,
        model.hidden,
        pieces=full,
        bias=model.qkv_bias,
        shard_dim=0,
    )
    attrs: dict[str, Any] = {"heads": heads, "kv_heads": kv_heads, "head_dim": d}
    if model.qk_norm:
        scales = tuple(
            b.weight(f"{part}.scale", d, dtype=model.weights_dtype, init="ones", partial=True)
            for part in ("q", "k")
        )
        qkv = b.op(
            "head_norm",
            (qkv, *scales),
            (b.act("qkv.norm", tokens, width),),
            t=tokens,
            n=(heads + kv_heads) * d,
            attrs=attrs,
        )
    if model.position == "rope":
        turned = b.act("qkv.rope", tokens, width)
        qkv = b.op(
            "rope", (qkv, "positions"), (turned,), t=tokens, n=(heads + kv_heads) * d, attrs=attrs
        )
    if mixer == LINEAR:
        sizes = rows.batch, rows.new, heads, kv_heads, d
        out = linear_attention(b, rows.split, sizes, model.linear_decay, qkv)
        return _attended(b, model, tp, out, tokens, heads * d)
    if mixer in GRID:
        out = exchanged(
            b,
            rows,
            qkv,
            (heads, kv_heads, d),
            lambda x, sizes: attend(
                b, rows.batch, local_grid(model, rows.split, rows.new, mixer), mixer, x, sizes,
                causal=model.causal,
            ),
        )  # fmt: skip
        return _attended(b, model, tp, out, tokens, heads * d)
    if rows.documents or rows.split.travels == "tasks":
        out = serve(b, rows, qkv, heads, kv_heads, d)
        return _attended(b, model, tp, out, tokens, heads * d)
    if rows.split.degree > 1:
        out = split_attention(b, rows, qkv, heads, kv_heads, d, causal=model.causal)
        return _attended(b, model, tp, out, tokens, heads * d)
    out = b.act("o", tokens, heads * d)
    lse = b.act("lse", rows.batch, heads, rows.new, dtype="fp32")
    reads: tuple[str, ...] = (qkv,)
    if rows.keep_cache:
        length = rows.cached + rows.new
        cache = b.act(
            "cache", 2, rows.batch, kv_heads, length, d, dtype=model.kv_dtype, scope="cache"
        )
        attrs = {
            "kv_dtype": model.kv_dtype,
            "heads": heads,
            "kv_heads": kv_heads,
            "head_dim": d,
            "b": rows.batch,
        }
        b.op("cache_append", (qkv,), (cache,), t=tokens, n=2 * kv_heads * d, attrs=attrs)
        reads += (cache,)
    b.op(
        "attention",
        reads,
        (out, lse),
        b=rows.batch,
        s=rows.new,
        kv=rows.cached + rows.new,
        h=heads,
        hkv=kv_heads,
        d=d,
        dv=d,
        attrs={"causal": model.causal, "kv_dtype": model.kv_dtype if rows.keep_cache else b.dtype},
    )
    return _attended(b, model, tp, out, tokens, heads * d)


def _attended(
    b: Builder, model: ModelSpec, tp: TensorParallel, out: str, tokens: Size, width: Size
) -> str:
    """Append the product that ends attention; return the summed result."""
    y = _linear(b, model, out, "y", tokens, model.hidden, width, shard_dim=1)
    y = tp.leave(b, y, tokens, model.hidden)
    return _row_bias(b, model, y, "y", tp.local(tokens)) if model.out_bias else y


def _ffn(b: Builder, model: ModelSpec, tp: TensorParallel, tokens: Size, x: str) -> str:
    """Append the dense FFN on normed, whole ``x``; return the summed result."""
    ffn = tp.split(model.ffn)
    gated = model.ffn_kind == "gated"
    pieces = (model.ffn, model.ffn) if gated else (model.ffn,)
    up = _linear(
        b,
        model,
        x,
        "up",
        tokens,
        ffn * len(pieces),
        model.hidden,
        pieces=pieces,
        bias=model.ffn_bias,
        shard_dim=0,
    )
    kind = "swiglu" if gated else ("relu" if model.activation == "relu" else "gelu")
    act = b.op(
        kind,
        (up,),
        (b.act("act", tokens, ffn),),
        t=tokens,
        n=ffn,
        attrs={"activation": model.activation},
    )
    z = _linear(b, model, act, "z", tokens, model.hidden, ffn, shard_dim=1)
    z = tp.leave(b, z, tokens, model.hidden)
    return _row_bias(b, model, z, "z", tp.local(tokens)) if model.ffn_bias else z


FeedForward = Callable[[Builder, ModelSpec, TensorParallel, Size, str], str]


def _dense(b: Builder, model: ModelSpec, tp: TensorParallel, tokens: Size, x: str) -> str:
    """Append the dense FFN on this rank's rows of normed ``x``."""
    return _ffn(b, model, tp, tokens, tp.enter(b, x, tokens, model.hidden))


def check_lowerable(model: ModelSpec, length: int) -> None:
    """Raise `InputError` where a network has parts that no op covers yet at ``length`` tokens."""
    missing = {
        "experts beside attention on one normed input": (
            model.experts > 0 and model.parallel_block
        ),
        "experts with biases": model.experts > 0 and model.ffn_bias,
        "a gate on its shared experts": model.shared_gate,
        "latent attention (MLA)": model.kv_lora_rank > 0,
        "state-space layers": "ssm" in model.mixers,
        "linear layers on a grid of frames": model.frames > 0 and LINEAR in model.mixers,
        "linear layers beside experts": model.experts > 0 and LINEAR in model.mixers,
        "linear layers without a causal mask": not model.causal and LINEAR in model.mixers,
        "layers that slide over fewer tokens than a sequence has": (
            "sliding" in model.mixers and 0 < model.sliding_window < length
        ),
        "attention sinks": model.attention_sinks,
        "a norm of the embedding": model.embedding_norm,
        "ALiBi positions": model.position == "alibi",
        "an embedding narrower than hidden": model.embedding_dim not in (0, model.hidden),
    }
    found = [what for what, present in missing.items() if present]
    if found:
        raise InputError(
            f"model {model.name!r} has {' and '.join(found)}, which this version counts but does "
            "not run or price yet: choose a dense model such as 'llama-3.1-8b'."
        )


def layer_block(
    model: ModelSpec,
    tp: TensorParallel,
    rows: Rows,
    buffers: dict[str, Buffer],
    *,
    prefix: str = "layer",
    ffn: FeedForward = _dense,
    mixer: str = "",
) -> list[Op]:
    """Return the forward ops of one transformer layer: h -> h+.

    ``ffn`` appends the feed-forward part on this rank's normed rows, one after attention only.
    ``mixer``: how tokens mix; empty: full attention.
    """
    b = Builder(prefix, model.compute_dtype, buffers)
    tokens, local, hidden = rows.tokens, tp.local(rows.tokens), model.hidden
    b.act("h", local, hidden)
    normed = tp.enter(b, _norm(b, model, "h", "n1", local), tokens, hidden)
    y = _attention(b, model, tp, rows, normed, mixer)
    if model.parallel_block:
        second = normed
        if model.norms_per_layer > 1:
            second = tp.enter(b, _norm(b, model, "h", "n2", local), tokens, hidden)
        z = _ffn(b, model, tp, tokens, second)
        both = b.op("add", (y, z), (b.act("yz", local, hidden),), t=local, n=hidden)
        b.op("add", ("h", both), ("h+",), t=local, n=hidden)
        return b.ops
    after = model.norms_per_layer > 2
    y = _norm(b, model, y, "n1.after", local) if after else y
    mid = b.op("add", ("h", y), (b.act("mid", local, hidden),), t=local, n=hidden)
    z = ffn(b, model, tp, tokens, _norm(b, model, mid, "n2", local))
    z = _norm(b, model, z, "n2.after", local) if after else z
    b.op("add", (mid, z), ("h+",), t=local, n=hidden)
    return b.ops


def embed_block(
    model: ModelSpec, tp: TensorParallel, rows: Rows, buffers: dict[str, Buffer]
) -> list[Op]:
    """Return the forward ops from token numbers to the residual stream: tokens -> h."""
    b = Builder("embed", model.compute_dtype, buffers, layered=False)
    tokens, hidden = rows.tokens, model.hidden
    vocab = tp.split(model.vocab)
    buffers["tokens"] = Buffer((tokens,), "int64", "data", layered=False)
    table = b.weight(
        "table", vocab, hidden, dtype=model.weights_dtype, pieces=(model.vocab,), shard_dim=0
    )
    group = "tp" if tp.present else ""
    whole = model.position != "learned"
    out = "h" if whole and not tp.present else b.act("e", tokens, hidden)
    b.act("h", tp.local(tokens), hidden)
    b.op(
        "embedding",
        (table, "tokens"),
        (out,),
        t=tokens,
        n=hidden,
        attrs={"vocab_axis": group, "vocab": model.vocab},
    )
    if tp.present:
        kind = "reduce_scatter" if tp.shards_tokens else "all_reduce"
        total = "h" if whole else b.act("e.sum", tp.local(tokens), hidden)
        out = b.op(kind, (out,), (total,), n=tokens * hidden, group="tp", stream="tp")
    if model.position == "learned":
        positions = b.weight("positions", model.max_positions, hidden, dtype=model.weights_dtype)
        rows_of = b.act("p", tp.local(tokens), hidden)
        b.op(
            "embedding",
            (positions, "positions"),
            (rows_of,),
            t=tp.local(tokens),
            n=hidden,
            attrs={"shard_axis": "tp" if tp.shards_tokens else ""},
        )
        b.op("add", (out, rows_of), ("h",), t=tp.local(tokens), n=hidden)
    return b.ops


def head_block(
    model: ModelSpec, tp: TensorParallel, rows: Rows, buffers: dict[str, Buffer], loss_scale: Size
) -> list[Op]:
    """Return the ops from the residual stream to the loss, or to the next tokens.

    With ``loss_scale`` zero the block samples. The vocabulary is sharded over tp; three fp32
    numbers per token and rank are gathered to finish the softmax.
    """
    b = Builder("head", model.compute_dtype, buffers, layered=False)
    tokens, local, hidden = rows.tokens, tp.local(rows.tokens), model.hidden
    vocab = tp.split(model.vocab)
    stream = b.act("h", local, hidden)
    if rows.keep_cache:
        stream, tokens, local = _last_rows(b, rows, stream, hidden), rows.batch, rows.batch
    normed = _norm(b, model, stream, "nf", local) if model.final_norm else stream
    normed = tp.enter(b, normed, tokens, hidden)
    if model.tied_embeddings:
        logits = b.act("logits", tokens, vocab)
        b.op(
            "matmul",
            (normed, "embed.table"),
            (logits,),
            m=tokens,
            n=vocab,
            k=hidden,
            attrs={"layout": "nt", "weight_dtype": model.weights_dtype},
        )
    else:
        logits = _linear(
            b,
            model,
            normed,
            "logits",
            tokens,
            vocab,
            hidden,
            pieces=(model.vocab,),
            bias=model.head_bias,
            shard_dim=0,
        )
    if np.ndim(loss_scale) == 0 and loss_scale == 0:
        return _sample(b, model, tp, tokens, logits)
    buffers["targets"] = Buffer((tokens,), "int64", "data", layered=False)
    group = "tp" if tp.present else ""
    attrs = {"vocab_axis": group, "vocab": model.vocab, "scale": loss_scale}
    stats = b.act("stats", tokens, 3, dtype="fp32")
    b.op("softmax_stats", (logits, "targets"), (stats,), t=tokens, n=vocab, attrs=attrs)
    if tp.present:
        whole = b.act("stats.all", tp.degree * tokens, 3, dtype="fp32")
        stats = b.op(
            "all_gather",
            (stats,),
            (whole,),
            n=tp.degree * tokens * 3,
            dtype="fp32",
            group="tp",
            stream="tp",
        )
    loss, lse = b.act("loss", 1, dtype="fp32"), b.act("logits.lse", tokens, dtype="fp32")
    b.op("softmax_loss", (logits, "targets", stats), (loss, lse), t=tokens, n=vocab, attrs=attrs)
    return b.ops


def _last_rows(b: Builder, rows: Rows, x: str, hidden: int) -> str:
    """Append the choice of every sequence's last row: only it goes through the head."""
    if np.ndim(rows.new) == 0 and rows.new == 1:
        return x
    out = b.act("last", rows.batch, hidden)
    return b.op("last_rows", (x,), (out,), t=rows.batch, n=hidden)


def _sample(
    b: Builder, model: ModelSpec, tp: TensorParallel, tokens: Size, logits: str
) -> list[Op]:
    """Append the choice of the next token from every row's logits, gathered over tp."""
    vocab = tp.split(model.vocab)
    if tp.present:
        whole = b.act("logits.all", tp.degree * tokens, vocab)
        logits = b.op(
            "all_gather", (logits,), (whole,), n=tp.degree * tokens * vocab, group="tp", stream="tp"
        )
    out = b.act("next", tokens, dtype="int64")
    b.op(
        "sample",
        (logits,),
        (out,),
        t=tokens,
        n=vocab * tp.degree,
        attrs={"shards": tp.degree, "vocab": model.vocab},
    )
    return b.ops

"""The torch function of every compute op kind.

A function takes the context of the run, the op and the tensors that it reads, and returns one
tensor per buffer that it writes. `OPS` is the registry; communication lives in `interpreter`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from backends.codec_ops import CODEC_OPS
from backends.linear_ops import LINEAR_OPS
from backends.moe_ops import MOE_OPS
from backends.recommend_ops import RECOMMEND_OPS
from backends.ring_ops import RING_OPS, takes_part
from backends.server_ops import SERVER_OPS
from backends.stream_ops import STREAM_OPS
from simcore.ops import Op

TORCH_DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int64": torch.int64,
    "int32": torch.int32,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
Results = Sequence[Tensor]
Outs = Sequence[Tensor | None]  # the tensor to write into, where the buffer outlives the action


@dataclass(slots=True)
class Context:
    """What an op may ask about its rank.

    ``index(axis)`` and ``degree(axis)`` come from the mesh; ``cached`` is the number of rows in
    the key-value cache before this pass; ``fused`` picks torch's fused attention.
    """

    index: Callable[[str], int]
    degree: Callable[[str], int]
    device: torch.device
    fused: bool = True
    cached: int = 0
    rows: int = 0  # longest sequence so far, cached rows included
    step: int = 1
    dtype: torch.dtype | None = None  # overrides every float dtype

    def float_dtype(self, name: str) -> torch.dtype:
        """Return in what a float format of that name is kept in this run."""
        return self.dtype or TORCH_DTYPES[name]


def _matmul(ctx: Context, op: Op, reads: Results, outs: Outs) -> Results:
    out = outs[0]
    x, w = reads[0], reads[1]
    layout = op.attrs["layout"]
    if layout == "nt":
        if len(reads) > 2:
            return (torch.addmm(reads[2], x, w.t()),)
        return (torch.mm(x, w.t()),)
    if layout == "nn":
        return (torch.mm(x, w),)
    if out is None:
        return (torch.mm(x.t(), w),)
    if out.dtype == x.dtype:
        out.addmm_(x.t(), w)
    else:
        out += torch.mm(x.t(), w)
    return (out,)


def _bias(ctx: Context, op: Op, reads: Results, outs: Outs) -> Results:
    return (reads[0] + reads[1],)


def _added(out: Tensor | None, part: Tensor) -> Tensor:
    """Add to a gradient that accumulates."""
    assert out is not None
    return out.add_(part)


def _sum_rows(ctx: Context, op: Op, reads: Results, outs: Outs) -> Results:
    return (_added(outs[0], reads[0].sum(0)),)


def _vocab_offset(ctx: Context, op: Op, local: int) -> int:
    axis = op.attrs.get("vocab_axis", "")
    return ctx.index(axis) * local if axis else 0


def _embedding(ctx: Context, op: Op, reads: Results, outs: Outs) -> Results:
    table, tokens = reads
    axis = op.attrs.get("shard_axis", "")
    if axis:
        tokens = tokens.chunk(ctx.degree(axis))[ctx.index(axis)]
    if not op.attrs.get("vocab_axis"):
        return (F.embedding(tokens, table),)
    local = tokens - _vocab_offset(ctx, op, table.shape[0])
    inside = (local >= 0) & (local < table.shape[0])
    return (F.embedding(local.clamp(0, table.shape[0] - 1), table) * inside[:, None],)


def _embedding_backward(ctx: Context, op: Op, reads: Results, outs: Outs) -> Results:
    out = outs[0]
    assert out is not None
    dy, tokens = reads
    axis = op.attrs.get("shard_axis", "")
    if axis:
        tokens = tokens.chunk(ctx.degree(axis))[ctx.index(axis)]
    dy = dy.to(out.dtype)
    if not op.attrs.get("vocab_axis"):
        return (out.index_add_(0, tokens, dy),)
    local = tokens - _vocab_offset(ctx, op, out.shape[0])
    inside = (local >= 0) & (local < out.shape[0])
    return (out.index_add_(0, local.clamp(0, out.shape[0] - 1), dy * inside[:, None]),)


EPSILON = 1e-5


def _wide(x: Tensor) -> Tensor:
    """Return ``x`` in at least single precision."""
    return x if x.dtype == torch.float64 else x.float()


def _rmsnorm(ctx: Context, op: Op, reads: Results, outs: Outs) -> Results:
    return (F.rms_norm(reads[0], reads[0].shape[-1:], reads[1], EPSILON),)


def _rmsnorm_backward(ctx: Context, op: Op, reads: Results, outs: Outs) -> Results:
    dx, grad = _rms_gradients(*reads)
    return (dx, _added(outs[1], grad.sum(0)))


def _rms_gradients(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient of the input, and per row that of the scale."""
    inverse = torch.rsqrt(_wide(x).pow(2).mean(-1, keepdim=True) + EPSILON).to(x.dtype)
    normed = x * inverse
    scaled = dy * weight
    mean = torch.linalg.vecdot(scaled, normed).unsqueeze(-1) / x.shape[-1]
    dx = torch.addcmul(scaled, normed, mean, value=-1).mul_(inverse)
    return dx, normed.mul_(dy)


def _head_norm(ctx: Context, op: Op, reads: Results, outs: Outs) -> Results:
    """Norm every head of the queries and of the keys of packed rows; values pass unchanged."""
    qkv = reads[0]
    result = qkv.clone()
    for part, scale in zip(_normed_heads(op, result), reads[1:], strict=True):
        part.copy_(F.rms_norm(part, part.shape[-1:], scale, EPSILON))
    return (result,)


def _normed_heads(op: Op, packed: Tensor) -> tuple[Tensor, Tensor]:
    """Return views of the query and the key heads, each [rows, heads, d]."""
    heads, keys, d = op.attrs["heads"], op.attrs["kv_heads"], op.attrs["head_dim"]
    each = packed.view(packed.shape[0], -1, d)
    return each[:, :heads], each[:, heads : heads + keys]


def _head_norm_backward(ctx: Context, op: Op, reads: Results, outs: Outs) -> Results:
    dy, qkv = reads[:2]
    result, grads = dy.clone(), []
    parts = zip(_normed_heads(op, result), _normed_heads(op, qkv), reads[2:], outs[1:], strict=True)
    for part, x, scale, out in parts:
        dx, grad = _rms_gradients(part, x, scale)
        part.copy_(dx)
        grads.append(_added(out, grad.sum((0, 1))))
    return (result, *grads)


def _layernorm(ctx: Context, op: Op, reads: Results, outs: Outs) -> Results:
    shift = reads[2] if len(reads) > 2 else None
    return (F.layer_norm(reads[0], reads[0].shape[-1:], reads[1], shift, EPSILON),)


def _layernorm_backward(ctx: Context, op: Op, reads: Results, outs: Outs) -> Results:
    dy, x, weight = reads
    wide = _wide(x)
    mean = wide.mean(-1, keepdim=True)
    inverse = torch.rsqrt(wide.var(-1, keepdim=True, unbiased=False) + EPSILON)
    mask = [True, True, len(outs) > 2]
    dx, dw, db = torch.ops.aten.native_layer_norm_backward(
        dy,
        x,
        x.shape[-1:],
        mean.to(x.dtype),
        inverse.to(x.dtype),
        weight,
        torch.zeros_like(weight),
        mask,
    )
    sums = [_added(out, part) for out, part in zip(outs[1:], (dw, db), strict=False)]
    return (dx, *sums)


_ROPE: dict[Any, tuple[Tensor, Tensor]] = {}
ROPE_BASE = 10000.0


def _rotation(rows: int, d: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cos and sin tables of at least ``rows`` positions, each [rows, d / 2]."""
    key = (d, device, dtype)
    held = _ROPE.get(key)
    if held is None or held[0].shape[0] < rows:
        length = max(256, 2 ** math.ceil(math.log2(rows)))
        angles = torch.outer(
            torch.arange(length, device=device, dtype=torch.float64),
            ROPE_BASE ** (-torch.arange(0, d, 2, device=device, dtype=torch.float64) / d),
        )
        held = _ROPE[key] = (angles.cos().to(dtype), angles.sin().to(dtype))
    return held


def _rope(ctx: Context, op: Op, reads: Results, outs: Outs) -> Results:
    """Rotate the halves of queries and keys (Su et al. 2021); values pass unchanged."""
    x, positions = reads
    heads, d = op.attrs["heads"] + op.attrs["kv_heads"], op.attrs["head_dim"]
    tables = _rotation(ctx.rows, d, x.device, x.dtype)
    cos, sin = (table[positions][:, None] for table in tables)
    if op.attrs.get("inverse"):
        sin = -sin
    result = torch.empty_like(x)
    turned = x[:, : heads * d].view(-1, heads, 2, d // 2)
    target = result[:, : heads * d].view(-1, heads, 2, d // 2)
    first, second = turned[:, :, 0], turned[:, :, 1]
    torch.sub(first * cos, second * sin, out=target[:, :, 0])
    torch.add(second * cos, first * sin, out=target[:, :, 1])
    result[:, heads * d :] = x[:, heads * d :]
    return (result,)


def _swiglu(ctx: Context, op: Op, reads: Results, outs: Outs) -> Results:
    gate, up = reads[0].chunk(2, -1)
    kind = op.attrs.get("activation", "silu")
    return ((F.silu(gate) if kind == "silu" else _gelu_of(gate, kind)) * up,)


def _swiglu_backward(ctx: Context, op: Op, reads: Results, outs: Outs) -> Results:
    dy, both = reads
    gate, up = both.chunk(2, -1)
    result = torch.empty_like(both)
    dgate, dup = result.chunk(2, -1)
    kind = op.attrs.get("activation", "silu")
    if kind == "silu":
        torch.mul(dy, F.silu(gate), out=dup)
        dgate.copy_(torch.ops.aten.silu_backward(dy * up, gate))
    else:
        torch.mul(dy, _gelu_of(gate, kind), out=dup)
        dgate.copy_(torch.ops.aten.gelu_backward(dy * up, gate, approximate=_approximate(kind)))
    return (result,)


def _approximate(kind: str) -> str:
    return "tanh" if kind == "gelu_tanh" else "none"


def _gelu_of(x: Tensor, kind: str) -> Tensor:
    return F.gelu(x, approximate=_approximate(kind))


def _gelu(ctx: Context, op: Op, reads: Results, outs: Outs) -> Results:
    return (_gelu_of(reads[0], op.attrs.get("activation", "gelu")),)


def _gelu_backward(ctx: Context, op: Op, reads: Results, outs: Outs) -> Results:
    kind = _approximate(op.attrs.get("activation", "gelu"))
    return (torch.ops.aten.gelu_backward(reads[0], reads[1], approximate=kind),)


def _relu(ctx: Context, op: Op, reads: Results, outs: Outs) -> Results:
    return (F.relu(reads[0]),)


def _relu_backward(ctx: Context, op: Op, reads: Results, outs: Outs) -> Results:
    return (torch.ops.aten.threshold_backward(reads[0], reads[1], 0),)


def _add(ctx: Context, op: Op, reads: Results, outs: Outs) -> Results:
    if not takes_part(ctx, op):
        return (reads[0].clone(),)
    if outs[0] is not None:
        return (torch.add(reads[0], reads[1], out=outs[0]),)
    return (reads[0] + reads[1],)


def _alias(ctx: Context, op: Op, reads: Results, outs: Outs) -> Results:
    return (reads[0],)


def _split_heads(op: Op, qkv: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return q [b, h, s, d], k and v [b, hkv, s, d] as views of packed rows."""
    d, b = op.dims, qkv.shape[0] // rows
    packed = qkv.view(b, rows, -1, d["d"]).transpose(1, 2)
    h, hkv = d["h"], d["hkv"]
    return packed[:, :h], packed[:, h : h + hkv], packed[:, h + hkv :]


def _repeat(x: Tensor, times: int) -> Tensor:
    return x if times == 1 else x.repeat_interleave(times, 1)


def _scores(op: Op, q: Tensor, k: Tensor) -> Tensor:
    """Return masked scaled scores [b, h, s, kv]."""
    scale: float = q.shape[-1] ** -0.5
    scores = torch.matmul(q, k.transpose(-1, -2)) * scale
    s, kv = scores.shape[-2:]
    if op.attrs["causal"] and s > 1:
        mask = torch.ones(s, kv, dtype=torch.bool, device=q.device).triu(kv - s + 1)
        scores.masked_fill_(mask, -math.inf)
    return scores


def _flat(x: Tensor) -> Tensor:
    """Return [b, h, s, d] as rows [b s, h d]."""
    b, h, s, d = x.shape
    return x.transpose(1, 2).reshape(b * s, h * d)


def _attention(ctx: Context, op: Op, reads: Results, outs: Outs) -> Results:
    group = op.dims["h"] // op.dims["hkv"]
    if len(reads) > 1:
        return _cached_attention(ctx, op, reads[0], reads[1])
    q, k, v = _split_heads(op, reads[0], op.dims["s"])
    k, v = _repeat(k, group), _repeat(v, group)
    causal = bool(op.attrs["causal"])
    if ctx.fused and q.device.type == "cpu":
        o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
        return (_flat(o), lse)
    if ctx.fused and q.dtype in (torch.bfloat16, torch.float16):
        o, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)[:2]
        return (_flat(o), lse)
    scores = _scores(op, q, k)
    lse = scores.logsumexp(-1)
    return (_flat(torch.matmul((scores - lse[..., None]).exp(), v)), lse)


def _cached_attention(ctx: Context, op: Op, qkv: Tensor, cache: Tensor) -> Results:
    """Attend new rows to all cached ones; ``cache`` is [2, b, kv heads, rows, d]."""
    batch = cache.shape[1]
    rows = qkv.shape[0] // batch
    length = ctx.cached + rows
    q, _, _ = _split_heads(op, qkv, rows)
    k, v = (part[:, :, :length].to(q.dtype) for part in cache)
    group = op.dims["h"] // op.dims["hkv"]
    causal = bool(op.attrs["causal"])
    if not ctx.fused:
        weights = _scores(op, q, _repeat(k, group)).softmax(-1)
        return (_flat(torch.matmul(weights, _repeat(v, group))), q.new_empty(0))
    if rows == 1 or not causal:
        o = F.scaled_dot_product_attention(q, k, v, enable_gqa=group > 1)
    elif length == rows:
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=group > 1)
    else:
        mask = torch.ones(rows, length, dtype=torch.bool, device=q.device).tril(length - rows)
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=group > 1)
    return (_flat(o), q.new_empty(0))


def _attention_backward(ctx: Context, op: Op, reads: Results, outs: Outs) -> Results:
    dflat, qkv, oflat, lse = reads
    rows, group = op.dims["s"], op.dims["h"] // op.dims["hkv"]
    q, k0, v0 = _split_heads(op, qkv, rows)
    k, v = _repeat(k0, group), _repeat(v0, group)
    b, h, _, dv = *q.shape[:3], op.dims["dv"]
    do = dflat.view(b, rows, h, dv).transpose(1, 2)
    o = oflat.view(b, rows, h, dv).transpose(1, 2)
    causal = bool(op.attrs["causal"])
    if ctx.fused and q.device.type == "cpu":
        dq, dk, dv_ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            do, q, k, v, o, lse, 0.0, causal
        )
    elif ctx.fused and q.dtype in (torch.bfloat16, torch.float16):
        seed = torch.zeros((), dtype=torch.int64, device=q.device)
        dq, dk, dv_ = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            do, q, k, v, o, lse, None, None, rows, rows, 0.0, causal, seed, seed
        )
    else:
        p = (_scores(op, q, k) - lse[..., None]).exp()
        dv_ = torch.matmul(p.transpose(-1, -2), do)
        ds = p * (torch.matmul(do, v.transpose(-1, -2)) - (do * o).sum(-1, keepdim=True))
        ds = ds * (q.shape[-1] ** -0.5)
        dq, dk = torch.matmul(ds, k), torch.matmul(ds.transpose(-1, -2), q)
    if group > 1:
        dk = dk.view(b, -1, group, rows, dk.shape[-1]).sum(2)
        dv_ = dv_.view(b, -1, group, rows, dv).sum(2)
    result = torch.empty_like(qkv)
    target = result.view(b, rows, -1, q.shape[-1]).transpose(1, 2)
    hkv = op.dims["hkv"]
    target[:, :h], target[:, h : h + hkv], target[:, h + hkv :] = dq, dk, dv_
    return (result,)


def _cache_append(ctx: Context, op: Op, reads: Results, outs: Outs) -> Results:
    out = outs[0]
    assert out is not None
    qkv, a = reads[0], op.attrs
    batch = out.shape[1]
    rows = qkv.shape[0] // batch
    packed = qkv.view(batch, rows, -1, a["head_dim"]).transpose(1, 2)
    h, hkv = a["heads"], a["kv_heads"]
    out[0, :, :, ctx.cached : ctx.cached + rows] = packed[:, h : h + hkv]
    out[1, :, :, ctx.cached : ctx.cached + rows] = packed[:, h + hkv :]
    return (out,)


def _valid(op: Op, ctx: Context, logits: Tensor) -> tuple[Tensor, int]:
    """Return the logits of real vocabulary entries on this shard and the shard's first entry."""
    first = _vocab_offset(ctx, op, logits.shape[1])
    return logits[:, : max(0, min(logits.shape[1], op.attrs["vocab"] - first))], first


def _picked(logits: Tensor, targets: Tensor, first: int) -> tuple[Tensor, Tensor]:
    local = targets - first
    inside = (local >= 0) & (local < logits.shape[1])
    if not logits.shape[1]:
        return logits.new_zeros(targets.shape), inside
    chosen = logits.gather(1, local.clamp(0, max(logits.shape[1] - 1, 0))[:, None])[:, 0]
    return torch.where(inside, chosen, torch.zeros_like(chosen)), inside


def _softmax_stats(ctx: Context, op: Op, reads: Results, outs: Outs) -> Results:
    """Return per token: log of the sum of exponentials, and the target's logit if it is here."""
    logits, first = _valid(op, ctx, reads[0])
    picked, inside = _picked(logits, reads[1], first)
    lse = torch.logsumexp(_wide(logits), -1)
    return (torch.stack((lse, picked.to(lse.dtype), inside.to(lse.dtype)), -1),)


def _softmax_loss(ctx: Context, op: Op, reads: Results, outs: Outs) -> Results:
    tokens = reads[1].shape[0]
    stats = reads[2].view(-1, tokens, 3)
    lse = stats[..., 0].logsumexp(0)
    counted = (reads[1] >= 0).to(lse.dtype)  # padding has no target
    loss = ((lse - stats[..., 1].sum(0)) * counted).sum() * op.attrs["scale"]
    return (loss.reshape(1), lse)


def _softmax_backward(ctx: Context, op: Op, reads: Results, outs: Outs) -> Results:
    logits, targets, lse = reads
    valid, first = _valid(op, ctx, logits)
    padded = valid.shape[1] < logits.shape[1]
    if not valid.shape[1]:
        return (torch.zeros_like(logits),)
    scale = op.attrs["scale"]
    weights = (targets >= 0).to(valid.dtype) * scale  # padding has no target
    p = torch.sub(valid, lse[:, None].to(valid.dtype)).exp_().mul_(weights[:, None])
    local = targets - first
    inside = (local >= 0) & (local < valid.shape[1])
    rows = torch.arange(targets.shape[0], device=logits.device)
    p.index_put_(
        (rows, local.clamp(0, valid.shape[1] - 1)),
        inside.to(p.dtype) * -scale,
        accumulate=True,
    )
    return (F.pad(p, (0, logits.shape[1] - valid.shape[1])) if padded else p,)


def _last_rows(ctx: Context, op: Op, reads: Results, outs: Outs) -> Results:
    """Return the last row of each of ``t`` sequences."""
    t, n = op.dims["t"], op.dims["n"]
    return (reads[0].view(t, -1, n)[:, -1].contiguous(),)


def _sample(ctx: Context, op: Op, reads: Results, outs: Outs) -> Results:
    shards = op.attrs["shards"]
    rows = reads[0].shape[0] // shards
    whole = reads[0].view(shards, rows, -1).transpose(0, 1).reshape(rows, -1)
    return (whole[:, : op.attrs["vocab"]].argmax(-1),)


BETAS = (0.9, 0.95)
LEARNING_RATE = 1e-4


def _adam(ctx: Context, op: Op, reads: Results, outs: Outs) -> Results:
    grad, weight, m, v = reads[:4]
    if outs[0] is not None and outs[0] is not weight:  # another version of the weights
        weight = outs[0].copy_(weight)
    target = reads[4] if op.attrs.get("master") else weight
    if target.dtype == torch.float64:
        m, v = m.double(), v.double()
    torch._fused_adam_(
        [target],
        [grad.to(target.dtype)],
        [m],
        [v],
        [],
        [torch.tensor(float(ctx.step), device=target.device)],
        lr=LEARNING_RATE,
        beta1=BETAS[0],
        beta2=BETAS[1],
        weight_decay=0.0,
        eps=1e-8,
        amsgrad=False,
        maximize=False,
    )
    if op.attrs.get("master"):
        weight.copy_(target)
    return (weight, *reads[2:])


def _fill(ctx: Context, op: Op, reads: Results, outs: Outs) -> Results:
    out = outs[0]
    if out is None:
        dtype = ctx.float_dtype(op.dtype)
        return (torch.zeros(int(op.dims["n"]), dtype=dtype, device=ctx.device),)
    return (out.zero_(),)


TorchOp = Callable[..., Results]

OPS: dict[str, TorchOp] = {
    **RING_OPS,
    **SERVER_OPS,
    **STREAM_OPS,
    **LINEAR_OPS,
    "matmul": _matmul,
    "bias": _bias,
    "sum_rows": _sum_rows,
    "embedding": _embedding,
    "embedding_backward": _embedding_backward,
    "rmsnorm": _rmsnorm,
    "rmsnorm_backward": _rmsnorm_backward,
    "layernorm": _layernorm,
    "layernorm_backward": _layernorm_backward,
    "head_norm": _head_norm,
    "head_norm_backward": _head_norm_backward,
    "rope": _rope,
    "swiglu": _swiglu,
    "swiglu_backward": _swiglu_backward,
    "gelu": _gelu,
    "gelu_backward": _gelu_backward,
    "relu": _relu,
    "relu_backward": _relu_backward,
    "add": _add,
    "alias": _alias,
    "attention": _attention,
    "attention_backward": _attention_backward,
    "cache_append": _cache_append,
    "softmax_stats": _softmax_stats,
    "softmax_loss": _softmax_loss,
    "softmax_backward": _softmax_backward,
    "last_rows": _last_rows,
    "sample": _sample,
    "adam": _adam,
    "fill": _fill,
    **MOE_OPS,
    **CODEC_OPS,
    **RECOMMEND_OPS,
}

"""The dense reference: an ordinary torch module that knows nothing of programs or ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simcore.models import GRID, ModelSpec, is_moe_layer, shared_width

EPSILON = 1e-5
NORMS = {"n1": "n1", "n2": "n2", "after1": "n1.after", "after2": "n2.after", "q": "q", "k": "k"}


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + EPSILON) * self.scale


class LayerNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(width))
        self.shift = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        variance = (centred * centred).mean(-1, keepdim=True)
        return centred / torch.sqrt(variance + EPSILON) * self.scale + self.shift


def rotate(x: Tensor, start: int = 0) -> Tensor:
    """Rotary embedding of [batch, heads, rows, d]: halves paired, base 10000."""
    d = x.shape[-1]
    position = torch.arange(start, start + x.shape[2], dtype=x.dtype)
    frequency = torch.exp(torch.arange(0, d, 2, dtype=x.dtype) * (-math.log(10000.0) / d))
    angle = position[:, None] * frequency[None]
    cos, sin = torch.cat((angle.cos(),) * 2, -1), torch.cat((angle.sin(),) * 2, -1)
    turned = torch.cat((-x[..., d // 2 :], x[..., : d // 2]), -1)
    return x * cos + turned * sin


class Experts(nn.Module):
    """A mixture of experts, token by token.

    Each group of ``rows`` consecutive tokens fills the experts anew: all first choices in order of
    the tokens, then all second ones; a choice of an expert that took ``most`` tokens is dropped.
    """

    rows, most = 0, math.inf

    def __init__(self, model: ModelSpec) -> None:
        super().__init__()
        self.model = model
        wide, shared = 2 * model.moe_ffn, shared_width(model)
        self.router = nn.Linear(model.hidden, model.experts, bias=False)
        self.up = nn.Parameter(torch.empty(model.experts, wide, model.hidden))
        self.z = nn.Parameter(torch.empty(model.experts, model.hidden, model.moe_ffn))
        if shared:
            self.shared_up = nn.Linear(model.hidden, 2 * shared, bias=False)
            self.shared_z = nn.Linear(shared, model.hidden, bias=False)

    def expert(self, number: int, x: Tensor) -> Tensor:
        gate, value = (self.up[number] @ x).chunk(2)
        return self.z[number] @ (F.silu(gate) * value)

    def group(self, x: Tensor) -> Tensor:
        scores = self.router(x)
        found = [torch.zeros_like(row) for row in x]
        taken = dict.fromkeys(range(self.model.experts), 0)
        ranked = scores.argsort(-1, descending=True)[:, : self.model.experts_per_token]
        weights = torch.gather(scores, 1, ranked).softmax(-1)
        for choice in range(self.model.experts_per_token):
            for token, row in enumerate(x):
                number = int(ranked[token, choice])
                taken[number] += 1
                if taken[number] <= self.most:
                    gate = weights[token, choice]
                    found[token] = found[token] + gate * self.expert(number, row)
        return torch.stack(found)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        y = torch.cat([self.group(part) for part in flat.split(self.rows or len(flat))])
        if shared_width(self.model):
            gate, value = self.shared_up(flat).chunk(2, -1)
            y = y + self.shared_z(F.silu(gate) * value)
        return y.view_as(x)


class Layer(nn.Module):
    documents: tuple[int, ...] = ()  # packed in every sequence

    def __init__(self, model: ModelSpec, number: int) -> None:
        super().__init__()
        self.model = model
        self.mixer = model.mixers[number] if model.mixers else ""
        norm = RMSNorm if model.norm == "rmsnorm" else LayerNorm
        heads, kv, d = model.heads, model.kv_heads, model.head_dim
        self.n1, self.n2 = norm(model.hidden), norm(model.hidden)
        self.qkv = nn.Linear(model.hidden, (heads + 2 * kv) * d, bias=model.qkv_bias)
        if model.qk_norm:
            self.q, self.k = norm(d), norm(d)
        if model.norms_per_layer > 2:
            self.after1, self.after2 = norm(model.hidden), norm(model.hidden)
        self.y = nn.Linear(heads * d, model.hidden, bias=model.out_bias)
        if is_moe_layer(model, number):
            self.experts = Experts(model)
            return
        wide = model.ffn * (2 if model.ffn_kind == "gated" else 1)
        self.up = nn.Linear(model.hidden, wide, bias=model.ffn_bias)
        self.z = nn.Linear(model.ffn, model.hidden, bias=model.ffn_bias)

    def attention(self, x: Tensor) -> Tensor:
        batch, rows, _ = x.shape
        h, kv, d = self.model.heads, self.model.kv_heads, self.model.head_dim
        parts = self.qkv(x).split([h * d, kv * d, kv * d], -1)
        q, k, v = (p.view(batch, rows, -1, d).transpose(1, 2) for p in parts)
        if self.model.qk_norm:
            q, k = self.q(q), self.k(k)
        if self.model.position == "rope":
            q, k = rotate(q), rotate(k)
        k, v = (torch.repeat_interleave(p, h // kv, dim=1) for p in (k, v))
        scores = torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(d)
        if self.mixer == "linear":
            kept = self.decay(kv, rows, x).repeat_interleave(h // kv, 0)
            return self.y(torch.einsum("bhij,bhjd->bihd", scores * kept, v).flatten(2))
        scores = scores.masked_fill(~self.sees(rows), -torch.inf)
        mixed = torch.einsum("bhij,bhjd->bihd", scores.softmax(-1), v)
        return self.y(mixed.reshape(batch, rows, h * d))

    def sees(self, rows: int) -> Tensor:
        """Which keys each query attends to: of its frame, of its place, all; earlier ones."""
        row = torch.arange(rows)
        places = rows // max(self.model.frames, 1)
        same = {"space": row // places, "time": row % places}.get(self.mixer, torch.zeros(rows))
        if self.documents:
            same = torch.repeat_interleave(torch.tensor(self.documents))
        earlier = row[:, None] >= row if self.model.causal else torch.ones(rows, rows) > 0
        return (same[:, None] == same) & earlier

    def decay(self, heads: int, rows: int, like: Tensor) -> Tensor:
        """Return what is left of row j in row i by RetNet's law or none: [heads, rows, rows]."""
        head = torch.arange(heads, dtype=like.dtype)[:, None, None]
        base = 1 - torch.exp2(-5 - head) if self.model.linear_decay == "retnet" else head * 0 + 1
        gap = torch.arange(rows)[:, None] - torch.arange(rows)
        return torch.where(gap >= 0, base ** gap.clamp(min=0), 0.0).to(like.dtype)

    def ffn(self, x: Tensor) -> Tensor:
        if hasattr(self, "experts"):
            return self.experts(x)
        wide = self.up(x)
        if self.model.ffn_kind == "gated":
            gate, value = wide.chunk(2, -1)
            silu = self.model.activation == "silu"
            return self.z((F.silu(gate) if silu else self._gelu(gate)) * value)
        return self.z(F.relu(wide) if self.model.activation == "relu" else self._gelu(wide))

    def _gelu(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh" if self.model.activation == "gelu_tanh" else "none")

    def forward(self, x: Tensor) -> Tensor:
        if self.model.parallel_block:
            normed = self.n1(x)
            second = self.n2(x) if self.model.norms_per_layer > 1 else normed
            return x + self.attention(normed) + self.ffn(second)
        if self.model.norms_per_layer > 2:
            x = x + self.after1(self.attention(self.n1(x)))
            return x + self.after2(self.ffn(self.n2(x)))
        x = x + self.attention(self.n1(x))
        return x + self.ffn(self.n2(x))


class Dense(nn.Module):
    """A whole transformer on one device."""

    def __init__(self, model: ModelSpec) -> None:
        super().__init__()
        self.model = model
        self.table = nn.Parameter(torch.empty(model.vocab, model.hidden))
        if model.position == "learned":
            self.positions = nn.Parameter(torch.empty(model.max_positions, model.hidden))
        self.layers = nn.ModuleList(Layer(model, i) for i in range(model.layers))
        self.nf = (RMSNorm if model.norm == "rmsnorm" else LayerNorm)(model.hidden)
        if not model.tied_embeddings:
            self.head = nn.Parameter(torch.empty(model.vocab, model.hidden))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of [batch, rows] tokens."""
        x = self.table[tokens]
        if self.model.position == "learned":
            x = x + self.positions[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.nf(x) @ (self.table if self.model.tied_embeddings else self.head).t()

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy over all tokens."""
        logits = self(tokens)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def generate(self, tokens: Tensor, count: int) -> Tensor:
        """Return ``count`` greedy tokens per prompt, every pass over the whole sequence."""
        start = tokens.shape[1]
        for _ in range(count):
            last = self(tokens)[:, -1]
            tokens = torch.cat((tokens, last.argmax(-1, keepdim=True)), 1)
        return tokens[:, start:]

    def named(self) -> Mapping[tuple[str, int], nn.Parameter]:
        """Return the parameters by (name of the program's buffer, layer or -1)."""
        found = {("embed.table", -1): self.table, ("head.nf.scale", -1): self.nf.scale}
        if self.model.position == "learned":
            found["embed.positions", -1] = self.positions
        if isinstance(self.nf, LayerNorm):
            found["head.nf.shift", -1] = self.nf.shift
        if not self.model.tied_embeddings:
            found["head.wlogits", -1] = self.head
        for number, layer in enumerate(self.layers):
            experts = getattr(layer, "experts", None)
            unit = "layer" if experts is None else "moe"
            unit = layer.mixer if layer.mixer in (*GRID, "linear") else unit
            for attribute, name in NORMS.items():
                norm = getattr(layer, attribute, None)
                for part, value in norm.named_parameters() if norm is not None else ():
                    found[f"{unit}.{name}.{part}", number] = value
            for name in ("qkv", "y", "up", "z"):
                linear = getattr(layer, name, None)
                if linear is None:
                    continue
                found[f"{unit}.w{name}", number] = linear.weight
                if linear.bias is not None:
                    found[f"{unit}.b{name}", number] = linear.bias
            if experts is not None:
                found["experts.wup", number] = experts.up
                found["experts.wz", number] = experts.z
                for name in ("router", "shared_up", "shared_z"):
                    if hasattr(experts, name):
                        weight = getattr(experts, name).weight
                        found[f"moe.w{name.replace('_', '.')}", number] = weight
        return found

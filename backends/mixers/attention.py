"""Torch forms of the mixers that look at tokens by a softmax; [batch, heads, seq, width]."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from backends.mixers.count import Steps
from backends.mixers.linear import Answer, Sizes, Tensors
from backends.mixers.scans import Elements, doubling_scan


def _masked(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Return softmax attention where ``seen`` is true; every query sees a key."""
    scores = (q @ k.mT) / math.sqrt(q.shape[-1])
    return torch.softmax(scores.masked_fill(~seen, -math.inf), -1) @ v


def _causal(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


def parallel(inputs: Tensors, sizes: Sizes, steps: Steps) -> Answer:
    """All scores at once."""
    steps.tick()
    return _masked(inputs["q"], inputs["k"], inputs["v"], _causal(sizes["seq_len"])), ()


def fused(inputs: Tensors, sizes: Sizes, steps: Steps) -> Answer:
    """Key block after key block with a running maximum and sum (online softmax)."""
    q, length = inputs["q"] / math.sqrt(inputs["q"].shape[-1]), sizes["seq_len"]
    top = q.new_full((*q.shape[:3], 1), -math.inf)
    total, out = torch.zeros_like(top), q.new_zeros(*q.shape[:3], inputs["v"].shape[-1])
    mask = _causal(length)
    for start in steps.over(range(0, length, sizes["chunk"])):
        keys = slice(start, start + sizes["chunk"])
        scores = (q @ inputs["k"][:, :, keys].mT).masked_fill(~mask[:, keys], -math.inf)
        higher = torch.maximum(top, scores.amax(-1, keepdim=True))
        weights, rescale = torch.exp(scores - higher), torch.exp(top - higher)
        total = total * rescale + weights.sum(-1, keepdim=True)
        out = out * rescale + weights @ inputs["v"][:, :, keys]
        top = higher
    return out / total, ()


def _decode(inputs: Tensors, steps: Steps, window: int) -> Answer:
    """Return token after token on a cache of the last ``window`` keys and values."""
    outputs, keys, values = [], inputs["k"][:, :, :0], inputs["v"][:, :, :0]
    for t in steps.over(range(inputs["q"].shape[2])):
        keys = torch.cat((keys, inputs["k"][:, :, t : t + 1]), 2)[:, :, -window:]
        values = torch.cat((values, inputs["v"][:, :, t : t + 1]), 2)[:, :, -window:]
        scores = inputs["q"][:, :, t : t + 1] @ keys.mT / math.sqrt(keys.shape[-1])
        outputs.append(torch.softmax(scores, -1) @ values)
    return torch.cat(outputs, 2), (keys, values)


def recurrent(inputs: Tensors, sizes: Sizes, steps: Steps) -> Answer:
    """Token after token on a growing cache."""
    return _decode(inputs, steps, sizes["seq_len"])


# ------------------------------------------------------------------ sliding window


def sliding_parallel(inputs: Tensors, sizes: Sizes, steps: Steps) -> Answer:
    """All scores, those beyond the window masked."""
    steps.tick()
    mask = _causal(sizes["seq_len"]).triu(1 - sizes["window"])
    return _masked(inputs["q"], inputs["k"], inputs["v"], mask), ()


def sliding_chunked(inputs: Tensors, sizes: Sizes, steps: Steps) -> Answer:
    """Blocks of a window; each looks at itself and the block before."""
    steps.tick()
    window = sizes["window"]
    q, k, v = (inputs[n].unflatten(2, (-1, window)) for n in ("q", "k", "v"))
    keys, values = (torch.cat((F.pad(x, (0, 0, 0, 0, 1, 0))[:, :, :-1], x), 3) for x in (k, v))
    distance = torch.arange(window)[:, None] + window - torch.arange(2 * window)[None, :]
    near = (distance >= 0) & (distance < window)
    seen = near.expand(q.shape[2], window, 2 * window).clone()
    seen[0, :, :window] = False  # nothing precedes the first block
    return _masked(q, keys, values, seen).flatten(2, 3), ()


def sliding_recurrent(inputs: Tensors, sizes: Sizes, steps: Steps) -> Answer:
    """Token after token on a cache of one window."""
    return _decode(inputs, steps, sizes["window"])


# ------------------------------------------------------------------ attention as a scan


def aaren_inputs(sizes: Sizes, random: torch.Generator) -> Tensors:
    """Return keys and values, and one learned query per head."""
    lead = (sizes["batch"], sizes["heads"])

    def draw(*of: int) -> Tensor:
        return torch.randn(*of, generator=random, dtype=torch.float64)

    return {
        "query": draw(*lead, sizes["d_k"]),
        "k": draw(*lead, sizes["seq_len"], sizes["d_k"]),
        "v": draw(*lead, sizes["seq_len"], sizes["d_v"]),
    }


def _scores(inputs: Tensors) -> Tensor:
    return (inputs["k"] @ inputs["query"].unsqueeze(-1)).squeeze(-1)


def _merge(first: Elements, second: Elements) -> Elements:
    """Merge (maximum, sum of weights, weighted values) of two neighbouring spans."""
    (m1, u1, w1), (m2, u2, w2) = first, second
    top = torch.maximum(m1, m2)
    s1, s2 = torch.exp(m1 - top), torch.exp(m2 - top)
    return top, u1 * s1 + u2 * s2, w1 * s1.unsqueeze(-1) + w2 * s2.unsqueeze(-1)


def aaren_parallel(inputs: Tensors, sizes: Sizes, steps: Steps) -> Answer:
    """The softmax over every prefix, as a triangular matrix."""
    steps.tick()
    scores = _scores(inputs).unsqueeze(-2).expand(-1, -1, sizes["seq_len"], -1)
    hidden = scores.masked_fill(~_causal(sizes["seq_len"]), -math.inf)
    return torch.softmax(hidden, -1) @ inputs["v"], ()


def aaren_scan(inputs: Tensors, sizes: Sizes, steps: Steps) -> Answer:
    """A scan over the sequence."""
    scores = _scores(inputs).movedim(-1, 0)
    elements = (scores, torch.ones_like(scores), inputs["v"].movedim(2, 0))
    top, total, values = doubling_scan(_merge, elements, steps)
    out = (values / total.unsqueeze(-1)).movedim(0, 2)
    return out, (top[-1], total[-1], values[-1])


def aaren_recurrent(inputs: Tensors, sizes: Sizes, steps: Steps) -> Answer:
    """Token after token in constant memory."""
    scores = _scores(inputs)
    state: Elements | None = None
    outputs = []
    for t in steps.over(range(sizes["seq_len"])):
        new = (scores[..., t], torch.ones_like(scores[..., t]), inputs["v"][:, :, t])
        state = new if state is None else _merge(state, new)
        outputs.append(state[2] / state[1].unsqueeze(-1))
    return torch.stack(outputs, 2), state or ()


# ------------------------------------------------------------------ local attention and summaries


def _summaries(x: Tensor, block: int) -> Tensor:
    blocks: Tensor = x.unflatten(2, (-1, block))
    return blocks.mean(3)


def combiner_parallel(inputs: Tensors, sizes: Sizes, steps: Steps) -> Answer:
    """Tokens and summaries of blocks in one list of keys, masked."""
    steps.tick()
    block, length = sizes["block"], sizes["seq_len"]
    of = torch.arange(length) // block
    local = _causal(length) & (of[:, None] == of[None, :])
    earlier = of[:, None] > torch.arange(length // block)[None, :]
    keys, values = (torch.cat((inputs[n], _summaries(inputs[n], block)), 2) for n in ("k", "v"))
    return _masked(inputs["q"], keys, values, torch.cat((local, earlier), 1)), ()


def combiner_chunked(inputs: Tensors, sizes: Sizes, steps: Steps) -> Answer:
    """Each block looks at its own tokens and at the summaries of earlier blocks."""
    steps.tick()
    block = sizes["block"]
    blocks = sizes["seq_len"] // block
    q, k, v = (inputs[n].unflatten(2, (-1, block)) for n in ("q", "k", "v"))

    def with_summaries(x: Tensor) -> Tensor:
        summary = x.mean(3).unsqueeze(2).expand(-1, -1, blocks, -1, -1)
        return torch.cat((x, summary), 3)

    earlier = torch.arange(blocks)[:, None] > torch.arange(blocks)[None, :]
    seen = torch.cat(
        (_causal(block).expand(blocks, -1, -1), earlier.unsqueeze(1).expand(-1, block, -1)), -1
    )
    return _masked(q, with_summaries(k), with_summaries(v), seen).flatten(2, 3), ()


def _tree(x: Tensor, block: int) -> list[Tensor]:
    """Return the summaries of 1, 2, 4 ... blocks, [batch, heads, nodes, width] per level."""
    levels = [_summaries(x, block)]
    while levels[-1].shape[2] > 1:
        levels.append(levels[-1].unflatten(2, (-1, 2)).mean(3))
    return levels


def tree_parallel(inputs: Tensors, sizes: Sizes, steps: Steps) -> Answer:
    """Tokens and all nodes of the tree in one list of keys; a prefix is its binary digits."""
    steps.tick()
    block, length = sizes["block"], sizes["seq_len"]
    of = torch.arange(length) // block
    masks = [_causal(length) & (of[:, None] == of[None, :])]
    for level in range((length // block).bit_length()):
        nodes = torch.arange(length // block >> level)
        digit = (of >> level) & 1
        masks.append((digit[:, None] == 1) & (nodes[None, :] == (of >> level)[:, None] - 1))
    keys, values = (torch.cat((inputs[n], *_tree(inputs[n], block)), 2) for n in ("k", "v"))
    return _masked(inputs["q"], keys, values, torch.cat(masks, 1)), ()


def tree_chunked(inputs: Tensors, sizes: Sizes, steps: Steps) -> Answer:
    """Each block looks at its own tokens and at one node per level of the tree."""
    steps.tick()
    block = sizes["block"]
    blocks = sizes["seq_len"] // block
    of, levels = torch.arange(blocks), blocks.bit_length() - 1
    picked = [((of >> level) - 1).clamp(min=0) for level in range(levels)]
    q, k, v = (inputs[n].unflatten(2, (-1, block)) for n in ("q", "k", "v"))

    def with_nodes(x: Tensor, raw: Tensor) -> Tensor:
        nodes = [node[:, :, pick] for node, pick in zip(_tree(raw, block), picked, strict=False)]
        return torch.cat((x, torch.stack(nodes, 3)), 3) if nodes else x

    used = ((of[:, None] >> torch.arange(levels)[None, :]) & 1) == 1
    seen = torch.cat(
        (_causal(block).expand(blocks, -1, -1), used.unsqueeze(1).expand(-1, block, -1)), -1
    )
    keys, values = with_nodes(k, inputs["k"]), with_nodes(v, inputs["v"])
    return _masked(q, keys, values, seen).flatten(2, 3), ()


# ------------------------------------------------------------------ strided shards per head


def shard_of(sizes: Sizes) -> Tensor:
    """Return [heads, seq]: whether a head's shard holds a token."""
    stripe = torch.arange(sizes["seq_len"]) // sizes["block"]
    heads = torch.arange(sizes["heads"])
    return (stripe[None, :] - heads[:, None]) % sizes["shards"] == 0


def s2_parallel(inputs: Tensors, sizes: Sizes, steps: Steps) -> Answer:
    """All scores, those outside a head's shard masked; a query always sees its own token."""
    steps.tick()
    length = sizes["seq_len"]
    mask = (shard_of(sizes).unsqueeze(1) & _causal(length)) | torch.eye(length, dtype=torch.bool)
    return _masked(inputs["q"], inputs["k"], inputs["v"], mask), ()


def s2_chunked(inputs: Tensors, sizes: Sizes, steps: Steps) -> Answer:
    """Only the keys and values of a head's shard are read."""
    steps.tick()
    held = shard_of(sizes)
    tokens = held.nonzero()[:, 1].unflatten(0, (sizes["heads"], -1))  # [heads, kept]
    rows = torch.arange(sizes["heads"]).unsqueeze(1)
    keys, values = inputs["k"][:, rows, tokens], inputs["v"][:, rows, tokens]
    q = inputs["q"] / math.sqrt(inputs["q"].shape[-1])
    past = tokens.unsqueeze(1) <= torch.arange(sizes["seq_len"]).unsqueeze(-1)
    scores = (q @ keys.mT).masked_fill(~past, -math.inf)
    own = (q * inputs["k"]).sum(-1).masked_fill(held, -math.inf)  # already among its keys
    weights = torch.softmax(torch.cat((scores, own.unsqueeze(-1)), -1), -1)
    return weights[..., :-1] @ values + weights[..., -1:] * inputs["v"], (keys, values)


# ------------------------------------------------------------------ convolution and memory slots


def gam_inputs(sizes: Sizes, random: torch.Generator) -> Tensors:
    """Return tokens [batch, seq, width], taps [width, 1, kernel] and slots [slots, width]."""

    def draw(*of: int) -> Tensor:
        return torch.randn(*of, generator=random, dtype=torch.float64)

    width = sizes["width"]
    return {
        "x": draw(sizes["batch"], sizes["seq_len"], width),
        "taps": draw(width, 1, sizes["kernel"]),
        "keys": draw(sizes["slots"], width),
        "values": draw(sizes["slots"], width),
    }


def _gated(x: Tensor, mixed: Tensor, inputs: Tensors) -> Tensor:
    looked_up = torch.softmax(x @ inputs["keys"].T, -1) @ inputs["values"]
    return torch.sigmoid(x) * mixed + torch.sigmoid(-x) * looked_up


def gam_parallel(inputs: Tensors, sizes: Sizes, steps: Steps) -> Answer:
    """Convolution and lookup over all tokens."""
    steps.tick()
    padded = F.pad(inputs["x"].mT, (sizes["kernel"] - 1, 0))
    mixed = F.conv1d(padded, inputs["taps"], groups=sizes["width"]).mT
    return _gated(inputs["x"], mixed, inputs), ()


def gam_recurrent(inputs: Tensors, sizes: Sizes, steps: Steps) -> Answer:
    """Token after token on the last taps - 1 tokens."""
    x, kernel = inputs["x"], sizes["kernel"]
    buffer, outputs = x.new_zeros(x.shape[0], sizes["width"], kernel - 1), []
    for t in steps.over(range(sizes["seq_len"])):
        seen = torch.cat((buffer, x[:, t, :, None]), -1)
        mixed = F.conv1d(seen, inputs["taps"], groups=sizes["width"]).squeeze(-1)
        outputs.append(_gated(x[:, t], mixed, inputs))
        buffer = seen[..., 1:]
    return torch.stack(outputs, 1), (buffer,)

"""Torch forms of the mixers that change what a layer works on: merging and halting tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from backends.mixers.count import Steps
from backends.mixers.linear import Answer, Sizes, Tensors


def merging_inputs(sizes: Sizes, random: torch.Generator) -> Tensors:
    """Return tokens [batch, seq, width]."""
    shape = (sizes["batch"], sizes["seq_len"], sizes["width"])
    return {"x": torch.randn(shape, generator=random, dtype=torch.float64)}


def merging(inputs: Tensors, sizes: Sizes, steps: Steps) -> Answer:
    """Layers of attention, linear while the sequence is long, then merging neighbours."""
    x = inputs["x"]
    for layer in steps.over(range(sizes["layers"])):
        if x.shape[1] > sizes["switch"]:
            mixed = x @ (x.mT @ x) / x.shape[1]
        else:
            mixed = torch.softmax(x @ x.mT / math.sqrt(sizes["width"]), -1) @ x
        x = x + mixed / mixed.norm(dim=-1, keepdim=True)
        if layer + 1 < sizes["layers"] and x.shape[1] > 1:
            x = x.unflatten(1, (-1, sizes["merge"])).mean(2)
    return x, (x,)


def halting_inputs(sizes: Sizes, random: torch.Generator) -> Tensors:
    """Return tokens, weights of one shared layer, and the step at which each token halts.

    Steps run from 1 to ``max_steps``; the first token takes the most.
    """

    def draw(*of: int) -> Tensor:
        return torch.randn(*of, generator=random, dtype=torch.float64)

    width, lead = sizes["width"], (sizes["batch"], sizes["seq_len"])
    halt = torch.randint(1, sizes["max_steps"] + 1, lead, generator=random)
    halt[0, 0] = sizes["max_steps"]
    scale = 1 / math.sqrt(width)
    return {
        "x": draw(*lead, width),
        "halt": halt,
        "wq": draw(width, width) * scale,
        "wkv": draw(width, 2 * width) * scale,
        "wo": draw(width, width) * scale,
        "up": draw(width, 4 * width) * scale,
        "down": draw(4 * width, width) * scale / 2,
    }


def _update(h: Tensor, keys: Tensor, values: Tensor, w: Tensors) -> Tensor:
    """Return the shared layer's update of some tokens, given all keys and values."""
    scores = (h @ w["wq"]) @ keys.mT / math.sqrt(h.shape[-1])
    h = h + torch.softmax(scores, -1) @ values @ w["wo"]
    return h + torch.relu(h @ w["up"]) @ w["down"]


def padded(inputs: Tensors, sizes: Sizes, steps: Steps) -> Answer:
    """Every token pays for every iteration; halted ones keep their state, keys and values."""
    h, kept = inputs["x"], torch.zeros(0)
    for step in steps.over(range(sizes["max_steps"])):
        active = (inputs["halt"] > step).unsqueeze(-1)
        fresh = h @ inputs["wkv"]
        kept = torch.where(active, fresh, kept) if step else fresh
        keys, values = kept.chunk(2, -1)
        h = torch.where(active, _update(h, keys, values, inputs), h)
    return h, (h,)


def compacted(inputs: Tensors, sizes: Sizes, steps: Steps) -> Answer:
    """Only tokens that have not halted are worked on."""
    h = inputs["x"].clone()
    kept = h.new_zeros(*h.shape[:2], 2 * h.shape[2])
    for step in steps.over(range(sizes["max_steps"])):
        for row in range(h.shape[0]):  # sequences are independent
            active = inputs["halt"][row] > step
            if not bool(active.any()):
                continue
            kept[row, active] = h[row, active] @ inputs["wkv"]
            keys, values = kept[row].chunk(2, -1)
            h[row, active] = _update(h[row, active], keys, values, inputs)
    return h, (h,)

"""Torch forms of the mixers with a linear state; tensors are [batch, heads, seq, width]."""

from __future__ import annotations

import torch
from torch import Tensor

from backends.mixers.count import Steps

Tensors = dict[str, Tensor]
Sizes = dict[str, int]
Answer = tuple[Tensor, tuple[Tensor, ...]]  # output, final state


def qkv(sizes: Sizes, random: torch.Generator) -> Tensors:
    """Return queries, keys and values; keys have unit length."""
    lead = (sizes["batch"], sizes["heads"], sizes["seq_len"])

    def draw(width: int) -> Tensor:
        return torch.randn(*lead, width, generator=random, dtype=torch.float64)

    keys = draw(sizes["d_k"])
    return {
        "q": draw(sizes["d_k"]),
        "k": keys / keys.norm(dim=-1, keepdim=True),
        "v": draw(sizes["d_v"]),
    }


def no_decay(sizes: Sizes, random: torch.Generator) -> Tensors:
    """Return inputs whose state never fades (linear attention)."""
    inputs = qkv(sizes, random)
    return {**inputs, "decay": torch.ones_like(inputs["k"])}


def head_decay(sizes: Sizes, random: torch.Generator) -> Tensors:
    """Return inputs whose state fades by 1 - 2^(-5-h) in head h (RetNet, section 2.2)."""
    inputs = qkv(sizes, random)
    heads = torch.arange(sizes["heads"], dtype=torch.float64)
    decay = 1 - 2.0 ** (-5 - heads)
    return {**inputs, "decay": decay[None, :, None, None].expand_as(inputs["k"]).contiguous()}


def token_decay(sizes: Sizes, random: torch.Generator) -> Tensors:
    """Return inputs with one fading factor per token and head (Mamba-2)."""
    inputs = qkv(sizes, random)
    raw = torch.randn(*inputs["k"].shape[:-1], 1, generator=random, dtype=torch.float64)
    return {**inputs, "decay": torch.sigmoid(raw + 3).expand_as(inputs["k"]).contiguous()}


def vector_decay(sizes: Sizes, random: torch.Generator) -> Tensors:
    """Return inputs with a fading factor per token, head and key column (GLA)."""
    inputs = qkv(sizes, random)
    raw = torch.randn(inputs["k"].shape, generator=random, dtype=torch.float64)
    return {**inputs, "decay": torch.sigmoid(raw + 3)}


def with_rates(sizes: Sizes, random: torch.Generator) -> Tensors:
    """Return inputs with a write rate in (0, 1) per token and head (DeltaNet)."""
    inputs = qkv(sizes, random)
    raw = torch.randn(inputs["k"].shape[:-1], generator=random, dtype=torch.float64)
    return {**inputs, "rate": torch.sigmoid(raw)}


def _empty_state(inputs: Tensors) -> Tensor:
    q, v = inputs["q"], inputs["v"]
    return q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1])


def _triangle(length: int, like: Tensor) -> Tensor:
    return torch.ones(length, length, dtype=like.dtype, device=like.device).tril()


def decayed_scores(inputs: Tensors) -> Tensor:
    """Return the lower triangle of q_i diag(decay of j+1..i) k_j."""
    faded = inputs["decay"].cumprod(-2)
    scores = (inputs["q"] * faded) @ (inputs["k"] / faded).mT
    return scores * _triangle(scores.shape[-1], scores)


def parallel(inputs: Tensors, sizes: Sizes, steps: Steps) -> Answer:
    """All pairs at once."""
    steps.tick()
    return decayed_scores(inputs) @ inputs["v"], ()


def chunked(inputs: Tensors, sizes: Sizes, steps: Steps) -> Answer:
    """Products inside chunks, one state from chunk to chunk (GLA 2023, eq. 5)."""
    state, outputs = _empty_state(inputs), []
    parts = {name: tensor.split(sizes["chunk"], dim=2) for name, tensor in inputs.items()}
    for i in steps.over(range(sizes["seq_len"] // sizes["chunk"])):
        part = {name: pieces[i] for name, pieces in parts.items()}
        faded = part["decay"].cumprod(-2)
        whole = faded[..., -1:, :]
        outputs.append(decayed_scores(part) @ part["v"] + (part["q"] * faded) @ state)
        state = whole.mT * state + (part["k"] * (whole / faded)).mT @ part["v"]
    return torch.cat(outputs, 2), (state,)


def recurrent(inputs: Tensors, sizes: Sizes, steps: Steps) -> Answer:
    """Token after token."""
    state, outputs = _empty_state(inputs), []
    for t in steps.over(range(sizes["seq_len"])):
        q, k, v, decay = (inputs[n][:, :, t] for n in ("q", "k", "v", "decay"))
        state = decay.unsqueeze(-1) * state + k.unsqueeze(-1) * v.unsqueeze(-2)
        outputs.append((q.unsqueeze(-2) @ state).squeeze(-2))
    return torch.stack(outputs, 2), (state,)


# ------------------------------------------------------------------ delta rule


def delta_recurrent(inputs: Tensors, sizes: Sizes, steps: Steps) -> Answer:
    """Token after token: the value at a key is replaced at the write rate."""
    state, outputs = _empty_state(inputs), []
    for t in steps.over(range(sizes["seq_len"])):
        q, k, v = (inputs[n][:, :, t].unsqueeze(-2) for n in ("q", "k", "v"))
        error = (v - k @ state) * inputs["rate"][:, :, t, None, None]
        state = state + k.mT * error
        outputs.append((q @ state).squeeze(-2))
    return torch.stack(outputs, 2), (state,)


def delta_chunked(inputs: Tensors, sizes: Sizes, steps: Steps) -> Answer:
    """Chunks by the WY form of the product of reflections (DeltaNet 2024, eq. 10 and 11)."""
    state, outputs = _empty_state(inputs), []
    size = sizes["chunk"]
    parts = {name: tensor.split(size, dim=2) for name, tensor in inputs.items()}
    for i in steps.over(range(sizes["seq_len"] // size)):
        q, k, v, rate = (parts[n][i] for n in ("q", "k", "v", "rate"))
        eye = torch.eye(size, dtype=q.dtype, device=q.device)
        system = eye + (rate.unsqueeze(-1) * (k @ k.mT)).tril(-1)
        solve = torch.linalg.solve_triangular(system, eye * rate.unsqueeze(-2), upper=False)
        update = solve @ v - (solve @ k) @ state
        outputs.append(q @ state + (q @ k.mT).tril() @ update)
        state = state + k.mT @ update
    return torch.cat(outputs, 2), (state,)


# ------------------------------------------------------------------ both directions


def _both_ways(inputs: Tensors, sizes: Sizes, steps: Steps, chunks: bool) -> Answer:
    """Return the scan of the past, and of the strict future over the same projections."""
    form = chunked if chunks else recurrent
    flipped = {name: tensor.flip(2) for name, tensor in inputs.items()}
    before, state = form(inputs, sizes, steps)
    after, other = form(flipped, sizes, Steps())  # the two directions run side by side
    own = (inputs["q"] * inputs["k"]).sum(-1, keepdim=True) * inputs["v"]
    return before + after.flip(2) - own, (*state, *other)


def both_chunked(inputs: Tensors, sizes: Sizes, steps: Steps) -> Answer:
    """Two chunked scans."""
    return _both_ways(inputs, sizes, steps, chunks=True)


def both_recurrent(inputs: Tensors, sizes: Sizes, steps: Steps) -> Answer:
    """Two scans token after token."""
    return _both_ways(inputs, sizes, steps, chunks=False)


def quasiseparable(inputs: Tensors, sizes: Sizes, steps: Steps) -> Answer:
    """The mixing matrix itself: lower triangle, strict upper triangle, one product."""
    steps.tick()
    flipped = {name: tensor.flip(2) for name, tensor in inputs.items()}
    future = decayed_scores(flipped).tril(-1).flip(-1).flip(-2)
    return (decayed_scores(inputs) + future) @ inputs["v"], ()


# ------------------------------------------------------------------ diagonal state space


def s4_inputs(sizes: Sizes, random: torch.Generator) -> Tensors:
    """Return signals [batch, channels, seq] and a diagonal state space [channels, d_state]."""
    shape = (sizes["channels"], sizes["d_state"])

    def draw(*of: int) -> Tensor:
        return torch.randn(*of, generator=random, dtype=torch.float64)

    return {
        "x": draw(sizes["batch"], sizes["channels"], sizes["seq_len"]),
        "a": torch.sigmoid(draw(*shape) + 2),
        "b": draw(*shape),
        "c": draw(*shape),
    }


def s4_parallel(inputs: Tensors, sizes: Sizes, steps: Steps) -> Answer:
    """One long convolution by FFTs of twice the length."""
    length = sizes["seq_len"]
    powers = inputs["a"].unsqueeze(-1) ** torch.arange(length, dtype=torch.float64)
    kernel = ((inputs["c"] * inputs["b"]).unsqueeze(1) @ powers).squeeze(1)
    steps.tick()
    spectrum = torch.fft.rfft(inputs["x"], 2 * length) * torch.fft.rfft(kernel, 2 * length)
    return torch.fft.irfft(spectrum, 2 * length)[..., :length], ()


def s4_recurrent(inputs: Tensors, sizes: Sizes, steps: Steps) -> Answer:
    """Token after token on a fixed state."""
    x, a, b, c = (inputs[n] for n in ("x", "a", "b", "c"))
    state, outputs = x.new_zeros(x.shape[0], *a.shape), []
    for t in steps.over(range(sizes["seq_len"])):
        state = a * state + b * x[:, :, t, None]
        outputs.append((state.transpose(0, 1) @ c.unsqueeze(-1)).squeeze(-1).T)
    return torch.stack(outputs, -1), (state,)

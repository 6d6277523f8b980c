"""Torch forms of gated recurrent networks, of gathered history and of grids."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from backends.mixers.count import Steps, one_thread
from backends.mixers.linear import Answer, Sizes, Tensors
from backends.mixers.scans import affine, affine_matrix, doubling_scan, tree_scan

TOLERANCE = 1e-7  # a Newton round that moves no state further ends the rounds; float64
MOST_ROUNDS = 100
Cell = Callable[[Tensor, Tensor, Tensor], Tensor]  # projected input, state, weights -> state


def network(gates: int, recurrent: str) -> Callable[[Sizes, torch.Generator], Tensors]:
    """Return a maker of inputs [batch, seq, inputs] and weights.

    ``recurrent``: "dense" [hidden, gates hidden], "diagonal" [gates hidden], "heads"
    [heads, head, gates head] or "none".
    """

    def make(sizes: Sizes, random: torch.Generator) -> Tensors:
        def draw(*of: int) -> Tensor:
            return torch.randn(*of, generator=random, dtype=torch.float64)

        n, width = sizes["hidden"], sizes["inputs"]
        made = {
            "x": draw(sizes["batch"], sizes["seq_len"], width),
            "w": draw(width, gates * n) / math.sqrt(width),
        }
        if recurrent == "dense":
            made["u"] = draw(n, gates * n) / math.sqrt(n)
        elif recurrent == "diagonal":
            made["u"] = draw(gates * n) / 2
        elif recurrent == "heads":
            head = n // sizes["heads"]
            made["u"] = draw(sizes["heads"], head, gates * head) / math.sqrt(head)
        return made

    return make


def project(inputs: Tensors) -> Tensor:
    """Return the gates' part of the input for all tokens, [seq, batch, gates hidden]."""
    return (inputs["x"] @ inputs["w"]).transpose(0, 1)


def gru_cell(gates: Tensor, state: Tensor, weights: Tensor) -> Tensor:
    """Return the next state of a GRU (Cho et al. 2014, as torch writes it): r, z, n in turn."""
    n = state.shape[-1]
    mixed = state @ weights if weights.dim() > 1 else state.repeat(1, 3) * weights
    reset, keep = torch.sigmoid(gates[..., : 2 * n] + mixed[..., : 2 * n]).chunk(2, -1)
    new = torch.tanh(gates[..., 2 * n :] + reset * mixed[..., 2 * n :])
    return new + keep * (state - new)


def gru_recurrent(inputs: Tensors, sizes: Sizes, steps: Steps) -> Answer:
    """Token after token."""
    gates, outputs = project(inputs), []
    state = gates.new_zeros(sizes["batch"], sizes["hidden"])
    for t in steps.over(range(sizes["seq_len"])):
        state = gru_cell(gates[t], state, inputs["u"])
        outputs.append(state)
    return torch.stack(outputs, 1), (state,)


def _gru_round(gates: Tensor, before: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return every step's value and its Jacobian by the state before it.

    With s = 1 - z: dh/dh_ = z + (h_ - n) z s Uz + s (1 - n^2) (r Un + r (1 - r) (Un h_) Ur).
    A diagonal recurrence gives the Jacobian's diagonal.
    """
    n = before.shape[-1]
    dense = weights.dim() > 1
    mixed = before @ weights if dense else before.repeat(1, 1, 3) * weights
    reset, keep = torch.sigmoid(gates[..., : 2 * n] + mixed[..., : 2 * n]).chunk(2, -1)
    inner = mixed[..., 2 * n :]
    new = torch.tanh(gates[..., 2 * n :] + reset * inner)
    value = new + keep * (before - new)
    by_keep = (before - new) * keep * (1 - keep)
    by_new = (1 - keep) * (1 - new**2)
    by_reset = by_new * inner * reset * (1 - reset)
    u_reset, u_keep, u_new = weights.chunk(3, -1)
    if not dense:
        return value, keep + by_keep * u_keep + by_new * reset * u_new + by_reset * u_reset
    jacobian = torch.diag_embed(keep)
    for scale, u in ((by_keep, u_keep), (by_new * reset, u_new), (by_reset, u_reset)):
        jacobian = jacobian + scale.unsqueeze(-1) * u.T
    return value, jacobian


def newton(inputs: Tensors, sizes: Sizes, steps: Steps) -> Answer:
    """``rounds`` rounds over all tokens at once, each a linear scan."""
    states, _ = solve(inputs, sizes, steps, sizes["rounds"], 0.0)
    return states.transpose(0, 1), (states[-1],)


def solve(
    inputs: Tensors, sizes: Sizes, steps: Steps, rounds: int, tolerance: float
) -> tuple[Tensor, int]:
    """Return the states [seq, batch, hidden] and the rounds it took until nothing moved.

    Stops after ``rounds`` rounds, or once no state moves by more than ``tolerance``.
    """
    gates = project(inputs)
    states = gates.new_zeros(*gates.shape[:2], sizes["hidden"])
    dense = inputs["u"].dim() > 1
    for done in range(1, rounds + 1):
        before = F.pad(states, (0, 0, 0, 0, 1, 0))[:-1]
        steps.tick()
        value, jacobian = _gru_round(gates, before, inputs["u"])
        steps.tick()
        if dense:
            rest = value - (jacobian @ before.unsqueeze(-1)).squeeze(-1)
            _, solved = tree_scan(affine_matrix, (jacobian, rest), steps)
        else:
            _, solved = tree_scan(affine, (jacobian, value - jacobian * before), steps)
        moved = float((solved - states).abs().max())
        states = solved
        if moved <= tolerance:
            return states, done
    return states, rounds


def newton_rounds(
    sizes: Sizes, recurrent: str = "dense", tolerance: float = TOLERANCE, seed: int = 0
) -> int:
    """Return how many rounds a random GRU's states need to stand still.

    ``recurrent``: "dense" or "diagonal". One round is spent on seeing that nothing moves.
    """
    inputs = network(3, recurrent)(sizes, torch.Generator().manual_seed(seed))
    with one_thread():
        return solve(inputs, sizes, Steps(), MOST_ROUNDS, tolerance)[1]


# ------------------------------------------------------------------ LSTM in heads


def lstm_recurrent(inputs: Tensors, sizes: Sizes, steps: Steps) -> Answer:
    """Token after token; gates i, f, g, o within each head."""
    heads = sizes["heads"]
    gates = project(inputs).unflatten(-1, (heads, -1)).transpose(1, 2).contiguous()
    h = gates.new_zeros(heads, sizes["batch"], sizes["hidden"] // heads)
    c, outputs = torch.zeros_like(h), []
    for t in steps.over(range(sizes["seq_len"])):
        i, f, g, o = (gates[t] + h @ inputs["u"]).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        outputs.append(h)
    out = torch.stack(outputs)  # [seq, heads, batch, head]
    return out.permute(2, 0, 1, 3).flatten(2), (h, c)


def lstm_fused(inputs: Tensors, sizes: Sizes, steps: Steps) -> Answer:
    """torch's own fused LSTM, one per head: the loop over tokens is inside the library."""
    head = sizes["hidden"] // sizes["heads"]
    outputs = []
    for number, recurrent in enumerate(inputs["u"]):
        lstm = torch.nn.LSTM(sizes["inputs"], head, bias=False, batch_first=True).double()
        columns = slice(number * 4 * head, (number + 1) * 4 * head)
        lstm.load_state_dict(
            {"weight_ih_l0": inputs["w"][:, columns].T, "weight_hh_l0": recurrent.T}
        )
        outputs.append(lstm(inputs["x"])[0].detach())
    return torch.cat(outputs, -1), ()


# ------------------------------------------------------------------ gates free of the state


def _positive(x: Tensor) -> Tensor:
    """Return x + 1/2 above 0 and the logistic function below: positive and continuous."""
    return torch.where(x >= 0, x + 0.5, torch.sigmoid(x))


def min_gates(inputs: Tensors, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """Return a and b of h_t = a h_(t-1) + b, [seq, batch, hidden] each."""
    parts = project(inputs).split(sizes["hidden"], -1)
    if len(parts) == 2:
        keep = torch.sigmoid(parts[0])
        return 1 - keep, keep * _positive(parts[1])
    forget, write = torch.sigmoid(parts[0]), torch.sigmoid(parts[1])
    return forget / (forget + write), write / (forget + write) * _positive(parts[2])


def min_scan(inputs: Tensors, sizes: Sizes, steps: Steps) -> Answer:
    """A scan of (a, b) pairs."""
    _, states = doubling_scan(affine, min_gates(inputs, sizes), steps)
    return states.transpose(0, 1), (states[-1],)


def min_parallel(inputs: Tensors, sizes: Sizes, steps: Steps) -> Answer:
    """h = exp(A + logcumsumexp(log b - A)), A the running sum of log a (Heinsen 2023)."""
    a, b = min_gates(inputs, sizes)
    total = a.log().cumsum(0)
    states = torch.exp(total + torch.logcumsumexp(b.log() - total, 0))
    return states.transpose(0, 1), (states[-1],)


def min_recurrent(inputs: Tensors, sizes: Sizes, steps: Steps) -> Answer:
    """Token after token."""
    a, b = min_gates(inputs, sizes)
    state, outputs = torch.zeros_like(b[0]), []
    for t in steps.over(range(sizes["seq_len"])):
        state = a[t] * state + b[t]
        outputs.append(state)
    return torch.stack(outputs, 1), (state,)


# ------------------------------------------------------------------ history and grids


def pgn_inputs(sizes: Sizes, random: torch.Generator) -> Tensors:
    """Return inputs [batch, seq, inputs] and the weights of history and gates."""

    def draw(*of: int) -> Tensor:
        return torch.randn(*of, generator=random, dtype=torch.float64)

    n, width, gathered = sizes["hidden"], sizes["inputs"], sizes["window"] * sizes["inputs"]
    return {
        "x": draw(sizes["batch"], sizes["seq_len"], width),
        "history": draw(gathered, n) / math.sqrt(gathered),
        "gate": draw(width + n, 2 * n) / math.sqrt(width + n),
    }


def _gated_step(x: Tensor, gathered: Tensor, inputs: Tensors) -> Tensor:
    history = gathered @ inputs["history"]
    gate, new = (torch.cat((x, history), -1) @ inputs["gate"]).chunk(2, -1)
    gate = torch.sigmoid(gate)
    return gate * history + (1 - gate) * torch.tanh(new)


def pgn_parallel(inputs: Tensors, sizes: Sizes, steps: Steps) -> Answer:
    """History of all tokens gathered at once, then one gated step."""
    steps.tick()
    windows = F.pad(inputs["x"], (0, 0, sizes["window"] - 1, 0)).unfold(1, sizes["window"], 1)
    return _gated_step(inputs["x"], windows.mT.flatten(2), inputs), ()


def pgn_recurrent(inputs: Tensors, sizes: Sizes, steps: Steps) -> Answer:
    """Token after token on the window of inputs."""
    x = inputs["x"]
    window, outputs = x.new_zeros(x.shape[0], sizes["window"], x.shape[2]), []
    for t in steps.over(range(sizes["seq_len"])):
        window = torch.cat((window[:, 1:], x[:, t : t + 1]), 1)
        outputs.append(_gated_step(x[:, t], window.flatten(1), inputs))
    return torch.stack(outputs, 1), (window,)


def grid_inputs(sizes: Sizes, random: torch.Generator) -> Tensors:
    """Return sources [batch, side, side, width] and transitions from above and from the left."""
    lead = (sizes["batch"], sizes["side"], sizes["side"])

    def draw(*of: int) -> Tensor:
        return torch.randn(*of, generator=random, dtype=torch.float64)

    return {
        "x": draw(*lead, sizes["width"]),
        "down": torch.sigmoid(draw(*lead)) / 2,
        "right": torch.sigmoid(draw(*lead)) / 2,
    }


def grid_recurrent(inputs: Tensors, sizes: Sizes, steps: Steps) -> Answer:
    """One anti-diagonal after another: a node waits for those above and to its left."""
    side = sizes["side"]
    h = inputs["x"].clone()
    for front in steps.over(range(2 * side - 1)):
        rows = torch.arange(max(0, front - side + 1), min(front, side - 1) + 1)
        columns = front - rows
        below, beside = rows > 0, columns > 0
        r, c = rows[below], columns[below]
        h[:, r, c] += inputs["down"][:, r, c, None] * h[:, r - 1, c]
        r, c = rows[beside], columns[beside]
        h[:, r, c] += inputs["right"][:, r, c, None] * h[:, r, c - 1]
    return h, (h[:, -1],)


def grid_scan(inputs: Tensors, sizes: Sizes, steps: Steps) -> Answer:
    """(I - A)^-1 x as a product of I + A^(2^l)."""
    side = sizes["side"]
    nodes = torch.arange(side * side).view(side, side)
    step = inputs["x"].new_zeros(sizes["batch"], side * side, side * side)
    step[:, nodes[1:].flatten(), nodes[:-1].flatten()] = inputs["down"][:, 1:].flatten(1)
    step[:, nodes[:, 1:].flatten(), nodes[:, :-1].flatten()] = inputs["right"][:, :, 1:].flatten(1)
    h = inputs["x"].flatten(1, 2)
    levels = max(1, math.ceil(math.log2(2 * side - 1)))
    for level in steps.over(range(levels)):
        h = h + step @ h
        if level + 1 < levels:
            step = step @ step
    h = h.unflatten(1, (side, side))
    return h, (h[:, -1],)

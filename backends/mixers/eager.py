"""Recurrent layers written as frameworks run them eagerly: how many kernels a step costs.

`training_kernels` counts what a forward and a backward pass dispatch, per token and once per
sequence, so that a launch-bound time is kernels times the time of one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backends.mixers.count import count_kernels


class SerialGru(nn.Module):
    """A GRU, one cell call per token (Cho et al. 2014): [batch, seq, inputs] -> [.., hidden]."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.cell = _Gates(inputs, hidden, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return the states."""
        h, states = x.new_zeros(x.shape[0], self.cell.hidden), []
        for token in x.unbind(1):
            from_x, from_h = self.cell(token, h)
            reset, keep, new = from_x.chunk(3, -1)
            h_reset, h_keep, h_new = from_h.chunk(3, -1)
            reset, keep = torch.sigmoid(reset + h_reset), torch.sigmoid(keep + h_keep)
            new = torch.tanh(new + reset * h_new)
            h = (1 - keep) * new + keep * h
            states.append(h)
        return torch.stack(states, 1)


class SerialLstm(nn.Module):
    """An LSTM, one cell call per token (Hochreiter and Schmidhuber 1997)."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.cell = _Gates(inputs, hidden, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Return the states."""
        h, states = x.new_zeros(x.shape[0], self.cell.hidden), []
        c = torch.zeros_like(h)
        for token in x.unbind(1):
            from_x, from_h = self.cell(token, h)
            i, f, g, o = (from_x + from_h).chunk(4, -1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            states.append(h)
        return torch.stack(states, 1)


class _Gates(nn.Module):
    """The two products of a cell: by the input and by the state."""

    def __init__(self, inputs: int, hidden: int, gates: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.from_x = nn.Linear(inputs, gates * hidden)
        self.from_h = nn.Linear(hidden, gates * hidden)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Return both products."""
        return self.from_x(x), self.from_h(h)


class ScannedMinGru(nn.Module):
    """minGRU in log space, as Feng et al. (2024, appendix B.2) define it, a linear map per gate."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.keep, self.new = nn.Linear(inputs, hidden), nn.Linear(inputs, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Return the states; all tokens at once."""
        k = self.keep(x)
        log_a, log_keep = -F.softplus(k), -F.softplus(-k)
        start = _log_positive(x.new_zeros(x.shape[0], 1, k.shape[-1]))
        log_b = torch.cat((start, log_keep + _log_positive(self.new(x))), 1)
        total = F.pad(log_a.cumsum(1), (0, 0, 1, 0))
        return torch.exp(total + torch.logcumsumexp(log_b - total, 1))[:, 1:]


def _log_positive(x: Tensor) -> Tensor:
    return torch.where(x >= 0, (F.relu(x) + 0.5).log(), -F.softplus(-x))


@dataclass(frozen=True, slots=True)
class Kernels:
    """Kernels of one pass: those that come once, and those that come with every token."""

    once: float
    per_token: float

    def of(self, seq_len: float) -> float:
        """Return the kernels of a sequence."""
        return self.once + self.per_token * seq_len


LAYERS: dict[str, Callable[[int, int], nn.Module]] = {
    "gru": SerialGru,
    "lstm": SerialLstm,
    "min_gru": ScannedMinGru,
}


def layer_kernels(name: str, training: bool) -> Kernels:
    """Return the kernels of a layer's forward pass, or of a whole training step.

    A training step is forward, mean squared error, backward and an Adam update that treats all
    parameters in one kernel per operation.
    """

    def kernels(seq_len: int) -> int:
        layer, x = LAYERS[name](4, 4), torch.randn(2, seq_len, 4)
        optimizer = torch.optim.Adam(layer.parameters(), foreach=True)

        def call() -> None:
            if training:
                optimizer.zero_grad()
                layer(x).square().mean().backward()
                optimizer.step()
                return
            with torch.no_grad():
                layer(x)

        call()  # makes the optimizer's state
        return count_kernels(call)

    short, long = 8, 24
    per_token = (kernels(long) - kernels(short)) / (long - short)
    return Kernels(kernels(short) - short * per_token, per_token)

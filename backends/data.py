"""The numbers that a run is fed with: random tokens, the same for every layout of ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from backends.interpreter import seeded
from simcore.program import Program, coordinates


def sequence(seed: int, number: int, length: int, vocab: int) -> Tensor:
    """Return sequence ``number`` of the run: ``length`` + 1 token numbers."""
    return torch.randint(vocab, (length + 1,), generator=seeded(seed, "sequence", number))


def training_data(
    program: Program, rank: int, seed: int, device: torch.device
) -> dict[tuple[str, int], Tensor]:
    """Return this rank's tokens, targets and positions by (buffer, microbatch).

    Sequence numbers run over microbatches, then replicas, then rows, so that the global batch
    does not depend on the layout.
    """
    info, where = program.info, coordinates(program.mesh, rank)
    batch, length = int(info["batch"]), int(info["seq_len"])
    replica = where["dp_replicate"] * program.mesh["dp_shard"] + where["dp_shard"]
    data: dict[tuple[str, int], Tensor] = {}
    for microbatch in range(int(info["microbatches"])):
        first = (microbatch * int(info["dp"]) + replica) * batch
        rows = torch.stack(
            [sequence(seed, first + row, length, int(info["vocab"])) for row in range(batch)]
        ).to(device)
        data["tokens", microbatch] = rows[:, :-1].reshape(-1)
        data["targets", microbatch] = rows[:, 1:].reshape(-1)
        data["positions", microbatch] = torch.arange(length, device=device).repeat(batch)
    return data

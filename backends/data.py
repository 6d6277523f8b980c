"""The numbers that a run is fed with: random tokens, the same for every layout of ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from backends.weights import seeded
from simcore.program import Program, coordinates
from simcore.sequence import rank_positions


def sequence(seed: int, number: int, length: int, vocab: int) -> Tensor:
    """Return sequence ``number`` of the run: ``length`` + 1 token numbers."""
    return torch.randint(vocab, (length + 1,), generator=seeded(seed, "sequence", number))


def replica_of(program: Program, rank: int) -> int:
    """Return which of the replicas, each with sequences of its own, the rank belongs to."""
    where = coordinates(program.mesh, rank)
    return where["dp_replicate"] * program.mesh["dp_shard"] + where["dp_shard"]


def training_data(
    program: Program, rank: int, seed: int, device: torch.device
) -> dict[tuple[str, int], Tensor]:
    """Return this rank's tokens, targets and positions by (buffer, microbatch).

    Sequence numbers run over microbatches, then replicas, then rows, so that the global batch
    does not depend on the layout.
    """
    info, replica = program.info, replica_of(program, rank)
    batch, length = int(info["batch"]), int(info["seq_len"])
    mine = torch.from_numpy(rank_positions(program, rank)).to(device)
    data: dict[tuple[str, int], Tensor] = {}
    for microbatch in range(int(info["microbatches"])):
        first = (microbatch * int(info["dp"]) + replica) * batch
        rows = torch.stack(
            [sequence(seed, first + row, length, int(info["vocab"])) for row in range(batch)]
        ).to(device)
        data["tokens", microbatch] = rows[:, mine].reshape(-1)
        data["targets", microbatch] = rows[:, mine + 1].reshape(-1)
        data["positions", microbatch] = mine.repeat(batch)
    return data


def prompts(program: Program, rank: int, seed: int, length: int, device: torch.device) -> Tensor:
    """Return the prompts of this rank's replica, [batch, length]."""
    batch = int(program.info["batch"])
    first = replica_of(program, rank) * batch
    rows = [sequence(seed, first + row, length, int(program.info["vocab"])) for row in range(batch)]
    return torch.stack(rows)[:, :length].to(device)


def pass_data(tokens: Tensor, cached: int) -> dict[tuple[str, int], Tensor]:
    """Return the tokens [batch, new] of a pass and their positions, as a program reads them."""
    batch, new = tokens.shape
    positions = torch.arange(cached, cached + new, device=tokens.device)
    return {("tokens", 0): tokens.reshape(-1), ("positions", 0): positions.repeat(batch)}

"""The numbers that a run is fed with: random tokens, the same for every layout of ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from backends.weights import seeded
from simcore.mixed import MixedProgram
from simcore.program import Program, coordinates
from simcore.sequence import rank_positions


def sequence(seed: int, number: int, length: int, vocab: int) -> Tensor:
    """Return sequence ``number`` of the run: ``length`` + 1 token numbers."""
    return torch.randint(vocab, (length + 1,), generator=seeded(seed, "sequence", number))


def sample(seed: int, number: int, program: Program) -> tuple[Tensor, Tensor, Tensor]:
    """Return dense features, a row of every table, and whether it was clicked, of a sample."""
    info, random = program.info, seeded(seed, "sample", number)
    return (
        torch.randn(int(info["features"]), generator=random),
        torch.randint(int(info["rows"]), (int(info["tables"]),), generator=random),
        torch.randint(2, (), generator=random),
    )


def clicks(
    program: Program, replica: int, seed: int, device: torch.device
) -> dict[tuple[str, int], Tensor]:
    """Return the whole batch's rows of a rank's tables, and its own samples' features and clicks.

    Samples and tables are dealt out in equal runs, rank by rank.
    """
    ranks, mine = int(program.info["dp"]), int(program.info["batch"])
    dense, index, clicked = (
        torch.stack(parts).to(device)
        for parts in zip(*(sample(seed, i, program) for i in range(ranks * mine)), strict=True)
    )
    own = slice(replica * mine, (replica + 1) * mine)
    return {
        ("dense", 0): dense[own],
        ("index", 0): index.chunk(ranks, 1)[replica].contiguous(),
        ("targets", 0): clicked[own],
    }


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
    if info.get("data") == "clicks":
        return clicks(program, replica, seed, device)
    batch, length = int(info["batch"]), int(info["seq_len"])
    data: dict[tuple[str, int], Tensor] = {}
    for microbatch in range(int(info["microbatches"])):
        first = (microbatch * int(info["dp"]) + replica) * batch
        rows = torch.stack(
            [sequence(seed, first + row, length, int(info["vocab"])) for row in range(batch)]
        )
        data |= _microbatch(program, rank, microbatch, rows[:, :-1], rows[:, 1:], device)
    return data


def _microbatch(
    program: Program,
    rank: int,
    microbatch: int,
    tokens: Tensor,
    targets: Tensor,
    device: torch.device,
) -> dict[tuple[str, int], Tensor]:
    """Return the rank's part of the rows [batch, seq_len] of a microbatch."""
    mine, judged = (
        torch.from_numpy(rank_positions(program, rank, last=last)) for last in (False, True)
    )
    return {
        ("tokens", microbatch): tokens[:, mine].reshape(-1).to(device),
        ("targets", microbatch): targets[:, judged].reshape(-1).to(device),
        ("positions", microbatch): mine.repeat(len(tokens)).to(device),
    }


NO_TARGET = -1  # of padding


def piece_data(
    mixed: MixedProgram, number: int, rank: int, seed: int, device: torch.device
) -> dict[tuple[str, int], Tensor]:
    """Return a rank's part of a piece; its sequences are padded to one length."""
    piece = mixed.pieces[number]
    program = mixed.variants[piece.variant]
    shape, vocab = (len(piece.sequences), piece.tokens), int(program.info["vocab"])
    tokens, targets = torch.zeros(shape, dtype=torch.int64), torch.full(shape, NO_TARGET)
    for row, each in enumerate(piece.sequences):
        length = mixed.lengths[each]
        drawn = sequence(seed, each, length, vocab)
        tokens[row, :length], targets[row, :length] = drawn[:-1], drawn[1:]
    return _microbatch(program, rank, number, tokens, targets, device)


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

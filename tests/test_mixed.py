"""Steps over sequences of unequal length, run on real ranks, equal the dense reference."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from simcore.accounting import mixed_totals
from simcore.errors import InputError
from simcore.lower import lower_training
from simcore.mixed import IDLE, Assignment, MixedProgram, Piece, Variant, lane_of, lower_mixed
from simcore.mixed_metrics import mixed_memory
from simcore.models import ModelSpec
from simcore.program import Action, Program
from simcore.program_json import mixed_from_json, mixed_to_json
from simcore.strategy import ParallelStrategy
from simcore.workloads import TrainStep

torch = pytest.importorskip("torch")

from dense import Dense  # noqa: E402

from backends.data import sequence  # noqa: E402
from backends.launch import Job, RunOptions, RunResult, run_many  # noqa: E402
from backends.weights import dense_weight, local_weight  # noqa: E402

pytestmark = pytest.mark.distributed

SEED, STEPS = 5, 2
FP32 = {"weights_dtype": "fp32", "compute_dtype": "fp32", "kv_dtype": "fp32"}
LLAMA = ModelSpec("llama-like", 3, 16, 4, 2, 4, 24, 29, **FP32)
TIED = replace(LLAMA, name="tied", tied_embeddings=True, position="learned", max_positions=32)
MIXTRAL = replace(LLAMA, name="mixtral-like", experts=4, experts_per_token=2, moe_ffn=12, ffn=0)
EXACT = RunOptions(
    SEED, repeats=STEPS - 1, warmup=1, dtype="fp64", dump=("losses", "gradients"), timeout_s=60
)
COUNTED = RunOptions(SEED, repeats=1, warmup=0, track_memory=True, count_flops=True, timeout_s=60)


def mixed(
    model: ModelSpec, lengths: tuple[int, ...], pieces: list[Piece], **parallel: object
) -> MixedProgram:
    strategy = ParallelStrategy(**parallel)  # type: ignore[arg-type]
    lanes = strategy.dp * strategy.cp
    work = TrainStep(len(lengths), max(lengths), lengths=lengths)
    return lower_mixed(model, strategy, work, Assignment(lanes, tuple(pieces)))


LENGTHS = (3, 16, 5, 11, 7)
ON_TWO = [  # one long sequence over both lanes, then each its own, padded and not
    Piece((1,), 16, 0, 2),
    Piece((3,), 12, 0, 1),
    Piece((4, 2), 8, 1, 1),
    Piece((0,), 3, 1, 1),
]
CASES: dict[str, tuple[ModelSpec, MixedProgram]] = {
    "both": (LLAMA, mixed(LLAMA, LENGTHS, ON_TWO, dp_replicate=2)),
    "zero1-tied": (TIED, mixed(TIED, LENGTHS, ON_TWO, dp_shard=2, zero_stage=1)),
    "experts": (MIXTRAL, mixed(MIXTRAL, LENGTHS, ON_TWO, dp_replicate=2, recompute="full")),
    "idle": (LLAMA, mixed(LLAMA, (9, 4), [Piece((0, 1), 9, 1, 1)], cp=2, zero_stage=1)),
    "striped": (TIED, mixed(TIED, LENGTHS, ON_TWO, cp=2, cp_layout="striped")),
    # four ranks
    "hdp": (
        LLAMA,
        mixed(
            LLAMA,
            (16, 8, 7, 3, 5, 2),
            [
                Piece((0,), 16, 0, 4),
                Piece((1,), 8, 2, 2),
                Piece((2,), 8, 0, 1),
                Piece((3, 5), 3, 1, 1),
                Piece((4,), 5, 3, 1),
            ],
            dp_replicate=4,
        ),
    ),
    "ulysses-zero1-idle": (
        LLAMA,
        mixed(
            LLAMA,
            (14, 6),
            [Piece((0,), 14, 0, 2), Piece((1,), 6, 2, 1)],
            dp_shard=2,
            cp=2,
            cp_kind="ulysses",
            zero_stage=1,
        ),
    ),
    "tp-sp": (
        LLAMA,
        mixed(LLAMA, (14, 5, 8), [Piece((0,), 16, 0, 2), Piece((1,), 6, 0, 1),
              Piece((2,), 8, 1, 1)], cp=2, tp=2, sequence_parallel=True),
    ),
    "pp-apart": (
        LLAMA,
        mixed(
            LLAMA,
            (14, 5, 8, 3),
            [Piece((0,), 14, 0, 1), Piece((1,), 6, 1, 1), Piece((2,), 8, 1, 1),
             Piece((3,), 3, 1, 1)],
            dp_replicate=2,
            pp=2,
        ),
    ),
    "pp-idle": (LLAMA, mixed(LLAMA, (9, 4), [Piece((0, 1), 9, 1, 1)], cp=2, pp=2)),
}  # fmt: skip


@cache
def results(world: int) -> dict[str, RunResult]:
    """Run all that needs ``world`` ranks in one launch; return results by name."""
    jobs: dict[str, Job] = {}
    for name, (_, program) in CASES.items():
        if program.world == world:
            jobs[f"{name} exact"] = Job(program, EXACT)
            jobs[f"{name} counted"] = Job(program, COUNTED)
    return dict(zip(jobs, run_many(list(jobs.values())), strict=True))


@cache
def reference(name: str) -> tuple[list[float], dict[tuple[str, int], torch.Tensor]]:
    """Return losses of some steps and gradients of the first, each sequence run unpadded."""
    model, program = CASES[name]
    dense = Dense(model).double()
    whole = lower_training(model, ParallelStrategy(), TrainStep(1, 8)).buffers
    with torch.no_grad():
        for (key, layer), parameter in dense.named().items():
            parameter.copy_(dense_weight(key, layer, whole[key], 1, SEED, torch.float64))
    optimizer = torch.optim.Adam(dense.parameters(), lr=1e-4, betas=(0.9, 0.95), eps=1e-8)
    losses, gradients = [], {}
    rows = [sequence(SEED, i, n, model.vocab)[None] for i, n in enumerate(program.lengths)]
    for _ in range(STEPS):
        optimizer.zero_grad()
        sums = [dense.loss(row[:, :-1], row[:, 1:]) * (row.shape[1] - 1) for row in rows]
        loss = torch.stack(sums).sum() / sum(program.lengths)
        loss.backward()
        losses.append(float(loss.detach()))
        gradients = gradients or {key: value.grad.clone() for key, value in dense.named().items()}
        optimizer.step()
    return losses, gradients


def gradient_shard(
    program: Program,
    rank: int,
    name: str,
    layer: int,
    gradients: Mapping[tuple[str, int], torch.Tensor],
) -> np.ndarray:
    """Cut from whole gradients what the flat buffer ``name`` of ``rank`` should hold."""
    unit, kind = name.rsplit(".", 1)
    flat, tp = np.zeros(int(program.buffers[f"{unit}.g"].elements)), program.mesh["tp"]
    for member, buffer in program.buffers.items():
        if buffer.base == f"{unit}.w" and not buffer.part:
            whole = gradients[member, layer if buffer.layered else -1]
            part = local_weight(whole, buffer, lambda group: rank % tp, tp).numpy().ravel()
            flat[buffer.offset : buffer.offset + buffer.elements] = part
    if kind == "g":
        return flat
    size = int(program.buffers[name].elements)
    return flat[lane_of(program.mesh, rank) * size :][:size]


@pytest.mark.parametrize("name", CASES)
def test_a_mixed_step_equals_the_dense_reference(name: str) -> None:
    """Losses of two steps, every gradient, and on each rank its FLOPs and collectives."""
    model, program = CASES[name]
    every = results(program.world)
    exact, counted = every[f"{name} exact"], every[f"{name} counted"]
    losses, gradients = reference(name)
    assert exact.losses == pytest.approx(losses, rel=1e-10)
    seen = set()
    for rank in exact.ranks:
        last = program.variants[program.actions(rank.rank)[-1][0]]
        for key, array in rank.arrays.items():
            buffer, layer = key.rsplit("/", 1)
            seen.add((buffer.split(".")[0], int(layer) if last.buffers[buffer].layered else -1))
            expected = gradient_shard(last, rank.rank, buffer, int(layer), gradients)
            np.testing.assert_allclose(array, expected, rtol=1e-9, atol=1e-13)
    assert {layer for unit, layer in seen if unit != "embed" and layer >= 0} == set(
        range(model.layers)
    )
    assert {("embed", -1), ("head", -1)} <= seen
    for rank in counted.ranks:
        totals = mixed_totals(program, rank.rank)
        assert rank.payload_bytes == dict(totals.payload_bytes)
        assert rank.flops == totals.flops
    if program.mesh["pp"] == 1:
        held = mixed_memory(program, np.inf, 0.0)["peak_memory_bytes"]
        most = max(rank.peak_live_bytes or 0 for rank in counted.ranks)
        later = 4 * len(program.pieces)  # losses of pieces after the heaviest one
        assert 0 <= held - most < later


# ---------------------------------------------------------------- what is refused


def test_what_cannot_share_a_step_is_refused() -> None:
    def refused(
        match: str, pieces: list[Piece] = ON_TWO, shape: ModelSpec = LLAMA, **p: object
    ) -> None:
        with pytest.raises(InputError, match=match):
            mixed(shape, LENGTHS, pieces, **p)

    refused("zero_stage 2 gathers", dp_shard=2, zero_stage=2)
    refused("ep 2 exchanges rows", shape=MIXTRAL, dp_replicate=2, ep=2)
    refused("capacity_factor", shape=MIXTRAL, dp_replicate=2, capacity_factor=1.0)
    refused("updates weights within", dp_replicate=2, schedule="pipedream")
    refused("loss_chunks needs sequences of one length", dp_replicate=2, loss_chunks=2)
    refused("backup_workers needs", dp_replicate=2, backup_workers=1)
    refused("not causal", shape=replace(LLAMA, causal=False), dp_replicate=2)
    refused("stay together", dp_replicate=2, pp=2)
    refused("runs 4 sequences", ON_TWO[1:], dp_replicate=2)
    refused("does not lie on a multiple", [*ON_TWO[:1], Piece((0, 2, 3, 4), 12, 1, 2)], cp=2)
    refused("16 tokens does not fit", [Piece((0, 1, 2, 3, 4), 12, 0, 2)], cp=2)
    refused("not a multiple of 4", [Piece((0, 1, 2, 3, 4), 18, 0, 2)], cp=2)


def test_the_actions_of_a_rank_name_its_pieces() -> None:
    _, program = CASES["both"]
    found = [" ".join(str(action) for _, action in program.actions(rank)) for rank in (0, 1)]
    assert found == ["0F0 0B0 0F1 0BR1 0O0", "0F0 0B0 0F2 0B2 0F3 0BR3 0O0"]
    assert program.actions(1)[-1] == (Variant(3, 1, 1), Action(0, "O", 0))
    idle = CASES["idle"][1].actions(0)
    assert idle == [(IDLE, Action(0, "R", 0)), (IDLE, Action(0, "O", 0))]


def test_a_mixed_step_survives_json() -> None:
    for _, program in CASES.values():
        text = json.loads(json.dumps(mixed_to_json(program)))
        assert mixed_to_json(mixed_from_json(text)) == mixed_to_json(program)

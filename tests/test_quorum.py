"""Backup workers: a step waits for the fastest n - b data ranks, and counts theirs alone."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from machines import LLAMA, Constant, Wires, cluster_cost

from simcore.accounting import step_totals
from simcore.engine import simulate
from simcore.errors import InputError
from simcore.estimate import estimate, lower_bound, serial_sum
from simcore.lower import lower_training
from simcore.models import ModelSpec
from simcore.ops import WORK
from simcore.program import Program
from simcore.stragglers import Slow, chance_of_any, chance_of_more, slowed_step_s
from simcore.strategy import ParallelStrategy
from simcore.workloads import TrainStep


def lowered(backups: int, ranks: int = 4) -> Program:
    parallel = ParallelStrategy(dp_replicate=ranks, backup_workers=backups)
    return lower_training(LLAMA, parallel, TrainStep(2 * ranks, 64))


@pytest.mark.parametrize("backups", [1, 3])
def test_machines_agree_where_nobody_is_slow(backups: int) -> None:
    program = lowered(backups)
    cost = cluster_cost(program)
    found = estimate(program, cost, cost).step_s
    for options in ({"detail": False}, {"detail": True}, {"every_rank": True}):
        assert simulate(program, cost, cost, **options).step_s == pytest.approx(found, rel=1e-9)
    assert lower_bound(program, cost) <= found * (1 + 1e-9)
    assert found <= serial_sum(program, cost, cost) * (1 + 1e-9)


@pytest.mark.parametrize("backups", [0, 1, 2])
def test_only_more_slow_ranks_than_backups_delay_a_step(backups: int) -> None:
    """The mean over all draws of slow ranks is the expectation from the binomial tail."""
    program, chance, factor = lowered(backups), 0.3, 2.0
    cost = Constant({kind: 1e-3 for kind in WORK if kind.startswith("matmul")})
    plain = simulate(program, cost, Wires(), every_rank=True)
    compute = plain.times[0].compute_s
    mean = 0.0
    for slow in itertools.product((False, True), repeat=4):
        slowdown = {rank: factor for rank, held in enumerate(slow) if held}
        found = simulate(program, cost, Wires(), every_rank=True, slowdown=slowdown).step_s
        expected = plain.step_s + (sum(slow) > backups) * compute * (factor - 1)
        assert found == pytest.approx(expected, rel=1e-9)
        mean += found * chance ** sum(slow) * (1 - chance) ** (4 - sum(slow))
    law = Slow(chance, factor, spared=backups)
    assert slowed_step_s(plain.step_s, compute, 0.0, 4, law) == pytest.approx(mean, rel=1e-9)


@given(st.floats(0, 1), st.integers(1, 60), st.integers(0, 60))
def test_the_tail_is_the_binomials(chance: float, count: int, spared: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    found = chance_of_more(chance, count, spared)
    assert found == pytest.approx(stats.binom.sf(spared, count, chance), rel=1e-6, abs=1e-12)
    assert found <= chance_of_any(chance, count) + 1e-12


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dp_replicate": 2, "backup_workers": 2}, "below the 2 data ranks"),
        ({"dp_replicate": 2, "backup_workers": 1, "tp": 2}, "tp does not go with it"),
        ({"dp_shard": 2, "backup_workers": 1}, "zero_stage does not go with it"),
        ({"dp_replicate": 2, "backup_workers": 1, "grad_codec": "int8"}, "grad_codec does not"),
        ({"dp_replicate": 2, "backup_workers": 1, "schedule": "pipedream"}, "pipeline schedule"),
    ],
)
def test_refusals_say_what_to_do(options: dict[str, Any], words: str) -> None:
    parallel = ParallelStrategy(**options)
    with pytest.raises(InputError, match=words):
        lower_training(LLAMA, parallel, TrainStep(4 * parallel.dp, 64))


# ------------------------------------------------------------------------------- on real ranks

torch = pytest.importorskip("torch")

from dense import Dense  # noqa: E402

from backends.data import sequence  # noqa: E402
from backends.launch import Job, RunOptions, RunResult, run_many  # noqa: E402
from backends.weights import dense_weight  # noqa: E402

SEED, STEP, DELAY_S = 5, TrainStep(6, 8), 0.4
SMALL = ModelSpec(
    "small", 2, 16, 4, 2, 4, 24, 29, weights_dtype="fp32", compute_dtype="fp32", kv_dtype="fp32"
)
PLAN = ParallelStrategy(dp_replicate=3, backup_workers=1)


@cache
def ran() -> dict[int, RunResult]:
    """Return the run in which rank 0, and that in which rank 1 is held up."""
    program = lower_training(SMALL, PLAN, STEP)
    jobs = [
        Job(
            program,
            RunOptions(
                SEED, 1, 1, dtype="fp64", dump=("gradients",), count_flops=True, timeout_s=60,
                delay_s={str(late): DELAY_S},
            ),
        )
        for late in (0, 1)
    ]  # fmt: skip
    return dict(zip((0, 1), run_many(jobs), strict=True))


def dense_gradients(numbers: list[int]) -> dict[tuple[str, int], torch.Tensor]:
    """Return the gradients of the mean loss over some of the sequences."""
    start = lower_training(SMALL, ParallelStrategy(), STEP)
    dense = Dense(SMALL).double()
    for (name, layer), parameter in dense.named().items():
        whole = dense_weight(name, layer, start.buffers[name], 1, SEED, torch.float64)
        parameter.data.copy_(whole)
    rows = torch.stack([sequence(SEED, i, STEP.seq_len, SMALL.vocab) for i in numbers])
    dense.loss(rows[:, :-1], rows[:, 1:]).backward()
    return {key: parameter.grad for key, parameter in dense.named().items()}


@pytest.mark.distributed
@pytest.mark.parametrize("late", [0, 1])
def test_every_rank_gets_the_mean_of_those_that_came_in_time(late: int) -> None:
    """Sequence i of a microbatch belongs to rank i mod 3."""
    program = lower_training(SMALL, PLAN, STEP)
    gradients = dense_gradients([i for i in range(6) if i % 3 != late])
    for rank in ran()[late].ranks:
        assert len(rank.arrays) == 4  # embedding, two layers, head
        for key, array in rank.arrays.items():
            buffer, layer = key.rsplit("/", 1)
            for name, held in program.buffers.items():
                if held.base == f"{buffer.split('.')[0]}.w":
                    whole = gradients[name, int(layer) if held.layered else -1]
                    part = array[held.offset : held.offset + held.elements]
                    np.testing.assert_allclose(part, whole.numpy().ravel(), rtol=1e-9, atol=1e-13)


@pytest.mark.distributed
@pytest.mark.parametrize("late", [0, 1])
def test_nobody_waits_for_the_late_rank(late: int) -> None:
    program = lower_training(SMALL, PLAN, STEP)
    for rank in ran()[late].ranks:
        assert (rank.seconds[0] > DELAY_S) == (rank.rank == late)
        totals = step_totals(program, 0)
        doubled = {key: 2 * size for key, size in totals.payload_bytes.items()}  # in float64
        assert rank.payload_bytes == doubled
        assert rank.flops == totals.flops

"""Steps over sequences of different lengths, against steps over equal ones."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.catalogue import make_cluster
from hwmodels.cost import ClusterCost
from simcore.catalogue import load_model
from simcore.engine import simulate
from simcore.errors import InputError
from simcore.lengths import length_classes, lognormal_lengths, simulate_lengths
from simcore.lower import lower_training
from simcore.models import ModelSpec
from simcore.strategy import MESH_AXES, ParallelStrategy
from simcore.workloads import TrainStep

MODEL = ModelSpec("mine", 4, 512, 8, 8, 64, 1024, 1000)
LIMIT_S, LIMIT_BYTES = 60.0, 2e9  # processor time, twice the goal: others share the machine


def cost_of(parallel: ParallelStrategy) -> ClusterCost:
    gpus = min(8, parallel.world)
    cluster = make_cluster("h100-sxm-80gb", gpus, parallel.world // gpus, None, None)
    return ClusterCost(cluster, {axis: getattr(parallel, axis) for axis in MESH_AXES})


def step_s(parallel: ParallelStrategy, lengths: list[int], **more: object) -> float:
    cost = cost_of(parallel)
    found = simulate_lengths(MODEL, parallel, np.array(lengths), cost, cost, **more)  # type: ignore[arg-type]
    return found.step_s


@pytest.mark.parametrize(
    "parallel",
    [
        ParallelStrategy(dp_replicate=2, pp=2, tp=2),
        ParallelStrategy(dp_shard=4, zero_stage=3),
        ParallelStrategy(dp_replicate=2, pp=4, schedule="gpipe", microbatch=2, recompute="full"),
    ],
)
def test_equal_lengths_are_the_plain_step(parallel: ParallelStrategy) -> None:
    count, cost = 8 * parallel.dp * parallel.microbatch, cost_of(parallel)
    plain = simulate(
        lower_training(MODEL, parallel, TrainStep(count, 256)), cost, cost, detail=False
    )
    assert step_s(parallel, [256] * count) == pytest.approx(plain.step_s, rel=1e-12)


def test_without_a_pipeline_microbatches_add_up() -> None:
    """Four of each length take the mean of eight of one and eight of the other."""
    parallel = ParallelStrategy()
    short, long = step_s(parallel, [4096] * 8), step_s(parallel, [16384] * 8)
    both = step_s(parallel, [4096, 16384] * 4)
    assert both == pytest.approx((short + long) / 2, rel=0.02)


def test_the_step_is_that_of_the_slowest_replica() -> None:
    parallel = ParallelStrategy(dp_replicate=4, pp=2)
    random = np.random.default_rng(0)
    lengths = random.choice([128, 512, 2048], size=(4, 6))
    cost = cost_of(parallel)
    found = simulate_lengths(MODEL, parallel, lengths.ravel(), cost, cost)
    alone = [step_s(parallel, [*row] * 4) for row in lengths.tolist()]
    assert found.replica_s == pytest.approx(alone)
    assert found.step_s == max(alone)
    assert found.tokens == lengths.sum()
    assert found.tokens_per_s == pytest.approx(found.tokens / found.step_s)
    assert found.imbalance == pytest.approx(max(alone) / np.mean(alone))
    assert found.padding_fraction == 0.0
    assert found.classes == (128, 512, 2048)


def test_replicas_that_differ_in_order_are_folded() -> None:
    parallel = ParallelStrategy(dp_replicate=3)
    cost, lengths = cost_of(parallel), np.array([128, 256, 256, 128, 512, 512])
    sorted_first = simulate_lengths(MODEL, parallel, lengths, cost, cost)
    as_given = simulate_lengths(MODEL, parallel, lengths, cost, cost, longest_first=False)
    assert (sorted_first.replicas_simulated, as_given.replicas_simulated) == (2, 3)


@settings(max_examples=25)
@given(st.lists(st.sampled_from([64, 128, 256, 512]), min_size=8, max_size=8), st.integers(0, 7))
def test_a_longer_sequence_never_helps(lengths: list[int], which: int) -> None:
    parallel = ParallelStrategy(dp_replicate=2, pp=2)
    longer = [n * 2 if i == which else n for i, n in enumerate(lengths)]
    one, two = (step_s(parallel, each, longest_first=False) for each in (lengths, longer))
    assert one <= two * (1 + 1e-9)


@given(
    st.lists(st.integers(1, 10**6), min_size=1, max_size=200),
    st.integers(1, 20),
    st.sampled_from([1, 8]),
)
def test_classes_hold_their_lengths(lengths: list[int], classes: int, unit: int) -> None:
    found = length_classes(np.array(lengths), classes, unit)
    assert np.all(found >= lengths)
    assert np.all(found % unit == 0)
    assert np.unique(found).size <= classes
    assert found.max() == -(-max(lengths) // unit) * unit
    if unit == 1 and np.unique(lengths).size <= classes:
        assert np.array_equal(found, lengths)


def test_more_classes_pad_less() -> None:
    lengths = lognormal_lengths(2000, 1000, 1.0, 32768, seed=3)
    padded = [length_classes(lengths, n).sum() for n in (1, 2, 4, 8, 16, 32, 64)]
    assert padded == sorted(padded, reverse=True)
    assert lengths.min() >= 1
    assert lengths.max() <= 32768
    assert np.median(lengths) == pytest.approx(1000, rel=0.1)


def test_bad_lengths_are_refused() -> None:
    parallel = ParallelStrategy(dp_replicate=2)
    with pytest.raises(InputError, match="not a multiple of dp 2"):
        step_s(parallel, [128] * 3)
    with pytest.raises(InputError, match="1 or more"):
        step_s(parallel, [0, 128])
    with pytest.raises(InputError, match="above 0"):
        lognormal_lengths(0, 1, 1, 1)


@pytest.mark.slow
def test_twelve_thousand_ranks_with_lengths_of_their_own() -> None:
    import resource

    parallel = ParallelStrategy(tp=8, pp=8, dp_replicate=192, zero_stage=1, sequence_parallel=True)
    model, cost = load_model("llama-3.1-70b"), cost_of(parallel)
    assert parallel.world == 12_288
    lengths = lognormal_lengths(32 * parallel.dp, 4000, 1.0, 65536, seed=1)
    start = time.process_time()
    found = simulate_lengths(model, parallel, lengths, cost, cost)
    assert time.process_time() - start < LIMIT_S
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 < LIMIT_BYTES
    assert found.replica_s.shape == (192,)
    assert found.imbalance > 1.2
    longest = simulate_lengths(
        model, dataclasses.replace(parallel), np.full(lengths.size, 65536), cost, cost
    )
    assert found.step_s < longest.step_s

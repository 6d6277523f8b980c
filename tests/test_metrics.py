"""Metrics against hand calculation and against one another."""

from __future__ import annotations

import math

import pytest

from hwmodels.catalogue import make_cluster
from hwmodels.cost import ClusterCost
from simcore import metrics
from simcore.catalogue import load_model
from simcore.decode import passes
from simcore.estimate import estimate
from simcore.liveness import activation_peaks, residents
from simcore.lower import lower_pass, lower_training
from simcore.models import ModelSpec, forward_flops, parameter_count
from simcore.program import Program
from simcore.strategy import ParallelStrategy
from simcore.timeline import RankTimes, Timeline
from simcore.workloads import CollectiveCall, Generation, TrainStep

SMALL = ModelSpec(
    name="small", layers=4, hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=128, vocab=256
)
LIMITS = {"memory_bytes": 80e9, "reserve_bytes": 8e9}
H100 = 989.4e12


def program(parallel: ParallelStrategy, work: TrainStep) -> Program:
    return lower_training(SMALL, parallel, work)


def test_model_flops_of_llama_by_hand() -> None:
    model = load_model("llama-3.1-8b")
    assert parameter_count(model) == 8_030_261_248
    # 6 N + 12 L h s with h = 32 heads x 128
    full = 6 * 8_030_261_248 + 12 * 32 * (32 * 128) * 8192
    half = 6 * 8_030_261_248 + 6 * 32 * (32 * 128) * 8192
    assert metrics.model_flops_per_token(model, 8192) == full
    assert metrics.model_flops_per_token(model, 8192, causal=True) == half


def test_only_active_experts_count() -> None:
    model = load_model("mixtral-8x7b")
    attention = 12 * 32 * 4096 * 1024
    assert metrics.model_flops_per_token(model, 1024) == 6 * 12_879_925_248 + attention


def test_utilisation_by_hand() -> None:
    model, work = load_model("llama-3.1-8b"), TrainStep(64, 8192)
    found = metrics.achieved(model, work, world=8, step_s=10.0, peak_flops_per_s=H100)
    flops = 64 * 8192 * metrics.model_flops_per_token(model, 8192)
    assert found["model_flops"] == flops
    assert found["mfu"] == pytest.approx(flops / (10.0 * 8 * H100))
    assert found["tokens_per_s"] == 64 * 8192 / 10.0
    assert found["tokens_per_s_per_gpu"] == 64 * 8192 / 80.0
    assert found["mfu_causal"] < found["mfu"]


@pytest.mark.parametrize(
    "parallel",
    [
        ParallelStrategy(microbatch=2),
        ParallelStrategy(tp=2),
        ParallelStrategy(pp=2),
        ParallelStrategy(dp_shard=2),
        ParallelStrategy(tp=2, pp=2, dp_replicate=2, sequence_parallel=True),
    ],
)
def test_executed_flops_are_three_forwards_and_the_attention_again(
    parallel: ParallelStrategy,
) -> None:
    """Backward is twice the forward, and fused attention computes its scores once more."""
    work = TrainStep(8, 32)
    forward = forward_flops(SMALL, 8, 32)
    scores = 4 * 8 * 4 * 32 * 32 * 2 * 16  # layers, sequences, heads, pairs, 2 d
    assert metrics.executed_flops(program(parallel, work)) == 3 * forward + scores


def test_recomputation_executes_the_layers_once_more() -> None:
    work = TrainStep(8, 32)
    plain = metrics.executed_flops(program(ParallelStrategy(), work))
    again = metrics.executed_flops(program(ParallelStrategy(recompute="full"), work))
    head = 2 * 8 * 32 * 64 * 256
    assert again - plain == forward_flops(SMALL, 8, 32) - head


def test_train_metrics_are_complete_and_consistent() -> None:
    parallel, work = ParallelStrategy(pp=2, dp_replicate=2), TrainStep(16, 32)
    lowered = program(parallel, work)
    times = {0: RankTimes(1.0, 0.5, 0.5), 1: RankTimes(1.0, 0.0, 1.0)}
    found = metrics.train_metrics(
        SMALL,
        parallel,
        work,
        lowered,
        Timeline(2.0, (), times),
        chip_peak_flops_per_s=1e12,
        **LIMITS,
    )
    assert found["bubble_fraction"] == pytest.approx(0.375)
    assert found["exposed_communication_fraction"] == pytest.approx(0.125)
    assert found["hfu"] == metrics.executed_flops(lowered) / (2.0 * 4 * 1e12)
    assert found["peak_memory_bytes"] == sum(found["peak_memory_parts_bytes"].values())
    assert set(found["peak_memory_parts_bytes"]) == set(metrics.TRAIN_PARTS)
    assert found["fits"] is True


def test_weights_gradients_and_states_by_hand() -> None:
    """bf16 weights 2 bytes, fp32 gradients 4, two fp32 moments and a master copy 12."""
    found = metrics.memory_metrics(
        program(ParallelStrategy(), TrainStep(1, 32)), metrics.TRAIN_PARTS, **LIMITS
    )["peak_memory_parts_bytes"]
    count = parameter_count(SMALL)
    assert found["weights"] == 2 * count
    assert found["gradients"] == 4 * count
    assert found["optimizer"] == 12 * count


def test_fits_counts_the_reserve() -> None:
    lowered = program(ParallelStrategy(), TrainStep(1, 32))
    need = metrics.memory_metrics(lowered, metrics.TRAIN_PARTS, **LIMITS)["peak_memory_bytes"]
    for spare, fits in ((0.0, True), (1.0, False)):
        found = metrics.memory_metrics(lowered, metrics.TRAIN_PARTS, need + 100.0, 100.0 + spare)
        assert found["fits"] is fits


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
@pytest.mark.parametrize("pp", [1, 2, 4])
def test_worst_rank_is_among_the_heaviest(schedule: str, pp: int) -> None:
    lowered = program(ParallelStrategy(pp=pp, schedule=schedule), TrainStep(8, 32))
    every = [
        residents(lowered, rank).total + activation_peaks(lowered, rank)[0]
        for rank in range(len(lowered.order))
    ]
    found = metrics.memory_metrics(lowered, metrics.TRAIN_PARTS, **LIMITS)
    assert found["peak_memory_bytes"] == max(every)
    assert len(metrics.heaviest_ranks(lowered)) <= 3


def cost_of(parallel: ParallelStrategy) -> ClusterCost:
    mesh = lower_pass(SMALL, parallel, 4, 8, 0).mesh
    return ClusterCost(make_cluster("h100-sxm-80gb", parallel.world), mesh)


@pytest.mark.parametrize(
    "parallel", [ParallelStrategy(), ParallelStrategy(tp=2), ParallelStrategy(pp=2, tp=2)]
)
def test_generation_is_the_sum_of_its_passes(parallel: ParallelStrategy) -> None:
    """Passes priced at once as arrays cost what each costs alone by the estimator."""
    work, cost = Generation(4, 8, 6), cost_of(parallel)
    found = metrics.generation_seconds(SMALL, parallel, work, "autoregressive", cost, cost)
    alone = [
        estimate(metrics.pass_program(SMALL, parallel, work, step), cost, cost).step_s
        for step in passes("autoregressive", work)
    ]
    assert found.seconds == pytest.approx(alone, rel=1e-9)


def test_generate_metrics_by_hand() -> None:
    work = Generation(4, 8, 6)
    steps = tuple(passes("autoregressive", work))
    times = metrics.PassTimes(steps, (1.0, 0.1, 0.1, 0.1, 0.1, 0.1))
    found = metrics.generate_metrics(SMALL, ParallelStrategy(), work, times, **LIMITS)
    assert found["seconds"] == pytest.approx(1.5)
    assert found["ttft_s"] == 1.0
    assert found["tpot_s"] == pytest.approx(0.1)
    assert found["tokens_per_s"] == pytest.approx(4 * 6 / 1.5)
    assert found["passes"] == 6
    assert found["committed_per_pass"] == 1.0
    assert found["speedup_vs_autoregressive"] == 1.0
    parts = found["peak_memory_parts_bytes"]
    assert parts["weights"] == 2 * parameter_count(SMALL)
    # keys and values of 2 heads x 16 in 4 layers, bf16; the last token's are never needed
    assert parts["kv_cache"] == 4 * (8 + 6 - 1) * 2 * 2 * 16 * 4 * 2
    assert found["peak_memory_bytes"] == sum(parts.values())


def test_one_output_token_has_no_time_per_further_token() -> None:
    work = Generation(1, 8, 1)
    times = metrics.PassTimes(tuple(passes("autoregressive", work)), (1.0,))
    found = metrics.generate_metrics(SMALL, ParallelStrategy(), work, times, **LIMITS)
    assert found["tpot_s"] == 0.0
    assert found["seconds"] == found["ttft_s"] == 1.0


def test_collective_and_op_metrics() -> None:
    call = CollectiveCall("all_reduce", 8e6, 2)
    found = metrics.collective_metrics(call, 2.0, 4e6, "ring")
    assert found == {
        "seconds": 2.0,
        "algorithm_bytes_per_s": 4e6,
        "bus_bytes_per_s": 4e6,
        "algorithm": "ring",
    }
    assert metrics.collective_metrics(call, 0.0, 0.0, "ring")["algorithm_bytes_per_s"] == 0.0
    limits = {"compute": 1.0, "memory": 3.0, "latency": 2.0}
    found = metrics.op_metrics(4.0, 8.0, 16.0, limits)
    assert found == {"seconds": 4.0, "flops_per_s": 2.0, "bytes_per_s": 4.0, "bound": "memory"}
    assert math.isfinite(found["seconds"])

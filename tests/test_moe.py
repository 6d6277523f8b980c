"""Mixtures of experts: closed forms of their work, their traffic and where experts lie."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from machines import LLAMA, Wires, cluster_cost
from test_laws import agree

from hwmodels.catalogue import load_cluster
from hwmodels.cost import ClusterCost
from hwmodels.curves import choose_curves
from hwmodels.topology import place_group
from simcore.accounting import step_totals
from simcore.catalogue import load_model
from simcore.errors import InputError
from simcore.liveness import activation_peaks, residents
from simcore.lower import lower_pass, lower_training
from simcore.models import ModelSpec, forward_flops, parameter_count
from simcore.moe import ExpertGrid, touched_experts
from simcore.ops import work
from simcore.program import Program, group_ranks
from simcore.strategy import ParallelStrategy
from simcore.workloads import TrainStep

MOE = replace(LLAMA, name="small-moe", experts=8, experts_per_token=2, moe_ffn=256)
MIXED = replace(MOE, name="small-mixed", dense_layers=1, shared_experts=1)
SEQ, BF16, FP32 = 128, 2, 4
GRIDS: dict[str, dict[str, object]] = {
    "one": {},
    "dp": {"dp_replicate": 2},
    "ep": {"dp_replicate": 4, "ep": 2},
    "ep zero3": {"dp_shard": 4, "ep": 2},
    "ep hsdp": {"dp_replicate": 2, "dp_shard": 4, "ep": 2},
    "ep over replicas": {"dp_replicate": 2, "dp_shard": 2, "ep": 4},
    "tp": {"tp": 2},
    "tp x ep": {"tp": 2, "dp_shard": 2, "ep": 2},
    "folded": {"tp": 2, "dp_shard": 2, "ep": 4, "sequence_parallel": True},
    "folded zero1": {"tp": 2, "dp_shard": 4, "ep": 4, "zero_stage": 1, "sequence_parallel": True},
    "ep x pp": {"dp_replicate": 2, "ep": 2, "pp": 2, "recompute": "full"},
}


def strategy(name: str, **options: object) -> ParallelStrategy:
    return ParallelStrategy(**{**GRIDS[name], **options})  # type: ignore[arg-type]


def lowered(parallel: ParallelStrategy, model: ModelSpec = MOE, microbatches: int = 3) -> Program:
    return lower_training(model, parallel, TrainStep(microbatches * parallel.dp, SEQ))


def summed(program: Program, kinds: tuple[str, ...], actions: tuple[str, ...], what: str) -> float:
    """Return FLOPs or payload bytes of op kinds in actions over all ranks."""
    total = sum(
        float(getattr(work(op), what))
        for order in program.order
        for action in order
        if action.kind in actions
        for _, _, op in program.ops(action.body)
        if op.kind in kinds
    )
    return total * program.world / program.mesh["pp"]


# ---------------------------------------------------------------- work


@pytest.mark.parametrize("name", GRIDS)
def test_flops_of_experts(name: str) -> None:
    """Three products of 2 t k hidden ffn, however the experts lie; twice that backward."""
    parallel = strategy(name, capacity_factor=1.0)
    program = lowered(parallel)
    tokens = 3 * parallel.dp * SEQ
    forward = 3 * 2 * tokens * MOE.experts_per_token * MOE.hidden * MOE.moe_ffn * MOE.layers
    again = forward if parallel.recompute == "full" else 0
    found = summed(program, ("grouped_matmul",), ("F",), "flops")
    assert found == pytest.approx(forward, rel=1e-12)
    found = summed(program, ("grouped_matmul",), ("B", "BR"), "flops")
    assert found == pytest.approx(2 * forward + again, rel=1e-12)


@pytest.mark.parametrize("name", ["one", "dp", "tp"])
@pytest.mark.parametrize("model", [MOE, MIXED], ids=lambda m: m.name)
def test_flops_of_the_network_without_a_capacity(name: str, model: ModelSpec) -> None:
    """What the network asks for, plus the router's products that tensor ranks repeat."""
    parallel = strategy(name)
    program = lowered(parallel, model)
    layers = model.layers - model.dense_layers
    tokens = 3 * parallel.dp * SEQ
    again = (parallel.tp - 1) * 2 * tokens * model.hidden * model.experts * layers
    every = tuple({op.kind for block in program.blocks.values() for op in block.ops})
    found = summed(program, every, ("F",), "flops")
    asked = forward_flops(model, 3 * parallel.dp, SEQ) + again
    assert found == pytest.approx(asked, rel=1e-12)


@settings(max_examples=30, deadline=None)
@given(experts=st.integers(1, 16), ffn=st.sampled_from([32, 64, 96]))
def test_experts_that_all_tokens_choose_are_one_dense_layer(experts: int, ffn: int) -> None:
    alike = replace(LLAMA, experts=experts, experts_per_token=experts, moe_ffn=ffn)
    dense = replace(LLAMA, ffn=experts * ffn)
    one = ParallelStrategy()
    routed, plain = lowered(one, alike), lowered(one, dense)
    kinds = ("matmul", "grouped_matmul")
    router = 3 * SEQ * 2 * alike.hidden * experts * alike.layers
    for actions, times in ((("F",), 1), (("B", "BR"), 2)):
        found = summed(routed, kinds, actions, "flops")
        assert found - times * router == pytest.approx(summed(plain, kinds, actions, "flops"))


@pytest.mark.parametrize("name", [name for name in GRIDS if "ep" in GRIDS[name]])
@pytest.mark.parametrize("factor", [0.5, 1.0, 4.0])
def test_bytes_of_the_exchanges(name: str, factor: float) -> None:
    """There and back in each direction: the even share of rows, times the capacity factor."""
    parallel = strategy(name, capacity_factor=factor)
    program = lowered(parallel)
    split = 1 if parallel.sequence_parallel else parallel.tp  # ranks that send the same rows
    rows = 3 * parallel.dp * SEQ * MOE.experts_per_token * factor * split
    each = 2 * rows * MOE.hidden * BF16 * MOE.layers
    found = summed(program, ("all_to_all",), ("F",), "payload_bytes")
    assert found == pytest.approx(each, rel=1e-12)
    again = 2 if parallel.recompute == "full" else 1
    found = summed(program, ("all_to_all",), ("B", "BR"), "payload_bytes")
    assert found == pytest.approx(again * each, rel=1e-12)


@given(tokens=st.integers(1, 400), factor=st.floats(0.1, 20.0))
def test_capacity(tokens: int, factor: float) -> None:
    grid = ExpertGrid(capacity_factor=factor)
    most = grid.capacity(MOE, tokens)
    assert 1 <= most <= tokens
    assert most == tokens or most >= factor * tokens * MOE.experts_per_token / MOE.experts
    assert most <= ExpertGrid(capacity_factor=factor * 1.5).capacity(MOE, tokens)
    if factor >= MOE.experts / MOE.experts_per_token:
        assert most == tokens
    assert list(grid.capacity(MOE, np.array([tokens, 7]))) == [most, grid.capacity(MOE, 7)]


def test_touched_experts_by_counting() -> None:
    draws = np.random.default_rng(3)
    found = [
        len({e for _ in range(5) for e in draws.choice(8, 2, replace=False)}) for _ in range(4000)
    ]
    assert touched_experts(MOE, 5) == pytest.approx(np.mean(found), rel=0.01)
    assert touched_experts(MOE, 1) == MOE.experts_per_token


# ---------------------------------------------------------------- where experts lie


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("model", [MOE, MIXED], ids=lambda m: m.name)
def test_every_parameter_is_held_once_per_copy(name: str, model: ModelSpec) -> None:
    parallel = strategy(name, pp=1, zero_stage=0)
    program, grid = lowered(parallel, model), ExpertGrid.of(parallel)
    held = model.layers - model.dense_layers
    experts = program.buffers["experts.w"].elements * held * program.world
    matrices = held * model.experts * 3 * model.hidden * model.moe_ffn
    assert experts == matrices * grid.edp
    if parallel.tp == 1:
        layers = {"moe.w": held, "layer.w": model.dense_layers, "embed.w": 1, "head.w": 1}
        dense = sum(
            program.buffers[name].elements * times for name, times in layers.items() if times
        )
        assert dense + matrices == parameter_count(model)


@pytest.mark.parametrize("name", GRIDS)
def test_experts_gradients_are_summed_over_their_copies_alone(name: str) -> None:
    program, grid = lowered(strategy(name)), ExpertGrid.of(strategy(name))
    stage = program.world // program.mesh["pp"]
    reached = {0}
    for op in program.blocks["moe.reduce"].ops if "moe.reduce" in program.blocks else ():
        if op.reads[0].startswith("experts."):
            reached = {r for first in reached for r in group_ranks(program.mesh, op.group, first)}
    assert reached == set(range(0, stage, grid.etp * grid.ep))
    assert len(reached) == grid.edp


@pytest.mark.parametrize("name", [name for name in GRIDS if "ep" in GRIDS[name]])
def test_groups_of_a_fold_divide_the_ranks_and_lie_as_placed(name: str) -> None:
    parallel = strategy(name)
    program, grid = lowered(parallel), ExpertGrid.of(parallel)
    groups = {tuple(group_ranks(program.mesh, grid.group, r)) for r in range(program.world)}
    assert sorted(r for group in groups for r in group) == list(range(program.world))
    assert {len(group) for group in groups} == {parallel.ep}
    cluster = load_cluster("dgx-h100", 1)
    placed = place_group("ep", replace(parallel, etp=grid.etp), cluster)
    assert ClusterCost(cluster, program.mesh).layout(grid.group) == placed


# ---------------------------------------------------------------- machines


@pytest.mark.parametrize("name", GRIDS)
def test_machines_agree(name: str) -> None:
    program = lowered(strategy(name), MIXED)
    agree(program, cluster_cost(program), Wires(2e-6, 20e9))


def test_a_pass_prices_arrays_as_it_does_numbers() -> None:
    parallel = ParallelStrategy(dp_shard=2, ep=2)
    cached = np.array([16, 32])
    many = lower_pass(MIXED, parallel, 4, np.array([2, 8]), cached)
    cost = cluster_cost(many)
    for index, new in enumerate((2, 8)):
        one = lower_pass(MIXED, parallel, 4, new, int(cached[index]))
        for op, same in zip(many.blocks["moe.F"].ops, one.blocks["moe.F"].ops, strict=True):
            found = np.broadcast_to(cost.seconds(op), 2)[index]
            assert found == pytest.approx(float(cost.seconds(same)))


SIZES = [(name, tp, t) for name, tp in (("mixtral-8x7b", 4), ("qwen3-30b-a3b", 1))
         for t in (1, 8, 64, 512, 4096)]  # fmt: skip


@pytest.mark.parametrize(("name", "tp", "tokens"), SIZES)
def test_products_cost_what_fused_kernels_were_measured_to(name: str, tp: int, tokens: int) -> None:
    """Priced from curves of plain products; the family of fused layers has its own measurements."""
    model, cluster = load_model(name), load_cluster("dgx-h100", 1)
    program = lower_pass(model, ParallelStrategy(tp=tp), tokens, 1, 0)
    cost = ClusterCost(cluster, program.mesh)
    ops = program.blocks["moe.F"].ops
    kinds = [op.kind for op in ops]
    ours = ops[kinds.index("permute") : kinds.index("combine") + 1]
    shape = {"tokens": tokens, "hidden": model.hidden, "ffn": model.moe_ffn, "tp": tp, "ep": 1,
             "experts_per_token": model.experts_per_token, "experts": model.experts,
             "alpha": 0.0}  # fmt: skip
    fused = choose_curves("moe", cluster.chip, "bf16", "", None).seconds(
        shape, cluster.chip, cold=True
    )
    assert sum(float(cost.seconds(op)) for op in ours) == pytest.approx(float(fused), rel=0.25)


@pytest.mark.distributed
def test_one_rank_of_a_folded_grid_runs_alone() -> None:
    """No peers: local copies in place of exchanges, the same bytes, FLOPs and memory."""
    pytest.importorskip("torch")
    from backends.launch import Job, RunOptions, run_many

    small = replace(MIXED, hidden=32, head_dim=8, ffn=48, moe_ffn=48, vocab=64, layers=2,
                    weights_dtype="fp32", compute_dtype="fp32")  # fmt: skip
    found = lower_training(small, strategy("folded", zero_stage=3), TrainStep(4, 16))
    options = RunOptions(repeats=1, warmup=0, track_memory=True, count_flops=True)
    for result in run_many([Job(found, replace(options, alone_rank=rank)) for rank in (0, 3)]):
        (only,), totals = result.ranks, step_totals(found, 0)
        assert only.payload_bytes == dict(totals.payload_bytes)
        assert {kind for kind, _ in only.payload_bytes} >= {"all_to_all", "all_gather"}
        assert only.flops == totals.flops
        assert only.peak_live_bytes == activation_peaks(found, 0)[0] + residents(found, 0).total


# ---------------------------------------------------------------- mistakes


MISTAKES = [
    (MOE, {"dp_shard": 6, "ep": 3}, r"\].ep = 3 does not divide the model's 8 experts: ep = 1"),
    (MOE, {"dp_shard": 2, "ep": 4}, r"ep = 4 x etp 1 does not divide dp x cp x tp = 2: ep = 2"),
    (MOE, {"tp": 2, "ep": 2}, r"ep = 2 x etp 2 does not divide .* = 2: ep = 1"),
    (MOE, {"tp": 4, "etp": 2}, r"etp = 2 is not available with tp 4.* set etp = 4"),
    (replace(MOE, moe_ffn=255), {"tp": 2}, "width 255 of an expert"),
    (LLAMA, {"dp_shard": 2, "ep": 2}, r"ep needs a mixture of experts"),
    (LLAMA, {"capacity_factor": 2.0}, r"capacity_factor needs a mixture of experts"),
    (replace(MOE, parallel_block=True), {}, "experts beside attention"),
    (replace(MOE, shared_gate=True), {}, "a gate on its shared experts"),
]


@pytest.mark.parametrize(("model", "degrees", "text"), MISTAKES)
def test_mistakes(model: ModelSpec, degrees: dict[str, object], text: str) -> None:
    with pytest.raises(InputError, match=text):
        lowered(ParallelStrategy(**degrees), model)  # type: ignore[arg-type]

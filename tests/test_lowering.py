"""Lowering against closed forms: FLOPs, parameters, bytes of collectives, arrays of passes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from machines import GPT2, LLAMA, STRATEGIES, cluster_cost, strategy

from hwmodels.cost import ClusterCost
from simcore.catalogue import load_model
from simcore.errors import InputError
from simcore.lower import lower_pass, lower_training
from simcore.models import ModelSpec, forward_flops, parameter_count
from simcore.ops import work
from simcore.program import Program
from simcore.templates import lay
from simcore.workloads import TrainStep

SEQ = 128
MICROBATCHES = 3
MODELS = {"llama": LLAMA, "gpt2": GPT2, "gpt2-untied": replace(GPT2, tied_embeddings=False)}
BF16, FP32 = 2, 4


def lowered(name: str, model: ModelSpec = LLAMA) -> Program:
    parallel = strategy(name)
    return lower_training(model, parallel, TrainStep(MICROBATCHES * parallel.dp, SEQ))


def executed_flops(program: Program, kinds: tuple[str, ...]) -> float:
    """Return the matrix FLOPs over all ranks of the actions of these kinds."""
    total = sum(
        float(work(op).flops)
        for actions in program.order
        for action in actions
        if action.kind in kinds
        for _, _, op in program.ops(action.body)
    )
    return total * program.world / program.mesh["pp"]


def payload(program: Program, group: str, pipeline_rank: int = 0) -> Counter[str]:
    """Return the bytes that one rank's collectives along ``group`` carry in a step, by kind."""
    found: Counter[str] = Counter()
    for action in program.order[pipeline_rank]:
        for _, _, op in program.ops(action.body):
            if op.is_communication and op.group == group:
                found[op.kind] += float(work(op).payload_bytes)
    return found


SHARDED_PIPELINES = ("zero2 x pp", "zero3 x tp+sp x pp")
FLOPS_CASES = [
    (name, model)
    for name in STRATEGIES
    for model in MODELS
    if name != "pp+recompute" and not (name in SHARDED_PIPELINES and MODELS[model].tied_embeddings)
]


@pytest.mark.parametrize(("name", "model"), FLOPS_CASES)
def test_flops(name: str, model: str) -> None:
    """Backward doubles weight products and takes 5/2 of attention, whose scores come again."""
    spec = MODELS[model]
    program = lowered(name, spec)
    batch = MICROBATCHES * strategy(name).dp
    forward = forward_flops(spec, batch, SEQ)
    mixing = 4 * batch * spec.layers * spec.heads * spec.head_dim * SEQ**2
    assert executed_flops(program, ("F",)) == pytest.approx(forward, rel=1e-12)
    assert executed_flops(program, ("B", "BR")) == pytest.approx(
        2 * (forward - mixing) + 5 / 2 * mixing, rel=1e-12
    )
    assert executed_flops(program, ("O", "TIE")) == 0


def test_recomputation_repeats_the_forward_of_layers() -> None:
    plain, again = lowered("pp"), lowered("pp+recompute")
    head = 2 * MICROBATCHES * SEQ * LLAMA.hidden * LLAMA.vocab
    extra = executed_flops(again, ("B", "BR")) - executed_flops(plain, ("B", "BR"))
    assert extra == pytest.approx(executed_flops(plain, ("F",)) - head, rel=1e-12)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", ["one", "dp", "zero3", "tp", "tp+sp", "pp", "pp4"])
def test_parameters(name: str, model: str) -> None:
    """The weights of all shards and stages are the network's; a tied table lies on both ends."""
    spec, tp = MODELS[model], strategy(name).tp
    if model == "gpt2":
        spec = replace(spec, vocab=1024)
    program = lowered(name, spec)
    held: set[tuple[str, int]] = set()
    for actions in program.order:
        for action in actions:
            for call, _, op in program.ops(action.body):
                held |= {
                    (n, call.layer if program.buffer(n).layered else -1)
                    for n in op.reads
                    if program.buffer(n).pieces or "." in n
                }
    total = 0.0
    for name_, _ in held:
        buffer = program.buffer(name_)
        if buffer.scope == "weight" and buffer.base and not buffer.part:
            total += float(buffer.elements) * (tp if buffer.shard_dim >= 0 else 1)
    assert total == parameter_count(spec)


def test_a_vocabulary_that_does_not_divide_is_padded() -> None:
    spec = replace(LLAMA, vocab=1023)
    program = lowered("tp", spec)
    assert program.buffers["embed.table"].elements * 2 == 1024 * spec.hidden


ACTIVATIONS = SEQ * LLAMA.hidden * BF16  # b s h e


def test_tensor_parallel_bytes() -> None:
    """Two all-reduces of b s h per layer and direction (Megatron-LM, section 3), and the ends."""
    found = payload(lowered("tp"), "tp")
    statistics = 2 * SEQ * 3 * FP32
    assert found == {
        "all_reduce": MICROBATCHES * (4 * LLAMA.layers + 2) * ACTIVATIONS,
        "all_gather": MICROBATCHES * statistics,
    }


def test_sequence_parallel_bytes() -> None:
    """Each all-reduce becomes an all-gather and a reduce-scatter (Korthikanti et al. 2022).

    Gradients of the norms, whose weights are replicated, are summed once a step.
    """
    found = payload(lowered("tp+sp"), "tp")
    each = MICROBATCHES * (4 * LLAMA.layers + 2) * ACTIVATIONS
    assert found == {
        "all_gather": each + MICROBATCHES * 2 * SEQ * 3 * FP32,
        "reduce_scatter": each,
        "all_reduce": (2 * LLAMA.layers + 1) * LLAMA.hidden * FP32,
    }


def test_data_parallel_bytes() -> None:
    size = parameter_count(LLAMA)
    assert payload(lowered("dp"), "dp_replicate") == {"all_reduce": size * FP32}
    assert payload(lowered("zero1"), "dp_shard") == {
        "reduce_scatter": size * FP32,
        "all_gather": size * BF16,
    }
    assert payload(lowered("zero2"), "dp_shard") == {
        "reduce_scatter": MICROBATCHES * size * FP32,
        "all_gather": size * BF16,
    }
    assert payload(lowered("zero3"), "dp_shard") == {
        "reduce_scatter": MICROBATCHES * size * FP32,
        "all_gather": 2 * MICROBATCHES * size * BF16,
    }


def test_hybrid_sharding_bytes() -> None:
    program = lowered("hsdp")
    size = parameter_count(LLAMA)
    assert payload(program, "dp_shard")["all_gather"] == 2 * MICROBATCHES * size * BF16
    assert payload(program, "dp_replicate") == {"all_reduce": MICROBATCHES * size / 2 * FP32}


def test_pipeline_bytes() -> None:
    program = lowered("pp4")
    assert payload(program, "pp", 0) == {
        "send": MICROBATCHES * ACTIVATIONS,
        "recv": MICROBATCHES * ACTIVATIONS,
    }
    assert payload(program, "pp", 1)["send"] == 2 * MICROBATCHES * ACTIVATIONS
    shared = payload(lowered("zero3 x tp+sp x pp"), "pp", 0)
    assert shared["send"] == MICROBATCHES * ACTIVATIONS / 2


@pytest.mark.parametrize("name", SHARDED_PIPELINES)
def test_sharded_gradients_of_a_tied_table_need_one_stage(name: str) -> None:
    with pytest.raises(InputError, match="zero_stage"):
        lowered(name, GPT2)


def test_tied_embeddings_are_summed_over_the_ends() -> None:
    program = lowered("pp4", GPT2)
    table = GPT2.vocab * GPT2.hidden + GPT2.max_positions * GPT2.hidden
    for rank, size in enumerate((table, 0, 0, table)):
        assert payload(program, "ends", rank).get("all_reduce", 0) == size * FP32


@pytest.mark.parametrize("name", ["one", "tp", "dp x tp"])
def test_passes_are_priced_as_arrays(name: str) -> None:
    """One lowering over all lengths of the cache gives what one lowering per length gives."""
    model, parallel = load_model("llama-3.1-8b"), strategy(name)
    cached = np.arange(1, 4000, 500)
    for new in (1, 16):
        program = lower_pass(model, parallel, 8, new, cached)
        cost: ClusterCost = cluster_cost(program)
        seconds = lay(program, "0F", cost).elapsed_s
        each = [
            lay(lower_pass(model, parallel, 8, new, int(c)), "0F", cost).elapsed_s for c in cached
        ]
        assert seconds.shape == cached.shape
        np.testing.assert_allclose(seconds, each, rtol=1e-12)
        assert np.all(np.diff(seconds) > 0)


def test_generation_through_a_pipeline_is_priced_as_arrays() -> None:
    model, parallel = load_model("llama-3.1-8b"), strategy("pp4", tp=2)
    cached = np.array([10, 1000, 100_000])
    program = lower_pass(model, parallel, 4, 1, cached)
    cost = cluster_cost(program)
    for stage in range(4):
        seconds = lay(program, f"{stage}F", cost).elapsed_s
        one = lay(lower_pass(model, parallel, 4, 1, 1000), f"{stage}F", cost).elapsed_s
        assert seconds[1] == pytest.approx(one, rel=1e-12)

"""Gradients and boundaries in 8 bits: sizes, errors, and what ranks compute with them."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from machines import GPT2, LLAMA, cluster_cost, strategy

from simcore.accounting import step_totals
from simcore.codecs import BLOCK, CODECS, coded_bytes
from simcore.engine import simulate
from simcore.errors import InputError
from simcore.estimate import estimate, lower_bound, serial_sum
from simcore.liveness import activation_peaks, residents
from simcore.lower import lower_pass, lower_training
from simcore.models import ModelSpec
from simcore.program import Program, coordinates
from simcore.strategy import ParallelStrategy
from simcore.workloads import TrainStep

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402
from dense import Dense  # noqa: E402

from backends.codec_ops import CODEC_OPS, decode, encode  # noqa: E402
from backends.data import sequence  # noqa: E402
from backends.launch import Job, RunOptions, RunResult, run_many  # noqa: E402
from backends.weights import dense_weight  # noqa: E402
from simcore.ops import Op  # noqa: E402

# ------------------------------------------------------------------------------- codes


def nearest(codec: str, x: np.ndarray) -> np.ndarray:
    """Return the values that a codec makes of a piece, by looking at every level."""
    levels, found = np.array(CODECS[codec].levels), np.zeros_like(x)
    for first in range(0, x.size, BLOCK):
        block = x[first : first + BLOCK]
        scale = float(np.float32(np.abs(block).max())) or 1.0
        near = np.abs(block[:, None] / scale - levels).argmin(1)
        found[first : first + BLOCK] = levels[near] * scale
    return found


@pytest.mark.parametrize("codec", CODECS)
@given(st.integers(1, 3 * BLOCK), st.floats(1e-6, 1e6), st.integers(0, 99))
@settings(max_examples=20)
def test_no_value_is_further_off_than_the_codec_says(codec: str, n: int, size: float, seed: int):
    x = torch.randn(2, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * size
    coded = encode(codec, x)
    assert coded.shape == (2, coded_bytes(n))
    assert coded.dtype == torch.uint8
    found = decode(codec, coded, n, x.dtype)
    for row, back in zip(x.numpy(), found.numpy(), strict=True):
        np.testing.assert_allclose(back, nearest(codec, row), rtol=1e-12)
        for first in range(0, n, BLOCK):
            block = slice(first, first + BLOCK)
            rounded = 2.0**-23  # the scale is kept in fp32
            most = (CODECS[codec].error + rounded) * np.abs(row[block]).max()
            assert np.abs(row[block] - back[block]).max() <= most


def test_errors_are_the_formats() -> None:
    assert CODECS["int8"].error == pytest.approx(1 / 254)
    assert CODECS["fp8"].error == pytest.approx(16 / 448)  # values near the top lie 32 apart
    assert all(len(codec.levels) <= 256 for codec in CODECS.values())
    assert all(np.all(np.diff(codec.levels) > 0) for codec in CODECS.values())


def test_fp8_is_torchs() -> None:
    x = torch.randn(1, BLOCK, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    most = x.abs().max().float().double()
    theirs = (x / most * 448).to(torch.float8_e4m3fn).double() / 448 * most
    torch.testing.assert_close(decode("fp8", encode("fp8", x), BLOCK, x.dtype), theirs)


def test_the_dynamic_tree_keeps_small_values() -> None:
    """A value a thousandth of the largest loses nearly all in equal steps, little in the tree."""
    x = torch.full((1, 64), 1.3e-3, dtype=torch.float64)
    x[0, 0] = 1.0
    errors = {
        name: float((decode(name, encode(name, x), 64, x.dtype) / x - 1).abs().max())
        for name in ("int8", "dynamic8")
    }
    assert errors["dynamic8"] < 0.06
    assert errors["int8"] > 0.9


@pytest.mark.parametrize("codec", CODECS)
def test_nothing_is_lost_for_good_with_feedback(codec: str) -> None:
    """What was sent over many steps differs from what should have been by one step's error."""
    attrs = {"codec": codec, "coded": coded_bytes(50), "flops": 1}
    op = Op("encode", {"t": 2, "n": 50}, "fp64", ("g", "e"), ("c", "e"), attrs=attrs)
    random = torch.Generator().manual_seed(1)
    lost, sent, meant = (torch.zeros(99, dtype=torch.float64) for _ in range(3))
    for _ in range(40):
        x = torch.randn(99, generator=random, dtype=torch.float64)
        code, lost = CODEC_OPS["encode"](None, op, (x, lost), (None, lost))
        sent += decode(codec, code.view(2, -1), 50, x.dtype).reshape(-1)[:99]
        meant += x
    torch.testing.assert_close(sent + lost, meant)
    assert float(lost.abs().max()) < 6 * CODECS[codec].error


# ------------------------------------------------------------------------------- programs


@pytest.mark.parametrize(
    "options",
    [
        {"dp_replicate": 2, "grad_codec": "int8"},
        {"dp_replicate": 2, "grad_codec": "int8", "error_feedback": True, "tp": 2},
        {"dp_shard": 2, "zero_stage": 1, "grad_codec": "fp8", "pp": 2, "act_codec": "int8"},
        {"dp_shard": 2, "grad_codec": "dynamic8"},
        {"pp": 4, "act_codec": "int8", "schedule": "zb_h1"},
        {"pp": 2, "act_codec": "fp8", "virtual_stages": 2, "schedule": "interleaved"},
        {"pp": 2, "dp_replicate": 2, "schedule": "pipedream", "grad_codec": "int8"},
    ],
)
def test_machines_agree_on_coded_programs(options: dict[str, Any]) -> None:
    parallel = ParallelStrategy(**options)
    program = lower_training(LLAMA, parallel, TrainStep(4 * parallel.dp, 64))
    cost = cluster_cost(program)
    found = estimate(program, cost, cost).step_s
    for detail in (False, True):
        assert simulate(program, cost, cost, detail=detail).step_s == pytest.approx(found, rel=0.02)
    assert lower_bound(program, cost) <= found * (1 + 1e-9)
    assert found <= serial_sum(program, cost, cost) * (1 + 1e-9)


def test_a_quarter_of_the_bytes_travels() -> None:
    """A sum moves its tensor out and in: 8 bytes a value in fp32, 2 and the scales in 8 bits."""
    programs = [
        lower_training(LLAMA, ParallelStrategy(dp_replicate=4, grad_codec=codec), TrainStep(4, 64))
        for codec in ("none", "int8")
    ]
    plain, coded = (step_totals(program, 0).payload_bytes for program in programs)
    whole = plain["all_reduce", "dp_replicate"]
    for kind in ("all_to_all", "all_gather"):
        share = coded[kind, "dp_replicate"] / whole
        assert 1 / 4 < share < 1 / 4 * (1 + 4 / BLOCK) + 1e-4
    assert ("all_reduce", "dp_replicate") not in coded
    both = [
        step_totals(
            lower_training(LLAMA, strategy("pp", act_codec=codec), TrainStep(4, 64)), 0
        ).payload_bytes["send", "pp"]
        for codec in ("none", "fp8")
    ]
    assert both[1] == pytest.approx(both[0] / 2, rel=0.01)  # of bf16


def test_slow_links_gain_and_fast_ones_pay_for_the_coding() -> None:
    def step_s(codec: str, bandwidth: float) -> float:
        parallel = ParallelStrategy(dp_replicate=4, grad_codec=codec)
        program = lower_training(LLAMA, parallel, TrainStep(4, 64))
        cost = cluster_cost(program, bandwidth=bandwidth, latency=0.01)
        return estimate(program, cost, cost).step_s

    assert step_s("int8", 1e-3) < 0.4 * step_s("none", 1e-3)
    assert step_s("int8", 1e6) > step_s("none", 1e6)


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        (LLAMA, {"grad_codec": "int7", "dp_replicate": 2}, "'int8'"),
        (LLAMA, {"grad_codec": "int8"}, "dp and cp are 1"),
        (LLAMA, {"act_codec": "int8"}, "pp is 1"),
        (LLAMA, {"error_feedback": True, "dp_replicate": 2}, "goes with a grad_codec"),
        (LLAMA, {"grad_codec": "int8", "dp_replicate": 2, "dp_shard": 2}, "between them"),
        (GPT2, {"grad_codec": "int8", "dp_replicate": 2, "pp": 2}, "without tied"),
        (
            LLAMA,
            {"grad_codec": "int8", "dp_replicate": 2, "pp": 2, "schedule": "chimera"},
            "one copy",
        ),
    ],
)
def test_refusals_say_what_to_do(model: ModelSpec, options: dict[str, Any], words: str) -> None:
    parallel = ParallelStrategy(**options)
    with pytest.raises(InputError, match=words):
        lower_training(model, parallel, TrainStep(4 * parallel.dp, 64))


def test_generation_codes_nothing() -> None:
    with pytest.raises(InputError, match="act_codec"):
        lower_pass(LLAMA, strategy("pp", act_codec="int8"), 2, 4, 0)


# ------------------------------------------------------------------------------- on real ranks

SEED, WORK = 5, TrainStep(4, 8)
SMALL = ModelSpec(
    "small", 3, 16, 4, 2, 4, 24, 29, weights_dtype="fp32", compute_dtype="fp32", kv_dtype="fp32"
)
RUNS = {
    "replicas": ParallelStrategy(dp_replicate=2, grad_codec="int8"),
    "feedback": ParallelStrategy(dp_replicate=2, grad_codec="fp8", error_feedback=True),
    "zero1": ParallelStrategy(dp_shard=2, zero_stage=1, grad_codec="fp8"),
    "zero3": ParallelStrategy(dp_shard=2, grad_codec="dynamic8"),
    "boundary": ParallelStrategy(pp=2, act_codec="int8"),
    "boundary of split backwards": ParallelStrategy(pp=2, act_codec="fp8", schedule="zb_h1"),
}
EXACT = RunOptions(SEED, 0, 1, dtype="fp64", dump=("losses", "gradients"), timeout_s=60)
COUNTED = RunOptions(SEED, 1, 0, track_memory=True, count_flops=True, timeout_s=60)


def program_of(name: str) -> Program:
    return lower_training(SMALL, RUNS[name], WORK)


@cache
def results() -> dict[tuple[str, str], RunResult]:
    jobs = {
        (name, kind): Job(program_of(name), options)
        for name in RUNS
        for kind, options in (("exact", EXACT), ("counted", COUNTED))
    }
    return dict(zip(jobs, run_many(list(jobs.values())), strict=True))


class Coded(torch.autograd.Function):
    """What a coded message makes of activations, and of their gradients on the way back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, codec: str) -> torch.Tensor:
        ctx.codec = codec
        return torch.from_numpy(nearest(codec, x.detach().numpy().ravel())).view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.from_numpy(nearest(ctx.codec, grad.numpy().ravel())).view_as(grad), None


@cache
def dense_gradients(codec: str, cut: int, number: int) -> tuple[float, dict[Any, torch.Tensor]]:
    """Return a sequence's share of the loss and of the gradients; ``cut``: the coded boundary."""
    start = lower_training(SMALL, ParallelStrategy(), WORK)
    dense = Dense(SMALL).double()
    for (weight, layer), parameter in dense.named().items():
        whole = dense_weight(weight, layer, start.buffers[weight], 1, SEED, torch.float64)
        parameter.data.copy_(whole)
    row = sequence(SEED, number, WORK.seq_len, SMALL.vocab)
    x = dense.table[row[None, :-1]]
    for index, layer in enumerate(dense.layers):
        x = layer(Coded.apply(x, codec) if index == cut else x)
    logits = (dense.nf(x) @ dense.head.t())[0]
    scale = 1 / (WORK.global_batch * WORK.seq_len)
    loss = F.cross_entropy(logits, row[1:], reduction="sum") * scale
    loss.backward()
    return float(loss.detach()), {key: p.grad.clone() for key, p in dense.named().items()}


def flat(program: Program, unit: str, layer: int, gradients: dict[Any, torch.Tensor]) -> np.ndarray:
    found = np.zeros(program.buffers[f"{unit}.g"].elements)
    for name, held in program.buffers.items():
        if held.base == f"{unit}.w" and not held.part:
            part = gradients[name, layer if held.layered else -1].numpy().ravel()
            found[held.offset : held.offset + held.elements] = part
    return found


def summed(program: Program, key: str, rank: int) -> np.ndarray:
    """Return what a rank's optimizer should find in a flat buffer, coded and summed by hand."""
    unit, layer = key.split(".", maxsplit=1)[0], int(key.rsplit("/", 1)[1])
    strategy_of = next(s for n, s in RUNS.items() if program_of(n) == program)
    codec, count = strategy_of.grad_codec, WORK.global_batch
    cut = 2 if strategy_of.pp > 1 else -1
    each = [
        flat(program, unit, layer, dense_gradients(strategy_of.act_codec, cut, i)[1])
        for i in range(count)
    ]
    if codec == "none":
        return np.sum(each, 0)
    if strategy_of.zero == 3:  # every microbatch is summed by itself
        groups = [each[0:2], each[2:4]]
    else:
        groups = [[each[0] + each[2], each[1] + each[3]]]
    size = -(-each[0].size // 2)
    parts = np.zeros((2, size))
    for group in groups:
        for one in group:
            padded = np.pad(one, (0, 2 * size - one.size)).reshape(2, size)
            parts += [nearest(codec, piece) for piece in padded]
    if strategy_of.zero:
        return parts[rank]
    return np.concatenate([nearest(codec, part) for part in parts])[: each[0].size]


@pytest.mark.distributed
@pytest.mark.parametrize("name", RUNS)
def test_gradients_are_those_coded_by_hand(name: str) -> None:
    program, found, parallel = program_of(name), results()[name, "exact"], RUNS[name]
    plain = [dense_gradients("none", -1, i) for i in range(WORK.global_batch)]
    cut = 2 if parallel.pp > 1 else -1
    losses = [dense_gradients(parallel.act_codec, cut, i)[0] for i in range(WORK.global_batch)]
    assert sum(found.losses) == pytest.approx(sum(losses), rel=1e-9)
    for rank in found.ranks:
        for key, array in rank.arrays.items():
            np.testing.assert_allclose(
                array, summed(program, key, rank.rank), rtol=1e-9, atol=1e-13
            )
            if array.size == program.buffers[f"{key.split('.')[0]}.g"].elements:
                unit, layer = key.split(".")[0], int(key.rsplit("/", 1)[1])
                exact = np.sum([flat(program, unit, layer, g) for _, g in plain], 0)
                assert not np.allclose(array, exact, rtol=1e-9)
                assert np.linalg.norm(array - exact) < 0.1 * np.linalg.norm(exact)


@pytest.mark.distributed
@pytest.mark.parametrize("name", RUNS)
def test_ranks_move_hold_and_do_what_the_program_says(name: str) -> None:
    program = program_of(name)
    for rank in results()[name, "counted"].ranks:
        stage = coordinates(program.mesh, rank.rank)["pp"]
        totals = step_totals(program, stage, rank.rank)
        assert rank.payload_bytes == dict(totals.payload_bytes)
        assert rank.flops == totals.flops
        held = residents(program, stage).total + activation_peaks(program, stage)[0]
        assert rank.peak_live_bytes == held

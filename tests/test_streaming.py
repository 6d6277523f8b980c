"""Streamed layers and losses: work and memory against closed forms, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from machines import GPT2, LLAMA

from simcore.accounting import step_totals
from simcore.errors import InputError
from simcore.liveness import activation_peaks
from simcore.lower import lower_training
from simcore.models import ModelSpec
from simcore.program import Program
from simcore.strategy import ParallelStrategy
from simcore.workloads import TrainStep

SEQ = 128


def lowered(model: ModelSpec = LLAMA, seq: int = SEQ, **parallel: object) -> Program:
    work = TrainStep(2, seq)
    return lower_training(model, ParallelStrategy(**parallel), work)  # type: ignore[arg-type]


def peak(model: ModelSpec = LLAMA, **parallel: object) -> float:
    return activation_peaks(lowered(model, **parallel), 0)[0]


@settings(max_examples=12, deadline=None)
@given(st.sampled_from((1, 2, 4, 8, 32)), st.sampled_from((0, 1, 2, 16)), st.sampled_from((1, 2)))
def test_flops(chunks: int, losses: int, microbatch: int) -> None:
    """Layers run forward twice but for their last product; chunks multiply (c + 1) / 2c of pairs.

    Without chunks nothing is computed again.
    """
    m, tokens = LLAMA, 2 * SEQ
    width = m.heads * m.head_dim
    last = 2 * m.hidden * m.ffn
    linear = 2 * m.hidden * (2 * width + 2 * m.kv_heads * m.head_dim + 2 * m.ffn) + last
    pairs = 4 * width * SEQ * ((chunks + 1) / (2 * chunks) if chunks > 1 else 1)
    again = linear - last + pairs if chunks > 1 else 0
    layers = m.layers * (3 * linear + 3.5 * pairs + again)
    head = 3 * 2 * m.hidden * m.vocab
    program = lowered(stream_chunks=chunks, loss_chunks=losses, microbatch=microbatch)
    assert step_totals(program, 0).flops == pytest.approx(tokens * (layers + head), rel=1e-12)


def test_one_chunk_is_alive() -> None:
    """A long sequence's peak is its layers' inputs, one layer's packed rows and their gradients,
    and one chunk."""
    m, seq, chunks = LLAMA, 4096, 32
    model = replace(m, vocab=64)
    packed = (m.heads + 2 * m.kv_heads) * m.head_dim
    program = lower_training(model, ParallelStrategy(stream_chunks=chunks), TrainStep(1, seq))
    found = activation_peaks(program, 0)[0]
    inputs = (m.layers + 1) * m.hidden
    rest = 2 * packed + m.hidden  # qkv.all, its gradient, the gradient of a layer's input
    least = 2 * seq * (inputs + rest - m.hidden)
    assert least <= found <= least * 1.1 + 2 * seq / chunks * 8 * (m.hidden + 2 * m.ffn + packed)
    whole = lower_training(model, ParallelStrategy(recompute="full"), TrainStep(1, seq))
    assert found < 0.7 * activation_peaks(whole, 0)[0]


def test_logits_of_one_chunk() -> None:
    """With a large vocabulary the logits and their gradient decide."""
    model = replace(LLAMA, vocab=200_000)
    logits = 2 * 2 * SEQ * model.vocab
    whole, parts = peak(model, loss_chunks=1), peak(model, loss_chunks=16)
    assert whole >= logits
    assert whole - parts == pytest.approx(15 / 16 * logits, rel=0.02)


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from((2, 4, 8)),
    st.sampled_from(({}, {"tp": 2}, {"dp_shard": 2}, {"pp": 2, "microbatch": 1})),
    st.sampled_from((LLAMA, GPT2)),
)
def test_streaming_never_takes_more_memory_than_checkpoints(
    chunks: int, rest: dict[str, object], model: ModelSpec
) -> None:
    whole, parts = (
        activation_peaks(lowered(model, 1024, **how, **rest), 0)[0]
        for how in ({"recompute": "full"}, {"stream_chunks": chunks})
    )
    assert parts <= whole


@pytest.mark.parametrize(
    ("model", "wrong", "words"),
    [
        (LLAMA, {"stream_chunks": 3}, "128 tokens"),
        (LLAMA, {"loss_chunks": 5}, "loss_chunks 5"),
        (LLAMA, {"stream_chunks": 2, "cp": 2}, "cp = 1"),
        (LLAMA, {"stream_chunks": 2, "recompute": "full"}, "recompute"),
        (LLAMA, {"stream_chunks": 2, "tp": 2, "sequence_parallel": True}, "sequence_parallel"),
        (LLAMA, {"loss_chunks": 2, "pp": 2, "schedule": "zb_h1"}, "splits backwards"),
        (replace(LLAMA, causal=False), {"stream_chunks": 2}, "causal"),
        (
            replace(LLAMA, experts=4, experts_per_token=2, moe_ffn=64, ffn=0),
            {"stream_chunks": 2},
            "experts",
        ),
    ],
)
def test_what_cannot_be_streamed_is_refused(
    model: ModelSpec, wrong: dict[str, object], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        lowered(model, **wrong)

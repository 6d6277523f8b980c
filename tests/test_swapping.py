"""Activations swapped by token: bytes on device and host, hidden copies, what is refused."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from machines import LLAMA, cluster

from hwmodels.catalogue import load_link, make_cluster
from hwmodels.cost import ClusterCost
from hwmodels.memory import swapped_share
from simcore.accounting import step_totals
from simcore.errors import InputError
from simcore.estimate import estimate, lower_bound
from simcore.liveness import activation_peaks, host_peak
from simcore.lower import lower_training
from simcore.models import ModelSpec
from simcore.ops import COPIES, Op, Size
from simcore.program import Program
from simcore.strategy import ParallelStrategy
from simcore.swapping import TO_DEVICE, TO_HOST
from simcore.workloads import TrainStep

SEQ = 128
QUERY = LLAMA.heads * LLAMA.head_dim
WIDE = QUERY + 2 * LLAMA.kv_heads * LLAMA.head_dim
WHOLE = 2 * (LLAMA.hidden + QUERY) + 4 * LLAMA.heads  # a token's input, output of attention, lse
REST = 2 * (3 * LLAMA.hidden + WIDE + 3 * LLAMA.ffn)  # n1, mid, n2; packed rows; gate, up, product


def lowered(model: ModelSpec = LLAMA, seq: int = SEQ, **parallel: object) -> Program:
    return lower_training(model, ParallelStrategy(**parallel), TrainStep(2, seq))  # type: ignore[arg-type]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, SEQ), st.sampled_from((1, 2)))
def test_bytes_and_flops(rows: int, microbatch: int) -> None:
    """What goes to the host, and what runs again: all products but the last, of the other rows."""
    share, tokens = rows / SEQ, microbatch * SEQ
    program = lowered(swap_fraction=share, microbatch=microbatch)
    expected = LLAMA.layers * tokens * (WHOLE + share * REST)
    assert host_peak(program, 0) == pytest.approx(expected)
    plain = lowered(microbatch=microbatch)
    linear = 2 * LLAMA.hidden * (WIDE + QUERY + 2 * LLAMA.ffn)
    again = step_totals(program, 0).flops - step_totals(plain, 0).flops
    assert again == pytest.approx((1 - share) * 2 * SEQ * LLAMA.layers * linear)
    assert host_peak(plain, 0) == 0


def test_two_layers_are_on_the_device() -> None:
    """However many layers there are: one that computes, and one whose copies are under way."""
    deep = replace(LLAMA, layers=12)
    plain, swapped = (
        activation_peaks(lowered(deep, 1024, **how), 0)[0] for how in ({}, {"swap_fraction": 1.0})
    )
    more = activation_peaks(lowered(replace(LLAMA, layers=24), 1024, swap_fraction=1.0), 0)[0]
    assert swapped == more
    assert swapped < 4 / 12 * plain


@given(*(st.floats(1e3, 1e12) for _ in range(2)), st.floats(1e-6, 10), st.floats(1e3, 1e13))
def test_the_share_is_the_largest_that_hides(
    token: float, whole: float, window: float, host: float
) -> None:
    link = load_link("pcie4x16")
    share = swapped_share(token, whole, window, link, host)
    able = min(window * link.bytes_per_s * link.efficiency, host)
    assert 0 <= share <= 1
    if share:
        assert whole + share * token <= able * (1 + 1e-9)
    if share < 1:
        assert whole + np.nextafter(share, 2) * token >= able * (1 - 1e-9)


@dataclass(frozen=True)
class Instant(ClusterCost):
    """A cluster whose copies to and from the host take no time."""

    def seconds(self, op: Op) -> Size:
        return 0.0 if op.kind in COPIES else ClusterCost.seconds(self, op)


@pytest.mark.parametrize("speed", [10, 40])
def test_a_hidden_share_costs_no_time(speed: float) -> None:
    """The closed form's share hides behind a layer's forward; all of it takes longer than that."""
    seq, machine = 8192, cluster(1, speed=speed)

    def step(share: float, kind: type[ClusterCost] = ClusterCost) -> float:
        program = lowered(seq=seq, swap_fraction=share)
        cost = kind(machine, program.mesh)
        found = estimate(program, cost, cost).step_s
        assert found >= lower_bound(program, cost) * (1 - 1e-12)
        return found

    plain = lowered(seq=seq)
    cost = ClusterCost(machine, plain.mesh)
    window = sum(float(cost.seconds(op)) for op in plain.blocks["layer.F"].ops)
    share = swapped_share(seq * REST, seq * WHOLE, window, load_link(machine.chip.host_link))
    assert 0 < share < 1
    share = np.floor(share * seq) / seq
    # The last layer's copies out and the first one's back hide behind nothing: there are four.
    assert step(share) <= 1.05 * step(share, Instant)
    assert step(1.0) > 1.1 * step(1.0, Instant)


def test_copies_take_the_host_link() -> None:
    program = lowered(swap_fraction=1.0)
    machine = make_cluster("a100-sxm-80gb", 1)
    cost, link = ClusterCost(machine, program.mesh), load_link(machine.chip.host_link)
    ops = [op for block in program.blocks.values() for op in block.ops]
    copies = [op for op in ops if op.stream in (TO_HOST, TO_DEVICE)]
    assert {op.kind for op in copies} == {"offload", "fetch"}
    for op in copies:
        size = program.buffers[(op.writes if op.kind == "offload" else op.reads)[0]].size_bytes
        assert cost.seconds(op) == pytest.approx(
            link.latency_s + size / (link.bytes_per_s * link.efficiency)
        )


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"swap_fraction": 1.5}, "between 0 and 1"),
        ({"swap_fraction": 0.5, "cp": 2}, "cp = 1"),
        ({"swap_fraction": 0.5, "recompute": "full"}, "recompute"),
        ({"swap_fraction": 0.5, "stream_chunks": 2}, "stream_chunks"),
        ({"swap_fraction": 0.5, "pp": 2, "schedule": "zb_h1"}, "split backwards"),
        ({"swap_fraction": 0.5, "tp": 2, "sequence_parallel": True}, "sequence_parallel"),
    ],
)
def test_what_cannot_be_swapped_is_refused(wrong: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        lowered(**wrong)

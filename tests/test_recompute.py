"""Recomputation: what it keeps, what it runs again, against closed forms."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from machines import LLAMA

from simcore.accounting import step_totals
from simcore.errors import InputError
from simcore.liveness import activation_peaks
from simcore.lower import lower_training
from simcore.models import forward_flops
from simcore.ops import work
from simcore.program import Program
from simcore.recompute import MODULES
from simcore.strategy import ParallelStrategy
from simcore.workloads import TrainStep

SEQ = 128
WORK = TrainStep(1, SEQ)


def lowered(work: TrainStep = WORK, **parallel: object) -> Program:
    return lower_training(LLAMA, ParallelStrategy(**parallel), work)  # type: ignore[arg-type]


def flops(**parallel: object) -> float:
    return step_totals(lowered(**parallel), 0).flops


def kept(**parallel: object) -> float:
    """Return the bytes alive after the forward pass."""
    return activation_peaks(lowered(**parallel), 0)[1][0][1]


LAYER_FLOPS = (forward_flops(LLAMA, 1, SEQ) - 2 * SEQ * LLAMA.vocab * LLAMA.hidden) / LLAMA.layers
CORE_FLOPS = 4 * LLAMA.heads * LLAMA.head_dim * SEQ**2


def test_a_layer_that_recomputes_runs_twice() -> None:
    for count in range(LLAMA.layers + 1):
        again = flops(recompute="full", recompute_layers=(count,)) - flops()
        assert again == pytest.approx(count * LAYER_FLOPS, rel=1e-12)


def test_the_core_of_attention_runs_twice() -> None:
    """Korthikanti et al. 2022, section 5: scores and their product with the values alone."""
    again = flops(recompute="selective") - flops()
    assert again == pytest.approx(LLAMA.layers * CORE_FLOPS, rel=1e-12)


@pytest.mark.parametrize("parallel", [{}, {"cp": 2}, {"cp": 2, "cp_kind": "ulysses"}, {"tp": 2}])
def test_attention_that_is_kept_runs_once(parallel: dict[str, object]) -> None:
    """Its products and what moves inside it are not repeated; kept are one output and its lse."""
    programs = {
        how: lowered(recompute=how, **parallel) for how in ("none", "keep_attention", "full")
    }
    flops = {how: step_totals(found, 0).flops for how, found in programs.items()}
    peak = {how: activation_peaks(found, 0)[0] for how, found in programs.items()}
    ops = programs["full"].blocks["layer.F"].ops
    core = [op for op in ops if op.kind.startswith("attention") and work(op).flops]
    each = sum(work(op).flops for op in core)
    mixing = LLAMA.layers * each
    assert flops["full"] - flops["keep_attention"] == pytest.approx(mixing, rel=1e-12)
    assert flops["none"] < flops["keep_attention"]
    again = {op.kind for op in programs["keep_attention"].blocks["layer.R"].ops}
    assert not again & {"attention", "attention_block", "attention_merge", "ring_shift"}
    assert peak["full"] < peak["keep_attention"] < peak["none"]


def test_what_a_policy_keeps() -> None:
    """Per token of a layer; a full one keeps its input alone, in 16 bits."""
    model, layers = LLAMA, LLAMA.layers
    query, both = model.heads * model.head_dim, model.kv_heads * model.head_dim
    full = kept(recompute="full")
    for count in range(layers + 1):
        share = (layers - count) / layers
        expected = full + share * (kept() - full)
        assert kept(recompute="full", recompute_layers=(count,)) == pytest.approx(expected)
    # An output of `query` elements in 16 bits and one fp32 number per head.
    core = SEQ * (2 * query + 4 * model.heads)
    assert kept() - kept(recompute="selective") == pytest.approx(layers * core)
    modules = ("norms", "activation", "attention")
    every = kept(recompute="selective", recompute_modules=modules)
    wide = SEQ * 2 * (2 * model.hidden + model.ffn)
    assert kept() - every == pytest.approx(layers * (core + wide))
    inputs = SEQ * 2 * (2 * model.hidden + query + 2 * both + 2 * model.ffn)
    assert every - full == pytest.approx(layers * (inputs - SEQ * 2 * model.hidden))


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(("selective", "keep_attention", "full")),
    st.lists(st.sampled_from(sorted(MODULES)), unique=True).map(tuple),
    st.integers(0, LLAMA.layers),
    st.sampled_from(({}, {"tp": 2, "sequence_parallel": True}, {"cp": 2}, {"dp_shard": 2})),
)
def test_more_work_for_less_memory(
    policy: str, modules: tuple[str, ...], count: int, rest: dict[str, object]
) -> None:
    """No policy keeps more than none does, and none does less work."""
    if policy != "selective":
        modules = ()
    work = TrainStep(2, SEQ)
    how = {"recompute": policy, "recompute_modules": modules, "recompute_layers": (count,)}
    plain, again = lowered(work, **rest), lowered(work, **rest, **how)
    assert step_totals(again, 0).flops >= step_totals(plain, 0).flops
    before, after = (activation_peaks(p, 0)[1][0][1] for p in (plain, again))
    assert after <= before
    for what, size in step_totals(plain, 0).payload_bytes.items():
        assert step_totals(again, 0).payload_bytes[what] >= size


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"recompute": "som"}, "none, selective"),
        ({"recompute": "selective", "recompute_modules": ("norm",)}, "'norms'"),
        ({"recompute": "full", "recompute_modules": ("norms",)}, "'selective'"),
        ({"recompute_layers": (1,)}, "recompute = 'full'"),
        ({"recompute": "full", "pp": 2, "recompute_layers": (1, 1, 1)}, "3 stages"),
        ({"recompute": "full", "pp": 2, "recompute_layers": (3, 1)}, "stage 0"),
    ],
)
def test_what_does_not_fit_is_refused(wrong: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        lowered(TrainStep(2, SEQ), **wrong)

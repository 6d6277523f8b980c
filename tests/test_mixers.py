"""Sequence mixers: what is predicted is what torch does, and seconds obey physics."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwmodels import mixers as hw
from hwmodels.catalogue import load_chip
from hwmodels.families.family import matrix_peak
from simcore.errors import InputError
from simcore.mixers import MIXERS, MixerCost, mixer_cost
from simcore.mixers import mixer as counts
from simcore.mixers.nonlinear import EAGER_LAUNCHES
from validation.systems.agreement import SIZES

torch = pytest.importorskip("torch")
backend = pytest.importorskip("backends.mixers")

H100 = load_chip("h100-sxm-80gb")
HALTING = {"batch": 2, "seq_len": 8, "width": 4, "max_steps": 5}
ALL_SIZES = {**SIZES, "universal_transformer": HALTING}
FORMS = [(name, form) for name in MIXERS for form in backend.TORCH_MIXERS[name].forms]
# One kernel of the arithmetic of another form; nothing else to execute.
NOT_EXECUTED = {("diagonal_gru", "fused")}
# Their dependent steps run inside one library call, where they cannot be counted.
IN_LIBRARY = {
    ("s4", "parallel"),
    ("lstm", "fused"),
    ("min_gru", "parallel"),
    ("min_lstm", "parallel"),
}
# Mixers of sequences; a longer one may start merging with the cheaper operator.
SEQUENCES = [p for p in FORMS if "seq_len" in MIXERS[p[0]].columns and p[0] != "merging"]


def priced(name: str, form: str) -> MixerCost:
    """Return the predicted cost at the executed sizes, float64."""
    shape: dict[str, float] = {**ALL_SIZES[name], "element_bytes": 8}
    if name == "universal_transformer":
        shape["mean_steps"] = float(backend.draw_inputs(name, HALTING)["halt"].double().mean())
    return mixer_cost(name, form, shape)


@pytest.fixture(scope="module")
def runs() -> dict[tuple[str, str], backend.MixerRun]:
    return {pair: backend.run_mixer(*pair, ALL_SIZES[pair[0]]) for pair in FORMS}


# ------------------------------------------------------------------ predicted against executed


def test_every_form_is_priced_and_executed() -> None:
    priced_forms = {(name, form) for name, mixer in MIXERS.items() for form in mixer.forms}
    assert set(FORMS) | NOT_EXECUTED == priced_forms
    assert not set(FORMS) & NOT_EXECUTED
    assert set(ALL_SIZES) == set(MIXERS)


@pytest.mark.parametrize("name", MIXERS)
def test_forms_agree(name: str, runs: dict[tuple[str, str], backend.MixerRun]) -> None:
    first, *others = [run for (owner, _), run in runs.items() if owner == name]
    for other in others:
        torch.testing.assert_close(other.output, first.output, rtol=1e-9, atol=1e-11)
    states = [r.state for (owner, _), r in runs.items() if owner == name and r.state]
    for state in states[1:]:
        for mine, theirs in zip(state, states[0], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_work_is_what_was_predicted(
    name: str, form: str, runs: dict[tuple[str, str], backend.MixerRun]
) -> None:
    run, cost = runs[name, form], priced(name, form)
    assert run.matrix_flops == float(cost.matrix_flops)
    if (name, form) not in IN_LIBRARY:
        assert run.serial_steps == float(cost.serial_depth)
    if form == "recurrent":
        assert run.state_bytes == float(cost.state_bytes)


@pytest.mark.parametrize(
    ("name", "form"),
    [("attention", "fused"), ("gla", "parallel"), ("sliding_attention", "chunked")],
)
def test_fused_forms_move_inputs_and_outputs_only(
    name: str, form: str, runs: dict[tuple[str, str], backend.MixerRun]
) -> None:
    run = runs[name, form]
    moved = run.input_bytes + run.output.numel() * run.output.element_size()
    assert float(priced(name, form).hbm_bytes) == moved


@given(st.integers(1, 200))
def test_scans_combine_as_often_as_counted(length: int) -> None:
    from backends.mixers.count import Steps
    from backends.mixers.scans import doubling_scan, tree_scan

    values = torch.arange(1.0, length + 1)
    for scan, combines, levels in (
        (doubling_scan, counts.doubling_combines, counts.doubling_levels),
        (tree_scan, counts.tree_combines, counts.tree_levels),
    ):
        done = []

        def add(first: tuple, second: tuple, done: list = done) -> tuple:
            done.append(len(first[0]))
            return (first[0] + second[0],)

        steps = Steps()
        (sums,) = scan(add, (values,), steps)
        assert torch.equal(sums, values.cumsum(0))
        assert sum(done) == combines(np.float64(length))
        assert steps.count == len(done) == levels(np.float64(length))


@pytest.mark.parametrize("name", ["gru", "lstm"])
def test_eager_kernels_of_a_step(name: str) -> None:
    from backends.mixers.eager import layer_kernels

    assert layer_kernels(name, training=False).per_token == EAGER_LAUNCHES[name]


def test_scanned_layer_has_no_kernels_per_token() -> None:
    from backends.mixers.eager import layer_kernels

    kernels = layer_kernels("min_gru", training=True)
    assert kernels.per_token == 0
    assert kernels.of(512) == kernels.once > 50


# ------------------------------------------------------------------ independent oracles


def test_gru_is_torchs_own() -> None:
    from backends.mixers import nonlinear
    from backends.mixers.count import Steps

    sizes = SIZES["gru"]
    inputs = nonlinear.network(3, "dense")(sizes, torch.Generator().manual_seed(1))
    gru = torch.nn.GRU(5, 4, bias=False, batch_first=True).double()
    gru.load_state_dict({"weight_ih_l0": inputs["w"].T, "weight_hh_l0": inputs["u"].T})
    mine, _ = nonlinear.gru_recurrent(inputs, sizes, Steps())
    torch.testing.assert_close(mine, gru(inputs["x"])[0].detach())


def test_attention_is_torchs_own(runs: dict[tuple[str, str], backend.MixerRun]) -> None:
    x = backend.draw_inputs("attention", SIZES["attention"])
    own = torch.nn.functional.scaled_dot_product_attention(x["q"], x["k"], x["v"], is_causal=True)
    torch.testing.assert_close(runs["attention", "fused"].output, own)


def test_s4_is_a_convolution(runs: dict[tuple[str, str], backend.MixerRun]) -> None:
    x = {name: tensor.numpy() for name, tensor in backend.draw_inputs("s4", SIZES["s4"]).items()}
    length = SIZES["s4"]["seq_len"]
    kernel = ((x["c"] * x["b"])[:, :, None] * x["a"][:, :, None] ** np.arange(length)).sum(1)
    wanted = np.convolve(x["x"][0, 0], kernel[0])[:length]
    np.testing.assert_allclose(runs["s4", "parallel"].output[0, 0].numpy(), wanted)


def test_jacobian_is_autograds() -> None:
    from backends.mixers import nonlinear

    sizes = {"batch": 1, "seq_len": 1, "inputs": 3, "hidden": 4}
    for kind in ("dense", "diagonal"):
        made = nonlinear.network(3, kind)(sizes, torch.Generator().manual_seed(2))
        gates, state = nonlinear.project(made), torch.randn(1, 1, 4, dtype=torch.float64)
        value, jacobian = nonlinear._gru_round(gates, state, made["u"])
        cell = nonlinear.gru_cell(gates[0], state[0], made["u"])
        torch.testing.assert_close(value[0], cell)

        def step(h: torch.Tensor, gates=gates, u=made["u"]) -> torch.Tensor:
            return nonlinear.gru_cell(gates[0], h[None], u)[0]

        exact = torch.autograd.functional.jacobian(step, state[0, 0])
        mine = jacobian[0, 0] if kind == "dense" else torch.diag(jacobian[0, 0])
        torch.testing.assert_close(mine, exact)


def test_newton_stops_once_nothing_moves() -> None:
    from backends.mixers.nonlinear import newton_rounds

    sizes = {"batch": 2, "seq_len": 64, "inputs": 3, "hidden": 3}
    loose, tight = (newton_rounds(sizes, tolerance=t) for t in (1e-2, 1e-10))
    assert 2 <= loose <= tight < 12


# ------------------------------------------------------------------ laws


def lawful_shape(name: str, **over: float) -> dict[str, float]:
    shape: dict[str, float] = {**ALL_SIZES[name], "element_bytes": 2, **over}
    return {**shape, "mean_steps": 3} if name == "universal_transformer" else shape


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_arrays_are_priced_as_numbers_are(name: str, form: str) -> None:
    batches = np.asarray([1.0, 3.0, 8.0])
    together = mixer_cost(name, form, lawful_shape(name, batch=batches))
    for i, batch in enumerate(batches):
        alone = mixer_cost(name, form, lawful_shape(name, batch=batch))
        for each in fields(MixerCost):
            if each.name != "step":
                whole = np.broadcast_to(getattr(together, each.name), (3,))
                assert whole[i] == getattr(alone, each.name), each.name
        seconds = hw.mixer_seconds(together, H100, "bf16")
        assert seconds[i] == hw.mixer_seconds(alone, H100, "bf16")


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_seconds_obey_physics(name: str, form: str) -> None:
    cost = mixer_cost(name, form, lawful_shape(name, batch=64))
    seconds = float(hw.mixer_seconds(cost, H100, "bf16"))
    assert seconds >= float(cost.launches) * H100.launch_s
    assert float(cost.matrix_flops) / seconds <= matrix_peak(H100, "bf16")
    assert float(cost.hbm_bytes) / seconds <= H100.hbm.bytes_per_s
    wide = tuple(replace(t, bytes_per_s=2 * t.bytes_per_s) for t in H100.tiers)
    better = (
        replace(H100, tiers=wide),
        replace(H100, launch_s=H100.launch_s / 2),
        replace(H100, clock_hz=2 * H100.clock_hz),
        replace(H100, peak_flops_per_s={k: 2 * v for k, v in H100.peak_flops_per_s.items()}),
    )
    assert all(hw.mixer_seconds(cost, chip, "bf16") <= seconds for chip in better)
    assert hw.mixer_seconds(cost, H100, "bf16", op_s=1e-3) > seconds


@pytest.mark.parametrize(("name", "form"), SEQUENCES)
def test_more_tokens_cost_no_less(name: str, form: str) -> None:
    lengths = 16.0 * 2 ** np.arange(6)
    costs = [mixer_cost(name, form, lawful_shape(name, seq_len=n)) for n in lengths]
    seconds = [float(hw.mixer_seconds(cost, H100, "bf16")) for cost in costs]
    assert seconds == sorted(seconds)
    assert [float(c.matrix_flops) for c in costs] == sorted(float(c.matrix_flops) for c in costs)


def test_a_step_waits_longer_the_more_blocks_meet() -> None:
    unit, grid = (hw.step_seconds(step, H100) for step in ("unit", "grid"))
    assert 0 < unit < grid < H100.launch_s
    assert hw.step_seconds("launch", H100) == 0


@given(st.integers(2, 500))
def test_small_matrices_fill_tiles(side: int) -> None:
    whole = 2 * side**3 + float(hw.padding_flops(side))
    assert whole == 2 * (math.ceil(side / 32) * 32) ** 2 * math.ceil(side / 8) * 8
    assert whole >= 2 * side**3


def test_numbers_and_whole_tiles_waste_nothing() -> None:
    assert not hw.padding_flops(np.asarray([1.0, 32.0, 64.0])).any()


# ------------------------------------------------------------------ tiles of a fused network


def test_widest_fused_state_is_the_first_without_a_wider_tiling() -> None:
    widest = hw.largest_fused_hidden(H100, 1, 4)
    assert next(hw.fused_tilings(widest, 1, 4, H100), None) is not None
    beyond = range(widest + hw.TILE_ROWS, 2 * widest, hw.TILE_ROWS)
    assert all(next(hw.fused_tilings(n, 1, 4, H100), None) is None for n in beyond)


def test_more_units_hold_a_wider_state() -> None:
    halved = replace(H100, units=H100.units // 2)
    assert hw.largest_fused_hidden(halved, 1, 4) < hw.largest_fused_hidden(H100, 1, 4)
    assert hw.largest_one_block_head(H100, 4) == 64  # the published limit of the Triton kernel


def test_heads_that_do_not_divide_have_no_tiling() -> None:
    assert list(hw.fused_tilings(768, 5, 4, H100)) == []


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("gloo", "chunked", {}), "mixer"),
        (("retnett", "chunked", {}), "'retnet'"),
        (("retnet", "chunkd", {}), "'chunked'"),
        (("aaren", "scan", {"batch": 1}), "needs 'seq_len'"),
        (("aaren", "scan", {"batchs": 1}), "did you mean 'batch'"),
        (("aaren", "scan", {**SIZES["aaren"], "element_bytes": 0}), "above 0"),
    ],
)
def test_bad_input_is_one_sentence(arguments: tuple, said: str) -> None:
    with pytest.raises(InputError, match=said):
        mixer_cost(*arguments)


@pytest.mark.parametrize("pair", [("retnett", "chunked"), ("retnet", "newton")])
def test_unknown_executions_are_named(pair: tuple[str, str]) -> None:
    with pytest.raises(InputError, match="unknown"):
        backend.run_mixer(*pair, SIZES["retnet"])
